#include "zydis_compare.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/state.hpp"
#include "zydis_known.hpp"

namespace pvtest {
namespace {

using namespace polyvisor;
using namespace polyvisor::soft;

/// An operand in a form that both sides can be brought to.
struct Plain {
    enum Kind { kReg, kMem, kImm, kFar } kind = kReg;
    char reg_class = 0;  ///< g general, s segment, c control, d debug, f x87, m MMX, x XMM, y YMM
    int number = 0;      ///< general byte registers AH..BH are 20..23
    unsigned size = 0;   ///< bytes; 0: not compared
    int base = kNoReg, index = kNoReg, scale = 0, segment = 0;
    bool vector_index = false;
    s64 disp = 0;
    u64 value = 0, selector = 0;
};

u64 mask(unsigned size) {
    return size >= 8 ? ~u64{0} : (u64{1} << (size * 8)) - 1;
}

Plain general(const Insn& i, int number, unsigned size) {
    Plain p;
    p.reg_class = 'g';
    p.size = size;
    p.number = number;
    if (size == 1 && number >= 4 && number < 8 && !(i.prefixes & (kPrefixRex | kPrefixVex))) {
        p.number = 20 + number - 4;
    }
    return p;
}

Plain simple(char reg_class, int number) {
    Plain p;
    p.reg_class = reg_class;
    p.number = number;
    return p;
}

Plain memory(const Insn& i, unsigned size, bool vsib) {
    Plain p;
    p.kind = Plain::kMem;
    p.size = size;
    p.base = i.base;
    p.index = i.index;
    p.scale = i.index == kNoReg ? 0 : i.scale;
    p.vector_index = vsib;
    p.segment = i.segment;
    // An absolute address wraps to the address size; Zydis and we extend it differently.
    p.disp = i.has_modrm ? i.disp : sign_extend(static_cast<u64>(i.disp), i.addrsize * 8);
    return p;
}

Plain immediate(u64 value, unsigned size) {
    Plain p;
    p.kind = Plain::kImm;
    p.value = value & mask(size);
    p.size = size;
    return p;
}

// clang-format off
/// What a disassembler shows of an operand; nothing for those it does not show.
std::optional<Plain> ours(const Insn& i, Operand operand, bool second_immediate) {
    using enum Operand;
    unsigned size = soft::operand_size(operand, i);
    char vector = i.vex_l ? 'y' : 'x';
    bool memory_form = i.has_mem && is_memory_operand(operand);
    if (memory_form) return memory(i, size, operand == VMx);
    switch (operand) {
        case Eb: case Ew: case Ed: case Eq: case Ev: case Ey: case Rv: case Ry: case Rd: case Rq:
            return general(i, i.rm, size);
        case Zb: case Zv: return general(i, i.rm, size);
        case Gb: case Gw: case Gd: case Gq: case Gv: case Gy: return general(i, i.reg, size);
        case By: return general(i, i.vvvv, size);
        case AL: return general(i, 0, 1);
        case CL: return general(i, 1, 1);
        case AX: return general(i, 0, 2);
        case DX: return general(i, 2, 2);
        case eAX: case rAX: return general(i, 0, i.opsize);
        case Ib: case sIb: case Iw: case Iz: case Iv:
            return immediate(second_immediate ? i.imm2 : i.imm, size);
        case I1: return immediate(1, 1);
        case I3: return immediate(3, 1);
        case Jb: case Jz: return immediate(i.imm, 8);
        case Ap: {
            Plain p;
            p.kind = Plain::kFar;
            p.value = i.imm;
            p.selector = i.imm2;
            return p;
        }
        case ES: case CS: case SS: case DS: case FS: case GS:
            return simple('s', static_cast<int>(operand) - static_cast<int>(ES));
        case Sw: return simple('s', i.reg);
        case Cd: return simple('c', i.reg);
        case Dd: return simple('d', i.reg);
        case ST0: return simple('f', 0);
        case STi: return simple('f', i.rm);
        case Pq: case Pd: return simple('m', i.reg);
        case Qq: case Qd: case Nq: return simple('m', i.rm);
        case Vx: case Vps: case Vpd: return simple(vector, i.reg);
        case Vdq: case Vq: case Vd: case Vss: case Vsd: return simple('x', i.reg);
        case Hx: return simple(vector, i.vvvv);
        case Hdq: case Hss: case Hsd: return simple('x', i.vvvv);
        case Wx: case Wps: case Wpd: case Ux: return simple(vector, i.rm);
        case Wdq: case Wq: case Wd: case Ww: case Wb: case Wss: case Wsd: case Udq: case Uq:
            return simple('x', i.rm);
        case Lx: return simple(vector, static_cast<int>(i.imm >> 4) & 15);
        case Ldq: return simple('x', static_cast<int>(i.imm >> 4) & 15);
        default: return std::nullopt;  // not shown, or (strings) in various ways
    }
}
// clang-format on

int general_number(ZydisRegister reg) {
    switch (ZydisRegisterGetClass(reg)) {
        case ZYDIS_REGCLASS_GPR8: {
            int n = reg - ZYDIS_REGISTER_AL;
            if (n < 4) return n;
            if (n < 8) return 20 + n - 4;
            return n - 4;
        }
        case ZYDIS_REGCLASS_GPR16:
            return reg - ZYDIS_REGISTER_AX;
        case ZYDIS_REGCLASS_GPR32:
            return reg - ZYDIS_REGISTER_EAX;
        case ZYDIS_REGCLASS_GPR64:
            return reg - ZYDIS_REGISTER_RAX;
        default:
            return -1;
    }
}

Plain theirs(const ZydisDecodedOperand& z) {
    Plain p;
    p.size = z.size / 8;
    switch (z.type) {
        case ZYDIS_OPERAND_TYPE_REGISTER: {
            auto reg = z.reg.value;
            auto reg_class = ZydisRegisterGetClass(reg);
            p.number = ZydisRegisterGetId(reg);
            switch (reg_class) {
                case ZYDIS_REGCLASS_GPR8:
                case ZYDIS_REGCLASS_GPR16:
                case ZYDIS_REGCLASS_GPR32:
                case ZYDIS_REGCLASS_GPR64:
                    p.reg_class = 'g';
                    p.number = general_number(reg);
                    p.size = ZydisRegisterGetWidth(ZYDIS_MACHINE_MODE_LONG_64, reg) / 8;
                    break;
                case ZYDIS_REGCLASS_SEGMENT:
                    p.reg_class = 's';
                    break;
                case ZYDIS_REGCLASS_CONTROL:
                    p.reg_class = 'c';
                    break;
                case ZYDIS_REGCLASS_DEBUG:
                    p.reg_class = 'd';
                    break;
                case ZYDIS_REGCLASS_X87:
                    p.reg_class = 'f';
                    break;
                case ZYDIS_REGCLASS_MMX:
                    p.reg_class = 'm';
                    break;
                case ZYDIS_REGCLASS_XMM:
                    p.reg_class = 'x';
                    break;
                case ZYDIS_REGCLASS_YMM:
                    p.reg_class = 'y';
                    break;
                default:
                    p.reg_class = '?';
                    break;
            }
            break;
        }
        case ZYDIS_OPERAND_TYPE_MEMORY:
            p.kind = Plain::kMem;
            if (z.mem.base == ZYDIS_REGISTER_RIP || z.mem.base == ZYDIS_REGISTER_EIP) {
                p.base = kRipReg;
            } else if (z.mem.base != ZYDIS_REGISTER_NONE) {
                p.base = general_number(z.mem.base);
            }
            if (z.mem.index != ZYDIS_REGISTER_NONE) {
                p.vector_index = general_number(z.mem.index) < 0;
                p.index =
                    p.vector_index ? ZydisRegisterGetId(z.mem.index) : general_number(z.mem.index);
                p.scale = z.mem.scale ? std::countr_zero(unsigned{z.mem.scale}) : 0;
            }
            p.segment = ZydisRegisterGetId(z.mem.segment);
            p.disp = z.mem.disp.value;
            break;
        case ZYDIS_OPERAND_TYPE_POINTER:
            p.kind = Plain::kFar;
            p.value = z.ptr.offset;
            p.selector = z.ptr.segment;
            break;
        default:
            p.kind = Plain::kImm;
            p.value = z.imm.value.u;
            break;
    }
    return p;
}

const char* difference(const Plain& a, const Plain& z, bool agen) {
    if (a.kind != z.kind) return "operand kind";
    switch (a.kind) {
        case Plain::kReg:
            if (a.reg_class != z.reg_class) return "register class";
            if (a.number != z.number) return "register";
            if (a.reg_class == 'g' && a.size != z.size) return "register size";
            return nullptr;
        case Plain::kMem:
            if (a.base != z.base) return "base";
            if (a.index != z.index) return "index";
            if (a.index != kNoReg && a.vector_index != z.vector_index) return "VSIB";
            if (a.scale != z.scale) return "scale";
            if (a.disp != z.disp) return "displacement";
            if (!agen && a.segment != z.segment) return "segment";
            if (!agen && a.size && a.size != z.size) return "memory size";
            return nullptr;
        case Plain::kImm:
            return a.value == (z.value & mask(a.size)) ? nullptr : "immediate";
        case Plain::kFar:
            return a.value == z.value && a.selector == z.selector ? nullptr : "far pointer";
    }
    return nullptr;
}

/// The mnemonics that Zydis spells by operand or address size and the table does not.
bool same_mnemonic(const OpInfo& info, const char* z) {
    if (info.mnemonic == z) return true;
    struct Family {
        const char* ours;
        const char* theirs[3];
    };
    static constexpr Family kFamilies[] = {
        {"cbw", {"cwde", "cdqe", nullptr}},
        {"cwd", {"cdq", "cqo", nullptr}},
        {"pusha", {"pushad", nullptr, nullptr}},
        {"popa", {"popad", nullptr, nullptr}},
        {"pushf", {"pushfd", "pushfq", nullptr}},
        {"popf", {"popfd", "popfq", nullptr}},
        {"iret", {"iretd", "iretq", nullptr}},
        {"jrcxz", {"jecxz", "jcxz", nullptr}},
        {"movsd", {"movsw", "movsq", nullptr}},
        {"cmpsd", {"cmpsw", "cmpsq", nullptr}},
        {"stosd", {"stosw", "stosq", nullptr}},
        {"lodsd", {"lodsw", "lodsq", nullptr}},
        {"scasd", {"scasw", "scasq", nullptr}},
        {"insd", {"insw", nullptr, nullptr}},
        {"outsd", {"outsw", nullptr, nullptr}},
        {"fxsave", {"fxsave64", nullptr, nullptr}},
        {"fxrstor", {"fxrstor64", nullptr, nullptr}},
        {"xsave", {"xsave64", nullptr, nullptr}},
        {"xrstor", {"xrstor64", nullptr, nullptr}},
        {"xsaveopt", {"xsaveopt64", nullptr, nullptr}},
        {"xsavec", {"xsavec64", nullptr, nullptr}},
        {"xsaves", {"xsaves64", nullptr, nullptr}},
        {"xrstors", {"xrstors64", nullptr, nullptr}},
        {"sysret", {"sysretq", nullptr, nullptr}},
        {"sysexit", {"sysexitq", nullptr, nullptr}},
    };
    for (const Family& family : kFamilies) {
        if (info.mnemonic != family.ours) continue;
        for (const char* other : family.theirs) {
            if (other && std::strcmp(other, z) == 0) return true;
        }
    }
    return false;
}

std::string hex(std::span<const u8> bytes) {
    std::string text;
    char part[4];
    for (u8 byte : bytes) {
        std::snprintf(part, sizeof part, "%02x ", byte);
        text += part;
    }
    if (!text.empty()) text.pop_back();
    return text;
}

}  // namespace

FeatureSet all_features() {
    FeatureSet features;
    for (unsigned n = 0; n < static_cast<unsigned>(Feature::kCount); ++n) {
        features.set(static_cast<Feature>(n));
    }
    return features;
}

ZydisPeer::ZydisPeer(CodeSize size) : size_(size), features_(all_features()) {
    static constexpr ZydisMachineMode kModes[] = {
        ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_MACHINE_MODE_LONG_64};
    static constexpr ZydisStackWidth kStacks[] = {ZYDIS_STACK_WIDTH_16, ZYDIS_STACK_WIDTH_32,
                                                  ZYDIS_STACK_WIDTH_64};
    auto n = static_cast<unsigned>(size);
    ZydisDecoderInit(&decoder_, kModes[n], kStacks[n]);
    // What AMD's and Intel's CPUs of our feature set have, and no more.
    ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
    ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_CET, ZYAN_TRUE);
    ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
    ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_WBNOINVD, ZYAN_FALSE);
    ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_KNC, ZYAN_FALSE);
    ZydisFormatterInit(&formatter_, ZYDIS_FORMATTER_STYLE_INTEL);
}

