// The C interface of prompts: no session, and no exception beyond this file.
#include "base/status.h"
#include "io/checksum.h"
#include "llama_flash.h"
#include "prompts/body.h"
#include "prompts/restore.h"

#include "llama-ext.h"

#include <algorithm>
#include <cstring>

static_assert(prompt_restore::HEAD == LLAMA_FLASH_PROMPT_HEAD, "the head of a file");

static uint64_t bytes_of_token(llama_context * ctx, bool window, int32_t seq) {
    const llama_pos last = llama_memory_seq_pos_max(llama_get_memory(ctx), seq);
    llama_kv_range  range;
    return last >= 0 && llama_kv_get_range(ctx, window, seq, last, last + 1, range) ? prompt_body(range, 0, 1).bytes() : 0;
}

int32_t llama_flash_prompt_kind_of(llama_context * ctx, int32_t seq, llama_flash_prompt_kind * out, llama_flash_error * err) {
    if (!ctx || !out) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "prompt_kind_of: no context or nowhere to tell it");
    }
    *out = {};
    return guarded(err, [&] {
        const llama_kv_kind kind = llama_kv_get_kind(ctx);
        out->supported           = kind.supported;
        out->has_cells           = kind.all;
        out->window              = kind.window;
        out->has_state           = kind.state;
        out->cell_bytes          = kind.all ? bytes_of_token(ctx, false, seq) : 0;
        out->window_bytes        = kind.window ? bytes_of_token(ctx, true, seq) : 0;
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_prompt_take(llama_context * ctx, int32_t seq, bool window, int32_t p0, int32_t p1, uint64_t offset, uint64_t size, uint8_t * to,
                                uint64_t * total, uint32_t * sum, llama_flash_error * err) {
    if (!ctx || !total || !sum || p0 < 0 || p1 <= p0 || (size > 0 && !to)) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "prompt_take: no context, no positions or nowhere to copy them");
    }
    return guarded(err, [&] {
        llama_kv_range range;
        if (!llama_kv_get_range(ctx, window, seq, p0, p1, range)) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "prompt_take: positions %d to %d of sequence %d are not in memory", p0, p1, seq);
        }
        const prompt_body body(range, 0, range.cells.size());
        *total = body.bytes();
        *sum   = 0;
        if (offset > body.bytes() || size > body.bytes() - offset) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "prompt_take: %llu bytes at %llu of a state of %llu", (unsigned long long) size,
                              (unsigned long long) offset, (unsigned long long) body.bytes());
        }
        body.take(offset, size, to);
        for (uint64_t done = 0; done < size; done += CHECKSUM_PIECE) {
            *sum += checksum_piece(to + done, std::min<uint64_t>(CHECKSUM_PIECE, size - done), (uint32_t) ((offset + done) / CHECKSUM_PIECE));
        }
        return (int32_t) LLAMA_FLASH_OK;
    });
}

// Cells that are about to be filled, in memory that may never have been touched: small pages would take longer than the reads. Of a V
// that lies in rows, the first block touches all of it; where most of it will be in use, it is asked for before.
static void prepare_memory(const llama_kv_range & range, prompt_restore & restore) {
    const auto ends = std::minmax_element(range.cells.begin(), range.cells.end());
    for (const llama_kv_plane & plane : range.planes) {
        if (plane.n_rows == 1) {
            restore.prepare(plane.data + *ends.first * plane.cell_bytes, plane.data + (*ends.second + 1) * plane.cell_bytes, false);
        } else if (2 * range.cells.size() * plane.cell_bytes >= plane.row_bytes) {
            restore.prepare(plane.data, plane.data + plane.n_rows * plane.row_bytes, true);
        }
    }
}

