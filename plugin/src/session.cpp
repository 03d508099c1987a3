#include "session.h"

#include "status.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <map>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int64_t flash_now_ns() {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t) ts.tv_sec * 1000000000 + ts.tv_nsec;
}

// mapping

constexpr size_t HUGE_PAGE = 2u << 20;

mapping::~mapping() {
    if (data) {
        munmap(data, bytes);
    }
}

mapping::mapping(mapping && other) noexcept : data(other.data), bytes(other.bytes) {
    other.data = nullptr;
}

mapping & mapping::operator=(mapping && other) noexcept {
    std::swap(data, other.data);
    std::swap(bytes, other.bytes);
    return *this;
}

static mapping map_pages(size_t bytes, int protection) {
    mapping m;
    void *  p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p != MAP_FAILED) {
        m.data  = (uint8_t *) p;
        m.bytes = bytes;
    }
    return m;
}

mapping mapping::reserve(size_t bytes) {
    return map_pages(bytes, PROT_NONE);
}

mapping mapping::allocate(size_t bytes) {
    mapping m = map_pages(bytes, PROT_READ | PROT_WRITE);
    if (m.data) {
        madvise(m.data, bytes, MADV_DONTFORK); // reads may be under way into it, and a child has no use for it
        if (bytes >= HUGE_PAGE) {
            madvise(m.data, bytes, MADV_HUGEPAGE); // a wish: small pages do as well
        }
    }
    return m;
}

// life

llama_flash_session * llama_flash_session::create(const llama_flash_params & params, llama_flash_error * err) {
    auto * s  = new llama_flash_session();
    s->params = params;
    s->pid    = getpid();
    s->reads  = reader::create(params, err);
    if (!s->reads) {
        delete s;
        return nullptr;
    }
    s->stats.io_engine = s->reads->engine_kind();
    return s;
}

llama_flash_session::~llama_flash_session() {
    if (forked()) {
        // the reads under way, and the threads, are the parent's
        (void) reads.release();
        for (auto & m : slot_memory) {
            m.data = nullptr;
        }
        for (auto & m : homes) {
            m.data = nullptr;
        }
        ring_memory.data = nullptr;
    }
}

bool llama_flash_session::forked() const {
    return getpid() != pid;
}

void llama_flash_session::unref() {
    if (--refs == 0) {
        delete this;
    }
}

// binding

bool llama_flash_session::bind(const ggml_tensor * tensor, int fd, uint64_t offset) {
    std::lock_guard<std::mutex> lock(mutex);
    struct stat                 st;
    const flash_file *          file = nullptr;
    if (fstat(fd, &st) == 0) {
        for (const auto & f : files) {
            if (f->device == (uint64_t) st.st_dev && f->inode == (uint64_t) st.st_ino) {
                file = f.get();
            }
        }
    }
    if (!file) {
        auto opened = flash_file::reopen(fd, &error);
        if (!opened) {
            has_failed = true;
            return true; // end_binding reports it; the loader need not read the tensor
        }
        files.push_back(std::move(opened));
        file = files.back().get();
    }
    if (offset + ggml_nbytes(tensor) > file->size) {
        flash_fail(&error, LLAMA_FLASH_E_FORMAT, "tensor %s ends at byte %llu, but %s has %llu: the file is cut short",
                   tensor->name, (unsigned long long) (offset + ggml_nbytes(tensor)), file->path.c_str(),
                   (unsigned long long) file->size);
        has_failed = true;
        return true;
    }

    flash_tensor t = {};
    t.name         = tensor->name;
    t.weight       = *tensor;
    t.file         = file;
    t.offset       = offset;
    t.is_experts   = tensor->ne[2] > 1;
    t.kernel       = stock_kernel_for(tensor);
    by_address[tensor->data] = tensors.size();
    tensors.push_back(std::move(t));
    return true;
}

// bytes of the whole sectors that hold the record
static uint64_t record_span(const flash_record & r) {
    return flash_sector_ceil(r.offset + r.bytes) - flash_sector_floor(r.offset);
}

// rows of a panel: about `bytes`, and a multiple of what any kernel tiles by, so that every row of the output is
// computed as it would be in the whole matrix
static int64_t panel_rows(const ggml_tensor & weight, uint64_t bytes) {
    const int64_t rows = weight.ne[1];
    for (int64_t unit : { 256, 64 }) {
        if (rows % unit == 0 && (uint64_t) unit * weight.nb[1] <= bytes) {
            return std::min(rows, (int64_t) (bytes / weight.nb[1]) / unit * unit);
        }
    }
    return rows % 64 == 0 ? 64 : rows;
}

