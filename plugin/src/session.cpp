#include "session.h"

#include "base/status.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <fcntl.h>
#include <map>
#include <pthread.h>
#include <sys/stat.h>
#include <utility>

// life

static std::atomic<uint64_t> n_forks{ 0 };

// OpenMP keeps its threads for the next graph. They are not there in a child, which would wait for them in its first graph, whatever its
// model: so the thread that forks lets go of its own before. The next graph starts new ones.
static int (*const pause_openmp)(int) = (int (*)(int)) dlsym(RTLD_DEFAULT, "omp_pause_resource_all");

static void before_fork() {
    constexpr int omp_pause_hard = 2;
    if (pause_openmp) {
        pause_openmp(omp_pause_hard);
    }
}

[[maybe_unused]] static const int watching_forks = pthread_atfork(before_fork, nullptr, [] { n_forks++; });

bool llama_flash_session::forked() const {
    return n_forks.load(std::memory_order_relaxed) != process;
}

session_lock::session_lock(const llama_flash_session & session) {
    if (!session.forked()) {
        lock = std::unique_lock<std::mutex>(session.mutex);
    }
}

llama_flash_session * llama_flash_session::create(const llama_flash_params & params, llama_flash_error * err) {
    auto * s   = new llama_flash_session();
    s->params  = params;
    s->process = n_forks;
    if (!s->reads.open(params, err)) {
        delete s;
        return nullptr;
    }
    return s;
}

void llama_flash_session::unref() {
    if (--refs > 0) {
        return;
    }
    if (!forked()) {
        delete this;
    } else if (bound) {
        // The rest stays: the reads under way and their threads are the parent's, the memory that they read to is not there, and
        // a thread of the parent may have been at work on anything else.
        for (auto & f : files) {
            f->close();
        }
    }
}

