// Random CPU states that are valid, in every mode, and in the form that an engine reads them back:
// what a CPU has no bit for is as save() gives it (accessed segments, G where the limit needs it).
//
//     StateGenerator generator({policy, kernel_lapic, kRam}, seed);
//     CpuState state = generator.next(CpuMode::kLong);
#pragma once

#include <cstring>
#include <string>

#include "cpu/cpuid.hpp"
#include "cpu/state.hpp"
#include "random.hpp"

namespace pvtest {

using namespace polyvisor;

enum class CpuMode { kReal, kProtected, kVm86, kCompat, kLong };
constexpr CpuMode kCpuModes[] = {CpuMode::kReal, CpuMode::kProtected, CpuMode::kVm86,
                                 CpuMode::kCompat, CpuMode::kLong};

inline const char* name_of(CpuMode mode) {
    static const char* const kNames[] = {"real", "protected", "vm86", "compat", "long"};
    return kNames[static_cast<int>(mode)];
}

class StateGenerator {
  public:
    struct Limits {
        const CpuidPolicy& policy;
        u64 ram = 1 << 20;   ///< what the KVM clock's pages may be in
        bool events = true;  ///< an event in flight, NMIs, a shadow
    };

    StateGenerator(const Limits& limits, u64 seed) : limits_(limits), random_(seed) {}

    CpuState next(CpuMode mode) {
        mode_ = mode;
        lma_ = mode == CpuMode::kCompat || mode == CpuMode::kLong;
        CpuState s;
        for (u64& r : s.gpr) r = random_.next();
        control(s);
        cpl_ = mode == CpuMode::kReal ? 0 : mode == CpuMode::kVm86 ? 3 : random_.below(4);
        segments(s);
        flags(s);
        debug(s);
        msrs(s.msr);
        fpu(s.fpu);
        activity(s);
        return s;
    }

  private:
    bool coin() { return random_.one_in(2); }
    bool has(Feature feature) const { return limits_.policy.features.has(feature); }
    u64 any(u64 mask) { return random_.next() & mask; }
    u64 canonical() { return static_cast<u64>(sign_extend(random_.next(), la57_ ? 57 : 48)); }
    u64 linear() { return lma_ ? canonical() : any(0xffffffff); }
    u64 physical() { return any(bit(limits_.policy.physical_bits) - 1); }
    u64 memory_type() { return random_.pick<u64>({0, 1, 4, 5, 6}); }

    void control(CpuState& s) {
        const bool pe = mode_ != CpuMode::kReal;
        const bool pg = lma_ || (pe && coin());
        s.cr0 = bit(4) | any(bit(1) | bit(2) | bit(3) | bit(5) | bit(16) | bit(18) | bit(30));
        if (s.cr0 & bit(30)) s.cr0 |= any(bit(29));
        s.cr0 |= (pe ? 1 : 0) | (pg ? bit(31) : 0);

        s.cr4 = any(0x7df);  // VME to OSXMMEXCPT but PAE
        if (lma_ || coin()) s.cr4 |= bit(5);
        auto optional = [&](Feature feature, unsigned n) {
            if (has(feature) && coin()) s.cr4 |= bit(n);
        };
        optional(Feature::kUmip, 11);
        optional(Feature::kFsgsbase, 16);
        optional(Feature::kXsave, 18);
        optional(Feature::kSmep, 20);
        optional(Feature::kSmap, 21);
        if (lma_) optional(Feature::kPcid, 17);
        if (lma_) optional(Feature::kLa57, 12);
        la57_ = s.cr4 & bit(12);

        s.msr.efer = 0;
        if (has(Feature::kSyscall)) s.msr.efer |= any(1);
        if (has(Feature::kNx)) s.msr.efer |= any(bit(11));
        if (has(Feature::kAutoIbrs)) s.msr.efer |= any(bit(21));
        if (lma_) s.msr.efer |= bit(8) | bit(10);
        if (!pg && has(Feature::kLongMode)) s.msr.efer |= any(bit(8));

        s.cr2 = random_.next();
        const u64 low = s.cr4 & bit(17) ? 0xfff : 0x18;
        s.cr3 = lma_ ? (physical() & ~u64{0xfff}) | any(low) : any(0xffffffe0) | any(0x18);
        s.xcr0 = 1;
        if (has(Feature::kXsave) && coin()) s.xcr0 = has(Feature::kAvx) && coin() ? 7 : 3;
    }

