#include "io/reader.h"

#include "base/status.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

// flash_file

// some file systems accept O_DIRECT and then refuse the reads, or want larger sectors than ours
static bool reads_sectors(int fd) {
    std::unique_ptr<uint8_t[]> buffer(new uint8_t[2 * FLASH_SECTOR]);

    uint8_t * sector = (uint8_t *) flash_sector_ceil((uint64_t) (uintptr_t) buffer.get());
    ssize_t   n;
    do {
        n = pread(fd, sector, FLASH_SECTOR, 0);
    } while (n < 0 && errno == EINTR);
    return n > 0 || (n < 0 && errno != EINVAL);
}

static std::string link_of(int fd) {
    return "/proc/self/fd/" + std::to_string(fd);
}

static std::string name_of(const std::string & link) {
    char          name[4096];
    const ssize_t n = readlink(link.c_str(), name, sizeof(name));
    return n > 0 ? std::string(name, (size_t) n) : link;
}

std::unique_ptr<flash_file> flash_file::reopen(int fd, llama_flash_error * err) {
    std::unique_ptr<flash_file> file(new flash_file());

    const std::string link = link_of(fd);
    file->path             = name_of(link);

    file->fd     = open(link.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
    file->direct = file->fd >= 0 && reads_sectors(file->fd);
    if (!file->direct) {
        if (file->fd >= 0) {
            ::close(file->fd);
        }
        file->fd = open(link.c_str(), O_RDONLY | O_CLOEXEC);
    }
    struct stat st;
    if (file->fd < 0 || fstat(file->fd, &st) != 0) {
        const int e = errno;
        flash_fail(err, LLAMA_FLASH_E_READ, "cannot open %s for direct reads: %s", file->path.c_str(), why_failed(e).c_str());
        if (err) {
            err->sys_errno = e;
            snprintf(err->file, sizeof(err->file), "%s", file->path.c_str());
        }
        return nullptr;
    }
    file->size   = (uint64_t) st.st_size;
    file->device = (uint64_t) st.st_dev;
    file->inode  = (uint64_t) st.st_ino;
    file->status_now(file->opened);
    file->opened.name = file->path;
    file->seen        = file->opened;
    return file;
}

flash_file::~flash_file() {
    close();
}

void flash_file::close() {
    if (fd >= 0) {
        ::close(fd);
        fd = -1;
    }
}

bool flash_file::status_now(status & now) const {
    struct stat st;
    if (fstat(fd, &st) != 0) {
        return false;
    }
    now.mtime_s  = st.st_mtim.tv_sec;
    now.mtime_ns = st.st_mtim.tv_nsec;
    now.ctime_s  = st.st_ctim.tv_sec;
    now.ctime_ns = st.st_ctim.tv_nsec;
    now.size     = (uint64_t) st.st_size;
    now.links    = (uint64_t) st.st_nlink;
    now.mode     = (uint32_t) st.st_mode;
    now.user     = (uint32_t) st.st_uid;
    now.group    = (uint32_t) st.st_gid;
    return true;
}

file_state flash_file::look() const {
    status now;
    if (!status_now(now) || now.size != opened.size || now.mtime_s != opened.mtime_s || now.mtime_ns != opened.mtime_ns) {
        state = file_state::doubtful; // for the next look, which may find size and time put back
        return file_state::changed;
    }
    if (now.ctime_s == seen.ctime_s && now.ctime_ns == seen.ctime_ns) {
        return state;
    }
    now.name             = name_of(link_of(fd));
    const bool explained = now.links != seen.links || now.mode != seen.mode || now.user != seen.user || now.group != seen.group || now.name != seen.name;
    state                = explained ? std::max(state, file_state::touched) : file_state::doubtful;
    seen                 = now;
    return state;
}

// reader

std::unique_ptr<reader> reader::create(const llama_flash_params & params, llama_flash_error * err) {
    std::unique_ptr<reader> r(new reader());
    r->depth      = params.io_depth ? params.io_depth : 32;
    r->piece_size = (uint32_t) flash_sector_ceil(params.read_bytes ? std::min(params.read_bytes, 1u << 30) : 1u << 20);
    r->reserve(1024, 4096);

    const uint32_t threads = params.io_threads ? params.io_threads : 8;
    std::string    no_uring;
    std::string    no_pread;
    if (params.io_engine != LLAMA_FLASH_IO_PREAD) {
        r->engine = make_uring_engine(r->depth, no_uring);
    }
    if (!r->engine && params.io_engine != LLAMA_FLASH_IO_URING) {
        r->engine = make_pread_engine(threads, no_pread);
    }
    if (!r->engine) {
        flash_fail(err, LLAMA_FLASH_E_INVALID, "no I/O engine: %s%s%s", no_uring.c_str(), no_uring.empty() || no_pread.empty() ? "" : "; ",
                   no_pread.c_str());
        return nullptr;
    }
    return r;
}

// no piece may be under way when its memory goes: the session drains before it frees
reader::~reader() {
    done ignored;
    while (engine && next(ignored, true)) {
    }
}

void reader::reserve(size_t n_jobs, size_t n_pieces) {
    while (pieces.size() < n_pieces) {
        pieces.emplace_back();
        pieces.back().next = free_pieces;
        free_pieces        = &pieces.back();
    }
    while (jobs.size() < n_jobs) {
        jobs.emplace_back();
        jobs.back().next = free_jobs;
        free_jobs        = &jobs.back();
    }
}

read_piece * reader::new_piece() {
    if (!free_pieces) {
        reserve(0, pieces.size() + 1);
    }
    read_piece * piece = free_pieces;
    free_pieces        = piece->next;
    return piece;
}

read_job * reader::new_job() {
    if (!free_jobs) {
        reserve(jobs.size() + 1, 0);
    }
    read_job * job = free_jobs;
    free_jobs      = job->next;
    return job;
}

void reader::requeue(read_piece * piece) {
    // in front: the rest of a read that has begun
    piece->next = queue_head;
    queue_head  = piece;
    if (!queue_tail) {
        queue_tail = piece;
    }
}

void reader::read(const flash_file & file, uint64_t offset, uint64_t size, uint8_t * dst, uint32_t tag, bool first_of_all, read_owner * owner) {
    const uint64_t first = flash_sector_floor(offset);
    const uint64_t last  = offset + size;
    uint8_t *      base  = dst - (offset - first);

    read_job * job = new_job();
    *job           = { tag, 0, 0, 0, &file, owner, nullptr };

    read_piece * head = nullptr;
    read_piece * tail = nullptr;

    for (uint64_t at = first; at < last; at += piece_size) {
        read_piece * piece = new_piece();

        const uint64_t need = std::min<uint64_t>(last - at, piece_size);

        piece->fd     = file.fd;
        piece->offset = at;
        piece->need   = (uint32_t) need;
        piece->size   = (uint32_t) flash_sector_ceil(need);
        piece->dst    = base + (at - first);
        piece->result = 0;
        piece->tries  = 0;
        piece->job    = job;
        piece->next   = nullptr;
        job->pending++;

        (tail ? tail->next : head) = piece;
        tail                       = piece;
    }
    if (!head) {
        return;
    }
    if (first_of_all) {
        tail->next = queue_head;
        queue_head = head;
        queue_tail = queue_tail ? queue_tail : tail;
    } else {
        (queue_tail ? queue_tail->next : queue_head) = head;
        queue_tail                                   = tail;
    }
}

void reader::submit() {
    bool any = false;
    while (queue_head && in_flight < depth) {
        read_piece * piece = queue_head;
        queue_head         = piece->next;
        if (!queue_head) {
            queue_tail = nullptr;
        }
        piece->next = nullptr;
        bytes += piece->size;
        note_started(piece);
        engine->start(piece);
        any = true;
    }
    if (any) {
        engine->flush();
    }
}

void reader::note_started(read_piece * piece) {
    in_flight++;
    bytes_in_flight += piece->size;
    piece->older   = youngest;
    piece->younger = nullptr;

    (youngest ? youngest->younger : oldest) = piece;
    youngest                                = piece;
}

void reader::note_ended(read_piece * piece) {
    in_flight--;
    bytes_in_flight -= piece->size;

    (piece->older ? piece->older->younger : oldest)     = piece->younger;
    (piece->younger ? piece->younger->older : youngest) = piece->older;
}

// for a piece that has ended; nullptr: none is under way
read_piece * reader::wait() {
    if (!oldest) {
        return nullptr;
    }
    if (watch) {
        watch->begin(oldest->job->file->path, oldest->offset, oldest->size);
    }
    read_piece * piece = engine->finished(worth_waking());
    if (watch) {
        watch->end();
    }
    return piece;
}

bool reader::settle(read_piece * piece) {
    read_job * job = piece->job;
    reads++;

    // ECANCELED: io_uring gives up reads whose thread has ended; another thread asks again
    const bool again = piece->result == -EINTR || piece->result == -EAGAIN || piece->result == -ECANCELED;
    if (again && piece->tries++ < MAX_TRIES) {
        retries++;
        requeue(piece);
        return false;
    }
    if (piece->result > 0 && piece->result < piece->need) {
        // continue from the last whole sector, so that the rest is aligned as well
        const uint32_t got = (uint32_t) flash_sector_floor((uint64_t) piece->result);
        if (got > 0) {
            retries++;
            piece->offset += got;
            piece->dst += got;
            piece->need -= got;
            piece->size -= got;
            piece->tries = 0;
            requeue(piece);
            return false;
        }
        // less than a sector: only the end of the file does that
        piece->result = 0;
    }
    if (piece->result < (int64_t) piece->need && !job->error) {
        job->error        = piece->result < 0 ? (int32_t) -piece->result : ENODATA;
        job->error_offset = piece->offset;
    }
    piece->next = free_pieces;
    free_pieces = piece;
    return --job->pending == 0;
}

// how many of what is in flight should have ended before we are woken
uint32_t reader::worth_waking() const {
    const uint64_t few = bytes_in_flight == 0 ? 1 : WAIT_BYTES * in_flight / bytes_in_flight;
    return (uint32_t) std::max<uint64_t>(1, std::min<uint64_t>(few, in_flight / 4));
}

bool reader::next(done & out, bool wait) {
    for (;;) {
        // what has ended is collected first, so that the device is given many reads by one call
        if (in_flight <= depth / 2) {
            submit();
        }
        read_piece * piece = engine->finished(0);
        if (!piece) {
            submit();
            piece = wait ? this->wait() : engine->finished(0);
        }
        if (!piece) {
            return false;
        }
        note_ended(piece);
        read_job * job = piece->job;
        if (settle(piece)) {
            out       = { job->tag, job->error, job->error_offset, job->file, job->owner };
            job->next = free_jobs;
            free_jobs = job;
            return true;
        }
    }
}
