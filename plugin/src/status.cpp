#include "status.h"

#include <cstdio>

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
