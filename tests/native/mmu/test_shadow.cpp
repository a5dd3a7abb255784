// Shadow tables under a random guest: it edits its tables (through physical memory and through its
// own mappings of them), reuses them as data, invalidates, loads control registers, and accesses
// memory as user and supervisor. Every answer is checked against pure walks of its tables.
//
// What may be answered follows the architecture (SDM 3A, 4.10.4): for each address, everything that
// a walk has given since the address was last invalidated; right after an invalidation only what a
// walk gives now. A miss is always answered as a walk does now. On top of the tables sits a TLB
// that is emptied only when ShadowHost::flush() asks for it, so forgetting to ask is found too.
//
// PV_SHADOW_STEPS sets how many steps are made (10,000,000 for the long version), PV_SHADOW_SEED
// where they begin.
#include <algorithm>
#include <set>
#include <vector>

#include "check.hpp"
#include "mmu/shadow.hpp"
#include "mmu/tlb.hpp"
#include "random.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kRam = 8 << 20, kRom = 16 << 20, kRomSize = 4 * kPageSize;
constexpr u64 kPool = 16, kPoolPages = 24;  // frames that serve as tables, and as data at times
constexpr unsigned kAddresses = 32;

/// What a walk says of an address, whoever asks.
struct Seen {
    bool mapped = false;
    u64 frame = 0;
    bool user = false, writable = false, nx = false, accessed = false, dirty = false;
    u8 key = 0;
    bool operator==(const Seen&) const = default;
};

// SDM 3A, 4.6, once more and apart from the walker.
bool permits(const PagingState& s, PageAccess a, const Seen& t) {
    if (s.mode == PagingMode::kNone) return true;
    if (!t.mapped || !t.accessed || (a.write && !t.dirty)) return false;
    if (a.user && !t.user) return false;
    if (a.fetch) return !t.nx && !(!a.user && s.smep && t.user);
    if (!a.user && t.user && s.smap && (a.implicit || !a.ac)) return false;
    if (a.write && !t.writable && (a.user || s.wp)) return false;
    if (t.user ? !s.pke : !s.pks) return true;
    u32 key = (t.user ? s.pkru : s.pkrs) >> (2 * t.key);
    return !(key & 1) && !((key & 2) && a.write && (a.user || s.wp));
}

/// Host addresses carry, in bits that no address in this process has, how often their block moved.
struct TestHost final : HostMemory {
    using HostMemory::HostMemory;
    Tlb tlb;
    u64 moves[9]{};
    bool large = true, logging = false;
    std::set<u64> clean, watched;

    u64 mark(u64 gpa) const { return (moves[gpa >> 21] & 15) << 48; }
    std::optional<Page> host_page(u64 gpa, bool write, u8 shift) override {
        auto page = HostMemory::host_page(gpa, write, large && !logging ? shift : 12);
        if (!page) return page;
        page->address |= mark(gpa);
        if (write) clean.erase(gpa >> 12);
        if (clean.contains(gpa >> 12)) page->writable = false;
        if (page->shift == 30) page->shift = 21;
        return page;
    }
    void tracked(u64 gpa, bool on) override {
        CHECK(on ? watched.insert(gpa >> 12).second : watched.erase(gpa >> 12) == 1);
    }
    void flush() override { tlb.flush_all(); }
};

class RandomGuest {
  public:
    RandomGuest(u64 seed, u32 max_pages)
        : r_(seed), shadow_(memory_, host_, {.max_pages = max_pages}), reader_(memory_) {
        max_pages_ = std::max(max_pages, 32u);
        load(true);
    }

    void run(u64 steps) {
        for (u64 n = 0; n < steps && pvtest::failures == 0; ++n) {
            step();
            if (n % 4096 == 0) CHECK_EQ(shadow_.check(), std::string());
            CHECK(shadow_.pages_used() <= max_pages_);
        }
        CHECK_EQ(shadow_.check(), std::string());
        for (u64 frame = 0; frame < 64; ++frame) {
            CHECK_EQ(host_.watched.contains(frame), shadow_.is_tracked(frame << 12));
        }
        shadow_.clear();
        CHECK(host_.watched.empty());
        CHECK_EQ(shadow_.pages_used(), 0u);
    }

    const ShadowMmu::Stats& stats() const { return shadow_.stats(); }
    u64 hits = 0, installed = 0, faults = 0, stores = 0, devices = 0, old = 0, large = 0;