int32_t llama_flash_prompt_restore(llama_context * ctx, int32_t seq, bool window, int32_t p0, const int32_t * tokens, uint32_t block_tokens,
                                   const llama_flash_prompt_block * blocks, uint32_t n, const llama_flash_params * params, uint32_t * n_good,
                                   llama_flash_error * err) {
    if (!ctx || !tokens || !blocks || !n_good || p0 < 0 || n == 0 || block_tokens == 0 || (uint64_t) n * block_tokens > (uint64_t) (INT32_MAX - p0)) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "prompt_restore: no context, no blocks or nowhere to tell how many are right");
    }
    *n_good = 0;
    return guarded(err, [&] {
        auto restore = prompt_restore::create(params ? *params : llama_flash_params{}, err);
        if (!restore) {
            return (int32_t) LLAMA_FLASH_E_MEMORY;
        }
        llama_kv_range range;
        const auto     n_tokens = (llama_pos) (n * block_tokens);
        if (!llama_kv_make_range(ctx, window, seq, p0, p0 + n_tokens, tokens, range)) {
            return flash_fail(err, LLAMA_FLASH_E_MEMORY, "prompt_restore: no cells for positions %d to %d", p0, p0 + n_tokens);
        }
        prepare_memory(range, *restore);
        for (uint32_t i = 0; i < n; i++) {
            restore->add(blocks[i].fd, blocks[i].head, prompt_body(range, (size_t) i * block_tokens, block_tokens));
        }
        *n_good = (uint32_t) restore->run();
        for (uint32_t i = *n_good; i < n; i++) {
            restore->body(i).clear(); // attention reads cells that are free, too
        }
        if (*n_good < n) {
            llama_memory_seq_rm(llama_get_memory(ctx), seq, p0 + (llama_pos) (*n_good * block_tokens), -1);
        }
        return (int32_t) LLAMA_FLASH_OK;
    });
}

static void copy_cells(const llama_kv_range & from, const llama_kv_range & to) {
    constexpr uint64_t   STEP = 256u << 10;
    std::vector<uint8_t> buffer(STEP);
    const prompt_body    source(from, 0, from.cells.size());
    const prompt_body    target(to, 0, to.cells.size());
    for (uint64_t done = 0; done < source.bytes(); done += STEP) {
        const uint64_t n_bytes = std::min(STEP, source.bytes() - done);
        source.take(done, n_bytes, buffer.data());
        target.put(done, n_bytes, buffer.data());
    }
}

int32_t llama_flash_prompt_copy(llama_context * ctx, int32_t from, int32_t to, int32_t p0, int32_t p1, const int32_t * tokens, llama_flash_error * err) {
    if (!ctx || !tokens || p0 < 0 || p1 <= p0 || from == to) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "prompt_copy: no context, no positions, or a sequence to itself");
    }
    return guarded(err, [&] {
        const llama_kv_kind kind = llama_kv_get_kind(ctx);
        if (!kind.supported || kind.state) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "prompt_copy: this model's state cannot be divided");
        }
        const llama_pos w0 = std::max<llama_pos>(0, p1 - (llama_pos) kind.window);
        llama_kv_range  source[2];
        llama_kv_range  target[2];
        if ((kind.all && !llama_kv_get_range(ctx, false, from, p0, p1, source[0])) ||
            (kind.window && !llama_kv_get_range(ctx, true, from, w0, p1, source[1]))) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "prompt_copy: positions up to %d of sequence %d are not in memory", p1, from);
        }
        if ((kind.all && !llama_kv_make_range(ctx, false, to, p0, p1, tokens + p0, target[0])) ||
            (kind.window && !llama_kv_make_range(ctx, true, to, w0, p1, tokens + w0, target[1]))) {
            return flash_fail(err, LLAMA_FLASH_E_MEMORY, "prompt_copy: no cells for positions up to %d", p1);
        }
        copy_cells(source[0], target[0]);
        copy_cells(source[1], target[1]);
        return (int32_t) LLAMA_FLASH_OK;
    });
}

uint32_t llama_flash_checksum(const uint8_t * data, uint64_t size) {
    return data ? checksum(data, size) : 0;
}
