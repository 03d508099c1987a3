// The clock that durations are measured with.
#pragma once

#include <cstdint>
#include <ctime>

inline int64_t flash_now_ns() {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t) ts.tv_sec * 1000000000 + ts.tv_nsec;
}
