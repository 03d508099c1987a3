// Which instruction sets the engine is compiled for: compiled with its options. Constant data only, since code from here
// might not run on the CPU that asks.
#include "instruction_sets.h"

// a macro that is defined expands to 1, one that is not stays its own name
#define TEXT_OF(macro) #macro
#define ENTRY(name, macro, ...) TEXT_OF(macro)[0] == '1',

#ifdef LLAMA_FLASH_INSTRUCTION_SETS
extern constexpr bool llama_flash_cpu_needs[] = { LLAMA_FLASH_INSTRUCTION_SETS(ENTRY) };
#endif
