// Flash tensors without a model: a session that can say what it needs before anything is loaded.
#include "llama_flash.h"

#include "base/status.h"
#include "session.h"

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

// whether there can be a weight of this type and shape, and its bytes can be counted
static bool makes_sense(int32_t type, const int64_t (&ne)[3]) {
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0 || ne[0] < 1 || ne[1] < 1 || ne[2] < 1 ||
        ne[0] % ggml_blck_size((ggml_type) type) != 0) {
        return false;
    }
    const int64_t most = INT64_MAX / (int64_t) ggml_type_size((ggml_type) type);
    return ne[1] <= most / ne[0] && ne[2] <= most / ne[0] / ne[1];
}

static int32_t bind_weight(llama_flash_session & session, const char * name, const char * path, uint64_t offset, int32_t type, const int64_t (&ne)[3],
                           llama_flash_error * err) {
    if (session.bound || !makes_sense(type, ne)) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "bind_weight: %s of type %d, [%lld, %lld, %lld], or a session that is bound", name, type,
                          (long long) ne[0], (long long) ne[1], (long long) ne[2]);
    }
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        const int e = errno;
        flash_fail(err, LLAMA_FLASH_E_READ, "cannot open %s: %s", path, why_failed(e).c_str());
        if (err) {
            err->sys_errno = e;
        }
        return LLAMA_FLASH_E_READ;
    }
    static char addresses = 0; // one for each tensor, as the engine's are; never touched

    ggml_tensor t = {};
    t.type        = (ggml_type) type;
    t.ne[0]       = ne[0];
    t.ne[1]       = ne[1];
    t.ne[2]       = ne[2];
    t.ne[3]       = 1;
    t.nb[0]       = ggml_type_size(t.type);
    t.nb[1]       = ggml_row_size(t.type, t.ne[0]);
    t.nb[2]       = t.nb[1] * (size_t) t.ne[1];
    t.nb[3]       = t.nb[2] * (size_t) t.ne[2];
    t.data        = (void *) ((uintptr_t) &addresses + session.table.tensors.size() + session.part_by_address.size());
    strncpy(t.name, name, sizeof(t.name) - 1);
    session.bind(&t, fd, offset); // what it finds wrong, bind_end says
    close(fd);
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session_bind_weight(llama_flash_session * session, const char * name, const char * path, uint64_t offset, int32_t type, int64_t ne0,
                                        int64_t ne1, int64_t ne2, llama_flash_error * err) {
    if (!name || !path) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "bind_weight: no name or path");
    }
    return with_session(session, "bind_weight", err, [&] { return bind_weight(*session, name, path, offset, type, { ne0, ne1, ne2 }, err); });
}
