// Machines of a pool come back, empty, and are used again; what goes wrong is told to who asks.
#include "process/vm_pool.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <functional>

#include "base/error.hpp"
#include "check.hpp"
#include "kvm/engine.hpp"
#include "soft/engine.hpp"
#include "soft/system.hpp"

using namespace polyvisor;
using namespace polyvisor::process;

namespace {

constexpr u64 kAt = 0x10'0000, kSize = 1 << 20;

struct Setup {
    explicit Setup(std::shared_ptr<const kvm::System> host) {
        config.memory = 16 << 20;
        config.offer =
            host ? kvm::make_offer(*host) : EngineOffer{.features = soft::implemented_features()};
        config.make_engine = [this, host](const EngineConfig& wanted) {
            if (broken) throw HostError(ENOMEM, {}, "there is no machine today");
            ++made;
            return host ? kvm::create_engine(host, wanted) : soft::create_engine(wanted);
        };
    }
    VmConfig config;
    std::atomic<int> made{0};
    std::atomic<bool> broken{false};
};

bool soon(const std::function<bool()>& done) {
    for (int n = 0; n < 5000 && !done(); ++n) ::usleep(1000);
    return done();
}

// What a program does with a machine: memory at an address, of which the last byte is returned.
u8 use(Vm& machine, u8 leave) {
    const u32 cpu = machine.take_cpu();
    machine.vcpu(cpu).restore(machine.fresh(cpu));
    AddressSpace& space = machine.space();
    CHECK_EQ(space.used(), u64{0});
    CHECK(space.areas().empty());
    const s64 at =
        space.map({.address = kAt, .size = kSize, .rights = kReadable | kWritable, .fixed = true});
    CHECK_EQ(at, static_cast<s64>(kAt));
    u8 found = 0xff;
    CHECK(space.load(kAt + kSize - 1, found));
    CHECK(space.store(kAt + kSize - 1, leave));
    machine.give_back(cpu);
    return found;
}

void come_back(Setup& setup) {
    auto pool = std::make_shared<VmPool>(setup.config, 2);
    CHECK(soon([&] { return pool->idle() == 2; }));
    CHECK_EQ(setup.made.load(), 2);
    for (int round = 0; round < 20; ++round) {
        auto one = pool->take(), two = pool->take();
        CHECK(one != two);
        CHECK_EQ(use(*one, 1), 0);
        CHECK_EQ(use(*two, 2), 0);
    }
    CHECK(soon([&] { return pool->idle() == 2; }));
    // At once and again: taken from those that have just come back, or made when there is none yet.
    CHECK(setup.made < 20);
    const int made = setup.made;
    {
        std::vector<std::shared_ptr<Vm>> many;
        for (int n = 0; n < 5; ++n) many.push_back(pool->take());
        CHECK_EQ(setup.made.load(), made + 3);
    }
    CHECK(soon([&] { return pool->idle() == 2; }));
    auto outlives = pool->take();
    pool->close();
    CHECK_EQ(pool->idle(), std::size_t{0});
    CHECK(pool->take() != nullptr);  // a closed one makes them
    pool.reset();
    CHECK_EQ(use(*outlives, 1), 0);
}

// One that is not as it was, with a CPU that nobody gave back, is not used again.
void spoilt(Setup& setup) {
    auto pool = std::make_shared<VmPool>(setup.config, 1);
    CHECK(soon([&] { return pool->idle() == 1; }));
    auto machine = pool->take();
    (void)machine->take_cpu();
    machine.reset();
    CHECK(soon([&] { return setup.made == 2 && pool->idle() == 1; }));
}

void failures(Setup& setup) {
    setup.broken = true;
    auto pool = std::make_shared<VmPool>(setup.config, 2);
    CHECK_THROWS(pool->take(), HostError);
    CHECK_EQ(pool->idle(), std::size_t{0});
    setup.broken = false;
    // (The pool's own thread may still find out that it is broken.)
    CHECK(soon([&] {
        CHECK(pool->take() != nullptr);
        ::usleep(10'000);
        return pool->idle() == 2;
    }));
}

// The child of a fork has the parent's pool in its memory, and nothing that works of it.
void forks(Setup& setup) {
    auto pool = std::make_shared<VmPool>(setup.config, 1);
    CHECK(soon([&] { return pool->idle() == 1; }));
    auto taken = pool->take();
    const pid_t child = ::fork();
    if (child == 0) {
        auto own = pool->take();
        const bool works = own != nullptr && use(*own, 1) == 0;
        own.reset();
        taken.reset();
        pool.reset();
        ::_exit(works && pvtest::failures == 0 ? 0 : 1);
    }
    int status = -1;
    CHECK_EQ(::waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    CHECK_EQ(use(*taken, 1), 0);
    taken.reset();
    CHECK(soon([&] { return pool->idle() == 1; }));
}

}  // namespace

int main() {
    std::shared_ptr<const kvm::System> host;
    try {
        host = std::make_shared<kvm::System>();
    } catch (const EngineUnavailable& error) {
        std::fprintf(stderr, "%s\n", error.what());
    }
    for (bool on_kvm : {false, true}) {
        if (on_kvm && host == nullptr) continue;
        for (auto test : {come_back, spoilt, failures, forks}) {
            Setup setup(on_kvm ? host : nullptr);
            test(setup);
        }
    }
    return pvtest::finish("vm_pool");
}
