// Warm start: which records are worth having in slots, and reading them before anybody asks.
#include "session.h"

#include "base/status.h"

#include <algorithm>
#include <cmath>
#include <utility>

constexpr uint64_t NEURON     = 1ull << 63; // ids of neurons; else of records
constexpr uint64_t WARM_BYTES = 4u << 20;   // of one call

uint64_t llama_flash_session::hot(uint64_t * ids, uint64_t capacity) const {
    std::vector<std::pair<double, uint64_t>> found;
    for (uint32_t i = 0; i < records.size(); i++) {
        if (records[i].place == record_place::slot && std::isfinite(cache.score(i))) { // else read ahead for nobody
            found.emplace_back(cache.score(i), i);
        }
    }
    neurons.each([&](uint32_t neuron, double score) { found.emplace_back(score, NEURON | neuron); });
    // experts and neurons age differently: each kind by its own scores, experts first
    std::sort(found.begin(), found.end(), [](const auto & a, const auto & b) {
        return std::make_pair((a.second & NEURON) != 0, -a.first) < std::make_pair((b.second & NEURON) != 0, -b.first);
    });
    for (uint64_t i = 0; i < std::min<uint64_t>(capacity, found.size()); i++) {
        ids[i] = found[i].second;
    }
    return found.size();
}

int32_t llama_flash_session::warm(const uint64_t * ids, uint64_t n, uint64_t & done, llama_flash_error * err) {
    if (memory.total == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "warm: before set_memory");
    }
    done = n;
    if (failed()) {
        return LLAMA_FLASH_OK; // the caller of the decode that failed will hear of it
    }
    reads.settle(false);
    neurons.settle();
    reads.look_again();

    std::vector<uint32_t> wanted; // neurons of one bundle
    const flash_bundle *  bundle = nullptr;
    bool                  room   = true;
    auto                  flush  = [&] {
        if (bundle && !wanted.empty() && reads.check_file(*bundle->file, bundle->name, bundle->offset, bundle->tensor_bytes())) {
            std::sort(wanted.begin(), wanted.end());
            wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
            room = neurons.warm(*bundle, wanted.data(), wanted.size());
        }
        wanted.clear();
    };
    uint64_t bytes        = 0;
    uint64_t neuron_bytes = 0; // that they take in the ring
    uint64_t i            = 0;
    for (; i < n && bytes < WARM_BYTES && room && !failed(); i++) {
        if (ids[i] & NEURON) {
            const uint64_t neuron = ids[i] & ~NEURON;
            const auto     after  = std::upper_bound(bundles.begin(), bundles.end(), neuron, [](uint64_t k, const flash_bundle & b) { return k < b.first; });
            if (neuron >= n_neurons_of(bundles) || after == bundles.begin()) {
                continue;
            }
            const flash_bundle * b = &*(after - 1);
            if (b->split || neurons.n_slots() < 4) { // as expect() does; or all is pinned
                continue;
            }
            if (b != bundle) {
                flush();
                bundle = b;
            }
            if (wanted.size() >= neurons.may_come()) {
                break;
            }
            neuron_bytes += b->streams.size() * 2 * FLASH_SECTOR + b->cached_bytes; // whole sectors, at worst one by one
            if (neuron_bytes > neurons.warm_bytes()) {
                break;
            }
            wanted.push_back((uint32_t) (neuron - b->first));
            bytes += b->cached_bytes;
            continue;
        }
        if (ids[i] >= records.size()) {
            continue;
        }
        const uint32_t       index = (uint32_t) ids[i];
        flash_record &       r     = records[index];
        const flash_tensor & t     = tensors[r.tensor];
        if (!t.is_experts || r.state != record_state::absent || cache.n_empty(t.size_class) == 0 || !check_file(r)) {
            continue;
        }
        if (cache.score(index) < 0.0) {
            cache.use(index, t.tokens, 1, 1); // used in another life
        }
        int32_t evicted;
        r.index = cache.take(t.size_class, index, false, &evicted);
        r.place = record_place::slot;
        r.data  = slot_data[(size_t) r.index] + (r.offset - flash_sector_floor(r.offset));
        fetch(index);
        r.warmed = true;
        bytes += r.bytes;
    }
    flush();
    reads.submit();
    if (room && !failed()) {
        done = i;
    }
    return LLAMA_FLASH_OK;
}
