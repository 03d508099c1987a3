// Whether something makes tokens faster, found out while decoding: some tokens with it, some without, turn about, then what was better for a
// while. Knows neither what it is nor a clock: it is told what each token has taken.
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
    static constexpr uint32_t REST    = 128;  // tokens between two trials, more after each one that changes nothing
    static constexpr uint32_t LONG    = 1024; // and at most so many
    static constexpr double   MARGIN  = 1.03; // so much faster is better

    trial();

    // A token begins; ns: what the one before it has taken, or UNKNOWN. Whether it is to be done for this token.
    bool next(int64_t ns);

    bool chosen() const { return best; } // what a trial has found better; until then it is done
    bool trying() const { return in_trial; }

  private:
    bool now() const { return in_trial && (window == 1 || window == 2) ? !best : best; }
    void begin();
    void decide();
    void add(bool with);

    // what the trials have shown with it [1] and without [0], each one a quarter of what the one after it counts
    std::array<double, 2>               spent  = {};
    std::array<double, 2>               tokens = {};
    std::array<std::vector<int64_t>, 2> seen; // in this one

    bool     best     = true;
    bool     in_trial = false;
    bool     begun    = false;
    uint32_t window   = 0; // of the trial
    uint32_t at       = 0; // token of the window, or of the rest
    uint32_t rest     = WARM;
};