    Segment usable(u32 type, u32 dpl, bool system = false) {
        Segment s;
        s.selector = static_cast<u16>(any(0xffff));
        s.base = any(0xffffffff);
        s.attributes = type | (system ? 0 : bit(4)) | dpl << 5 | static_cast<u32>(bit(7));
        s.attributes |= static_cast<u32>(any(bit(12)));
        set_limit(s);
        return s;
    }
    void set_limit(Segment& s) {
        s.limit = static_cast<u32>(any(0xffffffff)) | 0xfff;
        if (coin()) s.limit &= 0xfffff;
        if (s.limit > 0xfffff) s.attributes |= static_cast<u32>(bit(15));
    }
    Segment null(u32 dpl = 0) {
        return {0, 0, static_cast<u32>(bit(16)) | dpl << 5, static_cast<u16>(any(3))};
    }

    void segments(CpuState& s) {
        s.gdtr = {linear(), static_cast<u16>(any(0xffff))};
        s.idtr = {linear(), static_cast<u16>(any(0xffff))};
        s.tr = usable(lma_ || coin() ? 0xb : 3, random_.below(4), true);
        s.tr.base = linear();
        s.ldtr = coin() ? null() : usable(2, random_.below(4), true);
        if (!s.ldtr.unusable()) s.ldtr.base = linear();
        if (mode_ == CpuMode::kReal || mode_ == CpuMode::kVm86) {
            for (Segment& segment : s.segments) {
                u16 selector = static_cast<u16>(any(0xffff));
                segment = {u64{selector} << 4, 0xffff, mode_ == CpuMode::kReal ? 0x93u : 0xf3u,
                           selector};
                if (mode_ == CpuMode::kReal && random_.one_in(4)) {  // "unreal" mode
                    segment.limit = 0xffffffff;
                    segment.attributes |= 0x8000;
                }
            }
            return;
        }
        for (SegmentIndex n : {kEs, kDs, kFs, kGs}) {
            Segment& segment = s.segments[n];
            segment = random_.one_in(3)
                          ? null()
                          : usable(random_.pick<u32>({1, 3, 5, 7, 0xb, 0xf}), random_.below(4));
            if (!segment.unusable()) segment.attributes |= static_cast<u32>(any(bit(14)));
            if (lma_ && (n == kFs || n == kGs)) segment.base = canonical();
        }
        const bool conforming = coin();
        Segment& cs = s.segments[kCs];
        cs = usable(random_.pick<u32>({9, 0xb}) | (conforming ? 4 : 0),
                    conforming ? random_.below(cpl_ + 1) : cpl_);
        cs.selector = static_cast<u16>((cs.selector & ~3u) | cpl_);
        const bool wide = mode_ == CpuMode::kLong;
        cs.attributes |= static_cast<u32>(wide ? bit(13) : any(bit(14)));
        Segment& ss = s.segments[kSs];
        ss = wide && cpl_ != 3 && random_.one_in(3) ? null(cpl_)
                                                    : usable(random_.pick<u32>({3, 7}), cpl_);
        if (!ss.unusable()) ss.attributes |= static_cast<u32>(any(bit(14)));
    }

    void flags(CpuState& s) {
        s.rflags = any(0x3d7fd7) | 2 | (mode_ == CpuMode::kVm86 ? bit(17) : 0);
        const bool narrow = mode_ == CpuMode::kReal || mode_ == CpuMode::kVm86;
        s.rip = mode_ == CpuMode::kLong ? canonical() : any(narrow ? 0xffff : 0xffffffff);
    }

    void debug(CpuState& s) {
        for (u64& address : s.dr) address = canonical();
        s.dr6 = 0xffff0ff0 | any(0xe00f);
        s.dr7 = 0x400 | any(0xffff23ff);
    }

