#include "base/status.h"

#include <cstdio>
#include <cstring>
#include <sys/resource.h>

int32_t flash_fail(llama_flash_error * err, int32_t code, const char * format, ...) {
    if (err) {
        *err      = {};
        err->code = code;
        va_list args;
        va_start(args, format);
        vsnprintf(err->message, sizeof(err->message), format, args);
        va_end(args);
    }
    return code;
}

namespace {

struct limit {
    int          error; // that it leads to
    int          resource;
    uint64_t     unit;
    const char * what;
    const char * how;
};

const limit LIMITS[] = {
    { EMFILE, RLIMIT_NOFILE, 1, "open files", "ulimit -n" },
    { EAGAIN, RLIMIT_NPROC, 1, "processes and threads of this user", "ulimit -u" },
    { EAGAIN, RLIMIT_AS, 1024, "KiB of addresses", "ulimit -v" }, // a thread's stack
    { ENOMEM, RLIMIT_AS, 1024, "KiB of addresses", "ulimit -v" },
    { ENOMEM, RLIMIT_DATA, 1024, "KiB of data", "ulimit -d" },
    { ENOMEM, RLIMIT_MEMLOCK, 1024, "KiB of locked memory", "ulimit -l" }, // rings of io_uring, before Linux 5.12
};

} // namespace

std::string limits_of(int error) {
    std::string text;
    for (const limit & l : LIMITS) {
        struct rlimit set;
        if (l.error != error || getrlimit((decltype(RLIMIT_AS)) l.resource, &set) != 0 || set.rlim_cur == RLIM_INFINITY) {
            continue;
        }
        text += text.empty() ? " (limits: " : ", ";
        text += std::to_string(set.rlim_cur / l.unit) + " " + l.what + ", `" + l.how + "`";
    }
    return text.empty() ? text : text + ": raise what is too low)";
}

std::string why_failed(int error) {
    return strerror(error) + limits_of(error);
}
