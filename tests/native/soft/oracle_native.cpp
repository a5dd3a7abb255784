// The child maps the oracle's pages at their fixed addresses and stops. For each case the tracer
// writes code and data through its own mapping of the same memory, sets all registers, and lets the
// child go on: by single step when the instruction may transfer control, else until the INT3 that
// stands behind it, because a trap flag would show in what PUSHF stores and would stop REP after
// every iteration. Signals that the instruction raises are caught by the tracer and never
// delivered.
#include "oracle_native.hpp"

#include <asm/ldt.h>
#include <cpuid.h>
#include <elf.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "soft/frame.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::soft;

namespace {

constexpr u16 kUserCs64 = 0x33, kUserCs32 = 0x23, kUserData = 0x2b;  // Linux's selectors
constexpr unsigned kXstateBv = 512;

bool make_segment(u64 base, bool code, u16 selector) {
    user_desc segment{};
    segment.entry_number = selector >> 3;
    segment.base_addr = static_cast<unsigned>(base);
    segment.limit = kSegmentSize - 1;
    segment.contents = code ? MODIFY_LDT_CONTENTS_CODE : MODIFY_LDT_CONTENTS_DATA;
    segment.useable = 1;
    constexpr int kWrite = 0x11;
    return syscall(SYS_modify_ldt, kWrite, &segment, sizeof segment) == 0;
}

// Async-signal-safe: only system calls.
[[noreturn]] void child_main(int code_fd, int data_fd) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    auto map = [](u64 address, u64 size, int prot, int fd, u64 offset) {
        void* at = mmap(reinterpret_cast<void*>(address), size, prot,
                        MAP_SHARED | MAP_FIXED_NOREPLACE, fd, static_cast<off_t>(offset));
        if (at != reinterpret_cast<void*>(address)) _exit(2);
    };
    map(kCodeBase, kCodeSize, PROT_READ | PROT_EXEC, code_fd, 0);
    map(kDataBase, kWritableSize, PROT_READ | PROT_WRITE, data_fd, 0);
    map(kDataBase + kWritableSize, kDataSize - kWritableSize, PROT_READ, data_fd, kWritableSize);
    bool ldt = make_segment(kData16Base, false, kData16Selector);
    for (u64 at = kCodeBase; ldt && at < kCodeBase + kCodeSize; at += kSegmentSize) {
        ldt = make_segment(at, true, code16_selector(at));
    }
    *reinterpret_cast<volatile u8*>(kDataBase) = ldt;
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(3);
    raise(SIGSTOP);
    _exit(0);
}

}  // namespace

NativeCpu::NativeCpu() {
    start();
}

void NativeCpu::start() {
    unsigned eax, ebx, ecx, edx;
    __cpuid_count(0xd, 0, eax, ebx, ecx, edx);
    xstate_.resize(ecx < 1024 ? 1024 : ecx);
    __cpuid_count(0xd, 2, eax, ebx, ecx, edx);
    ymm_offset_ = ebx;

    int code_fd = memfd_create("oracle-code", MFD_CLOEXEC);
    int data_fd = memfd_create("oracle-data", MFD_CLOEXEC);
    if (code_fd < 0 || data_fd < 0 || ftruncate(code_fd, kCodeSize) != 0 ||
        ftruncate(data_fd, kDataSize) != 0) {
        unusable_ = "memfd_create failed";
        return;
    }
    code_ =
        static_cast<u8*>(mmap(nullptr, kCodeSize, PROT_READ | PROT_WRITE, MAP_SHARED, code_fd, 0));
    data_ =
        static_cast<u8*>(mmap(nullptr, kDataSize, PROT_READ | PROT_WRITE, MAP_SHARED, data_fd, 0));
    child_ = fork();
    if (child_ == 0) child_main(code_fd, data_fd);
    close(code_fd);
    close(data_fd);
    int status = 0;
    if (child_ < 0 || waitpid(child_, &status, 0) != child_ || !WIFSTOPPED(status)) {
        unusable_ = WIFEXITED(status) && WEXITSTATUS(status) == 3 ? "ptrace is not permitted here"
                                                                  : "the child did not start";
        child_ = -1;
        return;
    }
    has_16bit_ = data_[0];
    ptrace(PTRACE_SETOPTIONS, child_, nullptr, PTRACE_O_EXITKILL);
}

NativeCpu::~NativeCpu() {
    if (child_ > 0) {
        kill(child_, SIGKILL);
        waitpid(child_, nullptr, 0);
    }
    if (code_) munmap(code_, kCodeSize);
    if (data_) munmap(data_, kDataSize);
}

