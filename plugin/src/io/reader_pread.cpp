// A pool of threads that call pread: works wherever there is a file.
#include "io/reader.h"

#include "base/status.h"

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

class pread_engine : public io_engine {
  public:
    explicit pread_engine(uint32_t n_threads) {
        threads.reserve(n_threads);
        for (uint32_t i = 0; i < n_threads; i++) {
            try {
                threads.emplace_back([this] { work(); });
            } catch (const std::system_error &) {
                if (threads.empty()) {
                    throw;
                }
                break; // fewer will do
            }
        }
    }

    ~pread_engine() override {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stop = true;
        }
        started_cv.notify_all();
        for (auto & thread : threads) {
            thread.join();
        }
    }

    llama_flash_io_engine kind() const override { return LLAMA_FLASH_IO_PREAD; }

    void start(read_piece * piece) override {
        {
            std::lock_guard<std::mutex> lock(mutex);
            piece->next = nullptr;
            if (started_tail) {
                started_tail->next = piece;
            } else {
                started_head = piece;
            }
            started_tail = piece;
            under_way++;
        }
        started_cv.notify_one();
    }

    void flush() override {}

    read_piece * finished(uint32_t wait) override {
        std::unique_lock<std::mutex> lock(mutex);
        if (wait) {
            ended_cv.wait(lock, [this] { return ended || under_way == 0; });
        }
        read_piece * piece = ended;
        if (piece) {
            ended = piece->next;
            under_way--;
        }
        return piece;
    }

  private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            started_cv.wait(lock, [this] { return stop || started_head; });
            if (!started_head) {
                return;
            }
            read_piece * piece = started_head;
            started_head       = piece->next;
            if (!started_head) {
                started_tail = nullptr;
            }
            lock.unlock();

            const ssize_t n = pread(piece->fd, piece->dst, piece->size, (off_t) piece->offset);
            piece->result   = n >= 0 ? (int64_t) n : -(int64_t) errno;

            lock.lock();
            piece->next = ended;
            ended       = piece;
            ended_cv.notify_one();
        }
    }

    std::mutex              mutex;
    std::condition_variable started_cv;
    std::condition_variable ended_cv;
    read_piece *            started_head = nullptr;
    read_piece *            started_tail = nullptr;
    read_piece *            ended        = nullptr;
    uint32_t                under_way    = 0;
    bool                    stop         = false;

    std::vector<std::thread> threads; // last: they use all of the above
};

} // namespace

std::unique_ptr<io_engine> make_pread_engine(uint32_t threads, std::string & why_not) {
    try {
        return std::make_unique<pread_engine>(threads);
    } catch (const std::system_error & e) {
        why_not = "cannot start reader threads: " + why_failed(e.code().value());
        return nullptr;
    }
}
