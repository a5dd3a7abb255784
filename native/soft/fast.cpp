// Which instructions get a specialised handler, and the way back to the generic operation.
#include "soft/fast.hpp"

#include "soft/dispatch.hpp"
#include "soft/generic.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor::soft {

namespace {

/// Builds one uop; `uop.run` stays nullptr when there is no fast form.
class FastUop {
  public:
    FastUop(const Insn& insn, const OpInfo& row, const TranslateContext& context)
        : i_(insn), row_(row), context_(context) {
        u_.length = insn.length;
        u_.number = context.number;
        u_.offset = static_cast<u16>(context.ip - context.block_ip);
        u_.size = insn.opsize;
        u_.base = u_.index = kNoReg * 8;
        long64_ = (context.mode & kModeCodeSize) == static_cast<u32>(CodeSize::k64);
        flat_ = long64_ || ((context.mode & kModeProtected) && !(context.mode & kModeSegCheck) &&
                            (context.mode & kModeCodeSize) == static_cast<u32>(CodeSize::k32));
        if (insn.has_mem) memory_ok_ = set_address();
    }

    bool emit(std::vector<Uop>& uops) {
        if (i_.prefixes & kPrefixLock) return false;
        if (row_.map == Map::One) {
            one_byte();
        } else if (row_.map == Map::M0F && row_.prefix == Mandatory::Any) {
            two_byte();
        } else if (row_.map == Map::M0F || row_.map == Map::V0F) {
            move_vector();
        }
        if (u_.run == nullptr) return nop_;
        uops.push_back(u_);
        return true;
    }

    /// CMP or TEST of registers or with an immediate; for fusing.
    bool comparison(bool& test, bool& immediate) {
        if (row_.map != Map::One || i_.has_mem) return false;
        unsigned op = i_.opcode;
        bool byte = !(op & 1);
        immediate = false;
        if (op == 0x38 || op == 0x39 || op == 0x3a || op == 0x3b || op == 0x84 || op == 0x85) {
            test = op >= 0x84;
            bool reversed = op == 0x3a || op == 0x3b;
            operands(byte ? 1 : i_.opsize, reversed ? i_.reg : i_.rm, reversed ? i_.rm : i_.reg);
            return true;
        }
        immediate = true;
        if (op == 0x3c || op == 0x3d || op == 0xa8 || op == 0xa9) {
            test = op >= 0xa8;
            operands(byte ? 1 : i_.opsize, kRax, 0);
        } else if ((op >= 0x80 && op <= 0x83 && (i_.modrm >> 3 & 7) == 7) ||
                   ((op == 0xf6 || op == 0xf7) && (i_.modrm >> 3 & 7) <= 1)) {
            test = op >= 0xf6;
            operands(byte ? 1 : i_.opsize, i_.rm, 0);
        } else {
            return false;
        }
        u_.imm = static_cast<u32>(i_.imm);
        return true;
    }

    Uop& uop() { return u_; }

  private:
    u8 byte_offset(u8 reg) const {
        bool high = reg >= 4 && reg < 8 && !(i_.prefixes & (kPrefixRex | kPrefixVex));
        return static_cast<u8>(high ? (reg - 4) * 8 + 1 : reg * 8);
    }
    u8 offset(unsigned size, u8 reg) const {
        return size == 1 ? byte_offset(reg) : static_cast<u8>(reg * 8);
    }
    void operands(unsigned size, u8 dst, u8 src) {
        u_.size = static_cast<u8>(size);
        u_.dst = offset(size, dst);
        u_.src = offset(size, src);
    }

    bool set_address() {
        if (!flat_ || (context_.mode & kModeAlignCheck)) return false;
        u_.disp = static_cast<u64>(i_.disp);
        if (i_.base == kRipReg) {
            u_.disp += context_.ip + i_.length;
        } else {
            u_.base = static_cast<u8>(i_.base * 8);
        }
        u_.index = static_cast<u8>(i_.index * 8);
        u_.scale = i_.scale;
        u_.seg = i_.segment;
        if (long64_) {
            if (i_.addrsize != 8) return false;
            kind_ = i_.segment >= kFs    ? kAddressSeg
                    : i_.index != kNoReg ? kAddressIndex
                                         : kAddressBase;
        } else {
            if (i_.addrsize != 4 || i_.segment >= kFs || i_.segment == kCs) return false;
            kind_ = kAddress32;
        }
        return true;
    }

