// Shadow tables, one case each: what the random guest of test_shadow.cpp seldom or never comes to,
// and what a table costs (faults, tracked stores, tables) rather than what it says.
#include <algorithm>
#include <unordered_map>
#include <vector>

#include "check.hpp"
#include "mmu/shadow.hpp"
#include "random.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kRam = 16 << 20;
constexpr u64 kTable = kPtePresent | kPteWritable | kPteUser;
constexpr u64 kPage = kTable;
constexpr PageAccess kRead{}, kWrite{.write = true}, kUserRead{.user = true};

struct CountingHost : HostMemory {
    using HostMemory::HostMemory;
    int flushes = 0;
    u8 largest = 12;
    std::optional<Page> host_page(u64 gpa, bool write, u8 shift) override {
        return HostMemory::host_page(gpa, write, std::min(shift, largest));
    }
    void flush() override { ++flushes; }
};

/// A guest with 4-level tables that it makes as it needs them, from 1 MB up.
struct Guest {
    GuestMemory memory;
    GuestMemory::Region& ram = memory.add(Gpa(0), kRam, "ram", false, HugePages::kTransparent);
    CountingHost host{memory};
    ShadowMmu shadow;
    TableReader reader{memory};
    u64 next_table = 0x10'0000;
    u64 cr3 = new_table();
    PagingState paging;

    explicit Guest(u32 max_pages = 4096) : shadow(memory, host, {.max_pages = max_pages}) {
        load(cr3);
    }
    void load(u64 root, u64 cr4 = 0) {
        paging = make_paging_state({.cr0 = bit(0) | bit(16) | bit(31),
                                    .cr3 = root,
                                    .cr4 = bit(5) | bit(7) | cr4,
                                    .efer = bit(8) | bit(10) | bit(11)});
        shadow.load(paging);
    }
    u64 new_table() {
        next_table += kPageSize;
        return next_table - kPageSize;
    }
    u64 entry_at(u64 root, u64 gva, unsigned level) {
        u64 table = root;
        for (unsigned n = 4;; --n) {
            u64 at = table + (gva >> (3 + 9 * n) & 511) * 8;
            if (n == level) return at;
            u64 entry = memory.load<u64>(Gpa(at));
            if (!(entry & kPtePresent)) {
                entry = new_table() | kTable;
                store(at, entry);
            }
            table = entry & kPteAddress;
        }
    }
    /// As a guest does that is told of its tables being tracked.
    void store(u64 gpa, u64 value) {
        memory.store(Gpa(gpa), value);
        shadow.write_tracked(gpa, 8);
    }
    void map(u64 gva, u64 gpa, u64 rights = kPage, unsigned level = 1) {
        store(entry_at(cr3, gva, level), gpa | rights | (level > 1 ? u64{kPtePageSize} : 0));
    }
    ShadowFault::Outcome fault(u64 gva, PageAccess access = kRead) {
        return shadow.fault(gva, access).outcome;
    }
    bool has(u64 gva, u64 gpa, PageAccess access = kRead) {
        ShadowHit hit = shadow.lookup(gva, access);
        return hit.ok && hit.address == reinterpret_cast<u64>(ram.host(gpa));
    }
    bool installs(u64 gva, u64 gpa, PageAccess access = kRead) {
        return fault(gva, access) == ShadowFault::kInstalled && has(gva, gpa, access);
    }
    void check() { CHECK_EQ(shadow.check(), std::string()); }
};

// The index against the standard one: keys that collide, and erasing in the middle of a run.
void test_map() {
    pvtest::Random r(7);
    ShadowMap map;
    std::unordered_map<u64, u32> want;
    for (int n = 0; n < 200'000; ++n) {
        u64 key = r.one_in(2) ? r.below(300) : u64{r.below(300)} << r.below(50);
        if (r.one_in(2)) {
            u32 value = r.below(1000);
            map.set(key, value);
            want[key] = value;
        } else {
            map.erase(key);
            want.erase(key);
        }
        key = r.below(300);
        auto found = want.find(key);
        CHECK_EQ(map.find(key), found == want.end() ? ShadowMap::kNone : found->second);
    }
    CHECK_EQ(map.size(), u64{want.size()});
    for (auto [key, value] : want) CHECK_EQ(map.find(key), value);
}

