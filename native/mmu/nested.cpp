#include "mmu/nested.hpp"

#include <algorithm>

#include "mmu/nested_fast.hpp"

namespace polyvisor {
namespace {

using namespace mmu_detail;

/// What the second dimension is asked.
struct SecondAccess {
    bool read = true, write = false, fetch = false;
    bool user_page = false;    ///< the guest's tables say user-mode address
    bool guest_table = false;  ///< of an entry of the guest's tables
};

struct SecondResult {
    u64 hpa = 0;
    u8 shift = 12;
    bool writable = false, executable = false;
};

void copy_trace(const WalkTrace& from, NestedTrace& to) {
    for (unsigned n = 0; n < from.count; ++n) {
        to.steps.push_back({from.steps[n].gpa, from.steps[n].entry, from.steps[n].shift, true});
    }
}

/// Bits of a guest-physical address that the formats of NPT can translate.
unsigned npt_width(PagingMode mode) {
    return mode == PagingMode::k5Level ? 57 : mode == PagingMode::k4Level ? 48 : 32;
}

bool report(NestedResult& result, NestedResult::Fault fault, u64 gpa, bool guest_table,
            u64 qualification) {
    result.fault = fault;
    result.fault_gpa = gpa;
    result.during_walk = guest_table;
    result.qualification = qualification;
    return false;
}

/// Translates through either kind; on a fault fills `result` and returns false.
template <Effects effects>
bool translate_second(TableReader& tables, const EptState& ept, u64 gpa, const SecondAccess& a,
                      SecondResult& out, NestedResult& result, NestedTrace* trace) {
    EptAccess access{.read = a.read,
                     .write = a.write,
                     .fetch = a.fetch,
                     .user = a.user_page,
                     .guest_table = a.guest_table};
    EptResult r;
    if constexpr (effects == Effects::kTrace) {
        WalkTrace entries;
        r = walk_ept_trace(tables, ept, gpa, access, entries);
        copy_trace(entries, *trace);
    } else {
        r = effects == Effects::kSetBits ? walk_ept(tables, ept, gpa, access)
                                         : walk_ept_pure(tables, ept, gpa, access);
    }
    out = {r.hpa, r.shift, r.writable, a.user_page ? r.user_executable : r.executable};
    if (PV_LIKELY(r.ok())) return true;
    bool violation = r.outcome == EptResult::kViolation;
    return report(result, violation ? NestedResult::kViolation : NestedResult::kMisconfiguration,
                  gpa, a.guest_table, r.qualification);
}

template <Effects effects>
bool translate_second(TableReader& tables, const NptState& npt, u64 gpa, const SecondAccess& a,
                      SecondResult& out, NestedResult& result, NestedTrace* trace) {
    PageAccess access{.write = a.write || (a.guest_table && a.read),
                      .fetch = a.fetch,
                      .user = a.read || a.write || a.fetch};
    u64 where = a.guest_table ? kNpfTable : kNpfFinal;
    if (gpa >> npt_width(npt.paging.mode)) {
        return report(result, NestedResult::kNested, gpa, a.guest_table,
                      where | access_error(npt.paging, access));
    }
    WalkResult r;
    if constexpr (effects == Effects::kTrace) {
        WalkTrace entries;
        r = walk_trace(tables, npt.paging, gpa, access, entries);
        copy_trace(entries, *trace);
    } else {
        r = effects == Effects::kSetBits ? walk(tables, npt.paging, gpa, access)
                                         : walk_pure(tables, npt.paging, gpa, access);
    }
    out = {r.page.gpa, r.page.shift, r.page.user && r.page.writable, r.page.user && !r.page.nx};
    if (PV_LIKELY(r.ok())) return true;
    return report(result, NestedResult::kNested, gpa, a.guest_table, where | r.error);
}

/// Loads the guest's entries, each found through the second dimension.
template <Effects effects, class Second>
struct NestedLoader {
    TableReader& tables;
    const Second& second;
    NestedResult& result;
    NestedTrace* trace;
    bool probe;

