#include "row_encoder.hpp"

#include "cpu/state.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::soft;

namespace {

bool is_vex(const OpInfo& row) {
    return row.map == Map::V0F || row.map == Map::V0F38 || row.map == Map::V0F3A;
}

bool has_memory_operand(const OpInfo& row) {
    for (Operand operand : row.operands) {
        if (operand != Operand::Ob && operand != Operand::Ov && is_memory_operand(operand))
            return true;
    }
    return false;
}

bool has(const OpInfo& row, Operand wanted) {
    for (Operand operand : row.operands) {
        if (operand == wanted) return true;
    }
    return false;
}

class Bytes {
  public:
    explicit Bytes(Encoded& encoded) : encoded_(encoded) {}
    void add(u8 byte) { encoded_.bytes[encoded_.opcode_end++] = byte; }
    void number(u64 value, unsigned size) {
        for (unsigned n = 0; n < size; ++n) add(static_cast<u8>(value >> (8 * n)));
    }
    unsigned at() const { return encoded_.opcode_end; }

  private:
    Encoded& encoded_;
};

void vex_prefix(Bytes& out, const OpInfo& row, const Form& form, u8 rex, Random& random) {
    bool w = (row.attrs & kW1) || (!(row.attrs & kW0) && form.w);
    bool l = (row.attrs & kL1) || (!(row.attrs & kL0) && form.l);
    u8 map = static_cast<u8>(static_cast<u8>(row.map) - static_cast<u8>(Map::V0F) + 1);
    u8 vvvv = row.attrs & kVvvvUnused ? 15 : 15 - form.vvvv;
    u8 pp = 0;
    switch (row.prefix) {
        case Mandatory::Any:
            pp = static_cast<u8>(random.below(4));
            break;
        case Mandatory::NP:
            break;
        case Mandatory::P66:
            pp = 1;
            break;
        case Mandatory::PF3:
            pp = 2;
            break;
        case Mandatory::PF2:
            pp = 3;
            break;
    }
    u8 last = static_cast<u8>(vvvv << 3 | l << 2 | pp);
    u8 inverted_r = rex & 4 ? 0 : 0x80;
    if (map == 1 && !w && !(rex & 3) && !form.spare_rex) {
        out.add(0xc5);
        out.add(inverted_r | last);
        return;
    }
    out.add(0xc4);
    out.add(static_cast<u8>(inverted_r | (rex & 2 ? 0 : 0x40) | (rex & 1 ? 0 : 0x20) | map));
    out.add(static_cast<u8>(w << 7 | last));
}

void legacy_prefix(Bytes& out, const OpInfo& row, const Form& form, u8 rex) {
    if (form.opsize || row.prefix == Mandatory::P66) out.add(0x66);
    if (form.repeat) out.add(form.repeat);
    if (row.prefix == Mandatory::PF3) out.add(0xf3);
    if (row.prefix == Mandatory::PF2) out.add(0xf2);
    bool w = (row.attrs & kW1) || (!(row.attrs & kW0) && form.w);
    if (form.size == CodeSize::k64 && (rex || w || form.spare_rex)) {
        out.add(static_cast<u8>(0x40 | w << 3 | rex));
    }
    if (row.map == Map::M0F || row.map == Map::M0F38 || row.map == Map::M0F3A) out.add(0x0f);
    if (row.map == Map::M0F38) out.add(0x38);
    if (row.map == Map::M0F3A) out.add(0x3a);
}

void memory_operand(Bytes& out, Encoded& encoded, const Form& form, u8 reg, bool vsib) {
    u8 field = static_cast<u8>((reg & 7) << 3);
    if (form.base == kRipReg) {
        out.add(field | 5);
        encoded.disp_at = out.at();
        out.number(static_cast<u64>(form.disp), 4);
        return;
    }
    unsigned disp_size = form.disp_size;
    bool no_base = form.base == kNoReg;
    if (no_base) {
        disp_size = 4;
    } else if ((form.base & 7) == 5 && disp_size == 0) {
        disp_size = 1;
    }
    u8 mod = no_base || disp_size == 0 ? 0 : disp_size == 1 ? 0x40 : 0x80;
    bool sib = vsib || form.index != kNoReg || (!no_base && (form.base & 7) == 4) ||
               (no_base && form.size == CodeSize::k64);
    if (sib) {
        u8 index = form.index == kNoReg ? 4 : form.index & 7;
        u8 base = no_base ? 5 : form.base & 7;
        out.add(mod | field | 4);
        out.add(static_cast<u8>(form.scale << 6 | index << 3 | base));
    } else {
        out.add(static_cast<u8>(mod | field | (no_base ? 5 : form.base & 7)));
    }
    if (disp_size == 4) encoded.disp_at = out.at();
    out.number(static_cast<u64>(form.disp), disp_size);
}

}  // namespace

bool can_be_memory(const OpInfo& row) {
    switch (row.ext.kind) {
        case OpExt::kMem:
        case OpExt::kGroupMem:
            return true;
        case OpExt::kAny:
        case OpExt::kGroup:
            return has_memory_operand(row);
        case OpExt::kFull:
            return row.ext.value < 0xc0;
        default:
            return false;
    }
}

