// Where the caches of a context lie, and how much of that has been touched.
#include "base/status.h"
#include "llama_flash.h"
#include "memory/mapping.h"

#include "llama-ext.h"

#include <algorithm>
#include <sys/mman.h>
#include <vector>

int32_t llama_flash_kv_areas(const llama_context * ctx, llama_flash_area * areas, uint32_t n, uint32_t * n_areas, llama_flash_error * err) {
    if (!ctx || !n_areas || (n > 0 && !areas)) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "kv_areas: no context or nowhere to tell them");
    }
    return guarded(err, [&] {
        std::vector<llama_kv_area> found;
        if (!llama_kv_get_areas(ctx, found)) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "kv_areas: memory of another kind");
        }
        *n_areas = (uint32_t) found.size();
        for (size_t i = 0; i < found.size() && i < n; i++) {
            areas[i] = { (uint64_t) (uintptr_t) found[i].data, found[i].size, found[i].at_once, 0 };
        }
        return (int32_t) LLAMA_FLASH_OK;
    });
}

uint64_t llama_flash_touched(const llama_flash_area * areas, uint32_t n) {
    const auto    page = (uint64_t) page_bytes();
    unsigned char there[1024]; // a byte for each page
    uint64_t      n_pages = 0;
    for (uint32_t i = 0; areas && i < n; i++) {
        const uint64_t end = areas[i].address + areas[i].size;
        for (uint64_t at = areas[i].address / page * page; at < end;) {
            const uint64_t count = std::min<uint64_t>(sizeof(there), (end - at + page - 1) / page);
            if (mincore((void *) (uintptr_t) at, count * page, there) == 0) {
                n_pages += (uint64_t) std::count_if(there, there + count, [](unsigned char c) { return c & 1; });
            }
            at += count * page;
        }
    }
    return n_pages * page;
}
