#include "host/init/messages.hpp"

#include <linux/socket.h>
#include <linux/uio.h>

#include "host/init/report.hpp"
#include "host/init/sys.hpp"

namespace polyvisor::host::init {

namespace {

constexpr int kSolSocket = 1, kScmRights = 1, kNoSignal = 0x4000, kCmsgCloexec = 0x40000000;
constexpr int kProtReadWrite = 3, kMapPrivateAnonymous = 0x22;
constexpr int kFailed = 125;

// struct msghdr and cmsghdr: their header is a C library's.
struct MessageHeader {
    void* name;
    u32 name_size;
    iovec* parts;
    u64 part_count;
    void* control;
    u64 control_size;
    u32 flags;
};
struct ControlHeader {
    u64 size;
    int level;
    int type;
};
template <unsigned Count>
struct Rights {
    ControlHeader header;
    int fds[Count];
};

volatile bool failed;

[[noreturn]] void end() {
    for (;;) sys(__NR_exit_group, kFailed);
}

void copy_text(char* to, std::size_t size, const char* from) {
    std::size_t i = 0;
    for (; from != nullptr && from[i] != '\0' && i + 1 < size; ++i) to[i] = from[i];
    to[i] = '\0';
}

void send(const WireReport& report, int fd) {
    iovec part{const_cast<WireReport*>(&report), sizeof report};
    Rights<1> rights{{sizeof(ControlHeader) + sizeof(int), kSolSocket, kScmRights}, {fd}};
    MessageHeader header{};
    header.parts = &part;
    header.part_count = 1;
    if (fd >= 0) {
        header.control = &rights;
        header.control_size = sizeof rights;
    }
    while (sys(__NR_sendmsg, kControlFd, &header, kNoSignal) == -kEintr) {
    }
}

}  // namespace

Received receive_message() {
    Received result{};
    u64 size = 0;
    iovec part{&size, sizeof size};
    Rights<kMaxFds> rights{};
    MessageHeader header{};
    header.parts = &part;
    header.part_count = 1;
    header.control = &rights;
    header.control_size = sizeof rights;
    // (No signal interrupts: all are blocked.)
    if (sys(__NR_recvmsg, kControlFd, &header, kCmsgCloexec) != sizeof size) end();
    if (header.control_size > sizeof(ControlHeader)) {
        result.fd_count =
            static_cast<unsigned>((rights.header.size - sizeof(ControlHeader)) / sizeof(int));
        for (unsigned i = 0; i < result.fd_count; ++i) result.fds[i] = rights.fds[i];
    }
    const long memory =
        check(sys(__NR_mmap, 0, size, kProtReadWrite, kMapPrivateAnonymous, -1, 0), "get memory");
    auto* base = reinterpret_cast<u8*>(memory);
    *reinterpret_cast<u64*>(base) = size;
    for (u64 done = sizeof size; done < size;) {
        const long got = sys(__NR_read, kControlFd, base + done, size - done);
        if (got <= 0) end();
        done += static_cast<u64>(got);
    }
    result.message.base = base;
    return result;
}

void send_terminal(int fd) {
    send({ReportKind::kTerminal, 0, {}, {}}, fd);
}

void report(ReportKind kind, int code) {
    send({kind, code, {}, {}}, -1);
}

void fail(long error, const char* what, const char* path) {
    WireReport report{ReportKind::kFailed, static_cast<s32>(-error), {}, {}};
    copy_text(report.what, sizeof report.what, what);
    copy_text(report.path, sizeof report.path, path);
    send(report, -1);
    failed = true;
    end();
}

bool has_failed() {
    return failed;
}

}  // namespace polyvisor::host::init

// The compiler calls these by itself.
extern "C" void* memcpy(void* to, const void* from, std::size_t size) {
    auto* target = static_cast<unsigned char*>(to);
    const auto* source = static_cast<const unsigned char*>(from);
    for (std::size_t i = 0; i < size; ++i) target[i] = source[i];
    return to;
}

extern "C" void* memset(void* to, int value, std::size_t size) {
    auto* target = static_cast<unsigned char*>(to);
    for (std::size_t i = 0; i < size; ++i) target[i] = static_cast<unsigned char>(value);
    return to;
}
