// io_uring: one ring per session, no threads of ours.
#include "io/reader.h"

#include "base/status.h"

#ifdef LLAMA_FLASH_HAVE_URING

#    include <algorithm>
#    include <cerrno>
#    include <liburing.h>
#    include <unistd.h>

namespace {

class uring_engine : public io_engine {
  public:
    explicit uring_engine(uint32_t depth, int & error) {
        error = -EINVAL;
#    ifdef IORING_SETUP_COOP_TASKRUN
        // completions wait for our next call, in place of interrupting whichever thread has submitted the read (Linux 5.19)
        error = io_uring_queue_init(depth, &ring, IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG);
#    endif
        if (error == -EINVAL) {
            error = io_uring_queue_init(depth, &ring, 0);
        }
        ready = error == 0;
    }

    ~uring_engine() override {
        if (ready) {
            io_uring_queue_exit(&ring);
        }
    }

    llama_flash_io_engine kind() const override { return LLAMA_FLASH_IO_URING; }

    void start(read_piece * piece) override {
        io_uring_sqe * sqe = io_uring_get_sqe(&ring);
        if (!sqe) {
            flush();
            sqe = io_uring_get_sqe(&ring);
        }
        io_uring_prep_read(sqe, piece->fd, piece->dst, piece->size, piece->offset);
        io_uring_sqe_set_data(sqe, piece);
        under_way++;
    }

    void flush() override {
        // what the kernel does not take now (EAGAIN, EBUSY, ENOMEM) stays in the ring and goes with the next call
        while (io_uring_submit(&ring) == -EINTR) {
        }
    }

    read_piece * finished(uint32_t wait) override {
        if (under_way == 0) {
            return nullptr;
        }
        io_uring_cqe * cqe = nullptr;
        while (io_uring_peek_cqe(&ring, &cqe) != 0) {
            if (wait == 0) {
                return nullptr;
            }
            const int n = io_uring_submit_and_wait(&ring, std::min(wait, under_way));
            if (n < 0 && n != -EINTR) {
                usleep(100); // the kernel is out of memory for now
            }
        }
        read_piece * piece = (read_piece *) io_uring_cqe_get_data(cqe);
        piece->result      = cqe->res;
        io_uring_cqe_seen(&ring, cqe);
        under_way--;
        return piece;
    }

  private:
    io_uring ring      = {};
    bool     ready     = false;
    uint32_t under_way = 0;
};

} // namespace

std::unique_ptr<io_engine> make_uring_engine(uint32_t depth, std::string & why_not) {
    int  error  = 0;
    auto engine = std::make_unique<uring_engine>(depth, error);
    if (error != 0) {
        why_not = "io_uring is not allowed here: " + why_failed(-error);
        return nullptr;
    }
    return engine;
}

#else

std::unique_ptr<io_engine> make_uring_engine(uint32_t depth, std::string & why_not) {
    (void) depth;
    why_not = "io_uring is not built in (liburing was not found at build time)";
    return nullptr;
}

#endif
