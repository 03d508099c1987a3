// Whether the description of a layer's neuron bundle (docs/reference/format.md) makes sense, and the bundle that it describes.
#pragma once

#include "llama_flash.h"
#include "store/bundle.h"

#include <vector>

// before: the bundles of earlier layers. LLAMA_FLASH_E_FORMAT, with the reason, if the description contradicts itself.
int32_t make_bundle(const llama_flash_bundle & d, const std::vector<flash_bundle> & before, flash_bundle & out, llama_flash_error * err);