void test_accessed_and_dirty() {
    Guest g;
    g.map(0x1000, 0x5000);
    u64 pte = g.entry_at(g.cr3, 0x1000, 1);
    CHECK(g.installs(0x1234, 0x5234));
    CHECK_EQ(g.memory.load<u64>(Gpa(pte)), 0x5000 | kPage | kPteAccessed);
    CHECK(!g.has(0x1234, 0x5234, kWrite));  // D is the guest's to see first
    CHECK(g.installs(0x1234, 0x5234, kWrite));
    CHECK_EQ(g.memory.load<u64>(Gpa(pte)), 0x5000 | kPage | kPteAccessed | kPteDirty);
    g.store(pte, 0x5000 | kPage | kPteAccessed);  // the guest cleans the page
    CHECK(!g.has(0x1234, 0x5234, kWrite));
    CHECK(g.has(0x1234, 0x5234));
    g.store(pte, 0x5000 | kPage);
    CHECK(!g.has(0x1234, 0x5234));
    g.check();
}

// The life of a last-level table: tracked, let go at the first store, caught up with at the guest's
// invalidations.
void test_unsync() {
    Guest g;
    g.map(0x1000, 0x5000);
    u64 pte = g.entry_at(g.cr3, 0x1000, 1), table = align_down(pte, kPageSize);
    g.map(0x9000, table);  // where the guest edits it
    CHECK(g.installs(0x1000, 0x5000));
    CHECK(g.shadow.is_tracked(table));
    CHECK(g.installs(0x9000 + (pte & kPageMask), pte, kWrite));
    CHECK(!g.shadow.is_tracked(table));
    CHECK_EQ(g.shadow.stats().unsyncs, u64{1});

    g.memory.store(Gpa(pte), 0x6000 | kPage | kPteAccessed | kPteDirty);  // as the mapping allows
    CHECK(g.has(0x1000, 0x5000));                                         // like a TLB
    g.shadow.invlpg(0x1abc);
    CHECK(g.has(0x1000, 0x6000, kWrite));  // without another fault
    CHECK(g.has(0x9000, table, kWrite));   // and the next edit is free as well
    g.memory.store(Gpa(pte), u64{0});
    g.load(g.cr3);
    CHECK(!g.has(0x1000, 0x6000));
    CHECK(!g.has(0x9000, table, kWrite));
    CHECK(g.has(0x9000, table));
    CHECK(g.shadow.is_tracked(table));
    g.check();
}

