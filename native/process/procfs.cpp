#include "process/procfs.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/sysmacros.h>
#include <time.h>

#include <algorithm>
#include <charconv>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <optional>

#include "process/thread.hpp"

namespace polyvisor::process {

namespace {

using Text = std::function<std::string()>;
using Entries = std::vector<MadeFile::Entry>;

[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, pattern);
    const int size = std::vsnprintf(text, sizeof text, pattern, arguments);
    va_end(arguments);
    return std::string(text, std::min<std::size_t>(static_cast<std::size_t>(size), sizeof text));
}

std::shared_ptr<const MadeFile> file(Text text, mode_t mode = 0444) {
    return std::make_shared<MadeFile>(MadeFile{.mode = S_IFREG | mode, .text = std::move(text)});
}

std::shared_ptr<const MadeFile> file(std::string text) {
    return file([text = std::move(text)] { return text; });
}

std::shared_ptr<const MadeFile> link(std::string target, std::shared_ptr<OpenFile> open = {}) {
    return std::make_shared<MadeFile>(
        MadeFile{.mode = S_IFLNK | 0777, .target = std::move(target), .open = std::move(open)});
}

std::shared_ptr<const MadeFile> folder(std::function<Entries()> entries) {
    return std::make_shared<MadeFile>(
        MadeFile{.mode = S_IFDIR | 0555, .entries = std::move(entries)});
}

std::optional<int> number(const std::string& text) {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size() || value < 0) return std::nullopt;
    return value;
}

// --- One process ---------------------------------------------------------------------------------

char state_of(const Process& process) {
    return process.ended() ? 'Z' : process.signals.stopped ? 'T' : 'R';
}

std::string title_of(const Process& process) {
    return process.threads.empty() ? "ended" : process.threads.front()->title.substr(0, 15);
}

u64 mapped(const Process& process) {
    u64 bytes = 0;
    if (!process.vm) return 0;
    for (const auto& [start, area] : process.space().areas()) bytes += area.end - start;
    return bytes;
}

u64 used(const Process& process) {
    return process.vm ? process.space().used() : 0;
}

std::string maps(const Process& process) {
    std::string text;
    if (!process.vm) return text;
    for (const auto& [start, area] : process.space().areas()) {
        std::string line = format(
            "%08" PRIx64 "-%08" PRIx64 " %c%c%cp %08" PRIx64 " 00:%02x %-10" PRIu64, start,
            area.end, area.rights & kReadable ? 'r' : '-', area.rights & kWritable ? 'w' : '-',
            area.rights & kExecutable ? 'x' : '-', area.offset, area.file ? 1 : 0,
            area.file ? made_inode(area.name) % 1'000'000 : 0);
        if (!area.name.empty()) {
            line.resize(std::max<std::size_t>(line.size(), 73), ' ');
            line += area.name;
        }
        text += line + "\n";
    }
    return text;
}

std::string status(const Process& process) {
    std::string text =
        format("Name:\t%s\nUmask:\t%04o\nState:\t%c\nTgid:\t%d\nPid:\t%d\nPPid:\t%d\n",
               title_of(process).c_str(), process.umask, state_of(process), process.pid,
               process.pid, process.parent);
    text += "TracerPid:\t0\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n";
    text += format("FDSize:\t%zu\nGroups:\t\n", process.descriptors.size());
    text += format("VmPeak:\t%8" PRIu64 " kB\nVmSize:\t%8" PRIu64 " kB\nVmHWM:\t%8" PRIu64
                   " kB\nVmRSS:\t%8" PRIu64 " kB\nVmData:\t%8" PRIu64 " kB\n",
                   mapped(process) >> 10, mapped(process) >> 10, used(process) >> 10,
                   used(process) >> 10, used(process) >> 10);
    text += format("Threads:\t%zu\n", process.threads.size());
    if (!process.ended()) {
        text += format("SigBlk:\t%016" PRIx64 "\n", process.threads.front()->signals.mask);
    }
    return text + "NoNewPrivs:\t1\nSeccomp:\t0\nCpus_allowed:\t1\nCpus_allowed_list:\t0\n";
}

