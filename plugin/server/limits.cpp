#include "limits.h"

#include "answers.h"
#include "json.h"
#include "sampling.h"
#include "server-http.h"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr size_t MAX_MEMBERS = 4096; // of an object: the engine looks for a name from the first one on
constexpr size_t MAX_NAME    = 1024; // bytes of a member's name: std::regex takes stack for each of a property's
constexpr size_t BYTES_EACH  = 16;   // of the largest body for each value: in memory one takes 16 to 100

// Bytes that parts of a request take, measured: a byte of a body (to tokenize one takes up to 80) and of a text whose pieces are told,
// a value in trees of JSON, a probability in a whole answer and in a stream, a grammar.
constexpr uint64_t OF_BODY = 80, OF_PIECES = 512, OF_VALUE = 350, OF_PROBABILITY = 2048, OF_STREAMED = 128, OF_GRAMMAR = 4 << 20;

// What the engine says to itself. Sampling in the graph takes memory that nobody has counted; a chat parser, a trigger's pattern or a number of a format that a client made up would end it.
constexpr const char * INTERNAL[] = { "backend_sampling", "chat_format", "chat_parser", "generation_prompt", "grammar_triggers", "grammar_type", "message_delimiters" };

// Elements that are no numbers, at most. Each costs time for each token, or is a task with all parameters, a rule, a turn of a template.
const std::pair<const char *, size_t> LISTS[] = {
    { "prompt", 64 },
    { "input", 2048 },
    { "messages", 4096 },
    { "tools", 512 },
    { "stop", 64 },
    { "stop_sequences", 64 },
    { "samplers", 64 },
    { "dry_sequence_breakers", 32 },
    { "response_fields", 64 },
};

struct Admission {
    llama_flash_limits    limits;
    std::atomic<uint64_t> n_requests{ 0 };
    std::atomic<uint64_t> n_bytes{ 0 };    // that they may take
    std::atomic<int64_t>  trimmed_at{ 0 }; // seconds
};

// What has been freed in small pieces goes back to the system, once a second at most.
void trim(Admission & admission) {
    const int64_t now  = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
    int64_t       last = admission.trimmed_at;
    if (last != now && admission.trimmed_at.compare_exchange_strong(last, now)) {
        malloc_trim(0);
    }
}

// One request, until its answer has ended.
struct Ticket {
    std::shared_ptr<Admission> admission;
    uint64_t                   n_bytes = 0;
    uint64_t                   n_body  = 0; // bytes of the body, as far as it is counted

    explicit Ticket(std::shared_ptr<Admission> to) : admission(std::move(to)) {
        admission->n_requests++;
        count_running(1);
    }

    Ticket(const Ticket &)             = delete;
    Ticket & operator=(const Ticket &) = delete;

    ~Ticket() {
        admission->n_requests--;
        count_running(-1);
        admission->n_bytes -= n_bytes;
        trim(*admission);
    }

    // Counts a body of so many bytes.
    void take_body(uint64_t bytes) {
        if (bytes > n_body) {
            take((bytes - n_body) * OF_BODY);
            n_body = bytes;
        }
    }

    // Takes more of what all requests together may have.
    void take(uint64_t bytes) {
        const uint64_t most = admission->limits.max_memory;
        if (n_bytes + bytes > most) {
            throw server_http_refusal{ 400, "invalid_request_error", "the request needs more memory than all of them together may have, " + std::to_string(most) + " bytes: ask for fewer probabilities or a shorter answer, or send less" };
        }
        n_bytes += bytes;
        if ((admission->n_bytes += bytes) > most) {
            busy();
        }
    }

    [[noreturn]] static void busy() {
        throw server_http_refusal{ 503, "unavailable_error", "the server has as many requests as it takes: try again later" };
    }
};

thread_local std::weak_ptr<Ticket> current; // of the request that this thread reads

[[noreturn]] void refuse(const std::string & why) {
    throw server_http_refusal{ 400, "invalid_request_error", why };
}

