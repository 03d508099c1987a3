// Whether bytes read again are those read first. A file that was written to has another modification time or size, unless somebody
// has put the time back (utime, `cp --preserve`, `rsync --inplace --times`). Its status time (ctime) moves with every write, and nobody
// can put that back; but it moves with chmod, chown, link, unlink and rename as well, which change no byte. So once it has moved, what
// is read again is compared with the checksum of the first read. Bytes that were not read before cannot be compared: they are used
// as they are if mode, owner, number of links or name differ, as these explain why the status time moved, and refused if nothing does.
// (A write that hides behind such a change, in the time between two looks at the file, is found with the first record that was read
// before it and is read again.)
//
// CRC32C of pieces, four bytes for each record; of use in this process only. While nothing touches a file, a checksum is computed
// once of each record, when it is read first.
#pragma once

#include <cstddef>
#include <cstdint>

// what became of a file since it was opened
enum class file_state : uint8_t {
    same,     // nothing
    touched,  // its status time moved, and something explains why
    doubtful, // its status time moved, and nothing explains why; or it was `changed` and is not any more
    changed,  // its size or modification time differs
};

// what is to be done with bytes that have arrived
enum class byte_check : uint8_t {
    none,
    note,    // their checksum, for later
    compare, // their checksum with the one that is known
    refuse,
};

// state: of their file, seen after they had arrived; known: their checksum, 0 if none is
inline byte_check check_for(file_state state, uint32_t known) {
    switch (state) {
        case file_state::same:     return known ? byte_check::none : byte_check::note;
        case file_state::touched:  return known ? byte_check::compare : byte_check::note;
        case file_state::doubtful: return known ? byte_check::compare : byte_check::refuse;
        case file_state::changed:  break;
    }
    return byte_check::refuse;
}

// Does it; sum: their checksum now. false: they are not what they were, or may not be.
inline bool check_bytes(byte_check check, uint32_t & known, uint32_t sum) {
    if (check == byte_check::note) {
        known = sum;
    }
    return check == byte_check::none || (check != byte_check::refuse && known == sum);
}

// pieces can be summed up by several threads: the checksum of a record is the sum of those of its pieces, in any order
constexpr size_t CHECKSUM_PIECE = 64u << 10; // bytes

// Of one piece; number: which one of the record it is. Three words at a time, each into a remainder of its own, as fast as the CPU's
// instruction allows.
uint32_t checksum_piece(const uint8_t * data, size_t bytes, uint32_t number);

// What is noted: never 0, which stands for "none is known".
inline uint32_t checksum_of_sum(uint32_t sum) {
    return sum ? sum : 1;
}

// of a whole record
uint32_t checksum(const uint8_t * data, size_t bytes);