    void alu(AluOp op, bool byte, bool to_reg) {
        unsigned size = byte ? 1 : i_.opsize;
        if (!i_.has_mem) {
            operands(size, to_reg ? i_.reg : i_.rm, to_reg ? i_.rm : i_.reg);
            u_.run = alu_register_handler(op, size, false, context_.flags_live);
        } else if (memory_ok_) {
            operands(size, i_.reg, i_.reg);
            u_.run = to_reg ? alu_load_handler(op, size, kind_, context_.flags_live)
                            : alu_store_handler(op, size, kind_, false);
        }
    }

    void alu_immediate(AluOp op, bool byte) {
        unsigned size = byte ? 1 : i_.opsize;
        u_.imm = static_cast<u32>(i_.imm);
        if (!i_.has_mem) {
            operands(size, i_.has_modrm ? i_.rm : u8{kRax}, 0);
            u_.run = alu_register_handler(op, size, true, context_.flags_live);
        } else if (memory_ok_) {
            operands(size, 0, 0);
            u_.run = alu_store_handler(op, size, kind_, true);
        }
    }

    void test(bool byte, bool immediate) {
        unsigned size = byte ? 1 : i_.opsize;
        u_.imm = static_cast<u32>(i_.imm);
        if (!i_.has_mem) {
            operands(size, i_.has_modrm ? i_.rm : u8{kRax}, i_.reg);
            u_.run = test_handler(size, immediate);
        } else if (memory_ok_) {
            operands(size, 0, i_.reg);
            u_.run = test_memory_handler(size, kind_, immediate);
        }
    }

    u64 branch_target() const {
        u64 target = context_.ip + i_.length + i_.imm;
        return long64_ ? target : static_cast<u32>(target);
    }
    // Direct branches need a check of the code segment's limit unless it spans everything; 16-bit
    // operand size truncates the target.
    bool plain_branch() const { return long64_ || (flat_ && i_.opsize == 4); }

    void one_byte() {
        unsigned op = i_.opcode;
        unsigned ext = i_.modrm >> 3 & 7;
        if (op < 0x40 && (op & 7) < 6) {
            auto alu_op = static_cast<AluOp>(op >> 3);
            if ((op & 7) < 4)
                alu(alu_op, !(op & 1), op & 2);
            else
                alu_immediate(alu_op, !(op & 1));
            return;
        }
        switch (op) {
            case 0x63:
                if (!long64_) break;
                operands(i_.opsize, i_.reg, i_.rm);
                if (i_.opsize != 8) break;
                if (!i_.has_mem)
                    u_.run = extend_handler(8, 4, true);
                else if (memory_ok_)
                    u_.run = extend_load_handler(8, 4, true, kind_);
                break;
            case 0x68:
            case 0x6a:
                u_.imm = static_cast<u32>(i_.imm);
                u_.seg = kSs;
                if (long64_ && i_.opsize == 8) u_.run = push_handler(true);
                break;
            case 0x69:
            case 0x6b:
                u_.imm = static_cast<u32>(i_.imm);
                operands(i_.opsize, i_.reg, i_.rm);
                if (!i_.has_mem) u_.run = imul_handler(i_.opsize, true, context_.flags_live);
                break;
            case 0x80:
            case 0x81:
            case 0x82:
            case 0x83:
                alu_immediate(static_cast<AluOp>(ext), !(op & 1));
                break;
            case 0x84:
            case 0x85:
                test(op == 0x84, false);
                break;
            case 0xa8:
            case 0xa9:
                test(op == 0xa8, true);
                break;
            case 0x86:
            case 0x87:
                operands(i_.opsize, i_.reg, i_.rm);
                if (!i_.has_mem && op == 0x87) u_.run = exchange_handler(i_.opsize);
                break;
            case 0x88:
            case 0x89:
            case 0x8a:
            case 0x8b:
                move(!(op & 1), op >= 0x8a);
                break;
            case 0x8d:
                operands(i_.opsize, i_.reg, 0);
                lea();
                break;
            case 0x90:
                nop_ = row_.mnemonic == "nop";
                break;
            case 0x98:
            case 0x99:
                u_.run = convert_handler(op, i_.opsize);
                break;
            case 0xc0:
            case 0xc1:
            case 0xd0:
            case 0xd1:
            case 0xd2:
            case 0xd3:
                shift(op, ext);
                break;
            case 0xc3:
                u_.seg = kSs;
                if (long64_) u_.run = return_handler();
                break;
            case 0xc6:
            case 0xc7:
                operands(op == 0xc6 ? 1 : i_.opsize, i_.rm, 0);
                u_.imm = static_cast<u32>(i_.imm);
                if (!i_.has_mem) {
                    u_.disp = i_.imm;
                    u_.run = move_register_handler(u_.size, true);
                } else if (memory_ok_) {
                    u_.run = store_handler(u_.size, kind_, true);
                }
                break;
            case 0xe8:
                u_.disp = branch_target();
                u_.seg = kSs;
                if (long64_) u_.run = call_handler();
                break;
            case 0xe9:
            case 0xeb:
                u_.disp = branch_target();
                if (plain_branch()) u_.run = jump_handler();
                break;
            case 0xf6:
            case 0xf7:
                group3(op == 0xf6, ext);
                break;
            case 0xfe:
            case 0xff:
                group5(op == 0xfe, ext);
                break;
            default:
                register_in_opcode(op);
                break;
        }
    }