std::string stat_line(const Process& process) {
    constexpr u64 kTick = 10'000'000;
    u64 cpu_time = process.cpu_time;
    for (const Thread* thread : process.threads) cpu_time += thread->cpu_time();
    return format("%d (%s) %c %d %d %d 0 -1 4194304 0 0 0 0 %" PRIu64 " 0 %" PRIu64
                  " 0 20 0 %zu 0 1 %" PRIu64 " %" PRIu64
                  " 18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
                  process.pid, title_of(process).c_str(), state_of(process), process.parent,
                  process.group, process.session, cpu_time / kTick,
                  process.children_cpu_time / kTick, process.threads.size(), mapped(process),
                  used(process) >> 12);
}

std::string limits(const Process& process) {
    std::string text =
        "Limit                     Soft Limit           Hard Limit           Units     \n";
    auto row = [&](const char* name, const std::string& value, const char* unit) {
        text += format("%-25s %-20s %-20s %-10s\n", name, value.c_str(), value.c_str(), unit);
    };
    row("Max cpu time", "unlimited", "seconds");
    row("Max data size", std::to_string(process.kernel().config().vm.memory), "bytes");
    row("Max core file size", "0", "bytes");
    row("Max open files", std::to_string(process.descriptors.most), "files");
    return text;
}

std::string arguments(const Process& process) {
    std::string text;
    for (const std::string& argument : process.arguments) text += argument + '\0';
    return text;
}

Entries open_files(Process& process, u8 type) {
    Entries entries;
    for (u64 n = 0; n < process.descriptors.size(); ++n) {
        if (process.descriptors.find(n) != nullptr) entries.push_back({std::to_string(n), type});
    }
    return entries;
}

std::shared_ptr<const MadeFile> descriptor_info(const OpenFile& open) {
    const off_t position = open.made ? 0 : std::max<off_t>(0, ::lseek(open.fd.get(), 0, SEEK_CUR));
    const int flags = ::fcntl(open.fd.get(), F_GETFL) & ~O_NONBLOCK;
    return file(format("pos:\t%" PRId64 "\nflags:\t0%o\nmnt_id:\t1\n", static_cast<s64>(position),
                       flags | (open.nonblocking ? O_NONBLOCK : 0)));
}

// --- The whole -----------------------------------------------------------------------------------

std::string mount_lines(const Kernel& kernel, bool numbered) {
    std::string text;
    int id = 1;
    auto add = [&](const std::string& at, const char* type, bool writable) {
        const char* options = writable ? "rw" : "ro";
        text += numbered ? format("%d 0 0:%d / %s %s,relatime - %s %s %s\n", id, id, at.c_str(),
                                  options, type, type, options)
                         : format("%s %s %s %s,relatime 0 0\n", type, at.c_str(), type, options);
        ++id;
    };
    for (const Tree::Root& mount : kernel.tree().roots())
        add(mount.at, "polyvisor", mount.writable);
    add("/proc", "proc", false);
    return text;
}

double uptime(const Kernel& kernel) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - kernel.started).count();
}

std::string memory_info(const Kernel& kernel) {
    const u64 total = kernel.config().vm.memory >> 10;
    u64 taken = 0;
    for (const auto& [pid, process] : kernel.processes()) taken += used(*process) >> 10;
    const u64 left = total - std::min(total, taken);
    std::string text;
    for (const auto& [name, value] :
         std::initializer_list<std::pair<const char*, u64>>{{"MemTotal:", total},
                                                            {"MemFree:", left},
                                                            {"MemAvailable:", left},
                                                            {"Buffers:", 0},
                                                            {"Cached:", 0},
                                                            {"SwapTotal:", 0},
                                                            {"SwapFree:", 0}}) {
        text += format("%-15s %8" PRIu64 " kB\n", name, value);
    }
    return text;
}

std::string processor_info() {
    return "processor\t: 0\nvendor_id\t: polyvisor\nmodel name\t: polyvisor\ncpu MHz\t\t: "
           "1000.000\n"
           "cache size\t: 1024 KB\nsiblings\t: 1\ncpu cores\t: 1\nflags\t\t: fpu tsc sse sse2\n\n";
}

