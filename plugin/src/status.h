// The plugin's one error type: llama_flash_error, filled in where the error is found.
#pragma once

#include "llama_flash.h"

#include <cstdarg>
#include <cstdint>
#include <exception>
#include <new>

// Fills *err (if given) and returns code.
int32_t flash_fail(llama_flash_error * err, int32_t code, const char * format, ...) __attribute__((format(printf, 3, 4)));

// What functions of the C interface are made of: f() returns a code, exceptions become one.
template <typename F> int32_t guarded(llama_flash_error * err, F f) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return flash_fail(err, LLAMA_FLASH_E_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return flash_fail(err, LLAMA_FLASH_E_INTERNAL, "%s", e.what());
    } catch (...) {
        return flash_fail(err, LLAMA_FLASH_E_INTERNAL, "unknown exception");
    }
}
