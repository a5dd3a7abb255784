// System behaviour that the run loop calls: delivery of exceptions and interrupts, CPU state in and
// out.
#pragma once

#include "soft/ops.hpp"

namespace polyvisor::soft {

enum class EventType : u8 { kExternal, kNmi, kException, kSoftware, kSoftwareException };

/// Delivers f.fault (an exception) with benign/contributory/page-fault combination into double
/// fault; on return f.fault is clear. False: triple fault (f.activity = kShutdown).
bool deliver_fault(VcpuFrame& f);
/// Delivers an external interrupt or NMI at the present f.rip. May itself end in an exception,
/// which is delivered too. False: triple fault.
bool deliver_event(VcpuFrame& f, u8 vector, EventType type);
/// Delivers f.event, which another engine had begun to deliver. False: triple fault.
bool deliver_in_flight(VcpuFrame& f);

/// Frame <-> State. load_state() assumes a validated state; it flushes translations.
void save_state(const VcpuFrame& f, CpuState& state);
void load_state(VcpuFrame& f, const CpuState& state);
/// INIT: the state after INIT (SDM 3A, table 9-1), waiting for SIPI unless bootstrap.
void init_reset(VcpuFrame& f, bool bootstrap);
/// Start-up IPI.
void start_up(VcpuFrame& f, u8 vector);

/// All features that the soft engine implements, before the host's are taken into account.
FeatureSet implemented_features();

}  // namespace polyvisor::soft