// Bytes of the character at `at`, 0 if it is not UTF-8 (RFC 3629: no surrogates, nothing longer than needed).
size_t character(const std::string & text, size_t at) {
    const auto     byte  = [&](size_t i) { return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0u; };
    const auto     tail  = [&](size_t i, unsigned from = 0x80, unsigned to = 0xBF) { return byte(i) >= from && byte(i) <= to; };
    const unsigned first = byte(0);
    if (first < 0x80) {
        return 1;
    }
    if (first >= 0xC2 && first <= 0xDF) {
        return tail(1) ? 2 : 0;
    }
    if (first >= 0xE0 && first <= 0xEF) {
        return tail(1, first == 0xE0 ? 0xA0 : 0x80, first == 0xED ? 0x9F : 0xBF) && tail(2) ? 3 : 0;
    }
    if (first >= 0xF0 && first <= 0xF4) {
        return tail(1, first == 0xF0 ? 0x90 : 0x80, first == 0xF4 ? 0x8F : 0xBF) && tail(2) && tail(3) ? 4 : 0;
    }
    return 0;
}

// The shape of a JSON text, without a tree of it. What is no JSON is left to the parser.
class Shape {
  public:
    Shape(const std::string & text, const llama_flash_limits & limits) : text(text), limits(limits) {}

    // Returns the number of values.
    uint64_t check() {
        for (size_t at = 0, length = 0; at < text.size(); at += length) {
            length = character(text, at);
            if (length == 0) {
                refuse("the body is not UTF-8, at byte " + std::to_string(at));
            }
            if (in_string) {
                in_text(at);
            } else {
                between(at);
            }
        }
        return n_values;
    }

  private:
    void in_text(size_t at) {
        if (escaped) {
            escaped = false;
        } else if (text[at] == '\\') {
            escaped = true;
        } else if (text[at] == '"') {
            in_string = false;
            n_string  = at - begin - 1;
        }
    }

    void between(size_t at) {
        switch (text[at]) {
            case '"':
                in_string = true;
                begin     = at;
                break;
            case '[':
            case '{':
                members.push_back(0);
                if (members.size() > limits.max_depth) {
                    refuse("the body nests more than " + std::to_string(limits.max_depth) + " arrays and objects");
                }
                count();
                break;
            case ']':
            case '}':
                if (!members.empty()) {
                    members.pop_back();
                }
                break;
            case ':':
                if (n_string > MAX_NAME) {
                    refuse("the body has a name of more than " + std::to_string(MAX_NAME) + " bytes");
                }
                if (!members.empty() && ++members.back() > MAX_MEMBERS) {
                    refuse("the body has an object with more than " + std::to_string(MAX_MEMBERS) + " members");
                }
                break;
            case ',':
                count();
                break;
            default:
                break;
        }
    }

    void count() {
        const uint64_t most = limits.max_body / BYTES_EACH;
        if (++n_values > most) {
            refuse("the body has more than " + std::to_string(most) + " values");
        }
    }

    const std::string &        text;
    const llama_flash_limits & limits;
    std::vector<size_t>        members; // of each array and object that is open
    uint64_t                   n_values  = 0;
    size_t                     begin     = 0; // of the last string
    size_t                     n_string  = 0; // its bytes
    bool                       in_string = false;
    bool                       escaped   = false;
};

void check_parameters(const common_json & body) {
    for (const char * name : INTERNAL) {
        // the engine's page says that it wants none of it
        const bool declined = body.contains(name) && body.at(name).is_boolean() && !body.at(name).get<bool>();
        if (body.contains(name) && !(declined && name == std::string("backend_sampling"))) {
            refuse(std::string(name) + " is set by the server itself");
        }
    }
    for (const auto & [name, most] : LISTS) {
        if (!body.contains(name) || !body.at(name).is_array()) {
            continue;
        }
        size_t n = 0;
        for (const auto & element : body.at(name)) { // tokens are numbers, and cost no more than that
            n += element.is_number() ? 0 : 1;
        }
        if (n > most) {
            refuse(std::string(name) + " has more than " + std::to_string(most) + " elements");
        }
    }
}

