#include "soft/optab.hpp"

namespace polyvisor::soft {
namespace {

// What the `ext` column of a row may say. A namespace of its own: M is an operand code too.
namespace ext {
constexpr OpExt None{OpExt::kNone, 0};
constexpr OpExt R{OpExt::kAny, 0};
constexpr OpExt M{OpExt::kMem, 0};
constexpr OpExt RR{OpExt::kReg, 0};
constexpr OpExt X(u8 n) {
    return {OpExt::kGroup, n};
}
constexpr OpExt MX(u8 n) {
    return {OpExt::kGroupMem, n};
}
constexpr OpExt RX(u8 n) {
    return {OpExt::kGroupReg, n};
}
constexpr OpExt F(u8 modrm) {
    return {OpExt::kFull, modrm};
}
}  // namespace ext

constexpr OpInfo kOps[] = {
#define PV_OP(id, mnemonic, map, opcode, prefix, ext_code, op1, op2, op3, op4, reads, writes, \
              feature, attrs)                                                                 \
    {#id,                                                                                     \
     mnemonic,                                                                                \
     Map::map,                                                                                \
     opcode,                                                                                  \
     Mandatory::prefix,                                                                       \
     ext::ext_code,                                                                           \
     {Operand::op1, Operand::op2, Operand::op3, Operand::op4},                                \
     static_cast<u8>(reads),                                                                  \
     static_cast<u8>(writes),                                                                 \
     Feature::k##feature,                                                                     \
     static_cast<u32>(attrs)},
// clang-format off: the same order everywhere
#include "soft/optab_int.inc"
#include "soft/optab_x87.inc"
#include "soft/optab_simd.inc"
// clang-format on
#undef PV_OP
};
static_assert(std::size(kOps) == kOpCount);

bool between(Op op, Op first, Op last) {
    return op >= first && op <= last;
}

/// Shifts and rotates whose count is an immediate; the rows stand together in the table.
bool shifts_by_immediate(Op op) {
    return between(op, Op::ROL_Eb_Ib, Op::SAR_Ev_Ib) || op == Op::SHLD_Ev_Gv_Ib ||
           op == Op::SHRD_Ev_Gv_Ib;
}

bool rotates_through_carry(Op op) {
    return op == Op::RCL_Eb_Ib || op == Op::RCL_Ev_Ib || op == Op::RCR_Eb_Ib || op == Op::RCR_Ev_Ib;
}

/// The count after masking (SDM 2B, SAL/SAR/SHL/SHR). Byte forms are masked to five bits whatever
/// the operand size says, but REX.W makes that 8 only together with a 64-bit operand.
unsigned immediate_count(const Insn& insn) {
    bool wide = insn.opsize == 8 && op_info(insn.op).operands[0] == Operand::Ev;
    return static_cast<unsigned>(insn.imm) & (wide ? 63 : 31);
}

}  // namespace

const OpInfo& op_info(Op op) {
    return kOps[static_cast<unsigned>(op)];
}

u8 flags_read(const Insn& insn) {
    const OpInfo& info = op_info(insn.op);
    if (shifts_by_immediate(insn.op)) {
        return rotates_through_carry(insn.op) && immediate_count(insn) != 0 ? kC : 0;
    }
    if ((info.attrs & kString) && !(insn.prefixes & (kPrefixRep | kPrefixRepne))) {
        return info.flags_read & kD;
    }
    return info.flags_read;
}

u8 flags_written(const Insn& insn) {
    if (shifts_by_immediate(insn.op) && immediate_count(insn) == 0) return 0;
    return op_info(insn.op).flags_written;
}

unsigned operand_size(Operand operand, const Insn& insn) {
    unsigned y = insn.opsize == 8 ? 8 : 4;
    unsigned x = insn.vex_l ? 32 : 16;
    // clang-format off
    switch (operand) {
        using enum Operand;
        case Eb: case Gb: case Mb: case Zb: case Ob: case Xb: case Yb: case AL: case CL: case Wb:
        case Ib: case sIb: case I1: case I3: case Jb:
            return 1;
        case Ew: case Gw: case Mw: case Sw: case Ww: case AX: case DX: case Iw: case Mw_i:
        case ES: case CS: case SS: case DS: case FS: case GS:
            return 2;
        case Ed: case Gd: case Md: case Rd: case Pd: case Qd: case Vd: case Wd: case Vss: case Hss:
        case Wss: case Md_i: case Md_f:
            return 4;
        case Eq: case Gq: case Mq: case Rq: case Pq: case Qq: case Nq: case Vq: case Wq: case Uq:
        case Vsd: case Hsd: case Wsd: case Mq_i: case Mq_f:
            return 8;
        case Ev: case Gv: case Mv: case Rv: case Zv: case Ov: case Xv: case Yv: case Iv: case Fv:
        case eAX: case rAX: case Cd: case Dd:
            return insn.opsize;
        case Iz: case Jz:
            return insn.opsize == 2 ? 2 : 4;
        case Ey: case Gy: case My: case Ry: case By:
            return y;
        case Mdq: case Vdq: case Hdq: case Wdq: case Udq: case Ldq: case XMM0:
            return 16;
        case Mqq:
            return 32;
        case Vx: case Vps: case Vpd: case Hx: case Wx: case Wps: case Wpd: case Ux: case Lx:
            return x;
        case Mp: case Ap:
            return insn.opsize + 2u;
        case Ms:
            return insn.opsize == 8 ? 10 : 6;
        case Mt: case M80: case ST0: case STi:
            return 10;
        case Ma:
            return insn.opsize * 2u;
        case M28:
            return insn.opsize == 2 ? 14 : 28;
        case M94:
            return insn.opsize == 2 ? 94 : 108;
        case M512:
            return 512;
        case _: case M: case VMx:
            return 0;
    }
    // clang-format on
    return 0;
}

unsigned memory_size(const Insn& insn) {
    if (!insn.has_mem) return 0;
    // clang-format off
    switch (insn.op) {  // a ModRM operand that is decoded but never accessed
        case Op::NOP_Ev_0D: case Op::NOP_Ev_18: case Op::NOP_Ev_19: case Op::NOP_Ev_1A:
        case Op::NOP_Ev_1B: case Op::NOP_Ev_1C: case Op::NOP_Ev_1D: case Op::NOP_Ev_1E:
        case Op::NOP_Ev_1F: case Op::UD0_Gv_Ev: case Op::UD1_Gv_Ev:
            return 0;
        default:
            break;
    }
    // clang-format on
    for (Operand operand : op_info(insn.op).operands) {
        if (is_memory_operand(operand)) return operand_size(operand, insn);
    }
    return 0;
}

bool is_memory_operand(Operand operand) {
    // clang-format off
    switch (operand) {
        using enum Operand;
        case Eb: case Ew: case Ed: case Eq: case Ev: case Ey:
        case Mb: case Mw: case Md: case Mq: case Mv: case My: case Mdq: case Mqq: case M:
        case Mp: case Ms: case Mt: case M80: case M28: case M94: case M512: case Ma:
        case Ob: case Ov: case Qq: case Qd:
        case Wx: case Wdq: case Wq: case Wd: case Ww: case Wb: case Wss: case Wsd: case Wps: case Wpd:
        case Md_i: case Mq_i: case Mw_i: case Md_f: case Mq_f: case VMx:
            return true;
        default:
            return false;
    }
    // clang-format on
}

}  // namespace polyvisor::soft