std::string ZydisPeer::compare(std::span<const u8> bytes) {
    Insn insn;
    DecodeStatus status = decode(bytes, size_, features_, insn);
    ZydisDecodedInstruction z;
    ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
    ZyanStatus z_status =
        ZydisDecoderDecodeFull(&decoder_, bytes.data(), bytes.size(), &z, operands);
    bool z_ok = ZYAN_SUCCESS(z_status);
    bool ok = status == DecodeStatus::kOk;
    if (!ok && !z_ok) {
        ++both_invalid;
        return {};
    }
    const OpInfo* info = ok ? &op_info(insn.op) : nullptr;
    std::string names = (ok ? std::string(info->id) : "invalid") + " / " +
                        (z_ok ? ZydisMnemonicGetString(z.mnemonic) : "invalid") + ": ";
    auto result = [&](const char* what) -> std::string {
        if (known_difference({status, insn, z_ok ? &z : nullptr, size_, what})) {
            ++excused;
            return {};
        }
        return names + what;
    };
    if (ok != z_ok) return result("validity");
    ++both_valid;
    if (insn.length != z.length) return result("length");
    if (!same_mnemonic(*info, ZydisMnemonicGetString(z.mnemonic))) return result("mnemonic");

    bool agen = false;
    std::vector<Plain> list;
    for (unsigned n = 0; n < 4; ++n) {
        Operand before = n ? info->operands[n - 1] : Operand::_;
        bool second = before == Operand::Ib || before == Operand::Iw;
        if (auto plain = ours(insn, info->operands[n], second)) list.push_back(*plain);
    }
    std::vector<Plain> z_list;
    for (unsigned n = 0; n < z.operand_count; ++n) {
        if (operands[n].visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN) continue;
        if (info->attrs & kString && operands[n].type == ZYDIS_OPERAND_TYPE_MEMORY) continue;
        if (operands[n].type == ZYDIS_OPERAND_TYPE_MEMORY &&
            operands[n].mem.type == ZYDIS_MEMOP_TYPE_AGEN) {
            agen = true;
        }
        z_list.push_back(theirs(operands[n]));
    }
    if (info->attrs & kString) return {};
    if (info->map == Map::X87) {  // st0 is left out by either side in forms where it is implied
        auto top = [](const Plain& p) {
            return p.kind == Plain::kReg && p.reg_class == 'f' && p.number == 0;
        };
        std::erase_if(list, top);
        std::erase_if(z_list, top);
    }
    if (list.size() != z_list.size()) return result("operand count");
    for (size_t n = 0; n < list.size(); ++n) {
        if (const char* what = difference(list[n], z_list[n], agen)) {
            std::string text = std::string(what) + " of operand " + std::to_string(n + 1);
            return result(text.c_str());
        }
    }
    return {};
}

std::string ZydisPeer::disassemble(std::span<const u8> bytes) {
    ZydisDecodedInstruction z;
    ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
    if (!ZYAN_SUCCESS(
            ZydisDecoderDecodeFull(&decoder_, bytes.data(), bytes.size(), &z, operands))) {
        return hex(bytes);
    }
    char text[256];
    ZydisFormatterFormatInstruction(&formatter_, &z, operands, z.operand_count_visible, text,
                                    sizeof text, 0x1000, nullptr);
    return hex(bytes.first(z.length)) + ": " + text;
}

}  // namespace pvtest
