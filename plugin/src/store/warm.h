// Warm start: which records are worth having in slots, and reading them before an op asks for them.
#pragma once

#include "store/experts.h"
#include "store/neurons.h"

#include <cstdint>
#include <vector>

// Records in slots, the most used first, as numbers that mean the same in every session on the same files. Returns how many there are,
// fills the first `capacity`.
uint64_t hot_records(const expert_store & experts, const neuron_store & neurons, uint64_t * ids, uint64_t capacity);

// Starts to read some of n such records into empty slots, between two ops. Returns how many are dealt with: all, where there is no
// more room for them.
class warming {
  public:
    warming(expert_store & experts_, neuron_store & neurons_, read_queue & reads_, const std::vector<flash_bundle> & bundles_, uint64_t n_records_) : experts(experts_), neurons(neurons_), reads(reads_), bundles(bundles_), n_records(n_records_) {}

    uint64_t warm(const uint64_t * ids, uint64_t n);

  private:
    const flash_bundle * bundle_of(uint64_t neuron) const; // nullptr: of none that can be warmed
    bool                 add_neuron(const flash_bundle & b, uint64_t neuron);
    void                 flush();

    expert_store &                    experts;
    neuron_store &                    neurons;
    read_queue &                      reads;
    const std::vector<flash_bundle> & bundles;
    uint64_t                          n_records;

    std::vector<uint32_t> wanted; // neurons of one bundle
    const flash_bundle *  bundle  = nullptr;
    bool                  room    = true;
    uint64_t              bytes   = 0; // that are read
    uint64_t              sectors = 0; // bytes that neurons use in the ring
};