// A directory that was unlinked while a table below it was let go: where it is linked next, nothing
// was ever cached.
void test_relinked_directory() {
    Guest g;
    g.map(0x1000, 0x5000);
    u64 pte = g.entry_at(g.cr3, 0x1000, 1), table = align_down(pte, kPageSize);
    g.map(0x4000'0000, table);  // to edit it, from another directory
    g.map(0x2000, 0x7000);
    CHECK(g.installs(0x1000, 0x5000));
    CHECK(g.installs(0x4000'0000, table, kWrite));
    g.memory.store(Gpa(pte), 0x6000 | kPage);
    u64 directory = g.memory.load<u64>(Gpa(g.entry_at(g.cr3, 0x1000, 3)));
    g.store(g.entry_at(g.cr3, 0x8000'1000, 3), directory);
    CHECK(g.installs(0x8000'2000, 0x7000));  // links the directory at 2 GB
    CHECK(!g.has(0x8000'1000, 0x5000));
    g.check();
}
void test_relinked_table() {
    Guest g;
    g.map(0x1000, 0x5000);
    g.map(0x2000, 0x5000);
    u64 pte = g.entry_at(g.cr3, 0x1000, 1), table = align_down(pte, kPageSize);
    g.map(0x4000'0000, table);
    CHECK(g.installs(0x1000, 0x5000));
    CHECK(g.installs(0x2000, 0x5000));
    CHECK(g.installs(0x4000'0000, table, kWrite));
    g.memory.store(Gpa(pte), 0x6000 | kPage | kPteAccessed);
    g.store(g.entry_at(g.cr3, 0x20'1000, 2), table | kTable);
    CHECK(g.installs(0x20'2000, 0x5000));  // links the table at 2 MB
    CHECK(!g.has(0x20'1000, 0x5000));
    g.check();
}

// What was a last-level table, and may be written, becomes a directory: never out of date from
// then.
void test_unsync_becomes_upper() {
    Guest g;
    g.map(0x1000, 0x5000);
    u64 pte = g.entry_at(g.cr3, 0x1000, 1), table = align_down(pte, kPageSize);
    g.map(0x4000'0000, table);
    CHECK(g.installs(0x1000, 0x5000));
    CHECK(g.installs(0x4000'0000, table, kWrite));
    CHECK(!g.shadow.is_tracked(table));
    u64 below = g.new_table();
    g.memory.store(Gpa(below), u64{0x7000} | kPage);
    g.memory.store(Gpa(table), below | kTable);
    g.store(g.entry_at(g.cr3, 0x8000'0000, 3), table | kTable);
    CHECK(g.installs(0x8000'0000, 0x7000));
    CHECK(g.shadow.is_tracked(table));
    CHECK(!g.has(0x4000'0000, table, kWrite));
    CHECK_EQ(g.fault(0x4000'0000, kWrite), ShadowFault::kStore);
    g.store(table, 0);
    CHECK(!g.has(0x8000'0000, 0x7000));
    g.check();
}

void test_large_pages() {
    Guest g;
    g.host.largest = 30;
    u64 base = 4 << 20, gva = u64{1} << 30;
    g.map(gva, base, kPage, 2);
    CHECK(g.installs(gva + 0x1234, base + 0x1234, kWrite));
    CHECK_EQ(g.shadow.lookup(gva, kRead).shift, 21);
    CHECK(g.has(gva + 0x1f'ffff, base + 0x1f'ffff, kWrite));

    // A table turns up inside: the rest stays writable, in small pages.
    u64 table = base + 0x3000;
    g.memory.store(Gpa(table), u64{0x5000} | kPage);
    g.store(g.entry_at(g.cr3, 0x20'0000, 2), table | kTable);
    CHECK(g.installs(0x20'0000, 0x5000));
    CHECK(!g.has(gva + 0x3000, table, kWrite));
    CHECK(!g.has(gva + 0x1000, base + 0x1000, kWrite));
    CHECK(g.installs(gva + 0x1000, base + 0x1000, kWrite));
    CHECK_EQ(g.shadow.lookup(gva + 0x1000, kRead).shift, 12);
    CHECK(!g.has(gva + 0x3000, table, kWrite));
    g.check();

    // The guest makes it small, and large again.
    u64 pde = g.entry_at(g.cr3, gva, 2), small = g.new_table();
    g.memory.store(Gpa(small), u64{0x8000} | kPage);
    g.store(pde, small | kTable);
    CHECK(!g.has(gva, base));
    CHECK(g.installs(gva, 0x8000));
    CHECK_EQ(g.fault(gva + 0x1000), ShadowFault::kGuestFault);
    g.store(pde, (base + (2 << 20)) | kPage | kPtePageSize);
    CHECK(g.installs(gva + 0x5000, base + (2 << 20) + 0x5000, kWrite));
    CHECK_EQ(g.shadow.lookup(gva, kRead).shift, 21);
    g.check();
}

// Memory that a host gives in blocks of 1 GB, of which only the tables exist.
void test_gigabyte_pages() {
    struct Huge : HostMemory {
        using HostMemory::HostMemory;
        u8 shift = 30;
        std::optional<Page> host_page(u64 gpa, bool, u8) override {
            return Page{.address = gpa + bit(40), .shift = shift};
        }
    };
    GuestMemory memory;
    memory.add(Gpa(0), 1 << 20, "ram");
    Huge host(memory);
    ShadowMmu shadow(memory, host);
    memory.store<u64>(Gpa(0x1000), 0x2000 | kTable);
    memory.store<u64>(Gpa(0x2000), bit(33) | kPage | kPtePageSize);
    shadow.load(make_paging_state(
        {.cr0 = bit(0) | bit(31), .cr3 = 0x1000, .cr4 = bit(5), .efer = bit(8) | bit(10)}));
    for (u8 shift : {30, 21, 12}) {
        host.shift = shift;
        u32 tables = shift == 30 ? 2 : shift == 21 ? 3 : 4;
        CHECK_EQ(shadow.fault(0x1234'5678, kWrite).outcome, ShadowFault::kInstalled);
        ShadowHit hit = shadow.lookup(0x1234'5678, kWrite);
        CHECK(hit.ok);
        CHECK_EQ(hit.shift, shift);
        CHECK_EQ(hit.address, bit(40) + bit(33) + 0x1234'5678);
        CHECK_EQ(shadow.pages_used(), tables);
        CHECK_EQ(shadow.check(), std::string());
        shadow.unmap(bit(33) + 0x1234'5000, kPageSize);
        CHECK(!shadow.lookup(0x1234'5678, kRead).ok);
    }
}

void test_unmap() {
    Guest g;
    g.map(0x1000, 0x5000);
    g.map(0x2000, 0x6000);
    CHECK(g.installs(0x1000, 0x5000));
    CHECK(g.installs(0x2000, 0x6000));
    g.shadow.unmap(0x5000, 1);
    CHECK(!g.has(0x1000, 0x5000));
    CHECK(g.has(0x2000, 0x6000));
    // What is in a table changes without a store.
    u64 pte = g.entry_at(g.cr3, 0x2000, 1);
    g.memory.store(Gpa(pte), u64{0x7000} | kPage);
    g.shadow.unmap(pte, 8);
    CHECK(!g.has(0x2000, 0x6000));
    CHECK(g.installs(0x2000, 0x7000));
    g.check();
    // Ranges of any size and anywhere.
    g.shadow.write_protect(0, ~u64{0});
    CHECK(g.has(0x2000, 0x7000));
    g.shadow.unmap(~u64{0} - 7, 8);
    g.shadow.unmap(0x8000, ~u64{0});
    CHECK(!g.has(0x2000, 0x7000));  // its tables were there
    CHECK(g.installs(0x2000, 0x7000, kWrite));
    g.shadow.write_protect(0x7fff, 1);
    CHECK(!g.has(0x2000, 0x7000, kWrite));
    g.shadow.unmap(0, bit(52));
    CHECK(!g.has(0x2000, 0x7000));
    g.check();
}

void test_dirty_log() {
    Guest g;
    g.host.largest = 21;
    u64 base = 4 << 20;
    g.map(0x4000'0000, base, kPage, 2);
    CHECK(g.installs(0x4000'0000, base, kWrite));
    std::vector<u64> bitmap(g.ram.bitmap_words());
    for (u64 n = 0; n < g.ram.pages(); ++n) g.ram.page_flags[n] |= kPageDirtyTrack;
    g.ram.take_dirty(bitmap);
    int before = g.host.flushes;
    g.shadow.write_protect(0, kRam);
    CHECK(g.host.flushes > before);
    CHECK(!g.has(0x4000'3000, base + 0x3000, kWrite));
    CHECK(g.has(0x4000'3000, base + 0x3000));
    CHECK(g.installs(0x4000'3000, base + 0x3000, kWrite));
    CHECK(!g.has(0x4000'4000, base + 0x4000, kWrite));
    bitmap.assign(bitmap.size(), 0);
    g.ram.take_dirty(bitmap);
    u64 first = base >> kPageShift;
    CHECK_EQ(bitmap[first / 64], bit(3));
    g.check();
}

void test_rom() {
    Guest g;
    GuestMemory::Region& rom = g.memory.add(Gpa(0x8000'0000), 2 * kPageSize, "rom", true);
    g.memory.store(Gpa(0x8000'0000), u64{0x5000} | kPage);  // a table without A or D, for good
    g.store(g.entry_at(g.cr3, 0x1000, 2), 0x8000'0000 | kTable);
    CHECK(g.installs(0, 0x5000));
    CHECK(g.installs(0, 0x5000, kWrite));
    g.map(0x4000'0000, 0x8000'1000);
    CHECK_EQ(g.fault(0x4000'0000, kRead), ShadowFault::kInstalled);
    CHECK(g.shadow.lookup(0x4000'0000, kRead).address ==
          reinterpret_cast<u64>(rom.host(0x8000'1000)));
    CHECK_EQ(g.fault(0x4000'0000, kWrite), ShadowFault::kStore);
    g.check();
}

// Execution without reading: what a protection key that denies access leaves of a page.
void test_execute_only() {
    Guest g;
    g.map(0x1000, 0x5000 | u64{3} << 59);
    g.load(g.cr3, bit(22));
    g.shadow.set_keys(1u << 6, 0);
    PageAccess fetch{.fetch = true, .user = true};
    CHECK_EQ(g.fault(0x1000, kUserRead), ShadowFault::kGuestFault);
    CHECK(g.installs(0x1000, 0x5000, fetch));
    CHECK(!g.has(0x1000, 0x5000, kUserRead));
    u64* top = reinterpret_cast<u64*>(g.shadow.root(ShadowView::kUser));
    CHECK(top != nullptr);
    g.shadow.set_keys(0, 0);
    CHECK(g.installs(0x1000, 0x5000, kUserRead));
    g.shadow.set_keys(1u << 6, 0);
    CHECK(!g.has(0x1000, 0x5000, kUserRead));
    CHECK(g.has(0x1000, 0x5000, fetch));                         // kept from before
    for (u32 n = 0; n < 2000; ++n) g.shadow.set_keys(n * 4, 0);  // every value is a role of its own
    CHECK(g.installs(0x1000, 0x5000, fetch));
    g.check();
}

// Tables without a guest table of their own do not get mixed up: no paging, and a CR3 of 0 in every
// role there is.
void test_identities() {
    GuestMemory memory;
    memory.add(Gpa(0), 1 << 20, "ram");
    HostMemory host(memory);
    ShadowMmu shadow(memory, host);
    memory.store<u32>(Gpa(0), 0x1003);
    memory.store<u32>(Gpa(0x1000 + 4 * 3), 0x5003);
    auto at = [&](u64 gva) {
        ShadowFault fault = shadow.fault(gva, kRead);
        return fault.outcome == ShadowFault::kInstalled ? fault.gpa : ~u64{0};
    };
    auto leads_to = [&](u64 gva) {
        return shadow.lookup(gva, kRead).address -
               reinterpret_cast<u64>(memory.find(Gpa(0))->host(0));
    };
    for (u64 n = 0; n < 64; ++n) {
        shadow.load(make_paging_state({.cr0 = bit(0)}));
        CHECK_EQ(at(0x1000), u64{0x1000});
        CHECK_EQ(at(0x3000), u64{0x3000});
        CHECK_EQ(leads_to(0x3000), u64{0x3000});
        shadow.load(make_paging_state({.cr0 = bit(0) | bit(31) | (n & 1) << 16,
                                       .cr4 = (n & 2) << 3 | (n & 4) << 18 | (n & 16) << 17,
                                       .efer = (n & 8) << 8}));
        CHECK(!shadow.lookup(0x1000, kRead).ok);  // not mapped
        CHECK_EQ(at(0x3000), u64{0x5000});
        CHECK_EQ(leads_to(0x3000), u64{0x5000});
        CHECK_EQ(shadow.check(), std::string());
    }
}

// Going back to an address space costs no faults.
void test_roots_are_kept() {
    Guest g;
    u64 other = g.new_table();
    g.map(0x1000, 0x5000);
    CHECK(g.installs(0x1000, 0x5000));
    CHECK(g.installs(0x1000, 0x5000, kUserRead));
    u64 root = g.shadow.root(ShadowView::kUser);
    CHECK(root != g.shadow.root(ShadowView::kSupervisor));
    g.load(other);
    CHECK(!g.has(0x1000, 0x5000));
    CHECK_EQ(g.shadow.root(ShadowView::kUser), u64{0});
    g.load(g.cr3);
    CHECK(g.has(0x1000, 0x5000));
    CHECK(g.has(0x1000, 0x5000, kUserRead));
    CHECK_EQ(g.shadow.root(ShadowView::kUser), root);
    g.check();
}

// A page that is no table any more gets stores until they are let through.
void test_flood() {
    Guest g;
    g.map(0x1000, 0x5000);
    CHECK(g.installs(0x1000, 0x5000));
    u64 directory = align_down(g.entry_at(g.cr3, 0x1000, 2), kPageSize);
    g.map(0x4000'0000, directory);
    CHECK_EQ(g.fault(0x4000'0000, kWrite), ShadowFault::kStore);
    int told = 0;
    for (; g.shadow.is_tracked(directory) && told < 100; ++told) g.store(directory + 0x800, 1);
    CHECK(told < 10);
    CHECK(g.installs(0x4000'0000, directory, kWrite));
    CHECK(g.installs(0x1000, 0x5000));  // it was one after all
    CHECK(g.shadow.is_tracked(directory));
    CHECK(!g.has(0x4000'0000, directory, kWrite));
    g.check();
}

// The budget holds, and what is in use stays.
void test_eviction() {
    Guest g(40);
    u64 hot = 0x7f'c000'0000, misses = 0;
    g.map(hot, 0x5000);
    CHECK(g.installs(hot, 0x5000));
    for (u64 n = 0; n < 400; ++n) {
        u64 gva = n << 30;  // each needs a directory and a table
        g.map(gva, 0x6000);
        CHECK(g.installs(gva, 0x6000));
        if (!g.has(hot, 0x5000)) {
            ++misses;
            CHECK(g.installs(hot, 0x5000));
        }
        CHECK(g.shadow.pages_used() <= 40);
    }
    CHECK(g.shadow.stats().evictions > 700);
    CHECK(misses < 20);
    g.check();
}

// Tables that are their own: one frame at all four levels.
void test_recursive() {
    Guest g;
    g.store(g.cr3, g.cr3 | kTable);
    g.map(u64{1} << 39, 0x5000);
    CHECK(g.installs(0, g.cr3));
    CHECK_EQ(g.fault(0, kWrite), ShadowFault::kStore);
    CHECK(g.installs(u64{1} << 39, 0x5000));
    CHECK_EQ(g.shadow.stats().unsyncs, u64{0});
    g.store(g.cr3, 0);
    CHECK(!g.has(0, g.cr3));
    CHECK_EQ(g.fault(0), ShadowFault::kGuestFault);
    g.check();
}

void test_bad_tables() {
    Guest g;
    g.store(g.cr3, bit(39) | kTable);  // outside memory: all ones, a reserved bit somewhere
    ShadowFault fault = g.shadow.fault(0, kRead);
    CHECK_EQ(fault.outcome, ShadowFault::kGuestFault);
    CHECK_EQ(fault.error, u32{kPfPresent | kPfReserved});
    g.load(bit(39));
    CHECK_EQ(g.shadow.fault(0, kRead).error, u32{kPfPresent | kPfReserved});
    g.shadow.invlpg(0x8000'0000'0000);  // not canonical: nothing
    g.shadow.write_tracked(~u64{0} - 7, 8);
    g.shadow.write_tracked(0, 0);
    g.shadow.unmap(0, 0);
    g.load(g.cr3);
    g.store(g.cr3, 0);
    g.map(0x20'0000, 0x9000'0000);
    fault = g.shadow.fault(0x20'0123, kRead);
    CHECK_EQ(fault.outcome, ShadowFault::kNotMemory);
    CHECK_EQ(fault.gpa, u64{0x9000'0123});
    g.check();
}

}  // namespace

int main() {
    test_map();
    test_accessed_and_dirty();
    test_unsync();
    test_relinked_directory();
    test_relinked_table();
    test_unsync_becomes_upper();
    test_large_pages();
    test_gigabyte_pages();
    test_unmap();
    test_dirty_log();
    test_rom();
    test_execute_only();
    test_identities();
    test_roots_are_kept();
    test_flood();
    test_eviction();
    test_recursive();
    test_bad_tables();
    return pvtest::finish("test_shadow_cases");
}
