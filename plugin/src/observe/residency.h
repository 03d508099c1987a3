// What of the flash tensors is in memory, and when it was last used: for those who watch. Nothing is decided here.
#pragma once

#include "llama_flash.h"

#include <cstdint>

// as llama_flash_session_tensors
uint64_t describe_tensors(const llama_flash_session & s, llama_flash_tensor * out, uint64_t capacity);

// as llama_flash_session_residency
int32_t residency(const llama_flash_session & s, uint8_t * place, uint32_t * age, uint64_t n_records, llama_flash_error * err);

// as llama_flash_session_trace_tensor; false: there are no more
bool trace_tensor(const llama_flash_session & s, uint32_t index, llama_flash_trace_tensor & out);
