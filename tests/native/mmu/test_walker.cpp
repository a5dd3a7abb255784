// The walker against a second, deliberately simple model written from the manual's tables: random
// tables in a small memory (so that they alias, cycle and point outside), random control bits and
// accesses; translation, error code and accessed/dirty bits must agree. Then named cases.
#include <atomic>
#include <chrono>
#include <random>
#include <thread>

#include "check.hpp"
#include "mmu/walker.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kMemory = 64 * kPageSize;

struct Controls {
    PagingMode mode;
    bool wp, nxe, smep, smap, pke, pse, pge;
    u32 pkru;
    u64 cr3;
    u64 pdpte[4];
    unsigned maxphyaddr;
};

PagingState state_of(const Controls& c) {
    PagingRegisters r;
    r.cr0 = bit(0) | bit(31) | (c.wp ? bit(16) : 0);
    r.cr4 = (c.mode != PagingMode::k32Bit ? bit(5) : 0) | (c.pse ? bit(4) : 0) |
            (c.pge ? bit(7) : 0) | (c.mode == PagingMode::k5Level ? bit(12) : 0) |
            (c.smep ? bit(20) : 0) | (c.smap ? bit(21) : 0) | (c.pke ? bit(22) : 0);
    r.efer = (c.mode >= PagingMode::k4Level ? bit(10) | bit(8) : 0) | (c.nxe ? bit(11) : 0);
    r.cr3 = c.cr3;
    r.pkru = c.pkru;
    r.physical_mask = bit(c.maxphyaddr) - 1;
    r.pdpte = c.pdpte;
    return make_paging_state(r);
}

struct Model {
    GuestMemory& memory;
    const Controls& c;
    bool fault = false;
    u32 error = 0;
    u64 gpa = 0;
    unsigned shift = 0;

    u64 read(u64 gpa, unsigned size) {
        if (gpa + size > kMemory) return size == 4 ? 0xffffffff : ~u64{0};
        return size == 4 ? memory.load<u32>(Gpa(gpa)) : memory.load<u64>(Gpa(gpa));
    }
    void write(u64 gpa, unsigned size, u64 value) {
        if (gpa + size > kMemory) return;
        if (size == 4) {
            memory.store<u32>(Gpa(gpa), static_cast<u32>(value));
        } else {
            memory.store<u64>(Gpa(gpa), value);
        }
    }

    // Level numbers as in the manual: 1 is the PTE.
    void run(u64 gva, PageAccess a) {
        bool ia32e = c.mode >= PagingMode::k4Level;
        bool narrow = c.mode == PagingMode::k32Bit;
        unsigned size = narrow ? 4 : 8;
        unsigned index_bits = narrow ? 10 : 9;
        int level = narrow                          ? 2
                    : c.mode == PagingMode::kPae    ? 2
                    : c.mode == PagingMode::k4Level ? 4
                                                    : 5;
        u32 base = (a.write ? 2 : 0) | (a.user ? 4 : 0) |
                   (a.fetch && (c.smep || (c.nxe && !narrow)) ? 16 : 0);
        auto fail = [&](u32 e) { fault = true, error = base | e; };
        u64 table = narrow ? c.cr3 & 0xfffff000 : c.cr3 & 0xffffffffff000;
        if (c.mode == PagingMode::kPae) {
            u64 pdpte = c.pdpte[(gva >> 30) & 3];
            if (!(pdpte & 1)) return fail(0);
            table = pdpte & 0xffffffffff000;
        }
        bool user = true, writable = true, nx = false;
        std::vector<u64> used;
        u64 entry;
        for (;; --level) {
            unsigned at = 12 + index_bits * (level - 1);
            u64 where = table + ((gva >> at) & ((1u << index_bits) - 1)) * size;
            used.push_back(where);
            entry = read(where, size);
            if (!(entry & 1)) return fail(0);
            bool large = false, reserved = false;
            if (level > 1 && (entry & 0x80)) {
                if (level >= 4) reserved = true;
                if (level == 3) large = true;
                if (level == 2) large = !narrow || c.pse;
            }
            if (!narrow) {
                for (unsigned b = c.maxphyaddr; b < 52; ++b) reserved |= (entry >> b) & 1;
                if (!ia32e) {
                    for (unsigned b = 52; b < 63; ++b) reserved |= (entry >> b) & 1;
                }
                if (!c.nxe) reserved |= entry >> 63;
                if (large) {
                    for (unsigned b = 13; b < at; ++b) reserved |= (entry >> b) & 1;
                }
            } else if (large) {
                reserved |= (entry >> 21) & 1;
                for (unsigned b = 13; b < 21; ++b) {
                    if (b - 13 + 32 >= c.maxphyaddr) reserved |= (entry >> b) & 1;
                }
            }
            if (reserved) return fail(1 | 8);
            writable &= (entry >> 1) & 1;
            user &= (entry >> 2) & 1;
            nx |= !narrow && c.nxe && entry >> 63;
            if (large || level == 1) {
                shift = at;
                break;
            }
            table = narrow ? entry & 0xfffff000 : entry & 0xffffffffff000;
        }
        // Permissions, as SDM 3A 4.6.1 lists them.
        bool allowed;
        if (!a.user) {
            if (a.fetch) {
                allowed = user ? !c.smep && !nx : !nx;
            } else if (user && c.smap && !(a.ac && !a.implicit)) {
                allowed = false;
            } else {
                allowed = !a.write || !c.wp || writable;
            }
        } else if (a.fetch) {
            allowed = user && !nx;
        } else {
            allowed = user && (!a.write || writable);
        }
        u32 e = allowed ? 0 : 1;
        if (ia32e && c.pke && user && !a.fetch) {
            u32 pk = (c.pkru >> (((entry >> 59) & 15) * 2)) & 3;
            if ((pk & 1) || ((pk & 2) && a.write && (a.user || c.wp))) e |= 1 | 32;
        }
        if (e) return fail(e);
        u64 low = (u64{1} << shift) - 1;
        u64 page = entry & 0xffffffffff000 & ~low;
        if (narrow && shift == 22) page = (entry & 0xffc00000) | ((entry >> 13) & 0xff) << 32;
        gpa = page | (gva & low);
        for (size_t n = 0; n < used.size(); ++n) {
            // Tables may alias: an entry used twice keeps both updates.
            u64 now = read(used[n], size);
            write(used[n], size, now | 32 | (n + 1 == used.size() && a.write ? 64 : 0));
        }
    }
};