std::string random_uuid() {
    u8 b[16];
    (void)!::getrandom(b, sizeof b, 0);
    b[6] = static_cast<u8>((b[6] & 0x0f) | 0x40);
    b[8] = static_cast<u8>((b[8] & 0x3f) | 0x80);
    return format("%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x\n", b[0],
                  b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13],
                  b[14], b[15]);
}

struct Row {
    const char* path;
    std::string (*text)(const Kernel& kernel);
};

// Sorted as folders are to list them.
constexpr Row kFiles[] = {
    {"/proc/cpuinfo", [](const Kernel&) { return processor_info(); }},
    {"/proc/filesystems",
     [](const Kernel&) -> std::string { return "nodev\tproc\n\tpolyvisor\n"; }},
    {"/proc/loadavg",
     [](const Kernel& kernel) {
         return format("0.00 0.00 0.00 1/%zu %d\n", kernel.threads(),
                       kernel.processes().rbegin()->first);
     }},
    {"/proc/meminfo", memory_info},
    {"/proc/stat",
     [](const Kernel& kernel) {
         return format("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\nctxt 0\nbtime %" PRId64
                       "\nprocesses %zu\nprocs_running 1\nprocs_blocked 0\n",
                       static_cast<s64>(::time(nullptr)) - static_cast<s64>(uptime(kernel)),
                       kernel.processes().size());
     }},
    {"/proc/swaps",
     [](const Kernel&) -> std::string { return "Filename\tType\tSize\tUsed\tPriority\n"; }},
    {"/proc/sys/fs/file-max", [](const Kernel&) -> std::string { return "65536\n"; }},
    {"/proc/sys/fs/nr_open", [](const Kernel&) -> std::string { return "65536\n"; }},
    {"/proc/sys/fs/pipe-max-size", [](const Kernel&) -> std::string { return "1048576\n"; }},
    {"/proc/sys/kernel/cap_last_cap", [](const Kernel&) -> std::string { return "40\n"; }},
    {"/proc/sys/kernel/hostname", [](const Kernel&) -> std::string { return "polyvisor\n"; }},
    {"/proc/sys/kernel/ngroups_max", [](const Kernel&) -> std::string { return "65536\n"; }},
    {"/proc/sys/kernel/osrelease", [](const Kernel&) -> std::string { return "6.1.0\n"; }},
    {"/proc/sys/kernel/ostype", [](const Kernel&) -> std::string { return "Linux\n"; }},
    {"/proc/sys/kernel/pid_max", [](const Kernel&) -> std::string { return "4194304\n"; }},
    {"/proc/sys/kernel/random/uuid", [](const Kernel&) { return random_uuid(); }},
    {"/proc/sys/kernel/threads-max",
     [](const Kernel& kernel) { return format("%u\n", kernel.config().threads); }},
    {"/proc/sys/kernel/version", [](const Kernel&) -> std::string { return "#1 polyvisor\n"; }},
    {"/proc/sys/net/core/somaxconn", [](const Kernel&) -> std::string { return "128\n"; }},
    {"/proc/sys/vm/max_map_count", [](const Kernel&) -> std::string { return "16384\n"; }},
    {"/proc/sys/vm/overcommit_memory", [](const Kernel&) -> std::string { return "0\n"; }},
    {"/proc/uptime", [](const Kernel& kernel) { return format("%.2f 0.00\n", uptime(kernel)); }},
    {"/proc/version",
     [](const Kernel&) -> std::string { return "Linux version 6.1.0 (polyvisor) #1 polyvisor\n"; }},
    {"/sys/devices/system/cpu/online", [](const Kernel&) -> std::string { return "0\n"; }},
    {"/sys/devices/system/cpu/possible", [](const Kernel&) -> std::string { return "0\n"; }},
    {"/sys/devices/system/cpu/present", [](const Kernel&) -> std::string { return "0\n"; }},
    {"/sys/kernel/mm/transparent_hugepage/enabled",
     [](const Kernel&) -> std::string { return "always madvise [never]\n"; }},
    {"/sys/kernel/mm/transparent_hugepage/hpage_pmd_size",
     [](const Kernel&) -> std::string { return "2097152\n"; }},
};

