// What the native oracle cannot see of SIMD: faults in the middle of masked accesses, unmasked SIMD
// exceptions, and the images that FXSAVE and the XSAVE family leave and take.
#include <cstring>

#include "check.hpp"
#include "long_guest.hpp"

using namespace polyvisor;
using soft::VcpuFrame;

namespace {

constexpr u64 kEnd = 16 << 20;  // of memory; the next page is not mapped
constexpr u64 kIdt = 0x6000, kGdt = 0x7000, kHandlers = 0x180000;
constexpr u64 kNoFault = ~u64{0};

/// A LongGuest with AVX enabled, in which every exception puts its vector into R15 and halts.
struct SimdGuest : LongGuest {
    explicit SimdGuest(std::string_view code, u64 xcr0 = 7) : LongGuest(code) {
        for (u64 n = 0; n < 32; ++n) {
            u64 at = kHandlers + 16 * n;
            const u8 handler[] = {0x41, 0xbf, static_cast<u8>(n), 0, 0,
                                  0,    0xf4};  // mov r15d, n; hlt
            memory.write(Gpa(at), handler);
            memory.store<u64>(Gpa(kIdt + 16 * n), (at & 0xffff) | 8 << 16 | u64{0x8e00} << 32 |
                                                      (at >> 16 & 0xffff) << 48);
            memory.store<u64>(Gpa(kIdt + 16 * n + 8), at >> 32);
        }
        memory.store<u64>(Gpa(kGdt + 8), 0x00af9b000000ffff);
        CpuState state = vcpu->save();
        state.idtr = {kIdt, 32 * 16 - 1};
        state.gdtr = {kGdt, 15};
        state.cr4 |= bit(18);
        state.xcr0 = xcr0;
        state.gpr[15] = kNoFault;
        state.gpr[kRdi] = kData;
        vcpu->restore(state);
    }
    VcpuFrame& frame() { return soft().frame; }
    /// The vector of the exception that ended it, or kNoFault.
    u64 vector() {
        Exit exit = run(1000);
        CHECK(exit.reason == ExitReason::kHalt);
        return frame().gpr[15];
    }
    template <class T>
    T at(u64 gpa) {
        T value;
        memory.read(Gpa(gpa), {reinterpret_cast<u8*>(&value), sizeof value});
        return value;
    }
    u32& lane(unsigned reg, unsigned n) { return reinterpret_cast<u32*>(frame().ymm[reg])[n]; }
    void fill(unsigned reg, u32 value) {
        for (unsigned n = 0; n < 8; ++n) lane(reg, n) = value;
    }
};

}  // namespace

// --- Masked accesses ----------------------------------------------------------------------------

PV_GUEST(gather, "vpgatherdd %xmm2, (%rdi, %xmm1, 4), %xmm0\n hlt")
PV_GUEST(gather256, "vgatherqpd %ymm2, 8(%rdi, %ymm1, 8), %ymm0\n hlt")
PV_GUEST(masked_load, "vmaskmovps (%rdi), %ymm2, %ymm0\n hlt")
PV_GUEST(masked_store, "vpmaskmovq %ymm0, %ymm2, (%rdi)\n hlt")
PV_GUEST(masked_bytes, "maskmovdqu %xmm2, %xmm0\n hlt")

