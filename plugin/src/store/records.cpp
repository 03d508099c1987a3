#include "store/records.h"

#include "base/status.h"

#include <map>

// table

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

int32_t record_table::add_records(flash_tensor & t, uint64_t panel_bytes, llama_flash_error * err) {
    const uint64_t n_experts = t.only_rows ? 0 : (uint64_t) t.weight.ne[2];
    const int64_t  rows      = t.is_experts ? t.weight.ne[1] : panel_rows(t.weight, panel_bytes);
    t.first_record           = (uint32_t) records.size();
    for (uint64_t e = 0; e < n_experts; e++) {
        for (int64_t row = 0; row < t.weight.ne[1]; row += rows) {
            flash_record r = {};
            r.tensor       = t.number;
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
    return LLAMA_FLASH_OK;
}

int32_t record_table::make_records(uint64_t panel_bytes, llama_flash_error * err) {
    std::map<std::string, uint32_t> group_of; // by the name up to the layer's number
    std::map<uint32_t, uint32_t>    class_of; // by slot size

    for (uint32_t i = 0; i < tensors.size(); i++) {
        flash_tensor & t   = tensors[i];
        t.number           = i;
        const int32_t code = add_records(t, panel_bytes, err);
        if (code != LLAMA_FLASH_OK) {
            return code;
        }
        if (!t.is_experts) {
            continue;
        }
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
            span = std::max(span, records[r].span());
        }
        auto c = class_of.emplace((uint32_t) span, (uint32_t) class_bytes.size());
        if (c.second) {
            class_bytes.push_back((uint32_t) span);
        }
        t.size_class = c.first->second;
    }
    return LLAMA_FLASH_OK;
}

void record_table::note_needs(memory_needs & n) const {
    constexpr uint64_t CLASS_TABLES  = 4096; // buckets of a class in the cache
    constexpr uint64_t SHARED_TABLES = 1u << 18;
    n.tables                         = SHARED_TABLES + records.size() * (sizeof(flash_record) + SLOT_ENTRY) + class_bytes.size() * CLASS_TABLES;
    for (uint32_t bytes : class_bytes) {
        n.classes.push_back({ 0, 0, bytes });
    }
    n.panels.resize(tensors.size());
    for (const auto & t : tensors) {
        n.tables += sizeof(flash_tensor) + t.row_checksums.size() * sizeof(uint32_t);
        if (t.n_records == 0) {
            continue;
        }
        if (t.is_experts) {
            class_needs & c = n.classes[t.size_class];
            c.records += t.n_records;
            c.tensors++;
            n.expert_bytes += ggml_nbytes(&t.weight);
            n.largest_expert = std::max<uint64_t>(n.largest_expert, c.slot_bytes);
            continue;
        }
        n.panels[t.number] = { t.offset, ggml_nbytes(&t.weight), records[t.first_record].bytes, t.n_records, page_bytes() };
        n.panel_bytes += n.panels[t.number].bytes;
        for (uint32_t k = t.first_record; k < t.first_record + t.n_records; k++) {
            n.largest_panel = std::max(n.largest_panel, records[k].span());
        }
    }
}

// store

bool record_store::check_file(const flash_record & r) {
    const flash_tensor & t = table.tensors[r.tensor];
    return reads.check_file(*t.file, t.name, r.offset, r.bytes);
}

bool record_store::check_record(flash_record & r, uint32_t sum) {
    const flash_tensor & t = table.tensors[r.tensor];
    if (!check_bytes(r.check, r.checksum, sum)) {
        reads.fail_bytes(*t.file, t.name, r.offset, r.bytes, r.checksum);
        return false;
    }
    r.check = byte_check::none;
    return true;
}

bool record_store::make_ring(uint64_t bytes) {
    ring_memory = bytes > 0 ? mapping::allocate(bytes) : mapping();
    through.configure(ring_memory.data, bytes, 4096);
    return bytes == 0 || ring_memory.data;
}

void record_store::shorten_ring(uint64_t bytes) {
    if (bytes < through.bytes()) {
        drop_ring();
        through.resize(bytes);
        ring_memory.give_back_beyond(bytes);
    }
}

void record_store::lengthen_ring(uint64_t bytes) {
    if (bytes > through.bytes()) {
        drop_ring();
        through.resize(bytes);
    }
}

bool record_store::to_ring(uint32_t index) {
    flash_record & r     = record(index);
    const int32_t  entry = through.take(r.span(), index);
    if (entry == ring::NONE) {
        return false;
    }
    r.place = record_place::ring;
    r.index = entry;
    r.data  = through.address(entry) + (r.offset - flash_sector_floor(r.offset));
    return true;
}

void record_store::release(uint32_t index) {
    flash_record & r = record(index);
    if (r.place == record_place::ring) {
        through.release(r.index);
        set_absent(r);
    }
}

void record_store::drop_ring() {
    while (!through.empty()) {
        const uint32_t index = through.record_in(through.oldest());
        while (record(index).place == record_place::ring && record(index).state == record_state::reading) {
            if (!reads.settle(true)) {
                break;
            }
        }
        release(index); // nothing to do if the read failed: it is released already
    }
}

void record_store::start(uint32_t index) {
    flash_record & r = record(index);
    r.state          = record_state::reading;
    reads.read(*this, index, *table.tensors[r.tensor].file, r.offset, r.bytes, r.data);
    reads.used(r.bytes);
}

void record_store::set_absent(flash_record & r) {
    r.state   = record_state::absent;
    r.check   = byte_check::none;
    r.place   = record_place::none;
    r.data    = nullptr;
    r.index   = -1;
    r.fetched = false;
    r.warmed  = false;
}

bool record_store::note_arrival(uint32_t index, const reader::done & done, file_state state) {
    flash_record &       r = record(index);
    const flash_tensor & t = table.tensors[r.tensor];
    r.check                = check_for(state, r.checksum);
    if (done.error == 0 && r.check != byte_check::refuse) {
        r.state = t.kernel.extra ? record_state::raw : record_state::ready;
        return true;
    }
    if (done.error == 0 && !r.warmed) {
        reads.fail_bytes(*t.file, t.name, r.offset, r.bytes, 0);
    } else if (r.warmed) {
        reads.miss();
    } else {
        reads.fail_read(*t.file, t.name, done.error, done.error_offset, r.bytes);
    }
    return false;
}
