#include "io/load.h"

#include "base/status.h"

#include <algorithm>
#include <cstring>

std::unique_ptr<weight_loader> weight_loader::create(const llama_flash_params & params, llama_flash_error * err) {
    std::unique_ptr<weight_loader> l(new weight_loader());
    l->reads = reader::create(params, err);
    if (!l->reads) {
        return nullptr;
    }
    l->memory = mapping::allocate(PIECES * PIECE);
    if (!l->memory.data) {
        flash_fail(err, LLAMA_FLASH_E_MEMORY, "no memory to load weights through: the kernel refused %llu bytes%s",
                   (unsigned long long) (PIECES * PIECE), limits_of(ENOMEM).c_str());
        return nullptr;
    }
    return l;
}

bool weight_loader::read(const flash_file & file, uint64_t offset, uint64_t size, uint8_t * dst, reader::done & failed) {
    struct piece {
        uint64_t begin;
        uint64_t end;
    };
    piece          pieces[PIECES];
    const uint64_t end   = offset + size;
    uint64_t       next  = offset;
    auto           data  = [&](uint32_t place) { return memory.data + place * PIECE + pieces[place].begin % FLASH_SECTOR; };
    auto           start = [&](uint32_t place) {
        pieces[place] = { next, std::min(end, (next / PIECE + 1) * PIECE) };
        reads->read(file, next, pieces[place].end - next, data(place), place);
        next = pieces[place].end;
    };
    bool ok = true;
    for (uint32_t place = 0; place < PIECES && next < end; place++) {
        start(place);
    }
    reads->submit();
    reader::done done;
    while (reads->next(done, true)) { // after a failure until none is under way
        if (done.error != 0 && ok) {
            ok     = false;
            failed = done;
        }
        if (!ok) {
            continue;
        }
        const piece p = pieces[done.tag];
        memcpy(dst + (p.begin - offset), data(done.tag), p.end - p.begin);
        if (next < end) {
            start(done.tag);
            reads->submit();
        }
    }
    return ok;
}