struct Link {
    const char *path, *target;
};
constexpr Link kLinks[] = {
    {"/dev/fd", "/proc/self/fd"},      {"/dev/stderr", "/proc/self/fd/2"},
    {"/dev/stdin", "/proc/self/fd/0"}, {"/dev/stdout", "/proc/self/fd/1"},
    {"/proc/mounts", "self/mounts"},
};

// What is in a folder, of the paths in both tables.
Entries entries_below(const std::string& path) {
    Entries entries;
    auto add = [&](const std::string& found, u8 type) {
        if (found.compare(0, path.size() + 1, path + "/") != 0) return;
        const std::string rest = found.substr(path.size() + 1);
        const std::size_t slash = rest.find('/');
        const std::string name = rest.substr(0, slash);
        if (!entries.empty() && entries.back().name == name) return;
        entries.push_back({name, slash == std::string::npos ? type : u8{DT_DIR}});
    };
    for (const Row& row : kFiles) add(row.path, DT_REG);
    for (const Link& one : kLinks) add(one.path, DT_LNK);
    return entries;
}

constexpr MadeFile::Entry kThreadFiles[] = {
    {"cmdline", DT_REG}, {"comm", DT_REG},      {"cwd", DT_LNK},    {"exe", DT_LNK},
    {"fd", DT_DIR},      {"fdinfo", DT_DIR},    {"limits", DT_REG}, {"maps", DT_REG},
    {"mem", DT_REG},     {"mountinfo", DT_REG}, {"mounts", DT_REG}, {"root", DT_LNK},
    {"stat", DT_REG},    {"statm", DT_REG},     {"status", DT_REG}, {"task", DT_DIR},
};

}  // namespace

// --- Looking them up -----------------------------------------------------------------------------

std::string describe(const OpenFile& file) {
    if (!file.path.empty() && file.path.front() == '/') return file.path;
    struct stat about{};
    stat_file(file, about);
    const auto inode = static_cast<u64>(about.st_ino);
    if (S_ISFIFO(about.st_mode)) return format("pipe:[%" PRIu64 "]", inode);
    if (S_ISSOCK(about.st_mode)) return format("socket:[%" PRIu64 "]", inode);
    if (S_ISCHR(about.st_mode)) return "/dev/console";
    return file.path;
}

bool Procfs::covers(const std::string& path) const {
    auto below = [&](const std::string& top) {
        return path.compare(0, top.size(), top) == 0 &&
               (path.size() == top.size() || path[top.size()] == '/');
    };
    return below("/proc") || below("/sys");
}

std::shared_ptr<const MadeFile> Procfs::find(const std::string& path) const {
    const bool in_proc = path.compare(0, 5, "/proc") == 0;
    if (!in_proc && path.compare(0, 4, "/sys") != 0 && path.compare(0, 5, "/dev/") != 0) {
        return nullptr;
    }
    const Kernel& kernel = thread_.kernel();
    const std::string self = std::to_string(thread_.process().pid);
    for (const Link& one : kLinks) {
        if (path == one.path) return link(one.target);
    }
    if (path == "/proc/self") return link(self);
    if (path == "/proc/thread-self") {
        return link(self + "/task/" + std::to_string(thread_.tid()));
    }
    for (const Row& row : kFiles) {
        if (path == row.path) return file([&kernel, &row] { return row.text(kernel); });
    }
    if (path == "/proc") {
        return folder([&kernel] {
            Entries entries = entries_below("/proc");
            entries.push_back({"self", DT_LNK});
            entries.push_back({"thread-self", DT_LNK});
            for (const auto& [pid, process] : kernel.processes()) {
                entries.push_back({std::to_string(pid), DT_DIR});
            }
            return entries;
        });
    }
    if (in_proc && path.size() > 6) {
        const std::size_t slash = path.find('/', 6);
        const std::string first = path.substr(6, slash == std::string::npos ? slash : slash - 6);
        if (number(first)) {
            return find_in_process(first, slash == std::string::npos ? "" : path.substr(slash + 1));
        }
    }
    if (covers(path) && !entries_below(path).empty()) {
        return folder([path] { return entries_below(path); });
    }
    return nullptr;
}

