// Walks over tables that nobody made sense of: random bytes, entries that look right, tables that
// lead to themselves, to each other and out of memory, in all formats and both kinds of second
// dimension. Every walk must end, touch nothing outside memory (which the address sanitizer sees)
// and come to the same by every way there is: the common case without branches, the general walk,
// the one that records its steps, and the one of many at a time.
//
//     test_walk_fuzz [ROUNDS [SEED]]
#include <cstdlib>
#include <random>

#include "check.hpp"
#include "mmu/address_space.hpp"
#include "mmu/bulk.hpp"
#include "mmu/walk_generic.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kPages = 48;  ///< of memory, in regions with a hole between them
constexpr size_t kAddresses = 150;

struct Reached {
    u64 ok = 0, page = 0, reserved = 0, key = 0, violation = 0, misconfigured = 0, nested = 0,
        through = 0, large = 0, bulk = 0;
};

class Fuzz {
  public:
    Fuzz(u64 seed, Reached& reached) : random_(seed), reached_(reached) {
        // Sizes that are no powers of two, and starts that are not aligned to their size.
        add(0, 20), add(20, 4), add(32, kPages - 32);
        for_ept_ = coin(2);
        fill();
        paging_ = make_paging_state(registers());
        if (!for_ept_) {
            NptState npt{make_paging_state(registers())};
            if (npt.paging.mode != PagingMode::kNone) second_ = npt;
        }
        if (!second_) {
            EptCapabilities c{.execute_only = coin(2),
                              .pages_2mb = !coin(4),
                              .pages_1gb = !coin(4),
                              .mode_based_execute = coin(3),
                              .physical_mask = bit(coin(2) ? 46 : 52) - 1};
            u64 eptp =
                (page() & c.physical_mask) | (coin(3) ? 4 : 3) << 3 | 6 | (coin(2) ? bit(6) : 0);
            second_ = make_ept_state(eptp, c);
        }
    }

    void run() {
        std::vector<u64> gvas(kAddresses);
        u64 near = gva();
        for (u64& at : gvas)
            at = coin(3) ? gva() : near ^ (random_() & (bit(coin(2) ? 30 : 21) - 1));
        PageAccess access = some_access();
        flat(gvas, access);
        nested(gvas, access);
        for (u64 at : gvas) address_space(at, access);
    }

  private:
    bool coin(unsigned n) { return random_() % n == 0; }
    /// A page's address: in memory mostly, sometimes in the hole, just beyond or anywhere.
    u64 page() {
        if (coin(100)) return random_() & kPteAddress;
        u64 page = random_() % (coin(20) ? kPages + 2 : kPages);
        if (page >= 24 && page < 32 && !coin(20)) page -= 24;
        return page * kPageSize;
    }

    void add(u64 first, u64 pages) {
        for (GuestMemory* memory : {&*memory_, &copy_}) {
            memory->add(Gpa(first * kPageSize), pages * kPageSize, "ram", first == 20);
        }
    }

    PagingRegisters registers() {
        PagingRegisters r;
        u64 mode = random_() % 12;  // mostly IA-32e
        r.cr0 = (mode ? bit(31) : 0) | bit(0) | (random_() & bit(16));
        r.cr4 =
            (mode > 2 ? bit(5) : 0) | (random_() & (bit(4) | bit(7) | bit(20) | bit(21) | bit(12)));
        if (coin(2)) r.cr4 |= random_() & (bit(22) | bit(24));
        r.efer = (mode > 4 ? bit(8) | bit(10) : 0) | (random_() & bit(11));
        r.cr3 = coin(30) ? random_() : page();
        r.pkru = static_cast<u32>(random_() & random_()), r.pkrs = static_cast<u32>(random_());
        r.physical_mask = bit(coin(2) ? 40 : 52) - 1;
        if (coin(10)) r.a20_mask = ~bit(20);
        for (u64& entry : pdptes_) entry = coin(8) ? 0 : page() | 1;
        r.pdpte = pdptes_;
        r.pages_1gb = !coin(4), r.pse36 = coin(2);
        return r;
    }

    u64 entry() {
        if (coin(100)) return random_();
        // For guests (P, R/W, U/S, A) and for EPT (R, W, X, A) alike.
        u64 e = page() | 0x127 | (random_() & 0xe40);
        if (!coin(3)) e &= ~u64{0x40};  // EPT: reserved where it leads on
        if (coin(2)) e |= 0x240;
        if (coin(20)) e ^= bit(random_() % 12);
        if (coin(12)) e |= 0x80;
        if (coin(30)) e |= bit(63);
        if (coin(4)) e |= random_() & (u64{0x7ff} << 52);
        if (coin(4)) e |= u64{6} << 3;
        if (for_ept_ && !coin(20)) e &= ~u64{0x78};
        return e;
    }

