// Anonymous memory of our own, in huge pages where the kernel gives them.
#pragma once

#include <cstddef>
#include <cstdint>

// What memory is divided by where huge pages are of this size; elsewhere they are not asked for. A multiple of every page.
constexpr size_t HUGE_PAGE = 2u << 20;

// bytes of a page of this kernel: 4, 16 or 64 KiB
size_t page_bytes();

// Whether a kernel with pages of so many bytes has huge ones of HUGE_PAGE. One has as many pages as a page has entries of 8 bytes: with
// pages of 16 and 64 KiB it has 32 and 512 MiB, and a budget cannot be kept with memory that comes in such pieces.
constexpr bool has_huge_pages(size_t page) {
    return page * (page / 8) == HUGE_PAGE;
}

// A range of reserved or committed addresses.
class mapping {
  public:
    mapping() = default;
    ~mapping();
    mapping(mapping && other) noexcept;
    mapping & operator=(mapping && other) noexcept;

    static mapping reserve(size_t bytes);  // address space only
    static mapping allocate(size_t bytes); // memory on first touch, in huge pages where the kernel has them of HUGE_PAGE

    // allocate(most): addresses for all that may ever be wanted; where the kernel refuses so many, allocate(least)
    static mapping allocate(size_t most, size_t least);

    // The same in small pages: of memory that ends anywhere in the addresses, no byte more is there than was written.
    static mapping home(size_t most, size_t least);

    // Gives what is beyond the first `used` bytes back to the kernel, in whole pages.
    void give_back_beyond(size_t used);

    // Asks the kernel for the pages of [begin, end) now. A wish: what it does not give comes with the first touch.
    static void populate(uint8_t * begin, uint8_t * end);

    // Whether memory that nobody has touched yet comes in huge pages, those within it. A wish; what is there stays as it is.
    static void prefer_huge_pages(uint8_t * begin, uint8_t * end, bool huge);

    uint8_t * data  = nullptr;
    size_t    bytes = 0;
    size_t    page  = HUGE_PAGE; // that the kernel may give at once

  private:
    void in_small_pages();
};
