#include "buffer_type.h"

#include "engine_guard.h"
#include "memory/mapping.h"
#include "session.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "llama-ext.h"
#include "traits.h"

#include <mutex>
#include <new>

static thread_local llama_flash_session * binding_session = nullptr;

void flash_set_binding_session(llama_flash_session * session) {
    binding_session = session;
}

// buffer: addresses without memory, so that every tensor has one of its own

struct flash_buffer {
    llama_flash_session * session;
    mapping               addresses;

    ~flash_buffer() { session->unref(); }
};

static void ggml_backend_flash_buffer_free_buffer(ggml_backend_buffer_t buffer) {
    delete (flash_buffer *) buffer->context;
}

static void * ggml_backend_flash_buffer_get_base(ggml_backend_buffer_t buffer) {
    return ((flash_buffer *) buffer->context)->addresses.data;
}

static void ggml_backend_flash_buffer_set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    // only reached where the loader does not offer the tensor's file: such weights are not flash tensors
    GGML_LOG_ERROR("%s: tensor %s is bound to a file and cannot be written\n", __func__, tensor->name);

    GGML_UNUSED(buffer);
    GGML_UNUSED(data);
    GGML_UNUSED(offset);
    GGML_UNUSED(size);
}

static void ggml_backend_flash_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    GGML_UNUSED(buffer);
    GGML_UNUSED(value);
}

static const ggml_backend_buffer_i ggml_backend_flash_buffer_i = {
    /* .free_buffer   = */ ggml_backend_flash_buffer_free_buffer,
    /* .get_base      = */ ggml_backend_flash_buffer_get_base,
    /* .init_tensor   = */ nullptr, // tensor->extra stays null: ggml's own work size then holds for unrepacked kernels
    /* .memset_tensor = */ nullptr,
    /* .set_tensor    = */ ggml_backend_flash_buffer_set_tensor,
    /* .get_tensor    = */ nullptr,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ ggml_backend_flash_buffer_clear,
    /* .reset         = */ nullptr,
};

// buffer type

static const char * ggml_backend_flash_buffer_type_get_name(ggml_backend_buffer_type_t buft) {
    return "CPU_FLASH";

    GGML_UNUSED(buft);
}

static ggml_backend_buffer_t ggml_backend_flash_buffer_type_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    if (!binding_session) {
        GGML_LOG_ERROR("%s: no session: llama_flash_session_bind_begin was not called on this thread\n", __func__);
        return nullptr;
    }
    mapping addresses = mapping::reserve(size);
    if (!addresses.data) {
        if (const session_lock lock(*binding_session); lock && !binding_session->failed()) { // bind_end says it
            llama_flash_error e;
            flash_fail(&e, LLAMA_FLASH_E_MEMORY, "the kernel refused %zu bytes of addresses for weights that stay in the file%s", size,
                       limits_of(ENOMEM).c_str());
            binding_session->reads.refuse(e);
        }
        return nullptr;
    }
    auto * context = new (std::nothrow) flash_buffer{ binding_session, std::move(addresses) };
    if (!context) {
        return nullptr;
    }
    binding_session->ref();
    return ggml_backend_buffer_init(buft, ggml_backend_flash_buffer_i, context, size);
}

static size_t ggml_backend_flash_buffer_type_get_alignment(ggml_backend_buffer_type_t buft) {
    return 64;

    GGML_UNUSED(buft);
}

// traits

static llama_flash_session * session_of(const ggml_tensor * weight) {
    return ((flash_buffer *) weight->buffer->context)->session;
}

static ggml_op op_of(const flash_bundle & b) {
    return b.n_expert > 0 ? GGML_OP_MUL_MAT_ID : GGML_OP_MUL_MAT;
}

static bool computed_here(ggml_op op) {
    return op == GGML_OP_MUL_MAT || op == GGML_OP_MUL_MAT_ID || op == GGML_OP_GET_ROWS;
}

