// What a worker computes for others: ops whose kernels stay within the tensors that they are given.
#pragma once

#include "ggml.h"

#include <string>

struct ggml_cgraph;

// Whether the tensor's size can be counted, and its op is one that a client may ask for. Its address and the size of its buffer are the
// caller's to look at.
bool tensor_is_sound(const ggml_tensor & tensor, std::string & reason);

// Whether all nodes have the sources that their ops need, with shapes and types that fit.
bool graph_is_sound(const ggml_cgraph & graph, std::string & reason);