// binding

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
        return false; // the bundle's bytes are no rows of the weight's
    }
    const flash_file * file = failed() ? nullptr : file_of(fd);
    if (file && !loader) {
        llama_flash_error e;
        loader = weight_loader::create(params, &e);
        if (!loader) {
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

bool llama_flash_session::bind(const ggml_tensor * tensor, int fd, uint64_t offset) {
    const flash_file * file = file_of(fd);
    if (!file) {
        return true; // end_binding reports it; the loader need not read the tensor
    }
    llama_flash_error e;
    if (bind_part(tensor, file, offset)) {
        return true;
    }
    if (offset + ggml_nbytes(tensor) > file->size) {
        flash_fail(&e, LLAMA_FLASH_E_FORMAT, "tensor %s ends at byte %llu, but %s has %llu: the file is cut short",
                   tensor->name, (unsigned long long) (offset + ggml_nbytes(tensor)), file->path.c_str(),
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
    t.kernel       = stock_kernel_for(tensor, t.is_experts);
    by_address[tensor->data] = tensors.size();
    tensors.push_back(std::move(t));
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
    if (offset + b.tensor_bytes() > file->size) {
        flash_fail(&e, LLAMA_FLASH_E_FORMAT, "tensor %s ends at byte %llu, but %s has %llu: the file is cut short", b.name.c_str(),
                   (unsigned long long) (offset + b.tensor_bytes()), file->path.c_str(), (unsigned long long) file->size);
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

static bool read_part(const llama_flash_bundle_part & from, uint32_t n_embd, bundle_part & to) {
    to.present = from.type >= 0;
    if (!to.present) {
        return true;
    }
    to.type   = (ggml_type) from.type;
    to.offset = from.offset;
    if (!row_type_supported(to.type) || n_embd % ggml_blck_size(to.type) != 0) {
        return false;
    }
    to.row_bytes = ggml_row_size(to.type, n_embd);
    return true;
}

int32_t llama_flash_session::add_rows(const char * name, bool only, llama_flash_error * err) {
    if (bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_rows: %s, after the model was loaded", name);
    }
    row_names[name] = only;
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session::add_bundle(const llama_flash_bundle & d, llama_flash_error * err) {
    if (bound || (!bundles.empty() && bundles.back().layer >= d.layer)) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_bundle: layers come in order, before the model is loaded");
    }
    flash_bundle b;
    b.name         = "blk." + std::to_string(d.layer) + (d.n_expert > 0 ? ".ffn_bundle_exps.weight" : ".ffn_bundle.weight");
    b.layer        = d.layer;
    b.n_expert     = d.n_expert;
    b.n_ff         = d.n_ff;
    b.n_embd       = d.n_embd;
    b.split        = d.split != 0;
    b.gated        = d.gate.type >= 0;
    b.record_bytes = d.record_bytes;
    b.activation   = (llama_flash_activation) d.activation;
    b.threshold    = d.threshold;

    auto bad = [&](const char * what) { return flash_fail(err, LLAMA_FLASH_E_FORMAT, "tensor %s: %s", b.name.c_str(), what); };
    if (d.n_ff == 0 || d.n_embd == 0 || d.up.type < 0 || d.down.type < 0) {
        return bad("a bundle has an up and a down part of some length");
    }
    const uint64_t n_neurons = (uint64_t) d.n_ff * b.n_blocks();
    const uint64_t before    = bundles.empty() ? 0 : bundles.back().first + bundles.back().n_neurons;
    if (before + n_neurons > INT32_MAX) {
        return bad("the model has more neurons than can be numbered");
    }
    b.n_neurons = (uint32_t) n_neurons;
    if (d.n_expert > 0) {
        if (d.n_expert_used == 0 || d.n_expert_used > d.n_expert) {
            return bad("a token uses some of the experts");
        }
        if (d.split || !b.gated || d.up_bias || d.gate_bias || d.predictor_rank > 0) {
            return bad("bundles of experts have a gate and are not split, and have neither biases nor predictors");
        }
        b.n_expert_used = d.n_expert_used;
    }
    if (!read_part(d.gate, d.n_embd, b.part(ffn_part::gate)) || !read_part(d.up, d.n_embd, b.part(ffn_part::up)) ||
        !read_part(d.down, d.n_embd, b.part(ffn_part::down))) {
        return bad("a part's type cannot be computed on, or its blocks do not divide the row");
    }
    if (b.gated && d.gate.type != d.up.type) {
        return bad("gate and up differ in type");
    }
    uint64_t end = 0; // parts follow one another: gate, up, down
    for (auto & p : b.parts) {
        if (p.present) {
            if (p.offset != end) {
                return bad("its parts do not follow one another");
            }
            end += p.row_bytes;
        }
    }
    if (end != d.record_bytes) {
        return bad("its record is not as long as its parts together");
    }
    if (d.activation > LLAMA_FLASH_DRELU || (!b.gated && (d.activation == LLAMA_FLASH_FATRELU || d.activation == LLAMA_FLASH_DRELU))) {
        return bad("its activation does not fit its parts");
    }
    if (d.up_bias) {
        b.up_bias.assign(d.up_bias, d.up_bias + d.n_ff);
    }
    if (d.gate_bias) {
        b.gate_bias.assign(d.gate_bias, d.gate_bias + d.n_ff);
    }
    if (d.predictor_rank > 0) {
        const ggml_type in  = (ggml_type) d.predictor_in_type;
        const ggml_type out = (ggml_type) d.predictor_out_type;
        if (!d.predictor_in || !d.predictor_out || !d.predictor_bias) {
            return bad("its predictor is not complete");
        }
        if (!row_type_supported(in) || !row_type_supported(out) || d.n_embd % ggml_blck_size(in) != 0 || d.predictor_rank % ggml_blck_size(out) != 0) {
            return bad("its predictor's type cannot be computed on");
        }
        predictor & p    = b.predict;
        p.rank           = d.predictor_rank;
        p.in             = row_kernel(in, d.n_embd);
        p.out            = row_kernel(out, d.predictor_rank);
        const auto * a   = (const uint8_t *) d.predictor_in;
        const auto * c   = (const uint8_t *) d.predictor_out;
        p.in_rows.assign(a, a + p.in.row_bytes * d.predictor_rank);
        p.out_rows.assign(c, c + p.out.row_bytes * d.n_ff);
        p.bias.assign(d.predictor_bias, d.predictor_bias + d.n_ff);
    }
    b.index = (uint32_t) bundles.size();
    b.first = (uint32_t) before;
    bundles.push_back(std::move(b));
    return LLAMA_FLASH_OK;
}

// every part of every bundle has met its tensor
int32_t llama_flash_session::check_bundles(llama_flash_error * err) {
    for (const auto & b : bundles) {
        for (const auto & p : b.parts) {
            if (p.present && !p.weight.data) {
                return flash_fail(err, LLAMA_FLASH_E_FORMAT, "tensor %s: the model does not use all of its parts", b.name.c_str());
            }
        }
    }
    return LLAMA_FLASH_OK;
}

// rows of a panel, of a tensor's last one at most: about `bytes`, and a multiple of what any kernel tiles by, so that every row of the
// output is computed as it would be in the whole matrix
static int64_t panel_rows(const ggml_tensor & weight, uint64_t bytes) {
    const int64_t rows = weight.ne[1];
    const int64_t most = (int64_t) (bytes / weight.nb[1]);
    for (int64_t unit : { 256, 64 }) {
        if ((unit == 64 || rows % unit == 0) && unit <= most) {
            return std::min(rows, most / unit * unit);
        }
    }
    return std::min<int64_t>(rows, 64);
}

int32_t llama_flash_session::make_records(llama_flash_error * err) {
    const uint64_t panel_bytes = params.panel_bytes ? params.panel_bytes : 4u << 20;

    std::map<std::string, uint32_t> group_of; // by the name up to the layer's number
    std::map<uint32_t, uint32_t>    class_of; // by slot size

    for (uint32_t i = 0; i < tensors.size(); i++) {
        flash_tensor & t = tensors[i];
        t.first_record   = (uint32_t) records.size();

        const uint64_t n_experts = t.only_rows ? 0 : (uint64_t) t.weight.ne[2];
        const int64_t  rows      = t.is_experts ? t.weight.ne[1] : panel_rows(t.weight, panel_bytes);
        for (uint64_t e = 0; e < n_experts; e++) {
            for (int64_t row = 0; row < t.weight.ne[1]; row += rows) {
                flash_record r = {};
                r.tensor       = i;
                r.row          = (uint32_t) row;
                r.rows         = (uint32_t) std::min(rows, t.weight.ne[1] - row);
                r.offset       = t.offset + e * t.weight.nb[2] + (uint64_t) row * t.weight.nb[1];
                r.bytes        = (uint32_t) (r.rows * t.weight.nb[1]);
                if (r.rows * t.weight.nb[1] + 2 * FLASH_SECTOR > UINT32_MAX) {
                    return flash_fail(err, LLAMA_FLASH_E_FORMAT, "tensor %s cannot stay on flash: a part of it that is read at once has more than 4 GiB",
                                      t.name.c_str());
                }
                records.push_back(r);
            }
        }
        t.n_records = (uint32_t) records.size() - t.first_record;

        if (t.is_experts) {
            n_expert_max = std::max(n_expert_max, t.n_records);

            const size_t      dot = t.name.find('.', t.name.find('.') + 1); // blk.N.
            const std::string key = t.name.substr(0, dot);
            auto              g   = group_of.emplace(key, (uint32_t) groups.size());
            if (g.second) {
                groups.emplace_back();
            }
            t.group = g.first->second;
            groups[t.group].push_back(i);

            uint64_t span = 0;
            for (uint32_t r = t.first_record; r < t.first_record + t.n_records; r++) {
                span = std::max(span, record_span(records[r]));
            }
            auto c = class_of.emplace((uint32_t) span, (uint32_t) class_bytes.size());
            if (c.second) {
                class_bytes.push_back((uint32_t) span);
            }
            t.size_class = c.first->second;
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
        code = make_records(err);
    }
    if (code != LLAMA_FLASH_OK) {
        return code;
    }
    neuron_params = { LLAMA_FLASH_NEURONS_OFF, UINT32_MAX, 512, 0, 0, 0 };
    lay_out_bundles();

    op.table.resize(n_expert_max);
    op.seen.assign(n_expert_max, 0);
    early.done.assign(n_expert_max, 0);
    op.count.assign(n_expert_max, 0);
    op.counts.reserve(n_expert_max);
    op.distinct.reserve(n_expert_max);
    size_t widest = 0; // records of one layer
    for (const auto & group : groups) {
        size_t n = 0;
        for (uint32_t t : group) {
            n += tensors[t].n_records;
        }
        widest = std::max(widest, n);
    }
    op.plan.reserve(widest);
    op.waiting.reserve(n_expert_max + 1);
    op.arrived.reserve(n_expert_max + 1);
    op.wave.reserve(n_expert_max + 1);
    op.repack_ends.reserve(n_expert_max + 1);
    notes.first_bundle = (uint32_t) tensors.size();
    bound = true;
    return LLAMA_FLASH_OK;
}

// ops

void llama_flash_session::begin_op(const std::string & tensor) {
    op.lock     = session_lock(*this);
    op.begin_ns = flash_now_ns();
    op.stamp++;
    reads.look_again();
    op.read    = nullptr;
    look.group = -1;
    notes.stats.ops++;
    if (memory.total == 0) {
        reads.fail_op(LLAMA_FLASH_E_INVALID, tensor, "the session has no memory: call llama_flash_session_set_memory before decoding");
    } else if (resizing.active && !failed()) {
        resize_step(op.begin_ns + RESIZE_NS);
    }
    resizing.last_op_ns = op.begin_ns;
}

void llama_flash_session::end_op() {
    notes.stats.op_ns += (uint64_t) (flash_now_ns() - op.begin_ns);
    const session_lock ended = std::move(op.lock);
}

uint64_t llama_flash_session::slots_touched() const {
    const uint64_t neuron_bytes = memory.n_neuron_slots * slot_bytes_of(bundles);
    uint64_t       bytes        = memory.n_neuron_slots ? slot_bytes_of(bundles) * neurons.used() : 0;
    if (memory.n_slots) {
        bytes += (memory.slots - neuron_bytes) / memory.n_slots * cache.used();
    }
    return bytes;
}

bool llama_flash_session::check_file(const flash_record & wanted) {
    const flash_tensor & t = tensors[wanted.tensor];
    return reads.check_file(*t.file, t.name, wanted.offset, wanted.bytes);
}

bool llama_flash_session::check_record(flash_record & r) {
    return r.check == byte_check::none || check_record(r, r.check == byte_check::refuse ? 0 : checksum(r.data, r.bytes));
}

bool llama_flash_session::check_record(flash_record & r, uint32_t sum) {
    const flash_tensor & t = tensors[r.tensor];
    if (!check_bytes(r.check, r.checksum, sum)) {
        reads.fail_bytes(*t.file, t.name, r.offset, r.bytes, r.checksum);
        return false;
    }
    r.check = byte_check::none;
    return true;
}

int32_t llama_flash_session::take_error(llama_flash_error * err) {
    if (!failed()) {
        if (err) {
            *err = {};
        }
        return LLAMA_FLASH_OK;
    }
    reads.drain(); // what is under way belongs to the call that failed: its errors must not meet the next one
    neurons.abandon();
    for (auto & b : bundles) {
        b.forget_evaluation();
    }
    neurons.release();
    if (reads.file_changed()) {
        // what was read since the change cannot be told from what was read before: all is read again, if the file is itself again
        neurons.forget_all();
        drop_ring(expert_ring);
        drop_ring(panel_ring);
        for (auto & r : records) {
            if (r.place == record_place::slot) {
                cache.drop(r.index);
                forget(r);
            }
        }
    }
    if (err) {
        *err = reads.error();
    }
    reads.forget_error();
    return reads.error().code;
}

uint8_t * llama_flash_session::ring_room(ring & r, flash_record & record, uint32_t index) {
    const int32_t entry = r.take(record_span(record), index);
    if (entry == ring::NONE) {
        return nullptr;
    }
    record.place = record_place::ring;
    record.index = entry;
    record.data  = r.address(entry) + (record.offset - flash_sector_floor(record.offset));
    return record.data;
}

void llama_flash_session::fetch(uint32_t index) {
    flash_record & r = records[index];
    r.state          = record_state::reading;
    if (r.place == record_place::slot) {
        cache.set_reading(r.index, true);
    }
    reads.read(arrivals, index, *tensors[r.tensor].file, r.offset, r.bytes, r.data);
    reads.used(r.bytes);
}

void llama_flash_session::forget(flash_record & r) {
    r.state   = record_state::absent;
    r.check   = byte_check::none;
    r.place   = record_place::none;
    r.data    = nullptr;
    r.index   = -1;
    r.fetched = false;
    r.warmed  = false;
}

void llama_flash_session::release(uint32_t index) {
    flash_record & r = records[index];
    if (r.place != record_place::ring) {
        return;
    }
    (tensors[r.tensor].is_experts ? expert_ring : panel_ring).give(r.index);
    forget(r);
}

void llama_flash_session::drop_ring(ring & ring) {
    while (!ring.empty()) {
        const uint32_t index = ring.record_in(ring.oldest());
        while (records[index].place == record_place::ring && records[index].state == record_state::reading) {
            if (!reads.settle(true)) {
                break;
            }
        }
        release(index); // nothing to do if the read failed: it is released already
    }
}

void llama_flash_session::arrived(uint32_t index, const reader::done & done, file_state state) {
    flash_record & r = records[index];
    if (r.place == record_place::slot) {
        cache.set_reading(r.index, false);
    }
    const flash_tensor & t = tensors[r.tensor];
    if (r.place == record_place::pinned && done.error == 0) { // all of the tensor's at once; set_memory goes on from here
        for (uint32_t i = t.first_record; i < t.first_record + t.n_pinned; i++) {
            records[i].check = check_for(state, records[i].checksum);
            if (!check_record(records[i])) {
                break;
            }
        }
        return;
    }
    r.check = check_for(state, r.checksum);
    if (done.error == 0 && r.check != byte_check::refuse) {
        r.state = t.kernel.extra ? record_state::raw : record_state::ready;
        return;
    }
    if (done.error == 0 && !r.warmed) {
        reads.fail_bytes(*t.file, t.name, r.offset, r.bytes, 0);
    } else if (r.warmed) {
        reads.miss();
    } else {
        reads.fail_read(*t.file, t.name, done.error, done.error_offset, r.bytes);
    }

    // the record is absent again, so that the next call may try once more
    if (r.place == record_place::slot) {
        cache.drop(r.index);
        forget(r);
    } else if (r.place == record_place::ring) {
        release(index);
    }
}