int32_t llama_flash_session::make_records(llama_flash_error * err) {
    const uint64_t panel_bytes = params.panel_bytes ? params.panel_bytes : 4u << 20;

    std::map<std::string, uint32_t> group_of; // by the name up to the layer's number
    std::map<uint32_t, uint32_t>    class_of; // by slot size

    for (uint32_t i = 0; i < tensors.size(); i++) {
        flash_tensor & t = tensors[i];
        t.first_record   = (uint32_t) records.size();

        const uint64_t n_experts = (uint64_t) t.weight.ne[2];
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
                class_tensors.push_back(0);
            }
            class_tensors[c.first->second]++;
            t.size_class = c.first->second;
        }
    }
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session::end_binding(llama_flash_error * err) {
    std::lock_guard<std::mutex> lock(mutex);
    if (has_failed) {
        if (err) {
            *err = error;
        }
        has_failed = false;
        return error.code;
    }
    const int32_t code = make_records(err);
    if (code != LLAMA_FLASH_OK) {
        return code;
    }

    op.table.resize(n_expert_max);
    op.seen.assign(n_expert_max, 0);
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
    op.missing.reserve(n_expert_max + 1);
    op.arrived.reserve(n_expert_max + 1);
    op.wave.reserve(n_expert_max + 1);
    op.repack_ends.reserve(n_expert_max + 1);
    bound = true;
    return LLAMA_FLASH_OK;
}

// memory

uint64_t llama_flash_session::bookkeeping_bytes() const {
    return records.size() * (sizeof(flash_record) + 64) + class_bytes.size() * 4096 + tensors.size() * sizeof(flash_tensor) + (1u << 18);
}

uint64_t llama_flash_session::ring_minimum(bool experts) const {
    uint64_t largest = 0;
    for (const auto & r : records) {
        if (tensors[r.tensor].is_experts == experts) {
            largest = std::max(largest, record_span(r));
        }
    }
    return 2 * largest; // one is computed while the next is read
}

llama_flash_requirements llama_flash_session::requirements() const {
    llama_flash_requirements q = {};
    for (const auto & t : tensors) {
        (t.is_experts ? q.n_expert_tensors : q.n_panel_tensors)++;
    }
    uint64_t every = 0;
    for (const auto & r : records) {
        const bool experts = tensors[r.tensor].is_experts;
        (experts ? q.expert_bytes : q.panel_bytes) += r.bytes;
        (experts ? q.n_experts : q.n_panels)++;
        q.largest_record = std::max<uint64_t>(q.largest_record, r.bytes);
        every += record_span(r);
    }
    q.min_memory = bookkeeping_bytes() + ring_minimum(true) + ring_minimum(false);
    q.max_memory = q.min_memory + every + 4 * HUGE_PAGE + tensors.size() * 2 * FLASH_SECTOR;
    return q;
}

// forgets every record; no op is in progress
void llama_flash_session::drop_all() {
    while (!reads->idle()) {
        settle_reads(true);
    }
    for (auto & r : records) {
        forget(r);
    }
    for (auto & t : tensors) {
        t.n_pinned = 0;
        t.home     = nullptr;
    }
    op.plan.clear();
    op.planned = 0;
    panel_order.clear();
    panel_order_known = false;
    panel_next        = 0;
    for (auto & t : tensors) {
        t.order  = 0;
        t.tokens = 0;
    }
    tokens = 0;
    slot_memory.clear();
    slot_data.clear();
    homes.clear();
    ring_memory = mapping();
    home_bytes  = 0;
    memory      = {};
}

