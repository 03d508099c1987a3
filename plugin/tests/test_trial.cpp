// What a trial decides, of tokens whose times are made up: what is faster is done nearly always, however noisy they are.
#include "check.h"
#include "ops/trial.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>

namespace {

// a token's time, given its number and whether it is done for it
using device = std::function<int64_t(uint32_t token, bool with)>;

struct outcome {
    double   with    = 0; // share of the tokens that it was done for
    double   slow    = 0; // time, in that of what was best for each token
    uint32_t changes = 0;
};

outcome decode(trial & t, uint32_t n, const device & takes, uint32_t first = 0) {
    outcome o;
    int64_t before = trial::UNKNOWN;
    double  spent  = 0;
    double  least  = 0;
    bool    chosen = t.chosen();
    for (uint32_t i = first; i < first + n; i++) {
        const bool with = t.next(before);
        before          = takes(i, with);
        o.with += with;
        spent += (double) before;
        least += (double) std::min(takes(i, true), takes(i, false));
        o.changes += t.chosen() != chosen;
        chosen = t.chosen();
    }
    o.with /= n;
    o.slow = spent / least;
    return o;
}

// the same for both ways of a token, so that one can be compared with the other
int64_t noise(uint32_t token, uint64_t most) {
    return (int64_t) random_source(token * 7919ull + 1).below(most);
}

void what_is_faster_is_done() {
    for (int64_t percent : { 5, 20, 100 }) {
        for (bool with_is_faster : { true, false }) {
            trial         t;
            const outcome o = decode(t, 2000, [&](uint32_t, bool with) { return with == with_is_faster ? 1000 : 1000 + 10 * percent; });
            CHECK(t.chosen() == with_is_faster, "%d %%: %d", (int) percent, with_is_faster);
            CHECK(o.slow < 1.0 + 0.05 * (double) percent / 100, "%d %%: %f", (int) percent, o.slow);
            CHECK(with_is_faster ? o.with > 0.9 : o.with < 0.1, "%f", o.with);
        }
    }
}

void it_is_done_first_and_stays_where_it_makes_no_difference() {
    trial         t;
    const outcome o = decode(t, 5000, [](uint32_t, bool) { return 1000; });
    CHECK(t.chosen() && o.changes == 0, "%u changes", o.changes);
    CHECK(o.with > 0.95, "%f", o.with);
    trial first;
    for (uint32_t i = 0; i < trial::WARM; i++) {
        CHECK(first.next(1000) && !first.trying(), "token %u", i);
    }
    CHECK(first.next(1000) && first.trying(), "the trial begins with what is done anyway");
}

// reads come in bursts, and other programs run now and then
void noise_does_not_decide() {
    for (int64_t percent : { 20, 60 }) {
        for (bool with_is_faster : { true, false }) {
            uint32_t right = 0;
            for (uint32_t seed = 0; seed < 40; seed++) {
                trial         t;
                const outcome o = decode(t, 2000, [&](uint32_t token, bool with) {
                    const uint32_t n      = token + seed * 100003;
                    const int64_t  effect = with == with_is_faster ? 0 : 10 * percent;
                    const int64_t  hiccup = noise(n + 1, 60) == 0 ? 20000 : 0;
                    return 600 + noise(n, 800) + effect + hiccup;
                });
                right += t.chosen() == with_is_faster;
                CHECK(o.slow < 1.0 + (double) percent / 100, "%f", o.slow);
            }
            CHECK(right >= 37, "%u of 40 right at %d %%", right, (int) percent);
        }
    }
}

// as a cache that fills: each token is faster than the one before, whatever is done
void what_changes_steadily_cancels_out() {
    for (bool with_is_faster : { true, false }) {
        trial t;
        decode(t, trial::WARM + trial::WINDOW * trial::WINDOWS + 1, [&](uint32_t token, bool with) {
            return 3000 - 20 * (int64_t) token + (with == with_is_faster ? 0 : 200);
        });
        CHECK(!t.trying() && t.chosen() == with_is_faster, "after the first trial");
    }
}

void a_change_is_found_within_a_long_rest_and_some() {
    trial t;
    decode(t, 3000, [](uint32_t, bool with) { return with ? 1000 : 1500; });
    CHECK(t.chosen(), "at first it pays");
    const uint32_t soon = trial::LONG + trial::WINDOWS * trial::WINDOW + 1;
    decode(t, soon, [](uint32_t, bool with) { return with ? 1500 : 1000; });
    CHECK(!t.chosen(), "then it does not");
    decode(t, soon, [](uint32_t, bool with) { return with ? 1000 : 1500; });
    CHECK(t.chosen(), "and again it does");
}

// however many levels there are to try
void a_change_among_several_levels_is_found_as_soon() {
    trial    t(4, 2);
    int64_t  before  = trial::UNKNOWN;
    uint32_t fastest = 2;
    for (uint32_t i = 0; i < 4000 + 2 * (trial::LONG + 3 * trial::WINDOWS * trial::WINDOW); i++) {
        fastest = i < 4000 ? 2 : 0;
        before  = t.next(before) == fastest ? 1000 : 1500;
        CHECK(i != 3999 || t.chosen() == 2, "at first it is the second");
    }
    CHECK(t.chosen() == 0, "%u within two rounds", t.chosen());
}

// the levels between the fastest one and the first are slower, and so are those beyond it
void the_best_of_several_levels_is_found() {
    for (uint32_t fastest = 0; fastest < 4; fastest++) {
        trial   t(4, 2);
        int64_t before = trial::UNKNOWN;
        double  spent  = 0;
        for (uint32_t i = 0; i < 3000; i++) {
            const uint32_t level = t.next(before);
            CHECK(level < 4, "level %u", level);
            before = 1000 + 60 * std::abs((int64_t) level - (int64_t) fastest) + noise(i, 40);
            spent += (double) before / 3000;
        }
        CHECK(t.chosen() == fastest, "%u instead of %u", t.chosen(), fastest);
        CHECK(spent < 1050, "%f", spent);
    }
    trial one(1, 0);
    for (uint32_t i = 0; i < 500; i++) {
        CHECK(one.next(1000) == 0, "there is no other level");
    }
}

// prompts and drafts between tokens: their times are unknown, and a trial of which nothing is known changes nothing
void what_is_not_known_is_not_counted() {
    trial t;
    for (uint32_t i = 0; i < 4000; i++) {
        t.next(trial::UNKNOWN);
    }
    CHECK(t.chosen(), "nothing was seen");
    trial   half;
    int64_t before = trial::UNKNOWN;
    for (uint32_t i = 0; i < 2000; i++) {
        const bool with = half.next(i % 2 == 0 ? before : trial::UNKNOWN);
        before          = with ? 2000 : 1000;
    }
    CHECK(!half.chosen(), "every other token was");
}

} // namespace

int main() {
    what_is_faster_is_done();
    it_is_done_first_and_stays_where_it_makes_no_difference();
    noise_does_not_decide();
    what_changes_steadily_cancels_out();
    a_change_is_found_within_a_long_rest_and_some();
    a_change_among_several_levels_is_found_as_soon();
    the_best_of_several_levels_is_found();
    what_is_not_known_is_not_counted();
    printf("ok\n");
    return 0;
}
