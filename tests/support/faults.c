// LD_PRELOAD shim: makes reads of *.gguf fail on demand. $FAULTS names a file of int32: what to do, how often, and
// after how many reads.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

enum { NONE, FAIL_EIO, FAIL_EINTR, SHORT, END_OF_FILE, FAIL_EIO_SLOWLY, HANG };

struct control {
    _Atomic int32_t what;
    _Atomic int32_t left; // reads still to be disturbed
    _Atomic int32_t skip; // reads that are left alone before
};

static struct control * control(void) {
    static struct control * shared;
    if (!shared) {
        const char * path = getenv("FAULTS");
        const int    fd   = path ? open(path, O_RDWR) : -1;
        void *       p    = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            abort();
        }
        shared = p;
    }
    return shared;
}

static int is_model(int fd) {
    char          link[64], path[4096];
    const int     n_link = snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t n      = n_link > 0 ? readlink(link, path, sizeof(path) - 1) : -1;
    return n > 5 && memcmp(path + n - 5, ".gguf", 5) == 0;
}

static ssize_t disturbed(ssize_t (*real)(int, void *, size_t, off_t), int fd, void * buf, size_t size, off_t offset) {
    struct control * c = control();
    if (c->what == NONE || !is_model(fd)) {
        return real(fd, buf, size, offset);
    }
    if (atomic_load(&c->skip) > 0 && atomic_fetch_sub(&c->skip, 1) > 0) {
        return real(fd, buf, size, offset);
    }
    const int32_t left = atomic_fetch_sub(&c->left, 1);
    if (left <= 0) {
        return real(fd, buf, size, offset);
    }
    switch (c->what) {
        case FAIL_EIO:
            errno = EIO;
            return -1;
        case FAIL_EIO_SLOWLY: // every other one when the first has long stopped the decode
            usleep(left % 2 ? 200000 : 0);
            errno = EIO;
            return -1;
        case HANG: // until it is told otherwise
            while (*(volatile int32_t *) &c->what == HANG) {
                usleep(10000);
            }
            return real(fd, buf, size, offset);
        case FAIL_EINTR:
            errno = EINTR;
            return -1;
        case SHORT:
            return real(fd, buf, size > 4096 ? size / 2 / 4096 * 4096 + (size < 8192 ? 4096 : 0) : size, offset);
        default:
            return 0;
    }
}

ssize_t pread(int fd, void * buf, size_t size, off_t offset) {
    return disturbed((ssize_t (*)(int, void *, size_t, off_t)) dlsym(RTLD_NEXT, "pread"), fd, buf, size, offset);
}

ssize_t pread64(int fd, void * buf, size_t size, off_t offset) {
    return disturbed((ssize_t (*)(int, void *, size_t, off_t)) dlsym(RTLD_NEXT, "pread64"), fd, buf, size, offset);
}
