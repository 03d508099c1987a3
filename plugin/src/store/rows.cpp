#include "store/rows.h"

#include <algorithm>
#include <cstring>

void row_store::add(size_t row_bytes) {
    longest = std::max(longest, row_bytes);
    span    = (size_t) flash_sector_ceil(longest) + FLASH_SECTOR;
    rows    = (uint32_t) std::clamp<size_t>(MOST / (span + longest), 1, 64);
}

const char * row_store::make(uint64_t & bytes) {
    bytes  = memory_bytes();
    memory = bytes > 0 ? mapping::allocate(bytes) : mapping();
    return bytes == 0 || memory.data ? nullptr : "rows of tables";
}

void row_store::ended(uint32_t, const reader::done & done, file_state of_file) {
    pending--;
    state = std::max(state, of_file);
    if (done.error != 0) {
        reads.fail_read(*done.file, table, done.error, done.error_offset, longest);
    }
}

// the number of row i of the op's output
static int32_t number_at(const ggml_tensor * ids, int64_t i) {
    return *(const int32_t *) ((const char *) ids->data + i * ids->nb[0]);
}

// The wave that begins at row `first` of the output. false: the session has failed.
bool row_store::list(const flash_tensor & t, const ggml_tensor * wanted, int64_t first) {
    numbers.clear();
    ids.clear();
    for (int64_t i = first; i < wanted->ne[0]; i++) {
        const int32_t number = number_at(wanted, i);
        if (number < 0 || number >= t.weight.ne[1]) {
            reads.fail_op(LLAMA_FLASH_E_INTERNAL, t.name, "the number of a row out of range");
            return false;
        }
        const auto known = std::find(numbers.begin(), numbers.end(), number);
        if (known == numbers.end() && numbers.size() == rows) {
            break;
        }
        ids.push_back((int32_t) (known - numbers.begin()));
        if (known == numbers.end()) {
            numbers.push_back(number);
        }
    }
    another = first + (int64_t) ids.size() < wanted->ne[0];
    return true;
}

static uint64_t offset_of(const flash_tensor & t, int32_t number) {
    return t.offset + (uint64_t) number * t.weight.nb[1];
}

bool row_store::read(flash_tensor & t, const ggml_tensor * wanted, int64_t first) {
    const size_t bytes = t.weight.nb[1];
    if (!list(t, wanted, first) || !reads.check_file(*t.file, t.name, offset_of(t, numbers[0]), bytes)) {
        return false;
    }
    table = t.name;
    state = file_state::same;
    for (size_t i = 0; i < numbers.size(); i++) {
        const uint64_t offset = offset_of(t, numbers[i]);
        pending++;
        reads.read(*this, (uint32_t) i, *t.file, offset, bytes, read_to(i) + (offset - flash_sector_floor(offset)), true);
        reads.used(bytes);
        notes.stats.rows_read++;
    }
    while (pending > 0 && reads.wait()) {
    }
    reads.look_again(); // it may have changed while it was read
    return !reads.failed() && reads.check_file(*t.file, t.name, offset_of(t, numbers[0]), bytes) && gather(t);
}

// Puts the rows side by side, if their bytes are those of their first read. false: the session has failed.
bool row_store::gather(flash_tensor & t) {
    const size_t bytes = t.weight.nb[1];
    for (size_t i = 0; i < numbers.size(); i++) {
        const uint64_t   offset = offset_of(t, numbers[i]);
        const uint8_t *  data   = read_to(i) + (offset - flash_sector_floor(offset));
        uint32_t &       known  = t.row_checksums[(size_t) numbers[i]];
        const byte_check check  = check_for(state, known);
        if (check != byte_check::none && !check_bytes(check, known, check == byte_check::refuse ? 0 : checksum(data, bytes))) {
            reads.fail_bytes(*t.file, t.name, offset, bytes, known);
            return false;
        }
        memcpy(row(i, bytes), data, bytes);
    }
    return true;
}