static void test_gather() {
    SimdGuest g(gather());
    for (u64 n = 0; n < 16; ++n) g.memory.store<u32>(Gpa(g.kData + 4 * n), 0x100 + n);
    g.fill(0, 0x11111111);
    g.fill(2, 0x80000001);  // only the sign counts
    u32 beyond = (kEnd - g.kData) / 4;
    const u32 indices[] = {3, 5, beyond, 7};
    for (unsigned n = 0; n < 4; ++n) g.lane(1, n) = indices[n];
    g.lane(2, 1) = 0;
    CHECK_EQ(g.vector(), u64{soft::kPf});
    CHECK_EQ(g.frame().cr2, kEnd);
    // Element 0 is done, 1 was not asked for, 2 faulted, 3 was not reached.
    CHECK_EQ(g.lane(0, 0), 0x103u);
    CHECK_EQ(g.lane(0, 1), 0x11111111u);
    CHECK_EQ(g.lane(0, 2), 0x11111111u);
    CHECK_EQ(g.lane(2, 0), 0u);
    CHECK_EQ(g.lane(2, 1), 0u);
    CHECK_EQ(g.lane(2, 2), ~0u);
    CHECK_EQ(g.lane(2, 3), ~0u);

    // The handler would map the page and return; here the index is mended instead.
    g.lane(1, 2) = 9;
    CpuState state = g.vcpu->save();
    state.rip = g.kCode;
    state.gpr[15] = kNoFault;
    state.activity = Activity::kRunning;
    g.vcpu->restore(state);
    CHECK_EQ(g.vector(), kNoFault);
    const u32 want[] = {0x103, 0x11111111, 0x109, 0x107, 0, 0, 0, 0};
    for (unsigned n = 0; n < 8; ++n) CHECK_EQ(g.lane(0, n), want[n]);
    for (unsigned n = 0; n < 8; ++n) CHECK_EQ(g.lane(2, n), 0u);

    SimdGuest d(gather256());
    for (u64 n = 0; n < 16; ++n) d.memory.store<u64>(Gpa(d.kData + 8 * n), 0x1000 + n);
    d.fill(2, ~0u);
    const s64 wide[] = {2, -1, 0, 4};
    std::memcpy(d.frame().ymm[1], wide, sizeof wide);
    CHECK_EQ(d.vector(), kNoFault);
    for (unsigned n = 0; n < 4; ++n) {
        CHECK_EQ(d.lane(0, 2 * n), static_cast<u32>(0x1000 + wide[n] + 1));
    }
}

static void test_masked_moves() {
    for (unsigned enabled : {3, 4}) {  // of the lanes, the last ones not mapped
        SimdGuest g(masked_load());
        g.frame().gpr[kRdi] = kEnd - 16;
        for (u64 n = 0; n < 4; ++n) g.memory.store<u32>(Gpa(kEnd - 16 + 4 * n), 0x200 + n);
        g.fill(0, 7);
        g.fill(2, 0);
        for (unsigned n = 0; n <= enabled; ++n) g.lane(2, n) = 1u << 31;
        CHECK_EQ(g.vector(), enabled == 3 ? kNoFault : u64{soft::kPf});
        for (unsigned n = 0; n < 8; ++n) {
            CHECK_EQ(g.lane(0, n), enabled == 4 ? 7u : n < 4 ? 0x200u + n : 0u);
        }
    }
    for (unsigned enabled : {1, 2}) {  // quadwords
        SimdGuest g(masked_store());
        g.frame().gpr[kRdi] = kEnd - 16;
        g.memory.store<u64>(Gpa(kEnd - 16), 1);
        g.memory.store<u64>(Gpa(kEnd - 8), 2);
        g.fill(0, 0x55555555);
        g.fill(2, 0);
        for (unsigned n = 1; n <= enabled; ++n) g.lane(2, 2 * n + 1) = 1u << 31;
        CHECK_EQ(g.vector(), enabled == 1 ? kNoFault : u64{soft::kPf});
        CHECK_EQ(g.at<u64>(kEnd - 16), u64{1});
        CHECK_EQ(g.at<u64>(kEnd - 8), enabled == 1 ? 0x5555555555555555 : u64{2});
    }
    for (unsigned enabled : {8, 9}) {
        SimdGuest g(masked_bytes());
        g.frame().gpr[kRdi] = kEnd - 8;
        g.memory.store<u64>(Gpa(kEnd - 8), 0);
        g.fill(0, 0x66666666);
        g.fill(2, 0);
        std::memset(g.frame().ymm[2] + 1, 0x80, enabled - 1);
        CHECK_EQ(g.vector(), enabled == 8 ? kNoFault : u64{soft::kPf});
        CHECK_EQ(g.at<u64>(kEnd - 8), enabled == 8 ? 0x6666666666666600 : u64{0});
    }
}

// --- Unmasked exceptions ------------------------------------------------------------------------

