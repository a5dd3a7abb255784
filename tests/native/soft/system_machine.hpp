// A machine for tests of privileged behaviour: any mode, any CPL, one instruction or a small
// program.
//
// Every interrupt vector has a handler of its own that is a single HLT, so a test runs something
// and sees from RIP which vector was taken, and from the stack what was pushed. Memory is 16 MiB,
// identity-mapped in every paging format; the second 2 MiB (kPages) are mapped by 4 KiB pages that
// tests may change.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "check.hpp"
#include "long_guest.hpp"

namespace pvtest {

using namespace polyvisor;

enum class Mode { kReal, kVm86, kProtected16, kProtected32, kCompat, kLong };

inline const char* name_of(Mode mode) {
    static const char* const kNames[] = {"real", "vm86", "16-bit", "32-bit", "compat", "64-bit"};
    return kNames[static_cast<int>(mode)];
}

// Where things are. Code and handlers are below 64 KiB so that real mode reaches them.
constexpr u64 kCode = 0x8000, kHandlers = 0x9000, kRealStack = 0xa000;
constexpr u64 kPml4 = 0x10000, kPdpt = 0x11000, kPd64 = 0x12000, kPt64 = 0x13000;
constexpr u64 kPd32 = 0x14000, kPt32 = 0x15000;
constexpr u64 kGdt = 0x20000, kIdt = 0x21000, kTss = 0x22000, kLdt = 0x24000, kTss2 = 0x25000;
constexpr u64 kStack0 = 0x30000, kStack1 = 0x34000, kStack3 = 0x40000, kIst1 = 0x50000;
constexpr u64 kData = 0x60000, kPages = 0x200000;

// Selectors.
constexpr u16 kCs32 = 0x08, kDs32 = 0x10, kCs64 = 0x18, kCs32User = 0x23, kDsUser = 0x2b,
              kCs64User = 0x33, kTr = 0x38, kLdtSel = 0x48, kCs16 = 0x58, kDs16 = 0x60,
              kConforming = 0x68, kAbsentCode = 0x70, kAbsentData = 0x78, kReadOnly = 0x80,
              kExpandDown = 0x88, kGate = 0x90, kTaskGateSel = 0xa0, kTr2 = 0xa8, kCs1 = 0xb1,
              kDs1 = 0xb9, kSmall = 0xc0, kAbsentStack = 0xc8, kExecuteOnly = 0xd0, kTr3 = 0xd8,
              kBeyond = 0x400;

/// A segment descriptor; attributes as in Segment (P, DPL, S, type, G, D, L).
constexpr u64 descriptor(u32 base, u32 limit, u32 attributes) {
    if (attributes & 0x8000) limit >>= 12;
    return (limit & 0xffff) | u64{base & 0xffffff} << 16 | u64{attributes & 0xf0ff} << 40 |
           u64{limit >> 16 & 15} << 48 | u64{base >> 24} << 56;
}
/// A gate; `type` 5 task, 6/7 16-bit, 12 call, 14 interrupt, 15 trap.
constexpr u64 gate(u16 selector, u32 offset, u8 type, u8 dpl = 0, u8 parameters = 0,
                   bool present = true) {
    return (offset & 0xffff) | u64{selector} << 16 | u64{parameters} << 32 |
           u64{static_cast<u8>(type | dpl << 5 | (present ? 0x80 : 0))} << 40 |
           u64{offset >> 16} << 48;
}

inline Segment segment_of(u16 selector, u64 raw) {
    Segment s;
    s.selector = selector;
    s.base = (raw >> 16 & 0xffffff) | (raw >> 56) << 24;
    s.limit = static_cast<u32>((raw & 0xffff) | (raw >> 48 & 15) << 16);
    if (raw & bit(55)) s.limit = s.limit << 12 | 0xfff;
    s.attributes = (raw >> 40) & 0xf0ff;
    return s;
}

/// A local APIC that has one list of vectors to deliver.
class FakeApic : public LocalInterrupts {
  public:
    std::vector<int> vectors;
    CpuSignals* cpu = nullptr;
    u8 priority = 0;
    bool pending() const override { return !vectors.empty(); }
    int acknowledge() override {
        if (vectors.empty()) return -1;
        int vector = vectors.front();
        vectors.erase(vectors.begin());
        if (!vectors.empty() && cpu != nullptr) cpu->interrupt();
        return vector;
    }
    u8 cr8() const override { return priority; }
    void set_cr8(u8 value) override { priority = value; }
    bool read_msr(u32 index, u64& value) override {
        value = index == 0x1b ? 0xfee00900 : 0;
        return index == 0x1b || index == 0x6e0;
    }
    bool write_msr(u32 index, u64) override { return index == 0x1b || index == 0x6e0; }
    u64 mmio_base() const override { return 0xfee00000; }
    void mmio_read(u32, std::span<u8> data) override {
        for (u8& byte : data) byte = 0;
    }
    void mmio_write(u32, std::span<const u8>) override {}
    void reset(bool) override {}
};

struct Machine {
    GuestMemory memory;
    Bus pio{"pio", 0x10000};
    Bus mmio{"mmio", bit(52)};
    Clock clock;
    FakeApic apic;
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Vcpu> vcpu;
    CpuState state;  ///< to change before start()
    Mode mode;
    unsigned cpl;

