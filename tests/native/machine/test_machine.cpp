// Starting, pausing and ending a machine, with guests that are C++ functions.
#include <dirent.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "base/error.hpp"
#include "check.hpp"
#include "machine/fake_engine.hpp"
#include "machine/machine.hpp"

using namespace polyvisor;
using namespace std::chrono_literals;
using pvtest::FakeEngine;
using pvtest::FakeVcpu;
using Clk = std::chrono::steady_clock;
using Phase = RunControl::Phase;

namespace {

MachineConfig with_guest(FakeVcpu::Guest guest, u32 cpus = 1) {
    MachineConfig config;
    config.memory = 1 << 20;
    config.cpus = cpus;
    config.make_engine = [guest](const EngineConfig&) {
        return std::make_unique<FakeEngine>(guest);
    };
    return config;
}

FakeVcpu::Guest idle = [](FakeVcpu& vcpu) { return vcpu.wait_for_stop(); };

StopInfo run_to_end(MachineConfig config) {
    Machine machine(std::move(config));
    machine.start();
    CHECK(machine.wait(10s));
    return machine.stop_info();
}

unsigned entries(const char* directory) {
    unsigned count = 0;
    if (DIR* dir = ::opendir(directory)) {
        while (::readdir(dir) != nullptr) ++count;
        ::closedir(dir);
    }
    return count;
}

void guests_end_their_machine() {
    StopInfo info = run_to_end(with_guest(
        [](FakeVcpu&) { return pvtest::make_exit(ExitReason::kShutdown, "three faults"); }));
    CHECK_EQ(info.reason, StopReason::kTripleFault);
    CHECK_EQ(info.detail, std::string("three faults"));

    info = run_to_end(
        with_guest([](FakeVcpu&) { return pvtest::make_exit(ExitReason::kFail, "cannot go on"); }));
    CHECK_EQ(info.reason, StopReason::kEngineFailure);

    info = run_to_end(
        with_guest([](FakeVcpu&) -> Exit { throw std::runtime_error("engine exploded"); }));
    CHECK_EQ(info.reason, StopReason::kEngineFailure);
    CHECK_EQ(info.detail, std::string("engine exploded"));
}

void halted_when_all_cpus_are() {
    // As an engine does it: says so once, then waits inside run() for something to wake it.
    auto halt = [](FakeVcpu& vcpu) {
        if (vcpu.state.activity == Activity::kHalted) return vcpu.wait_for_stop();
        vcpu.state.activity = Activity::kHalted;
        return pvtest::make_exit(ExitReason::kHalt);
    };
    CHECK_EQ(run_to_end(with_guest(halt)).reason, StopReason::kHalted);
    CHECK_EQ(run_to_end(with_guest(halt, 3)).reason, StopReason::kHalted);
    // CPUs that were never started do not count as alive.
    auto only_first = [&](FakeVcpu& vcpu) {
        return vcpu.id() == 0 ? halt(vcpu) : vcpu.wait_for_stop();
    };
    CHECK_EQ(run_to_end(with_guest(only_first, 3)).reason, StopReason::kHalted);
    // One that runs, or waits with interrupts on, keeps the machine alive.
    Machine machine(with_guest(
        [&](FakeVcpu& vcpu) {
            if (vcpu.id() != 0) return halt(vcpu);
            vcpu.state.activity = Activity::kHalted;
            vcpu.state.rflags = 0x202;
            return vcpu.wait_for_stop();
        },
        3));
    machine.start();
    CHECK(!machine.wait(50ms));
    machine.stop();
    CHECK_EQ(machine.stop_info().reason, StopReason::kStopped);
}

void chips_end_the_machine() {
    Machine* self = nullptr;
    std::atomic<bool> claimed{false};
    auto port_write = [&](u16 port, u32 value, std::size_t size) {
        return [&self, &claimed, port, value, size](FakeVcpu& vcpu) {
            u8 data[4];
            for (unsigned i = 0; i < 4; ++i) data[i] = static_cast<u8>(value >> (8 * i));
            claimed = self->pio().write(port, {data, size});
            return vcpu.wait_for_stop();
        };
    };
    auto run = [&](FakeVcpu::Guest guest) {
        Machine machine(with_guest(std::move(guest)));
        self = &machine;
        machine.start();
        bool ended = machine.wait(10s);  // the checks' counter belongs to one thread
        CHECK(ended);
        CHECK(claimed);
        return machine.stop_info();
    };
    StopInfo info = run(port_write(PcLayout::kDebugExit, 21, 1));
    CHECK_EQ(info.reason, StopReason::kDebugExit);
    CHECK_EQ(info.status, 43u);
    CHECK_EQ(run(port_write(PcLayout::kResetControl, PcLayout::kResetValue, 1)).reason,
             StopReason::kReset);
    CHECK_EQ(run(port_write(0x92, 1, 1)).reason, StopReason::kReset);
    u32 sleep = 0x2000 | u32{devices::AcpiPm::kSleepTypeS5} << 10;
    CHECK_EQ(run(port_write(PcLayout::kAcpiPm + devices::AcpiPm::kControlOffset, sleep, 2)).reason,
             StopReason::kPowerOff);
}

void pause_holds_every_cpu_and_time() {
    std::atomic<u64> steps{0};
    Machine machine(with_guest(
        [&](FakeVcpu& vcpu) {
            while (!vcpu.take_stop()) ++steps;
            return Exit{};
        },
        3));
    CHECK_THROWS(machine.pause(), StateMismatch);
    CHECK_THROWS(machine.resume(), StateMismatch);
    machine.start();
    CHECK_THROWS(machine.start(), StateMismatch);
    CHECK_THROWS(machine.vcpu(0), StateMismatch);
    std::this_thread::sleep_for(5ms);
    for (int i = 0; i < 20; ++i) {
        machine.pause();
        CHECK_EQ(machine.phase(), Phase::kPaused);
        u64 before = steps, time = machine.clock().now();
        if (i == 0) std::this_thread::sleep_for(10ms);
        CHECK_EQ(steps.load(), before);
        CHECK_EQ(machine.clock().now(), time);
        machine.vcpu(2).save();
        machine.pause();  // again: nothing to do
        machine.resume();
    }
    u64 before = steps;
    std::this_thread::sleep_for(20ms);
    CHECK(steps > before);
    machine.stop();
    CHECK_EQ(machine.phase(), Phase::kEnded);
    CHECK_THROWS(machine.resume(), StateMismatch);
    CHECK_THROWS(machine.start(), StateMismatch);
    machine.vcpu(0).save();  // can be looked at
}

void the_first_end_counts() {
    Machine machine(with_guest(idle));
    machine.start();
    machine.request_end({StopReason::kReset, 0, "first", 0});
    machine.request_end({StopReason::kPowerOff, 0, "second", 0});
    machine.stop();
    CHECK_EQ(machine.stop_info().detail, std::string("first"));
}

void stopping_is_quick_and_from_anywhere() {
    {
        Machine machine(with_guest(idle, 2));
        machine.start();
        auto begin = Clk::now();
        machine.stop();
        CHECK(Clk::now() - begin < 200ms);
    }
    {  // before it was started
        Machine machine(with_guest(idle));
        machine.stop();
        CHECK_EQ(machine.phase(), Phase::kEnded);
        CHECK(machine.wait(1s));
    }
    {  // from its own vCPU's thread, which must not wait for itself
        Machine* self = nullptr;
        std::atomic<bool> own{false}, refused{false};
        Machine machine(with_guest([&](FakeVcpu& vcpu) {
            own = self->on_own_thread();
            try {
                self->wait(1s);
            } catch (const StateMismatch&) {
                refused = true;
            }
            self->stop();
            return vcpu.wait_for_stop();
        }));
        self = &machine;
        machine.start();
        bool ended = machine.wait(10s);
        CHECK(ended);
        CHECK(own);
        CHECK(refused);
    }
    {  // while it is paused, and from another thread than the one that waits
        Machine machine(with_guest(idle, 2));
        machine.start();
        machine.pause();
        std::thread stopper([&] {
            std::this_thread::sleep_for(10ms);
            machine.stop();
        });
        CHECK(machine.wait(10s));
        stopper.join();
    }
}

void a_device_that_does_not_return_is_reported() {
    std::atomic<bool> entered{false}, release{false};
    Machine machine(with_guest([&](FakeVcpu&) {
        entered = true;
        while (!release) std::this_thread::sleep_for(1ms);
        return Exit{};
    }));
    machine.start();
    while (!entered) std::this_thread::sleep_for(1ms);  // on a loaded host threads start late
    auto begin = Clk::now();
    CHECK_THROWS(machine.stop(), StateMismatch);
    CHECK(Clk::now() - begin < 1s);
    release = true;
    CHECK(machine.wait(10s));
}

void waiting_needs_a_started_machine() {
    Machine machine(with_guest(idle));
    CHECK_THROWS(machine.wait(1ms), StateMismatch);
    machine.start();
    CHECK(!machine.wait(1ms));
}

void stepping_counts() {
    Machine machine(with_guest([](FakeVcpu& vcpu) {
        u64 some = std::min<u64>(vcpu.budget, 3);  // engines may return early
        vcpu.state.instructions += some;
        vcpu.budget -= some;
        return Exit{};
    }));
    machine.step(0, 10);
    CHECK_EQ(machine.vcpu(0).save().instructions, 10u);
    machine.step(0, 1);
    CHECK_EQ(machine.vcpu(0).save().instructions, 11u);
    CHECK_THROWS(machine.step(1, 1), ConfigError);
    machine.stop();
    CHECK_THROWS(machine.step(0, 1), StateMismatch);
}

void hooks_run_on_each_thread() {
    std::atomic<int> started{0}, finished{0};
    MachineConfig config = with_guest(idle, 3);
    config.thread_hooks = {[&] { ++started; }, [&] { ++finished; }};
    {
        Machine machine(std::move(config));
        machine.start();
        machine.stop();
    }
    CHECK_EQ(started.load(), 3);
    CHECK_EQ(finished.load(), 3);
}

void memory_is_laid_out_as_a_pc() {
    MachineConfig config = with_guest(idle);
    config.memory = u64{5} << 30;  // sparse
    Machine machine(std::move(config));
    const auto& regions = machine.memory()->regions();
    CHECK_EQ(regions.size(), std::size_t{2});
    CHECK_EQ(regions[0]->size, u64{3} << 30);
    CHECK_EQ(regions[1]->start.value, u64{4} << 30);
    CHECK_EQ(regions[1]->size, u64{2} << 30);
    CHECK(machine.mmio().find(PcLayout::kIoapic) != nullptr);
    CHECK(machine.pio().find(0x3f8) != nullptr);
}

void bad_configurations_are_refused() {
    MachineConfig config = with_guest(idle, 0);
    CHECK_THROWS(Machine(std::move(config)), ConfigError);
    config = with_guest(idle, 2);
    config.deterministic = true;
    CHECK_THROWS(Machine(std::move(config)), ConfigError);
    config = with_guest(idle);
    config.memory = 1000;
    CHECK_THROWS(Machine(std::move(config)), ConfigError);
    config = with_guest(idle);
    config.serial_ports = 9;
    CHECK_THROWS(Machine(std::move(config)), ConfigError);
    config = MachineConfig();
    config.engine = "steam";
    CHECK_THROWS(Machine(std::move(config)), ConfigError);
}

void a_hundred_machines_leave_nothing() {
    auto cycle = [](int i) {
        Machine machine(with_guest(idle, 2));
        if (i % 3 == 0) return;  // never started
        machine.start();
        if (i % 3 == 1) machine.pause();
    };
    cycle(1);
    unsigned fds = entries("/proc/self/fd"), threads = entries("/proc/self/task");
    for (int i = 0; i < 100; ++i) cycle(i);
    CHECK_EQ(entries("/proc/self/fd"), fds);
    CHECK_EQ(entries("/proc/self/task"), threads);
}

void machines_run_side_by_side() {
    std::vector<std::unique_ptr<Machine>> machines;
    for (int i = 0; i < 8; ++i) machines.push_back(std::make_unique<Machine>(with_guest(idle)));
    for (auto& machine : machines) machine->start();
    machines[3]->stop();
    CHECK_EQ(machines[2]->phase(), Phase::kRunning);
    CHECK_EQ(machines[3]->phase(), Phase::kEnded);
}

}  // namespace

int main() {
    guests_end_their_machine();
    halted_when_all_cpus_are();
    chips_end_the_machine();
    pause_holds_every_cpu_and_time();
    the_first_end_counts();
    stopping_is_quick_and_from_anywhere();
    a_device_that_does_not_return_is_reported();
    waiting_needs_a_started_machine();
    stepping_counts();
    hooks_run_on_each_thread();
    memory_is_laid_out_as_a_pc();
    bad_configurations_are_refused();
    a_hundred_machines_leave_nothing();
    machines_run_side_by_side();
    return pvtest::finish("test_machine");
}
