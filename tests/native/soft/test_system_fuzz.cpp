// Guests that make no sense: random system code over random descriptor tables, gates, TSSs and page
// tables, in every mode. Whatever a guest does, the host must go on, the state must be one that a
// CPU can be in, and saving and restoring it must lose nothing. PV_SEED repeats a run; PV_ROUNDS
// lengthens it.
#include <atomic>
#include <mutex>
#include <random>
#include <thread>

#include "base/error.hpp"
#include "system_machine.hpp"

using namespace pvtest;

namespace {

/// Ends a run() that waits in HLT with interrupts on.
class Watchdog {
  public:
    Watchdog() : thread_([this] { loop(); }) {}
    ~Watchdog() {
        stop_ = true;
        thread_.join();
    }
    Exit run(Vcpu& vcpu, u64 budget) {
        {
            std::lock_guard lock(mutex_);
            vcpu_ = &vcpu;
            ticks_ = 0;
        }
        vcpu.set_instruction_budget(budget);
        Exit exit = vcpu.run();
        std::lock_guard lock(mutex_);
        vcpu_ = nullptr;
        return exit;
    }

  private:
    void loop() {
        while (!stop_) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            std::lock_guard lock(mutex_);
            if (vcpu_ != nullptr && ++ticks_ > 2) vcpu_->request_stop();
        }
    }
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    Vcpu* vcpu_ = nullptr;
    int ticks_ = 0;
    std::thread thread_;
};

/// Bytes that are mostly the instructions this folder's system files implement.
std::string random_code(std::mt19937_64& random, size_t size) {
    static const std::string_view kParts[] = {
        {"\x0f\x22\xc0", 3}, {"\x0f\x22\xd8", 3}, {"\x0f\x22\xe0", 3}, {"\x0f\x20\xc0", 3},
        {"\x0f\x23\xf8", 3}, {"\x0f\x23\xc0", 3}, {"\x0f\x30", 2},     {"\x0f\x32", 2},
        {"\x0f\x01\x10", 3}, {"\x0f\x01\x18", 3}, {"\x0f\x00\xd0", 3}, {"\x0f\x00\xd8", 3},
        {"\x0f\x01\xf8", 3}, {"\x0f\x05", 2},     {"\x0f\x07", 2},     {"\x48\x0f\x07", 3},
        {"\x0f\x34", 2},     {"\x0f\x35", 2},     {"\xcf", 1},         {"\x48\xcf", 2},
        {"\xcb", 1},         {"\xca\x08\x00", 3}, {"\xcd\x80", 2},     {"\xcd\x41", 2},
        {"\xcc", 1},         {"\xf1", 1},         {"\xce", 1},         {"\xff\x18", 2},
        {"\xff\x28", 2},     {"\xff\x2b", 2},     {"\x8e\xd8", 2},     {"\x8e\xd0", 2},
        {"\x8e\xe0", 2},     {"\x8e\xc3", 2},     {"\x0f\xb2\x03", 3}, {"\xc5\x03", 2},
        {"\x0f\x02\xc3", 3}, {"\x0f\x03\xc3", 3}, {"\x0f\x00\xe3", 3}, {"\x0f\x00\xeb", 3},
        {"\x9c", 1},         {"\x9d", 1},         {"\xfa", 1},         {"\xfb", 1},
        {"\xec", 1},         {"\xef", 1},         {"\xf3\x6d", 2},     {"\xf3\x6e", 2},
        {"\x0f\xa2", 2},     {"\x0f\x31", 2},     {"\x0f\x01\x3b", 3}, {"\x66\x0f\x38\x82\x03", 5},
        {"\x0f\x01\xcb", 3}, {"\x0f\x01\xca", 3}, {"\x0f\x01\xd1", 3}, {"\x0f\x01\xf0", 3},
        {"\x0f\x06", 2},     {"\x50", 1},         {"\x58", 1},         {"\x89\x03", 2},
        {"\x8b\x03", 2},     {"\x01\xd8", 2},     {"\x48\x8b\x03", 3}, {"\xc8\x10\x00\x03", 4},
        {"\x9a", 1},         {"\xea", 1},         {"\xff\xe3", 2},     {"\x0f\x01\xd9", 3},
        {"\xf3\xa4", 2},     {"\xf3\xab", 2},     {"\x0f\xae\x03", 3}, {"\xf0\x0f\xb1\x0b", 4},
        {"\xf4", 1},         {"\x8b\xe3", 2},     {"\x60", 1},         {"\x61", 1},
    };
    std::string code;
    while (code.size() < size) {
        if (random() % 8 == 0) {
            code.push_back(static_cast<char>(random()));
        } else {
            code += kParts[random() % std::size(kParts)];
        }
        if (random() % 16 == 0) code.insert(code.end() - 1, "\x66\x67\x2e\x64\xf0"[random() % 5]);
    }
    return code;
}