    void fill() {
        bool raw = coin(8);
        for (u64 at = 0; at < kPages * kPageSize; at += 8) {
            if (!memory_->find(Gpa(at))) continue;
            u64 value = raw ? random_() : entry();
            memory_->store<u64>(Gpa(at), value);
            copy_.store<u64>(Gpa(at), value);
        }
    }

    u64 gva() {
        u64 at = random_();
        if (coin(20)) return at;
        if (paging_.mode < PagingMode::k4Level) return at & 0xffff'ffff;
        unsigned width = paging_.mode == PagingMode::k5Level ? 57 : 48;
        return static_cast<u64>(sign_extend(at, width));
    }

    PageAccess some_access() {
        PageAccess a;
        a.user = coin(2), a.fetch = coin(4), a.write = !a.fetch && coin(2);
        a.implicit = !a.user && coin(4), a.ac = coin(2);
        return a;
    }

    void same(const Translation& a, const Translation& b) {
        CHECK_EQ(a.gpa, b.gpa);
        CHECK_EQ(a.shift, b.shift);
        CHECK_EQ(a.user, b.user);
        CHECK_EQ(a.writable, b.writable);
        CHECK_EQ(a.nx, b.nx);
        CHECK_EQ(a.global, b.global);
        CHECK_EQ(a.dirty, b.dirty);
        CHECK_EQ(a.store_ok, b.store_ok);
        CHECK_EQ(a.memory_type, b.memory_type);
        CHECK_EQ(a.key, b.key);
    }
    void same(const WalkResult& a, const WalkResult& b) {
        CHECK_EQ(a.fault, b.fault);
        CHECK_EQ(a.error, b.error);
        if (a.ok() && b.ok()) same(a.page, b.page);
    }
    void same(const NestedResult& a, const NestedResult& b) {
        CHECK_EQ(int{a.fault}, int{b.fault});
        CHECK_EQ(a.error, b.error);
        CHECK_EQ(a.during_walk, b.during_walk);
        CHECK_EQ(a.qualification, b.qualification);
        CHECK_EQ(a.fault_gpa, b.fault_gpa);
        if (!a.ok() || !b.ok()) return;
        same(a.guest, b.guest);
        CHECK_EQ(a.hpa, b.hpa);
        CHECK_EQ(a.shift, b.shift);
        CHECK_EQ(a.writable, b.writable);
        CHECK_EQ(a.executable, b.executable);
    }

    void same_memory() {
        for (u64 at = 0; at < kPages * kPageSize; at += 8) {
            if (!memory_->find(Gpa(at))) continue;
            u64 one = memory_->load<u64>(Gpa(at)), two = copy_.load<u64>(Gpa(at));
            if (one != two) CHECK_EQ(one, two);
        }
    }

    void flat(const std::vector<u64>& gvas, PageAccess a) {
        TableReader one(*memory_), two(copy_);
        std::vector<u64> gpas(gvas.size());
        u64 faults = 0, want_faults = 0;
        auto many = [&](BulkEffects effects) {
            faults = walk_many(one, paging_, gvas, a, gpas, effects), want_faults = 0;
        };
        auto compare = [&](size_t n, const WalkResult& r) {
            bool ok = r.ok() && is_canonical(paging_.mode, gvas[n]);
            CHECK_EQ(gpas[n], ok ? r.page.gpa : kNoTranslation);
            want_faults += gpas[n] == kNoTranslation;
            reached_.bulk += ok;
        };
        many(BulkEffects::kNone);
        for (size_t n = 0; n < gvas.size(); ++n) {
            WalkTrace trace;
            WalkResult want = walk_trace(one, paging_, gvas[n], a, trace);
            CHECK(trace.count <= 5);
            same(walk_pure(one, paging_, gvas[n], a), want);
            compare(n, want);
        }
        CHECK_EQ(faults, want_faults);
        same_memory();
        for (u64 gva : gvas) {
            WalkResult want;
            mmu_detail::FlatLoader loader{two};
            mmu_detail::walk_any<mmu_detail::Effects::kSetBits>(loader, paging_, gva, a, want);
            WalkResult got = walk(one, paging_, gva, a);
            same(got, want);
            reached_.ok += got.ok(), reached_.large += got.ok() && got.page.shift > 12;
            reached_.page += got.fault;
            reached_.reserved += (got.error & kPfReserved) != 0;
            reached_.key += (got.error & kPfProtectionKey) != 0;
        }
        same_memory();
        // Now that the bits are set, the common case is common; with a store D is not set yet.
        a.write = !a.fetch;
        many(BulkEffects::kSet);
        for (size_t n = 0; n < gvas.size(); ++n) {
            if (is_canonical(paging_.mode, gvas[n])) compare(n, walk(two, paging_, gvas[n], a));
        }
        same_memory();
    }

