#include "block/qemu_nbd.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <vector>

#include "base/error.hpp"
#include "block/nbd_store.hpp"

extern char** environ;

namespace polyvisor::block {

namespace {

constexpr unsigned kConnections = 4;
constexpr int kMillisecondsToEnd = 20'000, kMillisecondsForLastWords = 2'000;

// A child that is always waited for; asked to end first, if it does not by itself.
class Child {
  public:
    Child(pid_t pid, OwnedFd said) : pid_(pid), said_(std::move(said)) {
        handle_ = OwnedFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
    }
    ~Child() {
        if (!ended(kMillisecondsToEnd)) ::kill(pid_, SIGTERM);
        if (!ended(kMillisecondsToEnd)) ::kill(pid_, SIGKILL);
        while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
        }
    }

    /// What it wrote to its standard error until it ended, for which it gets a moment.
    std::string last_words() const {
        ended(kMillisecondsForLastWords);
        char text[2048];
        const ssize_t size = ::pread(said_.get(), text, sizeof text, 0);
        std::string all(text, static_cast<std::size_t>(std::max<ssize_t>(size, 0)));
        while (!all.empty() && all.back() == '\n') all.pop_back();
        std::replace(all.begin(), all.end(), '\n', ' ');
        return all;
    }

  private:
    bool ended(int milliseconds) const {
        pollfd entry{handle_.get(), POLLIN, 0};
        return ::poll(&entry, 1, milliseconds) > 0;
    }

    pid_t pid_;
    OwnedFd handle_, said_;
};

class QemuNbdStore final : public Store {
  public:
    QemuNbdStore(std::unique_ptr<Child> child, std::unique_ptr<NbdStore> nbd)
        : child_(std::move(child)), nbd_(std::move(nbd)) {}
    Info info() const override { return nbd_->info(); }
    int perform(Request& request) override { return nbd_->perform(request); }
    std::string name() const override { return nbd_->name(); }

  private:
    std::unique_ptr<Child> child_;   // ends when its connections are closed
    std::unique_ptr<NbdStore> nbd_;  // so this goes first
};

bool in_path(const std::string& program) {
    const char* given = std::getenv("PATH");
    std::string path = given != nullptr ? given : "/usr/bin:/bin";
    for (std::size_t start = 0; start <= path.size();) {
        const std::size_t end = std::min(path.find(':', start), path.size());
        const std::string file = path.substr(start, end - start) + "/" + program;
        if (::access(file.c_str(), X_OK) == 0) return true;
        start = end + 1;
    }
    return false;
}

// A comma in a value of QEMU's option strings is written twice.
std::string quoted(const std::string& text) {
    std::string result;
    for (char c : text) result += c == ',' ? std::string(",,") : std::string(1, c);
    return result;
}

// A listening socket, and connections to it that wait for who accepts them. The folder is the
// user's own, and both names are gone when it returns.
OwnedFd listen_privately(std::vector<OwnedFd>& connections) {
    std::string folder = "/tmp/polyvisor-XXXXXX";
    if (::mkdtemp(folder.data()) == nullptr) throw_errno("cannot make a folder for a socket");
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    const std::string path = folder + "/nbd";
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    const auto* name = reinterpret_cast<const sockaddr*>(&address);
    OwnedFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    bool good = listener && ::bind(listener.get(), name, sizeof address) == 0 &&
                ::listen(listener.get(), kConnections) == 0;
    for (unsigned i = 0; good && i < kConnections; ++i) {
        connections.emplace_back(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        good = ::connect(connections.back().get(), name, sizeof address) == 0;
    }
    const int error = errno;
    ::unlink(path.c_str());
    ::rmdir(folder.c_str());
    if (!good) throw HostError(error, path, "cannot connect a socket for qemu-nbd");
    return listener;
}

// The child gets the socket as systemd gives services theirs: descriptor 3, and its own process id
// in LISTEN_PID, which only a shell between can know.
std::unique_ptr<Child> start(const std::vector<std::string>& arguments, int listener) {
    std::vector<std::string> words{"sh", "-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec qemu-nbd \"$@\"",
                                   "sh"};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    OwnedFd said(::memfd_create("qemu-nbd stderr", MFD_CLOEXEC));
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDWR, 0);
    ::posix_spawn_file_actions_adddup2(&actions, 0, 1);
    ::posix_spawn_file_actions_adddup2(&actions, said.get(), 2);
    ::posix_spawn_file_actions_adddup2(&actions, listener, 3);
    posix_spawnattr_t attributes;
    ::posix_spawnattr_init(&attributes);
    sigset_t signals;
    ::sigemptyset(&signals);
    ::posix_spawnattr_setsigmask(&attributes, &signals);
    ::sigfillset(&signals);
    ::posix_spawnattr_setsigdefault(&attributes, &signals);
    // A group of its own: Ctrl-C is for this process, which ends the child when it is done with it.
    ::posix_spawnattr_setflags(
        &attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    pid_t pid = 0;
    const int error = ::posix_spawn(&pid, "/bin/sh", &actions, &attributes, argv.data(), environ);
    ::posix_spawn_file_actions_destroy(&actions);
    ::posix_spawnattr_destroy(&attributes);
    if (error != 0) throw HostError(error, "qemu-nbd", "cannot start qemu-nbd");
    return std::make_unique<Child>(pid, std::move(said));
}

const char* cache_name(Cache cache) {
    return cache == Cache::kNone ? "none" : cache == Cache::kUnsafe ? "unsafe" : "writeback";
}

}  // namespace

std::shared_ptr<Store> open_with_qemu_nbd(const std::string& path, const std::string& format,
                                          const FileStore::Options& options) {
    struct stat status{};
    if (::stat(path.c_str(), &status) != 0) {
        throw_errno("cannot open disk image '" + path + "'", path);
    }
    if (!in_path("qemu-nbd")) {
        throw HostError(ENOENT, "qemu-nbd",
                        "disk image '" + path + "' is " + format +
                            ", which needs the program qemu-nbd; install the package qemu-utils");
    }
    std::vector<OwnedFd> connections;
    OwnedFd listener = listen_privately(connections);
    // A path, whatever it looks like to QEMU ("nbd:...", "json:...").
    const std::string image = "driver=" + format +
                              ",file.driver=" + (S_ISBLK(status.st_mode) ? "host_device" : "file") +
                              ",file.filename=" + quoted(path);
    std::vector<std::string> arguments{"--image-opts", "--shared=" + std::to_string(kConnections),
                                       std::string("--cache=") + cache_name(options.cache),
                                       "--discard=unmap"};
    if (options.read_only) arguments.push_back("--read-only");
    arguments.insert(arguments.end(), {"--", image});
    auto child = start(arguments, listener.get());
    listener.reset();  // with the child gone, the connections are, too
    std::unique_ptr<NbdStore> nbd;
    try {
        nbd = std::make_unique<NbdStore>(std::move(connections), path);
    } catch (const HostError& error) {
        const std::string why = child->last_words();
        throw HostError(error.code, path,
                        "qemu-nbd cannot use disk image '" + path + "' as " + format + ": " +
                            (why.empty() ? error.what() : why));
    }
    return std::make_shared<QemuNbdStore>(std::move(child), std::move(nbd));
}

}  // namespace polyvisor::block
