// The plugin's one error type: llama_flash_error, filled in where the error is found.
#pragma once

#include "llama_flash.h"

#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <exception>
#include <new>
#include <string>

// Fills *err (if given) and returns code.
int32_t flash_fail(llama_flash_error * err, int32_t code, const char * format, ...) __attribute__((format(printf, 3, 4)));

// Which of the process' own limits (ulimit) may be why a call failed with this errno, and what to do: a text to follow the error's own,
// "" if no limit is set. EAGAIN: of the start of a thread.
std::string limits_of(int error);

// of a failed call: what the system says, and which limit may be why
std::string why_failed(int error);

// What functions of the C interface are made of: f() returns a code, exceptions become one.
template <typename F> int32_t guarded(llama_flash_error * err, F f) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return flash_fail(err, LLAMA_FLASH_E_MEMORY, "out of memory%s", limits_of(ENOMEM).c_str());
    } catch (const std::exception & e) {
        return flash_fail(err, LLAMA_FLASH_E_INTERNAL, "%s", e.what());
    } catch (...) {
        return flash_fail(err, LLAMA_FLASH_E_INTERNAL, "unknown exception");
    }
}