    void register_in_opcode(unsigned op) {
        if (op >= 0x40 && op <= 0x4f && !long64_) {
            operands(i_.opsize, i_.rm, 0);
            u_.run = unary_handler(op < 0x48 ? kInc : kDec, i_.opsize, context_.flags_live);
        } else if (op >= 0x50 && op <= 0x5f && long64_ && i_.opsize == 8) {
            operands(8, i_.rm, i_.rm);
            u_.seg = kSs;
            u_.run = op < 0x58 ? push_handler(false) : pop_handler();
        } else if (op >= 0x70 && op <= 0x7f && plain_branch()) {
            u_.disp = branch_target();
            u_.run = jcc_handler(op & 15);
        } else if (op >= 0xb0 && op <= 0xbf) {
            operands(op < 0xb8 ? 1 : i_.opsize, i_.rm, 0);
            u_.disp = i_.imm;
            u_.run = move_register_handler(u_.size, true);
        }
    }

    void move(bool byte, bool to_reg) {
        unsigned size = byte ? 1 : i_.opsize;
        if (!i_.has_mem) {
            operands(size, to_reg ? i_.reg : i_.rm, to_reg ? i_.rm : i_.reg);
            u_.run = move_register_handler(size, false);
        } else if (memory_ok_) {
            operands(size, i_.reg, i_.reg);
            u_.run = to_reg ? load_handler(size, kind_) : store_handler(size, kind_, false);
        }
    }

    // LEA does no segmentation: FS: and GS: prefixes do not count.
    void lea() {
        if (!i_.has_mem || !(long64_ || flat_)) return;
        if (!memory_ok_ && kind_ != kAddressSeg) {
            u_.base = u_.index = kNoReg * 8;
            return;
        }
        AddressKind kind = kind_ == kAddressSeg ? kAddressIndex : kind_;
        u_.run = lea_handler(i_.opsize, kind);
    }

    void shift(unsigned op, unsigned ext) {
        if (i_.has_mem || !(op & 1)) return;
        bool by_cl = op == 0xd3;
        u_.imm = op == 0xd1 ? 1 : static_cast<u32>(i_.imm);
        operands(i_.opsize, i_.rm, 0);
        if (!by_cl && (u_.imm & (i_.opsize == 8 ? 63 : 31)) == 0) return;
        u_.run = shift_handler(ext, i_.opsize, by_cl, context_.flags_live);
    }

    void group3(bool byte, unsigned ext) {
        unsigned size = byte ? 1 : i_.opsize;
        if (ext <= 1) {
            test(byte, true);
        } else if (!i_.has_mem) {
            operands(size, i_.rm, i_.rm);
            if (ext == 2 || ext == 3) {
                u_.run = unary_handler(ext == 2 ? kNot : kNeg, size, context_.flags_live);
            } else if (ext == 4 || ext == 5) {
                u_.run = mul_handler(size, ext == 5, context_.flags_live);
            }
        }
    }

