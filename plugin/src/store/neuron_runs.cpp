// Whole runs of neurons' records that stream through the ring, for evaluations that use all of them.
#include "store/neurons.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>

bool neuron_store::start_run() {
    const flash_bundle & b     = *stream_bundle;
    const uint32_t       end   = stream_list ? ((*stream_list)[stream_expert] + 1) * b.n_ff : b.n_neurons;
    const uint32_t       count = std::min(stream_rows, end - stream_first);

    struct extent {
        uint64_t begin;
        uint64_t end;
        size_t   part;
    };
    extent extents[FFN_PARTS];
    size_t n     = 0;
    size_t bytes = 0;
    for (size_t p = 0; p < FFN_PARTS; p++) {
        if (!b.split && n == 1) {
            break; // whole records
        }
        if (!b.parts[p].present || (b.split && b.parts[p].cached == stream_resident)) {
            continue;
        }
        const uint64_t base   = b.offset + (b.split ? b.n_ff * b.parts[p].offset : 0);
        const uint64_t stride = b.split ? b.parts[p].row_bytes : b.record_bytes;
        extents[n]            = { base + stream_first * stride, base + (stream_first + count) * stride, p };
        bytes += flash_sector_ceil(extents[n].end) - flash_sector_floor(extents[n].begin);
        n++;
    }
    const uint32_t index = new_read(b, nullptr);
    read &         r     = reads[index];
    r.entry              = neuron_ring.take(bytes, index);
    if (r.entry == ring::NONE) {
        free_read(index);
        return false;
    }
    r.whole          = {};
    r.whole.first    = stream_first;
    r.whole.count    = count;
    r.jobs           = (uint32_t) n;
    uint8_t * memory = neuron_ring.address(r.entry);
    for (size_t k = 0; k < n; k++) {
        const extent & e    = extents[k];
        uint8_t *      data = memory + (e.begin - flash_sector_floor(e.begin));
        for (size_t p = 0; p < FFN_PARTS; p++) {
            if (b.parts[p].present && (!b.split || p == e.part)) {
                r.whole.data[p]   = b.split ? data : data + b.parts[p].offset;
                r.whole.stride[p] = b.split ? b.parts[p].row_bytes : b.record_bytes;
            }
        }
        queue.read(*this, index, *b.file, e.begin, e.end - e.begin, data);
        queue.used(e.end - e.begin);
        memory += flash_sector_ceil(e.end) - flash_sector_floor(e.begin);
    }
    runs.push_back(index);
    notes.stats.panel_reads++;

    go_on(b, end, count);
    return true;
}

// The next run to schedule comes after `count` neurons of b; end: where b, or the expert, ends.
void neuron_store::go_on(const flash_bundle & b, uint32_t end, uint32_t count) {
    stream_first += count;
    if (stream_first == end && stream_list && ++stream_expert < stream_list->size()) {
        stream_first = (*stream_list)[stream_expert] * b.n_ff;
    } else if (stream_first == end) {
        stream_bundle = nullptr;
        if (stream_ahead) {
            stream_after(b);
        }
    }
}

// the next run to schedule is the first of the layers after b that is not pinned
void neuron_store::stream_after(const flash_bundle & b) {
    stream_bundle = nullptr;
    for (uint32_t i = b.index + 1; i < bundles.size() && !stream_bundle; i++) {
        if (bundles[i].n_expert == 0 && bundles[i].n_pinned < bundles[i].n_neurons) { // which experts it will use is not yet known
            stream_bundle = &bundles[i];
            stream_first  = stream_bundle->n_pinned;
        }
    }
}

// neurons that were asked for are in the ring's way
void neuron_store::let_land() {
    while (under_way() && !queue.failed()) {
        pump();
        if (begin_landing()) {
            land([](const flash_bundle &, uint32_t, const uint8_t *, const bundle_stream *) {});
            end_landing();
        } else {
            queue.wait();
        }
    }
}

void neuron_store::stream_begin(const flash_bundle & b, uint32_t first, uint32_t rows, bool ahead, bool resident) {
    cancel_ahead();
    if (!runs.empty()) {
        const read & r     = reads[runs.front()];
        const bool   next  = r.bundle == &b && r.whole.first == first;
        const bool   later = first == b.n_neurons && r.bundle->index > b.index; // nothing of b is read
        if (!(next || later) || stream_rows != rows || under_way()) {
            stream_end();
        }
    }
    let_land(); // neurons that were asked for are in the ring's way
    stream_ahead    = ahead;
    stream_rows     = rows;
    stream_resident = resident;
    stream_list     = nullptr;
    if (runs.empty()) {
        stream_bundle = first < b.n_neurons ? &b : nullptr;
        stream_first  = first;
        if (!stream_bundle && ahead) {
            stream_after(b);
        }
    } else if (!stream_bundle && ahead && reads[runs.back()].bundle == &b) {
        stream_after(b);
    }
    if (stream_bundle && !check_file(b)) {
        return;
    }
    while (stream_bundle && !queue.failed() && start_run()) {
    }
    queue.submit();
}

