// The soft engine's dirty log: against a comparison of the memory's contents, while vCPUs run, and
// from inside a device.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <future>
#include <thread>

#include "base/error.hpp"
#include "check.hpp"
#include "dirty_pages.hpp"
#include "long_guest.hpp"
#include "random.hpp"

using namespace polyvisor;

// Stores of all kinds to random places of the 8 MiB at 4 MiB, for ever. RBX is the seed.
PV_GUEST(random_stores, R"(
    mov $0x400000, %r8d
    cld
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
    mov %ebx, %ecx
    and $7, %ecx
    jz 2f
    dec %ecx
    jz 3f
    dec %ecx
    jz 4f
    dec %ecx
    jz 5f
    dec %ecx
    jz 6f
    mov %rbx, (%r8,%rdx)
    jmp 1b
2:  lock addq $1, (%r8,%rdx)
    jmp 1b
3:  and $0x7ff000, %edx
    mov %rbx, -3(%r8,%rdx)
    jmp 1b
4:  incb (%r8,%rdx)
    jmp 1b
5:  movq %rbx, %xmm0
    and $0x7ffff0, %edx
    movaps %xmm0, (%r8,%rdx)
    jmp 1b
6:  lea (%r8,%rdx), %rdi
    mov %rbx, %rax
    mov $90, %ecx
    rep stosq
    jmp 1b
)")

// Adds 1 to a word of page 4 MiB and asks the device at port 0x80, for ever.
PV_GUEST(count_and_ask, R"(
    xor %eax, %eax
1:  incl 0x400000
    out %al, $0x80
    jmp 1b
)")

// Code that rewrites itself, in a page that also holds data.
PV_GUEST(rewrite_itself, R"(
    lea 2f+1(%rip), %rdi
1:  inc %ecx
    mov %ecx, (%rdi)
2:  mov $0x7fffffff, %edx
    mov %edx, 0x400000
    cmp $1000, %ecx
    jne 1b
    hlt
)")

PV_GUEST(halt, "1: hlt\n jmp 1b")

