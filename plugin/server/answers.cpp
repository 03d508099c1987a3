#include "answers.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <unordered_map>

namespace {

// A group of paths is called as OpenAI calls the first of them, or as llama-server does. Everything else is one group, so that no
// client can make more of them.
constexpr const char * GROUPS[] = { "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/tokenize", "/v1/models", "/health", "/metrics", "/", "other" };

const std::unordered_map<std::string, std::string> ALIASES = {
    { "/chat/completions", "/v1/chat/completions" },
    { "/completion", "/v1/completions" },
    { "/completions", "/v1/completions" },
    { "/infill", "/v1/completions" },
    { "/embedding", "/v1/embeddings" },
    { "/embeddings", "/v1/embeddings" },
    { "/responses", "/v1/responses" },
    { "/detokenize", "/tokenize" },
    { "/apply-template", "/tokenize" },
    { "/chat/completions/input_tokens", "/tokenize" },
    { "/v1/chat/completions/input_tokens", "/tokenize" },
    { "/responses/input_tokens", "/tokenize" },
    { "/v1/responses/input_tokens", "/tokenize" },
    { "/v1/messages/count_tokens", "/tokenize" },
    { "/models", "/v1/models" },
    { "/v1/health", "/health" },
    { "/index.html", "/" },
};
constexpr size_t N_GROUPS  = std::size(GROUPS);
constexpr size_t N_CLASSES = 5; // 1xx to 5xx

std::array<std::atomic<uint64_t>, N_GROUPS * N_CLASSES> answered;
std::atomic<int64_t>                                    running;

size_t group_of(const std::string & path) {
    const auto          alias = ALIASES.find(path);
    const std::string & name  = alias == ALIASES.end() ? path : alias->second;
    return std::find(std::begin(GROUPS), std::end(GROUPS) - 1, name) - std::begin(GROUPS);
}

} // namespace

void count_answer(const std::string & path, int status) {
    const size_t kind = static_cast<size_t>(std::clamp(status / 100, 1, static_cast<int>(N_CLASSES))) - 1;
    answered[group_of(path) * N_CLASSES + kind]++;
}

void count_running(int more) {
    running += more;
}

std::string told_answers() {
    std::string text = "# HELP llama_flash_requests_total Requests answered.\n# TYPE llama_flash_requests_total counter\n";
    for (size_t i = 0; i < answered.size(); i++) {
        const uint64_t n = answered[i];
        if (n > 0) {
            text += std::string("llama_flash_requests_total{path=\"") + GROUPS[i / N_CLASSES] + "\",status=\"" + std::to_string(i % N_CLASSES + 1) + "xx\"} " + std::to_string(n) + "\n";
        }
    }
    return text + "# HELP llama_flash_requests_in_flight POST requests that run or wait.\n# TYPE llama_flash_requests_in_flight gauge\nllama_flash_requests_in_flight " + std::to_string(running) + "\n";
}

void forget_answers() {
    for (auto & n : answered) {
        n = 0;
    }
}
