// x86-64 instruction sets by the compiler's macro, and where CPUID and XCR0 say that CPU and operating system have them
// (Intel SDM, volume 2, CPUID; volume 1, 13.1). What compilers never use of their own accord is left out.
#pragma once

#include <cstdint>

// clang-format off: a table, one set on a line

enum cpuid_register { EAX, EBX, ECX, EDX };

constexpr uint64_t NO_STATE = 0, YMM = 0x6, ZMM = 0xe6, TILES = 0x60006; // bits of XCR0

//    name, macro, leaf, subleaf, register, bit, state
#define LLAMA_FLASH_INSTRUCTION_SETS(X)                                \
    X("SSE4.2",             __SSE4_2__,             0x1,        0, ECX, 20, NO_STATE) \
    X("MOVBE",              __MOVBE__,              0x1,        0, ECX, 22, NO_STATE) \
    X("POPCNT",             __POPCNT__,             0x1,        0, ECX, 23, NO_STATE) \
    X("LZCNT",              __LZCNT__,              0x80000001, 0, ECX, 5,  NO_STATE) \
    X("BMI1",               __BMI__,                0x7,        0, EBX, 3,  NO_STATE) \
    X("BMI2",               __BMI2__,               0x7,        0, EBX, 8,  NO_STATE) \
    X("ADX",                __ADX__,                0x7,        0, EBX, 19, NO_STATE) \
    X("GFNI",               __GFNI__,               0x7,        0, ECX, 8,  NO_STATE) \
    X("AVX",                __AVX__,                0x1,        0, ECX, 28, YMM)      \
    X("FMA",                __FMA__,                0x1,        0, ECX, 12, YMM)      \
    X("F16C",               __F16C__,               0x1,        0, ECX, 29, YMM)      \
    X("AVX2",               __AVX2__,               0x7,        0, EBX, 5,  YMM)      \
    X("VAES",               __VAES__,               0x7,        0, ECX, 9,  YMM)      \
    X("VPCLMULQDQ",         __VPCLMULQDQ__,         0x7,        0, ECX, 10, YMM)      \
    X("AVX-VNNI",           __AVXVNNI__,            0x7,        1, EAX, 4,  YMM)      \
    X("AVX512F",            __AVX512F__,            0x7,        0, EBX, 16, ZMM)      \
    X("AVX512DQ",           __AVX512DQ__,           0x7,        0, EBX, 17, ZMM)      \
    X("AVX512IFMA",         __AVX512IFMA__,         0x7,        0, EBX, 21, ZMM)      \
    X("AVX512ER",           __AVX512ER__,           0x7,        0, EBX, 27, ZMM)      \
    X("AVX512CD",           __AVX512CD__,           0x7,        0, EBX, 28, ZMM)      \
    X("AVX512BW",           __AVX512BW__,           0x7,        0, EBX, 30, ZMM)      \
    X("AVX512VL",           __AVX512VL__,           0x7,        0, EBX, 31, ZMM)      \
    X("AVX512VBMI",         __AVX512VBMI__,         0x7,        0, ECX, 1,  ZMM)      \
    X("AVX512VBMI2",        __AVX512VBMI2__,        0x7,        0, ECX, 6,  ZMM)      \
    X("AVX512VNNI",         __AVX512VNNI__,         0x7,        0, ECX, 11, ZMM)      \
    X("AVX512BITALG",       __AVX512BITALG__,       0x7,        0, ECX, 12, ZMM)      \
    X("AVX512VPOPCNTDQ",    __AVX512VPOPCNTDQ__,    0x7,        0, ECX, 14, ZMM)      \
    X("AVX512FP16",         __AVX512FP16__,         0x7,        0, EDX, 23, ZMM)      \
    X("AVX512BF16",         __AVX512BF16__,         0x7,        1, EAX, 5,  ZMM)      \
    X("AMX-TILE",           __AMX_TILE__,           0x7,        0, EDX, 24, TILES)    \
    X("AMX-INT8",           __AMX_INT8__,           0x7,        0, EDX, 25, TILES)    \
    X("AMX-BF16",           __AMX_BF16__,           0x7,        0, EDX, 22, TILES)

// clang-format on

// in the order above; filled in needs.cpp
extern const bool llama_flash_cpu_needs[];