  private:
    static GuestMemory& prepare(GuestMemory& memory) {
        // Guest and host addresses are congruent modulo 2 MB, so that large pages are possible.
        memory.add(Gpa(0), kRam, "ram", false, HugePages::kTransparent);
        memory.add(Gpa(kRom), kRomSize, "rom", true);
        return memory;
    }

    bool narrow() const { return paging_.mode == PagingMode::k32Bit; }

    u64 random_index() { return r_.pick<u64>({0, 0, 0, 1, 1, 5, narrow() ? 0x3ffu : 0x1ffu}); }

    /// Frames of the pool serve as tables of level 5, 4, 3, 2 (four each) and 1, mostly.
    static u64 level_of(u64 page) {
        u64 n = (page >> 12) - kPool;
        return n >= 16 ? 1 : 5 - n / 4;
    }
    u64 table_frame(u64 level) {
        return kPool +
               (level == 1 ? 16 + r_.below(kPoolPages - 16) : 4 * (5 - level) + r_.below(4));
    }

    u64 random_entry(u64 page) {
        u64 e = r_.next() & (kPteAccessed | kPteDirty | kPteGlobal | kPteWriteThrough);
        if (!r_.one_in(30)) e |= kPtePresent;
        if (!r_.one_in(8)) e |= kPteWritable;
        if (!r_.one_in(8)) e |= kPteUser;
        // Mostly a table of the next level, from the last level a table (as data) or other memory;
        // now and then anything, so that there are cycles and tables of several levels at once.
        u64 level = level_of(page);
        u64 frame = level == 1 ? table_frame(1) : table_frame(level - 1);
        if (level == 1 ? r_.one_in(2) : r_.one_in(30)) frame = 64 + r_.below(16);
        if (r_.one_in(24)) frame = kPool + r_.below(kPoolPages);
        if (r_.one_in(60)) frame = (kRom >> 12) + r_.below(8);  // some of it beyond the ROM
        if (r_.one_in(level == 2 || level == 3 ? 10 : 200)) {
            e |= kPtePageSize;
            if (!r_.one_in(4)) frame = u64{r_.below(5)} << 9;  // some of it beyond the RAM
            if (!r_.one_in(4)) frame &= ~u64{narrow() ? 0x3ffu : 0x1ffu};
        }
        e |= frame << 12;
        if (narrow()) return e;
        if (r_.one_in(12)) e |= kPteNoExecute;
        if (r_.one_in(4)) e |= u64{r_.below(4)} << 59;
        if (r_.one_in(100)) e |= bit(45);  // beyond MAXPHYADDR
        if (paging_.mode == PagingMode::kPae && !r_.one_in(100)) e &= ~(u64{0x7ff} << 52);
        return e;
    }

    /// Stores an entry somewhere in the page, or takes a bit off one; `told`: as a guest's store.
    void edit(u64 page, bool told) {
        u64 size = narrow() ? 4 : 8;
        u64 gpa = page + random_index() * size;
        u64 value = random_entry(page);
        if (r_.one_in(3)) {
            value = memory_.load<u64>(Gpa(align_down(gpa, 8)));
            if (gpa & 4) value >>= 32;
            value ^= r_.pick<u64>({kPteWritable, kPteUser, kPteAccessed, kPteDirty});
            if (r_.one_in(12)) value ^= kPtePresent;
        }
        if (narrow()) {
            memory_.store(Gpa(gpa), static_cast<u32>(value));
        } else {
            memory_.store(Gpa(gpa), value);
        }
        if (!told) return;
        shadow_.write_tracked(gpa, size);
        look();
    }

    /// Notes what a walk gives for each address now.
    Seen see(u64 gva) {
        PagingState any = probing(paging_);
        WalkTrace trace;
        WalkResult found = walk_trace(reader_, any, gva, {.ac = true}, trace);
        if (found.fault) return {};
        const Translation& t = found.page;
        Seen seen{true, t.gpa >> 12, t.user, t.writable, t.nx, true, t.dirty, t.key};
        for (unsigned n = 0; n < trace.count; ++n) {
            if (trace.steps[n].gpa != ~u64{0}) seen.accessed &= (trace.steps[n].entry >> 5) & 1;
        }
        return seen;
    }
    void look() {
        for (unsigned n = 0; n < kAddresses; ++n) {
            Seen seen = see(gva_[n]);
            auto& list = allowed_[n];
            if (list.back() == seen) continue;
            std::erase(list, seen);
            list.push_back(seen);  // the last is the present one
            if (list.size() > 64) list.erase(list.begin() + 20);
        }
    }
    void only_now(unsigned n) { allowed_[n].assign(1, see(gva_[n])); }

