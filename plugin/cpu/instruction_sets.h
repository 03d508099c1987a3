// Instruction sets by the compiler's macro, and where it is told that CPU and operating system have them. What compilers never use of
// their own accord is left out.
#pragma once

#include <cstdint>

// clang-format off: a table, one set on a line

#if defined(__x86_64__)

// x86-64: CPUID and XCR0 tell (Intel SDM, volume 2, CPUID; volume 1, 13.1)

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

#elif defined(__aarch64__)

// aarch64: the kernel tells (Linux, Documentation/arch/arm64/elf_hwcaps.rst). Numbers, since older headers lack names.

enum hwcap_word { HWCAP = 16, HWCAP2 = 26 }; // as getauxval() calls them

//    name, macro, word, bit
#define LLAMA_FLASH_INSTRUCTION_SETS(X)                                       \
    X("AES",                __ARM_FEATURE_AES,                    HWCAP,  3)  \
    X("SHA2",               __ARM_FEATURE_SHA2,                   HWCAP,  6)  \
    X("CRC32",              __ARM_FEATURE_CRC32,                  HWCAP,  7)  \
    X("LSE",                __ARM_FEATURE_ATOMICS,                HWCAP,  8)  \
    X("RDM",                __ARM_FEATURE_QRDMX,                  HWCAP,  12) \
    X("FP16",               __ARM_FEATURE_FP16_VECTOR_ARITHMETIC, HWCAP,  10) \
    X("JSCVT",              __ARM_FEATURE_JCVT,                   HWCAP,  13) \
    X("FCMA",               __ARM_FEATURE_COMPLEX,                HWCAP,  14) \
    X("LRCPC",              __ARM_FEATURE_RCPC,                   HWCAP,  15) \
    X("SHA3",               __ARM_FEATURE_SHA3,                   HWCAP,  17) \
    X("SHA512",             __ARM_FEATURE_SHA512,                 HWCAP,  21) \
    X("DOTPROD",            __ARM_FEATURE_DOTPROD,                HWCAP,  20) \
    X("FP16FML",            __ARM_FEATURE_FP16_FML,               HWCAP,  23) \
    X("FRINT",              __ARM_FEATURE_FRINT,                  HWCAP2, 8)  \
    X("I8MM",               __ARM_FEATURE_MATMUL_INT8,            HWCAP2, 13) \
    X("BF16",               __ARM_FEATURE_BF16_VECTOR_ARITHMETIC, HWCAP2, 14) \
    X("SVE",                __ARM_FEATURE_SVE,                    HWCAP,  22) \
    X("SVE-I8MM",           __ARM_FEATURE_SVE_MATMUL_INT8,        HWCAP2, 9)  \
    X("SVE-BF16",           __ARM_FEATURE_SVE_BF16,               HWCAP2, 12) \
    X("SVE2",               __ARM_FEATURE_SVE2,                   HWCAP2, 1)  \
    X("SME",                __ARM_FEATURE_SME,                    HWCAP2, 23)

#endif

// clang-format on

// in the order above; filled in needs.cpp
extern const bool llama_flash_cpu_needs[];