void random_tables(u32 seed, int rounds) {
    std::mt19937_64 rng(seed);
    auto coin = [&](int n) { return rng() % n == 0; };
    u64 outcomes[2]{}, reserved = 0, keys = 0;
    for (int round = 0; round < rounds; ++round) {
        GuestMemory one, two;
        one.add(Gpa(0), kMemory, "ram");
        two.add(Gpa(0), kMemory, "ram");
        Controls c{};
        c.mode = static_cast<PagingMode>(1 + rng() % 4);
        c.wp = rng() & 1, c.nxe = rng() & 1, c.smep = rng() & 1, c.smap = rng() & 1;
        c.pke = rng() & 1, c.pse = rng() & 1, c.pge = rng() & 1;
        c.maxphyaddr = coin(2) ? 36 : coin(2) ? 40 : 52;
        c.pkru = static_cast<u32>(rng());
        auto page = [&] { return (coin(30) ? 64 + rng() % 4 : rng() % 64) * kPageSize; };
        c.cr3 = page();
        for (u64& p : c.pdpte) p = coin(8) ? 0 : page() | 1;
        bool narrow = c.mode == PagingMode::k32Bit;
        for (u64 at = 0; at < kMemory; at += 8) {
            auto make = [&] {
                u64 e = page() | (rng() & 0xf7e) | 1;
                if (coin(20)) e &= ~u64{1};
                if (!coin(6)) e &= ~u64{0x80};
                if (coin(2)) e |= 6;
                return e;
            };
            u64 e = make();
            if (narrow) {
                if (coin(20)) e |= rng() & 0x3fe000;
                e |= make() << 32;
            } else {
                if (c.nxe && coin(4)) e |= u64{1} << 63;
                if (c.mode != PagingMode::kPae) e |= (rng() & 0x7ff) << 52;
                if (coin(100)) e |= u64{1} << (rng() % 64);
                if ((e & 0x80) && !coin(3)) e &= ~u64{0x1fe000};
            }
            one.store<u64>(Gpa(at), e);
            two.store<u64>(Gpa(at), e);
        }
        TableReader tables(one);
        PagingState s = state_of(c);
        for (int n = 0; n < 400; ++n) {
            PageAccess a;
            a.user = rng() & 1;
            a.fetch = coin(4);
            a.write = !a.fetch && coin(2);
            a.implicit = !a.user && coin(3);
            a.ac = rng() & 1;
            u64 gva = rng();
            if (narrow || c.mode == PagingMode::kPae) gva &= 0xffffffff;
            Model model{two, c};
            WalkResult pure = walk_pure(tables, s, gva, a);
            model.run(gva, a);
            WalkResult got = walk(tables, s, gva, a);
            ++outcomes[got.fault];
            CHECK_EQ(got.fault, model.fault);
            CHECK_EQ(pure.fault, model.fault);
            if (model.fault) {
                CHECK_EQ(got.error, model.error);
                CHECK_EQ(pure.error, model.error);
                reserved += (got.error & 8) != 0;
                keys += (got.error & 32) != 0;
                continue;
            }
            CHECK_EQ(got.page.gpa, model.gpa);
            CHECK_EQ(pure.page.gpa, model.gpa);
            CHECK_EQ(unsigned{got.page.shift}, model.shift);
            if (a.write) CHECK(got.page.store_ok);
            // store_ok promises what a store by the same access would get.
            PageAccess store = a;
            store.fetch = false, store.write = true;
            if (!a.fetch) CHECK_EQ(got.page.store_ok, !walk_pure(tables, s, gva, store).fault);
        }
        for (u64 at = 0; at < kMemory; at += 8) {
            if (one.load<u64>(Gpa(at)) != two.load<u64>(Gpa(at))) {
                CHECK_EQ(one.load<u64>(Gpa(at)), two.load<u64>(Gpa(at)));
            }
        }
        if (pvtest::failures) break;
    }
    // The generator must reach every kind of outcome, or the comparison proves little.
    CHECK(outcomes[0] > 1000 && outcomes[1] > 1000 && reserved > 100 && keys > 100);
}

