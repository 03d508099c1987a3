#include "prompts/restore.h"

#include "base/status.h"
#include "io/checksum.h"

#include <algorithm>
#include <cstring>
#include <system_error>

static constexpr size_t UNTOUCHED = 2 * HUGE_PAGE; // bytes that a thread asks for at once

static_assert(prompt_restore::PIECE % CHECKSUM_PIECE == 0, "a piece is summed up by itself");

std::unique_ptr<prompt_restore> prompt_restore::create(const llama_flash_params & params, llama_flash_error * err) {
    std::unique_ptr<prompt_restore> r(new prompt_restore());
    llama_flash_params              p = params;
    p.read_bytes                      = PIECE + HEAD;
    r->reads                          = reader::create(p, err);
    if (!r->reads) {
        return nullptr;
    }
    r->memory = mapping::allocate(PLACES * (PIECE + HEAD));
    if (!r->memory.data) {
        flash_fail(err, LLAMA_FLASH_E_MEMORY, "no memory to read prompts through: the kernel refused %llu bytes%s",
                   (unsigned long long) (PLACES * (PIECE + HEAD)), limits_of(ENOMEM).c_str());
        return nullptr;
    }
    for (uint32_t number = PLACES; number > 0; number--) {
        r->empty.push_back(number - 1);
    }
    return r;
}

prompt_restore::~prompt_restore() = default;

void prompt_restore::add(int fd, const uint8_t * head, prompt_body to) {
    llama_flash_error err;
    block             b    = { flash_file::reopen(fd, &err), head, std::move(to), false, 0, 0 };
    const uint64_t    size = HEAD + flash_sector_ceil(b.to.bytes());
    b.good                 = b.file && b.file->size == size;
    blocks.push_back(std::move(b));
}

// What is to be read next; false: nothing. Blocks behind one that is damaged are of no use.
bool prompt_restore::next_piece(piece & out) {
    if (upcoming.block >= blocks.size()) {
        return false;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    const block &                     b = blocks[upcoming.block];
    if (!b.good) {
        upcoming.block = blocks.size();
        return false;
    }
    upcoming.size = std::min(PIECE, b.to.bytes() - upcoming.begin);
    out           = upcoming;
    upcoming.begin += upcoming.size;
    if (upcoming.begin == b.to.bytes()) {
        upcoming = { upcoming.block + 1, 0, 0 };
    }
    return true;
}

// the piece that `number` is for; the first one of a block comes with its head
void prompt_restore::start(uint32_t number) {
    const piece &  p    = pieces[number];
    const uint64_t head = p.begin == 0 ? HEAD : 0;
    reads->read(*blocks[p.block].file, HEAD + p.begin - head, head + flash_sector_ceil(p.size), place(number), number);
}

bool prompt_restore::right_head(block & b, const uint8_t * data) const {
    struct {
        uint64_t bytes;
        uint32_t body;
        uint32_t head;
    } sums;
    static_assert(sizeof(sums) == SUMS, "the end of the head");
    memcpy(&sums, data + HEAD - SUMS, SUMS);
    b.wanted = sums.body;
    return memcmp(data, b.head, HEAD - SUMS) == 0 && sums.bytes == b.to.bytes() && sums.head == checksum(data, HEAD - sizeof(sums.head));
}

// a piece that has arrived
void prompt_restore::settle(uint32_t number) {
    const piece &   p    = pieces[number];
    block &         b    = blocks[p.block];
    const uint8_t * data = place(number);
    bool            good = true;
    if (p.begin == 0) {
        good = right_head(b, data);
        data += HEAD;
    }
    uint32_t sum = 0;
    for (uint64_t done = 0; done < p.size && good; done += CHECKSUM_PIECE) {
        const uint64_t n = std::min<uint64_t>(CHECKSUM_PIECE, p.size - done);
        sum += checksum_piece(data + done, n, (uint32_t) ((p.begin + done) / CHECKSUM_PIECE));
        b.to.put(p.begin + done, n, data + done); // while it is in the core's cache
    }
    const std::lock_guard<std::mutex> lock(mutex);
    b.sum += sum;
    b.good = b.good && good;
}

void prompt_restore::prepare(uint8_t * begin, uint8_t * end, bool at_once) {
    mapping::prefer_huge_pages(begin, end, true);
    prepared.emplace_back(begin, end);
    for (uint8_t * at = begin; at < end && at_once; at += UNTOUCHED) {
        untouched.emplace_back(at, std::min(at + UNTOUCHED, end));
    }
}

void prompt_restore::work() {
    for (size_t i = next_untouched++; i < untouched.size(); i = next_untouched++) {
        mapping::populate(untouched[i].first, untouched[i].second);
    }
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
        arrived_some.wait(lock, [this] { return ended || !arrived.empty(); });
        if (arrived.empty()) {
            return;
        }
        const uint32_t number = arrived.front();
        arrived.pop_front();
        lock.unlock();
        settle(number);
        lock.lock();
        empty.push_back(number);
        freed_some.notify_one();
    }
}

void prompt_restore::read_all() {
    uint32_t     under_way = 0;
    bool         more      = true;
    reader::done done;
    while (true) {
        std::unique_lock<std::mutex> lock(mutex);
        if (under_way == 0 && more) {
            freed_some.wait(lock, [this] { return !empty.empty(); });
        }
        std::vector<uint32_t> places;
        places.swap(empty);
        lock.unlock();
        while (!places.empty() && (more = more && next_piece(pieces[places.back()]))) {
            start(places.back());
            places.pop_back();
            under_way++;
        }
        lock.lock();
        empty.insert(empty.end(), places.begin(), places.end());
        lock.unlock();
        reads->submit();
        if (under_way == 0 || !reads->next(done, true)) {
            return;
        }
        under_way--;
        lock.lock();
        if (done.error != 0) {
            blocks[pieces[done.tag].block].good = false;
            empty.push_back(done.tag);
        } else {
            arrived.push_back(done.tag);
        }
        lock.unlock();
        arrived_some.notify_one();
    }
}

size_t prompt_restore::run() {
    std::vector<std::thread> workers;
    try {
        for (unsigned i = 0; i < std::min(4u, std::max(1u, std::thread::hardware_concurrency())); i++) {
            workers.emplace_back(&prompt_restore::work, this);
        }
    } catch (const std::system_error &) {
        // as many as the process may have
    }
    if (workers.empty()) {
        return 0;
    }
    read_all();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        ended = true;
    }
    arrived_some.notify_all();
    for (std::thread & worker : workers) {
        worker.join();
    }
    for (const bytes_of & each : prepared) { // tokens that follow take as little memory as they would have
        mapping::prefer_huge_pages(each.first, each.second, false);
    }
    size_t n_good = 0;
    while (n_good < blocks.size() && blocks[n_good].good && blocks[n_good].wanted == checksum_of_sum(blocks[n_good].sum)) {
        n_good++;
    }
    return n_good;
}
