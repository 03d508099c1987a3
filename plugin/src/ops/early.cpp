#include "ops/early.h"

#include <algorithm>
#include <cstring>

void early_rows::begin(const record_table & table, const flash_tensor & t, const ggml_tensor * op, uint64_t stamp) {
    const auto & group = table.groups[t.group];
    if (group.size() < 2 || &table.tensors[group[0]] != &t) {
        return;
    }
    const flash_tensor & other = table.tensors[group[1]];
    tensor                     = group[1];
    next_stamp                 = stamp + 1;
    input                      = op->src[1];
    ids                        = op->src[2];
    usable                     = other.same_input && other.weight.type == t.weight.type && ggml_are_same_shape(&other.weight, &t.weight) && ggml_is_contiguous(op);
    if (usable) {
        out.resize((size_t) ggml_nelements(op));
        first      = *op;
        first.data = out.data();
    }
}

void early_rows::hand_over(flash_tensor & t, ggml_tensor * op, uint64_t stamp, std::vector<uint32_t> & waiting) {
    if (tensor != t.number) {
        return;
    }
    t.same_input = next_stamp == stamp && input == op->src[1] && ids == op->src[2];
    if (!t.same_input || !usable) {
        return;
    }
    for (int64_t i1 = 0; i1 < ids->ne[1]; i1++) {
        for (int64_t i0 = 0; i0 < ids->ne[0]; i0++) {
            if (done[(size_t) expert_at(ids, i0, i1)] == stamp) {
                const size_t at = (size_t) i1 * first.nb[2] + (size_t) i0 * first.nb[1];
                memcpy((char *) op->data + i1 * op->nb[2] + i0 * op->nb[1], (const char *) out.data() + at, first.nb[1]);
            }
        }
    }
    auto is_done = [&](uint32_t index) { return done[index - t.first_record] == stamp; };
    waiting.erase(std::remove_if(waiting.begin(), waiting.end(), is_done), waiting.end());
}
