// How graphs use weights: asked of the engine's own graph, of a model that need not be in memory.
#include "llama_flash.h"

#include "base/status.h"
#include "device_memory.h"
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

namespace {

// by name: a table that is the output matrix, too, may be two tensors
struct found_uses {
    struct chosen_by {
        std::string router, norm; // "": none is known
    };

    std::unordered_map<std::string, uint32_t>  uses;
    std::unordered_map<std::string, chosen_by> routers; // by experts

    void note(const ggml_tensor * node) {
        if (node->op == GGML_OP_MUL_MAT_ID) {
            note_router(node);
        }
        for (int i = 0; i < GGML_MAX_SRC; i++) {
            if (!node->src[i]) {
                continue;
            }
            const ggml_tensor * whole = node->src[i]->view_src ? node->src[i]->view_src : node->src[i];
            if (whole->op == GGML_OP_NONE) {
                const bool on_device = whole->buffer && is_device_memory(ggml_backend_buffer_get_type(whole->buffer));
                uses[whole->name] |= use_of(node, i) | (on_device ? LLAMA_FLASH_USE_DEVICE : LLAMA_FLASH_USE_HOST);
            }
        }
    }

    void note_router(const ggml_tensor * node) {
        if (const ggml_tensor * product = router::product(node)) {
            uses[product->src[0]->name] |= LLAMA_FLASH_USE_ROUTES;
        }
        const router::tensors named = router::named(node);
        if (named.weight) {
            routers[node->src[0]->name] = { named.weight->name, named.norm ? named.norm->name : "" };
        }
    }

    void tell(llama_flash_weight_use * out, uint64_t capacity) const {
        std::unordered_map<std::string, uint32_t> places; // in the array, from 1 on
        for (const auto & [name, use] : uses) {
            const auto at = (uint64_t) places.size();
            if (at == capacity) {
                return;
            }
            out[at] = {};
            snprintf(out[at].name, sizeof(out[at].name), "%s", name.c_str());
            out[at].uses = use;
            places[name] = (uint32_t) at + 1;
        }
        const auto place = [&](const std::string & name) {
            const auto found = places.find(name);
            return found == places.end() ? 0 : found->second;
        };
        for (const auto & [experts, chosen] : routers) {
            if (const uint32_t at = place(experts)) {
                out[at - 1].router = place(chosen.router);
                out[at - 1].norm   = place(chosen.norm);
            }
        }
    }
};

} // namespace

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
        found_uses found;
        for (int k = 0; k < ggml_graph_n_nodes(built); k++) {
            found.note(ggml_graph_node(built, k));
        }
        *n = found.uses.size();
        found.tell(out, capacity);
        return (int32_t) LLAMA_FLASH_OK;
    });
}
