// The read that a thread waits for, as other threads see it without waiting themselves.
#pragma once

#include "base/clock.h"

#include <cstdint>
#include <mutex>
#include <string>

struct waited_read {
    int64_t     ns     = 0; // how long; 0: nobody waits
    uint64_t    offset = 0; // in the file
    uint64_t    size   = 0; // bytes
    std::string file;
};

// One thread waits at a time.
class read_watch {
  public:
    // path: stays until end()
    void begin(const std::string & path, uint64_t offset, uint64_t size) {
        std::lock_guard<std::mutex> lock(mutex);
        since_ns    = flash_now_ns();
        file        = &path;
        read.offset = offset;
        read.size   = size;
    }

    void end() {
        std::lock_guard<std::mutex> lock(mutex);
        file = nullptr;
    }

    waited_read look() const {
        std::lock_guard<std::mutex> lock(mutex);
        waited_read                 now;
        if (file) {
            now      = read;
            now.ns   = flash_now_ns() - since_ns;
            now.file = *file;
        }
        return now;
    }

  private:
    mutable std::mutex  mutex;
    int64_t             since_ns = 0;
    const std::string * file     = nullptr;
    waited_read         read;
};
