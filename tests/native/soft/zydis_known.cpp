#include "zydis_known.hpp"

#include <algorithm>
#include <cstring>
#include <initializer_list>

namespace pvtest {
namespace {

using namespace polyvisor::soft;

/// Instruction sets that Zydis knows and polyvisor's CPU does not have: their encodings are #UD (or
/// NOP).
struct AbsentSet {
    ZydisISAExt extension;
    const char* reason;
};
constexpr AbsentSet kAbsentSets[] = {
    {ZYDIS_ISA_EXT_AMD3DNOW, "3DNow! left AMD's CPUs in 2010"},
    {ZYDIS_ISA_EXT_AMD_INVLPGB, "not implemented: broadcast TLB invalidation"},
    {ZYDIS_ISA_EXT_AMX_BF16, "not implemented: AMX"},
    {ZYDIS_ISA_EXT_AMX_INT8, "not implemented: AMX"},
    {ZYDIS_ISA_EXT_AMX_TILE, "not implemented: AMX"},
    {ZYDIS_ISA_EXT_AVX512EVEX, "not implemented: AVX-512"},
    {ZYDIS_ISA_EXT_AVX512VEX, "not implemented: AVX-512 mask registers"},
    {ZYDIS_ISA_EXT_AVX_VNNI, "not implemented: AVX-VNNI"},
    {ZYDIS_ISA_EXT_CET, "not implemented: shadow stacks"},
    {ZYDIS_ISA_EXT_CLDEMOTE, "a NOP"},
    {ZYDIS_ISA_EXT_CLZERO, "not implemented"},
    {ZYDIS_ISA_EXT_ENQCMD, "not implemented"},
    {ZYDIS_ISA_EXT_FMA4, "only on AMD's family 15h"},
    {ZYDIS_ISA_EXT_HRESET, "not implemented"},
    {ZYDIS_ISA_EXT_KEYLOCKER, "not implemented"},
    {ZYDIS_ISA_EXT_KEYLOCKER_WIDE, "not implemented"},
    {ZYDIS_ISA_EXT_KNC, "Xeon Phi's own"},
    {ZYDIS_ISA_EXT_KNCE, "Xeon Phi's own"},
    {ZYDIS_ISA_EXT_KNCV, "Xeon Phi's own"},
    {ZYDIS_ISA_EXT_MCOMMIT, "not implemented"},
    {ZYDIS_ISA_EXT_MONITORX, "not implemented"},
    {ZYDIS_ISA_EXT_MOVDIR, "not implemented"},
    {ZYDIS_ISA_EXT_MPX, "removed from the architecture"},
    {ZYDIS_ISA_EXT_PADLOCK, "VIA's own"},
    {ZYDIS_ISA_EXT_PCONFIG, "not implemented"},
    {ZYDIS_ISA_EXT_PKU, "not implemented: protection keys"},
    {ZYDIS_ISA_EXT_PT, "not implemented: processor trace"},
    {ZYDIS_ISA_EXT_RDPRU, "not implemented"},
    {ZYDIS_ISA_EXT_RTM, "not implemented: transactions"},
    {ZYDIS_ISA_EXT_SGX, "not implemented"},
    {ZYDIS_ISA_EXT_SGX_ENCLV, "not implemented"},
    {ZYDIS_ISA_EXT_SMX, "not implemented: GETSEC"},
    {ZYDIS_ISA_EXT_SNP, "not implemented"},
    {ZYDIS_ISA_EXT_SVM, "no nested virtualization: VMRUN and its kin are #UD"},
    {ZYDIS_ISA_EXT_TBM, "only on AMD's family 15h"},
    {ZYDIS_ISA_EXT_TDX, "not implemented"},
    {ZYDIS_ISA_EXT_TSX_LDTRK, "not implemented"},
    {ZYDIS_ISA_EXT_UINTR, "not implemented: user interrupts"},
    {ZYDIS_ISA_EXT_VMFUNC, "no nested virtualization"},
    {ZYDIS_ISA_EXT_VTX, "no nested virtualization: VMX instructions but VMCALL are #UD"},
    {ZYDIS_ISA_EXT_WAITPKG, "not implemented"},
    {ZYDIS_ISA_EXT_XOP, "only on AMD's family 15h"},
};

bool is_one_of(Op op, std::initializer_list<Op> list) {
    return std::find(list.begin(), list.end(), op) != list.end();
}

bool contains(std::string_view text, std::string_view part) {
    return text.find(part) != std::string_view::npos;
}

bool has_operand(const OpInfo& info, Operand operand) {
    return std::find(std::begin(info.operands), std::end(info.operands), operand) !=
           std::end(info.operands);
}

}  // namespace

const char* known_difference(const Disagreement& d) {
    bool ok = d.status == DecodeStatus::kOk;
    if (d.zydis) {
        for (const AbsentSet& set : kAbsentSets) {
            if (d.zydis->meta.isa_ext != set.extension) continue;
            if (!ok || op_info(d.insn.op).mnemonic == "nop") return set.reason;
        }
    }
    if (!ok || !d.zydis) return nullptr;

    const Insn& i = d.insn;
    const OpInfo& info = op_info(i.op);
    if (info.mnemonic == "nop" && d.zydis->mnemonic == ZYDIS_MNEMONIC_NOP && d.what != "length") {
        return "operands of hint NOPs are never accessed, and every disassembler shows others";
    }
    if (is_one_of(i.op, {Op::UD0_Gv_Ev, Op::UD1_Gv_Ev}) && contains(d.what, "size")) {
        return "operands of UD0 and UD1 are never accessed";
    }
    if (i.op == Op::XCHG_Zv_rAX && d.zydis->mnemonic == ZYDIS_MNEMONIC_PAUSE) {
        return "F3 REX.B 90 exchanges r8 and rax on CPUs";
    }
    if (is_one_of(i.op, {Op::LAR_Gv_Ew, Op::LSL_Gv_Ew}) && d.what == "register size of operand 2") {
        return "the selector is 16 bits whatever the size of the register's name";
    }
    if (contains(d.what, "register size") &&
        (has_operand(info, Operand::Gd) || has_operand(info, Operand::Ed) ||
         has_operand(info, Operand::Rd))) {
        return "a 32-bit result is zero extended: REX.W only changes the register's name";
    }
    if (i.op == Op::MOVSXD_Gv_Ed && i.opsize == 2) {
        return "16-bit MOVSXD: Intel says r/m16 and AMD r/m32; only the low 16 bits matter";
    }
    if (is_one_of(i.op, {Op::CLFLUSH_Mb, Op::CLFLUSHOPT_Mb, Op::CLWB_Mb}) &&
        contains(d.what, "memory size")) {
        return "checked as a one-byte access, though it works on a cache line";
    }
    if (is_one_of(i.op, {Op::CALL_Ev, Op::JMP_Ev}) && contains(d.what, "segment")) {
        return "3E before an indirect branch is NOTRACK with CET, else it selects DS";
    }
    if (i.op == Op::PREFETCH_M && d.what == "mnemonic") {
        return "0F 0D /2../7 are hints like /0";
    }
    if (d.what.starts_with("base") && d.size == CodeSize::k64 && i.addrsize == 4 &&
        i.base == kNoReg && i.mod == 0) {
        return "SIB base 101 with mod 00 is no register, REX.B or not; Zydis shows r13d";
    }
    return nullptr;
}

}  // namespace pvtest
