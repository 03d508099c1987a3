// A wave of rows is read by thread 0, then the stock kernel converts them, with all threads: what it sees is a small table of these rows.
#include "store/rows.h"

#include "session.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cstring>

void row_buffer::add(size_t row_bytes) {
    bytes = std::max(bytes, row_bytes);
    span  = (size_t) flash_sector_ceil(bytes) + FLASH_SECTOR;
    rows  = (uint32_t) std::clamp<size_t>(MOST / (span + bytes), 1, 64);
}

void row_buffer::ended(uint32_t, const reader::done & done, file_state of_file) {
    pending--;
    state = std::max(state, of_file);
    if (done.error != 0) {
        queue.fail_read(*done.file, table, done.error, done.error_offset, bytes);
    }
}

// the number of row i of the op's output
static int32_t number_at(const ggml_tensor * ids, int64_t i) {
    return *(const int32_t *) ((const char *) ids->data + i * ids->nb[0]);
}

// Reads the wave that begins at row `first` of the output. false: the session has failed.
static bool read_wave(llama_flash_session & s, flash_tensor & t, const ggml_tensor * ids) {
    row_buffer &   b     = s.rows;
    const size_t   bytes = t.weight.nb[1];
    const int64_t  n_ids = ids->ne[0];
    b.numbers.clear();
    b.ids.clear();
    for (int64_t i = b.first; i < n_ids; i++) {
        const int32_t number = number_at(ids, i);
        if (number < 0 || number >= t.weight.ne[1]) {
            s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, t.name, "the number of a row out of range");
            return false;
        }
        const auto known = std::find(b.numbers.begin(), b.numbers.end(), number);
        if (known == b.numbers.end() && b.numbers.size() == b.rows) {
            break;
        }
        b.ids.push_back((int32_t) (known - b.numbers.begin()));
        if (known == b.numbers.end()) {
            b.numbers.push_back(number);
        }
    }
    b.more = b.first + (int64_t) b.ids.size() < n_ids;

    auto offset_of = [&](size_t i) { return t.offset + (uint64_t) b.numbers[i] * bytes; };
    auto at        = [&](size_t i) { return b.read_to(i) + (offset_of(i) - flash_sector_floor(offset_of(i))); };
    if (!s.reads.check_file(*t.file, t.name, offset_of(0), bytes)) {
        return false;
    }
    b.table = t.name;
    b.state = file_state::same;
    for (size_t i = 0; i < b.numbers.size(); i++) {
        b.pending++;
        s.reads.read(b, (uint32_t) i, *t.file, offset_of(i), bytes, at(i), true);
        s.reads.used(bytes);
        s.notes.stats.rows_read++;
    }
    while (b.pending > 0 && s.reads.wait()) {
    }
    s.reads.look_again(); // it may have changed while it was read
    if (s.failed() || !s.reads.check_file(*t.file, t.name, offset_of(0), bytes)) {
        return false;
    }
    for (size_t i = 0; i < b.numbers.size(); i++) {
        uint32_t &       known = t.row_checksums[(size_t) b.numbers[i]];
        const byte_check check = check_for(b.state, known);
        if (check != byte_check::none && !check_bytes(check, known, check == byte_check::refuse ? 0 : checksum(at(i), bytes))) {
            s.reads.fail_bytes(*t.file, t.name, offset_of(i), bytes, known);
            return false;
        }
        memcpy(b.row(i, bytes), at(i), bytes);
    }
    return true;
}

static void compute_wave(const llama_flash_session & s, const flash_tensor & t, const ggml_compute_params * params, const ggml_tensor * op) {
    const row_buffer & b = s.rows;

    ggml_tensor ids = *op->src[1];
    ids.data        = const_cast<int32_t *>(b.ids.data());
    ids.ne[0]       = (int64_t) b.ids.size();
    ids.nb[0]       = sizeof(int32_t);
    ids.nb[1]       = ids.nb[2] = ids.nb[3] = ids.nb[0] * (size_t) ids.ne[0];

    ggml_tensor dst = *op;
    dst.src[1]      = &ids;
    dst.ne[1]       = ids.ne[0];
    dst.data        = (char *) op->data + (size_t) b.first * op->nb[1];
    stock_get_rows(params, dst, b.row(0, t.weight.nb[1]), (int64_t) b.numbers.size());
}

void flash_get_rows(llama_flash_session & s, flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op) {
    const bool leader = params->ith == 0;
    if (leader) {
        s.begin_op(t.name);
        s.rows.first = 0;
        s.op.stop    = s.failed() || op->src[1]->ne[0] == 0 || !read_wave(s, t, op->src[1]);
    }
    for (;;) {
        ggml_barrier(params->threadpool);
        if (s.op.stop) {
            ggml_barrier(params->threadpool); // all have seen it before the leader lets another op in
            break;
        }
        const bool more = s.rows.more;
        compute_wave(s, t, params, op);
        ggml_barrier(params->threadpool);
        if (!more) {
            break;
        }
        if (leader) {
            s.rows.first += (int64_t) s.rows.ids.size();
            s.op.stop = !read_wave(s, t, op->src[1]);
        }
    }
    if (leader) {
        s.end_op();
    }
}
