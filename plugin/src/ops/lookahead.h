// Experts of the next layer, read before its router has spoken: what they will be is guessed from this layer's input (kernels/router.h).
#pragma once

#include "kernels/router.h"
#include "ops/trial.h"
#include "store/experts.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct ggml_compute_params;
struct ggml_tensor;

class lookahead {
  public:
    lookahead(record_table & table_, read_queue & reads_, instruments & notes_, expert_store & experts_) : table(table_), reads(reads_), notes(notes_), experts(experts_) {}

    // n_experts: that are read ahead, of a layer, most. tries: more, fewer or none where that makes tokens faster.
    void reserve(uint32_t n_experts, bool tries);
    void forget(); // what was learnt of the graph, and what pays

    // The router of these experts, for a graph in which it cannot be found or read.
    void give(const std::string & tensor, router_values values) { given.insert_or_assign(tensor, std::move(values)); }

    // Thread 0, an op on t begins: if it is the first of its layer and has a single token, the next layer's experts can be scored.
    // spent_ns: in all ops before it.
    void begin(const flash_tensor & t, const ggml_tensor * op, uint64_t spent_ns);

    // All threads: scores them, if that is still to be done. Thread 0 gets true then, after all threads are through.
    bool score(const ggml_compute_params * params);

    // Thread 0: starts reads of the experts that the next layer will probably use, once: when nothing that the op waits for is in their way.
    void fetch();

  private:
    void   find_next(const flash_tensor & t, const ggml_tensor * op);
    router given_to(uint32_t group) const;
    void   note_token(const flash_tensor & t, bool one, uint64_t spent_ns);
    void   rank(uint32_t n);
    void   hold(const std::vector<uint32_t> & tensors, uint32_t n);
    bool   uses_them(const flash_tensor & t) const { return t.n_records == scores.size() && t.order != 0; }

    std::unordered_map<std::string, router_values> given; // by tensor

    record_table & table;
    read_queue &   reads;
    instruments &  notes;
    expert_store & experts;

    uint32_t              wish  = 0;     // experts that are read ahead, until a trial has found a better number
    bool                  tries = false; // whether there are trials
    trial                 pays;
    uint32_t              most  = 0;     // experts that are read for this token
    uint64_t              token = 0;     // its number
    bool                  timed = false; // it is one, not several, so that its time tells
    uint64_t              begun = 0;     // nanoseconds in ops before it
    std::vector<router>   routers;       // by group, found on the first pass
    std::vector<int32_t>  next;          // by group: the one that is used after it; -1: not yet known, or the last
    int32_t               last   = -1;   // group of the op before
    int32_t               group  = -1;   // whose experts are scored; -1: none
    uint32_t              n_used = 0;    // experts of a token
    bool                  scored = false;
    std::vector<float>    input;
    std::vector<float>    scores; // by expert
    std::vector<uint32_t> best;   // experts, the likeliest first
};
