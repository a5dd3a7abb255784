// x87 control: control, status and tag words, the environment and the whole state in their four
// formats, FNINIT, FNCLEX, FWAIT, and what only touches TOP and tags.
#include <vector>

#include "soft/bindings.hpp"
#include "soft/operands.hpp"
#include "soft/x87.hpp"

namespace polyvisor::soft {
namespace x87 {
namespace {

void set_control(VcpuFrame& f, u16 value) {
    f.x87.control = static_cast<u16>((value & 0x1f7f) | 0x40);  // reserved bits read back so
    update_summary(f);
}

/// The two-bit tag of physical register n: 0 valid, 1 zero, 2 special, 3 empty (SDM 1, 8.1.7).
unsigned full_tag(const VcpuFrame& f, unsigned n) {
    if (!(f.x87.tags >> n & 1)) return 3;
    const auto& value = *reinterpret_cast<const Register*>(f.x87.reg[n]);
    unsigned exponent = value.exponent & 0x7fff;
    if (exponent == 0x7fff) return 2;
    if (exponent == 0) return value.significand == 0 ? 1 : 2;
    return value.significand >> 63 ? 0 : 2;
}
u16 full_tags(const VcpuFrame& f) {
    unsigned word = 0;
    for (unsigned n = 0; n < 8; ++n) word |= full_tag(f, n) << (2 * n);
    return static_cast<u16>(word);
}
/// Of a tag word only "empty or not" is kept; the rest follows from the values.
void set_full_tags(VcpuFrame& f, u16 word) {
    f.x87.tags = 0;
    for (unsigned n = 0; n < 8; ++n) {
        if ((word >> (2 * n) & 3) != 3) f.x87.tags |= static_cast<u8>(1 << n);
    }
}

/// 14 bytes with operand size 16, else 28 (SDM 1, figures 8-9 to 8-12).
u32 environment_size(const Insn& i) {
    return i.opsize == 2 ? 14 : 28;
}

void write_environment(const VcpuFrame& f, const Insn& i, u8* out) {
    const X87State& x = f.x87;
    bool linear = !f.protected_mode();  // real and virtual-8086 mode: 20- or 32-bit linear pointers
    auto ip = static_cast<u32>(x.ip), dp = static_cast<u32>(x.dp);
    if (i.opsize == 2) {
        u16 words[7] = {
            x.control, x.status, full_tags(f), static_cast<u16>(ip), x.cs, static_cast<u16>(dp),
            x.ds};
        if (linear) {
            words[4] = static_cast<u16>((ip >> 4 & 0xf000) | (x.opcode & 0x7ff));
            words[6] = static_cast<u16>(dp >> 4 & 0xf000);
        }
        std::memcpy(out, words, sizeof words);
        return;
    }
    u32 words[7] = {0xffff0000u | x.control,
                    0xffff0000u | x.status,
                    0xffff0000u | full_tags(f),
                    ip,
                    x.cs | (x.opcode & 0x7ffu) << 16,
                    dp,
                    0xffff0000u | x.ds};
    if (linear) {
        words[3] = 0xffff0000u | (ip & 0xffff);
        words[4] = (ip >> 16) << 12 | (x.opcode & 0x7ffu);
        words[5] = 0xffff0000u | (dp & 0xffff);
        words[6] = (dp >> 16) << 12;
    }
    std::memcpy(out, words, sizeof words);
}

void read_environment(VcpuFrame& f, const Insn& i, const u8* in) {
    X87State& x = f.x87;
    bool linear = !f.protected_mode();
    u16 control, tags;
    if (i.opsize == 2) {
        u16 words[7];
        std::memcpy(words, in, sizeof words);
        control = words[0];
        x.status = words[1];
        tags = words[2];
        x.ip = words[3] | (linear ? (words[4] & 0xf000u) << 4 : 0);
        x.dp = words[5] | (linear ? (words[6] & 0xf000u) << 4 : 0);
        if (linear) x.opcode = words[4] & 0x7ff;
    } else {
        u32 words[7];
        std::memcpy(words, in, sizeof words);
        control = static_cast<u16>(words[0]);
        x.status = static_cast<u16>(words[1]);
        tags = static_cast<u16>(words[2]);
        x.ip = linear ? (words[3] & 0xffff) | (words[4] & 0x0ffff000) << 4 : words[3];
        x.dp = linear ? (words[5] & 0xffff) | (words[6] & 0x0ffff000) << 4 : words[5];
        x.opcode = static_cast<u16>((linear ? words[4] : words[4] >> 16) & 0x7ff);
    }
    x.cs = x.ds = 0;
    set_full_tags(f, tags);
    set_control(f, control);
}

void initialize(VcpuFrame& f) {
    X87State& x = f.x87;
    x.control = kDefaultControl;
    x.status = 0;
    x.tags = 0;
    x.opcode = 0;
    x.ip = x.dp = 0;
    x.cs = x.ds = 0;
}

/// The first, then the last byte of an image are touched before the rest: this decides which fault,
/// and which CR2, there is when it crosses pages or the segment's limit.
bool touch(VcpuFrame& f, const Insn& i, u64 ea, u32 size, bool write) {
    if (!aligned(f, i, ea, size, i.opsize == 2 ? 2 : 4, write)) return false;
    u64 last = (ea + size - 1) & address_mask(i);
    for (u64 address : {ea, last}) {
        u8 byte;
        if (address < ea) break;  // wraps: the limit says no below
        if (write ? !probe(f, i, address, 1) : !load(f, i, address, byte)) return false;
    }
    return true;
}
bool load_image(VcpuFrame& f, const Insn& i, u64 ea, u8* image, u32 size) {
    return touch(f, i, ea, size, false) && load_bytes(f, i, ea, image, size);
}
bool store_image(VcpuFrame& f, const Insn& i, u64 ea, const u8* image, u32 size) {
    return touch(f, i, ea, size, true) && store_bytes(f, i, ea, image, size);
}

bool fldcw(VcpuFrame& f, const Insn& i, u64 ea) {
    u16 value;
    if (!load(f, i, ea, value)) return false;
    set_control(f, value);
    return true;
}
bool fnstcw(VcpuFrame& f, const Insn& i, u64 ea) {
    return store(f, i, ea, f.x87.control);
}
bool fnstsw(VcpuFrame& f, const Insn& i, u64 ea) {
    return store(f, i, ea, f.x87.status);
}
bool fnstsw_ax(VcpuFrame& f, const Insn&, u64) {
    write_reg(f, kRax, 2, f.x87.status);
    return true;
}

bool fldenv(VcpuFrame& f, const Insn& i, u64 ea) {
    u8 image[28];
    if (!load_image(f, i, ea, image, environment_size(i))) return false;
    read_environment(f, i, image);
    return true;
}
/// Masks all exceptions afterwards.
bool fnstenv(VcpuFrame& f, const Insn& i, u64 ea) {
    u8 image[28];
    write_environment(f, i, image);
    if (!store_image(f, i, ea, image, environment_size(i))) return false;
    f.x87.control |= kExceptions;
    update_summary(f);
    return true;
}
/// The environment, then ST(0) to ST(7) by ten bytes each.
bool fnsave(VcpuFrame& f, const Insn& i, u64 ea) {
    u8 image[108];
    write_environment(f, i, image);
    u32 at = environment_size(i);
    for (unsigned n = 0; n < 8; ++n, at += 10) std::memcpy(image + at, &st(f, n), 10);
    if (!store_image(f, i, ea, image, at)) return false;
    initialize(f);
    return true;
}
bool frstor(VcpuFrame& f, const Insn& i, u64 ea) {
    u8 image[108];
    u32 at = environment_size(i);
    if (!load_image(f, i, ea, image, at + 80)) return false;
    read_environment(f, i, image);
    for (unsigned n = 0; n < 8; ++n, at += 10) std::memcpy(&st(f, n), image + at, 10);
    return true;
}

bool fninit(VcpuFrame& f, const Insn&, u64) {
    initialize(f);
    return true;
}
bool fnclex(VcpuFrame& f, const Insn&, u64) {
    f.x87.status &= static_cast<u16>(~(kExceptions | kStackFault | kSummary | kBusy));
    return true;
}
/// WAIT/FWAIT: #NM only with CR0.MP and TS (SDM 3A, table 2-2).
bool fwait(VcpuFrame& f, const Insn&, u64) {
    constexpr u64 kMpAndTs = bit(1) | bit(3);
    if ((f.cr0 & kMpAndTs) == kMpAndTs) return raise(f, kNm);
    return f.x87.status & kSummary ? raise(f, kMf) : true;
}
bool fnop(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    return true;
}
bool nothing(VcpuFrame&, const Insn&, u64) {
    return true;
}

template <int Step>
bool move_top(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    f.x87.status &= static_cast<u16>(~kC1);
    set_top(f, top(f) + static_cast<unsigned>(Step));
    return true;
}
template <bool Pop>
bool ffree(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    f.x87.status &= static_cast<u16>(~kC1);
    f.x87.tags &= static_cast<u8>(~(1 << physical(f, i.rm & 7)));
    if constexpr (Pop) pop(f);
    return true;
}

const OpBinding kOps[] = {
    bind<Op::FLDCW_Mw, fldcw>(),
    bind<Op::FNSTCW_Mw, fnstcw>(),
    bind<Op::FNSTSW_Mw, fnstsw>(),
    bind<Op::FNSTSW_AX, fnstsw_ax>(),
    bind<Op::FLDENV_M28, fldenv>(),
    bind<Op::FNSTENV_M28, fnstenv>(),
    bind<Op::FNSAVE_M94, fnsave>(),
    bind<Op::FRSTOR_M94, frstor>(),
    bind<Op::FNINIT, fninit>(),
    bind<Op::FNCLEX, fnclex>(),
    bind<Op::FWAIT, fwait>(),
    bind<Op::FNOP, fnop>(),
    bind<Op::FENI8087_NOP, nothing>(),
    bind<Op::FDISI8087_NOP, nothing>(),
    bind<Op::FSETPM287_NOP, nothing>(),
    bind<Op::FINCSTP, move_top<1>>(),
    bind<Op::FDECSTP, move_top<-1>>(),
    bind<Op::FFREE_STi, ffree<false>>(),
    bind<Op::FFREEP_STi, ffree<true>>(),
};

}  // namespace

std::span<const OpBinding> control_ops() {
    return kOps;
}

}  // namespace x87

std::span<const OpBinding> x87_ops() {
    static const std::vector<OpBinding> all = [] {
        std::vector<OpBinding> list;
        for (auto part :
             {x87::arithmetic_ops(), x87::compare_ops(), x87::data_ops(), x87::control_ops()}) {
            list.insert(list.end(), part.begin(), part.end());
        }
        return list;
    }();
    return all;
}

}  // namespace polyvisor::soft
