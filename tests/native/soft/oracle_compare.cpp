#include "oracle_compare.hpp"

#include <cstdio>
#include <cstring>

#include "soft/frame.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::soft;

namespace {

const char* const kNames[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};

// Not ID and NT, which a tracer cannot set, nor those that user mode cannot change.
constexpr u64 kComparedFlags = kFlagStatus | kFlagD | kFlagAc;

/// Flags that the manuals leave undefined and that the interpreter does not take from the host. The
/// others that are undefined are compared: operations run on the host's own instructions.
struct UndefinedFlags {
    Op op;
    u64 flags;
    const char* reason;
};
constexpr UndefinedFlags kUndefinedFlags[] = {
    {Op::kCount, 0, ""},
};

/// Bytes of the memory operand that are not compared.
struct IgnoredBytes {
    Operand operand;
    u8 opsize;
    unsigned from, to;
    const char* reason;
};
constexpr IgnoredBytes kIgnoredBytes[] = {
    {Operand::M512, 0, 6, 24,
     "x87 instruction and data pointers: CPUs differ in when they keep them"},
    {Operand::M512, 0, 28, 32, "MXCSR_MASK: what the guest's CPU has, not the host's"},
    {Operand::M28, 2, 6, 14, "x87 instruction and data pointers"},
    {Operand::M28, 0, 12, 28, "x87 instruction and data pointers"},
    {Operand::M94, 2, 6, 14, "x87 instruction and data pointers"},
    {Operand::M94, 0, 12, 28, "x87 instruction and data pointers"},
};

std::string text(const char* format, auto... values) {
    char line[200];
    std::snprintf(line, sizeof line, format, values...);
    return line;
}

std::string hex(const u8* bytes, unsigned size) {
    std::string result;
    for (unsigned n = size; n-- > 0;) result += text("%02x", bytes[n]);
    return result;
}

constexpr u32 kMxcsrMm = 1 << 17;

bool random_result(Op op) {
    return op == Op::RDRAND_Rv || op == Op::RDSEED_Rv;
}

/// Rows whose memory operand CPUs access in parts of their choice: which of its pages faults is not
/// certain.
bool accessed_in_parts(const OpInfo& row) {
    Operand first = row.operands[0];
    return first == Operand::M80 || first == Operand::M28 || first == Operand::M94 ||
           first == Operand::M512;
}

/// Outcomes that may differ, not only in detail.
bool left_to_the_cpu(const Case& c, int ours, int host) {
    const OpInfo& row = op_info(c.op);
    std::string_view m = row.mnemonic;
    // Bytes that MASKMOVDQU and its kin leave out may be checked as if they were written (SDM 2).
    if (m.starts_with("maskmov") || m == "vmaskmovdqu") return ours < 0 && host == kPf;
    // Of two operands that both fault, either may come first.
    if (m.starts_with("cmps")) return ours >= 0 && host >= 0;
    // Segment limit, alignment and page are checked in an order of the CPU's choice (SDM 3A, table
    // 6-2).
    if ((row.attrs & (kAligned | kAlignedVex)) || accessed_in_parts(row)) {
        auto memory = [](int vector) { return vector >= kSsFault && vector <= kPf; };
        if (ours != host && memory(ours) && memory(host)) return true;
    }
    // A call to an address that is not canonical, with a stack that cannot be pushed to.
    if (c.op == Op::CALL_Ev)
        return ours == kGp && (host == kSsFault || host == kPf || host == kAcFault);
    return false;
}

void compare_bytes(std::vector<std::string>& list, const std::string& what, const u8* a,
                   const u8* b, unsigned size) {
    if (std::memcmp(a, b, size) != 0)
        list.push_back(what + ": " + hex(a, size) + ", host " + hex(b, size));
}

void compare_fpu(std::vector<std::string>& list, const UserState& a, const UserState& h) {
    compare_bytes(list, "fcw", a.legacy + kFcwAt, h.legacy + kFcwAt, 2);
    compare_bytes(list, "fsw", a.legacy + kFswAt, h.legacy + kFswAt, 2);
    compare_bytes(list, "ftw", a.legacy + kFtwAt, h.legacy + kFtwAt, 1);
    u32 ours, host;
    std::memcpy(&ours, a.legacy + kMxcsrAt, 4);
    std::memcpy(&host, h.legacy + kMxcsrAt, 4);
    // An unmasked overflow: whether the result is inexact as well depends on a rounding without
    // limits of the exponent, which the interpreter, with all exceptions masked, does not see.
    constexpr u32 kOverflow = 8, kInexact = 0x20;
    bool unmasked_overflow = (host & kOverflow) && !(host & kOverflow << 7);
    if ((ours ^ host) & (unmasked_overflow ? ~kInexact : ~0u))
        list.push_back(text("mxcsr: %04x, host %04x", ours, host));
    for (unsigned n = 0; n < 8; ++n) {
        compare_bytes(list, text("st%u", n), a.legacy + kStAt + n * 16, h.legacy + kStAt + n * 16,
                      10);
    }
    for (unsigned n = 0; n < 16; ++n) {
        compare_bytes(list, text("xmm%u", n), a.legacy + kXmmAt + n * 16,
                      h.legacy + kXmmAt + n * 16, 16);
        compare_bytes(list, text("ymm%u high", n), a.ymm_high[n], h.ymm_high[n], 16);
    }
}

void compare_memory(std::vector<std::string>& list, const Case& c, const Outcome& ours,
                    const Outcome& host) {
    const OpInfo& row = op_info(c.op);
    auto ignored = [&](u64 address) {
        for (const IgnoredBytes& ignore : kIgnoredBytes) {
            if (row.operands[0] != ignore.operand ||
                (ignore.opsize && ignore.opsize != c.insn.opsize))
                continue;
            u64 offset = address - c.memory_address;
            if (offset >= ignore.from && offset < ignore.to) return true;
        }
        return false;
    };
    unsigned shown = 0;
    for (unsigned n = 0; n < kDataSize && shown < 8; ++n) {
        if (ours.data[n] == host.data[n] || ignored(kDataBase + n)) continue;
        list.push_back(text("byte at %llx: %02x, host %02x",
                            static_cast<unsigned long long>(kDataBase + n), ours.data[n],
                            host.data[n]));
        ++shown;
    }
}

}  // namespace