    explicit Machine(Mode mode, unsigned cpl = 0, CpuidPolicy policy = everything())
        : mode(mode), cpl(mode == Mode::kVm86 ? 3 : cpl) {
        policy.features.set(Feature::kPku, false);
        memory.add(Gpa(0), 16 << 20, "ram");
        EngineConfig config{memory, pio, mmio, clock, policy};
        engine = soft::create_engine(config);
        vcpu = engine->create_vcpu(0, &apic);
        apic.cpu = vcpu.get();
        build_tables();
        build_state();
    }

    bool ia32e() const { return mode == Mode::kLong || mode == Mode::kCompat; }

    template <class T>
    void put(u64 gpa, T value) {
        memory.store<T>(Gpa(gpa), value);
    }
    template <class T>
    T get(u64 gpa) const {
        return memory.load<T>(Gpa(gpa));
    }
    void load(u64 gpa, std::string_view bytes) {
        memory.write(Gpa(gpa), {reinterpret_cast<const u8*>(bytes.data()), bytes.size()});
    }
    u64 gdt(u16 selector) const { return get<u64>(kGdt + (selector & 0xfff8)); }
    void set_gdt(u16 selector, u64 raw) { put<u64>(kGdt + (selector & 0xfff8), raw); }
    void set_gate(u8 vector, u64 raw, u64 upper = 0) {
        if (ia32e()) {
            put<u64>(kIdt + vector * 16u, raw);
            put<u64>(kIdt + vector * 16u + 8, upper);
        } else {
            put<u64>(kIdt + vector * 8u, raw);
        }
    }
    u16 handler_cs() const { return ia32e() ? kCs64 : kCs32; }

    /// Entry of the 4 KiB page at kPages + n * 4096.
    void set_page(unsigned n, u64 entry) {
        if (ia32e()) {
            put<u64>(kPt64 + n * 8, entry);
        } else {
            put<u32>(kPt32 + n * 4, static_cast<u32>(entry));
        }
    }
    u64 page_entry(unsigned n) const {
        return ia32e() ? get<u64>(kPt64 + n * 8) : get<u32>(kPt32 + n * 4);
    }

    void segment(unsigned index, u16 selector) {
        state.segments[index] = segment_of(selector, gdt(selector));
    }

    void start(std::string_view code) {
        load(kCode, code);
        vcpu->restore(state);
    }
    Exit run(u64 instructions = 100'000) {
        vcpu->set_instruction_budget(instructions);
        return vcpu->run();
    }
    /// Runs code to a HLT; the state after it.
    CpuState finish(std::string_view code, u64 instructions = 100'000) {
        start(code);
        Exit exit = run(instructions);
        if (exit.reason != ExitReason::kHalt) {
            fail(__FILE__, __LINE__, std::string("ended with ") + to_string(exit.reason));
        }
        return vcpu->save();
    }
    /// The vector whose handler the CPU halted in; -1 elsewhere.
    static int vector_of(const CpuState& s) {
        u64 at = s.segments[kCs].base + s.rip - 1;
        if (s.activity != Activity::kHalted || at < kHandlers || at >= kHandlers + 0x1000)
            return -1;
        return static_cast<int>((at - kHandlers) / 16);
    }