struct Tables4 {
    GuestMemory memory;
    TableReader tables{memory};
    PagingRegisters r;
    Tables4() {
        memory.add(Gpa(0), 16 * kPageSize, "ram");
        r.cr0 = bit(0) | bit(31) | bit(16);
        r.cr4 = bit(5) | bit(7);
        r.efer = bit(8) | bit(10) | bit(11);
        r.cr3 = 0x1000;
        memory.store<u64>(Gpa(0x1000), 0x2007);
        memory.store<u64>(Gpa(0x2000), 0x3007);
        memory.store<u64>(Gpa(0x3000), 0x4007);
        memory.store<u64>(Gpa(0x4000 + 5 * 8), 0x6007);
    }
};

void named_cases() {
    Tables4 t;
    PagingState s = make_paging_state(t.r);
    CHECK_EQ(s.mode, PagingMode::k4Level);
    // A faulting access sets no accessed bit.
    t.memory.store<u64>(Gpa(0x4028), 0x6005);
    CHECK_EQ(walk(t.tables, s, 0x5123, {.write = true, .user = true}).error, 7u);
    CHECK_EQ(t.memory.load<u64>(Gpa(0x1000)), 0x2007u);
    CHECK_EQ(t.memory.load<u64>(Gpa(0x4028)), 0x6005u);
    // A read sets A but not D; a write then sets D.
    WalkResult r = walk(t.tables, s, 0x5123, {.user = true});
    CHECK(r.ok() && r.page.gpa == 0x6123 && !r.page.dirty && !r.page.store_ok);
    CHECK_EQ(t.memory.load<u64>(Gpa(0x1000)), 0x2027u);
    CHECK_EQ(t.memory.load<u64>(Gpa(0x4028)), 0x6025u);
    t.memory.store<u64>(Gpa(0x4028), 0x6127);
    r = walk(t.tables, s, 0x5123, {.write = true});
    CHECK(r.ok() && r.page.dirty && r.page.global && r.page.store_ok);
    CHECK_EQ(t.memory.load<u64>(Gpa(0x4028)), 0x6167u);
    // WP off: the supervisor writes to a read-only page, the user does not.
    t.memory.store<u64>(Gpa(0x4028), 0x6005);
    PagingRegisters no_wp = t.r;
    no_wp.cr0 &= ~bit(16);
    s = make_paging_state(no_wp);
    CHECK(walk(t.tables, s, 0x5000, {.write = true}).ok());
    CHECK(walk(t.tables, s, 0x5000, {.write = true, .user = true}).fault);
    // A table that points to itself ends after four levels.
    t.memory.store<u64>(Gpa(0x1000 + 511 * 8), 0x1007);
    s = make_paging_state(t.r);
    r = walk(t.tables, s, 0xffff'ffff'ffff'f000, {});
    CHECK(r.ok() && r.page.gpa == 0x1000);
    // A root outside memory reads as ones: reserved bits.
    PagingRegisters away = t.r;
    away.cr3 = 0x7'0000'0000;
    CHECK_EQ(walk(t.tables, make_paging_state(away), 0x5000, {}).error, 9u);
    // A20: addresses and table loads lose bit 20.
    PagingRegisters a20 = t.r;
    a20.a20_mask = ~bit(20);
    a20.cr3 = 0x101000;
    t.memory.store<u64>(Gpa(0x4028), 0x106007);
    r = walk(t.tables, make_paging_state(a20), 0x5000, {});
    CHECK(r.ok() && r.page.gpa == 0x6000);
    // 1 GB page, and the same entry where they are not supported.
    t.memory.store<u64>(Gpa(0x2000 + 3 * 8), 0x4000'0087);
    r = walk(t.tables, s, 0xc123'4567, {});
    CHECK(r.ok() && r.page.gpa == 0x4123'4567 && r.page.shift == 30);
    PagingRegisters small = t.r;
    small.pages_1gb = false;
    CHECK_EQ(walk(t.tables, make_paging_state(small), 0xc123'4567, {}).error, 9u);
    // PAT index: PWT, PCD and the PAT bit, which moves with the page size.
    t.memory.store<u64>(Gpa(0x4028), 0x609f);
    CHECK_EQ(+walk_pure(t.tables, s, 0x5000, {}).page.memory_type, 7);
    // Tables in read-only memory are used but never written.
    GuestMemory rom;
    rom.add(Gpa(0), 8 * kPageSize, "rom", true);
    rom.store<u64>(Gpa(0x1000), 0x2007);
    rom.store<u64>(Gpa(0x2000), 0x3007);
    rom.store<u64>(Gpa(0x3000), 0x87);
    TableReader rom_tables(rom);
    r = walk(rom_tables, s, 0x1234, {.write = true});
    CHECK(r.ok() && !r.page.dirty && r.page.gpa == 0x1234);
    CHECK_EQ(rom.load<u64>(Gpa(0x3000)), 0x87u);
    // A trace names every entry.
    WalkTrace trace;
    walk_trace(t.tables, s, 0x5000, {}, trace);
    CHECK_EQ(+trace.count, 4);
    CHECK_EQ(trace.steps[3].gpa, 0x4028u);
    // No paging.
    s = make_paging_state({});
    CHECK_EQ(walk(t.tables, s, 0x1'2345'6789, {.write = true, .user = true}).page.gpa, 0x23456789u);
    // PDPTEs: reserved bits matter only when present.
    CHECK(pdpte_valid(0x1000 | 1, bit(36) - 1));
    CHECK(!pdpte_valid(0x1000 | 3, bit(36) - 1));
    CHECK(!pdpte_valid(bit(36) | 1, bit(36) - 1));
    CHECK(pdpte_valid(bit(36) | 2, bit(36) - 1));
}

// Every kind of fault: the leaf's bits beyond P and the address, the access, CR4 bits beyond PAE,
// and the error code (0: goes through). SDM 3A 4.6 and 4.7.
void fault_kinds() {
    constexpr u64 kSmep = bit(20), kSmap = bit(21), kPke = bit(22), kPks = bit(24);
    constexpr u64 kKey3 = u64{3} << 59, kNx = bit(63);
    constexpr u32 kPrivate = 1 << 6, kNoWrite = 2 << 6;  // rights of key 3: AD, WD
    struct Case {
        u64 leaf;
        PageAccess access;
        u64 cr4;
        u32 pkru, pkrs;
        u32 error;
        bool wp = true;
    };
    const Case cases[] = {
        {6, {.write = true, .user = true}, 0, 0, 0, 0},
        {2, {.user = true}, 0, 0, 0, 5},
        {4, {.write = true, .user = true}, 0, 0, 0, 7},
        {4, {.write = true}, 0, 0, 0, 3},
        {4, {.write = true}, 0, 0, 0, 0, false},
        {6 | kNx, {.fetch = true, .user = true}, 0, 0, 0, 21},
        {6 | kNx, {.fetch = true}, 0, 0, 0, 17},
        {6 | kNx, {.user = true}, 0, 0, 0, 0},
        {6, {.fetch = true}, kSmep, 0, 0, 17},
        {2, {.fetch = true}, kSmep, 0, 0, 0},
        {6, {.fetch = true}, kSmap, 0, 0, 0},
        {6, {}, kSmap, 0, 0, 1},
        {6, {.ac = true}, kSmap, 0, 0, 0},
        {6, {.implicit = true, .ac = true}, kSmap, 0, 0, 1},
        {6, {.user = true}, kSmap | kSmep, 0, 0, 0},
        {6 | kKey3, {.user = true}, kPke, kPrivate, 0, 37},
        {6 | kKey3, {}, kPke, kPrivate, 0, 33},
        {6 | kKey3, {.fetch = true, .user = true}, kPke, kPrivate, 0, 0},
        {6 | kKey3, {.user = true}, kPke, kNoWrite, 0, 0},
        {6 | kKey3, {.write = true, .user = true}, kPke, kNoWrite, 0, 39},
        {6 | kKey3, {.write = true}, kPke, kNoWrite, 0, 35},
        {6 | kKey3, {.write = true}, kPke, kNoWrite, 0, 0, false},
        {6 | kKey3, {.write = true, .user = true}, kPke, kNoWrite, 0, 39, false},
        {6 | kKey3, {.user = true}, kPks, kPrivate, kPrivate, 0},  // PKS: supervisor pages only
        {2 | kKey3, {}, kPke, kPrivate, kPrivate, 0},              // PKE: user pages only
        {2 | kKey3, {}, kPks, 0, kPrivate, 33},
        {2 | kKey3, {.write = true}, kPks, 0, kNoWrite, 35},
        {2 | kKey3, {.write = true}, kPks, 0, kNoWrite, 0, false},
        {2 | kKey3, {.fetch = true}, kPks, 0, kPrivate, 0},
        {6 | bit(45), {.user = true}, 0, 0, 0, 13},
    };
    for (const Case& c : cases) {
        Tables4 t;
        t.memory.store<u64>(Gpa(0x4028), 0x6001 | c.leaf);
        t.r.cr4 |= c.cr4;
        t.r.pkru = c.pkru, t.r.pkrs = c.pkrs;
        if (!c.wp) t.r.cr0 &= ~bit(16);
        PagingState s = make_paging_state(t.r);
        CHECK_EQ(walk(t.tables, s, 0x5123, c.access).error, c.error);
        // A second time with the bits set, by the way that then is the usual one.
        WalkResult again = walk(t.tables, s, 0x5123, c.access);
        CHECK_EQ(again.error, c.error);
        CHECK_EQ(again.fault, c.error != 0);
    }
    // Keys need IA-32e paging.
    Tables4 t;
    t.r.cr4 |= kPke | kPks;
    t.r.efer = bit(11);
    CHECK(!make_paging_state(t.r).pke && !make_paging_state(t.r).pks);
}

// Setting A/D loses no bit that another CPU sets at the same moment.
void concurrent_bits() {
    Tables4 t;
    PagingState s = make_paging_state(t.r);
    auto* leaf = reinterpret_cast<std::atomic<u64>*>(t.memory.span(Gpa(0x4028), 8).data());
    std::atomic<bool> stop{false};
    std::thread other([&] {
        TableReader tables(t.memory);
        while (!stop) walk(tables, s, 0x5000, {});
    });
    for (int n = 0; n < 20000; ++n) {
        leaf->store(0x6007);
        u64 software = bit(9) | bit(10);
        leaf->fetch_or(software);
        WalkResult r = walk(t.tables, s, 0x5000, {.write = true});
        u64 now = leaf->load();
        if (!r.ok() || (now & (software | 0x60)) != (software | 0x60)) {
            CHECK_EQ(now, 0x6067 | software);
            break;
        }
    }
    stop = true;
    other.join();
    CHECK_EQ(leaf->load(), 0x6667u);
}

void speed() {
    Tables4 t;
    PagingState s = make_paging_state(t.r);
    walk(t.tables, s, 0x5000, {.write = true});
    auto start = std::chrono::steady_clock::now();
    constexpr int kRounds = 200'000;
    u64 sum = 0;
    for (int n = 0; n < kRounds; ++n) sum += walk(t.tables, s, 0x5000 + (n & 0xfff), {}).page.gpa;
    auto ns = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start);
    std::fprintf(stderr, "walk: %.1f ns warm (%d)\n", ns.count() / kRounds,
                 static_cast<int>(sum & 1));
}

}  // namespace

int main() {
    named_cases();
    fault_kinds();
    random_tables(1, 60);
    concurrent_bits();
    speed();
    return pvtest::finish("test_walker");
}