namespace {

using namespace pvtest;
using Clk = std::chrono::steady_clock;

constexpr auto kLimit = std::chrono::seconds(20);  // for a host with much else to do
constexpr u64 kPages = (16 << 20) >> kPageShift;
const u64 kSeed =
    pvtest::environment_number("PV_SEED", static_cast<u64>(Clk::now().time_since_epoch().count()));

// Every page that changed is reported, and none that did not: at any point between instructions.
void exact_pages() {
    LongGuest guest(random_stores());
    seed(*guest.vcpu, kSeed);
    DirtyLog& log = guest.engine->dirty_log();
    CHECK(!log.active());
    guest.run(1000);
    log.start();
    CHECK(log.active());
    CHECK(fetch(guest).empty());
    Copy copy;
    u64 reported = 0;
    for (unsigned round = 0; round < 300; ++round) {
        copy.take_all(guest);
        guest.run(1 + round * 37 % 4000);
        Pages changed = copy.different(guest);
        Pages dirty = fetch(guest);
        CHECK(dirty == changed);
        reported += dirty.size();
        if (round % 10 == 0) CHECK(fetch(guest).empty());
    }
    CHECK(reported > 10'000);

    // start() forgets what came before; a log that was stopped notes nothing, and says so.
    guest.run(1000);
    log.start();
    CHECK(fetch(guest).empty());
    guest.run(100);
    log.stop();
    CHECK(!log.active());
    CHECK_THROWS(fetch(guest), StateMismatch);
    for (u64 page = 0; page < kPages; ++page) {
        CHECK(!(guest.memory.regions()[0]->flags(page << kPageShift) & kPageDirtyTrack));
    }
    guest.run(1000);
    log.start();
    CHECK(fetch(guest).empty());
    copy.take_all(guest);
    guest.run(1000);
    CHECK(fetch(guest) == copy.different(guest));
}

// A live migration: pages are copied as they are reported while the vCPUs run on. When they stand
// still and the last ones are copied, the copy is the memory.
void concurrent(unsigned cpus) {
    LongGuest guest(random_stores());
    std::vector<std::unique_ptr<Vcpu>> more;
    std::vector<Vcpu*> vcpus{guest.vcpu.get()};
    while (vcpus.size() < cpus) {
        more.push_back(guest.engine->create_vcpu(static_cast<u32>(vcpus.size()), nullptr));
        more.back()->restore(guest.vcpu->save());
        vcpus.push_back(more.back().get());
    }
    std::vector<std::thread> threads;
    for (Vcpu* vcpu : vcpus) {
        seed(*vcpu, kSeed * 3 + vcpu->id() * 0x9e3779b97f4a7c15);
        threads.emplace_back([vcpu] { vcpu->run(); });
    }
    // A device at work on its own thread.
    std::atomic<bool> stop{false};
    std::thread dma([&] {
        for (u64 n = 0; !stop; ++n) {
            guest.memory.store<u64>(Gpa(0x400000 + n * 0x3008 % 0x7ff000), n);
            if (n % 64 == 0) std::this_thread::yield();
        }
    });
    DirtyLog& log = guest.engine->dirty_log();
    log.start();
    Copy copy;
    copy.take_all(guest);
    unsigned rounds = 0;
    for (auto end = Clk::now() + kLimit; rounds < 60 && Clk::now() < end; ++rounds) {
        copy.take(guest, fetch(guest));
        if (rounds % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    for (Vcpu* vcpu : vcpus) vcpu->request_stop();
    for (auto& thread : threads) thread.join();
    stop = true;
    dma.join();
    copy.take(guest, fetch(guest));
    CHECK_EQ(copy.different(guest).size(), 0u);
    CHECK_EQ(rounds, 60u);
    CHECK(fetch(guest).empty());
}

// A vCPU that only counts: no change may fall between two fetches.
void no_count_is_lost() {
    LongGuest guest(count_and_ask());
    std::thread thread([&] { guest.vcpu->run(); });
    DirtyLog& log = guest.engine->dirty_log();
    log.start();
    auto count = [&] { return __atomic_load_n(page_of(guest, 0x400), __ATOMIC_SEQ_CST); };
    unsigned noisy = 0;
    for (auto end = Clk::now() + kLimit; noisy < 25 && Clk::now() < end;) {
        if (!fetch(guest).empty()) {
            ++noisy;
            continue;
        }
        // Clean says: as it was when last reported, until a later fetch reports it again.
        u8 before = count();
        u8 after = before;
        for (unsigned n = 0; n < 1000 && after == before; ++n) after = count();
        if (after != before) CHECK(!fetch(guest).empty());
    }
    guest.vcpu->request_stop();
    thread.join();
    CHECK_EQ(noisy, 25u);
}

// A device may fetch, on the vCPU's own thread: what the guest wrote up to there is in it.
class Asker final : public Device {
  public:
    std::function<void()> on_write;
    std::string_view name() const override { return "asker"; }
    void read(u64, std::span<u8> data) override { std::fill(data.begin(), data.end(), 0); }
    void write(u64, std::span<const u8>) override { on_write(); }
};

void inside_a_device() {
    LongGuest guest(count_and_ask());
    auto device = std::make_shared<Asker>();
    guest.pio.attach(0x80, 1, device);
    guest.engine->dirty_log().start();
    unsigned asked = 0, wrong = 0;
    device->on_write = [&] {
        ++asked;
        if (fetch(guest) != Pages{0x400}) ++wrong;
    };
    auto begin = Clk::now();
    guest.run(3 * 500 + 1);
    CHECK_EQ(asked, 500u);
    // The first one also brings the page table whose accessed bits the first instructions set.
    CHECK(wrong <= 1);
    CHECK(Clk::now() - begin < std::chrono::seconds(5));
}

// A vCPU that is inside a device for long, or halted, holds nobody up and is not reported anew.
void beside_a_device() {
    LongGuest guest(count_and_ask());
    auto device = std::make_shared<Asker>();
    guest.pio.attach(0x80, 1, device);
    std::promise<void> entered, leave;
    auto may_leave = leave.get_future().share();
    std::atomic<unsigned> asked{0};
    device->on_write = [&] {
        if (asked++ == 0) {
            entered.set_value();
            may_leave.wait();
        }
    };
    auto idle = guest.engine->create_vcpu(1, nullptr);
    guest.load(0x180000, halt());
    CpuState state = guest.vcpu->save();
    state.rip = 0x180000;
    state.rflags |= 0x200;
    idle->restore(state);
    std::thread halted([&] { idle->run(); });
    std::thread thread([&] { guest.vcpu->run(); });
    entered.get_future().wait();
    DirtyLog& log = guest.engine->dirty_log();
    auto begin = Clk::now();
    log.start();
    guest.memory.store<u32>(Gpa(0x700000), 1);
    CHECK(fetch(guest) == Pages{0x700});
    CHECK(fetch(guest).empty());
    CHECK(Clk::now() - begin < soft::SoftDirtyLog::kPatience);
    leave.set_value();
    while (asked < 10) std::this_thread::yield();
    CHECK(!fetch(guest).empty());
    for (Vcpu* vcpu : {guest.vcpu.get(), idle.get()}) vcpu->request_stop();
    thread.join();
    halted.join();
}

// A vCPU that cannot come by is not waited for for ever; its pages stay dirty instead.
void a_vcpu_that_does_not_come() {
    LongGuest guest(random_stores());
    guest.engine->dirty_log().start();
    soft::InGuest stuck(guest.soft());
    guest.memory.store<u32>(Gpa(0x700000), 1);
    auto begin = Clk::now();
    CHECK(fetch(guest) == Pages{0x700});
    CHECK(Clk::now() - begin < std::chrono::seconds(3));
    CHECK(fetch(guest) == Pages{0x700});
}

// Code pages have a trap of their own; both are served.
void code_pages() {
    LongGuest guest(rewrite_itself());
    Copy copy;
    guest.engine->dirty_log().start();
    for (unsigned round = 0; round < 50; ++round) {
        copy.take_all(guest);
        guest.run(100);
        CHECK(fetch(guest) == copy.different(guest));
    }
    guest.engine->dirty_log().stop();
    CHECK(guest.run().reason == ExitReason::kHalt);
    CHECK_EQ(guest.memory.load<u32>(Gpa(0x400000)), 1000u);
}

// Without a log nothing is slower, as far as one can count it: no trapped store.
void no_log_no_traps() {
    LongGuest guest(random_stores());
    seed(*guest.vcpu, kSeed);
    guest.run(200'000);
    u64 before = guest.soft().stats.tlb_fills;
    guest.run(200'000);
    u64 usual = guest.soft().stats.tlb_fills - before;
    guest.engine->dirty_log().start();
    guest.engine->dirty_log().stop();
    guest.run(200'000);
    before = guest.soft().stats.tlb_fills;
    guest.run(200'000);
    u64 after = guest.soft().stats.tlb_fills - before;
    CHECK(usual > 1000);
    CHECK(after < usual + usual / 10);
}

}  // namespace

int main() {
    std::fprintf(stderr, "PV_SEED=%llu\n", static_cast<unsigned long long>(kSeed));
    exact_pages();
    concurrent(1);
    concurrent(2);
    no_count_is_lost();
    inside_a_device();
    beside_a_device();
    a_vcpu_that_does_not_come();
    code_pages();
    no_log_no_traps();
    return pvtest::finish("test_dirty");
}