    void choose_addresses() {
        for (u64& gva : gva_) {
            u64 page = r_.pick<u64>({0, 1, 5, 511});
            u64 middle = r_.pick<u64>({0, 1, 511});
            switch (paging_.mode) {
                case PagingMode::k4Level:
                case PagingMode::k5Level: {
                    u64 top = r_.pick<u64>({0, 1, 511});
                    bool five = paging_.mode == PagingMode::k5Level;
                    gva = page << 12 | middle << 21 | u64{r_.below(2)} << 30 | top << 39;
                    if (five) gva |= r_.pick<u64>({0, 1, 511}) << 48;
                    gva = static_cast<u64>(sign_extend(gva, five ? 57 : 48));
                    break;
                }
                case PagingMode::kPae:
                    gva = page << 12 | middle << 21 | u64{r_.below(4)} << 30;
                    break;
                case PagingMode::k32Bit:
                    gva = (page == 511 ? 1023 : page) << 12 | (middle == 511 ? 1023 : middle) << 22;
                    break;
                case PagingMode::kNone:
                    gva = r_.one_in(2) ? u64{r_.below(80)} << 12 : u64{r_.below(kRam >> 12)} << 12;
                    if (r_.one_in(8)) gva += kRom;
                    break;
            }
        }
    }

    void load(bool new_mode) {
        PagingRegisters regs;
        if (new_mode) {
            mode_ = static_cast<PagingMode>(r_.one_in(10) ? 0 : 1 + r_.below(4));
            host_.large = !r_.one_in(3);
        }
        if (new_mode || r_.one_in(4)) control_ = r_.next();
        auto on = [&](unsigned n) { return (control_ >> n & 1) != 0; };
        bool wide = mode_ == PagingMode::k4Level || mode_ == PagingMode::k5Level;
        regs.cr0 = bit(0) | (on(0) ? bit(16) : 0) | (mode_ == PagingMode::kNone ? 0 : bit(31));
        regs.cr4 = (on(1) ? bit(20) : 0) | (on(2) ? bit(21) : 0) | (on(3) ? bit(22) : 0) |
                   (on(4) ? bit(24) : 0) | (on(5) || on(6) ? bit(4) : 0) | (on(7) ? bit(7) : 0) |
                   (mode_ == PagingMode::k5Level ? bit(12) : 0) |
                   (mode_ == PagingMode::k32Bit ? 0 : bit(5));
        regs.efer = (wide ? bit(8) | bit(10) : 0) | (on(8) || on(9) ? bit(11) : 0);
        regs.pkru = static_cast<u32>(control_ >> 32) & 0x3c;
        regs.pkrs = static_cast<u32>(control_ >> 40) & 0xf0;
        regs.physical_mask = bit(40) - 1;
        regs.pages_1gb = true;
        if (new_mode && r_.one_in(8)) regs.a20_mask = ~bit(20);
        if (!new_mode) regs.a20_mask = paging_.a20_mask;
        u64 levels = wide ? (mode_ == PagingMode::k5Level ? 5 : 4) : 2;
        regs.cr3 = (r_.one_in(8) ? kPool + r_.below(kPoolPages) : table_frame(levels)) << 12;
        u64 pdptes[4];
        for (u64& e : pdptes) {
            e = table_frame(2) << 12 | (r_.one_in(6) ? 0 : u64{kPtePresent});
        }
        regs.pdpte = pdptes;
        paging_ = make_paging_state(regs);
        if (new_mode) {
            choose_addresses();
            for (u64 n = 24 * kPoolPages; n-- != 0;) edit((kPool + n / 24) << 12, false);
            shadow_.write_tracked(kPool << 12, kPoolPages << 12);
        }
        shadow_.load(paging_);
        host_.tlb.flush_all();
        for (unsigned n = 0; n < kAddresses; ++n) only_now(n);
    }

    TlbUse use_of(PageAccess a) const {
        bool ac = shadow_view(paging_, a) == ShadowView::kSupervisor;
        if (a.user) {
            return a.fetch ? TlbUse::kUserFetch : a.write ? TlbUse::kUserWrite : TlbUse::kUserRead;
        }
        if (a.fetch) return TlbUse::kSupervisorFetch;
        if (ac) return a.write ? TlbUse::kSupervisorWriteAc : TlbUse::kSupervisorReadAc;
        return a.write ? TlbUse::kSupervisorWrite : TlbUse::kSupervisorRead;
    }

