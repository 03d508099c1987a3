// How the memory given to a session is divided. A value, and the only place where this is decided: set_memory applies it to an empty
// session, resize to one that holds records, a plan prints it. Knows no session, no files and no ggml.
//
// What nothing works without comes first: tables and work space, the least that each ring needs, what a mode keeps resident, the fewest
// slots that neurons can be computed in. The rest goes to the rings, then to neurons, then to panels (one that is pinned saves its bytes
// on every token, a slot only on a hit), then to slots of experts.
//
// Two things stand while the model runs, so a resize is told them and divides what they leave:
// - the rings. They hold reads under way, and panels in the order in which they are needed. A ring of one size for every memory would
//   need no such rule, but what keeps a fast device busy is more than a small memory has.
// - whether all neurons are pinned where the mode could do with slots. A resize may end that; to begin it would mean to read every
//   record again whenever a limit moves up and down across that point.
// All else follows from the bytes alone: however a session came to them, it has the same layout, that of divide().
#pragma once

#include "base/sector.h"
#include "llama_flash.h"

#include <cstdint>
#include <vector>

constexpr uint32_t FEWEST_NEURON_SLOTS  = 64;
constexpr uint64_t SLOT_ENTRY           = 64;        // bytes of a record's or a neuron slot's entry in the tables of a cache
constexpr uint64_t NEURON_ENTRY         = 24;        // of a neuron in the tables of its store
constexpr uint64_t NEURON_MOST          = 128;       // that a neuron in a slot uses beyond its record: the slot's end and its entry
constexpr uint64_t RING_MOST            = 32u << 20; // of a ring beyond its least: enough to keep a device busy while a wave computes
constexpr uint64_t RING_EXPERTS         = 16;        // for experts so large that fewer of them would be there: a wave's, twice
constexpr uint64_t RING_MOST_OF_EXPERTS = 128u << 20;
constexpr uint64_t RING_PART            = 8; // and of what is left beside the minimum, so many parts at most

// A matrix that is read as panels; none of experts.
struct panel_needs {
    uint64_t offset      = 0; // in the file
    uint64_t bytes       = 0;
    uint64_t panel_bytes = 0; // of each but the last
    uint32_t panels      = 0;
    uint64_t page        = FLASH_SECTOR; // of memory: a multiple of a sector

    // bytes at the begin of the matrix' home that its first n panels use, in whole pages
    uint64_t home_bytes(uint32_t n) const;

    // of all panels, each in whole sectors
    uint64_t span() const;
};

// experts whose slots are of one size
struct class_needs {
    uint32_t records    = 0;
    uint32_t tensors    = 0;
    uint32_t slot_bytes = 0;
};

// a layer's neuron bundle
struct bundle_needs {
    uint64_t record_bytes = 0;
    uint64_t resident     = 0; // bytes of the parts that the mode keeps
    uint32_t neurons      = 0;
    bool     pinnable     = false;
    uint64_t page         = FLASH_SECTOR; // of memory: a multiple of a sector

    // of records [0, n) at their home, in whole pages; the sectors at both ends are read with them
    uint64_t home_bytes(uint32_t n) const;
};

// All that the division depends on, in bytes.
struct memory_needs {
    uint64_t                 tables         = 0; // of tensors and records
    uint64_t                 rows           = 0; // room for rows of tables
    uint64_t                 largest_expert = 0; // in whole sectors
    uint64_t                 largest_panel  = 0;
    uint64_t                 expert_bytes   = 0; // all of them
    uint64_t                 panel_bytes    = 0;
    std::vector<panel_needs> panels; // by tensor
    std::vector<class_needs> classes;

    std::vector<bundle_needs> bundles;
    uint64_t                  neuron_tables = 0; // without what slots use
    uint64_t                  work          = 0; // space to evaluate n_ubatch tokens
    uint32_t                  n_ubatch      = 0;
    uint32_t                  run           = 0;     // neurons of a bundle are streamed and pinned so many at a time
    uint64_t                  longest_run   = 0;     // or longest read of neurons, in whole sectors
    uint64_t                  neuron_slot   = 0;     // bytes of one
    bool                      in_slots      = false; // the mode computes neurons in slots

    uint64_t n_neurons() const;
    uint64_t neuron_bytes() const;
    uint64_t other_bytes() const; // the most that panels and slots of experts use

    // one of its entries is computed while the next is read
    uint64_t expert_ring_least() const { return 2 * largest_expert; }
    uint64_t panel_ring_least() const { return 2 * largest_panel; }
    uint64_t neuron_ring_least() const { return 2 * longest_run; }

    uint64_t minimum() const; // the smallest memory that works
    uint64_t maximum() const; // from here on every record has its place
};

// what no resize changes
struct standing_parts {
    uint64_t expert_ring   = 0; // bytes
    uint64_t panel_ring    = 0;
    uint64_t neuron_ring   = 0;
    bool     neurons_whole = false; // all neurons are pinned
};

struct memory_layout {
    uint64_t              total = 0; // bytes that are divided
    standing_parts        standing;
    std::vector<uint32_t> panels;  // pinned, by tensor
    std::vector<uint32_t> records; // of neurons, pinned: by bundle
    std::vector<uint32_t> slots;   // of experts, by class
    uint32_t              neuron_slots = 0;
};

// bytes: n.minimum() at least
memory_layout divide(const memory_needs & n, uint64_t bytes);

// The same of a session in which these parts stand. bytes: least_of() at least
memory_layout divide(const memory_needs & n, uint64_t bytes, const standing_parts & standing);

// the smallest memory that a session with these parts can go to
uint64_t least_of(const memory_needs & n, const standing_parts & standing);

// the layout's bytes and numbers, by kind
llama_flash_memory describe(const memory_needs & n, const memory_layout & l);
