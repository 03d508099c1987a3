// How graphs use weights: asked of the engine's own graph, of a model that need not be in memory.
#include "llama_flash.h"

#include "base/status.h"
#include "engine_guard.h"
#include "kernels/router.h"

#include "ggml-impl.h"

#include <cstdio>
#include <string>
#include <unordered_map>
#include <vector>

// of source i of a node
static uint32_t use_of(const ggml_tensor * node, int i) {
    const ggml_tensor * weight = node->src[i];
    if (i != 0 || weight->view_src || weight->ne[3] != 1) {
        return LLAMA_FLASH_USE_OTHER;
    }
    const bool by_floats = node->src[1] && node->src[1]->type == GGML_TYPE_F32;
    const bool matrix    = weight->ne[2] == 1;
    switch (node->op) {
        case GGML_OP_MUL_MAT: {
            const bool plain = by_floats && matrix && ggml_get_op_params_i32(node, 1) == 0; // else a hint to compute it otherwise
            return plain ? LLAMA_FLASH_USE_MUL_MAT : LLAMA_FLASH_USE_OTHER;
        }
        case GGML_OP_MUL_MAT_ID:
            return by_floats && !matrix ? LLAMA_FLASH_USE_MUL_MAT_ID : LLAMA_FLASH_USE_OTHER;
        case GGML_OP_GET_ROWS:
            return matrix && ggml_is_vector(node->src[1]) ? LLAMA_FLASH_USE_GET_ROWS : LLAMA_FLASH_USE_OTHER;
        default:
            return LLAMA_FLASH_USE_OTHER;
    }
}

int32_t llama_flash_graph_uses(llama_context * ctx, uint32_t n_tokens, uint32_t graph, llama_flash_weight_use * out, uint64_t capacity, uint64_t * n,
                               llama_flash_error * err) {
    if (!ctx || !n || n_tokens == 0 || (capacity > 0 && !out)) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "graph_uses: no context, no tokens or nowhere to tell it");
    }
    return guarded(err, [&] {
        // some architectures assert that they are given tokens, or that they encode
        ggml_cgraph * built = flash_guarded_graph(ctx, n_tokens, graph == LLAMA_FLASH_GRAPH_ENCODER, graph == LLAMA_FLASH_GRAPH_EMBEDDINGS);
        *n                  = 0;
        if (!built) {
            return (int32_t) LLAMA_FLASH_OK;
        }
        // by name: a table that is the output matrix, too, may be two tensors
        std::unordered_map<std::string, uint32_t> uses;
        for (int k = 0; k < ggml_graph_n_nodes(built); k++) {
            const ggml_tensor * node = ggml_graph_node(built, k);
            if (node->op == GGML_OP_MUL_MAT_ID) {
                if (const ggml_tensor * product = router::product(node)) {
                    uses[product->src[0]->name] |= LLAMA_FLASH_USE_ROUTES;
                }
            }
            for (int i = 0; i < GGML_MAX_SRC; i++) {
                if (!node->src[i]) {
                    continue;
                }
                const ggml_tensor * whole = node->src[i]->view_src ? node->src[i]->view_src : node->src[i];
                if (whole->op == GGML_OP_NONE) {
                    uses[whole->name] |= use_of(node, i);
                }
            }
        }
        *n          = uses.size();
        uint64_t at = 0;
        for (const auto & entry : uses) {
            if (at == capacity) {
                break;
            }
            out[at] = {};
            snprintf(out[at].name, sizeof(out[at].name), "%s", entry.first.c_str());
            out[at].uses = entry.second;
            at++;
        }
        return (int32_t) LLAMA_FLASH_OK;
    });
}