    /// The TLB, then the shadow tables.
    bool translate(u64 gva, PageAccess a, u64& address) {
        if (host_.tlb.lookup(gva, 0, use_of(a), address)) return true;
        ShadowHit hit = shadow_.lookup(gva, a);
        if (!hit.ok) return false;
        address = hit.address;
        large += hit.shift > 12;
        host_.tlb.insert(gva, 0,
                         {.address = address & ~(bit(hit.shift) - 1),
                          .shift = hit.shift,
                          .allow = tlb_allow(use_of(a))});
        return true;
    }

    u64 host_address(u64 gpa) const {
        return reinterpret_cast<u64>(memory_.find(Gpa(gpa))->host(gpa)) | host_.mark(gpa);
    }

    /// The guest's store at `gpa` was let through: tables get entries, other pages get anything.
    void guest_store(u64 gpa) {
        u64 frame = gpa >> 12;
        if (frame >= kPool && frame < kPool + kPoolPages) {
            edit(frame << 12, false);
            look();
        } else if (gpa < kRam) {
            memory_.store(Gpa(align_down(gpa, 8)), r_.next());
        }
    }

    void access() {
        unsigned n = std::min(r_.below(kAddresses), r_.below(kAddresses));
        u64 gva = gva_[n] + r_.below(4096);
        PageAccess a;
        a.write = r_.one_in(3);
        a.fetch = !a.write && r_.one_in(4);
        a.user = r_.one_in(2);
        a.implicit = !a.user && !a.fetch && r_.one_in(8);
        a.ac = r_.one_in(2);

        u64 address;
        if (translate(gva, a, address)) {
            ++hits;
            auto& list = allowed_[n];
            auto good = std::find_if(list.rbegin(), list.rend(), [&](const Seen& seen) {
                u64 gpa = seen.frame << 12 | (gva & kPageMask);
                return permits(paging_, a, seen) && memory_.find(Gpa(gpa)) &&
                       host_address(gpa) == address;
            });
            CHECK(good != list.rend());
            if (good == list.rend()) return;
            old += good != list.rbegin();
            u64 gpa = good->frame << 12 | (gva & kPageMask);
            if (!a.write) return;
            CHECK(gpa < kRam);                                          // not ROM
            CHECK(!shadow_.is_tracked(gpa));                            // a store nobody would see
            CHECK(!host_.logging || !host_.clean.contains(gpa >> 12));  // or not note
            guest_store(gpa);
            return;
        }
        WalkResult want = walk_pure(reader_, paging_, gva, a);
        ShadowFault got = shadow_.fault(gva, a);
        look();  // a walk has set A and D
        if (want.fault) {
            ++faults;
            CHECK_EQ(got.outcome, ShadowFault::kGuestFault);
            CHECK_EQ(got.error, want.error);
            return;
        }
        u64 gpa = want.page.gpa;
        const GuestMemory::Region* region = memory_.find(Gpa(gpa));
        if (!region) {
            ++devices;
            CHECK_EQ(got.outcome, ShadowFault::kNotMemory);
            CHECK_EQ(got.gpa, gpa);
            return;
        }
        if (got.outcome == ShadowFault::kStore) {
            ++stores;
            CHECK(a.write);
            CHECK_EQ(got.gpa, gpa);
            CHECK(region->read_only || shadow_.is_tracked(gpa));
            if (region->read_only) return;
            u64 frame = gpa >> 12;
            bool table = frame >= kPool && frame < kPool + kPoolPages;
            if (table) return edit(frame << 12, true);
            memory_.store(Gpa(align_down(gpa, 8)), r_.next());  // a frame that garbage made a table
            shadow_.write_tracked(align_down(gpa, 8), 8);
            look();
            return;
        }
        ++installed;
        CHECK_EQ(got.outcome, ShadowFault::kInstalled);
        ShadowHit hit = shadow_.lookup(gva, a);
        CHECK(hit.ok);
        CHECK_EQ(hit.address, host_address(gpa));
        if (a.write) {
            CHECK(!region->read_only);
            CHECK(!shadow_.is_tracked(gpa));
        }
        if (!hit.ok || hit.address != host_address(gpa)) return;
        CHECK(permits(paging_, a, see(gva)) || a.write || region->read_only);
    }

