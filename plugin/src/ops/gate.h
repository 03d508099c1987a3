// An op's way in: ops of one session are computed one at a time. Thread 0 of the op calls these.
#pragma once

#include <cstdint>
#include <string>

class op_gate {
  public:
    // Waits for the op before, and moves a resize on. The session may have failed, then or before (read_queue::failed).
    virtual void begin_op(const std::string & tensor) = 0;
    virtual void end_op()                             = 0;

    // the work space for neurons has grown to so many tokens
    virtual void note_ubatch(uint32_t n_tokens) = 0;

    uint64_t stamp    = 0; // number of the op in progress among the session's
    uint64_t spent_ns = 0; // in the ops before it

  protected:
    ~op_gate() = default;
};
