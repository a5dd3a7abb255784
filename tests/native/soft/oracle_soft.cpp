#include "oracle_soft.hpp"

#include <cstring>

#include "soft/engine.hpp"
#include "soft/system.hpp"
#include "soft/vcpu.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::soft;

namespace {

// Guest-physical addresses, the first 2 MB also being linear addresses for the supervisor.
constexpr u64 kPml4 = 0x1000, kPdpt = 0x2000, kPd = 0x3000, kPtLow = 0x4000, kPtData = 0x5000;
constexpr u64 kGdt = 0x8000, kIdt = 0x9000, kTss = 0xa000, kHandlers = 0xb000, kStackTop = 0xe000;
constexpr u64 kDataPhysical = 0x100000, kCodePhysical = 0x1000000;
constexpr u64 kLowSize = 0x200000;

constexpr u64 kPresent = 1, kWritable = 2, kUser = 4, kAccessed = 0x20, kDirty = 0x40,
              kLarge = 0x80;

constexpr u16 kKernelCs = 0x10, kTssSelector = 0x40;
constexpr u64 kHandlerSize = 16;

Segment flat(u16 selector, u32 attributes) {
    Segment segment;
    segment.selector = selector;
    segment.limit = 0xffffffff;
    segment.attributes = attributes;
    return segment;
}

Segment small(u16 selector, u32 attributes, u64 base) {
    Segment segment;
    segment.selector = selector;
    segment.base = base;
    segment.limit = kSegmentSize - 1;
    segment.attributes = attributes;
    return segment;
}

Segment null_segment() {
    Segment segment;
    segment.limit = 0;
    segment.attributes = 1 << 16;
    return segment;
}

bool pushes_error(int vector) {
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17;
}

}  // namespace

SoftCpu::SoftCpu(bool generic)
    : pio_("pio", 0x10000),
      mmio_("mmio", u64{1} << 40),
      cpuid_(make_cpuid_policy("host", implemented_features(), 1, 1'000'000)) {
    memory_.add(Gpa(0), kLowSize, "low");
    memory_.add(Gpa(kCodePhysical), kCodeSize, "code");
    make_system();
    EngineConfig config{
        .memory = memory_, .pio = pio_, .mmio = mmio_, .clock = clock_, .cpuid = cpuid_};
    engine_ = create_engine(config);
    vcpu_ = engine_->create_vcpu(0, nullptr);
    if (generic) static_cast<SoftVcpu&>(*vcpu_).set_generic_only();
}

SoftCpu::~SoftCpu() = default;

void SoftCpu::make_system() {
    auto entry = [&](u64 table, u64 index, u64 value) {
        memory_.store<u64>(Gpa(table + index * 8), value);
    };
    // Accessed and dirty bits are set beforehand: setting them is not what is tested here.
    constexpr u64 kTable = kPresent | kWritable | kUser | kAccessed;
    entry(kPml4, 0, kPdpt | kTable);
    entry(kPdpt, 0, kPd | kTable);
    entry(kPd, 0, kPtLow | kTable);
    for (u64 page = 0; page < kLowSize / kPageSize; ++page) {
        entry(kPtLow, page, page * kPageSize | kPresent | kWritable | kAccessed | kDirty);
    }
    for (u64 at = 0; at < kCodeSize; at += 2 << 20) {
        entry(kPd, (kCodeBase + at) >> 21,
              (kCodePhysical + at) | kPresent | kUser | kLarge | kAccessed);
    }
    entry(kPd, kDataBase >> 21, kPtData | kTable);
    for (u64 page = 0; page < kDataPages; ++page) {
        u64 writable = page * kPageSize < kWritableSize ? kWritable | kDirty : 0;
        entry(kPtData, page,
              (kDataPhysical + page * kPageSize) | kPresent | kUser | kAccessed | writable);
    }

    entry(kGdt, 2, 0x00209b0000000000);  // kernel code, 64-bit
    entry(kGdt, 3, 0x00cf93000000ffff);  // kernel data
    entry(kGdt, 4, 0x00cffb000000ffff);  // user code, 32-bit: Linux's selectors 23, 2b, 33
    entry(kGdt, 5, 0x00cff3000000ffff);
    entry(kGdt, 6, 0x00affb000000ffff);
    entry(kGdt, kTssSelector / 8, 0x00008b0000000067 | (kTss & 0xffffff) << 16);
    entry(kGdt, kTssSelector / 8 + 1, 0);
    memory_.store<u64>(Gpa(kTss + 4), kStackTop);  // RSP0
    for (u64 vector = 0; vector < 32; ++vector) {
        u64 handler = kHandlers + vector * kHandlerSize;
        u64 dpl = vector == 3 || vector == 4 ? 3 : 0;
        entry(kIdt, vector * 2,
              (handler & 0xffff) | u64{kKernelCs} << 16 | (0x8e00 | dpl << 13) << 32 |
                  (handler >> 16 & 0xffff) << 48);
        entry(kIdt, vector * 2 + 1, handler >> 32);
        memory_.store<u8>(Gpa(handler), 0xf4);  // HLT
    }
}

