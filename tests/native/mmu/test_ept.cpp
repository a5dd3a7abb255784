// EPT walks, table by table from SDM 3C 29.3: what each entry allows, what it is when it does not,
// and the qualification that tells a hypervisor. One guest-physical page, 0x5000, whose four
// entries each case sets.
#include <vector>

#include "base/error.hpp"
#include "check.hpp"
#include "mmu/ept.hpp"

using namespace polyvisor;

namespace {

constexpr u64 kGpa = 0x5123, kHpa = 0x8123;
constexpr EptAccess kRead{}, kWrite{.read = false, .write = true},
    kFetch{.read = false, .fetch = true};

struct World {
    GuestMemory memory;
    TableReader tables{memory};
    EptCapabilities c;
    bool access_dirty = false;

    World() {
        memory.add(Gpa(0), 16 * kPageSize, "ram");
        set(7, 7, 7, 0x37);
    }
    void set(u64 pml4e, u64 pdpte, u64 pde, u64 pte) {
        entry(4) = 0x2000 | pml4e, entry(3) = 0x3000 | pdpte;
        entry(2) = 0x4000 | pde, entry(1) = 0x8000 | pte;
    }
    /// Of the page, by the manual's level numbers.
    u64& entry(unsigned level) {
        u64 at = (5 - level) * 0x1000 + (level == 1 ? 5 * 8 : 0);
        return *reinterpret_cast<u64*>(memory.span(Gpa(at), 8).data());
    }
    EptState state() {
        return make_ept_state(0x1000 | (access_dirty ? bit(6) : 0) | 3 << 3 | 6, c);
    }
    EptResult run(EptAccess a, u64 gpa = kGpa) { return walk_ept(tables, state(), gpa, a); }
};

/// Rights that the four entries have, the access, and the qualification (0: goes through).
void rights() {
    struct Case {
        u64 pml4e, pde, pte;
        EptAccess access;
        u64 qualification;
    };
    const u64 final_linear = kEptLinearValid | kEptFinal;
    const std::vector<Case> cases{
        {7, 7, 7, kRead, 0},
        {7, 7, 7, kWrite, 0},
        {7, 7, 7, kFetch, 0},
        {1, 7, 7, kRead, 0},
        {1, 7, 7, kWrite, kEptWrite | kEptReadable | final_linear},
        {1, 7, 7, kFetch, kEptFetch | kEptReadable | final_linear},
        {7, 3, 7, kFetch, kEptFetch | kEptReadable | kEptWritable | final_linear},
        {7, 7, 5, kWrite, kEptWrite | kEptReadable | kEptExecutable | final_linear},
        {7, 7, 4, kRead, kEptRead | kEptExecutable | final_linear},
        {7, 7, 4, kFetch, 0},
        {4, 7, 4, kFetch, 0},
        {4, 7, 3, kFetch, kEptFetch | final_linear},  // no right that all have
        {7, 7, 0, kRead, kEptRead | final_linear},
        {7, 0, 7, kWrite, kEptWrite | final_linear},
        {5, 0, 7, kFetch, kEptFetch | final_linear},
        {1, 7, 7, {.write = true}, kEptRead | kEptWrite | kEptReadable | final_linear},
        {1, 7, 7, {.read = false, .write = true, .linear = false}, kEptWrite | kEptReadable},
        {0, 7, 7, {.guest_table = true}, kEptRead | kEptLinearValid},
        {1, 7, 7, {.guest_table = true}, 0},
    };
    for (const Case& c : cases) {
        World w;
        w.set(c.pml4e, 7, c.pde, 0x30 | c.pte);
        EptResult r = w.run(c.access);
        CHECK_EQ(r.outcome, c.qualification ? EptResult::kViolation : EptResult::kOk);
        CHECK_EQ(r.qualification, c.qualification);
        if (r.ok()) {
            CHECK_EQ(r.hpa, kHpa);
            CHECK_EQ(+r.memory_type, 6);
            u64 all = c.pml4e & c.pde & c.pte;
            CHECK_EQ(r.readable | r.writable << 1 | r.executable << 2, static_cast<int>(all));
        }
    }
    // With A/D bits on, a guest's table is written whatever the walk does, and told as both.
    World w;
    w.access_dirty = true;
    w.set(7, 7, 7, 0x31);
    EptResult r = w.run({.guest_table = true});
    CHECK_EQ(r.qualification, kEptRead | kEptWrite | kEptReadable | kEptLinearValid);
    w.set(7, 7, 7, 0x33);
    CHECK(w.run({.guest_table = true}).dirty);
    CHECK_EQ(w.entry(1), 0x8333u);
    // The page's memory type, and whether it overrides the guest's PAT.
    for (unsigned type : {0, 1, 4, 5, 6}) {
        for (bool ignore_pat : {false, true}) {
            World typed;
            typed.set(7, 7, 7, type << 3 | (ignore_pat ? 0x40 : 0) | 7);
            EptResult got = typed.run(kRead);
            CHECK(got.ok());
            CHECK_EQ(u32{got.memory_type}, type);
            CHECK_EQ(got.ignore_pat, ignore_pat);
        }
    }
    // Beyond what four levels translate.
    CHECK_EQ(w.run(kRead, bit(48) | kGpa).qualification, kEptRead | kEptLinearValid | kEptFinal);
    CHECK_EQ(w.run(kRead, bit(48) | kGpa).outcome, EptResult::kViolation);
}

void misconfigurations() {
    struct Case {
        const char* what;
        unsigned level;  ///< of the entry that is replaced
        u64 entry;
        bool wrong;
        EptCapabilities capabilities;
    };
    const EptCapabilities usual, no_x{.execute_only = false},
        small{.pages_2mb = false, .pages_1gb = false};
    const std::vector<Case> cases{
        {"write-only page", 1, 0x8032, true, usual},
        {"write-only table", 3, 0x3002, true, usual},
        {"write and execute", 1, 0x8036, true, usual},
        {"execute-only", 1, 0x8034, false, usual},
        {"execute-only, unsupported", 1, 0x8034, true, no_x},
        {"execute-only table, unsupported", 4, 0x2004, true, no_x},
        {"type 0", 1, 0x8007, false, usual},
        {"type 1", 1, 0x800f, false, usual},
        {"type 2", 1, 0x8017, true, usual},
        {"type 3", 1, 0x801f, true, usual},
        {"type 4", 1, 0x8027, false, usual},
        {"type 5", 1, 0x802f, false, usual},
        {"type 6", 1, 0x8037, false, usual},
        {"type 7", 1, 0x803f, true, usual},
        {"ignore PAT", 1, 0x8077, false, usual},
        {"bit 3 of a table", 4, 0x200f, true, usual},
        {"bit 6 of a table", 2, 0x4047, true, usual},
        {"bit 7 of a PML4E", 4, 0x2087, true, usual},
        {"MAXPHYADDR, page", 1, bit(46) | 0x8037, true, usual},
        {"MAXPHYADDR, table", 3, bit(51) | 0x3007, true, usual},
        {"software's bits", 1, bit(52) | bit(62) | bit(63) | bit(11) | 0x8037, false, usual},
        {"A and D bits", 1, 0x8337, false, usual},
        {"2 MB page", 2, 0x0b7, false, usual},
        {"2 MB page, reserved bit", 2, 0x10'0000 | 0x0b7, true, usual},
        {"2 MB page, bit 12", 2, 0x10b7, true, usual},
        {"2 MB page, type 2", 2, 0x097, true, usual},
        {"2 MB page, unsupported", 2, 0x0b7, true, small},
        {"1 GB page", 3, 0x0b7, false, usual},
        {"1 GB page, reserved bit", 3, 0x2000'00b7, true, usual},
        {"1 GB page, unsupported", 3, 0x0b7, true, small},
        {"table outside memory", 4, 0x7'0000'0007, true, usual},
    };
    for (const Case& c : cases) {
        World w;
        w.c = c.capabilities;
        w.entry(c.level) = c.entry;
        EptResult r = w.run(kFetch);
        if ((r.outcome == EptResult::kMisconfiguration) != c.wrong) {
            pvtest::fail(__FILE__, __LINE__, std::string(c.what) + " is judged wrongly");
        }
        if (!c.wrong) CHECK(r.ok());
        ++pvtest::checks;
        // Not present: whatever else is in the entry means nothing.
        w.entry(c.level) = c.entry & ~u64{7};
        if (c.level != 4 || c.entry < bit(33))
            CHECK_EQ(w.run(kFetch).outcome, EptResult::kViolation);
    }
}

/// The walk goes on below an entry that lacks the right: what it meets there comes first.
void order() {
    World w;
    w.set(1, 7, 7, 0x17);  // no write at the top, reserved type at the bottom
    CHECK_EQ(w.run(kWrite).outcome, EptResult::kMisconfiguration);
    w.set(1, 7, 2, 0x37);  // write-only in the middle
    CHECK_EQ(w.run(kWrite).outcome, EptResult::kMisconfiguration);
    w.set(1, 0, 2, 0x17);  // but below one that is not present nothing is met
    CHECK_EQ(w.run(kWrite).qualification, kEptWrite | kEptLinearValid | kEptFinal);
    w.set(7, 7, 7, 0x37);
    w.entry(4) = 0x1007;  // a table that is its own
    w.entry(1) = 0;
    CHECK(w.run(kRead, 0x123).ok());
    CHECK_EQ(w.run(kRead, 0x123).hpa, 0x1123u);
}

void mode_based_execute() {
    const u64 final_linear = kEptLinearValid | kEptFinal;
    constexpr EptAccess kUserFetch{.read = false, .fetch = true, .user = true};
    World w;
    w.set(0x407, 0x407, 0x407, 0x433);  // XU but not XS
    CHECK_EQ(w.run(kUserFetch).outcome,
             EptResult::kViolation);  // the control is off: bit 10 ignored
    CHECK_EQ(w.run(kUserFetch).qualification,
             kEptFetch | kEptReadable | kEptWritable | final_linear);
    w.c.mode_based_execute = true;
    CHECK(w.run(kUserFetch).ok());
    CHECK(w.run(kUserFetch).user_executable && !w.run(kUserFetch).executable);
    CHECK_EQ(w.run(kFetch).qualification,
             kEptFetch | kEptReadable | kEptWritable | kEptUserExecutable | final_linear);
    // Bit 10 alone makes an entry present, and it is execute-only.
    w.entry(1) = 0x8430;
    CHECK(w.run(kUserFetch).ok());
    w.c.execute_only = false;
    CHECK_EQ(w.run(kUserFetch).outcome, EptResult::kMisconfiguration);
    w.c.mode_based_execute = false;
    CHECK_EQ(w.run(kUserFetch).outcome, EptResult::kViolation);
}

void accessed_and_dirty() {
    World w;
    w.run(kWrite);
    CHECK_EQ(w.entry(1), 0x8037u);  // off: never
    w.access_dirty = true;
    w.set(7, 7, 7, 0x31);
    CHECK(!w.run(kWrite).ok());
    CHECK_EQ(w.entry(4), 0x2007u);  // denied: none
    CHECK(!w.run(kRead).dirty);
    CHECK_EQ(w.entry(4), 0x2107u);
    CHECK_EQ(w.entry(2), 0x4107u);
    CHECK_EQ(w.entry(1), 0x8131u);
    w.set(7, 7, 7, 0x37);
    CHECK(w.run(kWrite).dirty);
    CHECK_EQ(w.entry(1), 0x8337u);
    CHECK_EQ(w.entry(2), 0x4107u);
    w.set(7, 7, 7, 0x37);
    CHECK(walk_ept_pure(w.tables, w.state(), kGpa, kWrite).ok());
    CHECK_EQ(w.entry(4), 0x2007u);
    WalkTrace trace;
    walk_ept_trace(w.tables, w.state(), kGpa, kWrite, trace);
    CHECK_EQ(+trace.count, 4);
    CHECK_EQ(trace.steps[3].gpa, 0x4028u);
    CHECK_EQ(trace.steps[3].entry, 0x8037u);
}

void pointers() {
    EptCapabilities c;
    auto bad = [&](u64 eptp) { return !eptp_error(eptp, c).empty(); };
    CHECK(!bad(0x101e));           // WB, four levels
    CHECK(!bad(0x1018));           // UC
    CHECK(!bad(0x1026));           // five levels
    CHECK(!bad(0x105e));           // A/D
    CHECK(bad(0x1019));            // WC
    CHECK(bad(0x1016));            // three levels
    CHECK(bad(0x102e));            // six
    CHECK(bad(0x109e));            // bit 7
    CHECK(bad(bit(46) | 0x101e));  // MAXPHYADDR
    c.five_levels = c.access_dirty = false;
    CHECK(bad(0x1026) && bad(0x105e));
    CHECK_THROWS(make_ept_state(0x1026, c), ConfigError);
}

}  // namespace

int main() {
    rights();
    misconfigurations();
    order();
    mode_based_execute();
    accessed_and_dirty();
    pointers();
    return pvtest::finish("test_ept");
}
