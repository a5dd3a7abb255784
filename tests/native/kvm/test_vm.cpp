// What a VM and its vCPUs refuse, and how they stop: on a host's /dev/kvm, with guests of two
// instructions.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "base/error.hpp"
#include "check.hpp"
#include "kvm/engine.hpp"
#include "kvm/lone_vcpu.hpp"

using namespace polyvisor;
using namespace std::chrono_literals;

namespace {

std::shared_ptr<const kvm::System> host;

// 64 KiB of memory with code at 0x1000, and what an engine needs.
struct Board {
    explicit Board(std::vector<u8> code) {
        memory.add(Gpa(0), 0x10000, "ram");
        memory.write(Gpa(0x1000), code);
        clock.set_tsc_khz(host->tsc_khz());
    }
    EngineConfig config(u32 cpus = 1, IrqchipMode irqchip = IrqchipMode::kUser) {
        EngineOffer offer = kvm::make_offer(*host);
        EngineConfig config{memory, pio, mmio, clock,
                            make_cpuid_policy("host", offer.features, cpus, host->tsc_khz())};
        config.cpus = cpus;
        config.irqchip = irqchip;
        return config;
    }
    static CpuState start() {
        CpuState state = reset_state(true);
        state.segments[kCs] = {0, 0xffff, 0x9b, 0};
        state.rip = 0x1000;
        return state;
    }
    GuestMemory memory;
    Bus pio{"pio", 0x10000}, mmio{"mmio", bit(52)};
    Clock clock;
    pvtest::NoInterrupts interrupts;
};

const std::vector<u8> kSpin{0xeb, 0xfe};  // jmp $

void more_cpus_than_kvm_has() {
    Board board(kSpin);
    EngineConfig config = board.config();
    config.cpus = 1'000'000;
    CHECK_THROWS(kvm::create_engine(host, config), ConfigError);
    auto engine = kvm::create_engine(host, board.config(2));
    auto first = engine->create_vcpu(0, &board.interrupts);
    CHECK_THROWS(engine->create_vcpu(0, &board.interrupts), StateMismatch);
    CHECK_THROWS(engine->create_vcpu(2, &board.interrupts), ConfigError);
    auto second = engine->create_vcpu(1, &board.interrupts);
    CHECK_EQ(second->id(), 1u);
}

void one_thread_at_a_time() {
    Board board(kSpin);
    auto engine = kvm::create_engine(host, board.config());
    auto vcpu = engine->create_vcpu(0, &board.interrupts);
    vcpu->restore(Board::start());
    std::thread runner([&] { CHECK_EQ(vcpu->run().reason, ExitReason::kInterrupted); });
    std::this_thread::sleep_for(50ms);
    CHECK_THROWS(vcpu->run(), StateMismatch);
    CHECK_THROWS(vcpu->save(), StateMismatch);
    CHECK_THROWS(vcpu->restore(Board::start()), StateMismatch);
    vcpu->request_stop();
    runner.join();
    CHECK_EQ(vcpu->save().rip, u64{0x1000});
}

// A request that comes before the vCPU runs, or at any moment of it, is not lost.
void every_stop_arrives() {
    for (IrqchipMode irqchip : {IrqchipMode::kUser, IrqchipMode::kSplit, IrqchipMode::kKernel}) {
        Board board(kSpin);
        auto engine = kvm::create_engine(host, board.config(1, irqchip));
        LocalInterrupts* own = irqchip == IrqchipMode::kUser ? &board.interrupts : nullptr;
        auto vcpu = engine->create_vcpu(0, own);
        vcpu->restore(Board::start());
        constexpr int kStops = 500;
        std::atomic<int> seen{0};
        std::thread runner([&] {
            while (seen < kStops) {
                CHECK_EQ(vcpu->run().reason, ExitReason::kInterrupted);
                ++seen;
            }
        });
        auto begin = std::chrono::steady_clock::now();
        for (int n = 0; n < kStops; ++n) {
            vcpu->request_stop();
            while (seen <= n && std::chrono::steady_clock::now() - begin < 60s) {
                std::this_thread::yield();
            }
        }
        CHECK_EQ(seen.load(), kStops);
        for (int n = 0; n < kStops && seen < kStops; ++n) vcpu->request_stop();
        runner.join();
    }
}

void a_forked_child_is_told() {
    Board board(kSpin);
    auto engine = kvm::create_engine(host, board.config());
    auto vcpu = engine->create_vcpu(0, &board.interrupts);
    vcpu->restore(Board::start());
    pid_t child = ::fork();
    if (child == 0) {
        int status = 1;
        try {
            vcpu->run();
        } catch (const StateMismatch&) {
            status = 0;
        } catch (...) {
            status = 2;
        }
        ::_exit(status);
    }
    int status = 0;
    CHECK_EQ(::waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    vcpu->request_stop();
    CHECK_EQ(vcpu->run().reason, ExitReason::kInterrupted);
}

// What KVM cannot go on with ends run() with a sentence: where it was, and on which bytes.
void failures_are_described() {
    // A jump to where there is no memory: KVM can neither run nor emulate code there.
    Board board({0xea, 0x00, 0x00, 0x00, 0xc0});  // jmp c000:0000
    auto engine = kvm::create_engine(host, board.config());
    auto vcpu = engine->create_vcpu(0, &board.interrupts);
    vcpu->restore(Board::start());
    std::thread limit;
    std::atomic<bool> done{false};
    limit = std::thread([&] {
        for (int n = 0; n < 500 && !done; ++n) std::this_thread::sleep_for(10ms);
        vcpu->request_stop();
    });
    Exit exit;
    do {
        exit = vcpu->run();
    } while (exit.reason == ExitReason::kMmio);
    done = true;
    limit.join();
    CHECK_EQ(exit.reason, ExitReason::kFail);
    std::printf("%s\n", exit.text.c_str());
    CHECK(exit.text.find("c000:0") != std::string::npos);
    CHECK(exit.text.find("suberror") != std::string::npos);
}

}  // namespace

int main() {
    try {
        host = std::make_shared<kvm::System>();
    } catch (const EngineUnavailable& error) {
        std::printf("%s\n", error.what());
        return 77;
    }
    more_cpus_than_kvm_has();
    one_thread_at_a_time();
    every_stop_arrives();
    a_forked_child_is_told();
    failures_are_described();
    return pvtest::finish("test_vm");
}