    void group5(bool byte, unsigned ext) {
        unsigned size = byte ? 1 : i_.opsize;
        if (ext <= 1) {
            operands(size, i_.rm, 0);
            unsigned which = ext == 0 ? kInc : kDec;
            if (!i_.has_mem)
                u_.run = unary_handler(which, size, context_.flags_live);
            else if (memory_ok_)
                u_.run = unary_memory_handler(which, size, kind_);
        } else if ((ext == 2 || ext == 4) && long64_) {
            operands(8, 0, i_.rm);
            if (!i_.has_mem)
                u_.run = indirect_handler(ext == 2);
            else if (memory_ok_)
                u_.run = indirect_load_handler(ext == 2, kind_);
        }
    }

    void move_vector() {
        VectorMove move;
        if (!vector_move(i_.op, move)) return;
        u_.size = move.bytes;
        u_.dst = move.store ? i_.rm : i_.reg;
        u_.src = move.store ? i_.reg : i_.rm;
        if (!i_.has_mem) {
            u_.run = vector_copy_handler(move);
        } else if (memory_ok_) {
            u_.run = vector_memory_handler(move, kind_);
        }
    }

    void two_byte() {
        unsigned op = i_.opcode;
        if (op >= 0x40 && op <= 0x4f && !i_.has_mem) {
            operands(i_.opsize, i_.reg, i_.rm);
            u_.run = cmov_handler(i_.opsize, op & 15);
        } else if (op >= 0x80 && op <= 0x8f && plain_branch()) {
            u_.disp = branch_target();
            u_.run = jcc_handler(op & 15);
        } else if (op >= 0x90 && op <= 0x9f && !i_.has_mem) {
            operands(1, i_.rm, 0);
            u_.run = setcc_handler(op & 15);
        } else if (op == 0xaf) {
            operands(i_.opsize, i_.reg, i_.rm);
            if (!i_.has_mem)
                u_.run = imul_handler(i_.opsize, false, context_.flags_live);
            else if (memory_ok_)
                u_.run = imul_load_handler(i_.opsize, kind_, context_.flags_live);
        } else if (op == 0xb6 || op == 0xb7 || op == 0xbe || op == 0xbf) {
            unsigned from = op & 1 ? 2 : 1;
            u_.dst = static_cast<u8>(i_.reg * 8);
            u_.src = offset(from, i_.rm);
            if (!i_.has_mem)
                u_.run = extend_handler(i_.opsize, from, op >= 0xbe);
            else if (memory_ok_)
                u_.run = extend_load_handler(i_.opsize, from, op >= 0xbe, kind_);
        } else if (op == 0xa3 && !i_.has_mem) {
            operands(i_.opsize, i_.rm, i_.reg);
            u_.run = bit_test_handler(i_.opsize, false);
        } else if (op == 0xba && (i_.modrm >> 3 & 7) == 4 && !i_.has_mem) {
            operands(i_.opsize, i_.rm, 0);
            u_.imm = static_cast<u32>(i_.imm);
            u_.run = bit_test_handler(i_.opsize, true);
        } else if (op >= 0xc8 && op <= 0xcf) {
            operands(i_.opsize, i_.rm, 0);
            u_.run = byte_swap_handler(i_.opsize);
        } else if (op == 0x1f || (op == 0x1e && !i_.has_mem)) {
            nop_ = row_.mnemonic == "nop" || row_.mnemonic == "endbr64";
        }
    }

    const Insn& i_;
    const OpInfo& row_;
    const TranslateContext& context_;
    Uop u_{};
    AddressKind kind_ = kAddressBase;
    bool long64_ = false;
    bool flat_ = false;
    bool memory_ok_ = false;
    bool nop_ = false;  // nothing to run at all: it is counted with its block
};

bool is_jcc(const Insn& insn, const OpInfo& row) {
    return (row.map == Map::One && insn.opcode >= 0x70 && insn.opcode <= 0x7f) ||
           (row.map == Map::M0F && insn.opcode >= 0x80 && insn.opcode <= 0x8f);
}

}  // namespace

bool emit_fast(const Insn& insn, const OpInfo& row, const TranslateContext& context,
               std::vector<Uop>& uops) {
    return FastUop(insn, row, context).emit(uops);
}