int64_t number(const common_json & body, const char * name, int64_t otherwise) {
    return body.contains(name) && body.at(name).is_number() ? static_cast<int64_t>(std::clamp(body.at(name).get<double>(), -1.0, 1e6)) : otherwise;
}

// Bytes that the probabilities of an answer's tokens take.
uint64_t probabilities(const common_json & body, int64_t n_ctx) {
    const bool    wanted = body.contains("logprobs") && body.at("logprobs").is_boolean() && body.at("logprobs").get<bool>();
    const int64_t each   = std::max({ number(body, "n_probs", 0), number(body, "logprobs", 0), number(body, "top_logprobs", wanted ? 20 : 0) });
    int64_t       n      = n_ctx;
    for (const char * name : { "n_predict", "max_completion_tokens", "max_tokens", "max_output_tokens" }) { // the first that is there
        const int64_t given = number(body, name, -1);
        if (given >= 0) {
            n = std::min(n, given);
            break;
        }
    }
    const int64_t answers  = std::max({ int64_t(1), number(body, "n", 1), number(body, "n_cmpl", 1) });
    const int64_t prompts  = body.contains("prompt") && body.at("prompt").is_array() ? std::max<int64_t>(1, body.at("prompt").size()) : 1;
    const bool    streamed = body.contains("stream") && body.at("stream").is_boolean() && body.at("stream").get<bool>();
    if (each <= 0) {
        return 0;
    }
    return uint64_t(each) * uint64_t(n) * uint64_t(answers) * uint64_t(std::min<int64_t>(prompts, 64)) * (streamed ? OF_STREAMED : OF_PROBABILITY);
}

bool has_grammar(const common_json & body) {
    for (const char * name : { "grammar", "json_schema", "response_format", "tools", "text" }) {
        if (body.contains(name)) {
            return true;
        }
    }
    return false;
}

void check(const std::string & body, const llama_flash_limits & limits) {
    if (body.empty()) {
        return;
    }
    const auto ticket = current.lock();
    const auto take   = [&](uint64_t bytes) {
        if (ticket) {
            ticket->take(bytes);
        }
    };
    if (ticket) {
        ticket->take_body(body.size());
    }
    take(Shape(body, limits).check() * OF_VALUE);
    common_json parsed;
    try {
        parsed = common_json::parse(body);
    } catch (const common_json_error & error) {
        refuse(std::string("the body is not JSON: ") + error.what());
    }
    if (!parsed.is_object()) {
        refuse("the body is not a JSON object");
    }
    check_parameters(parsed);
    take(parsed.contains("with_pieces") ? body.size() * OF_PIECES : 0);
    take(probabilities(parsed, limits.n_ctx) + (has_grammar(parsed) ? OF_GRAMMAR : 0));
}

std::shared_ptr<void> admit(const std::shared_ptr<Admission> & admission, uint64_t n_bytes) {
    const llama_flash_limits & limits = admission->limits;
    if (n_bytes > limits.max_body) {
        throw server_http_refusal{ 413, "invalid_request_error", "the body is larger than " + std::to_string(limits.max_body) + " bytes" };
    }
    auto ticket = std::make_shared<Ticket>(admission);
    if (admission->n_requests > limits.max_requests) {
        Ticket::busy();
    }
    ticket->take_body(n_bytes); // 0 if it comes in chunks: then it is counted when it is there
    current = ticket;
    return ticket;
}

} // namespace

void set_limits(const llama_flash_limits & limits) {
    auto admission    = std::make_shared<Admission>();
    admission->limits = limits;
    common_sampler_limit_grammar(limits.max_grammar);
    server_http_limits http;
    http.max_body  = limits.max_body;
    http.admit     = [admission](size_t n_bytes) { return admit(admission, n_bytes); };
    http.resumable = false; // 4 MiB for each stream, five minutes long, and the answer goes on without its client
    http.check     = [admission](const std::string & path, const std::string & body) {
        if (path == "/lora-adapters") {
            throw server_http_refusal{ 403, "feature_disabled", "adapters are not changed by clients" };
        }
        check(body, admission->limits);
    };
    forget_answers();
    http.answered = count_answer;
    server_http_set_limits(std::move(http));
}