int32_t llama_flash_session::set_memory(uint64_t bytes, llama_flash_error * err) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "set_memory before bind_end");
    }
    const llama_flash_requirements need = requirements();
    if (bytes < need.min_memory) {
        return flash_fail(err, LLAMA_FLASH_E_MEMORY, "%llu bytes for flash tensors are too few: at least %llu are needed",
                          (unsigned long long) bytes, (unsigned long long) need.min_memory);
    }
    drop_all();
    has_failed = false; // what is forgotten may have failed, that no longer matters

    memory.total       = bytes;
    memory.bookkeeping = bookkeeping_bytes();
    uint64_t left      = bytes - memory.bookkeeping;

    // rings: their minimum, and of the rest up to an eighth each, enough to keep the device busy while a wave computes
    const bool     everything = bytes >= need.max_memory;
    const uint64_t spare      = everything ? 0 : left - ring_minimum(true) - ring_minimum(false);
    auto           ring_bytes = [&](bool experts, uint64_t records_bytes, uint64_t most) -> uint64_t {
        return ring_minimum(experts) + flash_sector_floor(std::min({ most, spare / 8, records_bytes }));
    };
    const uint64_t expert_ring_bytes = ring_bytes(true, need.expert_bytes, 32u << 20);
    const uint64_t panel_ring_bytes  = ring_bytes(false, need.panel_bytes, 32u << 20);
    memory.stream                    = expert_ring_bytes + panel_ring_bytes;
    left -= memory.stream;

    // panels before experts: a pinned panel saves its bytes on every token, a slot only on a hit
    uint64_t pin_left = left;
    uint64_t all_span = 0;
    for (const auto & r : records) {
        all_span += tensors[r.tensor].is_experts ? 0 : record_span(r);
    }
    const double share = all_span == 0 ? 0.0 : everything ? 1.0 : std::min(1.0, (double) pin_left / (double) (all_span + need.n_panels * FLASH_SECTOR));
    double       due   = 0.0; // bytes this share comes to so far: spreads the streamed rest evenly over the layers
    for (auto & t : tensors) {
        if (t.is_experts) {
            continue;
        }
        const flash_record & end = records[t.first_record + t.n_records - 1];
        due += share * (double) (flash_sector_ceil(end.offset + end.bytes) - flash_sector_floor(t.offset));

        uint64_t pinned = 0; // bytes of panels [0, n_pinned)
        while (t.n_pinned < t.n_records) {
            const flash_record & next  = records[t.first_record + t.n_pinned];
            const uint64_t       bytes = flash_sector_ceil(next.offset + next.bytes) - flash_sector_floor(t.offset);
            if (bytes > pin_left || (share < 1.0 && (double) bytes > due)) {
                break;
            }
            pinned = bytes;
            t.n_pinned++;
        }
        due -= (double) pinned;
        pin_left -= pinned;
        if (t.n_pinned > 0) {
            homes.push_back(mapping::allocate(pinned));
            if (!homes.back().data) {
                drop_all();
                return flash_fail(err, LLAMA_FLASH_E_MEMORY, "the kernel refused %llu bytes for pinned panels", (unsigned long long) pinned);
            }
            t.home = homes.back().data + (t.offset - flash_sector_floor(t.offset));
            home_bytes += pinned;
            memory.n_pinned += t.n_pinned;
        }
    }
    memory.pinned = home_bytes;
    left -= home_bytes;

    // slots: the classes share by their bytes, so that one expert's parts are kept or dropped alike
    std::vector<uint64_t> class_records(class_bytes.size());
    uint64_t              class_total = 0;
    for (const auto & t : tensors) {
        if (t.is_experts) {
            class_records[t.size_class] += t.n_records;
            class_total += (uint64_t) t.n_records * class_bytes[t.size_class];
        }
    }
    const double          kept = class_total == 0 ? 0.0 : std::min(1.0, (double) left / (double) class_total);
    std::vector<uint32_t> slots_per_class;
    for (size_t c = 0; c < class_bytes.size(); c++) {
        const uint32_t n = (uint32_t) std::min<uint64_t>(class_records[c], (uint64_t) (kept * (double) class_records[c]));
        slots_per_class.push_back(n);
        slot_memory.push_back(n ? mapping::allocate((size_t) n * class_bytes[c]) : mapping());
        if (n && !slot_memory.back().data) {
            drop_all();
            return flash_fail(err, LLAMA_FLASH_E_MEMORY, "the kernel refused %llu bytes for slots", (unsigned long long) n * class_bytes[c]);
        }
        for (uint32_t i = 0; i < n; i++) {
            slot_data.push_back(slot_memory.back().data + (size_t) i * class_bytes[c]);
        }
        memory.slots += (uint64_t) n * class_bytes[c];
        memory.n_slots += n;
    }
    cache.configure(slots_per_class, records.size());

    if (memory.stream) {
        ring_memory = mapping::allocate(memory.stream);
        if (!ring_memory.data) {
            drop_all();
            return flash_fail(err, LLAMA_FLASH_E_MEMORY, "the kernel refused %llu bytes for the ring", (unsigned long long) memory.stream);
        }
    }
    expert_ring.configure(ring_memory.data, expert_ring_bytes, 4096);
    panel_ring.configure(ring_memory.data ? ring_memory.data + expert_ring_bytes : nullptr, panel_ring_bytes, 4096);

    return read_pinned(err);
}

