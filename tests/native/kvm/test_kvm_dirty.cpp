// KVM's dirty log, by bitmaps and by rings: against a comparison of the memory's contents, while
// vCPUs run, and with rings that are too small for what is written.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "base/error.hpp"
#include "dirty_pages.hpp"
#include "flat_guest.hpp"
#include "kvm/dirty_log.hpp"

using namespace polyvisor;

// Stores to random places of the 8 MiB at 4 MiB, for ever. RBX is the seed.
PV_GUEST(random_stores, R"(
    mov $0x400000, %r8d
1:  mov %rbx, %rax
    shl $13, %rax
    xor %rax, %rbx
    mov %rbx, %rax
    shr $7, %rax
    xor %rax, %rbx
    mov %rbx, %rax
    shl $17, %rax
    xor %rax, %rbx
    mov %rbx, %rdx
    shr $20, %rdx
    and $0x7ffff8, %edx
    mov %rbx, (%r8,%rdx)
    test $3, %bl
    jnz 1b
    and $0x7ff000, %edx
    mov %rbx, -3(%r8,%rdx)
    jmp 1b
)")

// Writes a word of each of the 2048 pages at 4 MiB once, then halts.
PV_GUEST(every_page, R"(
    mov $0x400000, %edi
    mov $2048, %ecx
1:  incl (%rdi)
    add $4096, %rdi
    loop 1b
    hlt
)")

// Adds 1 to the word at 4 MiB, for ever.
PV_GUEST(count, R"(
1:  incl 0x400000
    jmp 1b
)")

namespace {

using namespace pvtest;
using Clk = std::chrono::steady_clock;

constexpr auto kLimit = std::chrono::seconds(30);  // for a host with much else to do
constexpr u64 kPages = FlatGuest::kSize >> kPageShift;
constexpr u32 kSmallRing = 1024;  // the least that all hosts have
constexpr u32 kLargeRing = 65536;

// Runs until HLT or stop(), on a thread of its own.
class Runner {
  public:
    explicit Runner(Vcpu& vcpu) : vcpu_(vcpu), thread_([this] { exit_ = vcpu_.run(); }) {}
    ~Runner() { stop(); }
    void stop() {
        if (!thread_.joinable()) return;
        vcpu_.request_stop();
        thread_.join();
    }
    Exit wait() {
        thread_.join();
        return exit_;
    }