u64 interesting(std::mt19937_64& random) {
    static const u64 kValues[] = {
        0,       1,          kData,      kPages,     kGdt,       kIdt,    kTss,  kCode,
        kStack0, 0xffffffff, 0x80010033, 0x10000,    bit(47),    ~u64{0}, kCs32, kDs32,
        kTr2,    kGate | 3,  0x277,      0xc0000080, 0xc0000082, 0x1a0,   kPml4, kPd32,
        0x10,    0x3f8,      0x6b0,      0x10006b0,  0x4b564d01, 0x600001};
    u64 value = kValues[random() % std::size(kValues)];
    return random() % 4 == 0 ? value + random() % 64 : random() % 8 == 0 ? random() : value;
}

void scramble(Machine& m, std::mt19937_64& random) {
    auto spray = [&](u64 at, u64 size, unsigned one_in) {
        for (u64 n = 0; n < size; ++n) {
            if (random() % one_in == 0) m.put<u8>(at + n, static_cast<u8>(random()));
        }
    };
    if (random() % 2) spray(kGdt, 0x400, 40);
    if (random() % 2) spray(kIdt, 0x1000, 60);
    if (random() % 2) spray(kTss, 0x100, 10);
    if (random() % 2) spray(kTss2, 0x80, 4);
    if (random() % 3 == 0) spray(kPt64, 0x200, 20);
    if (random() % 8 == 0) spray(kPd64, 0x40, 10);
    if (random() % 8 == 0) spray(kPdpt, 0x10, 4);
    m.put<u16>(kData + 4, static_cast<u16>(interesting(random)));
    for (u64& r : m.state.gpr) {
        if (random() % 2) r = interesting(random);
    }
    if (random() % 4) m.state.gpr[kRsp] = kStack0 - 64;
    if (random() % 4 == 0) m.state.rflags |= random() & 0x247700;
    if (random() % 8 == 0) m.state.dr7 |= random() & 0xffff00ff;
    m.state.dr[0] = interesting(random);
    m.apic.vectors.assign(random() % 3, 0x50);
    for (u64 n = 0; n < 64; n += 8) {
        u64 stack[] = {kCode + random() % 64,
                       kCs64,
                       kCs32,
                       kCs32User,
                       0x202,
                       0x23202,
                       kStack1,
                       kDs32,
                       kDsUser,
                       random()};
        m.put<u64>(kStack0 - 64 + n, stack[random() % std::size(stack)]);
    }
}

void check_round_trip(Machine& m, u64 seed) {
    CpuState s = m.vcpu->save();
    // In 64-bit code it ran over the end of what is canonical, or an AMD SYSRET took it there: its
    // next fetch is a #GP, and that is no state to start from.
    const unsigned width = s.cr4 & bit(12) ? 57 : 48;
    if (s.msr.efer & bit(10) && sign_extend(s.rip, width) != static_cast<s64>(s.rip)) return;
    try {
        validate(s);
        m.vcpu->restore(s);
        CpuState again = m.vcpu->save();
        CHECK(again == s);
    } catch (const StateError& error) {
        std::fprintf(stderr, "PV_SEED=%llu: %s (cr0 %llx efer %llx rip %llx)\n",
                     static_cast<unsigned long long>(seed), error.what(),
                     static_cast<unsigned long long>(s.cr0),
                     static_cast<unsigned long long>(s.msr.efer),
                     static_cast<unsigned long long>(s.rip));
        CHECK(false);
    }
}

}  // namespace

int main() {
    std::random_device entropy;
    u64 first = entropy();
    if (const char* text = std::getenv("PV_SEED")) first = std::strtoull(text, nullptr, 0);
    u64 rounds = 400;
    if (const char* text = std::getenv("PV_ROUNDS")) rounds = std::strtoull(text, nullptr, 0);
    Watchdog watchdog;
    u64 reasons[16]{}, instructions = 0;
    for (u64 n = 0; n < rounds; ++n) {
        u64 seed = first + n;
        std::mt19937_64 random(seed);
        static constexpr Mode kModes[] = {Mode::kReal,        Mode::kVm86,   Mode::kProtected16,
                                          Mode::kProtected32, Mode::kCompat, Mode::kLong};
        Mode mode = kModes[random() % 6];
        unsigned cpl = mode == Mode::kReal || mode == Mode::kProtected16 || random() % 3 ? 0 : 3;
        Machine m(mode, cpl);
        scramble(m, random);
        m.start(random_code(random, 256));
        for (int turn = 0; turn < 8; ++turn) {
            Exit exit = watchdog.run(*m.vcpu, 50);
            ++reasons[static_cast<unsigned>(exit.reason)];
            check_round_trip(m, seed);
            if (exit.reason == ExitReason::kShutdown) break;
        }
        instructions += m.vcpu->save().instructions;
        if (failures) {
            std::fprintf(stderr, "PV_SEED=%llu\n", static_cast<unsigned long long>(seed));
            break;
        }
    }
    std::fprintf(stderr, "fuzz: first seed %llu, %llu instructions\n",
                 static_cast<unsigned long long>(first),
                 static_cast<unsigned long long>(instructions));
    // The generator must get somewhere: most guests run for a while.
    CHECK(failures || instructions > rounds * 4);
    return finish("test_system_fuzz");
}