PV_GUEST(divide, "ldmxcsr (%rdi)\n divps %xmm1, %xmm0\n hlt")
PV_GUEST(compare, "ldmxcsr (%rdi)\n comiss %xmm1, %xmm0\n hlt")
PV_GUEST(to_integer, "ldmxcsr (%rdi)\n cvtss2si %xmm0, %rax\n hlt")
PV_GUEST(to_halves, "ldmxcsr (%rdi)\n vcvtps2ph $0, %xmm0, 64(%rdi)\n hlt")
PV_GUEST(to_mmx, "ldmxcsr (%rdi)\n cvtps2pi %xmm0, %mm3\n hlt")
PV_GUEST(mask_again, R"(
    ldmxcsr (%rdi)
    divss %xmm1, %xmm0
    stmxcsr 4(%rdi)
    hlt
)")

constexpr u32 kMasked = 0x1f80, kIe = 1, kZe = 4, kPe = 32;
constexpr u32 unmask(u32 flag) {
    return kMasked & ~(flag << 7);
}
constexpr u32 kOne = 0x3f800000, kThree = 0x40400000, kNan = 0x7fc00000;

static void test_unmasked() {
    struct {
        u32 mxcsr;
        u64 cr4_off;
        u64 vector;
    } cases[] = {{unmask(kZe), 0, soft::kXm},
                 {unmask(kZe), 1 << 10, soft::kUd},
                 {unmask(kIe), 0, kNoFault},
                 {kMasked, 0, kNoFault}};
    for (auto& c : cases) {
        SimdGuest g(divide());
        CpuState state = g.vcpu->save();
        state.cr4 &= ~c.cr4_off;
        g.vcpu->restore(state);
        g.memory.store<u32>(Gpa(g.kData), c.mxcsr);
        g.fill(0, kOne);
        g.fill(1, kThree);
        g.lane(1, 2) = 0;
        CHECK_EQ(g.vector(), c.vector);
        bool raised = c.vector != kNoFault;
        CHECK_EQ(g.lane(0, 2), raised ? kOne : 0x7f800000u);
        CHECK_EQ(g.lane(0, 0), raised ? kOne : 0x3eaaaaabu);
        // Division by zero comes before the computation: inexact results of the other lanes are not
        // reported with it.
        CHECK_EQ(g.frame().mxcsr, c.mxcsr | (raised ? kZe : kZe | kPe));
    }

    SimdGuest c(compare());
    c.memory.store<u32>(Gpa(c.kData), unmask(kIe));
    c.fill(0, kNan);
    c.frame().set_status(soft::kFlagO | soft::kFlagS);
    CHECK_EQ(c.vector(), u64{soft::kXm});
    CHECK_EQ(c.frame().rflags() & soft::kFlagStatus, u64{soft::kFlagO | soft::kFlagS});

    SimdGuest i(to_integer());
    i.memory.store<u32>(Gpa(i.kData), unmask(kPe));
    i.fill(0, 0x3fc00000);  // 1.5
    i.frame().gpr[kRax] = 77;
    CHECK_EQ(i.vector(), u64{soft::kXm});
    CHECK_EQ(i.frame().gpr[kRax], u64{77});
    CHECK_EQ(i.frame().mxcsr, unmask(kPe) | kPe);

    for (u32 flag : {kPe, kIe}) {
        SimdGuest h(to_halves());
        h.memory.store<u32>(Gpa(h.kData), unmask(flag));
        h.memory.store<u64>(Gpa(h.kData + 64), 5);
        h.fill(0, 0x3eaaaaab);  // 1/3
        CHECK_EQ(h.vector(), flag == kPe ? u64{soft::kXm} : kNoFault);
        CHECK_EQ(h.at<u64>(h.kData + 64), flag == kPe ? u64{5} : 0x3555355535553555);
    }

    SimdGuest m(to_mmx());
    m.memory.store<u32>(Gpa(m.kData), unmask(kIe));
    m.fill(0, kNan);
    m.frame().x87.status = 5 << 11;
    m.frame().x87.tags = 0x11;
    CHECK_EQ(m.vector(), u64{soft::kXm});
    CHECK_EQ(m.frame().x87.status, u16{5 << 11});
    CHECK_EQ(m.frame().x87.tags, u8{0x11});

    // Flags that were there before stay, and raise nothing by themselves.
    SimdGuest s(mask_again());
    s.memory.store<u32>(Gpa(s.kData), unmask(kIe) | kZe);
    s.fill(0, kOne);
    s.fill(1, kThree);
    CHECK_EQ(s.vector(), kNoFault);
    CHECK_EQ(s.at<u32>(s.kData + 4), unmask(kIe) | kZe | kPe);
}

