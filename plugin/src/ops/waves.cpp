#include "ops/waves.h"

#include <algorithm>

// so many huge pages are asked for before the first read begins: the device then follows
constexpr size_t FRESH_AHEAD = 16;

void waves::reserve(size_t n_records) {
    arrived.reserve(n_records);
    streamed.reserve(n_records);
    repack_ends.reserve(n_records);
}

void waves::add(uint32_t index) {
    const flash_record & r = table.records[index];
    any                    = true;
    if (r.check != byte_check::none) {
        checking.push_back(index);
    }
    if (r.state == record_state::raw) {
        arrived.push_back(index);
    }
    if (r.place == record_place::ring) {
        streamed.push_back(index);
    }
}

void waves::begin(const flash_tensor & t) {
    gate.begin_op(t.name);
    any  = false;
    more = false;
    read = nullptr;
    fresh.clear(); // of an op that has failed
    arrived.clear();
    checking.clear();
    streamed.clear();
}

// groups of rows and pieces of records, which threads take one by one

static int64_t row_groups(const flash_record & r) {
    return (r.rows + STOCK_REPACK_ROWS - 1) / STOCK_REPACK_ROWS;
}

void waves::share_out() {
    int64_t total = 0;
    check_ends.clear();
    for (uint32_t index : checking) {
        total += (int64_t) ((table.records[index].bytes + CHECKSUM_PIECE - 1) / CHECKSUM_PIECE);
        check_ends.push_back(total);
    }
    check_sums.assign(checking.size(), 0);
    check_next.store(0, std::memory_order_relaxed);

    total = 0;
    repack_ends.clear();
    for (uint32_t index : arrived) {
        total += row_groups(table.records[index]);
        repack_ends.push_back(total);
    }
    repack_next.store(0, std::memory_order_relaxed);
    fresh_next.store(0, std::memory_order_relaxed);
    stop = reads.failed();
}

// number i of a running count: which entry it is of, and where that one begins
static size_t entry_of(const std::vector<int64_t> & ends, int64_t i, int64_t & begin) {
    const size_t k = (size_t) (std::upper_bound(ends.begin(), ends.end(), i) - ends.begin());
    begin          = k ? ends[k - 1] : 0;
    return k;
}

void waves::repack() {
    static thread_local std::vector<uint8_t> scratch; // grows to the widest row once

    const int64_t total = repack_ends.back();
    for (;;) {
        const int64_t i = repack_next.fetch_add(1, std::memory_order_relaxed);
        if (i >= total) {
            return;
        }
        int64_t              first;
        const flash_record & r    = table.records[arrived[entry_of(repack_ends, i, first)]];
        const flash_tensor & t    = table.tensors[r.tensor];
        const int64_t        row  = (i - first) * STOCK_REPACK_ROWS;
        const size_t         need = t.weight.nb[1] * STOCK_REPACK_ROWS;
        if (scratch.size() < need) {
            scratch.resize(need);
        }
        stock_repack(t.kernel, &t.weight, r.data, row, std::min<int64_t>(STOCK_REPACK_ROWS, r.rows - row), scratch.data());
    }
}

void waves::repack_all(const ggml_compute_params * params) {
    if (arrived.empty()) {
        return;
    }
    const bool    leader = params->ith == 0;
    const int64_t t0     = leader ? flash_now_ns() : 0;
    repack();
    ggml_barrier(params->threadpool);
    if (leader) {
        notes.stats.repack_ns += (uint64_t) (flash_now_ns() - t0);
    }
}

// Bytes that are read first, or again after something has touched their file, are checked by all threads before they are repacked.
// false: the op has failed (all threads).
bool waves::check(record_store & store, const ggml_compute_params * params) {
    const int64_t total = check_ends.back();
    for (;;) {
        const int64_t i = check_next.fetch_add(1, std::memory_order_relaxed);
        if (i >= total) {
            break;
        }
        int64_t              first;
        const size_t         k     = entry_of(check_ends, i, first);
        const flash_record & r     = table.records[checking[k]];
        const size_t         piece = (size_t) (i - first);
        const size_t         at    = piece * CHECKSUM_PIECE;
        const uint32_t       sum   = checksum_piece(r.data + at, std::min<size_t>(CHECKSUM_PIECE, r.bytes - at), (uint32_t) piece);
        __atomic_fetch_add(&check_sums[k], sum, __ATOMIC_RELAXED);
    }
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        for (size_t k = 0; k < checking.size(); k++) {
            store.check_record(table.records[checking[k]], checksum_of_sum(check_sums[k]));
        }
        checking.clear();
        stop = reads.failed();
    }
    ggml_barrier(params->threadpool);
    return !stop;
}

void waves::add_fresh(const flash_record & r) {
    auto page = [](const uint8_t * p) { return (uintptr_t) p / HUGE_PAGE; };
    for (uint8_t * at = r.data; at < r.data + r.bytes;) {
        uint8_t * const next = std::min(r.data + r.bytes, (uint8_t *) ((page(at) + 1) * HUGE_PAGE));
        if (!fresh.empty() && fresh.back().second <= at && page(fresh.back().second - 1) == page(at)) {
            fresh.back().second = next;
        } else {
            fresh.push_back({ at, next });
        }
        at = next;
    }
}

void waves::populate(const ggml_compute_params * params) {
    for (;;) {
        const size_t i = fresh_next.fetch_add(1, std::memory_order_relaxed);
        if (i >= fresh.size()) {
            break;
        }
        mapping::populate(fresh[i].first, fresh[i].second);
        if (params->ith == 0 && i >= FRESH_AHEAD) {
            reads.settle(false);
        }
    }
    ggml_barrier(params->threadpool);
}

// thread 0: of the records that were computed, those in slots are ready for the next op, those in the ring are released
void waves::end_wave(record_store & store) {
    for (uint32_t index : arrived) {
        table.records[index].state = record_state::ready;
    }
    arrived.clear();
    for (uint32_t index : streamed) {
        store.release(index);
    }
    streamed.clear();
}

// thread 0; false: the op has failed
bool waves::end(record_store & store) {
    if (stop) {
        // the wave was not computed, what it held stays as it was read
        for (uint32_t index : streamed) {
            store.release(index);
        }
        streamed.clear();
        arrived.clear();
        checking.clear();
        return false;
    }
    reads.look_again();
    if (read && !store.check_file(*read)) { // it changed while it was read
        return false;
    }
    reads.settle(false);
    return true;
}
