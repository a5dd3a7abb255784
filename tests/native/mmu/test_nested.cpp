// Two-dimensional walks: whose fault a fault is, and which bits of which dimension are set when.
//
// The guest maps 0x5000 to guest-physical 0x8000 with tables at 0x1000 to 0x4000; the second
// dimension puts every guest-physical page 0x100000 higher, with tables at 0x201000 to 0x204000.
#include <atomic>
#include <thread>

#include "base/error.hpp"
#include "check.hpp"
#include "mmu/address_space.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kOffset = 0x10'0000, kRoot = 0x20'1000;
constexpr u64 kGva = 0x5123, kHpa = kOffset + 0x8123;
constexpr u64 kPte = 0x4028;  ///< guest-physical address of the guest's last entry
constexpr PageAccess kRead{.user = true}, kWrite{.write = true, .user = true},
    kFetch{.fetch = true, .user = true};

struct World {
    std::shared_ptr<GuestMemory> memory = std::make_shared<GuestMemory>();
    TableReader tables{*memory};
    PagingRegisters registers{.cr0 = bit(0) | bit(16) | bit(31),
                              .cr3 = 0x1000,
                              .cr4 = bit(5),
                              .efer = bit(8) | bit(10) | bit(11)};
    EptCapabilities c;
    bool npt, access_dirty = true;

