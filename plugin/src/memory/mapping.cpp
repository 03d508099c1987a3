#include "memory/mapping.h"

#include <cstdint>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

size_t page_bytes() {
    static const size_t bytes = (size_t) sysconf(_SC_PAGESIZE);
    return bytes;
}

mapping::~mapping() {
    if (data) {
        munmap(data, bytes);
    }
}

mapping::mapping(mapping && other) noexcept : data(other.data), bytes(other.bytes), page(other.page) {
    other.data = nullptr;
}

mapping & mapping::operator=(mapping && other) noexcept {
    std::swap(data, other.data);
    std::swap(bytes, other.bytes);
    std::swap(page, other.page);
    return *this;
}

static mapping map_pages(size_t bytes, int protection) {
    mapping m;
    void *  p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p != MAP_FAILED) {
        m.data  = (uint8_t *) p;
        m.bytes = bytes;
    }
    return m;
}

mapping mapping::reserve(size_t bytes) {
    return map_pages(bytes, PROT_NONE);
}

mapping mapping::allocate(size_t bytes) {
    mapping m = map_pages(bytes, PROT_READ | PROT_WRITE);
    if (m.data) {
        madvise(m.data, bytes, MADV_DONTFORK); // reads may be under way into it, and a child has no use for it
        if (!has_huge_pages(page_bytes())) {
            m.in_small_pages();
        } else if (bytes >= HUGE_PAGE) {
            madvise(m.data, bytes, MADV_HUGEPAGE); // a wish: small pages do as well
        }
    }
    return m;
}

mapping mapping::allocate(size_t most, size_t least) {
    mapping m = allocate(most);
    return m.data ? std::move(m) : allocate(least);
}

mapping mapping::home(size_t most, size_t least) {
    mapping m = allocate(most, least);
    if (m.data) {
        m.in_small_pages();
    }
    return m;
}

void mapping::in_small_pages() {
    madvise(data, bytes, MADV_NOHUGEPAGE);
    page = page_bytes();
}

void mapping::populate(uint8_t * begin, uint8_t * end) {
#ifndef MADV_POPULATE_WRITE // Linux 5.14
    constexpr int MADV_POPULATE_WRITE = 23;
#endif
    const uintptr_t first = (uintptr_t) begin & ~((uintptr_t) page_bytes() - 1);
    madvise((void *) first, (uintptr_t) end - first, MADV_POPULATE_WRITE);
}

void mapping::prefer_huge_pages(uint8_t * begin, uint8_t * end, bool huge) {
    const uintptr_t first = ((uintptr_t) begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t last  = (uintptr_t) end / HUGE_PAGE * HUGE_PAGE;
    if (first < last && has_huge_pages(page_bytes())) {
        madvise((void *) first, last - first, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    }
}

void mapping::give_back_beyond(size_t used) {
    // part of a huge page would stay where it is until the kernel has split the page
    const uintptr_t begin = ((uintptr_t) data + used + page - 1) / page * page;
    const uintptr_t end   = (uintptr_t) data + bytes;
    if (data && begin < end) {
        madvise((void *) begin, end - begin, MADV_DONTNEED);
    }
}
