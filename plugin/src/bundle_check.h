// The bundle that a caller describes, if computing on it touches no memory but its own.
//
// Checked here is what addresses and sizes are made of: types, parts, counts and their products; bind.cpp adds the shapes of its tensors
// and the file's size. What else the format says (names, key-values, versions, which activation goes with which parts) is checked
// once, where the file is read: python/llama_flash/model/bundles.py.
#pragma once

#include "llama_flash.h"
#include "store/bundle.h"

#include <vector>

// before: the bundles of earlier layers. LLAMA_FLASH_E_FORMAT, with the reason, if the description contradicts itself.
int32_t make_bundle(const llama_flash_bundle & d, const std::vector<flash_bundle> & before, flash_bundle & out, llama_flash_error * err);
