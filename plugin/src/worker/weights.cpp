#include "worker/weights.h"

#include "buffer_type.h"
#include "kernels/shadow.h"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <unistd.h>
#include <utility>

worker_weights::~worker_weights() {
    for (const int fd : files) {
        close(fd);
    }
}

static std::string shape_text(const int64_t (&ne)[4]) {
    std::string text = "[";
    for (int i = 0; i < 4; i++) {
        text += (i ? ", " : "") + std::to_string(ne[i]);
    }
    return text + "]";
}

// What is different in this worker's file; "": nothing.
std::string worker_weights::mismatch(const ggml_tensor & tensor, uint64_t file, uint64_t offset) const {
    const auto found = known.find(tensor.name);
    if (found == known.end()) {
        return "has no such tensor";
    }
    const file_weight & w = found->second;
    for (int i = 0; i < 4; i++) {
        if (tensor.ne[i] != w.ne[i]) {
            return "has it with the shape " + shape_text(w.ne) + ", not " + shape_text(tensor.ne);
        }
    }
    if ((uint32_t) tensor.type != w.type) {
        return std::string("has it as ") + ggml_type_name((ggml_type) w.type) + ", not " + ggml_type_name(tensor.type);
    }
    if (file != w.file || offset != w.offset) {
        return "has it at byte " + std::to_string(w.offset) + " of shard " + std::to_string(w.file) + ", not at " + std::to_string(offset) + " of " +
               std::to_string(file);
    }
    return "";
}

bool worker_weights::bind(ggml_tensor & tensor, uint64_t file, uint64_t offset, uint64_t beside, std::string & reason) {
    reason = mismatch(tensor, file, offset);
    if (reason.empty() && (!tensor.buffer || !tensor.data || !ggml_is_contiguous(&tensor) || file >= files.size())) {
        reason = "got no place for it";
    }
    if (reason.empty() && (session.bound || taken.count(tensor.name) || elsewhere.count((uintptr_t) tensor.data))) {
        reason = "has bound it, or all weights, before";
    }
    if (reason.empty() && known.at(tensor.name).home != weight_home::flash && ggml_nbytes(&tensor) > limit - std::min(limit, n_resident + beside)) {
        reason = "has more in it than this worker's budget has memory for";
    }
    if (!reason.empty()) {
        return false;
    }
    bound weight;
    weight.at_client = tensor;
    weight.here      = tensor;
    for (int i = 2; i < GGML_MAX_DIMS; i++) { // strides of 4 GiB do not fit into a message
        weight.here.nb[i] = weight.here.nb[i - 1] * (size_t) weight.here.ne[i - 1];
    }
    if (!read(weight, known.at(tensor.name))) {
        reason = "could not read it";
        return false;
    }
    // what looks for the next layer's router reads weights only
    ggml_backend_buffer_set_usage(tensor.buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    taken[tensor.name] = tensor.buffer;
    n_resident += weight.resident;
    owners[tensor.buffer] += weight.resident;
    if (weight.own) {
        elsewhere.emplace((uintptr_t) tensor.data, std::move(weight));
    }
    return true;
}

bool worker_weights::read(bound & weight, const file_weight & where) {
    if (where.home == weight_home::flash) {
        return put_on_flash(weight, where);
    }
    weight.resident = ggml_nbytes(&weight.here);
    if (where.home == weight_home::matrix && stock_kernel_for(&weight.here, weight.here.ne[2] > 1).extra) {
        return repack(weight, where);
    }
    const session_lock lock(session);
    return lock && session.load(&weight.here, files[where.file], where.offset) && !session.failed();
}

bool worker_weights::put_on_flash(bound & weight, const file_weight & where) {
    flash_set_binding_session(&session);
    weight.own.reset(ggml_backend_buft_alloc_buffer(ggml_backend_flash_buffer_type(), ggml_nbytes(&weight.here)));
    flash_set_binding_session(nullptr);
    if (!weight.own) {
        return false;
    }
    weight.here.buffer = weight.own.get();
    weight.here.data   = ggml_backend_buffer_get_base(weight.own.get());
    const session_lock lock(session);
    return lock && session.bind(&weight.here, files[where.file], where.offset) && !session.failed();
}

// as the stock loader does: read as it is in the file, given to the buffer type as a whole
bool worker_weights::repack(bound & weight, const file_weight & where) {
    const size_t               bytes  = ggml_nbytes(&weight.here);
    ggml_backend_buffer_type_t layout = stock_kernel_for(&weight.here, weight.here.ne[2] > 1).buffer->buft;
    weight.own.reset(ggml_backend_buft_alloc_buffer(layout, bytes));
    mapping as_in_file = mapping::allocate(bytes);
    if (!weight.own || !as_in_file.data) {
        return false;
    }
    ggml_tensor plain = weight.here;
    plain.data        = as_in_file.data;
    {
        const session_lock lock(session);
        if (!lock || !session.load(&plain, files[where.file], where.offset) || session.failed()) {
            return false;
        }
    }
    weight.here.buffer = weight.own.get();
    weight.here.data   = ggml_backend_buffer_get_base(weight.own.get());
    weight.own->iface.init_tensor(weight.own.get(), &weight.here);
    weight.own->iface.set_tensor(weight.own.get(), &weight.here, plain.data, 0, bytes);
    ggml_backend_buffer_set_usage(weight.own.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    return true;
}

static bool same_layout(const ggml_tensor & a, const ggml_tensor & b) {
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        if (a.ne[i] != b.ne[i] || a.nb[i] != b.nb[i]) {
            return false;
        }
    }
    return a.type == b.type;
}

bool worker_weights::place(ggml_tensor & tensor) const {
    if (!tensor.buffer || !tensor.data || elsewhere.empty()) {
        return true;
    }
    const auto begin = (uintptr_t) tensor.data;
    auto       next  = elsewhere.upper_bound(begin); // the first weight behind its begin
    if (next != elsewhere.begin()) {
        const bound & weight = std::prev(next)->second;
        const auto    at     = (uintptr_t) weight.at_client.data;
        if (begin < at + ggml_nbytes(&weight.at_client)) {
            if (begin != at || tensor.op != GGML_OP_NONE || !same_layout(tensor, weight.at_client)) {
                return false;
            }
            tensor.buffer = weight.here.buffer;
            tensor.data   = weight.here.data;
            tensor.extra  = weight.here.extra;
            return true;
        }
    }
    return next == elsewhere.end() || begin + ggml_nbytes(&tensor) <= next->first;
}

bool worker_weights::is_elsewhere(const ggml_tensor & tensor) {
    return tensor.buffer && tensor.buffer->buft != ggml_backend_cpu_buffer_type();
}

void worker_weights::drop(ggml_backend_buffer_t buffer) {
    for (auto it = elsewhere.begin(); it != elsewhere.end();) {
        it = it->second.at_client.buffer == buffer ? elsewhere.erase(it) : std::next(it);
    }
    for (auto it = taken.begin(); it != taken.end();) { // what is on flash stays known to the session
        it = it->second == buffer && known.at(it->first).home != weight_home::flash ? taken.erase(it) : std::next(it);
    }
    if (const auto owner = owners.find(buffer); owner != owners.end()) {
        n_resident -= owner->second;
        owners.erase(owner);
    }
}
