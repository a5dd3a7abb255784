// How fast native/mmu walks page tables, and the limit: the least loop that loads four entries one
// after another and checks nothing, over the same tables and the same random addresses. Prints one
// "name million-walks-per-second" a line: CPU time, the best of several turns that take their turn
// one after another, so that what else the host does hits all alike. bench_mmu_walk.py runs it:
//
//     mmu_walk flat|ept|npt 16M|1G
#include <ctime>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "memory/guest_memory.hpp"
#include "mmu/bulk.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kWalks = 1 << 20;  ///< addresses of one turn
constexpr int kTurns = 15;
constexpr u64 kBase = 0x7f12'0000'0000;  ///< where the guest's pages start
constexpr u64 kRam = u64{2} << 30;       ///< only what holds tables is ever touched

double cpu_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

/// Hands out the pages of a physical address space in random order, but not page 0.
class Pages {
  public:
    Pages(u64 seed, u64 size) : random(seed), pages_(size / kPageSize - 1) {
        std::iota(pages_.begin(), pages_.end(), u64{1});
        std::shuffle(pages_.begin(), pages_.end(), random);
    }
    u64 take() {
        u64 page = pages_.back() * kPageSize;
        pages_.pop_back();
        return page;
    }
    std::mt19937_64 random;

  private:
    std::vector<u64> pages_;
};

/// Four-level tables with 4 KiB pages, anywhere in memory.
struct Tables {
    GuestMemory& memory;
    Pages& pages;
    u64 table_flags, page_flags;
    std::function<u64(u64)> place = [](u64 address) { return address; };  ///< where it really is
    u64 root = pages.take();

    void map(u64 from, u64 to) {
        u64 table = root;
        for (unsigned shift = 39; shift > 12; shift -= 9) {
            Gpa at(place(table + bits(from, shift + 8, shift) * 8));
            u64 entry = memory.load<u64>(at);
            if (!(entry & 1)) {
                entry = pages.take() | table_flags;
                memory.store<u64>(at, entry);
            }
            table = entry & kPteAddress;
        }
        memory.store<u64>(Gpa(place(table + bits(from, 20, 12) * 8)), to | page_flags);
    }
};

/// The limit. No entry is looked at, only followed.
[[gnu::noinline]] void minimal(const u8* ram, u64 cr3, const u64* gvas, u64* gpas, u64 count) {
    auto load = [ram](u64 table, u64 index) {
        return *reinterpret_cast<const u64*>(ram + (table & kPteAddress) + index * 8);
    };
    for (u64 n = 0; n < count; ++n) {
        u64 gva = gvas[n];
        u64 entry = load(cr3, gva >> 39 & 511);
        entry = load(entry, gva >> 30 & 511);
        entry = load(entry, gva >> 21 & 511);
        entry = load(entry, gva >> 12 & 511);
        gpas[n] = (entry & kPteAddress) | (gva & kPageMask);
    }
}

struct Contender {
    std::string name;
    std::function<void()> walk_all;
    double best = 1e9;
    std::vector<u64> found = std::vector<u64>(kWalks);
};

/// Lets all take turns, prints their rates, and checks that they found the same as the first.
void race(std::vector<Contender>& contenders, const u64* expected) {
    for (int turn = 0; turn < kTurns; ++turn) {
        for (Contender& c : contenders) {
            double before = cpu_seconds();
            c.walk_all();
            c.best = std::min(c.best, cpu_seconds() - before);
        }
    }
    for (Contender& c : contenders) {
        if (!std::equal(c.found.begin(), c.found.end(), expected)) {
            std::fprintf(stderr, "%s found something else\n", c.name.c_str());
            std::exit(1);
        }
        std::printf("%s %.2f\n", c.name.c_str(), kWalks / c.best / 1e6);
    }
}