PV_GUEST(load_mxcsr, "ldmxcsr (%rdi)\n hlt")

static void test_mxcsr_reserved() {
    SimdGuest g(load_mxcsr());
    g.memory.store<u32>(Gpa(g.kData), 0x11f80);
    CHECK_EQ(g.vector(), u64{soft::kGp});
    CHECK_EQ(g.frame().mxcsr, kMasked);
}

// --- State images -------------------------------------------------------------------------------

PV_GUEST(fxsave64, "fxsave64 (%rdi)\n hlt")
PV_GUEST(fxsave32, "fxsave (%rdi)\n hlt")
PV_GUEST(fxrstor64, "fxrstor64 (%rdi)\n hlt")
PV_GUEST(xsave_all, "mov $-1, %eax\n mov $-1, %edx\n xsave64 (%rdi)\n hlt")
PV_GUEST(xsaveopt_all, "mov $-1, %eax\n mov $-1, %edx\n xsaveopt64 (%rdi)\n hlt")
PV_GUEST(xsavec_all, "mov $-1, %eax\n mov $-1, %edx\n xsavec64 (%rdi)\n hlt")
PV_GUEST(xsave_avx, "mov $4, %eax\n xor %edx, %edx\n xsave64 (%rdi)\n hlt")
PV_GUEST(xrstor_all, "mov $-1, %eax\n mov $-1, %edx\n xrstor64 (%rdi)\n hlt")
PV_GUEST(xrstor_avx, "mov $4, %eax\n xor %edx, %edx\n xrstor64 (%rdi)\n hlt")
PV_GUEST(xrstors_all, "mov $-1, %eax\n mov $-1, %edx\n xrstors64 (%rdi)\n hlt")
PV_GUEST(xsaves_all, "mov $-1, %eax\n mov $-1, %edx\n xsaves64 (%rdi)\n hlt")
PV_GUEST(xgetbv1, "mov $1, %ecx\n xgetbv\n hlt")

static void distinct_state(SimdGuest& g) {
    VcpuFrame& f = g.frame();
    f.x87 = {};
    f.x87.control = 0x27f;
    f.x87.status = 3 << 11 | 0x4100;
    f.x87.tags = 0x18;  // physical 3 and 4: ST(0) and ST(1)
    f.x87.opcode = 0x123;
    f.x87.ip = 0x1122334455667788;
    f.x87.dp = 0x99aabbccddeeff00;
    for (unsigned n = 0; n < 8; ++n) std::memset(f.x87.reg[n], 0x30 + n, 10);
    for (unsigned n = 0; n < 16; ++n) {
        std::memset(f.ymm[n], 0x40 + n, 16);
        std::memset(f.ymm[n] + 16, 0x80 + n, 16);
    }
}

