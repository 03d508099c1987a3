// What memory a mapping takes, in this kernel's pages: what was written to, and no more.
#include "check.h"
#include "memory/mapping.h"

#include <cstring>
#include <sys/mman.h>
#include <vector>

namespace {

// bytes of the mapping that are in memory
size_t resident(const mapping & m) {
    std::vector<unsigned char> pages((m.bytes + page_bytes() - 1) / page_bytes());
    CHECK(mincore(m.data, m.bytes, pages.data()) == 0, "mincore");
    size_t n = 0;
    for (unsigned char page : pages) {
        n += page & 1;
    }
    return n * page_bytes();
}

size_t whole_pages(size_t bytes) {
    return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

void huge_pages_are_of_one_size() {
    CHECK(has_huge_pages(4096) && !has_huge_pages(16384) && !has_huge_pages(65536), "2 MiB with pages of 4 KiB only");
    CHECK(HUGE_PAGE % page_bytes() == 0, "pages of %zu bytes", page_bytes());
}

void a_home_takes_what_was_written(size_t bytes) {
    const mapping m = mapping::home(64u << 20, bytes);
    CHECK(m.bytes == 64u << 20, "%zu bytes", m.bytes);
    memset(m.data, 1, bytes);
    CHECK(resident(m) == whole_pages(bytes), "%zu bytes for %zu", resident(m), bytes);
}

void what_is_given_back_is_gone(mapping m, size_t used) {
    memset(m.data, 1, m.bytes);
    m.give_back_beyond(used);
    const size_t held = resident(m);
    CHECK(held >= used && held < used + m.page + page_bytes(), "%zu bytes for %zu in pages of %zu", held, used, m.page);
    for (size_t i = 0; i < used; i += 1000) {
        CHECK(m.data[i] == 1, "byte %zu is lost", i);
    }
}

// a wish: the kernel may not know it
void pages_are_there_before_they_are_touched() {
    const mapping m = mapping::home(8u << 20, 8u << 20);
    mapping::populate(m.data + 100, m.data + 3 * 65536 + 1);
    CHECK(resident(m) == 0 || resident(m) == whole_pages(3 * 65536 + 1), "%zu bytes", resident(m));
    CHECK(m.data[100] == 0, "memory that nobody wrote to");
}

} // namespace

int main() {
    huge_pages_are_of_one_size();
    for (size_t bytes : { (size_t) 1, (size_t) 4096, (size_t) 65536 + 1, (size_t) 5000000 }) {
        a_home_takes_what_was_written(bytes);
        what_is_given_back_is_gone(mapping::home(16u << 20, bytes), bytes);
        what_is_given_back_is_gone(mapping::allocate(16u << 20), bytes);
    }
    pages_are_there_before_they_are_touched();
    printf("mapping: ok, pages of %zu bytes\n", page_bytes());
    return 0;
}
