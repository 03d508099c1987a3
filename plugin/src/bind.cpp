// Which weight is which tensor: the loader shows each weight that stays on flash with its place in a file, and those that do not.
#include "session.h"

#include "bundle_check.h"

#include <cerrno>
#include <cstdio>
#include <sys/stat.h>
#include <utility>

static bool lies_within(const flash_file & file, uint64_t offset, uint64_t bytes) {
    return bytes <= file.size && offset <= file.size - bytes;
}

// The file open as fd, for direct reads; nullptr: the session has failed.
const flash_file * llama_flash_session::file_of(int fd) {
    struct stat st;
    if (fstat(fd, &st) == 0) {
        for (const auto & f : files) {
            if (f->device == (uint64_t) st.st_dev && f->inode == (uint64_t) st.st_ino) {
                return f.get();
            }
        }
    }
    llama_flash_error e;
    auto              opened = flash_file::reopen(fd, &e);
    if (!opened) {
        reads.refuse(e);
        return nullptr;
    }
    files.push_back(std::move(opened));
    return files.back().get();
}

bool llama_flash_session::load(ggml_tensor * tensor, int fd, uint64_t offset) {
    uint32_t bundle;
    size_t   part;
    if (find_named_part(tensor, bundle, part)) {
        return false; // in the file are bytes of the bundle, not rows of the weight
    }
    const flash_file * file = failed() ? nullptr : file_of(fd);
    if (file && !loader) {
        llama_flash_error e;
        loader = weight_loader::create(params, &e);
        if (loader) {
            loader->report_to(reads.waited_for());
        } else {
            reads.refuse(e);
        }
    }
    if (failed()) {
        return true; // end_binding reports it
    }
    reader::done bad;
    if (!loader->read(*file, offset, ggml_nbytes(tensor), (uint8_t *) tensor->data, bad)) {
        reads.fail_read(*file, tensor->name, bad.error, bad.error_offset, ggml_nbytes(tensor));
    }
    return true;
}

// What is wrong, end_binding reports.
bool llama_flash_session::bind(const ggml_tensor * tensor, int fd, uint64_t offset) {
    const flash_file * file = file_of(fd);
    if (!file) {
        return true; // end_binding reports it; the loader need not read the tensor
    }
    llama_flash_error e;
    if (bind_part(tensor, file, offset)) {
        return true;
    }
    if (!lies_within(*file, offset, ggml_nbytes(tensor))) {
        flash_fail(&e, LLAMA_FLASH_E_FORMAT, "tensor %s has %zu bytes from byte %llu on, but %s has %llu: the file is cut short",
                   tensor->name, ggml_nbytes(tensor), (unsigned long long) offset, file->path.c_str(),
                   (unsigned long long) file->size);
        reads.refuse(e);
        return true;
    }
    if (!ggml_get_type_traits_cpu(tensor->type)->vec_dot) {
        flash_fail(&e, LLAMA_FLASH_E_FORMAT, "%s: tensor %s is of type %s, which no kernel multiplies: the file is damaged", file->path.c_str(),
                   tensor->name, ggml_type_name(tensor->type));
        reads.refuse(e);
        return true;
    }

    flash_tensor t = {};
    t.name         = tensor->name;
    t.weight       = *tensor;
    t.file         = file;
    t.offset       = offset;
    t.is_experts   = tensor->ne[2] > 1;
    if (const auto named = row_names.find(t.name); named != row_names.end()) {
        t.by_rows   = true;
        t.only_rows = named->second;
        rows.add(t.weight.nb[1]);
        t.row_checksums.assign((size_t) t.weight.ne[1], 0);
    }
    t.kernel                 = stock_kernel_for(tensor, t.is_experts);
    by_address[tensor->data] = table.tensors.size();
    table.tensors.push_back(std::move(t));
    return true;
}

// The loader presents a bundle's parts as ordinary weights: which one this is. false: none.
bool llama_flash_session::find_named_part(const ggml_tensor * tensor, uint32_t & bundle, size_t & part) const {
    static const char * const names[FFN_PARTS] = { "ffn_gate", "ffn_up", "ffn_down" };
    for (bundle = 0; bundle < bundles.size(); bundle++) {
        const flash_bundle & b      = bundles[bundle];
        const char * const   suffix = b.n_expert > 0 ? "_exps.weight" : ".weight";
        for (part = 0; part < FFN_PARTS; part++) {
            if (b.parts[part].present && "blk." + std::to_string(b.layer) + "." + names[part] + suffix == tensor->name) {
                return true;
            }
        }
    }
    return false;
}

