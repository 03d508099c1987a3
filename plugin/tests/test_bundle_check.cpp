// What a caller may say of bundles and weights: what contradicts itself is refused, and nothing is read or written for it.
#include "bundle_check.h"
#include "check.h"
#include "temporary_file.h"

#include <cstring>
#include <string>

namespace {

constexpr uint32_t N_FF   = 40;
constexpr uint32_t N_EMBD = 64;
constexpr uint64_t ROW    = N_EMBD * sizeof(float);

const float   BIASES[N_FF]           = {};
const uint8_t MATRIX[4 * ROW * N_FF] = {}; // of a predictor, more than enough

llama_flash_bundle gated() {
    llama_flash_bundle d = {};
    d.layer              = 3;
    d.n_ff               = N_FF;
    d.n_embd             = N_EMBD;
    d.activation         = LLAMA_FLASH_FATRELU;
    d.gate               = { GGML_TYPE_F32, 0, 0 };
    d.up                 = { GGML_TYPE_F32, 0, ROW };
    d.down               = { GGML_TYPE_F32, 0, 2 * ROW };
    d.record_bytes       = 3 * ROW;
    d.gate_bias          = BIASES;
    return d;
}

llama_flash_bundle with_predictor() {
    llama_flash_bundle d = gated();
    d.predictor_rank     = 32;
    d.predictor_in_type  = GGML_TYPE_F32;
    d.predictor_out_type = GGML_TYPE_Q8_0;
    d.predictor_in       = MATRIX;
    d.predictor_out      = MATRIX;
    d.predictor_bias     = BIASES;
    return d;
}

llama_flash_bundle of_experts() {
    llama_flash_bundle d = gated();
    d.gate_bias          = nullptr;
    d.n_expert           = 6;
    d.n_expert_used      = 2;
    return d;
}

void what_makes_sense_is_taken() {
    for (const auto & d : { gated(), with_predictor(), of_experts() }) {
        llama_flash_error err;
        flash_bundle      b;
        CHECK(make_bundle(d, {}, b, &err) == LLAMA_FLASH_OK, "%s", err.message);
        CHECK(b.n_neurons == N_FF * b.n_blocks() && b.first == 0 && b.gated && b.part(ffn_part::down).offset == 2 * ROW, "%u neurons", b.n_neurons);
        flash_bundle next;
        CHECK(make_bundle(d, { b }, next, &err) == LLAMA_FLASH_OK && next.first == b.n_neurons && next.index == 1, "%s", err.message);
    }
}

template <typename F> void refused(const char * why, llama_flash_bundle d, F change) {
    change(d);
    llama_flash_error err;
    flash_bundle      b;
    CHECK(make_bundle(d, {}, b, &err) == LLAMA_FLASH_E_FORMAT && strstr(err.message, why), "expected \"%s\", got \"%s\"", why, err.message);
    CHECK(b.name.empty(), "%s is half made", b.name.c_str());
}

using bundle = llama_flash_bundle;

void what_contradicts_itself_is_refused() {
    refused("of some length", gated(), [](bundle & d) { d.n_ff = 0; });
    refused("of some length", gated(), [](bundle & d) { d.n_embd = 0; });
    refused("of some length", gated(), [](bundle & d) { d.up.type = -1; });
    refused("of some length", gated(), [](bundle & d) { d.down.type = -1; });
    refused("activation", gated(), [](bundle & d) { d.activation = LLAMA_FLASH_DRELU + 1; });
    refused("blocks do not divide", gated(), [](bundle & d) { d.n_embd = 33, d.gate.type = d.up.type = GGML_TYPE_Q8_0; });
    refused("cannot be computed on", gated(), [](bundle & d) { d.down.type = GGML_TYPE_COUNT; });
    refused("cannot be computed on", gated(), [](bundle & d) { d.down.type = GGML_TYPE_FLASH; });
    refused("cannot be computed on", gated(), [](bundle & d) { d.down.type = INT32_MAX; });
    refused("differ in type", gated(), [](bundle & d) { d.gate.type = GGML_TYPE_F16; });
    refused("follow one another", gated(), [](bundle & d) { d.up.offset--; });
    refused("follow one another", gated(), [](bundle & d) { d.up.offset = UINT64_MAX; });
    refused("as long as its parts", gated(), [](bundle & d) { d.record_bytes--; });
    refused("as long as its parts", gated(), [](bundle & d) { d.record_bytes = UINT64_MAX; });
    refused("as long as its parts", gated(), [](bundle & d) { d.n_embd = UINT32_MAX, d.up.offset = 4ull * UINT32_MAX, d.down.offset = 8ull * UINT32_MAX; });
    refused("can be numbered", gated(), [](bundle & d) { d.n_ff = UINT32_MAX; });
    refused("can be numbered", of_experts(), [](bundle & d) { d.n_ff = d.n_expert = UINT32_MAX; });
    refused("more bytes than any file", gated(), [](bundle & d) {
        d.n_ff         = INT32_MAX;
        d.n_embd       = UINT32_MAX;
        d.up.offset    = 4ull * UINT32_MAX;
        d.down.offset  = 8ull * UINT32_MAX;
        d.record_bytes = 12ull * UINT32_MAX;
    });
}

void experts_have_no_more_than_experts_can() {
    refused("some of the experts", of_experts(), [](bundle & d) { d.n_expert_used = 0; });
    refused("some of the experts", of_experts(), [](bundle & d) { d.n_expert_used = 7; });
    refused("neither biases nor predictors", of_experts(), [](bundle & d) { d.up_bias = BIASES; });
    refused("neither biases nor predictors", of_experts(), [](bundle & d) { d.gate_bias = BIASES; });
    refused("neither biases nor predictors", of_experts(), [](bundle & d) { d.predictor_rank = 1; });
    refused("not split", of_experts(), [](bundle & d) { d.split = 1; });
}

void a_predictor_is_whole() {
    refused("not complete", with_predictor(), [](bundle & d) { d.predictor_in = nullptr; });
    refused("not complete", with_predictor(), [](bundle & d) { d.predictor_out = nullptr; });
    refused("not complete", with_predictor(), [](bundle & d) { d.predictor_bias = nullptr; });
    refused("predictor's type", with_predictor(), [](bundle & d) { d.predictor_in_type = -1; });
    refused("predictor's type", with_predictor(), [](bundle & d) { d.predictor_out_type = GGML_TYPE_FLASH; });
    refused("blocks of its predictor's type", with_predictor(), [](bundle & d) { d.predictor_rank = 33; });
}

// code: of bind_weight, or if that is well of bind_end
int32_t bound(int fd, uint64_t offset, int32_t type, int64_t ne0, int64_t ne1, int64_t ne2) {
    llama_flash_error     err;
    llama_flash_session * session = llama_flash_session_new(nullptr, &err);
    CHECK(session, "%s", err.message);
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    int32_t           code = llama_flash_session_bind_weight(session, "w", path.c_str(), offset, type, ne0, ne1, ne2, &err);
    if (code == LLAMA_FLASH_OK) {
        code = llama_flash_session_bind_end(session, &err);
    }
    llama_flash_session_free(session);
    return code;
}

void a_weight_is_one_and_lies_within_its_file() {
    const temporary_file file(1 << 20);
    const auto           f32 = GGML_TYPE_F32;
    CHECK(bound(file.fd, 0, f32, 256, 1024, 1) == LLAMA_FLASH_OK, "the whole file");
    CHECK(bound(file.fd, 1, f32, 256, 1024, 1) == LLAMA_FLASH_E_FORMAT, "a byte beyond");
    CHECK(bound(file.fd, UINT64_MAX - 1000, f32, 256, 1, 1) == LLAMA_FLASH_E_FORMAT, "an end that comes round to the begin");
    for (int64_t huge : { INT64_MAX, INT64_MAX / 4 + 1, (int64_t) 1 << 61 }) {
        const int64_t whole = huge / 32 * 32;
        CHECK(bound(file.fd, 0, f32, whole, 1, 1) == LLAMA_FLASH_E_INVALID, "%lld columns", (long long) whole);
        CHECK(bound(file.fd, 0, f32, 32, whole, 1) == LLAMA_FLASH_E_INVALID, "%lld rows", (long long) whole);
        CHECK(bound(file.fd, 0, f32, 32, 32, whole) == LLAMA_FLASH_E_INVALID, "%lld experts", (long long) whole);
    }
    for (int32_t type : { -1, (int32_t) GGML_TYPE_COUNT, (int32_t) GGML_TYPE_FLASH, INT32_MAX }) {
        CHECK(bound(file.fd, 0, type, 32, 1, 1) == LLAMA_FLASH_E_INVALID, "type %d", type);
    }
    CHECK(bound(file.fd, 0, GGML_TYPE_Q8_0, 33, 1, 1) == LLAMA_FLASH_E_INVALID, "a block and a part of one");
    CHECK(bound(file.fd, 0, f32, 0, 1, 1) == LLAMA_FLASH_E_INVALID, "no columns");
}

} // namespace

int main() {
    what_makes_sense_is_taken();
    what_contradicts_itself_is_refused();
    experts_have_no_more_than_experts_can();
    a_predictor_is_whole();
    a_weight_is_one_and_lies_within_its_file();
    printf("bundle_check: ok\n");
    return 0;
}