static void test_fxsave() {
    SimdGuest g(fxsave64());
    distinct_state(g);
    for (u64 n = 0; n < 512; n += 8) g.memory.store<u64>(Gpa(g.kData + n), ~u64{0});
    CHECK_EQ(g.vector(), kNoFault);
    CHECK_EQ(g.at<u16>(g.kData), u16{0x27f});
    CHECK_EQ(g.at<u16>(g.kData + 2), u16{3 << 11 | 0x4100});
    CHECK_EQ(g.at<u16>(g.kData + 4), u16{0x18});
    CHECK_EQ(g.at<u16>(g.kData + 6), u16{0x123});
    CHECK_EQ(g.at<u64>(g.kData + 8), u64{0x1122334455667788});
    CHECK_EQ(g.at<u64>(g.kData + 16), u64{0x99aabbccddeeff00});
    CHECK_EQ(g.at<u32>(g.kData + 24), kMasked);
    CHECK_EQ(g.at<u32>(g.kData + 28), 0xffffu);
    CHECK_EQ(g.at<u64>(g.kData + 32), 0x3333333333333333u);  // ST(0) is physical 3
    CHECK_EQ(g.at<u64>(g.kData + 40), u64{0x3333});
    CHECK_EQ(g.at<u64>(g.kData + 160 + 15 * 16), 0x4f4f4f4f4f4f4f4fu);
    CHECK_EQ(g.at<u64>(g.kData + 416), ~u64{0});  // not the CPU's

    SimdGuest h(fxsave32());
    distinct_state(h);
    CHECK_EQ(h.vector(), kNoFault);
    CHECK_EQ(h.at<u64>(h.kData + 8), u64{0x55667788});

    SimdGuest r(fxrstor64());
    u8 image[512];
    g.memory.read(Gpa(g.kData), image);
    r.memory.write(Gpa(r.kData), image);
    r.memory.store<u32>(Gpa(r.kData + 24), unmask(kZe) | kPe);
    r.fill(5, 0x77777777);
    CHECK_EQ(r.vector(), kNoFault);
    CHECK_EQ(std::memcmp(r.frame().x87.reg[2], g.frame().x87.reg[2], 10), 0);
    CHECK_EQ(r.frame().x87.tags, u8{0x18});
    CHECK_EQ(r.lane(5, 0), 0x45454545u);
    CHECK_EQ(r.lane(5, 4), 0x77777777u);
    CHECK_EQ(r.frame().mxcsr, unmask(kZe) | kPe);
    CHECK(r.frame().mode & soft::kModeFpException);

    for (u64 offset : {8, 0}) {  // unaligned; reserved bits of MXCSR
        SimdGuest bad(fxrstor64());
        bad.frame().gpr[kRdi] += offset;
        bad.memory.store<u32>(Gpa(bad.kData + 24), 1 << 16);
        CHECK_EQ(bad.vector(), u64{soft::kGp});
    }
}

static void test_xsave() {
    for (auto code : {xsave_all(), xsaveopt_all()}) {
        SimdGuest g(code);
        distinct_state(g);
        for (unsigned n = 0; n < 16; ++n)
            std::memset(g.frame().ymm[n] + 16, 0, 16);  // AVX: initial
        for (u64 n = 0; n < 832; n += 8) g.memory.store<u64>(Gpa(g.kData + n), 0x1234567800000000);
        CHECK_EQ(g.vector(), kNoFault);
        CHECK_EQ(g.at<u64>(g.kData + 512), 0x1234567800000003u);
        CHECK_EQ(g.at<u64>(g.kData + 520), 0x1234567800000000u);  // XSAVE leaves it
        CHECK_EQ(g.at<u64>(g.kData + 160), 0x4040404040404040u);
        bool optimised = code == xsaveopt_all();
        CHECK_EQ(g.at<u64>(g.kData + 576), optimised ? 0x1234567800000000 : u64{0});
    }
    // Only AVX asked for: the MXCSR goes with it, the rest is left alone.
    SimdGuest a(xsave_avx());
    distinct_state(a);
    CHECK_EQ(a.vector(), kNoFault);
    CHECK_EQ(a.at<u64>(a.kData + 512), u64{4});
    CHECK_EQ(a.at<u32>(a.kData + 24), kMasked);
    CHECK_EQ(a.at<u64>(a.kData + 160), u64{0});
    CHECK_EQ(a.at<u64>(a.kData + 576 + 16), 0x8181818181818181u);

    for (auto code : {xsavec_all(), xsaves_all()}) {
        SimdGuest c(code, 3);
        distinct_state(c);
        for (unsigned n = 0; n < 16; ++n) std::memset(c.frame().ymm[n], 0, 16);  // SSE: initial
        CHECK_EQ(c.vector(), kNoFault);
        CHECK_EQ(c.at<u64>(c.kData + 512), u64{1});
        CHECK_EQ(c.at<u64>(c.kData + 520), bit(63) | 3);
        CHECK_EQ(c.at<u16>(c.kData), u16{0x27f});
        CHECK_EQ(c.at<u32>(c.kData + 24), 0u);  // belongs to SSE in this format
    }

    SimdGuest x(xgetbv1());
    x.frame().x87 = {};
    x.frame().ymm[3][20] = 1;
    CHECK_EQ(x.vector(), kNoFault);
    CHECK_EQ(x.frame().gpr[kRax], u64{4});
}