std::vector<std::string> compare(const Case& c, const Outcome& ours, const Outcome& host) {
    std::vector<std::string> list;
    if (!ours.alive) list.push_back(std::string("interpreter: ") + ours.text);
    if (!host.alive) list.push_back(std::string("host: ") + host.text);
    if (!list.empty()) return list;

    const OpInfo& row = op_info(c.op);
    int vector = ours.vector == kBr || ours.vector == kOf ? kVectorGpLike : ours.vector;
    int host_vector = host.vector;
    if (vector == kXm) vector = kMf;  // both are SIGFPE
    if (host_vector == kXm) host_vector = kMf;
    if (left_to_the_cpu(c, vector, host_vector)) return list;
    // AMD's misaligned SSE mode is not offered to guests: to set it is #GP there.
    u32 host_mxcsr;
    std::memcpy(&host_mxcsr, host.after.legacy + kMxcsrAt, sizeof host_mxcsr);
    if (vector == kGp && host_vector < 0 && (host_mxcsr & kMxcsrMm)) return list;
    if (vector != host_vector)
        list.push_back(text("exception %d, host %d", ours.vector, host.vector));
    u64 address_mask = ~u64{0};
    if (accessed_in_parts(row)) address_mask = 0;
    // Which operand of CMPS comes first, and which byte of MASKMOVDQU, is not documented.
    if (row.mnemonic.starts_with("cmps") || row.mnemonic.find("maskmov") != std::string_view::npos)
        address_mask = 0;
    if (ours.has_address && host.has_address && ((ours.address ^ host.address) & address_mask)) {
        list.push_back(text("faulting address %llx, host %llx",
                            static_cast<unsigned long long>(ours.address),
                            static_cast<unsigned long long>(host.address)));
    }
    u64 wide = c.size == CodeSize::k64 ? ~u64{0} : 0xffffffff;
    unsigned registers = c.size == CodeSize::k64 ? 16 : 8;
    for (unsigned n = 0; n < registers; ++n) {
        u64 a = ours.after.gpr[n] & wide, h = host.after.gpr[n] & wide;
        if (a == h || (random_result(c.op) && n == c.insn.rm)) continue;
        list.push_back(text("%s: %016llx, host %016llx", kNames[n],
                            static_cast<unsigned long long>(a),
                            static_cast<unsigned long long>(h)));
    }
    if (ours.after.rip != host.after.rip) {
        list.push_back(text("rip: %llx, host %llx", static_cast<unsigned long long>(ours.after.rip),
                            static_cast<unsigned long long>(host.after.rip)));
    }
    u64 compared = kComparedFlags;
    for (const UndefinedFlags& undefined : kUndefinedFlags) {
        if (undefined.op == c.op) compared &= ~undefined.flags;
    }
    if ((row.attrs & kString) && host.vector >= 0) {
        compared &= ~kFlagStatus;  // repeated CMPS and SCAS that fault: AMD's keep the flags so
                                   // far, Intel's restore
    }
    if ((ours.after.rflags ^ host.after.rflags) & compared) {
        list.push_back(text("rflags: %llx, host %llx",
                            static_cast<unsigned long long>(ours.after.rflags & compared),
                            static_cast<unsigned long long>(host.after.rflags & compared)));
    }
    if (c.size == CodeSize::k64 &&
        (ours.after.fs_base != host.after.fs_base || ours.after.gs_base != host.after.gs_base)) {
        list.push_back("FS or GS base differs");
    }
    // AMD's CPUs enter MMX mode (TOP 0, all tags valid) before an MMX instruction faults, Intel's
    // after. Gathers that fault: which elements are done, and what is left of the mask, is the
    // CPU's choice.
    bool undefined_fpu =
        host.vector >= 0 && ((row.attrs & kMmx) || row.operands[1] == Operand::VMx);
    if (!undefined_fpu) compare_fpu(list, ours.after, host.after);
    compare_memory(list, c, ours, host);
    return list;
}

