#include "process/trace.hpp"

#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "process/signatures.hpp"
#include "process/thread.hpp"

namespace polyvisor::process {

namespace {

u64 now() {
    timespec time{};
    ::clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<u64>(time.tv_sec) * 1'000'000'000 + static_cast<u64>(time.tv_nsec);
}

// How many bytes of UTF-8 a character has that begins here; 0: it is none.
std::size_t character(std::string_view text) {
    const auto first = static_cast<unsigned char>(text.front());
    const std::size_t size = first < 0x80   ? 1
                             : first < 0xc2 ? 0
                             : first < 0xe0 ? 2
                             : first < 0xf0 ? 3
                             : first < 0xf5 ? 4
                                            : 0;
    if (text.size() < size) return 0;
    u32 value = size <= 1 ? first : first & (0x7fu >> size);
    for (std::size_t n = 1; n < size; ++n) {
        const auto byte = static_cast<unsigned char>(text[n]);
        if ((byte & 0xc0) != 0x80) return 0;
        value = value << 6 | (byte & 0x3f);
    }
    constexpr u32 kLeast[] = {0, 0, 0x80, 0x800, 0x1'0000};
    if (value < kLeast[size] || value > 0x10'ffff || (value >= 0xd800 && value < 0xe000)) return 0;
    return size;
}

// Bytes that are no UTF-8 become what Python's os.fsdecode() makes of them.
std::string json_string(std::string_view text) {
    std::string result = "\"";
    while (!text.empty()) {
        const auto first = static_cast<unsigned char>(text.front());
        const std::size_t size = character(text);
        char escaped[8];
        if (size == 0 || first < ' ') {
            std::snprintf(escaped, sizeof escaped, "\\u%04x", size == 0 ? 0xdc00u + first : first);
            result += escaped;
        } else {
            if (first == '"' || first == '\\') result += '\\';
            result += text.substr(0, size);
        }
        text.remove_prefix(std::max<std::size_t>(size, 1));
    }
    return result + "\"";
}

std::string seconds(u64 nanoseconds) {
    char text[32];
    std::snprintf(text, sizeof text, "%llu.%09llu",
                  static_cast<unsigned long long>(nanoseconds / 1'000'000'000),
                  static_cast<unsigned long long>(nanoseconds % 1'000'000'000));
    return text;
}

std::string code_name(const siginfo_t& info) {
    struct Code {
        int signal, code;  // signal 0: any
        const char* name;
    };
    constexpr Code kCodes[] = {{0, SI_USER, "SI_USER"},
                               {0, SI_TKILL, "SI_TKILL"},
                               {0, SI_QUEUE, "SI_QUEUE"},
                               {0, SI_TIMER, "SI_TIMER"},
                               {0, SI_KERNEL, "SI_KERNEL"},
                               {SIGSEGV, SEGV_MAPERR, "SEGV_MAPERR"},
                               {SIGSEGV, SEGV_ACCERR, "SEGV_ACCERR"},
                               {SIGBUS, BUS_ADRALN, "BUS_ADRALN"},
                               {SIGBUS, BUS_ADRERR, "BUS_ADRERR"},
                               {SIGFPE, FPE_INTDIV, "FPE_INTDIV"},
                               {SIGILL, ILL_ILLOPN, "ILL_ILLOPN"},
                               {SIGTRAP, TRAP_BRKPT, "TRAP_BRKPT"},
                               {SIGTRAP, TRAP_TRACE, "TRAP_TRACE"},
                               {SIGCHLD, CLD_EXITED, "CLD_EXITED"},
                               {SIGCHLD, CLD_KILLED, "CLD_KILLED"},
                               {SIGCHLD, CLD_STOPPED, "CLD_STOPPED"},
                               {SIGCHLD, CLD_CONTINUED, "CLD_CONTINUED"}};
    for (const Code& one : kCodes) {
        if (one.code == info.si_code && (one.signal == 0 || one.signal == info.si_signo)) {
            return one.name;
        }
    }
    return std::to_string(info.si_code);
}

template <class Items, class Text>
std::string join(const Items& items, Text text) {
    std::string result;
    for (const auto& item : items) {
        if (!result.empty()) result += ", ";
        result += text(item);
    }
    return result;
}

}  // namespace

// --- Events --------------------------------------------------------------------------------------

std::string Event::line() const {
    if (kind == Kind::kSignal) return "--- " + text + " ---";
    if (kind == Kind::kEnd) return "+++ " + text + " +++";
    std::string call =
        system_call_name(number) + "(" + join(texts, [](const std::string& one) { return one; });
    const bool ends = number == SYS_exit || number == SYS_exit_group;
    call += finished || ends ? ")" : " <unfinished ...>)";
    if (call.size() < 39) call.resize(39, ' ');  // as strace aligns results
    return call + " = " + (finished ? describe_result(number, result) : "?");
}

std::string Event::json() const {
    constexpr const char* kNames[] = {"call", "signal", "end"};
    std::string object = "{\"type\": \"" + std::string(kNames[static_cast<unsigned>(kind)]) +
                         "\", \"pid\": " + std::to_string(pid) +
                         ", \"tid\": " + std::to_string(tid) + ", \"start\": " + seconds(start);
    if (kind != Kind::kCall) return object + ", \"text\": " + json_string(text) + "}";
    object +=
        ", \"duration\": " + seconds(nanoseconds) +
        ", \"name\": " + json_string(system_call_name(number)) + ", \"args\": [" +
        join(arguments, [](u64 value) { return std::to_string(value); }) + "], \"text\": [" +
        join(texts, json_string) + "], \"strings\": {" +
        join(strings,
             [](const auto& string) {
                 return "\"" + std::to_string(string.first) + "\": " + json_string(string.second);
             }) +
        "}, \"result\": " + (finished ? std::to_string(result) : "null");
    const bool failed = finished && result < 0 && result > -4096;
    const char* name = failed ? ::strerrorname_np(static_cast<int>(-result)) : nullptr;
    return object + ", \"errno\": " + (name == nullptr ? "null" : json_string(name)) + "}";
}

std::size_t Event::size() const {
    std::size_t bytes = sizeof *this + text.size();
    for (const std::string& one : texts) bytes += sizeof one + one.size();
    for (const auto& [number, one] : strings) bytes += sizeof one + one.size();
    return bytes;
}

// --- The trace -----------------------------------------------------------------------------------

Trace::Trace(TraceConfig config) : config_(std::move(config)), begin_(now()) {
    struct stat about{};
    if (config_.fd && ::fstat(config_.fd.get(), &about) == 0) {
        may_block_ = !S_ISREG(about.st_mode);
    }
}

Event Trace::enter(Thread& thread, u32 number, const Arguments& arguments) {
    Event event;
    event.number = number;
    event.arguments = arguments;
    const Signature* signature = find_signature(number);
    for (unsigned n = 0; n < count_arguments(signature, arguments); ++n) {
        const Kind kind = signature == nullptr ? Kind::kHex : signature->kinds[n];
        event.texts.push_back(describe(thread, kind, arguments, n, std::nullopt));
        if (kind != Kind::kPath || arguments[n] == 0) continue;
        if (auto path = thread.show_string(arguments[n])) {
            event.strings.emplace_back(n, std::move(*path));
        }
    }
    return event;
}

void Trace::leave(Thread& thread, Event event, s64 result, u64 begin, u64 took) {
    event.start = since_begin(begin);
    event.nanoseconds = took;
    event.finished = !thread.ending;
    event.result = result;
    const Signature* signature = find_signature(event.number);
    for (unsigned n = 0; event.finished && signature != nullptr && n < event.texts.size(); ++n) {
        if (signature->kinds[n] < Kind::kOut) continue;
        event.texts[n] = describe(thread, signature->kinds[n], event.arguments, n, result);
    }
    event.pid = thread.process().pid;
    event.tid = thread.tid();
    add(thread, std::move(event));
}

void Trace::signal(Thread& thread, const siginfo_t& info) {
    Event event;
    event.kind = Event::Kind::kSignal;
    event.pid = thread.process().pid;
    event.tid = thread.tid();
    event.start = since_begin(now());
    const std::string name = signal_name(info.si_signo);
    event.text = name + " {si_signo=" + name + ", si_code=" + code_name(info);
    if (info.si_signo == SIGSEGV || info.si_signo == SIGBUS || info.si_signo == SIGILL ||
        info.si_signo == SIGFPE) {
        event.text += ", si_addr=" + hexadecimal(reinterpret_cast<u64>(info.si_addr));
    } else if (info.si_code <= 0 || info.si_signo == SIGCHLD) {
        event.text += ", si_pid=" + std::to_string(info.si_pid);
    }
    event.text += "}";
    add(thread, std::move(event));
}

void Trace::end(Thread& last, const Process& process) {
    Event event;
    event.kind = Event::Kind::kEnd;
    event.pid = event.tid = process.pid;
    event.start = since_begin(now());
    const End& how = process.end;
    if (how.reason == End::Reason::kExited) {
        event.text = "exited with " + std::to_string(how.status);
    } else {
        event.text = "killed by " +
                     signal_name(how.reason == End::Reason::kSignal ? how.signal : int{SIGKILL});
    }
    add(last, std::move(event));
}

std::deque<Event> Trace::take() {
    bytes_ = 0;
    return std::exchange(events_, {});
}

void Trace::add(Thread& thread, Event event) {
    if (config_.fd) {
        std::string text;
        if (config_.json) {
            text = event.json();
        } else {
            if (event.tid != Kernel::kFirstPid || thread.kernel().threads() > 1) {
                text = "[pid " + std::to_string(event.tid) + "] ";
            }
            text += event.line();
        }
        write(thread, text + "\n");
    }
    if (config_.events == 0) return;
    bytes_ += event.size();
    events_.push_back(std::move(event));
    while (events_.size() > config_.events || bytes_ > kMostBytes) {
        bytes_ -= events_.front().size();
        events_.pop_front();
        ++lost_;
    }
}

// A pipe that nobody reads must not stop others who need the lock, nor the thread's end.
void Trace::write(Thread& thread, const std::string& text) {
    constexpr std::size_t kAtOnce = 4096;  // that a pipe takes at once when it takes anything
    for (std::size_t done = 0; done < text.size();) {
        pollfd ready{config_.fd.get(), POLLOUT, 0};
        while (may_block_ && ::poll(&ready, 1, 0) == 0) {
            if (thread.ending) {
                ++lost_;
                return;
            }
            Thread::Unlocked unlocked(thread);
            ::poll(&ready, 1, 100);
        }
        const ssize_t written =
            ::write(config_.fd.get(), text.data() + done, std::min(text.size() - done, kAtOnce));
        if (written <= 0) {
            ++lost_;
            return;
        }
        done += static_cast<std::size_t>(written);
    }
}

}  // namespace polyvisor::process