static void test_xrstor() {
    struct {
        std::string_view code;
        u64 saved, compaction, reserved;
        u64 vector;
    } headers[] = {
        {xrstor_all(), 7, 0, 0, kNoFault},
        {xrstor_all(), 0, 0, 0, kNoFault},
        {xrstor_all(), 8, 0, 0, soft::kGp},  // not in XCR0
        {xrstor_all(), 0, 1, 0, soft::kGp},  // format bits without bit 63
        {xrstor_all(), 0, 0, 1, soft::kGp},
        {xrstor_all(), 5, bit(63) | 7, 0, kNoFault},
        {xrstor_all(), 6, bit(63) | 5, 0, soft::kGp},   // saved but not in the format
        {xrstor_all(), 1, bit(63) | 15, 0, soft::kGp},  // format not in XCR0
        {xrstors_all(), 7, 0, 0, soft::kGp},            // must be compacted
        {xrstors_all(), 7, bit(63) | 7, 0, kNoFault},
        {xrstor_avx(), 4, 0, 0, kNoFault},
    };
    for (auto& h : headers) {
        SimdGuest source(xsave_all());
        distinct_state(source);
        CHECK_EQ(source.vector(), kNoFault);
        u8 image[832];
        source.memory.read(Gpa(source.kData), image);

        SimdGuest g(h.code);
        g.memory.write(Gpa(g.kData), image);
        g.memory.store<u64>(Gpa(g.kData + 512), h.saved);
        g.memory.store<u64>(Gpa(g.kData + 520), h.compaction);
        g.memory.store<u64>(Gpa(g.kData + 528), h.reserved);
        g.memory.store<u32>(Gpa(g.kData + 24), kMasked | kPe);
        g.fill(2, 0x22222222);
        g.frame().x87.control = 0x77f;
        CHECK_EQ(g.vector(), h.vector);
        bool done = h.vector == kNoFault;
        bool avx_only = h.code == xrstor_avx();
        bool x87 = h.saved & 1, sse = h.saved & 2, avx = h.saved & 4;
        CHECK_EQ(g.lane(2, 0), !done || avx_only ? 0x22222222u : sse ? 0x42424242u : 0u);
        CHECK_EQ(g.lane(2, 4), !done ? 0x22222222u : avx ? 0x82828282u : 0u);
        CHECK_EQ(g.frame().x87.control, static_cast<u16>(!done || avx_only ? 0x77f
                                                         : x87             ? 0x27f
                                                                           : 0x37f));
        bool loaded = done && (h.compaction == 0 || sse);  // else: initial, which it was
        CHECK_EQ(g.frame().mxcsr, loaded ? kMasked | kPe : kMasked);
    }
    SimdGuest off(xrstor_all());
    CpuState state = off.vcpu->save();
    state.cr4 &= ~bit(18);
    off.vcpu->restore(state);
    CHECK_EQ(off.vector(), u64{soft::kUd});
}

// --- MMX ----------------------------------------------------------------------------------------

PV_GUEST(mmx_read, "movq %mm2, (%rdi)\n hlt")
PV_GUEST(mmx_fault, "movq (%rdi), %mm2\n hlt")

static void test_mmx() {
    SimdGuest g(mmx_read());
    distinct_state(g);
    g.frame().x87.status = 3 << 11;
    CHECK_EQ(g.vector(), kNoFault);
    CHECK_EQ(g.at<u64>(g.kData), 0x3232323232323232u);  // physical register 2, whatever TOP was
    CHECK_EQ(g.frame().x87.tags, u8{0xff});
    CHECK_EQ(g.frame().x87.status, u16{0});

    SimdGuest f(mmx_fault());
    distinct_state(f);
    f.frame().x87.status = 3 << 11;
    f.frame().gpr[kRdi] = kEnd;
    CHECK_EQ(f.vector(), u64{soft::kPf});
    CHECK_EQ(f.frame().x87.tags, u8{0x18});
    CHECK_EQ(f.frame().x87.status, u16{3 << 11});
}

int main() {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) {
        std::fprintf(stderr, "test_simd: this CPU has no AVX2, only SSE and MMX are tested\n");
    } else {
        test_gather();
        test_masked_moves();
        test_unmasked();
    }
    test_mxcsr_reserved();
    test_fxsave();
    test_xsave();
    test_xrstor();
    test_mmx();
    return pvtest::finish("test_simd");
}
