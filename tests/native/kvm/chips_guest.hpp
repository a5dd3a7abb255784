// A machine on KVM with in-kernel interrupt chips and a 32-bit guest without paging, whose program
// is a list of accesses to ports and registers: for comparing KVM's chips with ours through a
// guest's eyes. IF is 0, so interrupts stay where they are.
#pragma once

#include <memory>
#include <vector>

#include "bus/pod_state.hpp"
#include "cpu/cpuid.hpp"
#include "kvm/chips.hpp"
#include "kvm/vcpu.hpp"

namespace pvtest {

using namespace polyvisor;

/// Machine code of the accesses, in the order of the calls.
class Program {
  public:
    void out8(u16 port, u8 value) {
        emit(0xba), emit32(port);  // mov edx, port
        emit(0xb0), emit(value);   // mov al, value
        emit(0xee);                // out dx, al
    }
    /// The result is word `results()` of the guest's results.
    void in8(u16 port) {
        emit(0xba), emit32(port);
        emit(0x31), emit(0xc0);  // xor eax, eax
        emit(0xec);              // in al, dx
        store();
    }
    void write32(u32 address, u32 value) {
        emit(0xc7), emit(0x05), emit32(address), emit32(value);  // mov dword [address], value
    }
    void read32(u32 address) {
        emit(0xa1), emit32(address);  // mov eax, [address]
        store();
    }
    /// Reads until one of these bits is set.
    void wait32(u32 address, u32 bits) {
        emit(0xa1), emit32(address);
        emit(0xa9), emit32(bits);  // test eax, bits
        emit(0x74), emit(0xf4);    // jz the read
    }
    std::vector<u8> code() const {
        std::vector<u8> bytes = bytes_;
        for (u8 byte : {0x66, 0xba, 0x77, 0x77, 0xee, 0xeb, 0xfe}) bytes.push_back(byte);
        return bytes;  // mov dx, 0x7777; out dx, al; jmp $
    }
    u32 results() const { return results_; }

    static constexpr u32 kResults = 0x8000;

  private:
    void emit(unsigned byte) { bytes_.push_back(static_cast<u8>(byte)); }
    void emit32(u32 value) {
        for (int n = 0; n < 4; ++n) emit(value >> (8 * n) & 0xff);
    }
    void store() {
        emit(0xa3), emit32(kResults + 4 * results_);  // mov [result], eax
        ++results_;
    }
    std::vector<u8> bytes_;
    u32 results_ = 0;
};

struct ChipsGuest {
    static constexpr u64 kRam = 1 << 20, kCode = 0x10000;

    GuestMemory memory;
    Bus pio{"pio", 0x10000}, mmio{"mmio", bit(52)};
    Clock clock;
    CpuidPolicy policy;
    std::unique_ptr<kvm::Vm> vm;
    std::vector<std::unique_ptr<kvm::KvmVcpu>> vcpus;

    explicit ChipsGuest(std::shared_ptr<const kvm::System> system, IrqchipMode mode, u32 cpus = 1) {
        memory.add(Gpa(0), kRam, "ram");
        EngineOffer offer = kvm::make_offer(*system);
        clock.set_tsc_khz(offer.native_tsc_khz);
        clock.pause();
        clock.set(1'000'000'000'000);
        CpuidOptions options;
        options.physical_bits = offer.physical_bits;
        policy = make_cpuid_policy("host", offer.features | offer.irqchip_features, cpus,
                                   offer.native_tsc_khz, options);
        EngineConfig config{memory, pio, mmio, clock, policy};
        config.irqchip = mode;
        config.cpus = cpus;
        vm = std::make_unique<kvm::Vm>(std::move(system), config);
        for (u32 cpu = 0; cpu < cpus; ++cpu) {
            vcpus.push_back(std::make_unique<kvm::KvmVcpu>(*vm, cpu, nullptr));
            vcpus.back()->restore(reset_state(cpu == 0));
        }
    }
    kvm::Chips& chips() { return *vm->chips(); }

    irqchip::Lapic::Config lapic_config(u32 cpu) const {
        irqchip::Lapic::Config config;
        config.id = cpu;
        config.bsp = cpu == 0;
        config.x2apic = policy.features.has(Feature::kX2apic);
        config.tsc_deadline = policy.features.has(Feature::kTscDeadline);
        config.physical_bits = policy.physical_bits;
        return config;
    }

    /// Puts CPU 0 at the start of the program, keeping what its local APIC has of it.
    void load(const Program& program) {
        std::vector<u8> code = program.code();
        memory.write(Gpa(kCode), code);
        CpuState state = reset_state(true);
        state.cr0 = 0x11;
        state.rip = kCode;
        for (Segment& segment : state.segments) segment = {0, 0xffffffff, 0xc093, 16};
        state.segments[kCs] = {0, 0xffffffff, 0xc09b, 8};
        vcpus[0]->restore(state);
    }
    /// Runs it, with time going on, to its end. False: something else happened.
    bool run() {
        clock.resume();
        Exit exit = vcpus[0]->run();
        clock.pause();
        return exit.reason == ExitReason::kIo && exit.address == 0x7777;
    }
    u32 result(u32 n) { return memory.load<u32>(Gpa(Program::kResults + 4 * n)); }
};

using Kind = InterruptChips::Kind;

template <class State>
State load(const ChipsGuest& guest, Kind kind, u32 index = 0) {
    return load_pod<State>(guest.vm->chips()->save(kind, index), "test");
}

template <class State>
void store(ChipsGuest& guest, Kind kind, const State& state, u32 index = 0) {
    guest.chips().restore(kind, index, save_pod(state));
}

// Switched on by software, all its own interrupts masked.
inline irqchip::Lapic::State idle_lapic(u32 id, bool x2apic = false) {
    irqchip::Lapic::State state{};
    state.apic_base =
        irqchip::Lapic::kDefaultBase | bit(11) | (id == 0 ? bit(8) : 0) | (x2apic ? bit(10) : 0);
    state.id = id;
    state.dfr = ~0u;
    state.svr = 0x1ff;
    for (u32& lvt : state.lvt) lvt = 1 << 16;
    state.timer_deadline = kNever;
    return state;
}

}  // namespace pvtest
