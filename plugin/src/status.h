// The plugin's one error type: llama_flash_error, filled in where the error is found.
#pragma once

#include "llama_flash.h"

#include <cstdarg>
#include <cstdint>

// Fills *err (if given) and returns code.
int32_t flash_fail(llama_flash_error * err, int32_t code, const char * format, ...) __attribute__((format(printf, 3, 4)));
