#include "store/warm.h"

#include <algorithm>
#include <cmath>
#include <utility>

constexpr uint64_t NEURON     = 1ull << 63; // ids of neurons; else of records
constexpr uint64_t WARM_BYTES = 4u << 20;   // of one call

uint64_t hot_records(const expert_store & experts, const neuron_store & neurons, uint64_t * ids, uint64_t capacity) {
    std::vector<std::pair<double, uint64_t>> found;
    experts.each([&](uint32_t index, double score) {
        if (std::isfinite(score)) { // else it was read ahead, and no op has used it yet
            found.emplace_back(score, index);
        }
    });
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

const flash_bundle * warming::bundle_of(uint64_t neuron) const {
    const auto after = std::upper_bound(bundles.begin(), bundles.end(), neuron, [](uint64_t k, const flash_bundle & b) { return k < b.first; });
    if (after == bundles.begin() || neuron >= bundles.back().first + bundles.back().n_neurons) {
        return nullptr;
    }
    const flash_bundle & b = *(after - 1);
    return b.split || neurons.n_slots() < 4 ? nullptr : &b; // as expect() does; or all is pinned
}

// The neurons that were added so far are read.
void warming::flush() {
    if (bundle && !wanted.empty() && reads.check_file(*bundle->file, bundle->name, bundle->offset, bundle->tensor_bytes())) {
        std::sort(wanted.begin(), wanted.end());
        wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
        room = neurons.warm(*bundle, wanted.data(), wanted.size());
    }
    wanted.clear();
}

// false: no more can come now
bool warming::add_neuron(const flash_bundle & b, uint64_t neuron) {
    if (&b != bundle) {
        flush();
        bundle = &b;
    }
    if (wanted.size() >= neurons.may_come()) {
        return false;
    }
    sectors += b.streams.size() * 2 * FLASH_SECTOR + b.cached_bytes; // whole sectors, at worst one by one
    if (sectors > neurons.warm_bytes()) {
        return false;
    }
    wanted.push_back((uint32_t) (neuron - b.first));
    bytes += b.cached_bytes;
    return true;
}

uint64_t warming::warm(const uint64_t * ids, uint64_t n) {
    uint64_t i = 0;
    for (; i < n && bytes < WARM_BYTES && room && !reads.failed(); i++) {
        if (ids[i] & NEURON) {
            const flash_bundle * b = bundle_of(ids[i] & ~NEURON);
            if (b && !add_neuron(*b, ids[i] & ~NEURON)) {
                break;
            }
        } else if (ids[i] < n_records && experts.warm((uint32_t) ids[i])) {
            bytes += experts.record((uint32_t) ids[i]).bytes;
        }
    }
    flush();
    reads.submit();
    return room && !reads.failed() ? i : n;
}