bool NativeCpu::set_state(const Case& c) {
    const UserState& s = c.before;
    user_regs_struct regs{};
    unsigned long long* const kOrder[16] = {
        &regs.rax, &regs.rcx, &regs.rdx, &regs.rbx, &regs.rsp, &regs.rbp, &regs.rsi, &regs.rdi,
        &regs.r8,  &regs.r9,  &regs.r10, &regs.r11, &regs.r12, &regs.r13, &regs.r14, &regs.r15};
    for (unsigned n = 0; n < 16; ++n) *kOrder[n] = s.gpr[n];
    regs.rip = s.rip;
    regs.eflags = s.rflags | kFlagI;
    regs.orig_rax = ~0ull;  // not in a system call: nothing to restart
    regs.ss = kUserData;
    bool compat = c.size == CodeSize::k32;
    regs.cs = compat ? kUserCs32 : kUserCs64;
    regs.ds = regs.es = compat ? kUserData : 0;
    if (c.size == CodeSize::k16) {
        regs.cs = code16_selector(c.code_address);
        regs.ds = regs.es = regs.ss = kData16Selector;
    }
    regs.fs_base = s.fs_base;
    regs.gs_base = s.gs_base;
    if (ptrace(PTRACE_SETREGS, child_, nullptr, &regs) != 0) return false;

    std::memset(xstate_.data(), 0, xstate_.size());
    std::memcpy(xstate_.data(), s.legacy, 464);
    u64 components = 3;
    if (ymm_offset_) {
        components = 7;
        std::memcpy(xstate_.data() + ymm_offset_, s.ymm_high, sizeof s.ymm_high);
    }
    std::memcpy(xstate_.data() + kXstateBv, &components, sizeof components);
    iovec area{xstate_.data(), xstate_.size()};
    return ptrace(PTRACE_SETREGSET, child_, NT_X86_XSTATE, &area) == 0;
}

bool NativeCpu::get_state(UserState& s) {
    user_regs_struct regs;
    if (ptrace(PTRACE_GETREGS, child_, nullptr, &regs) != 0) return false;
    const unsigned long long order[16] = {
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
        regs.r8,  regs.r9,  regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15};
    for (unsigned n = 0; n < 16; ++n) s.gpr[n] = order[n];
    s.rip = regs.rip;
    s.rflags = regs.eflags;
    s.fs_base = regs.fs_base;
    s.gs_base = regs.gs_base;
    iovec area{xstate_.data(), xstate_.size()};
    if (ptrace(PTRACE_GETREGSET, child_, NT_X86_XSTATE, &area) != 0) return false;
    std::memcpy(s.legacy, xstate_.data(), sizeof s.legacy);
    if (ymm_offset_) std::memcpy(s.ymm_high, xstate_.data() + ymm_offset_, sizeof s.ymm_high);
    return true;
}

void NativeCpu::classify(Outcome& outcome, int signal, const Case& c) {
    siginfo_t info{};
    ptrace(PTRACE_GETSIGINFO, child_, nullptr, &info);
    const OpInfo& row = op_info(c.op);
    switch (signal) {
        case SIGILL:
            outcome.vector = kUd;
            break;
        case SIGFPE:
            if (info.si_code == FPE_INTDIV) {
                outcome.vector = kDe;
            } else {
                outcome.vector = row.attrs & (kFpu | kMmx) ? kMf : kXm;
            }
            break;
        case SIGBUS:
            outcome.vector = info.si_code == BUS_ADRALN ? kAcFault : kSsFault;
            break;
        case SIGSEGV:
            if (info.si_code == SEGV_MAPERR || info.si_code == SEGV_ACCERR) {
                outcome.vector = kPf;
                outcome.has_address = true;
                outcome.address = reinterpret_cast<u64>(info.si_addr);
            } else {
                outcome.vector = kVectorGpLike;
            }
            break;
        default:
            outcome.alive = false;
            outcome.text = strsignal(signal);
    }
}

Outcome NativeCpu::run(const Case& c) {
    Outcome outcome;
    auto failed = [&](const char* text) {
        outcome.alive = false;
        outcome.text = text;
        return outcome;
    };
    u8* slot = code_ + (c.code_address - kCodeBase);
    std::memset(slot, 0xcc, kCodeSlot);
    std::memcpy(slot, c.code, c.insn.length);
    std::memcpy(data_, c.data.data(), kDataSize);
    if (!set_state(c)) return failed("setting the child's registers failed");
    bool step = op_info(c.op).attrs & kEndsBlock;
    if (ptrace(step ? PTRACE_SINGLESTEP : PTRACE_CONT, child_, nullptr, nullptr) != 0) {
        return failed("the child cannot be continued");
    }
    int status;
    if (waitpid(child_, &status, 0) != child_ || !WIFSTOPPED(status)) {
        child_ = -1;
        return failed("the child ended");
    }
    if (!get_state(outcome.after)) return failed("reading the child's registers failed");
    if (WSTOPSIG(status) == SIGTRAP) {
        if (!step) --outcome.after.rip;  // behind the INT3
    } else {
        classify(outcome, WSTOPSIG(status), c);
    }
    std::memcpy(outcome.data.data(), data_, kDataSize);
    return outcome;
}

}  // namespace pvtest
