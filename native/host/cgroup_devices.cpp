#include "host/cgroup_devices.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "base/fd.hpp"

namespace polyvisor::host {

namespace {

constexpr u8 kAccess = BPF_REG_2, kType = BPF_REG_3, kMajor = BPF_REG_4, kMinor = BPF_REG_5;
constexpr u8 kScratch = BPF_REG_6;

bpf_insn insn(int code, u8 dst, u8 src, int offset, s32 value) {
    bpf_insn result{};
    result.code = static_cast<u8>(code);
    result.dst_reg = dst & 0xf;
    result.src_reg = src & 0xf;
    result.off = static_cast<s16>(offset);
    result.imm = value;
    return result;
}

bpf_insn load(u8 dst, std::size_t offset) {
    return insn(BPF_LDX | BPF_MEM | BPF_W, dst, BPF_REG_1, static_cast<int>(offset), 0);
}

bpf_insn alu(int operation, u8 dst, s32 value) {
    return insn(BPF_ALU | operation | BPF_K, dst, 0, 0, value);
}

bpf_insn copy(u8 dst, u8 src) {
    return insn(BPF_ALU | BPF_MOV | BPF_X, dst, src, 0, 0);
}

s32 access_bits(const DeviceRule& rule) {
    return (rule.read ? BPF_DEVCG_ACC_READ : 0) | (rule.write ? BPF_DEVCG_ACC_WRITE : 0) |
           (rule.make ? BPF_DEVCG_ACC_MKNOD : 0);
}

// One rule: every comparison that fails goes on to the next rule.
std::vector<bpf_insn> rule_code(const DeviceRule& rule) {
    std::vector<bpf_insn> code;
    std::vector<std::size_t> jumps;
    auto unless_equal = [&](u8 reg, s32 value) {
        jumps.push_back(code.size());
        code.push_back(insn(BPF_JMP32 | BPF_JNE | BPF_K, reg, 0, 0, value));
    };
    unless_equal(kType, rule.type == 'b' ? BPF_DEVCG_DEV_BLOCK : BPF_DEVCG_DEV_CHAR);
    code.push_back(copy(kScratch, kAccess));
    code.push_back(alu(BPF_AND, kScratch, ~access_bits(rule)));
    unless_equal(kScratch, 0);
    if (rule.major) unless_equal(kMajor, static_cast<s32>(*rule.major));
    if (rule.minor) unless_equal(kMinor, static_cast<s32>(*rule.minor));
    code.push_back(alu(BPF_MOV, BPF_REG_0, 1));
    code.push_back(insn(BPF_JMP | BPF_EXIT, 0, 0, 0, 0));
    for (std::size_t at : jumps) code[at].off = static_cast<s16>(code.size() - at - 1);
    return code;
}

long bpf(int command, bpf_attr& attr) {
    return ::syscall(SYS_bpf, command, &attr, sizeof attr);
}

}  // namespace

std::vector<bpf_insn> device_program(const std::vector<DeviceRule>& rules) {
    std::vector<bpf_insn> code{
        load(kAccess, offsetof(bpf_cgroup_dev_ctx, access_type)),
        load(kMajor, offsetof(bpf_cgroup_dev_ctx, major)),
        load(kMinor, offsetof(bpf_cgroup_dev_ctx, minor)),
        copy(kType, kAccess),
        alu(BPF_AND, kType, 0xffff),
        alu(BPF_RSH, kAccess, 16),
    };
    for (const DeviceRule& rule : rules) {
        auto more = rule_code(rule);
        code.insert(code.end(), more.begin(), more.end());
    }
    code.push_back(alu(BPF_MOV, BPF_REG_0, 0));
    code.push_back(insn(BPF_JMP | BPF_EXIT, 0, 0, 0, 0));
    return code;
}

int attach_devices(int cgroup, const std::optional<std::vector<DeviceRule>>& rules) {
    std::array<u32, 64> before{};
    bpf_attr query{};
    query.query.target_fd = static_cast<u32>(cgroup);
    query.query.attach_type = BPF_CGROUP_DEVICE;
    query.query.prog_ids = reinterpret_cast<u64>(before.data());
    query.query.prog_cnt = before.size();
    // Who may not even ask (or whose kernel has no such programs) has put none there to take away.
    if (bpf(BPF_PROG_QUERY, query) < 0) return rules ? errno : 0;

    if (rules) {
        auto code = device_program(*rules);
        static constexpr char kLicense[] = "Apache-2.0";
        bpf_attr load_attr{};
        load_attr.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
        load_attr.expected_attach_type = BPF_CGROUP_DEVICE;
        load_attr.insns = reinterpret_cast<u64>(code.data());
        load_attr.insn_cnt = static_cast<u32>(code.size());
        load_attr.license = reinterpret_cast<u64>(kLicense);
        OwnedFd program(static_cast<int>(bpf(BPF_PROG_LOAD, load_attr)));
        if (!program) return errno;
        bpf_attr attach{};
        attach.target_fd = static_cast<u32>(cgroup);
        attach.attach_bpf_fd = static_cast<u32>(program.get());
        attach.attach_type = BPF_CGROUP_DEVICE;
        attach.attach_flags = BPF_F_ALLOW_MULTI;  // as systemd's: those above have a say, too
        if (bpf(BPF_PROG_ATTACH, attach) < 0) return errno;
    }
    // All programs of a cgroup have to agree, so that nothing is allowed meanwhile that neither
    // did.
    for (u32 i = 0; i < query.query.prog_cnt; ++i) {
        bpf_attr by_id{};
        by_id.prog_id = before[i];
        OwnedFd old(static_cast<int>(bpf(BPF_PROG_GET_FD_BY_ID, by_id)));
        if (!old) return errno;
        bpf_attr detach{};
        detach.target_fd = static_cast<u32>(cgroup);
        detach.attach_bpf_fd = static_cast<u32>(old.get());
        detach.attach_type = BPF_CGROUP_DEVICE;
        if (bpf(BPF_PROG_DETACH, detach) < 0) return errno;
    }
    return 0;
}

}  // namespace polyvisor::host