  private:
    Vcpu& vcpu_;
    Exit exit_;
    std::thread thread_;
};

// The pages that the guest touches at all: its tables, code, stack and data. KVM may report one
// that was only read, or whose store was interrupted before it was done: it counts what it maps
// writable.
bool touched(u64 page) {
    return (page >= 1 && page <= 4) || page == 0x100 || page == 0x1ff ||
           (page >= 0x3ff && page < 0xc00);
}

bool has_all(const Pages& dirty, const Pages& changed) {
    return std::includes(dirty.begin(), dirty.end(), changed.begin(), changed.end()) &&
           std::all_of(dirty.begin(), dirty.end(), touched);
}

// Every page that changed is reported, and none that the guest has nothing to do with.
void exact_pages(u32 ring) {
    FlatGuest guest(random_stores(), 1, ring);
    DirtyLog& log = guest.engine->dirty_log();
    CHECK_EQ(std::string(log.method()), std::string(ring != 0 ? "ring" : "log"));
    CHECK_THROWS(fetch(guest), StateMismatch);
    seed(*guest.vcpus[0], static_cast<u64>(Clk::now().time_since_epoch().count()));
    guest.memory.store<u32>(Gpa(0x700000), 1);
    log.start();
    CHECK(log.active());
    CHECK(fetch(guest).empty());
    Copy copy;
    u64 reported = 0;
    const auto end = Clk::now() + kLimit;
    for (unsigned round = 0; Clk::now() < end && (round < 20 || reported < 50); ++round) {
        copy.take_all(guest);
        Runner runner(*guest.vcpus[0]);
        std::this_thread::sleep_for(std::chrono::milliseconds(2 * (round % 8)));
        runner.stop();
        Pages changed = copy.different(guest), dirty = fetch(guest);
        CHECK(has_all(dirty, changed));
        reported += dirty.size();
        CHECK(fetch(guest).empty());
    }
    CHECK(reported >= 50);

    // The host's own writes, also to what no vCPU can write.
    guest.memory.store<u32>(Gpa(0x700ffe), 1);
    guest.memory.store<u32>(Gpa(0xfff01000), 1);
    CHECK(fetch(guest) == (Pages{0x700, 0x701}));
    CHECK(fetch(guest, 1) == Pages{1});
    CHECK(fetch(guest, 1).empty());

    // start() forgets what came before; a log that was stopped says so.
    auto run_a_little = [&] {
        Runner runner(*guest.vcpus[0]);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    run_a_little();
    log.start();
    CHECK(fetch(guest).empty());
    run_a_little();
    log.stop();
    log.stop();
    CHECK(!log.active());
    CHECK_THROWS(fetch(guest), StateMismatch);
    run_a_little();
    log.start();
    CHECK(fetch(guest).empty());
    copy.take_all(guest);
    run_a_little();
    Pages changed = copy.different(guest);
    CHECK(has_all(fetch(guest), changed));
}

// A live migration: pages are copied as they are reported while the vCPUs run on. When they stand
// still and the last ones are copied, the copy is the memory.
void concurrent(u32 ring, u32 cpus) {
    FlatGuest guest(random_stores(), cpus, ring);
    u64 number = static_cast<u64>(Clk::now().time_since_epoch().count());
    std::vector<std::unique_ptr<Runner>> runners;
    for (auto& vcpu : guest.vcpus) {
        seed(*vcpu, number += 0x9e3779b97f4a7c15);
        runners.push_back(std::make_unique<Runner>(*vcpu));
    }
    std::jthread dma([&](std::stop_token stop) {
        for (u64 n = 0; !stop.stop_requested(); ++n) {
            guest.memory.store<u64>(Gpa(0x400000 + n * 0x3008 % 0x7ff000), n);
            if (n % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    });
    DirtyLog& log = guest.engine->dirty_log();
    log.start();
    Copy copy;
    copy.take_all(guest);
    unsigned rounds = 0;
    for (auto end = Clk::now() + kLimit; rounds < 30 && Clk::now() < end; ++rounds) {
        copy.take(guest, fetch(guest));
        if (rounds % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    for (auto& runner : runners) runner->stop();
    dma.request_stop();
    dma.join();
    copy.take(guest, fetch(guest));
    CHECK_EQ(copy.different(guest).size(), 0u);
    CHECK_EQ(rounds, 30u);
    CHECK(fetch(guest).empty());
}

// A counter's changes are in some fetch, each of them.
void no_count_is_lost(u32 ring) {
    FlatGuest guest(count(), 1, ring);
    DirtyLog& log = guest.engine->dirty_log();
    log.start();
    Runner runner(*guest.vcpus[0]);
    auto word = reinterpret_cast<const u32*>(page_of(guest, 0x400));
    auto now = [&] { return __atomic_load_n(word, __ATOMIC_SEQ_CST); };
    u32 copied = 0;
    unsigned noisy = 0;
    for (auto end = Clk::now() + kLimit; noisy < 10 && Clk::now() < end;) {
        Pages dirty = fetch(guest);
        if (std::binary_search(dirty.begin(), dirty.end(), u64{0x400})) {
            copied = now();
            ++noisy;
        }
    }
    CHECK_EQ(noisy, 10u);
    runner.stop();
    Pages last = fetch(guest);
    if (std::binary_search(last.begin(), last.end(), u64{0x400})) copied = now();
    CHECK_EQ(copied, now());
}

// Twice as many pages as the ring holds, and nobody fetches: the vCPU leaves the guest until it was
// collected, and all of it is there at the end.
void full_ring() {
    FlatGuest guest(every_page(), 1, kSmallRing);
    DirtyLog& log = guest.engine->dirty_log();
    log.start();
    Exit exit = guest.vcpus[0]->run();
    CHECK(exit.reason == ExitReason::kHalt);
    Pages dirty = fetch(guest), want;
    for (u64 page = 0x400; page < 0xc00; ++page) want.push_back(page);
    CHECK(std::includes(dirty.begin(), dirty.end(), want.begin(), want.end()));
    // A host that emulates the guest's instructions overruns its rings; then more is reported.
    u64 overruns = static_cast<kvm::KvmDirtyLog&>(log).overruns();
    CHECK(overruns != 0 || has_all(dirty, want));
    u64 full = 0;
    for (const auto& counter : guest.vcpus[0]->exits()) {
        if (counter.name == "dirty_ring_full") full = counter.value;
    }
    CHECK(full > 0);
    CHECK(fetch(guest).empty());
}

void impossible_rings() {
    for (u32 entries : {1u, 128u, 1000u, 1u << 31}) {
        try {
            FlatGuest guest(count(), 1, entries);
            CHECK(false);
        } catch (const ConfigError& error) {
            CHECK_EQ(error.field, std::string("dirty_ring"));
            CHECK(std::string(error.what()).find(std::to_string(entries)) != std::string::npos);
        }
    }
}

bool has_rings() {
    return kvm::System().check(KVM_CAP_DIRTY_LOG_RING) != 0;
}

}  // namespace

int main() {
    if (!pvtest::have_kvm()) return 77;
    std::vector<u32> methods{0};
    if (has_rings()) methods.push_back(kLargeRing);
    try {
        for (u32 ring : methods) {
            exact_pages(ring);
            concurrent(ring, 1);
            concurrent(ring, 2);
            no_count_is_lost(ring);
        }
        if (has_rings()) {
            full_ring();
            impossible_rings();
        }
    } catch (const HostError& error) {
        // Only KVMs that emulate instructions write beyond a ring's end; the rest was checked.
        if (pvtest::finish("test_kvm_dirty") != 0) return 1;
        std::printf("%s\n", error.what());
        return std::string(error.what()).find("overrun") != std::string::npos ? 77 : 1;
    }
    return pvtest::finish("test_kvm_dirty");
}
