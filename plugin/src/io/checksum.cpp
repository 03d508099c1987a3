#include "io/checksum.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE4_2__
#    include <nmmintrin.h>
#endif

static uint32_t update(uint32_t crc, uint64_t word) {
#ifdef __SSE4_2__
    return (uint32_t) _mm_crc32_u64(crc, word);
#else
    static const auto table = [] {
        struct {
            uint32_t of[256];
        } t;
        for (uint32_t i = 0; i < 256; i++) {
            t.of[i] = i;
            for (int bit = 0; bit < 8; bit++) {
                t.of[i] = t.of[i] >> 1 ^ (t.of[i] & 1 ? 0x82f63b78u : 0); // Castagnoli's polynomial, reversed
            }
        }
        return t;
    }();
    for (int i = 0; i < 8; i++) {
        crc = table.of[(crc ^ word >> 8 * i) & 0xff] ^ crc >> 8;
    }
    return crc;
#endif
}

uint32_t checksum_piece(const uint8_t * data, size_t bytes, uint32_t number) {
    uint32_t        crc[3] = { ~number, 0x9e3779b9u, 0x7f4a7c15u };
    uint64_t        word[3];
    const size_t    n  = bytes / sizeof(word);
    const uint8_t * at = data;
    for (size_t i = 0; i < n; i++, at += sizeof(word)) {
        memcpy(word, at, sizeof(word));
        crc[0] = update(crc[0], word[0]);
        crc[1] = update(crc[1], word[1]);
        crc[2] = update(crc[2], word[2]);
    }
    const size_t left = bytes - n * sizeof(word);
    memset(word, 0, sizeof(word));
    memcpy(word, at, left);
    for (uint64_t w : word) {
        crc[0] = update(crc[0], w);
    }
    return update(update(crc[0], crc[1] | (uint64_t) crc[2] << 32), bytes);
}

uint32_t checksum(const uint8_t * data, size_t bytes) {
    uint32_t sum = 0;
    for (size_t done = 0; done < bytes; done += CHECKSUM_PIECE) {
        sum += checksum_piece(data + done, std::min(CHECKSUM_PIECE, bytes - done), (uint32_t) (done / CHECKSUM_PIECE));
    }
    return checksum_of_sum(sum);
}