bool can_be_register(const OpInfo& row) {
    switch (row.ext.kind) {
        case OpExt::kMem:
        case OpExt::kGroupMem:
            return false;
        case OpExt::kFull:
            return row.ext.value >= 0xc0;
        default:
            return true;
    }
}

Encoded encode(const OpInfo& row, const Form& form, Random& random) {
    Encoded encoded{};
    Bytes out(encoded);
    bool has_modrm = row.ext.kind != OpExt::kNone;
    u8 reg = form.reg;
    bool group = row.ext.kind == OpExt::kGroup || row.ext.kind == OpExt::kGroupMem ||
                 row.ext.kind == OpExt::kGroupReg;
    if (group) reg = (reg & 8) | row.ext.value;
    u8 rex = 0;
    bool address16 =
        form.size == CodeSize::k16 ? !form.addrsize : form.size == CodeSize::k32 && form.addrsize;
    if (form.size == CodeSize::k64) {
        if (has_modrm && row.ext.kind != OpExt::kFull) rex |= (reg & 8) >> 1;
        if (form.memory) {
            if (form.index != kNoReg) rex |= (form.index & 8) >> 2;
            if (form.base < 16) rex |= form.base >> 3;
        } else if (row.ext.kind != OpExt::kFull && (has_modrm || (row.attrs & kOpcodeReg))) {
            rex |= form.rm >> 3;
        }
    }
    if (form.lock) out.add(0xf0);
    if (form.segment) out.add(form.segment);
    if (form.addrsize) out.add(0x67);
    if (is_vex(row)) {
        vex_prefix(out, row, form, rex, random);
    } else {
        legacy_prefix(out, row, form, rex);
    }
    out.add(row.attrs & kOpcodeReg ? row.opcode | (form.rm & 7) : row.opcode);
    if (row.ext.kind == OpExt::kFull) {
        out.add(row.ext.value);
    } else if (has_modrm && !form.memory) {
        out.add(static_cast<u8>(0xc0 | (reg & 7) << 3 | (form.rm & 7)));
    } else if (has_modrm && address16) {
        u8 mod = form.disp_size == 0 ? 0 : form.disp_size == 1 ? 0x40 : 0x80;
        bool absolute = mod == 0 && (form.rm & 7) == 6;
        out.add(static_cast<u8>(mod | (reg & 7) << 3 | (form.rm & 7)));
        if (absolute) encoded.disp16_at = out.at();
        out.number(static_cast<u64>(form.disp), absolute || mod == 0x80 ? 2 : mod ? 1 : 0);
    } else if (has_modrm) {
        memory_operand(out, encoded, form, reg, has(row, Operand::VMx));
    }
    if (has(row, Operand::Ob) || has(row, Operand::Ov)) {
        unsigned size = 2u << static_cast<u8>(form.size);
        if (form.addrsize) size = size == 4 ? 2 : 4;
        out.number(static_cast<u64>(form.disp), size);
    }
    for (unsigned n = encoded.opcode_end; n < sizeof encoded.bytes; ++n) {
        encoded.bytes[n] = static_cast<u8>(random.next() >> 32);
    }
    return encoded;
}

Form random_form(const OpInfo& row, CodeSize size, Random& random) {
    Form form;
    form.size = size;
    unsigned registers = size == CodeSize::k64 ? 16 : 8;
    bool memory = can_be_memory(row), reg = can_be_register(row);
    form.memory = memory && (!reg || random.one_in(2));
    form.reg = static_cast<u8>(random.below(registers));
    form.rm = static_cast<u8>(random.below(registers));
    form.vvvv = static_cast<u8>(random.below(registers));
    form.w = size == CodeSize::k64 && random.one_in(3);
    form.l = random.one_in(2);
    form.opsize = row.prefix != Mandatory::NP && row.prefix != Mandatory::P66 && !is_vex(row) &&
                  row.map != Map::X87 && random.one_in(4);
    form.spare_rex = random.one_in(4);
    if (row.attrs & kString) {
        form.repeat = random.pick<u8>({0, 0xf2, 0xf3});
    } else if (row.prefix == Mandatory::Any && !(row.attrs & kNoRep) && random.one_in(16)) {
        form.repeat = random.pick<u8>({0xf2, 0xf3});
    }
    form.lock = (row.attrs & kLockable) && form.memory && random.one_in(4);
    if (size == CodeSize::k16) form.addrsize = has(row, Operand::VMx) || random.one_in(2);
    if (form.memory) {
        form.base = static_cast<u8>(random.below(registers + 1));
        if (form.base == registers) form.base = kNoReg;
        form.index = static_cast<u8>(random.below(registers + 1));
        if (form.index == registers || (form.index == kRsp && !has(row, Operand::VMx)))
            form.index = kNoReg;
        if (form.index == kNoReg && has(row, Operand::VMx)) form.index = 1;
        if (size == CodeSize::k64 && random.one_in(8) && !has(row, Operand::VMx)) {
            form.base = kRipReg;
            form.index = kNoReg;
        }
        form.scale = form.index == kNoReg ? 0 : static_cast<u8>(random.below(4));
        form.disp_size = random.pick<u8>({0, 1, 4});
        form.disp = random.between(-128, 127);
    }
    return form;
}

}  // namespace pvtest
