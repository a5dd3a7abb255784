// Single rules of processes' memory: limits, what files that change do to it, tables that cannot be
// believed. And what freezing, adopting and resetting costs, as output.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>

#include "check.hpp"
#include "memory_model.hpp"

using namespace pvtest;

namespace {

using Files = AddressSpace::Files;
using Fault = AddressSpace::Fault;
constexpr u64 kAt = 0x1000'0000, kMega = 1 << 20;
constexpr u8 kBoth = kReadable | kWritable;

AddressSpace::Request request(u64 size, u8 rights = kBoth) {
    AddressSpace::Request made;
    made.address = kAt;
    made.size = size;
    made.rights = rights;
    made.fixed = true;
    return made;
}

std::shared_ptr<OwnedFd> make_file(u64 size, u8 fill) {
    auto file = std::make_shared<OwnedFd>(::memfd_create("test", MFD_CLOEXEC));
    const std::vector<u8> bytes(size, fill);
    CHECK(::pwrite(file->get(), bytes.data(), size, 0) == static_cast<ssize_t>(size));
    return file;
}

u64 host_mappings() {
    std::FILE* maps = std::fopen("/proc/self/maps", "re");
    u64 lines = 0;
    for (int c; (c = std::fgetc(maps)) != EOF;) lines += c == '\n';
    std::fclose(maps);
    return lines;
}

void given_in_pieces() {
    Memory memory(Files::kMapped);
    AddressSpace& space = *memory.space;
    CHECK_EQ(space.map(request(64 * kMega)), static_cast<s64>(kAt));
    CHECK_EQ(space.used(), u64{0});
    CHECK(memory.access(kAt + 20 * kMega, true) != nullptr);
    CHECK(space.used() > 0 && space.used() <= kMega);
    // One after the other, or downwards as a stack: few faults, and one area in the end.
    int faults = 0;
    for (u64 at = 0; at < 64 * kMega; at += kPageSize) {
        const u64 before = space.used();
        CHECK(memory.access(kAt + at, true) != nullptr);
        faults += space.used() != before;
    }
    CHECK(faults < 40);
    CHECK_EQ(space.used(), 64 * kMega);
    CHECK(space.areas().size() <= 4);
    CHECK_EQ(space.discard(kAt, 64 * kMega), s64{0});
    CHECK(space.used() <= 2 * kMega);
    CHECK(space.map(request(64 * kMega)) > 0);
    faults = 0;
    for (u64 at = 8 * kMega; at > 0; at -= kPageSize) {
        const u64 before = space.used();
        CHECK(memory.access(kAt + at, true) != nullptr);
        faults += space.used() != before;
    }
    CHECK(faults < 20);
    // Small areas have it at once, and neighbours become one.
    space.clear();
    for (u64 n = 0; n < 100; ++n) {
        auto one = request(3 * kPageSize);
        one.address += n * one.size;
        CHECK(space.map(one) > 0);
    }
    CHECK_EQ(space.used(), 300 * kPageSize);
    CHECK_EQ(space.areas().size(), std::size_t{1});
}

void limits() {
    Memory memory(Files::kMapped, 16 * kMega);
    AddressSpace& space = *memory.space;
    CHECK_EQ(space.map(request(32 * kMega)), s64{-ENOMEM});
    auto reservation = request(u64{64} << 30, 0);
    CHECK_EQ(space.map(reservation), static_cast<s64>(kAt));
    CHECK_EQ(space.protect(kAt, u64{32} << 20, kBoth), s64{-ENOMEM});
    CHECK_EQ(space.protect(kAt, 12 * kMega, kBoth), s64{0});
    CHECK_EQ(space.protect(kAt + u64{32} * kMega, 12 * kMega, kBoth), s64{0});
    CHECK_EQ(space.used(), u64{0});
    auto wide = request(u64{8} << 30);
    wide.reserved = false;
    CHECK_EQ(space.map(wide), static_cast<s64>(kAt));
    u64 got = 0;
    while (memory.access(kAt + got, true) != nullptr) got += kPageSize;
    CHECK(memory.last == Fault::kNoMemory);
    CHECK_EQ(got, 16 * kMega);
    CHECK_EQ(space.used(), 16 * kMega);
    CHECK_EQ(space.map(wide), static_cast<s64>(kAt));  // what was there is gone
    CHECK_EQ(space.used(), u64{0});
    CHECK(!space.exhausted());
    std::vector<iovec> spans;
    CHECK(!space.spans(kAt, 17 * kMega, true, spans));
    CHECK(space.exhausted());
    // The heap ends where the limit is.
    space.clear();
    space.set_heap(kAt);
    CHECK_EQ(space.brk(kAt + 15 * kMega), kAt + 15 * kMega);
    CHECK(space.populate(kAt, 15 * kMega) == 0);
    CHECK_EQ(space.brk(kAt + 17 * kMega), kAt + 15 * kMega);
    CHECK_EQ(space.brk(kAt + kMega), kAt + kMega);
    CHECK_EQ(space.used(), kMega);
}

// Of several processes together.
void shared_limit() {
    Memory one(Files::kMapped, 16 * kMega);
    CHECK(one.space->map(request(kMega)) > 0);
    {
        Memory two(Files::kMapped, 16 * kMega);
        CHECK(two.space->map(request(2 * kMega)) > 0);
        CHECK_EQ(two.space->populate(kAt, 2 * kMega), s64{0});
        two.space->share(one.space->budget());
        CHECK_EQ(one.space->left(), 13 * kMega);
        CHECK_EQ(two.space->map(request(20 * kMega)), s64{-ENOMEM});
        CHECK_EQ(two.space->unmap(kAt, kMega), s64{0});
        CHECK_EQ(one.space->left(), 14 * kMega);
        Memory three(Files::kMapped, 16 * kMega);
        three.arena.fork(two.arena, true);
        three.restore(two.state(), true);
        three.space->share(one.space->budget());
        CHECK_EQ(one.space->left(), 13 * kMega);
    }
    CHECK_EQ(one.space->left(), 15 * kMega);
    one.space->clear();
    CHECK_EQ(one.space->left(), 16 * kMega);
}

void files(Files kind) {
    Memory memory(kind);
    AddressSpace& space = *memory.space;
    auto file = make_file(3 * kPageSize + 100, 7);
    auto map = [&](u64 address, u64 pages, u8 rights, bool shared) {
        auto made = request(pages * kPageSize, rights);
        made.address = address;
        made.file = file;
        made.shared = shared;
        return space.map(made);
    };
    u8 byte = 0;
    CHECK_EQ(map(kAt, 6, kReadable, false), static_cast<s64>(kAt));
    CHECK_EQ(map(kAt + kMega, 6, kBoth, false), static_cast<s64>(kAt + kMega));
    for (u64 at : {kAt, kAt + kMega}) {
        CHECK(space.load(at + 2 * kPageSize, byte) && byte == 7);
        CHECK(space.load(at + 3 * kPageSize + 100, byte) && byte == 0);
        CHECK(memory.access(at + 3 * kPageSize, false) != nullptr);
        CHECK(!space.load(at + 4 * kPageSize, byte));
        CHECK(memory.access(at + 4 * kPageSize, false) == nullptr);
        CHECK(memory.last == Fault::kBeyondFile);
    }
    CHECK(memory.access(kAt, true) == nullptr && memory.last == Fault::kForbidden);
    // It grows, and then the rest is there, too.
    const std::vector<u8> more(2 * kPageSize, 9);
    CHECK(::pwrite(file->get(), more.data(), more.size(), 4 * kPageSize) > 0);
    CHECK(space.load(kAt + 4 * kPageSize, byte) && byte == 9);
    CHECK(memory.access(kAt + 4 * kPageSize, false) != nullptr);
    CHECK_EQ(space.protect(kAt, 6 * kPageSize, kBoth), s64{0});
    CHECK(memory.access(kAt + kPageSize, true) != nullptr);
    *memory.access(kAt + kPageSize, true) = 1;
    CHECK(space.load(kAt, byte) && byte == 7);
    CHECK(::pread(file->get(), &byte, 1, kPageSize) == 1 && byte == 7);
    // It shrinks: what can be written to stays, and nobody touches what is missing.
    CHECK_EQ(map(kAt + 2 * kMega, 6, kReadable, false), static_cast<s64>(kAt + 2 * kMega));
    CHECK(memory.access(kAt + 2 * kMega, false) != nullptr);
    CHECK(::ftruncate(file->get(), 0) == 0);
    CHECK(space.load(kAt, byte) && byte == 7);
    CHECK(space.load(kAt + kMega + kPageSize, byte) && byte == 7);
    CHECK_EQ(space.load(kAt + 2 * kMega + kPageSize, byte), kind == Files::kCopied);
    std::vector<iovec> spans;
    CHECK(space.spans(kAt + 2 * kMega, 1, false, spans));
    CHECK(space.word(kAt + kPageSize) != nullptr);
    const auto image = memory.arena.freeze(Arena::Files::kCopied);
    CHECK(image != nullptr);
    // Shared: what is written reaches the file, or the mapping is refused.
    CHECK(::ftruncate(file->get(), 2 * kPageSize) == 0);
    const s64 shared = map(kAt + 3 * kMega, 2, kBoth, true);
    CHECK_EQ(shared, static_cast<s64>(kAt + 3 * kMega));
    CHECK(space.store(kAt + 3 * kMega + kPageSize, u8{5}));
    CHECK(::pread(file->get(), &byte, 1, kPageSize) == 1 && byte == 5);
    CHECK_EQ(space.sync(kAt + 3 * kMega, 2 * kPageSize), s64{0});
    CHECK(space.word(kAt + 3 * kMega) == nullptr);
    CHECK(::ftruncate(file->get(), 0) == 0);
    CHECK(!space.store(kAt + 3 * kMega + kPageSize, u8{6}));
    CHECK(!space.load(kAt + 3 * kMega, byte));
    CHECK(!space.recover_lost_pages());
    if (kind == Files::kCopied) {
        // An engine that touches it goes on with zeroes, and the space gives the page up.
        u8* const lost = memory.access(kAt + 3 * kMega + kPageSize, true);
        CHECK(lost != nullptr);
        *lost = 7;
        CHECK(*(lost - kPageSize) == 0 && *lost == 0);
        CHECK(space.recover_lost_pages());
        CHECK(!space.recover_lost_pages());
        CHECK(memory.access(kAt + 3 * kMega + kPageSize, true) == nullptr);
        CHECK(::ftruncate(file->get(), 2 * kPageSize) == 0);
        CHECK(memory.access(kAt + 3 * kMega + kPageSize, true) != nullptr);
        *memory.access(kAt + 3 * kMega + kPageSize, true) = 8;
        CHECK(::pread(file->get(), &byte, 1, kPageSize) == 1 && byte == 8);
    }
    CHECK_EQ(map(kAt + 4 * kMega, 2, kReadable, true), static_cast<s64>(kAt + 4 * kMega));
    CHECK_EQ(space.protect(kAt + 4 * kMega, kPageSize, kBoth), s64{0});
}

// An entry of a table that points to nowhere, or to the program's memory.
void bad_tables() {
    Memory memory(Files::kMapped);
    const Gpa data = *memory.arena.allocate(kPageSize);
    auto* root = reinterpret_cast<u64*>(memory.arena.host(Gpa(memory.tables->root())));
    for (u64 address : {data.value, u64{1} << 40, Memory::kSize}) {
        root[5] = address | 0x67;
        CHECK(!memory.tables->map(u64{5} << 39, data, kPageSize, kBoth));
        memory.tables->unmap(u64{5} << 39, kPageSize);
    }
    // As many tables as there are, and no more.
    AddressSpace& space = *memory.space;
    auto spread = request(kPageSize);
    s64 made = 0;
    u64 count = 0;
    for (; count < 10000; ++count) {
        spread.address = (u64{1} << 21) * (count + 8);
        made = space.map(spread);
        if (made < 0 || memory.access(spread.address, true) == nullptr) break;
    }
    CHECK(memory.last == Fault::kNoMemory);
    CHECK(memory.tables->bytes() <= Memory::kTables);
    CHECK(count > 1000);
}

void few_files() {
    Memory memory(Files::kMapped);
    s64 made = 0;
    u64 count = 0;
    for (auto one = request(kPageSize, 0); made >= 0 && count < 5000; ++count) {
        one.address += 2 * kPageSize;
        if (count % 2 == 0)
            one.file = make_file(kPageSize, 1);
        else
            one.file.reset();
        one.shared = count % 2 == 1;
        made = memory.space->map(one);
    }
    CHECK_EQ(made, s64{-ENOMEM});
    CHECK(count <= 2 * AddressSpace::kMostFiles);
    // One that is kept already costs nothing.
    auto again = request(kPageSize, 0);
    again.address += 20000 * kPageSize;
    again.file = memory.space->areas().begin()->second.file;
    CHECK(memory.space->map(again) > 0);
}

void few_host_mappings() {
    Memory memory(Files::kMapped);
    auto file = make_file(2 * kPageSize, 3);
    const u64 before = host_mappings();
    for (u64 n = 0; n < 3000; ++n) {
        auto one = request(kPageSize, kReadable);
        one.address += 2 * n * kPageSize;
        one.file = file;
        one.offset = n % 2 * kPageSize;
        CHECK(memory.space->map(one) > 0);
    }
    CHECK(host_mappings() - before <= 2 * Arena::kMostRuns);
    u8 byte = 0;
    CHECK(memory.space->load(kAt + 2 * 2999 * kPageSize, byte) && byte == 3);
    // A copy has one for all that is private.
    const auto image = memory.arena.freeze(Arena::Files::kCopied);
    const u64 there = host_mappings();
    Memory copy(Files::kMapped);
    copy.arena.adopt(image);
    copy.restore(memory.state());
    CHECK(host_mappings() - there <= 3);
    CHECK(copy.space->load(kAt + 2 * 2999 * kPageSize, byte) && byte == 3);
    // Areas have an end, too.
    CHECK(memory.space->map(request(u64{1} << 30, 0)) > 0);
    s64 result = 0;
    for (u64 n = 0; n < 40000 && result == 0; ++n) {
        result = memory.space->unmap(kAt + (2 * n + 1) * kPageSize, kPageSize);
    }
    CHECK_EQ(result, s64{-ENOMEM});
    CHECK(memory.space->areas().size() <= AddressSpace::kMostAreas);
}

// Of CPU time.
double microseconds() {
    timespec now{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) / 1e3;
}

void costs() {
    constexpr u64 kBytes = 30 * kMega, kTouched = 50;
    Memory memory(Files::kMapped);
    CHECK(memory.space->map(request(kBytes)) > 0);
    for (u64 at = 0; at < kBytes; at += kPageSize) *memory.access(kAt + at, true) = 1;
    auto sparse = request(64 * kMega);
    sparse.address = kAt + 64 * kMega;
    CHECK(memory.space->map(sparse) > 0);
    CHECK(memory.access(sparse.address + kMega, true) != nullptr);
    double start = microseconds();
    const auto image = memory.arena.freeze(Arena::Files::kCopied);
    std::fprintf(stderr, "freeze: %.0f us per MB\n", (microseconds() - start) / (kBytes / kMega));
    CHECK(image->bytes() < kBytes + 2 * kMega);
    Memory child(Files::kMapped);
    start = microseconds();
    child.arena.adopt(image);
    child.restore(memory.state());
    std::fprintf(stderr, "adopt: %.0f us\n", microseconds() - start);
    const Memory::State state = child.state();
    u64 sum = 0;
    for (u64 at = 0; at < kBytes / 4; at += kPageSize) sum += *child.access(kAt + at, false);
    CHECK_EQ(sum, kBytes / 4 / kPageSize);
    double best = 1e9;
    for (int n = 0; n < 20; ++n) {
        for (u64 page = 0; page < kTouched; ++page)
            *child.access(kAt + page * 37 * kPageSize, true) = 2;
        start = microseconds();
        child.arena.reset();
        child.space->restore(state.space);
        best = std::min(best, microseconds() - start);
        for (u64 page = 0; page < kTouched; ++page) {
            CHECK_EQ(*child.access(kAt + page * 37 * kPageSize, false), u8{1});
        }
    }
    std::fprintf(stderr, "reset: %.0f us, 50 pages written, a quarter of 30 MB read\n", best);
}

}  // namespace

int main() {
    given_in_pieces();
    limits();
    shared_limit();
    files(Files::kMapped);
    files(Files::kCopied);
    bad_tables();
    few_files();
    few_host_mappings();
    costs();
    return pvtest::finish("memory rules");
}
