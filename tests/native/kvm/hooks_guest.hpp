// A machine of one CPU, one page of code and whatever devices a test puts on its buses, on either
// engine.
#pragma once

#include <fcntl.h>
#include <sys/eventfd.h>

#include <cstring>
#include <initializer_list>
#include <memory>
#include <thread>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "check.hpp"
#include "kvm/engine.hpp"
#include "no_interrupts.hpp"
#include "soft/engine.hpp"
#include "soft/system.hpp"

namespace pvtest {

using namespace polyvisor;

/// 16-bit code, one access after another. DS starts at kMmio.
class Code {
  public:
    Code& out8(u16 port, u8 value) { return mov_al(value).dx(port).add({0xee}); }
    Code& out16(u16 port, u16 value) {
        add({0xb8}).add16(value);
        return dx(port).add({0xef});
    }
    Code& out32(u16 port, u32 value) {
        add({0x66, 0xb8}).add32(value);
        return dx(port).add({0x66, 0xef});
    }
    Code& in8(u16 port) { return dx(port).add({0xec}); }
    Code& store8(u16 offset, u8 value) { return mov_al(value).add({0xa2}).add16(offset); }
    Code& store16(u16 offset, u16 value) {
        add({0xb8}).add16(value);
        return add({0xa3}).add16(offset);
    }
    Code& store32(u16 offset, u32 value) {
        add({0x66, 0xb8}).add32(value);
        return add({0x66, 0xa3}).add16(offset);
    }
    /// `count` writes of AL, counted up from 0, to a port.
    Code& out8_loop(u16 port, u16 count) {
        add({0xb9}).add16(count);                                 // mov cx, count
        return mov_al(0).dx(port).add({0xee, 0x40, 0xe2, 0xfc});  // out dx, al; inc ax; loop
    }
    Code& forever() { return add({0xeb, 0xfe}); }
    /// Ends run().
    Code& exit() { return add({0xe6, 0xf4}).forever(); }

    std::vector<u8> bytes;

  private:
    Code& add(std::initializer_list<u8> more) {
        bytes.insert(bytes.end(), more);
        return *this;
    }
    Code& add16(u16 value) { return add({static_cast<u8>(value), static_cast<u8>(value >> 8)}); }
    Code& add32(u32 value) {
        return add16(static_cast<u16>(value)).add16(static_cast<u16>(value >> 16));
    }
    Code& mov_al(u8 value) { return add({0xb0, value}); }
    Code& dx(u16 port) { return add({0xba}).add16(port); }
};

/// Its port ends run().
class End final : public Device {
  public:
    explicit End(std::unique_ptr<Vcpu>& vcpu) : vcpu_(vcpu) {}
    std::string_view name() const override { return "end"; }
    void read(u64, std::span<u8>) override {}
    void write(u64, std::span<const u8>) override { vcpu_->request_stop(); }

  private:
    std::unique_ptr<Vcpu>& vcpu_;
};

inline std::shared_ptr<const kvm::System> kvm_system() {
    static auto system = std::make_shared<const kvm::System>();
    return system;
}

class Guest {
  public:
    static constexpr u64 kMmio = 0xd000'0000, kOrigin = 0x1000;

    explicit Guest(bool on_kvm) {
        memory.add(Gpa(0), 64 << 10, "ram");
        EngineOffer offer;
        if (on_kvm) {
            offer = kvm::make_offer(*kvm_system());
        } else {
            offer.features = soft::implemented_features();
        }
        u64 khz = offer.native_tsc_khz != 0 ? offer.native_tsc_khz : 1'000'000;
        clock.set_tsc_khz(khz);
        EngineConfig config{memory, pio, mmio, clock,
                            make_cpuid_policy("baseline", offer.features, 1, khz)};
        config.log = &log;
        engine = on_kvm ? kvm::create_engine(kvm_system(), config) : soft::create_engine(config);
        vcpu = engine->create_vcpu(0, &interrupts);
        pio.attach(0xf4, 1, std::make_shared<End>(vcpu));
    }

    /// Places the code and the CPU at its start.
    void load(const Code& code) {
        memory.write(Gpa(kOrigin), code.bytes);
        CpuState state = reset_state(true);
        state.rip = kOrigin;
        state.segments[kCs].selector = 0;
        state.segments[kCs].base = 0;
        state.segments[kDs].base = kMmio;
        state.rflags = 2;
        vcpu->restore(state);
    }
    /// Runs it to its exit().
    void run(const Code& code) {
        load(code);
        Exit exit = vcpu->run();
        CHECK_EQ(std::string(to_string(exit.reason)), std::string("interrupted"));
    }
    /// Starts code that has no exit() on a thread; stop() ends it.
    void start(const Code& code) {
        load(code);
        thread = std::thread([this] {
            Exit exit = vcpu->run();
            CHECK_EQ(std::string(to_string(exit.reason)), std::string("interrupted"));
        });
    }
    void stop() {
        vcpu->request_stop();
        thread.join();
    }
    /// A counter of the engine.
    u64 counter(std::string_view name) const {
        for (const auto& counter : engine->counters()) {
            if (counter.name == name) return counter.value;
        }
        return 0;
    }

    GuestMemory memory;
    Bus pio{"pio", 0x10000}, mmio{"mmio", u64{1} << 52};
    Clock clock;
    Log log;
    NoInterrupts interrupts;
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Vcpu> vcpu;
    std::thread thread;
};

/// What an event file descriptor has counted since the last call.
inline u64 rings(int fd) {
    u64 value = 0;
    return ::eventfd_read(fd, &value) == 0 ? value : 0;
}

inline OwnedFd make_event() {
    return OwnedFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

}  // namespace pvtest