Outcome SoftCpu::run(const Case& c) {
    u8 slot[kCodeSlot];  // as on the host: an instruction may read code, too
    std::memset(slot, 0xcc, sizeof slot);
    std::memcpy(slot, c.code, c.insn.length);
    memory_.write(Gpa(kCodePhysical + (c.code_address - kCodeBase)), slot);
    memory_.write(Gpa(kDataPhysical), c.data);

    CpuState state = reset_state(true);
    const UserState& s = c.before;
    for (unsigned n = 0; n < 16; ++n) state.gpr[n] = s.gpr[n];
    state.rip = s.rip;
    state.rflags = s.rflags | kFlagI;
    bool compat = c.size == CodeSize::k32;
    constexpr u32 kUserData = 0xc0f3, kUserCode32 = 0xc0fb, kUserCode64 = 0xa0fb;
    state.segments[kCs] = compat ? flat(0x23, kUserCode32) : flat(0x33, kUserCode64);
    state.segments[kSs] = flat(0x2b, kUserData);
    for (auto n : {kDs, kEs}) {
        state.segments[n] = compat ? flat(0x2b, kUserData) : null_segment();
    }
    for (auto n : {kFs, kGs}) state.segments[n] = null_segment();
    if (c.size == CodeSize::k16) {
        state.segments[kCs] = small(code16_selector(c.code_address), 0xfb, c.code_base);
        for (auto n : {kDs, kEs, kSs}) {
            state.segments[n] = small(kData16Selector, 0xf3, c.data_base);
        }
    }
    state.segments[kFs].base = s.fs_base;
    state.segments[kGs].base = s.gs_base;
    state.ldtr = null_segment();
    state.tr = flat(kTssSelector, 0x8b);
    state.tr.base = kTss;
    state.tr.limit = 0x67;
    state.gdtr = {kGdt, 0x7f};
    state.idtr = {kIdt, 32 * 16 - 1};
    state.cr0 = 0x80050033;  // PG AM WP NE ET MP PE
    state.cr3 = kPml4;
    state.cr4 =
        bit(5) | bit(9) | bit(10) | bit(16) | bit(18);  // PAE OSFXSR OSXMMEXCPT FSGSBASE OSXSAVE
    state.xcr0 = cpuid_.features.has(Feature::kAvx) ? 7 : 3;
    state.msr.efer = bit(0) | bit(8) | bit(10) | bit(11);  // SCE LME LMA NXE
    std::memcpy(state.fpu.legacy.data(), s.legacy, 512);
    for (unsigned n = 0; n < 16; ++n) std::memcpy(state.fpu.ymm_high[n].data(), s.ymm_high[n], 16);

    Outcome outcome;
    auto failed = [&](const char* text) {
        outcome.alive = false;
        outcome.text = text;
        return outcome;
    };
    vcpu_->restore(state);
    vcpu_->set_instruction_budget(1);
    Exit exit = vcpu_->run();
    CpuState after = vcpu_->save();
    UserState& a = outcome.after;
    for (unsigned n = 0; n < 16; ++n) a.gpr[n] = after.gpr[n];
    a.rip = after.rip;
    a.rflags = after.rflags;
    a.fs_base = after.segments[kFs].base;
    a.gs_base = after.segments[kGs].base;
    std::memcpy(a.legacy, after.fpu.legacy.data(), 512);
    for (unsigned n = 0; n < 16; ++n) std::memcpy(a.ymm_high[n], after.fpu.ymm_high[n].data(), 16);
    memory_.read(Gpa(kDataPhysical), outcome.data);

    if (after.segments[kCs].selector == kKernelCs) {  // in a handler, on the stack of ring 0
        u64 offset = after.rip - kHandlers;
        if (offset >= 32 * kHandlerSize) return failed("an exception went to no handler");
        outcome.vector = static_cast<int>(offset / kHandlerSize);
        outcome.has_error = pushes_error(outcome.vector);
        u64 frame = kStackTop - 40;
        if (outcome.has_error) outcome.error = memory_.load<u32>(Gpa(frame - 8));
        if (after.gpr[kRsp] != frame - (outcome.has_error ? 8 : 0))
            return failed("the exception frame is misplaced");
        a.rip = memory_.load<u64>(Gpa(frame));
        if (memory_.load<u64>(Gpa(frame + 8)) != state.segments[kCs].selector)
            return failed("CS was pushed wrongly");
        a.rflags = memory_.load<u64>(Gpa(frame + 16));
        a.gpr[kRsp] = memory_.load<u64>(Gpa(frame + 24));
        outcome.has_address = outcome.vector == kPf;
        outcome.address = after.cr2;
    } else if (exit.reason != ExitReason::kInterrupted) {
        return failed(to_string(exit.reason));
    }
    return outcome;
}

}  // namespace pvtest