    void step() {
        unsigned what = r_.below(1000);
        if (what < 820) {
            access();
        } else if (what < 910) {
            edit((kPool + r_.below(kPoolPages)) << 12, true);
        } else if (what < 945) {
            unsigned n = std::min(r_.below(kAddresses), r_.below(kAddresses));
            shadow_.invlpg(gva_[n] + r_.below(4096));
            host_.tlb.flush_page(0, gva_[n]);
            for (unsigned k = 0; k < kAddresses; ++k) {
                if (gva_[k] == gva_[n]) only_now(k);
            }
        } else if (what < 960) {
            load(false);
        } else if (what < 970) {
            shadow_.flush();
            host_.tlb.flush_all();
            for (unsigned n = 0; n < kAddresses; ++n) only_now(n);
        } else if (what < 980) {
            paging_.pkru = static_cast<u32>(r_.next()) & 0x3c;
            shadow_.set_keys(paging_.pkru, paging_.pkrs);
            host_.tlb.flush_all();  // rights of the other root
        } else if (what < 984) {
            u64 block = r_.below(4);
            ++host_.moves[block];
            shadow_.unmap(block << 21, 1 << 21);
        } else if (what < 988) {
            u64 frame = r_.below(96);
            shadow_.unmap(frame << 12, 1 + r_.below(3 << 12));
        } else if (what < 992) {
            host_.logging = true;
            u64 frame = r_.below(64), count = 1 + r_.below(32);
            for (u64 n = 0; n < count; ++n) host_.clean.insert(frame + n);
            shadow_.write_protect(frame << 12, count << 12);
        } else if (what < 996) {
            host_.logging = false;
            host_.clean.clear();
        } else if (what < 999 || !r_.one_in(3)) {
            if (what == 998) {
                load(true);
            } else {
                edit((kPool + r_.below(kPoolPages)) << 12, true);
            }
        } else {
            // A page is cleared, as when it gets a new use.
            u64 page = (kPool + r_.below(kPoolPages)) << 12;
            std::vector<u8> zero(kPageSize);
            memory_.write(Gpa(page), zero);
            shadow_.write_tracked(page, kPageSize);
            look();
        }
    }

    pvtest::Random r_;
    GuestMemory memory_;
    GuestMemory& prepared_ = prepare(memory_);
    TestHost host_{memory_};
    ShadowMmu shadow_;
    TableReader reader_;
    PagingState paging_;
    PagingMode mode_ = PagingMode::kNone;
    u64 control_ = 0;
    u32 max_pages_;
    u64 gva_[kAddresses]{};
    std::vector<Seen> allowed_[kAddresses]{};
};

void test_random(u64 steps, u64 seed) {
    u64 hits = 0, installed = 0, faults = 0, stores = 0, devices = 0, old = 0, large = 0;
    ShadowMmu::Stats all;
    u64 each = 20'000;
    u64 runs = std::max<u64>(steps / each, 1);
    for (u64 n = 0; n < runs && pvtest::failures == 0; ++n) {
        RandomGuest guest(seed + n, n % 3 == 0 ? 32 : n % 3 == 1 ? 50 : 1000);
        guest.run(std::min(steps, each));
        if (pvtest::failures != 0) std::fprintf(stderr, "with PV_SHADOW_SEED=%lu\n", seed + n);
        hits += guest.hits, installed += guest.installed, faults += guest.faults;
        stores += guest.stores, devices += guest.devices, old += guest.old, large += guest.large;
        const auto& s = guest.stats();
        all.unsyncs += s.unsyncs, all.syncs += s.syncs, all.evictions += s.evictions;
        all.floods += s.floods, all.tracked_stores += s.tracked_stores;
    }
    std::fprintf(
        stderr,
        "%lu steps: %lu hits (%lu out of date, %lu large), %lu installed, %lu faults, %lu "
        "stores to tables, %lu to devices; %lu unsyncs, %lu syncs, %lu tracked, %lu floods, "
        "%lu evictions\n",
        runs * std::min(steps, each), hits, old, large, installed, faults, stores, devices,
        all.unsyncs, all.syncs, all.tracked_stores, all.floods, all.evictions);
    if (steps < 100'000) return;
    // Everything that there is to check did happen.
    for (u64 count : {hits, installed, faults, stores, devices, old, large, all.unsyncs, all.syncs,
                      all.floods, all.evictions}) {
        CHECK(count > steps / 10'000);
    }
}

}  // namespace

int main() {
    test_random(pvtest::environment_number("PV_SHADOW_STEPS", 1'000'000),
                pvtest::environment_number("PV_SHADOW_SEED", 1));
    return pvtest::finish("test_shadow");
}