std::shared_ptr<const MadeFile> Procfs::find_in_process(const std::string& pid,
                                                        const std::string& rest) const {
    Process* const process = thread_.kernel().find_process(*number(pid));
    if (process == nullptr) return nullptr;
    if (rest.empty()) {
        return folder([] { return Entries(std::begin(kThreadFiles), std::end(kThreadFiles)); });
    }
    const std::size_t slash = rest.find('/');
    const std::string name = rest.substr(0, slash);
    const std::string below = slash == std::string::npos ? "" : rest.substr(slash + 1);
    if (name == "task") {
        if (below.empty()) {
            return folder([process] {
                Entries entries;
                for (const Thread* one : process->threads) {
                    entries.push_back({std::to_string(one->tid()), DT_DIR});
                }
                return entries;
            });
        }
        const std::size_t end = below.find('/');
        const auto tid = number(below.substr(0, end));
        const Thread* one = tid ? thread_.kernel().find_thread(*tid) : nullptr;
        if (one == nullptr || &one->process() != process) return nullptr;
        const std::string in_task = end == std::string::npos ? "" : below.substr(end + 1);
        if (in_task == "comm") return file(one->title.substr(0, 15) + "\n");
        return in_task.compare(0, 4, "task") == 0 ? nullptr : find_in_process(pid, in_task);
    }
    if (name == "fd" || name == "fdinfo") {
        const bool info = name == "fdinfo";
        if (below.empty()) {
            return folder([process, info] { return open_files(*process, info ? DT_REG : DT_LNK); });
        }
        const auto wanted = number(below);
        auto* entry = wanted ? process->descriptors.find(static_cast<u64>(*wanted)) : nullptr;
        if (entry == nullptr) return nullptr;
        return info ? descriptor_info(*entry->file) : link(describe(*entry->file), entry->file);
    }
    if (!below.empty()) return nullptr;
    if (name == "exe") return link(process->executable);
    if (name == "cwd") return link(process->directory);
    if (name == "root") return link("/");
    if (name == "cmdline") return file([process] { return arguments(*process); });
    if (name == "comm") return file([process] { return title_of(*process) + "\n"; });
    if (name == "maps") return file([process] { return maps(*process); });
    if (name == "status") return file([process] { return status(*process); });
    if (name == "stat") return file([process] { return stat_line(*process); });
    if (name == "limits") return file([process] { return limits(*process); });
    if (name == "mem") return file(Text(), 0);  // nobody's
    if (name == "mounts" || name == "mountinfo") {
        return file([process, numbered = name == "mountinfo"] {
            return mount_lines(process->kernel(), numbered);
        });
    }
    if (name == "statm") {
        return file([process] {
            return format("%" PRIu64 " %" PRIu64 " 0 0 0 %" PRIu64 " 0\n", mapped(*process) >> 12,
                          used(*process) >> 12, used(*process) >> 12);
        });
    }
    return nullptr;
}

// --- What they look like -------------------------------------------------------------------------

// FNV-1a
u64 made_inode(const std::string& path) {
    u64 hash = 0xcbf29ce484222325;
    for (char c : path) hash = (hash ^ static_cast<u8>(c)) * 0x100000001b3;
    return hash >> 24 | 1;
}

struct stat stat_made(const MadeFile& file, const std::string& path) {
    const dev_t kDevice = makedev(0, 3);
    struct stat about{};
    about.st_dev = kDevice;
    about.st_ino = made_inode(path);
    about.st_mode = file.mode;
    about.st_nlink = S_ISDIR(file.mode) ? 2 : 1;
    about.st_blksize = 1024;
    ::clock_gettime(CLOCK_REALTIME, &about.st_mtim);
    about.st_atim = about.st_ctim = about.st_mtim;
    return about;
}

}  // namespace polyvisor::process
