#include "worker/buffers.h"

#include "memory/mapping.h"
#include "worker/weights.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <algorithm>
#include <iterator>
#include <mutex>

void page_set::add(uintptr_t begin, uint64_t bytes) {
    if (bytes == 0) {
        return;
    }
    const uintptr_t page = page_bytes();
    uintptr_t       end  = (begin + bytes + page - 1) / page * page;
    begin                = begin / page * page;
    auto next            = ranges.upper_bound(begin);
    if (next != ranges.begin() && std::prev(next)->second >= begin) {
        next = std::prev(next);
    }
    while (next != ranges.end() && next->first <= end) { // they become one
        begin = std::min(begin, next->first);
        end   = std::max(end, next->second);
        total -= next->second - next->first;
        next = ranges.erase(next);
    }
    ranges.emplace(begin, end);
    total += end - begin;
}

void page_set::add(const page_set & other) {
    for (const auto & [begin, end] : other.ranges) {
        add(begin, end - begin);
    }
}

void page_set::clear() {
    ranges.clear();
    total = 0;
}

// writes to the buffers

static thread_local client_buffers * current = nullptr;

void client_buffers::serve(client_buffers * buffers) {
    current = buffers;
}

static ggml_backend_buffer_i stock = {}; // of the engine's buffers in memory, set once
static std::once_flag        known;

static bool may_write(ggml_backend_buffer_t buffer, const void * data, size_t offset, size_t size) {
    return !current || current->may_write(buffer, (uintptr_t) data + offset, size);
}

static void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    if (may_write(buffer, tensor->data, offset, size)) {
        stock.memset_tensor(buffer, tensor, value, offset, size);
    }
}

static void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    if (may_write(buffer, tensor->data, offset, size)) {
        stock.set_tensor(buffer, tensor, data, offset, size);
    }
}

static bool cpy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
    const size_t bytes = ggml_nbytes(src);
    const auto   from  = (uintptr_t) src->data;
    const auto   to    = (uintptr_t) dst->data;
    const bool   apart = from + bytes <= to || to + bytes <= from;
    return apart && may_write(buffer, dst->data, 0, bytes) && stock.cpy_tensor(buffer, src, dst);
}

static void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    const bool gives_back = value == 0; // what is zero takes no memory
    const bool may        = gives_back ? !current || current->may_empty(buffer) : may_write(buffer, ggml_backend_buffer_get_base(buffer), 0, buffer->size);
    if (may) {
        stock.clear(buffer, value);
    }
}

ggml_backend_buffer_t client_buffers::allocate(size_t size, bool is_late) {
    if (size > most - allocated) {
        refuse("the client asks for a buffer of " + std::to_string(size) + " bytes, more than this worker's budget has for it");
        return nullptr;
    }
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (!buffer) {
        return nullptr;
    }
    if (size > 0) { // of one without a byte the engine has no functions
        std::call_once(known, [buffer] { stock = buffer->iface; });
        buffer->iface.memset_tensor = memset_tensor;
        buffer->iface.set_tensor    = set_tensor;
        buffer->iface.cpy_tensor    = cpy_tensor;
        buffer->iface.clear         = clear;
    }
    uses[buffer] = { size };
    allocated += size;
    counted = is_late ? counted : bytes();
    return buffer;
}

void client_buffers::forget(ggml_backend_buffer_t buffer) {
    if (const auto it = uses.find(buffer); it != uses.end()) {
        allocated -= it->second.bytes;
        written -= it->second.written ? it->second.bytes : 0;
        uses.erase(it);
    }
}

bool client_buffers::may_bind(ggml_backend_buffer_t buffer) const {
    const auto it = uses.find(buffer);
    return it != uses.end() && !it->second.written;
}

void client_buffers::give_to_weights(ggml_backend_buffer_t buffer) {
    uses.at(buffer).weights = true;
}

uint64_t client_buffers::bytes() const {
    uint64_t sum = 0;
    for (const auto & [buffer, use] : uses) {
        sum += use.weights ? 0 : use.bytes;
    }
    return sum;
}

uint64_t client_buffers::largest() const {
    uint64_t most_bytes = 0;
    for (const auto & [buffer, use] : uses) {
        most_bytes = std::max(most_bytes, use.weights ? 0 : use.bytes);
    }
    return most_bytes;
}

bool client_buffers::may_empty(ggml_backend_buffer_t buffer) const {
    const auto it = uses.find(buffer);
    if (it == uses.end() || it->second.weights) {
        refuse("the client writes to memory of weights");
        return false;
    }
    return true;
}

bool client_buffers::may_write(ggml_backend_buffer_t buffer, uintptr_t begin, uint64_t bytes) {
    if (!may_empty(buffer)) {
        return false;
    }
    const auto it = uses.find(buffer);
    if (!it->second.written) {
        if (it->second.bytes > limit - std::min(limit, written + resident)) {
            refuse("the client writes to buffers of " + std::to_string(written + it->second.bytes) + " bytes, more than this worker's budget has for them");
            return false;
        }
        it->second.written = true;
        written += it->second.bytes;
        if (const uint64_t now = this->bytes(); now > counted) {
            counted = now;
            many();
        }
    }
    touch(nullptr, begin, bytes);
    return true;
}

// what a call touches

constexpr uint64_t ONE_VALUE = 8; // bytes: a row of one value lies in one page

// Of an op that writes rows to where numbers say: at most these pages.
static uint64_t scattered(const ggml_tensor & node) {
    const uint64_t page = page_bytes();
    const uint64_t rows = (uint64_t) ggml_nrows(node.src[0]);
    const uint64_t each = ggml_row_size(node.type, node.ne[0]);
    const uint64_t most = ((each + page - 1) / page + (each > ONE_VALUE)) * page; // of a row
    const uint64_t all  = ggml_nbytes(&node);
    return rows < all / most ? rows * most : all;
}

bool client_buffers::may_compute(const ggml_cgraph & graph) {
    page_set pages;
    uint64_t rows = 0;
    for (int i = 0; i < graph.n_nodes; i++) {
        const ggml_tensor & node = *graph.nodes[i];
        if (node.op == GGML_OP_NONE || node.op == GGML_OP_RESHAPE || node.op == GGML_OP_VIEW || node.op == GGML_OP_PERMUTE ||
            node.op == GGML_OP_TRANSPOSE || ggml_is_empty(&node)) {
            continue; // not computed
        }
        if (!may_write(node.buffer, 0, 0)) {
            return false;
        }
        if (node.op == GGML_OP_SET_ROWS) {
            rows += scattered(node);
        } else {
            pages.add((uintptr_t) node.data, ggml_nbytes(&node));
        }
    }
    of_graph = std::move(pages);
    of_rows  = rows;
    return true;
}

void client_buffers::begin_graph() {
    rows_touched = std::max(rows_touched, of_rows);
    touch(&of_graph, 0, 0);
}

void client_buffers::touch(const page_set * pages, uintptr_t begin, uint64_t bytes) {
    if (const uint32_t now = times.load(); now != seen) {
        seen = now;
        touched.clear();
        rows_touched = pages ? of_rows : 0;
    }
    if (expected.load() == UINT64_MAX) {
        return;
    }
    if (pages) {
        touched.add(*pages);
    }
    touched.add(begin, bytes);
    if (touched.bytes() + rows_touched > expected.load()) {
        expected = UINT64_MAX;
        many();
    }
}

void client_buffers::expect(uint64_t bytes) {
    expected = bytes;
    times++;
}