    void msrs(MsrState& m) {
        m.star = random_.next();
        m.lstar = canonical();
        m.cstar = canonical();
        m.sfmask = any(0xffffffff);
        m.kernel_gs_base = canonical();
        m.sysenter_cs = any(0xffffffff);
        // SVM keeps their low halves, as SYSENTER does not work in AMD's IA-32e mode.
        m.sysenter_esp = limits_.policy.intel ? canonical() : any(0xffffffff);
        m.sysenter_eip = limits_.policy.intel ? canonical() : any(0xffffffff);
        m.pat = 0;
        for (unsigned n = 0; n < 64; n += 8) m.pat |= random_.pick<u64>({0, 1, 4, 5, 6, 7}) << n;
        m.tsc_offset = random_.next();
        m.tsc_adjust = has(Feature::kTscAdjust) ? random_.next() : 0;
        m.tsc_aux = has(Feature::kRdtscp) || has(Feature::kRdpid) ? any(0xffffffff) : 0;
        m.misc_enable = 1 | any(bit(11) | bit(12));
        if (has(Feature::kMtrr)) {
            m.mtrr_def_type = any(0xc00) | memory_type();
            for (u64& ranges : m.mtrr_fixed) {
                for (unsigned n = 0; n < 64; n += 8) ranges |= memory_type() << n;
            }
            for (std::size_t n = 0; n < m.mtrr_variable.size(); n += 2) {
                m.mtrr_variable[n] = (physical() & ~u64{0xfff}) | memory_type();
                m.mtrr_variable[n + 1] = (physical() & ~u64{0xfff}) | any(0x800);
            }
        }
        if (has(Feature::kKvmClock)) {
            m.kvm_wall_clock = coin() ? random_.next() % limits_.ram & ~u64{0xfff} : 0;
            m.kvm_system_time = coin() ? (random_.next() % limits_.ram & ~u64{0xfff}) | 1 : 0;
        }
    }

    template <class T>
    void put(FpuState& fpu, unsigned offset, T value) {
        std::memcpy(fpu.legacy.data() + offset, &value, sizeof value);
    }
    void fpu(FpuState& f) {
        put(f, 0, static_cast<u16>(any(0x1f3f) | 0x40));  // FCW
        put(f, 2, static_cast<u16>(any(0xffff)));         // FSW
        put(f, 4, static_cast<u8>(any(0xff)));            // abridged FTW
        put(f, 6, static_cast<u16>(any(0x7ff)));          // FOP
        put(f, 8, random_.next());                        // FIP
        put(f, 16, random_.next());                       // FDP
        put(f, 24, static_cast<u32>(any(0xffff)));        // MXCSR
        put(f, 28, u32{0xffff});                          // its mask
        for (unsigned n = 0; n < 8; ++n) {
            put(f, 32 + 16 * n, random_.next());
            put(f, 40 + 16 * n, static_cast<u16>(any(0xffff)));
        }
        for (unsigned n = 0; n < 32; ++n) put(f, 160 + 8 * n, random_.next());
        if (!has(Feature::kAvx)) return;
        for (auto& high : f.ymm_high) {
            for (u8& byte : high) byte = static_cast<u8>(any(0xff));
        }
    }

    void activity(CpuState& s) {
        s.activity = random_.pick({Activity::kRunning, Activity::kRunning, Activity::kHalted,
                                   Activity::kWaitForSipi, Activity::kShutdown});
        if (!limits_.events) return;
        s.interrupt_shadow = random_.one_in(4);
        s.nmi_blocked = coin();
        s.nmi_pending = random_.one_in(3);
        using Kind = InFlightEvent::Kind;
        InFlightEvent& event = s.event;
        event.kind = random_.pick({Kind::kNone, Kind::kInterrupt, Kind::kNmi, Kind::kException});
        if (event.kind == Kind::kInterrupt) event.vector = static_cast<u8>(any(0xff));
        if (event.kind == Kind::kNmi) event.vector = 2;
        if (event.kind != Kind::kException) return;
        // #BP and #OF would be software exceptions.
        event.vector = random_.pick<u8>({0, 1, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19});
        const bool pushes =
            event.vector == 8 || event.vector == 17 || (event.vector >= 10 && event.vector <= 14);
        event.has_error_code = pushes && mode_ != CpuMode::kReal;
        if (event.has_error_code) event.error_code = static_cast<u32>(any(0xffff));
    }

    Limits limits_;
    Random random_;
    CpuMode mode_ = CpuMode::kReal;
    bool lma_ = false, la57_ = false;
    u32 cpl_ = 0;
};

}  // namespace pvtest
