// How much of something makes tokens fastest, found out while decoding: some tokens with the level that was best, some with another one, turn
// about, then what was better for a while. Knows neither what it is nor a clock: it is told what each token has taken.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

class trial {
  public:
    static constexpr int64_t  UNKNOWN = -1;   // time of a token that is not to be counted
    static constexpr uint32_t WARM    = 16;   // tokens before the first trial: caches fill
    static constexpr uint32_t WINDOW  = 10;   // tokens, one way
    static constexpr uint32_t SETTLE  = 2;    // of these, the first are not counted: they have what the other way has left
    static constexpr uint32_t WINDOWS = 4;    // one way, the other way twice, one way: what changes steadily meanwhile cancels out
    static constexpr uint32_t REST    = 128;  // tokens between two trials, more after each round of them that changes nothing
    static constexpr uint32_t LONG    = 1024; // and at most so many in a round
    static constexpr double   MARGIN  = 1.03; // so much faster is better

    // Levels from 0 on, of which `first` is done until a trial has found a better one. The others are tried in turn, from 0 on.
    explicit trial(uint32_t n_levels = 2, uint32_t first = 1);

    // A token begins; ns: what the one before it has taken, or UNKNOWN. The level for this token.
    uint32_t next(int64_t ns);

    uint32_t chosen() const { return best; } // what a trial has found better; until then the first
    bool     trying() const { return in_trial; }

  private:
    bool     is_other() const { return in_trial && (window == 1 || window == 2); }
    uint32_t now() const { return is_other() ? other : best; }
    void     begin();
    void     decide();
    void     count_on();

    // time of a token at each level in that at the best one, as its trials have shown; each trial counts more than those before it. 0: none.
    std::vector<double>                 shown;
    std::array<std::vector<int64_t>, 2> seen; // in this trial, at the best level and at the other one

    uint32_t best;
    uint32_t other     = 0; // in this trial, or the next one
    uint32_t unchanged = 0; // trials since one that has changed something
    bool     in_trial  = false;
    bool     begun     = false;
    uint32_t window    = 0; // of the trial
    uint32_t at        = 0; // token of the window, or of the rest
    uint32_t rest      = WARM;
};
