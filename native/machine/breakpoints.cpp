#include "machine/breakpoints.hpp"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "base/error.hpp"
#include "cpu/debug.hpp"

namespace polyvisor {

namespace {

using Kind = Breakpoint::Kind;

constexpr u8 kInt3 = 0xcc;

struct Name {
    Kind kind;
    const char* name;
};

constexpr Name kNames[] = {
    {Kind::kSoftware, "software"},
    {Kind::kHardware, "hardware"},
    {Kind::kWrite, "write"},
    {Kind::kAccess, "access"},
};

std::string hex(u64 value) {
    char text[24];
    std::snprintf(text, sizeof text, "%#" PRIx64, value);
    return text;
}

GuestDebug::Breakpoint::Kind register_kind(Kind kind) {
    using Register = GuestDebug::Breakpoint::Kind;
    return kind == Kind::kHardware ? Register::kExecute
           : kind == Kind::kWrite  ? Register::kWrite
                                   : Register::kReadWrite;
}

}  // namespace

const char* to_string(Kind kind) {
    for (const Name& name : kNames) {
        if (name.kind == kind) return name.name;
    }
    return "?";
}

Kind breakpoint_kind(const std::string& text) {
    std::string known;
    for (const Name& name : kNames) {
        if (text == name.name) return name.kind;
        known += (known.empty() ? "" : ", ") + std::string(name.name);
    }
    throw ConfigError("kind",
                      "there is no kind '" + text + "' of breakpoint; choose one of " + known);
}

u64 linear_rip(const CpuState& state) {
    const Segment& cs = state.segments[kCs];
    bool long64 = (state.msr.efer & bit(10)) && cs.l();
    return long64 ? state.rip : static_cast<u32>(cs.base + state.rip);
}

GuestDebug Breakpoints::wanted() const {
    GuestDebug debug;
    for (const Breakpoint& breakpoint : all_) {
        if (breakpoint.kind == Kind::kSoftware) {
            debug.int3_exits = true;
        } else {
            debug.hardware.push_back(
                {breakpoint.address, register_kind(breakpoint.kind), breakpoint.size});
        }
    }
    return debug;
}

u64 Breakpoints::add(const Vcpus& vcpus, u32 index, u64 address, Kind kind, u8 size) {
    const Vcpu& vcpu = *vcpus[index];
    Breakpoint breakpoint{0, address, kind, size, 0};
    if (kind == Kind::kSoftware) {
        if (size != 1) throw ConfigError("size", "a software breakpoint has no size but 1");
        if (!vcpu.translate(address, breakpoint.gpa)) {
            throw StateError("address", "guest-virtual address " + hex(address) +
                                            " is not mapped now; add the software breakpoint "
                                            "later, or take a hardware breakpoint");
        }
        if (memory_.find(Gpa(breakpoint.gpa)) == nullptr) {
            throw StateError("address", "there is no memory at guest-physical address " +
                                            hex(breakpoint.gpa) + " to put a breakpoint in");
        }
    }
    std::lock_guard lock(mutex_);
    for (const Breakpoint& other : all_) {
        bool same = kind == Kind::kSoftware ? other.gpa == breakpoint.gpa
                                            : other.address == address && other.size == size;
        if (other.kind == kind && same) {
            throw ConfigError("address", std::string("there is a ") + to_string(kind) +
                                             " breakpoint at " + hex(address) + " already");
        }
    }
    all_.push_back(breakpoint);
    all_.back().id = last_id_ + 1;
    armed_ = false;
    try {
        tell(vcpus);
    } catch (...) {
        all_.pop_back();
        armed_ = false;
        throw;
    }
    return ++last_id_;
}

void Breakpoints::remove(u64 id) {
    std::lock_guard lock(mutex_);
    auto found = std::find_if(all_.begin(), all_.end(),
                              [&](const Breakpoint& breakpoint) { return breakpoint.id == id; });
    if (found == all_.end()) {
        throw ConfigError("breakpoint", "breakpoint " + std::to_string(id) + " was removed before");
    }
    all_.erase(found);
    armed_ = false;
}

void Breakpoints::arm(const Vcpus& vcpus, const std::function<void(Vcpu&)>& pass) {
    std::vector<DebugStop> stops;
    {
        std::lock_guard lock(mutex_);
        stops = std::exchange(stops_, {});
    }
    for (const DebugStop& stop : stops) {
        if (stop.kind != Kind::kSoftware) continue;  // the engine passes it by itself
        Vcpu& vcpu = *vcpus[stop.cpu];
        if (linear_rip(vcpu.save()) == stop.address) pass(vcpu);
    }
    std::lock_guard lock(mutex_);
    tell(vcpus);
    insert();
}

void Breakpoints::tell(const Vcpus& vcpus) {
    if (armed_) return;
    GuestDebug debug = wanted();
    validate(debug);
    if (told_ || debug != GuestDebug{}) {
        for (const auto& vcpu : vcpus) vcpu->set_debug(debug);
    }
    told_ = debug != GuestDebug{};
    in_registers_.clear();
    for (const Breakpoint& breakpoint : all_) {
        if (breakpoint.kind != Kind::kSoftware) in_registers_.push_back(breakpoint.id);
    }
    armed_ = true;
}

void Breakpoints::insert() {
    for (const Breakpoint& breakpoint : all_) {
        if (breakpoint.kind != Kind::kSoftware) continue;
        u8 original = memory_.load<u8>(Gpa(breakpoint.gpa));
        if (original == kInt3) continue;  // the guest's own does as well
        memory_.store(Gpa(breakpoint.gpa), kInt3);
        patches_.push_back({breakpoint.gpa, original});
    }
}

void Breakpoints::withdraw() {
    std::lock_guard lock(mutex_);
    for (const Patch& patch : patches_) {
        // What the guest has put there meanwhile is its code now.
        if (memory_.load<u8>(Gpa(patch.gpa)) != kInt3) continue;
        memory_.store(Gpa(patch.gpa), patch.original);
    }
    patches_.clear();
}

std::vector<Breakpoint> Breakpoints::list() const {
    std::lock_guard lock(mutex_);
    return all_;
}

std::vector<DebugStop> Breakpoints::stops() const {
    std::lock_guard lock(mutex_);
    return stops_;
}

bool Breakpoints::stopped(Vcpu& vcpu, const Exit& exit) {
    u64 gpa = 0;
    bool int3 = exit.dr6 == 0;
    bool mapped = int3 && vcpu.translate(exit.address, gpa);
    std::lock_guard lock(mutex_);
    std::size_t before = stops_.size();
    for (const Breakpoint& breakpoint : all_) {
        bool hit;
        if (breakpoint.kind == Kind::kSoftware) {
            hit = mapped && breakpoint.gpa == gpa;
        } else {
            auto slot = std::find(in_registers_.begin(), in_registers_.end(), breakpoint.id);
            hit = slot != in_registers_.end() && (exit.dr6 >> (slot - in_registers_.begin()) & 1);
        }
        if (hit) stops_.push_back({vcpu.id(), breakpoint.id, breakpoint.kind, exit.address});
    }
    if (stops_.size() != before) return true;
    if (int3) vcpu.raise_int3();
    return false;
}

}  // namespace polyvisor