bool emit_fused(const Insn& first, const Insn& second, const TranslateContext& context,
                std::vector<Uop>& uops) {
    const OpInfo& row = op_info(second.op);
    if (!is_jcc(second, row)) return false;
    bool long64 = (context.mode & kModeCodeSize) == static_cast<u32>(CodeSize::k64);
    bool flat32 = (context.mode & kModeProtected) && !(context.mode & kModeSegCheck) &&
                  (context.mode & kModeCodeSize) == static_cast<u32>(CodeSize::k32);
    if (!long64 && !(flat32 && second.opsize == 4)) return false;
    FastUop compare(first, op_info(first.op), context);
    bool test, immediate;
    if (!compare.comparison(test, immediate)) return false;
    Uop& u = compare.uop();
    u.run = fused_handler(test, u.size, immediate, second.opcode & 15);
    if (u.run == nullptr) return false;
    u.length = static_cast<u8>(first.length + second.length);
    u64 target = context.ip + u.length + second.imm;
    u.disp = long64 ? target : static_cast<u32>(target);
    uops.push_back(u);
    return true;
}

const Uop* run_slowly(const Uop* u, VcpuFrame* f, u64 linear, bool write) {
    // Checks that come before a page fault: alignment, and the end of a flat 4 GB segment.
    if ((f->mode & kModeAlignCheck) || (!f->long64() && linear > 0xfffffff8))
        return run_generic(u, f);
    if (!fill_tlb(*f, linear, write, u->seg)) return leave_fault(u, f);
    // The page is in the TLB now if it may be there and the access does not leave it; the handler
    // must not be run again otherwise, or it would come back for ever.
    unsigned n = (linear >> kPageShift) & 255;
    u64 in_page = linear & kPageMask;
    u64 neg = write ? f->tlb_now->neg_w[n] : f->tlb_now->neg_r[n];
    if (linear + neg == in_page && in_page <= kPageSize - 8) PV_GO(u);
    return run_generic(u, f);
}

namespace {

enum class Generic : u8 { kNext, kLeaveBlock, kFault, kAfter };

/// The work of run_generic(), apart from it: with the addresses of locals given away, the compiler
/// cannot make its jump to the next handler a tail call, and a loop of MMIO would fill the host's
/// stack.
[[gnu::noinline, gnu::cold]] Generic execute_generic(const Uop* u, VcpuFrame* f) {
    SoftVcpu& vcpu = *f->vcpu;
    const Block& block = *f->block;
    u8 bytes[16] = {};
    u64 gpa = block.gpa + u->offset;
    u64 in_page = kPageSize - (gpa & kPageMask);
    u64 here = std::min<u64>(in_page, 15);
    if (auto span = vcpu.env.memory.span(Gpa(gpa), here); !span.empty()) {
        std::memcpy(bytes, span.data(), here);
    }
    if (block.gpa2 != ~u64{0} && here < 15) {
        if (auto span = vcpu.env.memory.span(Gpa(block.gpa2), 15 - here); !span.empty()) {
            std::memcpy(bytes + here, span.data(), 15 - here);
        }
    }
    OpInsn o{};
    decode({bytes, 15}, f->code_size(), vcpu.env.cpuid.features, o.insn);
    o.operation = operation_of(o.insn.op);
    u64 next = block.ip + u->offset + o.insn.length;
    if (o.insn.has_mem && o.insn.base == kRipReg) {
        o.insn.base = kNoReg;
        o.insn.disp = static_cast<s64>(next + static_cast<u64>(o.insn.disp));
    }
    f->uop = u;
    bool ends = op_info(o.insn.op).attrs & kEndsBlock;
    if (ends) f->rip = f->long64() ? next : static_cast<u32>(next);
    u64 ea = o.insn.has_mem ? effective_address(*f, o.insn) : 0;
    if (!o.operation(*f, o.insn, ea)) {
        return ends && f->fault.trap ? Generic::kLeaveBlock : Generic::kFault;
    }
    if (ends) {
        f->link_slot_valid = false;
        return Generic::kLeaveBlock;
    }
    return f->block_dead ? Generic::kAfter : Generic::kNext;
}

}  // namespace

const Uop* run_generic(const Uop* u, VcpuFrame* f) {
    switch (execute_generic(u, f)) {
        case Generic::kNext:
            break;
        case Generic::kLeaveBlock:
            return nullptr;
        case Generic::kFault:
            return leave_fault(u, f);
        case Generic::kAfter:
            return leave_after(u, f);
    }
    PV_NEXT;
}

}  // namespace polyvisor::soft