void one_dimension(u64 size) {
    GuestMemory memory;
    memory.add(Gpa(0), kRam, "ram");
    Pages pages(1, kRam);
    Tables guest{memory, pages, 0x67, 0x67};
    std::vector<u64> expected(kWalks), gvas(kWalks), target(size / kPageSize);
    for (u64 page = 0; page < target.size(); ++page) {
        target[page] = pages.take();
        guest.map(kBase + page * kPageSize, target[page]);
    }
    for (u64 n = 0; n < kWalks; ++n) {
        u64 offset = pages.random() % size;
        gvas[n] = kBase + offset;
        expected[n] = target[offset / kPageSize] + offset % kPageSize;
    }
    TableReader tables(memory);
    // All that can be checked is: a user's write, SMEP, SMAP, NX, keys.
    PagingState paging = make_paging_state({.cr0 = bit(0) | bit(16) | bit(31),
                                            .cr3 = guest.root,
                                            .cr4 = bit(5) | bit(7) | bit(20) | bit(21) | bit(22),
                                            .efer = bit(8) | bit(10) | bit(11)});
    constexpr PageAccess kStore{.write = true, .user = true};

    std::vector<Contender> contenders(5);
    auto* c = contenders.data();
    const u8* ram = memory.span(Gpa(0), kRam).data();
    c[0] = {"minimal", [=, &gvas, root = guest.root] {
                minimal(ram, root, gvas.data(), c[0].found.data(), kWalks);
            }};
    auto single = [&](u64* found, auto walk_one) {
        for (u64 n = 0; n < kWalks; ++n) {
            WalkResult result = walk_one(tables, paging, gvas[n], kStore);
            found[n] = result.ok() ? result.page.gpa : kNoTranslation;
        }
    };
    c[1] = {"walk", [&, c] { single(c[1].found.data(), walk); }};
    c[2] = {"walk_pure", [&, c] { single(c[2].found.data(), walk_pure); }};
    c[3] = {"walk_many", [&, c] { walk_many(tables, paging, gvas, kStore, c[3].found); }};
    c[4] = {"walk_many_set",
            [&, c] { walk_many(tables, paging, gvas, kStore, c[4].found, BulkEffects::kSet); }};
    race(contenders, expected.data());
}

void two_dimensions(u64 size, bool npt) {
    GuestMemory memory;
    memory.add(Gpa(0), kRam, "ram");
    // Guest-physical page n is host-physical page of[n]: a random one, as are the tables' own.
    constexpr u64 kGuestRam = kRam / 2;
    Pages host(2, kRam), physical(3, kGuestRam);
    std::vector<u64> of(kGuestRam / kPageSize);
    for (u64& page : of) page = host.take();
    auto at = [&](u64 gpa) { return of[gpa / kPageSize] + gpa % kPageSize; };
    Tables second{memory, host, npt ? 0x67u : 0x107u, npt ? 0x67u : 0x337u};
    for (u64 page = 0; page < of.size(); ++page) second.map(page * kPageSize, of[page]);

    Tables first{memory, physical, 0x67, 0x67, at};
    std::vector<u64> expected(kWalks), gvas(kWalks);
    std::vector<u64> target(size / kPageSize);
    for (u64 page = 0; page < target.size(); ++page) {
        target[page] = physical.random() % (kGuestRam / kPageSize) * kPageSize;
        first.map(kBase + page * kPageSize, target[page]);
    }
    for (u64 n = 0; n < kWalks; ++n) {
        u64 offset = physical.random() % size;
        gvas[n] = kBase + offset;
        expected[n] = at(target[offset / kPageSize] + offset % kPageSize);
    }
    TableReader tables(memory);
    PagingRegisters registers{.cr0 = bit(0) | bit(16) | bit(31),
                              .cr3 = first.root,
                              .cr4 = bit(5) | bit(7) | bit(20) | bit(21),
                              .efer = bit(8) | bit(10) | bit(11)};
    PagingState guest = make_paging_state(registers);
    registers.cr3 = second.root;
    SecondDimension dimension = NptState{make_paging_state(registers)};
    if (!npt) dimension = make_ept_state(second.root | bit(6) | 3 << 3 | 6);
    constexpr PageAccess kStore{.write = true, .user = true};

    std::vector<Contender> contenders(2);
    auto* c = contenders.data();
    c[0] = {"walk_nested", [&, c] {
                for (u64 n = 0; n < kWalks; ++n) {
                    NestedResult r = walk_nested(tables, guest, dimension, gvas[n], kStore);
                    c[0].found[n] = r.ok() ? r.hpa : kNoTranslation;
                }
            }};
    c[1] = {"walk_many_nested", [&, c] {
                walk_many_nested(tables, guest, dimension, gvas, kStore, c[1].found,
                                 BulkEffects::kSet);
            }};
    race(contenders, expected.data());
}

}  // namespace

int main(int argc, char** argv) {
    std::string kind = argc > 1 ? argv[1] : "", size = argc > 2 ? argv[2] : "";
    u64 bytes = size == "16M" ? u64{16} << 20 : size == "1G" ? u64{1} << 30 : 0;
    if (bytes && kind == "flat") {
        one_dimension(bytes);
    } else if (bytes && (kind == "ept" || kind == "npt")) {
        two_dimensions(bytes, kind == "npt");
    } else {
        std::fprintf(stderr, "usage: mmu_walk flat|ept|npt 16M|1G\n");
        return 2;
    }
}