    explicit World(bool npt) : npt(npt) {
        memory->add(Gpa(0), 0x30'0000, "ram");
        for (u64 level = 0; level < 3; ++level) {
            guest(0x1000 * (level + 1)) = (0x2000 + 0x1000 * level) | 7;
            at(kRoot + 0x1000 * level) = (kRoot + 0x1000 * (level + 1)) | 7;
        }
        guest(kPte) = 0x8007;
        for (u64 page = 0; page < 16; ++page) {
            second(page * kPageSize) = (kOffset + page * kPageSize) | (npt ? 7 : 0x37);
        }
    }
    u64& at(u64 hpa) { return *reinterpret_cast<u64*>(memory->span(Gpa(hpa), 8).data()); }
    /// The guest's entry at a guest-physical address; the last entry that translates one.
    u64& guest(u64 gpa) { return at(gpa + kOffset); }
    u64& second(u64 gpa) { return at(kRoot + 0x3000 + gpa / kPageSize * 8); }

    PagingState paging() const { return make_paging_state(registers); }
    SecondDimension dimension() const {
        if (!npt) return make_ept_state(kRoot | (access_dirty ? bit(6) : 0) | 3 << 3 | 6, c);
        PagingRegisters host = registers;
        host.cr3 = kRoot;
        return NptState{make_paging_state(host)};
    }
    NestedResult run(PageAccess a, u64 gva = kGva) {
        return walk_nested(tables, paging(), dimension(), gva, a);
    }
};

void through(bool npt) {
    World w(npt);
    NestedResult r = w.run(kWrite);
    CHECK(r.ok());
    CHECK_EQ(r.hpa, kHpa);
    CHECK_EQ(r.guest.gpa, 0x8123u);
    CHECK(r.writable && r.executable && r.guest.dirty);
    // Both dimensions' bits. The guest's tables are written to as far as the second one knows.
    u64 accessed = npt ? 0x20 : 0x100, dirty = npt ? 0x60 : 0x300, all = dirty;
    CHECK_EQ(w.guest(0x1000), 0x2027u);
    CHECK_EQ(w.guest(kPte), 0x8067u);
    CHECK_EQ(w.at(kRoot) & all, accessed);
    CHECK_EQ(w.second(0x8000) & all, dirty);
    for (u64 table : {0x1000, 0x2000, 0x3000, 0x4000}) CHECK_EQ(w.second(table) & all, dirty);
    CHECK_EQ(w.second(0x9000) & all, 0u);
    // A read leaves D alone, where it is a page's.
    World reads(npt);
    CHECK(reads.run(kRead).ok());
    CHECK_EQ(reads.guest(kPte), 0x8027u);
    CHECK_EQ(reads.second(0x8000) & all, accessed);
    CHECK_EQ(reads.second(0x4000) & all, dirty);
    // What both allow.
    w.second(0x8000) &= ~u64{2};
    r = w.run(kRead);
    CHECK(r.ok() && r.guest.writable && !r.writable);
    // The trace: each entry of the guest's after the four that translate it, then the page's.
    NestedTrace trace;
    walk_nested_pure(w.tables, w.paging(), w.dimension(), kGva, kRead, &trace);
    CHECK_EQ(trace.steps.size(), 24u);
    for (size_t n = 0; n < trace.steps.size(); ++n) {
        CHECK_EQ(trace.steps[n].second, n % 5 != 4);
    }
    CHECK_EQ(trace.steps[19].address, kPte);
    CHECK_EQ(trace.steps[23].address, kRoot + 0x3000 + 8 * 8);
}

/// The guest's own faults, whatever the second dimension says of the page.
void guest_faults(bool npt) {
    World w(npt);
    w.second(0x8000) = 0;
    w.guest(kPte) = 0x8005;
    NestedResult r = w.run(kWrite);
    CHECK_EQ(int{r.fault}, int{NestedResult::kGuest});
    CHECK_EQ(r.error, u32{kPfPresent | kPfWrite | kPfUser});
    CHECK_EQ(w.guest(0x1000), 0x2007u);  // and no accessed bit
    w.guest(0x3000) = 0;
    CHECK_EQ(w.run(kFetch).error, u32{kPfUser | kPfFetch});
    w.guest(0x2000) |= bit(45);
    CHECK_EQ(w.run(kRead).error, u32{kPfPresent | kPfUser | kPfReserved});
}

void ept_faults() {
    const u64 linear = kEptLinearValid, final_linear = kEptLinearValid | kEptFinal;
    auto check = [](const NestedResult& r, NestedResult::Fault fault, u64 gpa, bool walking,
                    u64 q) {
        CHECK_EQ(int{r.fault}, int{fault});
        CHECK_EQ(r.fault_gpa, gpa);
        CHECK_EQ(r.during_walk, walking);
        CHECK_EQ(r.qualification, q);
    };
    World w(false);
    w.second(0x3000) = 0;  // where the page directory is
    check(w.run(kFetch), NestedResult::kViolation, 0x3000, true, kEptRead | kEptWrite | linear);
    w.access_dirty = false;
    check(w.run(kFetch), NestedResult::kViolation, 0x3000, true, kEptRead | linear);
    w.second(0x3000) = 0x10'3017;
    check(w.run(kRead), NestedResult::kMisconfiguration, 0x3000, true, 0);
    // Without A/D bits a table may be read-only as long as the guest's own bits are set.
    w.second(0x3000) = 0x10'3031;
    check(w.run(kRead), NestedResult::kViolation, 0x3000, true,
          kEptRead | kEptWrite | kEptReadable | linear);
    CHECK(walk_nested_pure(w.tables, w.paging(), w.dimension(), kGva, kRead).ok());
    w.guest(0x3000) |= kPteAccessed;
    CHECK(w.run(kRead).ok());
    w.access_dirty = true;
    check(w.run(kRead), NestedResult::kViolation, 0x3000, true,
          kEptRead | kEptWrite | kEptReadable | linear);
    // The page: the guest's bits have been set by then.
    World page(false);
    page.second(0x8000) = 0x10'8033;
    check(page.run(kFetch), NestedResult::kViolation, 0x8123, false,
          kEptFetch | kEptReadable | kEptWritable | final_linear);
    CHECK_EQ(page.guest(kPte), 0x8027u);
    page.second(0x8000) = 0x10'8031;
    check(page.run(kWrite), NestedResult::kViolation, 0x8123, false,
          kEptWrite | kEptReadable | final_linear);
    page.second(0x8000) = 0x10'8017;
    check(page.run(kRead), NestedResult::kMisconfiguration, 0x8123, false, 0);
    // Mode-based execute looks at the guest's U/S, not at who fetches.
    World mode(false);
    mode.c.mode_based_execute = true;
    for (u64 table : {0x0, 0x1000, 0x2000}) mode.at(kRoot + table) |= kEpteUserExecute;
    mode.second(0x8000) = 0x10'8433;
    CHECK(mode.run({.fetch = true}).ok());
    mode.guest(kPte) = 0x8003;
    CHECK_EQ(int{mode.run({.fetch = true}).fault}, int{NestedResult::kViolation});
}

void npt_faults() {
    const u64 kTable = kNpfTable, kFinal = kNpfFinal;
    auto check = [](const NestedResult& r, u64 gpa, u64 info) {
        CHECK_EQ(int{r.fault}, int{NestedResult::kNested});
        CHECK_EQ(r.fault_gpa, gpa);
        CHECK_EQ(r.during_walk, (info & kNpfTable) != 0);
        CHECK_EQ(r.qualification, info);
    };
    World w(true);
    w.second(0x3000) = 0;
    check(w.run({}), 0x3000, kTable | kPfUser | kPfWrite);
    w.second(0x3000) = 0x10'3005;  // guests' tables must be writable, even for a read
    check(w.run({.fetch = true}), 0x3000, kTable | kPfUser | kPfWrite | kPfPresent);
    w.second(0x3000) = 0x10'3003;  // and a user's
    check(w.run({}), 0x3000, kTable | kPfUser | kPfWrite | kPfPresent);
    w.second(0x3000) = bit(63) | 0x10'3007;  // NX is no matter to them
    CHECK(w.run({}).ok());
    w.second(0x8000) = bit(63) | 0x10'8007;
    check(w.run({.fetch = true}), 0x8123, kFinal | kPfUser | kPfFetch | kPfPresent);
    w.second(0x8000) = bit(45) | 0x10'8007;
    check(w.run({.write = true}), 0x8123, kFinal | kPfUser | kPfWrite | kPfPresent | kPfReserved);
    w.second(0x8000) = 0x10'8003;
    check(w.run({}), 0x8123, kFinal | kPfUser | kPfPresent);
    // Beyond what its four levels translate.
    w.registers.physical_mask = bit(52) - 1;
    w.guest(kPte) = bit(50) | 0x8007;
    check(w.run({}), bit(50) | 0x8123, kFinal | kPfUser);
    // WP, SMEP, SMAP and keys of the host do not matter: every access is a user's.
    World host(true);
    PagingRegisters r = host.registers;
    r.cr3 = kRoot, r.cr4 |= bit(20) | bit(21) | bit(22), r.pkru = ~0u;
    SecondDimension strict = NptState{make_paging_state(r)};
    CHECK(walk_nested(host.tables, host.paging(), strict, kGva, {.write = true}).ok());
}

void other_modes(bool npt) {
    World w(npt);  // no paging in the guest: one translation
    w.registers.cr0 &= ~bit(31);
    PagingState none = w.paging();
    w.registers.cr0 |= bit(31);
    NestedTrace trace;
    NestedResult r = walk_nested_pure(w.tables, none, w.dimension(), 0x8123, {}, &trace);
    CHECK(r.ok() && r.hpa == kHpa);
    CHECK_EQ(trace.steps.size(), 4u);
    // PAE: PDPTEs are registers, and their address is not translated.
    SecondDimension dimension = w.dimension();
    u64 pdptes[4] = {0x3001, 0, 0, 0};
    PagingRegisters pae = w.registers;
    pae.efer = 0, pae.pdpte = pdptes, pae.cr3 = 0xffff'f000;
    r = walk_nested_pure(w.tables, make_paging_state(pae), dimension, kGva, kRead, &trace);
    CHECK(r.ok() && r.hpa == kHpa);
    CHECK_EQ(trace.steps.size(), 15u);
    CHECK_EQ(trace.steps[0].address, ~u64{0});
}

void address_space() {
    World w(false);
    AddressSpace space(w.memory, w.paging(), w.dimension());
    WalkReport r = space.walk(kGva, kWrite, WalkEffects::kNone);
    CHECK(r.ok() && r.mapped && r.physical == kHpa && r.gpa == 0x8123 && !r.accessed);
    r = space.walk(kGva, kWrite, WalkEffects::kSet);
    CHECK(r.accessed && r.dirty);
    CHECK_EQ(*space.translate(kGva), kHpa);
    w.second(0x8000) = 0x10'8031;  // rights: the page is known all the same
    r = space.walk(kGva, kWrite, WalkEffects::kNone);
    CHECK_EQ(int{r.fault}, int{WalkReport::kEptViolation});
    CHECK(r.mapped && r.physical == kHpa && !r.writable);
    CHECK(space.walk(kGva, kWrite, WalkEffects::kProbe).ok());
    w.guest(kPte) = 0x8005;
    r = space.walk(kGva, kWrite, WalkEffects::kNone);
    CHECK(r.fault == WalkReport::kPageFault && r.vector == 14 && r.error_code == 7 && r.mapped);
    w.second(0x8000) = 0;
    r = space.walk(kGva, kRead, WalkEffects::kProbe);
    CHECK(r.fault == WalkReport::kEptViolation && !r.mapped && r.fault_gpa == 0x8123);
    CHECK(!space.translate(kGva));
    r = space.walk(bit(50), kRead, WalkEffects::kProbe);
    CHECK(r.fault == WalkReport::kNotCanonical && r.vector == 13 && r.steps.empty());
    CHECK_THROWS(AddressSpace(nullptr, w.paging()), ConfigError);
    CHECK_THROWS(AddressSpace(w.memory, w.paging(), NptState{}), ConfigError);
}

/// Two CPUs that set bits of the same entries, in both dimensions, while software sets others.
void racing(bool npt) {
    World w(npt);
    auto* pte = reinterpret_cast<std::atomic<u64>*>(&w.guest(kPte));
    auto* last = reinterpret_cast<std::atomic<u64>*>(&w.second(0x8000));
    const u64 software = bit(11), initial = *last;
    std::atomic<bool> stop{false};
    std::thread other([&] {
        World* world = &w;
        TableReader tables(*world->memory);
        PagingState paging = world->paging();
        SecondDimension dimension = world->dimension();
        while (!stop) walk_nested(tables, paging, dimension, kGva, kRead);
    });
    const u64 set = software | (npt ? 0x60 : 0x300);
    for (int n = 0; n < 10000; ++n) {
        pte->store(0x8007);
        last->store(initial);
        pte->fetch_or(software);
        last->fetch_or(software);
        bool ok = w.run(kWrite).ok();
        if (!ok || (*pte & (software | 0x60)) != (software | 0x60) || (*last & set) != set) {
            CHECK_EQ(pte->load(), 0x8067 | software);
            CHECK_EQ(last->load(), initial | set);
            break;
        }
    }
    stop = true;
    other.join();
    CHECK_EQ(pte->load(), 0x8067 | software);
}

}  // namespace

int main() {
    for (bool npt : {false, true}) {
        through(npt);
        guest_faults(npt);
        other_modes(npt);
        racing(npt);
    }
    ept_faults();
    npt_faults();
    address_space();
    return pvtest::finish("test_nested");
}