void neuron_store::stream_experts(const flash_bundle & b, const std::vector<uint32_t> & experts, uint32_t rows) {
    cancel_ahead();
    stream_end();
    let_land();
    stream_ahead    = false;
    stream_rows     = rows;
    stream_resident = false;
    stream_list     = &experts;
    stream_expert   = 0;
    if (check_file(b)) {
        stream_bundle = &b;
        stream_first  = experts[0] * b.n_ff;
    }
    while (stream_bundle && !queue.failed() && start_run()) {
    }
    queue.submit();
}

const neuron_store::run * neuron_store::stream_next() {
    for (;;) {
        while (stream_bundle && !queue.failed() && start_run()) {
        }
        queue.submit();
        if (queue.failed() || runs.empty()) {
            return nullptr;
        }
        if (reads[runs.front()].jobs == 0) {
            return reads[runs.front()].failed ? nullptr : &reads[runs.front()].whole;
        }
        queue.wait();
    }
}

void neuron_store::stream_release() {
    free_read(runs.front());
    runs.pop_front();
}

void neuron_store::stream_end() {
    stream_bundle = nullptr;
    while (!runs.empty()) {
        while (reads[runs.front()].jobs > 0 && queue.settle(true)) {
        }
        stream_release();
    }
}

void neuron_store::keep(const flash_bundle & b, const run & r, const uint32_t * uses_of, uint32_t most, uint32_t n_tokens, uint64_t now) {
    uint32_t least = 1; // uses that earn a slot
    if (most < r.count) {
        std::vector<uint32_t> counts(uses_of, uses_of + r.count);
        std::nth_element(counts.begin(), counts.begin() + (ptrdiff_t) most, counts.end(), std::greater<uint32_t>());
        least = counts[most] + 1;
    }
    for (uint32_t k = 0; k < r.count; k++) {
        const uint32_t neuron = b.first + r.first + k;
        if (uses_of[k] < least || slot_of[neuron] >= 0) {
            continue;
        }
        cache.use(neuron, now, n_tokens, uses_of[k]);
        int32_t       evicted;
        const int32_t slot = cache.take(0, neuron, false, &evicted);
        if (slot == slot_cache::NONE) {
            break;
        }
        slot_of[neuron] = slot;
        for (size_t p = 0; p < FFN_PARTS; p++) {
            if (b.parts[p].cached) {
                memcpy(slots + (size_t) slot * slot_bytes + b.parts[p].slot_offset, r.data[p] + k * r.stride[p], b.parts[p].row_bytes);
            }
        }
        last_use[neuron] = now + 1;
        if (window != NO_WINDOW) {
            uses.push_back({ neuron, now + 1 });
        }
    }
    cache.end_op();
}

// checks

void neuron_store::check_run(uint32_t first, uint32_t last) {
    const read &         r = reads[runs.front()];
    const flash_bundle & b = *r.bundle;
    for (const auto & stream : b.streams) {
        const size_t p = (size_t) (std::find_if(std::begin(b.parts), std::end(b.parts),
                                                [&](const bundle_part & q) { return q.cached && q.slot_offset == stream.slot_offset; }) -
                                   std::begin(b.parts));
        for (uint32_t k = first; k < last; k++) {
            if (!is_sound(b, r.whole.first + k, stream, r.whole.data[p] + k * r.whole.stride[p], r.state)) {
                unsound.store((int64_t) k * (int64_t) FFN_PARTS + (&stream - b.streams.data()), std::memory_order_relaxed);
                return;
            }
        }
    }
}

bool neuron_store::is_run_sound() {
    const int64_t found = unsound.exchange(-1, std::memory_order_relaxed);
    if (found < 0) {
        return true;
    }
    const read & r = reads[runs.front()];
    fail_neuron(*r.bundle, r.whole.first + (uint32_t) (found / (int64_t) FFN_PARTS), r.bundle->streams[(size_t) found % FFN_PARTS]);
    return false;
}
