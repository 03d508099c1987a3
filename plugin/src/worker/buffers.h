// The memory that a worker's client has asked for: how much there is, where it may be written, and how much of it calls touch.
//
// Addresses take no memory. A buffer in which weights are bound is for weights only; what is written to the others counts as a whole
// from the first byte on. While a client says that its calls are of few tokens, the rest of its buffers is lent to flash; whatever it
// says, before it touches more than that the lender is told.
#pragma once

#include "ggml-backend.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <unordered_map>

struct ggml_cgraph;

// Addresses, in whole pages.
class page_set {
  public:
    void     add(uintptr_t begin, uint64_t bytes);
    void     add(const page_set & other);
    void     clear();
    uint64_t bytes() const { return total; }

  private:
    std::map<uintptr_t, uintptr_t> ranges; // their ends by their begins; apart from each other
    uint64_t                       total = 0;
};

// Of the thread that serves, but for expect().
class client_buffers {
  public:
    // limit: bytes of those that are written; most: of all, addresses included
    client_buffers(uint64_t limit, uint64_t most) : limit(limit), most(most) {}

    // nullptr: refused, or the system has none. is_late: flash has what the buffers so far have left; before more is written, `many` is
    // called.
    ggml_backend_buffer_t allocate(size_t size, bool is_late);
    void                  forget(ggml_backend_buffer_t buffer);
    bool                  may_bind(ggml_backend_buffer_t buffer) const; // whether nothing else was written to it
    void                  give_to_weights(ggml_backend_buffer_t buffer);

    uint64_t bytes() const; // of those without weights
    uint64_t largest() const;
    uint64_t written_bytes() const { return written; } // of those that are written

    // Whether it may be written there. If not, that is refused.
    bool may_write(ggml_backend_buffer_t buffer, uintptr_t begin, uint64_t bytes);

    // Whether its memory may be given back. If not, that is refused.
    bool may_empty(ggml_backend_buffer_t buffer) const;

    // the same of all that a graph writes; it may be computed several times
    bool may_compute(const ggml_cgraph & graph);
    void begin_graph(); // before it is computed

    // Until this is called again, calls touch so many bytes, as they say; UINT64_MAX: nobody said so.
    void expect(uint64_t bytes);

    uint64_t                                 resident = 0; // bytes of weights in memory, which count with what is written
    std::function<void(const std::string &)> refuse;       // why
    std::function<void()>                    many;         // more is about to be touched than was expected (once, until expect()), or more than was counted

    // whose buffers this thread writes to; nullptr: nobody's
    static void serve(client_buffers * buffers);

  private:
    struct use {
        uint64_t bytes;
        bool     weights = false;
        bool     written = false;
    };

    void touch(const page_set * pages, uintptr_t begin, uint64_t bytes);

    const uint64_t                                 limit;
    const uint64_t                                 most;
    uint64_t                                       allocated = 0;
    uint64_t                                       written   = 0;
    uint64_t                                       counted   = 0; // bytes() of which `many` knows
    std::unordered_map<ggml_backend_buffer_t, use> uses;

    page_set              of_graph;    // what the last one writes
    uint64_t              of_rows = 0; // bytes of pages of the rows that it scatters
    page_set              touched;     // since expect()
    uint64_t              rows_touched = 0;
    uint32_t              seen         = 0; // of `times`
    std::atomic<uint32_t> times{ 0 };       // that expect() was called
    std::atomic<uint64_t> expected{ UINT64_MAX };
};