    void nested(const std::vector<u64>& gvas, PageAccess a) {
        TableReader one(*memory_), two(copy_);
        std::vector<u64> hpas(gvas.size());
        NestedTrace trace;
        walk_many_nested(one, paging_, *second_, gvas, a, hpas);
        for (size_t n = 0; n < gvas.size(); ++n) {
            NestedResult want = walk_nested_pure(one, paging_, *second_, gvas[n], a, &trace);
            CHECK(trace.steps.size() <= 35);  // five by five levels
            same(walk_nested_pure(one, paging_, *second_, gvas[n], a), want);
            bool ok = want.ok() && is_canonical(paging_.mode, gvas[n]);
            CHECK_EQ(hpas[n], ok ? want.hpa : kNoTranslation);
            NestedResult probe = walk_nested_probe(one, paging_, *second_, gvas[n], &trace);
            if (want.ok()) CHECK(probe.ok() && probe.hpa == want.hpa);
            reached_.through += want.ok();
            reached_.violation += want.fault == NestedResult::kViolation;
            reached_.misconfigured += want.fault == NestedResult::kMisconfiguration;
            reached_.nested += want.fault == NestedResult::kNested;
        }
        same_memory();
        for (bool write : {a.write, !a.fetch}) {
            a.write = write;
            for (u64 gva : gvas) {
                NestedResult before = walk_nested_pure(two, paging_, *second_, gva, a, &trace);
                NestedResult got = walk_nested(one, paging_, *second_, gva, a);
                // Without A/D bits in EPT, setting the guest's may be a violation of its own.
                if (before.ok() && got.ok()) CHECK_EQ(got.hpa, before.hpa);
                if (!before.ok()) CHECK(!got.ok());
                copy_memory();
            }
            walk_many_nested(one, paging_, *second_, gvas, a, hpas, BulkEffects::kSet);
            copy_memory();
            for (size_t n = 0; n < gvas.size(); ++n) {
                if (!is_canonical(paging_.mode, gvas[n])) continue;
                NestedResult r = walk_nested(two, paging_, *second_, gvas[n], a);
                CHECK_EQ(hpas[n], r.ok() ? r.hpa : kNoTranslation);
            }
            same_memory();
        }
    }

    /// What walks of one kind did to memory is what the next comparison starts with.
    void copy_memory() {
        for (const auto& region : memory_->regions()) {
            auto from = memory_->span(region->start, region->size);
            copy_.write(region->start, from);
        }
    }

    void address_space(u64 gva, PageAccess a) {
        AddressSpace flat(memory_, paging_), both(memory_, paging_, second_);
        for (AddressSpace* space : {&flat, &both}) {
            WalkReport probe = space->walk(gva, a, WalkEffects::kProbe);
            WalkReport report = space->walk(gva, a, WalkEffects::kNone);
            std::optional<u64> found = space->translate(gva);
            CHECK_EQ(found.has_value(), probe.ok());
            CHECK_EQ(probe.mapped, probe.ok());
            if (found) CHECK_EQ(*found, probe.physical);
            if (report.ok()) CHECK(report.mapped);
            if (report.mapped) CHECK(found && *found == report.physical);
        }
    }

    std::mt19937_64 random_;
    Reached& reached_;
    std::shared_ptr<GuestMemory> memory_ = std::make_shared<GuestMemory>();
    GuestMemory copy_;
    PagingState paging_;
    u64 pdptes_[4]{};
    std::optional<SecondDimension> second_;
    bool for_ept_ = false;
};

}  // namespace

int main(int argc, char** argv) {
    u64 rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 0) : 400;
    u64 seed = argc > 2 ? std::strtoull(argv[2], nullptr, 0) : 1;
    Reached r;
    for (u64 n = 0; n < rounds && !pvtest::failures; ++n) {
        Fuzz(seed + n, r).run();
        if (pvtest::failures) std::fprintf(stderr, "seed %llu\n", (unsigned long long)(seed + n));
    }
    std::fprintf(stderr,
                 "through %llu (large %llu, bulk %llu), #PF %llu (reserved %llu, key %llu), EPT "
                 "violations %llu, misconfigurations %llu, NPF %llu, through both %llu\n",
                 (unsigned long long)r.ok, (unsigned long long)r.large, (unsigned long long)r.bulk,
                 (unsigned long long)r.page, (unsigned long long)r.reserved,
                 (unsigned long long)r.key, (unsigned long long)r.violation,
                 (unsigned long long)r.misconfigured, (unsigned long long)r.nested,
                 (unsigned long long)r.through);
    if (rounds >= 100) {
        for (u64 count : {r.ok, r.page, r.reserved, r.key, r.violation, r.misconfigured, r.nested,
                          r.through, r.large, r.bulk}) {
            CHECK(count > 100);
        }
    }
    return pvtest::finish("test_walk_fuzz");
}
