#include "ops/trial.h"

#include <algorithm>

// of so many tokens the slowest one says nothing: something else ran
constexpr size_t PER_OUTLIER = 8;

// a trial counts so many times as much as those before it
constexpr double EARLIER = 4;

trial::trial(uint32_t n_levels, uint32_t first) : shown(n_levels, 0.0), best(first) {
    for (auto & times : seen) {
        times.reserve(size_t(WINDOWS / 2) * WINDOW);
    }
    if (other == best) {
        count_on();
    }
}

uint32_t trial::next(int64_t ns) {
    if (begun) {
        if (in_trial && at >= SETTLE && ns >= 0) {
            seen[is_other()].push_back(ns);
        }
        at++;
    }
    begun = true;
    if (in_trial && at == WINDOW) {
        at = 0;
        if (++window == WINDOWS) {
            decide();
        }
    } else if (!in_trial && at >= rest && shown.size() > 1) {
        begin();
    }
    return now();
}

void trial::begin() {
    in_trial = true;
    window   = 0;
    at       = 0;
    for (auto & times : seen) {
        times.clear();
    }
}

// the next trial's level
void trial::count_on() {
    do {
        other = (other + 1) % (uint32_t) shown.size();
    } while (other == best && shown.size() > 1);
}

// mean time of the tokens seen in this trial, the slowest ones left out; 0: there was none
static double mean(std::vector<int64_t> & times) {
    std::sort(times.begin(), times.end());
    times.resize(times.size() - times.size() / PER_OUTLIER);
    double sum = 0.0;
    for (int64_t ns : times) {
        sum += (double) ns;
    }
    return times.empty() ? 0.0 : sum / (double) times.size();
}

void trial::decide() {
    in_trial              = false;
    const double at_best  = mean(seen[0]);
    const double at_other = mean(seen[1]);
    bool         better   = false;
    if (at_best > 0.0 && at_other > 0.0) {
        const double ratio = at_other / at_best;
        double &     known = shown[other];
        known              = known > 0.0 ? (EARLIER * ratio + known) / (EARLIER + 1) : ratio;
        better             = known * MARGIN < 1.0;
    }
    unchanged = better ? 0 : unchanged + 1;
    if (better) {
        const double of_former = 1.0 / shown[other];
        std::fill(shown.begin(), shown.end(), 0.0);
        shown[best] = of_former;
        best        = other;
    }
    const uint32_t others = (uint32_t) shown.size() - 1;
    const bool     round  = unchanged > 0 && unchanged % others == 0; // all others have been tried in vain
    rest                  = better || rest < REST ? REST : (round ? std::min(2 * rest, std::max(REST, LONG / others)) : rest);
    count_on();
}