// false: it is no bundle's part. If it contradicts the bundle's description, end_binding reports it.
bool llama_flash_session::bind_part(const ggml_tensor * tensor, const flash_file * file, uint64_t offset) {
    llama_flash_error e;
    uint32_t          k;
    size_t            p;
    if (!find_named_part(tensor, k, p)) {
        return false;
    }
    flash_bundle & b    = bundles[k];
    const bool     down = p == (size_t) ffn_part::down;
    if (tensor->ne[0] != (down ? b.n_ff : b.n_embd) || tensor->ne[1] != (down ? b.n_embd : b.n_ff) || tensor->ne[2] != b.n_blocks() ||
        (!down && tensor->type != b.parts[p].type)) {
        flash_fail(&e, LLAMA_FLASH_E_FORMAT, "tensor %s is %s [%lld, %lld, %lld], its bundle holds %u times %u neurons of %u %s",
                   tensor->name, ggml_type_name(tensor->type), (long long) tensor->ne[0], (long long) tensor->ne[1],
                   (long long) tensor->ne[2], b.n_blocks(), b.n_ff, b.n_embd, ggml_type_name(b.parts[p].type));
        reads.refuse(e);
        return true;
    }
    if (!lies_within(*file, offset, b.tensor_bytes())) {
        flash_fail(&e, LLAMA_FLASH_E_FORMAT, "tensor %s has %zu bytes from byte %llu on, but %s has %llu: the file is cut short",
                   b.name.c_str(), (size_t) b.tensor_bytes(), (unsigned long long) offset, file->path.c_str(), (unsigned long long) file->size);
        reads.refuse(e);
        return true;
    }
    b.file            = file;
    b.offset          = offset;
    b.parts[p].weight = *tensor;
    if (!down) {
        b.parts[p].kernel = stock_kernel_for(tensor, b.n_expert > 0);
    }
    part_by_address[tensor->data] = { k, (ffn_part) p };
    return true;
}

int32_t llama_flash_session::add_rows(const char * name, bool only, llama_flash_error * err) {
    if (bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_rows: %s, after the model was loaded", name);
    }
    row_names[name] = only;
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session::add_router(const char * experts, router_values values, llama_flash_error * err) {
    if (bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_router: %s, after the model was loaded", experts);
    }
    expert_ops.add_router(experts, std::move(values));
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session::add_bundle(const llama_flash_bundle & d, llama_flash_error * err) {
    if (bound || (!bundles.empty() && bundles.back().layer >= d.layer)) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_bundle: layers come in order, before the model is loaded");
    }
    flash_bundle  b;
    const int32_t code = make_bundle(d, bundles, b, err);
    if (code == LLAMA_FLASH_OK) {
        bundles.push_back(std::move(b));
    }
    return code;
}

// bind() has seen a tensor for every part of every bundle
int32_t llama_flash_session::check_bundles(llama_flash_error * err) const {
    for (const auto & b : bundles) {
        for (const auto & p : b.parts) {
            if (p.present && !p.weight.data) {
                return flash_fail(err, LLAMA_FLASH_E_FORMAT, "tensor %s: the model does not use all of its parts", b.name.c_str());
            }
        }
    }
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session::end_binding(llama_flash_error * err) {
    loader.reset();
    if (failed()) {
        if (err) {
            *err = reads.error();
        }
        reads.forget_error();
        return reads.error().code;
    }
    for (const auto & f : files) {
        if (f->look() >= file_state::doubtful) {
            flash_fail(err, LLAMA_FLASH_E_READ, "%s changed while it was loaded: load the model again", f->path.c_str());
            if (err) {
                err->sys_errno = ESTALE;
                snprintf(err->file, sizeof(err->file), "%s", f->path.c_str());
            }
            return LLAMA_FLASH_E_READ;
        }
    }
    int32_t code = check_bundles(err);
    if (code == LLAMA_FLASH_OK) {
        code = table.make_records(params.panel_bytes ? params.panel_bytes : 4u << 20, err);
    }
    if (code != LLAMA_FLASH_OK) {
        return code;
    }
    neuron_params = { LLAMA_FLASH_NEURONS_OFF, UINT32_MAX, 512, 0, 0, 0 };
    neurons.lay_out(neuron_params.mode);
    note_needs(neuron_params.n_ubatch);
    expert_ops.reserve(params);
    notes.first_bundle = (uint32_t) table.tensors.size();
    bound              = true;
    return LLAMA_FLASH_OK;
}
