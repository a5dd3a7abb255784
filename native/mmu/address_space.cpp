#include "mmu/address_space.hpp"

#include "base/error.hpp"

namespace polyvisor {
namespace {

constexpr u64 kRegister = ~u64{0};  // "address" of a PDPTE register in a trace

/// Whether a #PF was for want of rights only, so that the page is known all the same.
bool rights_only(u32 error) {
    return (error & kPfPresent) && !(error & kPfReserved);
}

void describe(WalkReport& report, const Translation& page) {
    report.mapped = true;
    report.gpa = report.physical = page.gpa;
    report.shift = page.shift;
    report.user = page.user;
    report.writable = page.writable;
    report.executable = !page.nx;
    report.global = page.global;
    report.dirty = page.dirty;
    report.memory_type = page.memory_type;
    report.key = page.key;
}

void set_page_fault(WalkReport& report, u32 error) {
    report.fault = WalkReport::kPageFault;
    report.vector = 14;
    report.error_code = error;
}

/// The A bit of the guest's last entry. Without paging nothing is accessed.
bool leaf_accessed(const std::vector<NestedTrace::Step>& steps) {
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
        if (!step->second) return step->address != kRegister && (step->entry & kPteAccessed);
    }
    return false;
}

WalkReport walk_flat(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access,
                     WalkEffects effects) {
    WalkReport report;
    WalkTrace trace;
    WalkResult result;
    if (effects == WalkEffects::kSet) {
        result = walk(tables, paging, gva, access);
        walk_trace(tables, paging, gva, access, trace);
    } else if (effects == WalkEffects::kProbe) {
        result = walk_trace(tables, probing(paging), gva, {}, trace);
    } else {
        result = walk_trace(tables, paging, gva, access, trace);
    }
    for (unsigned n = 0; n < trace.count; ++n) {
        report.steps.push_back(
            {trace.steps[n].gpa, trace.steps[n].entry, trace.steps[n].shift, false});
    }
    if (result.fault) set_page_fault(report, result.error);
    if (result.ok() || rights_only(result.error)) {
        describe(report, result.page);
        report.accessed = leaf_accessed(report.steps);
    }
    return report;
}

WalkReport walk_both(TableReader& tables, const PagingState& paging, const SecondDimension& second,
                     u64 gva, PageAccess access, WalkEffects effects) {
    WalkReport report;
    NestedTrace trace;
    NestedResult result;
    if (effects == WalkEffects::kSet) {
        result = walk_nested(tables, paging, second, gva, access);
        walk_nested_pure(tables, paging, second, gva, access, &trace);
    } else if (effects == WalkEffects::kProbe) {
        result = walk_nested_probe(tables, paging, second, gva, &trace);
    } else {
        result = walk_nested_pure(tables, paging, second, gva, access, &trace);
    }
    report.steps = std::move(trace.steps);
    switch (result.fault) {
        case NestedResult::kNone:
            break;
        case NestedResult::kGuest:
            set_page_fault(report, result.error);
            break;
        case NestedResult::kViolation:
            report.fault = WalkReport::kEptViolation;
            break;
        case NestedResult::kMisconfiguration:
            report.fault = WalkReport::kEptMisconfiguration;
            break;
        case NestedResult::kNested:
            report.fault = WalkReport::kNestedPageFault;
            break;
    }
    report.qualification = result.qualification;
    report.fault_gpa = result.fault_gpa;
    report.during_walk = result.during_walk;

    // What is there whatever the rights; a fault for another reason has it as its own.
    const std::vector<NestedTrace::Step>* whole = &report.steps;
    if (!result.ok() && effects != WalkEffects::kProbe) {
        result = walk_nested_probe(tables, paging, second, gva, &trace);
        whole = &trace.steps;
    }
    if (!result.ok()) return report;
    describe(report, result.guest);
    report.physical = result.hpa;
    report.shift = result.shift;
    report.writable = result.writable;
    report.executable = result.executable;
    report.accessed = leaf_accessed(*whole);
    return report;
}

}  // namespace

AddressSpace::AddressSpace(std::shared_ptr<GuestMemory> memory, const PagingState& paging,
                           std::optional<SecondDimension> second)
    : memory_(std::move(memory)), paging_(paging), probing_(probing(paging)), second_(second) {
    if (!memory_) throw ConfigError("memory", "an address space needs memory");
    if (!second_) return;
    const NptState* npt = std::get_if<NptState>(&*second_);
    if (npt && npt->paging.mode == PagingMode::kNone) {
        throw ConfigError("npt", "nested paging needs the host's CR0.PG set; set bit 31 of cr0");
    }
}

WalkReport AddressSpace::walk(u64 gva, PageAccess access, WalkEffects effects) const {
    if (!is_canonical(paging_.mode, gva)) {
        WalkReport report;
        report.fault = WalkReport::kNotCanonical;
        report.vector = 13;
        return report;
    }
    TableReader tables(*memory_);
    return second_ ? walk_both(tables, paging_, *second_, gva, access, effects)
                   : walk_flat(tables, paging_, gva, access, effects);
}

std::optional<u64> AddressSpace::translate(u64 gva) const {
    if (!is_canonical(paging_.mode, gva)) return {};
    TableReader tables(*memory_);
    if (second_) {
        NestedResult result = walk_nested_probe(tables, paging_, *second_, gva);
        if (!result.ok()) return {};
        return result.hpa;
    }
    WalkResult result = walk_pure(tables, probing_, gva, {});
    if (result.fault) return {};
    return result.page.gpa;
}

}  // namespace polyvisor
