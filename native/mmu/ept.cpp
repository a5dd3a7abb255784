#include "mmu/ept.hpp"

#include <cstdio>

#include "base/error.hpp"
#include "mmu/walk_generic.hpp"

namespace polyvisor {
namespace {

using namespace mmu_detail;

constexpr u64 kRights = kEpteRead | kEpteWrite | kEpteExecute;

bool memory_type_valid(u64 type) {
    return type == 0 || type == 1 || type == 4 || type == 5 || type == 6;
}

/// EPT misconfigurations (SDM 3C, 29.3.3.1) of an entry that is present.
bool misconfigured(const EptCapabilities& c, const PagingLevel& format, bool last, u64 entry,
                   bool& leaf) {
    leaf = last || (entry & kEptePageSize);
    if (!(entry & kEpteRead)) {
        if (entry & kEpteWrite) return true;
        if (!c.execute_only) return true;  // present without read or write: some execute
    }
    if (entry & kPteAddress & ~c.physical_mask) return true;
    if (!leaf) return entry & 0x78;
    if (!last) {
        if (format.large == LargePage::kReserved) return true;
        if (format.large == LargePage::kIf1Gb && !c.pages_1gb) return true;
        if (format.large == LargePage::kIf2Mb && !c.pages_2mb) return true;
        if (entry & (bit(format.shift) - 1) & ~kPageMask) return true;
    }
    return !memory_type_valid(bits(entry, 5, 3));
}

/// The qualification of a violation: the access, and the rights of all entries together.
u64 qualify(const EptState& ept, EptAccess a, u64 rights) {
    u64 q = (a.read ? u64{kEptRead} : 0) | (a.write ? u64{kEptWrite} : 0) |
            (a.fetch ? u64{kEptFetch} : 0) | (rights & kRights) << 3;
    if (ept.capabilities.mode_based_execute && (rights & kEpteUserExecute)) q |= kEptUserExecutable;
    if (a.linear) q |= kEptLinearValid | (a.guest_table ? 0 : u64{kEptFinal});
    return q;
}

bool allowed(const EptState& ept, EptAccess a, u64 rights) {
    u64 execute = ept.capabilities.mode_based_execute && a.user ? kEpteUserExecute : kEpteExecute;
    return !(a.read && !(rights & kEpteRead)) && !(a.write && !(rights & kEpteWrite)) &&
           !(a.fetch && !(rights & execute));
}

template <Effects effects>
Outcome ept_once(TableReader& tables, const EptState& ept, u64 gpa, EptAccess a, EptResult& result,
                 WalkTrace* trace) {
    const EptCapabilities& c = ept.capabilities;
    const PagingFormat& format = ept.levels == 5 ? kFormatEpt5 : kFormatEpt4;
    const u64 present = kRights | (c.mode_based_execute ? u64{kEpteUserExecute} : 0);
    FlatLoader loader{tables, trace};
    auto violation = [&](u64 rights) {
        result.outcome = EptResult::kViolation;
        result.qualification = qualify(ept, a, rights);
        return Outcome::kDone;
    };
    // With A/D bits on, a guest's table is read for a possible write (SDM 3C, 29.3.5). A probing
    // walk asks for nothing, here either.
    if (a.guest_table && a.read && ept.access_dirty) a.write = true;
    // Four levels translate 48 bits, and any above them are a violation (SDM 3C, 29.3.2).
    if (gpa >> (format.levels == 5 ? 57 : 48)) return violation(0);

    struct Step {
        EntryPlace place;
        u64 entry;
    } steps[5];
    u64 rights = present;
    u64 table = ept.root;
    unsigned level = 0;
    for (;; ++level) {
        const PagingLevel& at = format.level[level];
        Step& step = steps[level];
        loader.find(table + bits(gpa, at.shift + 8, at.shift) * 8, step.place);
        step.entry = step.place.host ? read_entry<8>(step.place.host) : ~u64{0};
        if constexpr (effects == Effects::kTrace) {
            loader.note_step(step.place.address, step.entry, at.shift);
        }
        rights &= step.entry;
        if (!(step.entry & present)) return violation(rights);
        bool leaf;
        if (misconfigured(c, at, level + 1 == format.levels, step.entry, leaf)) {
            result.outcome = EptResult::kMisconfiguration;
            return Outcome::kDone;
        }
        if (leaf) break;
        table = step.entry & kPteAddress;
    }

    u64 entry = steps[level].entry;
    result.shift = format.level[level].shift;
    u64 offset = bit(result.shift) - 1;
    result.hpa = (entry & kPteAddress & ~offset) | (gpa & offset);
    result.readable = rights & kEpteRead;
    result.writable = rights & kEpteWrite;
    result.executable = rights & kEpteExecute;
    result.user_executable =
        rights & (c.mode_based_execute ? u64{kEpteUserExecute} : u64{kEpteExecute});
    result.memory_type = bits(entry, 5, 3);
    result.ignore_pat = entry & kEpteIgnorePat;
    result.dirty = ept.access_dirty && (entry & kEpteDirty);
    if (!allowed(ept, a, rights)) return violation(rights);

    if constexpr (effects == Effects::kSetBits) {
        if (!ept.access_dirty) return Outcome::kDone;
        for (unsigned n = 0; n <= level; ++n) {
            u64 want = kEpteAccessed | (n == level && a.write ? u64{kEpteDirty} : 0);
            Step& step = steps[n];
            if (PV_LIKELY((step.entry & want) == want) || !step.place.writable) continue;
            if (!set_bits<8>(step.place.host, step.entry, want)) return Outcome::kRetry;
            loader.note_write(step.place, 8);
            if (n == level && a.write) result.dirty = true;
        }
    }
    return Outcome::kDone;
}

template <Effects effects>
EptResult ept_any(TableReader& tables, const EptState& ept, u64 gpa, EptAccess access,
                  WalkTrace* trace = nullptr) {
    for (;;) {  // each retry means that another CPU made progress on the same entry
        EptResult result;
        if (ept_once<effects>(tables, ept, gpa, access, result, trace) == Outcome::kDone) {
            return result;
        }
    }
}

std::string hex(u64 value) {
    char text[24];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

}  // namespace

std::string eptp_error(u64 eptp, const EptCapabilities& c) {
    u64 type = bits(eptp, 2, 0), length = bits(eptp, 5, 3) + 1;
    if (type != 0 && type != 6) {
        return "memory type " + std::to_string(type) + " (bits 2:0) is neither 0 (UC) nor 6 (WB)";
    }
    if (length != 4 && !(length == 5 && c.five_levels)) {
        return std::to_string(length) + " levels (bits 5:3, plus one) are not supported, " +
               (c.five_levels ? "4 and 5 are" : "only 4 are");
    }
    if ((eptp & bit(6)) && !c.access_dirty) {
        return "accessed and dirty flags (bit 6) are not supported";
    }
    if (eptp & 0xf80) return "bits 11:7 are reserved and not zero";
    if (eptp & ~c.physical_mask & ~kPageMask) {
        return "the address " + hex(eptp & ~kPageMask) + " is beyond MAXPHYADDR (" +
               std::to_string(std::bit_width(c.physical_mask)) + " bits)";
    }
    return {};
}

EptState make_ept_state(u64 eptp, const EptCapabilities& capabilities) {
    std::string error = eptp_error(eptp, capabilities);
    if (!error.empty()) throw ConfigError("eptp", "EPTP " + hex(eptp) + " is refused: " + error);
    EptState ept;
    ept.root = eptp & kPteAddress;
    ept.levels = static_cast<u8>(bits(eptp, 5, 3) + 1);
    ept.access_dirty = eptp & bit(6);
    ept.capabilities = capabilities;
    return ept;
}

EptResult walk_ept(TableReader& tables, const EptState& ept, u64 gpa, EptAccess access) {
    return ept_any<Effects::kSetBits>(tables, ept, gpa, access);
}

EptResult walk_ept_pure(TableReader& tables, const EptState& ept, u64 gpa, EptAccess access) {
    return ept_any<Effects::kNone>(tables, ept, gpa, access);
}

EptResult walk_ept_trace(TableReader& tables, const EptState& ept, u64 gpa, EptAccess access,
                         WalkTrace& trace) {
    trace.count = 0;
    return ept_any<Effects::kTrace>(tables, ept, gpa, access, &trace);
}

}  // namespace polyvisor
