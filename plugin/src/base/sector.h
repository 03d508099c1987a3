// Offsets, sizes and addresses of direct reads are multiples of a sector, whatever the device's own is.
#pragma once

#include <cstdint>

constexpr uint64_t FLASH_SECTOR = 4096;

inline uint64_t flash_sector_floor(uint64_t x) {
    return x & ~(FLASH_SECTOR - 1);
}

inline uint64_t flash_sector_ceil(uint64_t x) {
    return (x + FLASH_SECTOR - 1) & ~(FLASH_SECTOR - 1);
}
