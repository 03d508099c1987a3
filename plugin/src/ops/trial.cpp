#include "ops/trial.h"

#include <algorithm>

// of so many tokens the slowest one says nothing: something else ran
constexpr size_t PER_OUTLIER = 8;

// a trial counts so many times as much as the one before it
constexpr double EARLIER = 4;

trial::trial() {
    for (auto & times : seen) {
        times.reserve(size_t(WINDOWS / 2) * WINDOW);
    }
}

bool trial::next(int64_t ns) {
    if (begun) {
        if (in_trial && at >= SETTLE && ns >= 0) {
            seen[now()].push_back(ns);
        }
        at++;
    }
    begun = true;
    if (in_trial && at == WINDOW) {
        at = 0;
        if (++window == WINDOWS) {
            decide();
        }
    } else if (!in_trial && at >= rest) {
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

// of the tokens seen in this trial
void trial::add(bool with) {
    auto &       times = seen[with];
    const size_t used  = times.size() - times.size() / PER_OUTLIER;
    std::sort(times.begin(), times.end());
    spent[with] /= EARLIER;
    tokens[with] /= EARLIER;
    for (size_t i = 0; i < used; i++) {
        spent[with] += (double) times[i];
    }
    tokens[with] += (double) used;
}

void trial::decide() {
    in_trial = false;
    add(false);
    add(true);
    const bool known  = tokens[0] > 0 && tokens[1] > 0;
    const bool better = known && spent[!best] / tokens[!best] * MARGIN < spent[best] / tokens[best];
    rest              = better || rest < REST ? REST : std::min(2 * rest, LONG);
    best              = better ? !best : best;
}
