// MUL_MAT and MUL_MAT_ID on flash tensors.
#pragma once

#include "session.h"

struct ggml_compute_params;

// Entered by all threads of the pool. op->src[0] is the tensor. On failure the session has an error, op's data is undefined.
void flash_mul_mat(llama_flash_session & s, flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op);
void flash_fail_unbound(llama_flash_session & s, const ggml_tensor * weight); // thread 0: an op on a part of a flash tensor
void flash_mul_mat_id(llama_flash_session & s, flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op);
