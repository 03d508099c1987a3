// What the test programs share: a check that says what it saw and where, and random numbers that are the same everywhere.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

// what a program of random steps is at, to find it again: CHECK says it
struct trial_run {
    unsigned long long seed = 0;
    int                step = -1; // -1: in none
};

inline trial_run now_trying;

// exits with line, condition and a printf-style message
#define CHECK(condition, ...)                                                             \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: not true: %s: ", __FILE__, __LINE__, #condition);     \
            fprintf(stderr, __VA_ARGS__);                                                 \
            if (now_trying.step >= 0) {                                                   \
                fprintf(stderr, ", seed %llu step %d", now_trying.seed, now_trying.step); \
            }                                                                             \
            fprintf(stderr, "\n");                                                        \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

class random_source {
  public:
    explicit random_source(uint64_t seed) : engine(seed) {}

    // in [0, n); the standard's distributions differ between libraries
    uint64_t below(uint64_t n) { return engine() % n; }

    bool chance(uint64_t percent) { return below(100) < percent; }

  private:
    std::mt19937_64 engine;
};