std::string describe(const Case& c) {
    std::string result;
    const UserState& s = c.before;
    for (unsigned n = 0; n < 16; ++n) {
        result += text("  %-3s %016llx%s", kNames[n], static_cast<unsigned long long>(s.gpr[n]),
                       n % 4 == 3 ? "\n" : "");
    }
    result +=
        text("  rflags %llx  fs %llx  gs %llx  rip %llx", static_cast<unsigned long long>(s.rflags),
             static_cast<unsigned long long>(s.fs_base), static_cast<unsigned long long>(s.gs_base),
             static_cast<unsigned long long>(s.rip));
    u64 offset = c.memory_address - kDataBase;
    if (c.insn.has_mem) {
        result += text("  memory at %llx", static_cast<unsigned long long>(c.memory_address));
        if (offset < kDataSize - 32) result += ": " + hex(c.data.data() + offset, 32);
    }
    const OpInfo& row = op_info(c.op);
    if (row.attrs & (kFpu | kMmx)) {
        result += text("\n  fcw %04x fsw %04x ftw %02x", read16(s.legacy + kFcwAt),
                       read16(s.legacy + kFswAt), s.legacy[kFtwAt]);
        for (unsigned n = 0; n < 8; ++n)
            result += text("\n  st%u  ", n) + hex(s.legacy + kStAt + n * 16, 10);
    }
    if (row.attrs & (kSse | kAvx | kMmx)) {
        u32 mxcsr;
        std::memcpy(&mxcsr, s.legacy + kMxcsrAt, 4);
        result += text("\n  mxcsr %04x", mxcsr);
        for (unsigned n :
             {c.insn.reg & 15u, c.insn.rm & 15u, c.insn.vvvv & 15u, c.insn.index & 15u}) {
            result += text("\n  ymm%u ", n) + hex(s.ymm_high[n], 16) + " " +
                      hex(s.legacy + kXmmAt + n * 16, 16);
        }
    }
    return result;
}

}  // namespace pvtest
