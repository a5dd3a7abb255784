// The host's breakpoints in a machine, on all its CPUs.
//
// A software breakpoint is an INT3 in the guest's memory, and only there while CPUs run: it is put
// in by arm() and taken out when the last CPU stands still, so that nobody who looks at the memory
// of a machine that stands sees one. It belongs to the physical address that its linear address had
// when it was added; wherever that is mapped, it is hit.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/engine.hpp"

namespace polyvisor {

struct Breakpoint {
    enum class Kind : u8 { kSoftware, kHardware, kWrite, kAccess };
    u64 id = 0;       ///< 1, 2, ... in the order they were added
    u64 address = 0;  ///< linear
    Kind kind = Kind::kSoftware;
    u8 size = 1;
    u64 gpa = 0;  ///< kSoftware only
};

const char* to_string(Breakpoint::Kind kind);
/// "software", "hardware", "write", "access"; throws ConfigError.
Breakpoint::Kind breakpoint_kind(const std::string& name);

/// A CPU has met a breakpoint.
struct DebugStop {
    u32 cpu = 0;
    u64 breakpoint = 0;  ///< its id
    Breakpoint::Kind kind = Breakpoint::Kind::kSoftware;
    /// RIP, linear: a code breakpoint's own address; for data, of the instruction after the access.
    u64 address = 0;
};

class Breakpoints {
  public:
    using Vcpus = std::vector<std::unique_ptr<Vcpu>>;
    explicit Breakpoints(GuestMemory& memory) : memory_(memory) {}

    // While the machine stands still.
    /// Throws ConfigError for one that is impossible or there already, StateError when a software
    /// breakpoint's address is not mapped now (by the page tables of CPU `index`) or is no memory,
    /// StateMismatch when the engine has none of this kind.
    u64 add(const Vcpus& vcpus, u32 index, u64 address, Breakpoint::Kind kind, u8 size);
    /// Throws ConfigError when there is none with this id.
    void remove(u64 id);
    /// Tells the CPUs, forgets the stops and puts the INT3s in. `pass` leads a CPU past the
    /// instruction it stands at; it is called for those that a software breakpoint stopped.
    void arm(const Vcpus& vcpus, const std::function<void(Vcpu&)>& pass);
    /// The CPUs' set_debug() was used for something else.
    void forget_armed() { armed_ = false; }

    // Any time, from any thread.
    std::vector<Breakpoint> list() const;
    /// Those that have stopped CPUs since the machine last ran, the first first.
    std::vector<DebugStop> stops() const;
    /// run() of `vcpu`, on this thread, has returned kDebug. True: the machine is to pause; false:
    /// it was not for us, the guest goes on.
    bool stopped(Vcpu& vcpu, const Exit& exit);
    /// Takes the INT3s out. No CPU may be in the guest.
    void withdraw();

  private:
    struct Patch {
        u64 gpa;
        u8 original;
    };

    GuestDebug wanted() const;
    void tell(const Vcpus& vcpus);
    void insert();

    GuestMemory& memory_;
    mutable std::mutex mutex_;  // a leaf
    std::vector<Breakpoint> all_;
    std::vector<u64> in_registers_;  // ids, in the order of GuestDebug::hardware
    std::vector<Patch> patches_;
    std::vector<DebugStop> stops_;
    u64 last_id_ = 0;
    bool armed_ = false;  // the CPUs know of what is in all_
    bool told_ = false;   // the CPUs know of something
};

/// RIP plus, outside 64-bit mode, the code segment's base.
u64 linear_rip(const CpuState& state);

}  // namespace polyvisor
