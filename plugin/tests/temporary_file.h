// A file of random bytes on a disk.
#pragma once

#include "check.h"

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

// gone from the folder from the start, so that nothing is left behind
class temporary_file {
  public:
    explicit temporary_file(uint64_t bytes) {
        const char * folder = getenv("TMPDIR");
        std::string  name   = std::string(folder ? folder : "/tmp") + "/llama-flash-test-XXXXXX";
        fd                  = mkstemp(&name[0]);
        CHECK(fd >= 0, "%s: %s", name.c_str(), strerror(errno));
        unlink(name.c_str());
        std::vector<uint8_t> data(bytes);
        random_source        random(bytes);
        for (auto & byte : data) {
            byte = (uint8_t) random.below(256);
        }
        CHECK(write(fd, data.data(), data.size()) == (ssize_t) bytes, "%s", strerror(errno));
    }

    ~temporary_file() { close(fd); }

    temporary_file(const temporary_file &)             = delete;
    temporary_file & operator=(const temporary_file &) = delete;

    int fd;
};
