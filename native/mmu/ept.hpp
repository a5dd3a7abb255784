// Extended page tables: guest-physical to host-physical, as Intel's processors (SDM 3C, 29.3).
//
//     EptState ept = make_ept_state(eptp, capabilities);
//     EptResult r = walk_ept(tables, ept, gpa, {.write = true});
//     if (r.outcome == EptResult::kViolation) exit with r.qualification
//
// The rules of mmu/walker.hpp hold: locked updates of accessed and dirty bits once nothing forbids
// the access, tables outside memory read as all ones (which no valid entry is), nothing throws.
#pragma once

#include "mmu/walker.hpp"

namespace polyvisor {

/// IA32_VMX_EPT_VPID_CAP and the VM-execution controls, as far as walks depend on them.
struct EptCapabilities {
    bool execute_only = true;
    bool five_levels = true;
    bool pages_2mb = true;
    bool pages_1gb = true;
    bool access_dirty = true;
    bool mode_based_execute = false;  ///< the VM-execution control: bit 10 is user-mode execute
    u64 physical_mask = bit(46) - 1;  ///< bits below MAXPHYADDR
};

struct EptState {
    u64 root = 0;
    u8 levels = 4;
    bool access_dirty = false;
    EptCapabilities capabilities;
};

/// Why an EPTP cannot be used (VM entry fails, SDM 3C 27.2.1.1), "" when it can.
std::string eptp_error(u64 eptp, const EptCapabilities& capabilities);
/// Throws ConfigError ("eptp") for an EPTP that VM entry refuses.
EptState make_ept_state(u64 eptp, const EptCapabilities& capabilities = {});

struct EptAccess {
    bool read = true;  ///< a write is not a read, a fetch is not one either
    bool write = false;
    bool fetch = false;
    bool user = false;         ///< the linear address is a user-mode one: for mode-based execute
    bool linear = true;        ///< qualification bit 7: there is a guest-linear address
    bool guest_table = false;  ///< of a guest paging-structure entry (qualification bit 8 clear)
};

/// Exit qualification of an EPT violation (SDM 3C, table 28-7).
enum EptQualification : u64 {
    kEptRead = bit(0),
    kEptWrite = bit(1),
    kEptFetch = bit(2),
    kEptReadable = bit(3),
    kEptWritable = bit(4),
    kEptExecutable = bit(5),
    kEptUserExecutable = bit(6),
    kEptLinearValid = bit(7),
    kEptFinal = bit(8),
};

struct EptResult {
    enum Outcome : u8 { kOk, kViolation, kMisconfiguration };
    Outcome outcome = kOk;
    u8 shift = 12;  ///< log2 of the page
    bool readable = false, writable = false, executable = false, user_executable = false;
    bool dirty = false;
    bool ignore_pat = false;
    u8 memory_type = 0;  ///< 0 UC, 1 WC, 4 WT, 5 WP, 6 WB
    u64 hpa = 0;
    u64 qualification = 0;  ///< of a violation
    bool ok() const { return outcome == kOk; }
};

/// Translates, setting A/D bits where EPTP bit 6 asks for it.
EptResult walk_ept(TableReader& tables, const EptState& ept, u64 gpa, EptAccess access);
/// Translates without side effects.
EptResult walk_ept_pure(TableReader& tables, const EptState& ept, u64 gpa, EptAccess access);
/// walk_ept_pure() that also reports the entries.
EptResult walk_ept_trace(TableReader& tables, const EptState& ept, u64 gpa, EptAccess access,
                         WalkTrace& trace);

}  // namespace polyvisor