int32_t llama_flash_session::read_pinned(llama_flash_error * err) {
    for (auto & t : tensors) {
        for (uint32_t i = 0; i < t.n_pinned; i++) {
            flash_record & r = records[t.first_record + i];
            r.place          = record_place::pinned;
            r.data           = t.home + (r.offset - t.offset);
        }
        // one read for all of them: their sectors overlap
        if (t.n_pinned > 0) {
            const flash_record & last = records[t.first_record + t.n_pinned - 1];
            reads->read(*t.file, t.offset, last.offset + last.bytes - t.offset, t.home, t.first_record);
            for (uint32_t i = 0; i < t.n_pinned; i++) {
                records[t.first_record + i].state = record_state::reading;
            }
        }
    }
    while (!reads->idle()) {
        settle_reads(true);
    }
    for (const auto & t : tensors) {
        op.checked = nullptr;
        if (t.n_pinned > 0 && !check_file(records[t.first_record])) {
            break;
        }
    }
    if (failed()) {
        if (err) {
            *err = error;
        }
        const int32_t code = error.code;
        has_failed         = false;
        drop_all();
        return code;
    }
    std::vector<uint8_t> scratch;
    for (auto & t : tensors) {
        if (t.n_pinned == 0) {
            continue;
        }
        scratch.resize(t.weight.nb[1] * STOCK_REPACK_ROWS);
        const flash_record & last = records[t.first_record + t.n_pinned - 1];
        const int64_t        rows = last.row + last.rows;
        for (int64_t row = 0; t.kernel.extra && row < rows; row += STOCK_REPACK_ROWS) {
            stock_repack(t.kernel, &t.weight, t.home, row, std::min(STOCK_REPACK_ROWS, rows - row), scratch.data());
        }
        for (uint32_t i = 0; i < t.n_pinned; i++) {
            records[t.first_record + i].state = record_state::ready;
        }
    }
    return LLAMA_FLASH_OK;
}

// ops

void llama_flash_session::fail(const llama_flash_error & e) {
    stats.errors++;
    if (!has_failed) {
        error = e;
        has_failed.store(true, std::memory_order_release);
    }
}

void llama_flash_session::fail_read(const flash_record & r, int32_t sys_errno, uint64_t offset, const char * why) {
    const flash_tensor & t = tensors[r.tensor];
    llama_flash_error    e;
    flash_fail(&e, LLAMA_FLASH_E_READ, "cannot read tensor %s from %s at offset %llu (%u bytes): %s", t.name.c_str(), t.file->path.c_str(),
               (unsigned long long) offset, r.bytes, why);
    e.sys_errno = sys_errno;
    e.offset    = offset;
    e.size      = r.bytes;
    snprintf(e.file, sizeof(e.file), "%s", t.file->path.c_str());
    snprintf(e.tensor, sizeof(e.tensor), "%s", t.name.c_str());
    fail(e);
}

bool llama_flash_session::check_file(const flash_record & wanted) {
    const flash_tensor & t = tensors[wanted.tensor];
    if (t.file == op.checked) {
        return true;
    }
    if (t.file->unchanged()) {
        op.checked = t.file;
        return true;
    }
    file_changed = true;
    fail_read(wanted, ESTALE, wanted.offset, "the file changed since it was loaded: load the model again");
    return false;
}

int32_t llama_flash_session::take_error(llama_flash_error * err) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!failed()) {
        if (err) {
            *err = {};
        }
        return LLAMA_FLASH_OK;
    }
    // reads still under way belong to the call that failed: their errors must not meet the next one
    while (!reads->idle()) {
        settle_reads(true);
    }
    if (file_changed) {
        // what was read since the change cannot be told from what was read before: all is read again, if the file is itself again
        file_changed = false;
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
        *err = error;
    }
    has_failed = false;
    return error.code;
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
    reads->read(*tensors[r.tensor].file, r.offset, r.bytes, r.data, index);
    stats.bytes_used += r.bytes;
}

void llama_flash_session::forget(flash_record & r) {
    r.state   = record_state::absent;
    r.place   = record_place::none;
    r.data    = nullptr;
    r.index   = -1;
    r.fetched = false;
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
            if (!settle_reads(true)) {
                break;
            }
        }
        release(index); // nothing to do if the read failed: settle_reads has released it
    }
}

bool llama_flash_session::settle_reads(bool wait) {
    reader::done done;
    bool         any = false;
    while (reads->next(done, wait && !any)) {
        any             = true;
        flash_record & r = records[done.tag];
        if (r.place == record_place::slot) {
            cache.set_reading(r.index, false);
        }
        if (done.error == 0) {
            if (r.place == record_place::pinned) {
                continue; // set_memory goes on from here
            }
            r.state = tensors[r.tensor].kernel.extra ? record_state::raw : record_state::ready;
            continue;
        }
        fail_read(r, done.error, done.error_offset, done.error == ENODATA ? "the file ends before it" : strerror(done.error));

        // the record is absent again, so that the next call may try once more
        if (r.place == record_place::slot) {
            cache.drop(r.index);
            forget(r);
        } else if (r.place == record_place::ring) {
            release(done.tag);
        }
    }
    stats.bytes_read = reads->bytes;
    stats.reads      = reads->reads;
    stats.retries    = reads->retries;
    return any || !reads->idle();
}
