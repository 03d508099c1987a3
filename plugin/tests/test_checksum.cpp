// Checksums: of whole records and of pieces the same; another one after any change; and what is done about a file's states.
#include "check.h"
#include "io/checksum.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <vector>

namespace {

std::vector<uint8_t> bytes_of(size_t n, uint64_t seed) {
    random_source        random(seed);
    std::vector<uint8_t> data(n);
    for (auto & byte : data) {
        byte = (uint8_t) random.below(256);
    }
    return data;
}

void pieces_in_any_order_give_that_of_the_record() {
    for (size_t n : { size_t(1), CHECKSUM_PIECE - 1, CHECKSUM_PIECE, CHECKSUM_PIECE + 1, 3 * CHECKSUM_PIECE + 12345 }) {
        const std::vector<uint8_t> data = bytes_of(n, n);
        uint32_t                   sum  = 0;
        for (size_t piece = (n + CHECKSUM_PIECE - 1) / CHECKSUM_PIECE; piece-- > 0;) {
            sum += checksum_piece(data.data() + piece * CHECKSUM_PIECE, std::min(CHECKSUM_PIECE, n - piece * CHECKSUM_PIECE), (uint32_t) piece);
        }
        CHECK(checksum_of_sum(sum) == checksum(data.data(), n) && checksum_of_sum(sum) != 0, "%zu bytes", n);
    }
}

void each_changed_bit_is_seen() {
    for (size_t n : { 1, 7, 8, 23, 24, 25, 47, 48, 100, 1000 }) {
        std::vector<uint8_t> data  = bytes_of(n, n);
        const uint32_t       right = checksum(data.data(), n);
        for (size_t i = 0; i < n * 8; i++) {
            data[i / 8] ^= (uint8_t) (1u << i % 8);
            CHECK(checksum(data.data(), n) != right, "bit %zu of %zu bytes", i, n);
            data[i / 8] ^= (uint8_t) (1u << i % 8);
        }
        CHECK(checksum(data.data(), n) == right, "%zu bytes, as they were", n);
    }
}

void other_changes_are_seen() {
    std::vector<uint8_t> data  = bytes_of(2 * CHECKSUM_PIECE, 1);
    const uint32_t       right = checksum(data.data(), data.size());
    std::set<uint32_t>   sums{ right };
    for (uint64_t seed = 0; seed < 1000; seed++) {
        random_source        random(seed);
        std::vector<uint8_t> other = data;
        const size_t         at    = random.below(other.size() - 600);
        for (size_t i = 0; i < 1 + random.below(500); i++) {
            other[at + i] = (uint8_t) random.below(256);
        }
        sums.insert(checksum(other.data(), other.size()));
    }
    CHECK(sums.size() > 990, "%zu checksums of 1001 contents", sums.size());
    std::swap_ranges(data.begin(), data.begin() + CHECKSUM_PIECE, data.begin() + CHECKSUM_PIECE);
    CHECK(checksum(data.data(), data.size()) != right, "two pieces changed places");
    std::vector<uint8_t> zeros(100);
    CHECK(checksum(zeros.data(), 99) != checksum(zeros.data(), 100), "a zero more");
}

void bytes_are_accepted_or_refused_by_what_is_known_of_them() {
    uint32_t known = 0;
    CHECK(check_for(file_state::same, known) == byte_check::note && check_bytes(byte_check::note, known, 5) && known == 5, "%u", known);
    CHECK(check_for(file_state::same, known) == byte_check::none && check_bytes(byte_check::none, known, 6) && known == 5, "%u", known);
    for (file_state state : { file_state::touched, file_state::doubtful }) {
        CHECK(check_for(state, known) == byte_check::compare, "known bytes of a file that was touched");
    }
    CHECK(check_bytes(byte_check::compare, known, 5) && !check_bytes(byte_check::compare, known, 6) && known == 5, "%u", known);
    CHECK(check_for(file_state::touched, 0) == byte_check::note && check_for(file_state::doubtful, 0) == byte_check::refuse, "unknown bytes");
    CHECK(check_for(file_state::changed, 0) == byte_check::refuse && check_for(file_state::changed, 5) == byte_check::refuse, "a changed file");
    CHECK(!check_bytes(byte_check::refuse, known, 5), "refused");
}

} // namespace

int main() {
    pieces_in_any_order_give_that_of_the_record();
    each_changed_bit_is_seen();
    other_changes_are_seen();
    bytes_are_accepted_or_refused_by_what_is_known_of_them();
    printf("checksum: ok\n");
    return 0;
}
