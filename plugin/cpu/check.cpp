// libllama_flash_cpu: says what this CPU lacks of what the libraries beside it were compiled for, where they themselves
// would end in an illegal instruction. A library of its own, compiled for every CPU of the architecture.

#include <cstddef>
#include <cstdint>
#include <cstdio>

#define API extern "C" __attribute__((visibility("default")))

#include "instruction_sets.h"

#if defined(__x86_64__)

#    include <cpuid.h>

// XCR0: register states that the operating system saves; 0 where it saves none
static uint64_t saved_states() {
    constexpr unsigned OSXSAVE = 1u << 27;
    unsigned           a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) {
        return 0;
    }
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t) d << 32 | a;
}

static bool has(unsigned leaf, unsigned subleaf, cpuid_register reg, int bit, uint64_t state) {
    unsigned registers[4] = {};
    if (!__get_cpuid_count(leaf, subleaf, &registers[EAX], &registers[EBX], &registers[ECX], &registers[EDX])) {
        return false;
    }
    return (registers[reg] >> bit & 1) && (saved_states() & state) == state;
}

#elif defined(__aarch64__)

#    include <sys/auxv.h>

static bool has(hwcap_word word, int bit) {
    return getauxval(word) >> bit & 1;
}

#endif

#ifdef LLAMA_FLASH_INSTRUCTION_SETS

static size_t list(char * text, size_t size, bool missing_only) {
    size_t length = 0, index = 0;
    if (size) {
        text[0] = 0;
    }
    auto entry = [&](const char * name, auto... where) {
        if (!llama_flash_cpu_needs[index++] || (missing_only && has(where...))) {
            return;
        }
        const bool fits = length < size;
        length += (size_t) snprintf(fits ? text + length : nullptr, fits ? size - length : 0, length ? ", %s" : "%s", name);
    };
#    define ENTRY(name, macro, ...) entry(name, __VA_ARGS__);
    LLAMA_FLASH_INSTRUCTION_SETS(ENTRY)
    return length;
}

#else

// other architectures: nothing is known to be missing
static size_t list(char * text, size_t size, bool) {
    if (size) {
        text[0] = 0;
    }
    return 0;
}

#endif

// Both write names, separated by ", ", and return the length of the whole text, which is cut to `size` - 1 bytes.

// instruction sets that the libraries were compiled for
API size_t llama_flash_cpu_needed(char * text, size_t size) {
    return list(text, size, false);
}

// of these, the ones that this CPU or its operating system does not have
API size_t llama_flash_cpu_missing(char * text, size_t size) {
    return list(text, size, true);
}
