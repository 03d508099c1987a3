// The C interface of workers: argument checks, and no exception beyond this file.
#include "base/status.h"
#include "llama_flash.h"
#include "worker/worker.h"

#include <cerrno>
#include <cstdio>
#include <fcntl.h>
#include <unistd.h>
#include <vector>

llama_flash_worker * llama_flash_worker_new(llama_flash_session * session, const char * const * files, uint32_t n_files, uint32_t n_threads,
                                            uint64_t limit, uint64_t weights, llama_flash_error * err) {
    llama_flash_worker * worker = nullptr;
    guarded(err, [&]() -> int32_t {
        if (!session || !files || n_threads == 0) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "worker_new: no session, files or threads");
        }
        std::vector<int> fds;
        for (uint32_t i = 0; i < n_files; i++) {
            const int fd = open(files[i], O_RDONLY | O_CLOEXEC);
            if (fd < 0) {
                const int e = errno;
                for (const int other : fds) {
                    close(other);
                }
                return flash_fail(err, LLAMA_FLASH_E_READ, "cannot open %s: %s", files[i], why_failed(e).c_str());
            }
            fds.push_back(fd);
        }
        auto made = std::make_unique<llama_flash_worker>(*session, std::move(fds), limit, weights);
        if (!made->start((int) n_threads, err)) {
            return LLAMA_FLASH_E_MEMORY;
        }
        worker = made.release();
        return LLAMA_FLASH_OK;
    });
    return worker;
}

void llama_flash_worker_free(llama_flash_worker * worker) {
    delete worker;
}

int32_t llama_flash_worker_add_weight(llama_flash_worker * worker, const char * name, uint32_t type, const int64_t * ne, uint32_t file, uint64_t offset,
                                      uint32_t home, llama_flash_error * err) {
    return guarded(err, [&]() -> int32_t {
        if (!worker || !name || !ne || home > LLAMA_FLASH_HOME_FLASH) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "worker_add_weight: no worker, name or shape, or no such home");
        }
        worker->weights.add(name, { type, { ne[0], ne[1], ne[2], ne[3] }, file, offset, (weight_home) home });
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_worker_on_many(llama_flash_worker * worker, void (*many)(void * data), void * data, llama_flash_error * err) {
    return guarded(err, [&]() -> int32_t {
        if (!worker || !many) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "worker_on_many: no worker, or nobody to be told");
        }
        worker->on_many(many, data);
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_worker_expect(llama_flash_worker * worker, uint64_t bytes, llama_flash_error * err) {
    return guarded(err, [&]() -> int32_t {
        if (!worker) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "worker_expect: no worker");
        }
        worker->buffers.expect(bytes);
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_worker_serve(llama_flash_worker * worker, int32_t fd, llama_flash_error * err) {
    return guarded(err, [&]() -> int32_t {
        if (!worker) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "worker_serve: no worker");
        }
        worker->serve(fd);
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_worker_take_refusal(llama_flash_worker * worker, llama_flash_error * err) {
    return guarded(err, [&]() -> int32_t {
        const std::string refusal = worker ? worker->take_refusal() : "";
        return refusal.empty() ? LLAMA_FLASH_OK : flash_fail(err, LLAMA_FLASH_E_INVALID, "%s", refusal.c_str());
    });
}

int32_t llama_flash_worker_get_memory(const llama_flash_worker * worker, llama_flash_worker_memory * out) {
    return guarded(nullptr, [&]() -> int32_t {
        if (!worker || !out) {
            return LLAMA_FLASH_E_INVALID;
        }
        *out = worker->memory();
        return LLAMA_FLASH_OK;
    });
}
