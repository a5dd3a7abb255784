// What a hit costs in the tagged TLB (mmu/tlb.hpp) and in shadow tables (mmu/shadow.hpp), beside
// the page walk that they save, over the same random addresses. Prints one "name nanoseconds" a
// line: CPU time of one lookup, the best of several turns. bench_mmu_tlb.py builds and runs it.
#include <ctime>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "mmu/shadow.hpp"
#include "mmu/tlb.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kLookups = 1 << 16;
constexpr int kTurns = 40;
constexpr u64 kTableFlags = kPtePresent | kPteWritable | kPteUser | kPteAccessed | kPteDirty;

double cpu_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

/// `one` takes an address and gives one; what it gives is added up, so that nothing is left out.
template <class One>
double best_of(const std::vector<u64>& gvas, One one) {
    double best = 1e9;
    for (int turn = 0; turn < kTurns; ++turn) {
        u64 sum = 0;
        double start = cpu_seconds();
        for (u64 gva : gvas) sum += one(gva);
        best = std::min(best, cpu_seconds() - start);
        asm volatile("" : : "r"(sum));
    }
    return best / static_cast<double>(gvas.size()) * 1e9;
}

/// Random addresses in `pages` pages of 2^shift from `base` on.
std::vector<u64> addresses(u64 base, u64 pages, unsigned shift) {
    std::mt19937_64 random(1);
    std::vector<u64> gvas(kLookups);
    for (u64& gva : gvas) gva = base + (random() % pages << shift) + random() % bit(shift);
    return gvas;
}

[[noreturn]] void missed(const char* where) {
    std::fprintf(stderr, "mmu_tlb: a lookup missed in %s\n", where);
    std::exit(1);
}

void tlb_hits(const char* name, u64 pages, u8 shift, bool global) {
    Tlb tlb;
    u64 base = 0x7f12'0000'0000;
    for (u64 n = 0; n < pages; ++n) {
        tlb.insert(base + (n << shift), 3,
                   {.address = bit(40) + (n << shift), .shift = shift, .global = global});
    }
    std::vector<u64> gvas = addresses(base, pages, shift);
    u64 hits = 0;
    double time = best_of(gvas, [&](u64 gva) {
        u64 address = 0;
        hits += tlb.lookup(gva, 3, TlbUse::kUserRead, address);
        return address;
    });
    if (hits != gvas.size() * kTurns) missed(name);
    std::printf("%s %.3f\n", name, time);
}

void shadow_hits() {
    constexpr u64 kRam = 64 << 20, kPages = 1024, kBase = 0x7f12'0000'0000;
    GuestMemory memory;
    memory.add(Gpa(0), kRam, "ram");
    u64 next = 0x1000, root = 0;
    auto table = [&] { return std::exchange(next, next + kPageSize); };
    root = table();
    for (u64 n = 0; n < kPages; ++n) {
        u64 at = root, gva = kBase + (n << 12);
        for (unsigned shift = 39; shift > 12; shift -= 9) {
            Gpa entry(at + (gva >> shift & 511) * 8);
            if (memory.load<u64>(entry) == 0) memory.store<u64>(entry, table() | kTableFlags);
            at = memory.load<u64>(entry) & kPteAddress;
        }
        memory.store<u64>(Gpa(at + (gva >> 12 & 511) * 8), (32 << 20 | n << 12) | kTableFlags);
    }
    PagingState paging = make_paging_state({.cr0 = bit(0) | bit(16) | bit(31),
                                            .cr3 = root,
                                            .cr4 = bit(5) | bit(7),
                                            .efer = bit(8) | bit(10) | bit(11)});
    std::vector<u64> gvas = addresses(kBase, kPages, 12);
    PageAccess access{.user = true};
    TableReader reader(memory);
    std::printf("walk %.3f\n", best_of(gvas, [&](u64 gva) {
                    WalkResult found = walk(reader, paging, gva, access);
                    if (found.fault) missed("a walk");
                    return found.page.gpa;
                }));
    HostMemory host(memory);
    ShadowMmu shadow(memory, host);
    shadow.load(paging);
    double fill = 1e9;
    for (int turn = 0; turn < kTurns; ++turn) {
        shadow.clear();
        double start = cpu_seconds();
        for (u64 n = 0; n < kPages; ++n) {
            if (shadow.fault(kBase + (n << 12), access).outcome != ShadowFault::kInstalled) {
                missed("a fault");
            }
        }
        fill = std::min(fill, cpu_seconds() - start);
    }
    std::printf("shadow_fault %.3f\n", fill / kPages * 1e9);
    std::printf("shadow %.3f\n", best_of(gvas, [&](u64 gva) {
                    ShadowHit hit = shadow.lookup(gva, access);
                    if (!hit.ok) missed("shadow tables");
                    return hit.address;
                }));
}

}  // namespace

int main() {
    tlb_hits("tlb_4k", 512, 12, false);
    tlb_hits("tlb_4k_full", 1024, 12, false);
    tlb_hits("tlb_4k_global", 512, 12, true);
    tlb_hits("tlb_2m", 64, 21, false);
    tlb_hits("tlb_1g", 8, 30, false);
    shadow_hits();
}