    bool translate(u64 address, bool write, EntryPlace& place) {
        SecondResult found;
        SecondAccess access{.read = !probe, .write = write, .guest_table = true};
        return translate_second<effects>(tables, second, address, access, found, result, trace) &&
               FlatLoader{tables}.find(found.hpa, place);
    }
    bool find(u64 address, EntryPlace& place) { return translate(address, false, place); }
    bool may_set_bits(u64 address, EntryPlace& place) { return translate(address, true, place); }
    void note_write(const EntryPlace& place, u64 size) {
        FlatLoader{tables}.note_write(place, size);
    }
    void note_step(u64 address, u64 entry, u8 shift) {
        trace->steps.push_back({address, entry, shift, false});
    }
};

template <Effects effects, class Second>
NestedResult nested(TableReader& tables, const PagingState& guest, const Second& second, u64 gva,
                    PageAccess a, NestedTrace* trace, bool probe) {
    NestedResult result;
    NestedLoader<effects, Second> loader{tables, second, result, trace, probe};
    WalkResult walked;
    if (walk_any<effects>(loader, guest, gva, a, walked) == Outcome::kAborted) return result;
    result.guest = walked.page;
    if (walked.fault) {
        result.fault = NestedResult::kGuest;
        result.error = walked.error;
        return result;
    }
    const Translation& page = walked.page;
    SecondAccess access{.read = !probe && !a.write && !a.fetch,
                        .write = a.write,
                        .fetch = a.fetch,
                        .user_page = page.user};
    SecondResult found;
    bool ok = translate_second<effects>(tables, second, page.gpa, access, found, result, trace);
    result.hpa = found.hpa;
    result.shift = std::min(page.shift, found.shift);
    result.writable = ok && page.writable && found.writable;
    result.executable = ok && !page.nx && found.executable;
    return result;
}

/// The common case; false: nested() must say.
template <bool sets, class Second>
[[gnu::noinline]] bool nested_fast(TableReader& tables, const PagingState& guest,
                                   const Second& second, u64 gva, PageAccess a,
                                   NestedResult& result) {
    constexpr bool kEpt = std::is_same_v<Second, EptState>;
    const SecondPlans plans = plan_second(tables, second, a, sets);
    if (!nested_common(guest, plans)) return false;
    Followed f, last;
    if (!follow_nested<kEpt>(tables, guest, plans, gva, f, last)) return false;
    const Plan plan = make_plan<kFormat4Level>(guest, a, sets);
    if (f.wrong(plan)) return false;
    describe<kFormat4Level>(guest, plan, f, result.guest);
    if (!keys_allow(guest, a, result.guest)) return false;
    u64 all = last.all & last.leaf;
    result.hpa = last.address;
    result.shift = std::min(f.shift, last.shift);
    result.writable = result.guest.writable && (all & (kEpt ? u64{kEpteWrite} : kPteWritable));
    result.executable =
        !result.guest.nx && (kEpt ? all & kEpteExecute : !((last.any | last.leaf) & kPteNoExecute));
    return true;
}

template <bool sets>
PV_INLINE bool nested_fast(TableReader& tables, const PagingState& guest,
                           const SecondDimension& second, u64 gva, PageAccess a,
                           NestedResult& result) {
    const EptState* ept = std::get_if<EptState>(&second);
    return ept ? nested_fast<sets>(tables, guest, *ept, gva, a, result)
               : nested_fast<sets>(tables, guest, *std::get_if<NptState>(&second), gva, a, result);
}

template <Effects effects>
NestedResult nested_any(TableReader& tables, const PagingState& guest,
                        const SecondDimension& second, u64 gva, PageAccess access,
                        NestedTrace* trace = nullptr, bool probe = false) {
    if (const EptState* ept = std::get_if<EptState>(&second)) {
        return nested<effects>(tables, guest, *ept, gva, access, trace, probe);
    }
    const NptState& npt = *std::get_if<NptState>(&second);
    if (PV_LIKELY(!npt.paging.pke && !probe)) {
        return nested<effects>(tables, guest, npt, gva, access, trace, probe);
    }
    NptState plain = npt;
    plain.paging.pke = false;  // keys are the guest's own affair
    if (probe) plain.paging = probing(npt.paging);
    return nested<effects>(tables, guest, plain, gva, access, trace, probe);
}

}  // namespace

NestedResult walk_nested(TableReader& tables, const PagingState& guest,
                         const SecondDimension& second, u64 gva, PageAccess access) {
    NestedResult result;
    if (PV_UNLIKELY(!nested_fast<true>(tables, guest, second, gva, access, result))) {
        result = nested_any<Effects::kSetBits>(tables, guest, second, gva, access);
    }
    return result;
}

NestedResult walk_nested_pure(TableReader& tables, const PagingState& guest,
                              const SecondDimension& second, u64 gva, PageAccess access,
                              NestedTrace* trace) {
    NestedResult result;
    if (trace) {
        trace->steps.clear();
        result = nested_any<Effects::kTrace>(tables, guest, second, gva, access, trace);
    } else if (PV_UNLIKELY(!nested_fast<false>(tables, guest, second, gva, access, result))) {
        result = nested_any<Effects::kNone>(tables, guest, second, gva, access);
    }
    return result;
}

NestedResult walk_nested_probe(TableReader& tables, const PagingState& guest,
                               const SecondDimension& second, u64 gva, NestedTrace* trace) {
    PagingState asks_nothing = probing(guest);
    if (!trace) {
        return nested_any<Effects::kNone>(tables, asks_nothing, second, gva, {}, nullptr, true);
    }
    trace->steps.clear();
    return nested_any<Effects::kTrace>(tables, asks_nothing, second, gva, {}, trace, true);
}

}  // namespace polyvisor