namespace ggml::cpu::flash {

class tensor_traits : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const struct ggml_tensor * op, size_t & size) override {
        ffn_part part;
        if (const flash_bundle * b = session_of(op->src[0])->find_part(op->src[0]->data, part)) {
            return part != ffn_part::down && stock_work_size(b->part(part).kernel, n_threads, op, size);
        }
        const flash_tensor * t = session_of(op->src[0])->find(op->src[0]->data);
        return t && op->op != GGML_OP_GET_ROWS && stock_work_size(t->kernel, n_threads, op, size);
    }

    bool compute_forward(struct ggml_compute_params * params, struct ggml_tensor * op) override {
        llama_flash_session * s = session_of(op->src[0]);
        if (s->forked()) { // in a child every thread of the pool comes by here; what the op would touch may be half changed
            return true;   // llama_flash_abort stops the graph
        }
        ffn_part       part;
        flash_bundle * b = s->find_part(op->src[0]->data, part);
        if (b && op->op == op_of(*b) && ggml_are_same_shape(op->src[0], &b->part(part).weight)) {
            s->ffn_ops.run(*b, part, params, op);
            return true;
        }
        flash_tensor * t = s->find(op->src[0]->data);
        if (!t || !ggml_are_same_shape(op->src[0], &t->weight)) {
            if (params->ith == 0) {
                s->fail_unbound(op->src[0]);
            }
            return true;
        }
        if (op->op == GGML_OP_GET_ROWS) {
            s->row_ops.run(*t, params, op);
        } else if (op->op == GGML_OP_MUL_MAT_ID) {
            s->expert_ops.run(*t, params, op);
        } else {
            s->panel_ops.run(*t, params, op);
        }
        return true;
    }
};

class extra_buffer_type : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t dev, const struct ggml_tensor * op) override {
        GGML_UNUSED(dev);
        const ggml_tensor * weight = op->src[0];
        // the loader asks with an empty buffer: flash tensors are chosen by name, not by it
        if (!computed_here(op->op) || !weight->buffer || weight->buffer->buft != ggml_backend_flash_buffer_type() || weight->buffer->size == 0) {
            return false;
        }
        if (op->op == GGML_OP_GET_ROWS) {
            const flash_tensor * t = session_of(weight)->find(weight->data);
            return t && t->by_rows && ggml_is_vector(op->src[1]);
        }
        if (op->src[1]->type != GGML_TYPE_F32 || (op->src[1]->buffer && !ggml_backend_buft_is_host(op->src[1]->buffer->buft))) {
            return false;
        }
        ffn_part part;
        if (const flash_bundle * b = session_of(weight)->find_part(weight->data, part)) {
            return op->op == op_of(*b);
        }
        const flash_tensor * t = session_of(weight)->find(weight->data);
        return t && !t->only_rows && t->is_experts == (op->op == GGML_OP_MUL_MAT_ID);
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const struct ggml_tensor * op) override {
        static tensor_traits traits;
        if (computed_here(op->op)) {
            if (op->src[0]->buffer && op->src[0]->buffer->buft == ggml_backend_flash_buffer_type()) {
                return &traits;
            }
        }
        return nullptr;
    }
};

} // namespace ggml::cpu::flash

ggml_backend_buffer_type_t ggml_backend_flash_buffer_type() {
    static struct ggml_backend_buffer_type buffer_type = {
        /* .iface    = */ {
            /* .get_name         = */ ggml_backend_flash_buffer_type_get_name,
            /* .alloc_buffer     = */ ggml_backend_flash_buffer_type_alloc_buffer,
            /* .get_alignment    = */ ggml_backend_flash_buffer_type_get_alignment,
            /* .get_max_size     = */ nullptr, // defaults to SIZE_MAX
            /* .get_alloc_size   = */ nullptr, // defaults to ggml_nbytes
            /* .is_host          = */ nullptr, // false: only our traits may touch the data
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ new ggml::cpu::flash::extra_buffer_type(),
    };
    return &buffer_type;
}

// registration

static bool (*remote_bind)(const ggml_tensor * tensor, int fd, size_t offset) = nullptr;

void flash_set_remote_bind(bool (*bind)(const ggml_tensor * tensor, int fd, size_t offset)) {
    remote_bind = bind;
}

static bool bind_tensor(ggml_tensor * tensor, int fd, size_t offset) {
    if (!tensor->buffer || tensor->buffer->size == 0) {
        return false;
    }
    if (tensor->buffer->buft == ggml_backend_flash_buffer_type()) {
        const session_lock lock(*session_of(tensor));
        return !lock || session_of(tensor)->bind(tensor, fd, offset);
    }
    if (remote_bind && remote_bind(tensor, fd, offset)) {
        return true;
    }
    const bool in_memory = tensor->data && tensor->type != GGML_TYPE_FLASH && ggml_backend_buffer_is_host(tensor->buffer);
    if (!binding_session || !in_memory) {
        return false;
    }
    const session_lock lock(*binding_session);
    return !lock || binding_session->load(tensor, fd, offset);
}

void flash_register() {
    static std::once_flag once;
    std::call_once(once, [] {
        ggml_backend_cpu_get_extra_buffer_types().push_back(ggml_backend_flash_buffer_type());
        llama_set_tensor_bind(bind_tensor);
        flash_guard_engine();
    });
}