  private:
    void build_tables();
    void build_state();
};

inline void Machine::build_tables() {
    // 2 MiB pages, user and writable, but the second 2 MiB in 4 KiB pages.
    put<u64>(kPml4, kPdpt | 7);
    put<u64>(kPdpt, kPd64 | 7);
    put<u64>(kPd64, 0x87);
    put<u64>(kPd64 + 8, kPt64 | 7);
    for (u64 n = 2; n < 8; ++n) put<u64>(kPd64 + n * 8, n << 21 | 0x87);
    put<u32>(kPd32, 0x87);  // 4 MiB: overridden below for the pages
    for (u32 n = 0; n < 4; ++n) put<u32>(kPd32 + n * 4, n << 22 | 0x87);
    put<u32>(kPd32 + 16, static_cast<u32>(kPt32 | 7));  // linear 0x1000000: see pages_base()
    for (u64 n = 0; n < 512; ++n) put<u64>(kPt64 + n * 8, (kPages + n * 4096) | 7);
    for (u32 n = 0; n < 1024; ++n) put<u32>(kPt32 + n * 4, static_cast<u32>(kPages + n * 4096) | 7);

    const u32 code = 0xc09b, data = 0xc093, user = 0x60;
    set_gdt(0, 0);
    set_gdt(kCs32, descriptor(0, ~0u, code));
    set_gdt(kDs32, descriptor(0, ~0u, data));
    set_gdt(kCs64, descriptor(0, ~0u, 0xa09b));
    set_gdt(kCs32User, descriptor(0, ~0u, code | user));
    set_gdt(kDsUser, descriptor(0, ~0u, data | user));
    set_gdt(kCs64User, descriptor(0, ~0u, 0xa0fb));
    set_gdt(kTr, descriptor(kTss, 0x1fff, ia32e() ? 0x8b : 0x8b));
    set_gdt(kTr + 8, 0);
    set_gdt(kLdtSel, descriptor(kLdt, 0xff, 0x82));
    set_gdt(kLdtSel + 8, 0);
    set_gdt(kCs16, descriptor(0, 0xffff, 0x9b));
    set_gdt(kDs16, descriptor(0, 0xffff, 0x93));
    set_gdt(kConforming, descriptor(0, ~0u, 0xc09e));
    set_gdt(kAbsentCode, descriptor(0, ~0u, code & ~0x80u));
    set_gdt(kAbsentData, descriptor(0, ~0u, data & ~0x80u));
    set_gdt(kReadOnly, descriptor(0, ~0u, 0xc091));
    set_gdt(kExpandDown, descriptor(0, 0xfff, 0x4097));
    set_gdt(kCs1, descriptor(0, ~0u, code | 0x20));
    set_gdt(kDs1, descriptor(0, ~0u, data | 0x20));
    set_gdt(kSmall, descriptor(kData, 15, 0x4093));
    set_gdt(kAbsentStack, descriptor(0, ~0u, data & ~0x80u));
    set_gdt(kExecuteOnly, descriptor(0, ~0u, 0xc099));
    set_gdt(kTaskGateSel, gate(kTr2, 0, 5, 3));
    set_gdt(kTr2, descriptor(kTss2, 0x67, 0x89));

    for (unsigned n = 0; n < 256; ++n) {
        put<u8>(kHandlers + n * 16, 0xf4);
        put<u32>(n * 4, static_cast<u32>((kHandlers >> 4) << 16 | n * 16));
        set_gate(static_cast<u8>(n),
                 gate(handler_cs(), static_cast<u32>(kHandlers + n * 16), 14, n == 0x80 ? 3 : 0));
    }
    if (ia32e()) {
        put<u64>(kTss + 4, kStack0);
        put<u64>(kTss + 12, kStack1);
        put<u64>(kTss + 0x24, kIst1);
    } else {
        put<u32>(kTss + 4, static_cast<u32>(kStack0));
        put<u16>(kTss + 8, kDs32);
        put<u32>(kTss + 12, static_cast<u32>(kStack1));
        put<u16>(kTss + 16, kDs1);
        put<u32>(kTss + 0x1c, static_cast<u32>(kPd32));
    }
    put<u16>(kTss + 0x66, 0x88 + 32);  // I/O map, the redirection map below it
    for (u64 n = 0; n <= 0x1f00; n += 8) {
        if (kTss + 0xa8 + n + 8 < kTss + 0x2000) put<u64>(kTss + 0xa8 + n, ~u64{0});
    }
}

inline void Machine::build_state() {
    CpuState& s = state;
    s = reset_state(true);
    s.gdtr = {kGdt, 0x3ff};
    s.idtr = {kIdt, 0xfff};
    s.rip = kCode;
    s.gpr[kRdx] = 0;
    s.gpr[kRsp] = cpl == 3 ? kStack3 : cpl == 1 ? kStack1 : kStack0;
    s.tr = segment_of(kTr, gdt(kTr));
    s.ldtr = segment_of(kLdtSel, gdt(kLdtSel));
    s.cr0 = 0x60010 & 0x10;
    switch (mode) {
        case Mode::kReal:
            s.idtr = {0, 0x3ff};
            break;
        case Mode::kVm86:
            s.cr0 |= 0x80010001;
            s.rflags |= bit(17);
            break;
        case Mode::kProtected16:
        case Mode::kProtected32:
            s.cr0 |= 0x80010001;
            break;
        case Mode::kCompat:
        case Mode::kLong:
            s.cr0 |= 0x80010001;
            s.msr.efer = 0xd01;
            break;
    }
    s.cr4 = ia32e() ? 0x630 : 0x610;
    s.cr3 = ia32e() ? kPml4 : kPd32;
    if (mode == Mode::kReal || mode == Mode::kVm86) {
        for (Segment& segment : s.segments) {
            segment = {kCode, 0xffff, mode == Mode::kVm86 ? 0xf3u : 0x93u, kCode >> 4};
        }
        s.segments[kDs] = s.segments[kEs] = {kData, 0xffff, s.segments[kDs].attributes, kData >> 4};
        s.segments[kSs] = {kRealStack, 0xffff, s.segments[kSs].attributes, kRealStack >> 4};
        s.rip = 0;
        s.gpr[kRsp] = 0x800;
        return;
    }
    u16 data = cpl == 3 ? kDsUser : cpl == 1 ? kDs1 : kDs32;
    u16 code = mode == Mode::kLong ? (cpl == 3 ? kCs64User : kCs64)
                                   : (cpl == 3   ? kCs32User
                                      : cpl == 1 ? kCs1
                                                 : kCs32);
    if (mode == Mode::kProtected16) code = kCs16, data = kDs16;
    for (unsigned n : {kEs, kDs, kFs, kGs, kSs}) segment(n, data);
    segment(kCs, code);
    if (mode == Mode::kProtected16) s.gpr[kRsp] = 0xc000;
}

/// Linear address of the 4 KiB pages: 32-bit paging maps them above the identity map.
inline u64 pages_base(const Machine& m) {
    return m.ia32e() ? kPages : 0x1000000;
}

/// What one instruction came to.
struct Outcome {
    int vector = -1;  ///< -1: it completed
    u64 error = 0;
    bool has_error = false;
    u64 rip = 0, cs = 0, rflags = 0, rsp = 0, ss = 0;  ///< as pushed
    CpuState state;
};

/// Vectors that push an error code in protected mode.
inline bool pushes_error(int vector) {
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17;
}

/// Reads the frame of the handler the CPU halted in.
inline Outcome outcome_of(const Machine& m, const CpuState& s) {
    Outcome o;
    o.state = s;
    o.vector = Machine::vector_of(s);
    if (o.vector < 0) return o;
    if (m.mode == Mode::kReal) {
        u64 sp = s.segments[kSs].base + (s.gpr[kRsp] & 0xffff);
        o.rip = m.get<u16>(sp), o.cs = m.get<u16>(sp + 2), o.rflags = m.get<u16>(sp + 4);
        return o;
    }
    u64 sp = s.gpr[kRsp];
    u64 size = m.ia32e() ? 8 : 4;
    auto next = [&] {
        u64 value = size == 8 ? m.get<u64>(sp) : m.get<u32>(sp);
        sp += size;
        return value;
    };
    o.has_error = pushes_error(o.vector);
    if (o.has_error) o.error = next();
    o.rip = next(), o.cs = next(), o.rflags = next();
    if (m.ia32e() || (o.cs & 3) != (s.segments[kCs].selector & 3) || (o.rflags & bit(17))) {
        o.rsp = next(), o.ss = next();
    }
    return o;
}

/// Runs one instruction, and the HLT of its handler if it ends in one.
inline Outcome step(Machine& m, std::string_view code) {
    m.start(code);
    m.run(1);
    CpuState s = m.vcpu->save();
    u64 at = s.segments[kCs].base + s.rip - kHandlers;
    if (s.activity == Activity::kRunning && at < 0x1000 && at % 16 == 0) {
        m.run(1);  // the instruction itself was the way into the handler
        s = m.vcpu->save();
    }
    return outcome_of(m, s);
}

}  // namespace pvtest
