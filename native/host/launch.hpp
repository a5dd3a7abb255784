// Starting programs in namespaces of their own: the mechanism below polyvisor.sandbox() and the
// virtual private servers.
//
// launch() clones a process into all namespaces, which executes the init program (native/host/init)
// and waits; go() tells it what root file system to build and what to execute. Between the two the
// namespaces are there and empty: the place to put a network in.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/fd.hpp"
#include "base/types.hpp"
#include "host/wire.hpp"

namespace polyvisor::host {

struct Mount {
    std::string type;  // "bind", "dev" (a minimal /dev), or a file system: "tmpfs", "proc", ...
    std::string source;
    std::string target;  // in the new root
    bool read_only = false;
    bool nosuid = true;
    bool nodev = true;
    bool noexec = false;
    std::string options;  // of the file system, separated by commas
};

/// `count` ids from `inside` on are the host's from `outside` on (user_namespaces(7)).
struct IdRange {
    u32 inside;
    u32 outside;
    u32 count;
};
using IdMap = std::vector<IdRange>;

/// CLONE_NEW* of all eight kinds.
extern const u64 kAllNamespaces;

struct LaunchSpec {
    std::vector<std::string> argv;  // none: only init, until SIGTERM
    std::vector<std::string> env;   // NAME=VALUE
    std::string cwd = "/";

    std::string root;  // a folder of the host that becomes "/"; "": the host's own "/"
    std::vector<std::string> lower;  // or an overlay: of these, the first one on top,
    std::string upper, work;         // and these
    bool idmapped = false;  // ids on disk are those inside: the caller is root, and has a uid_map
    bool read_only_root = false;
    std::vector<Mount> mounts;
    std::vector<std::string> masked;           // hidden
    std::vector<std::string> read_only_paths;  // in the new root

    u64 namespaces = kAllNamespaces;
    IdMap uid_map, gid_map;
    std::string hostname;

    u32 uid = 0, gid = 0;
    std::vector<u32> groups;
    u64 capabilities = 0;  // the bounding set, and what the program gets: bit CAP_* each
    bool no_new_privs = true;
    Filter seccomp = Filter::kDefault;
    std::vector<WireRlimit> rlimits;
    std::optional<int> oom_score_adj;
    std::vector<int> cgroups;  // open directories of cgroups, which the program is born in

    bool init = true;  // ours is PID 1; else the program is
    bool terminal = false;
    int standard[3] = {-1, -1, -1};  // stdin, stdout, stderr; -1: /dev/null
    bool detached = false;           // it outlives this process
};

class Launched {
  public:
    using Duration = std::chrono::nanoseconds;

    Launched(Launched&&) = default;
    /// Kills what was not detached or did not get as far.
    ~Launched();

    int pid() const { return pid_; }
    int pidfd() const { return pidfd_.get(); }
    /// The master of its terminal, once started; -1 for none. It stays this object's.
    int terminal() const { return terminal_.get(); }
    /// A descriptor of its namespace "mnt", "net", ..., the caller's to close.
    int open_namespace(const std::string& kind) const;

    /// Has init set everything up and execute the program. Then call started() until it is true.
    void send();
    /// Waits so long for the program to be executed. Throws HostError with what was in the way.
    bool started(Duration patience);
    /// The wait status of the program (waitpid(2)) when all of it has ended; none: `patience` is
    /// over.
    std::optional<int> wait(Duration patience);
    /// SIGKILL for init, with which the kernel ends all of its PID namespace, and waits for that.
    void kill();

  private:
    friend Launched launch(const LaunchSpec&);
    friend Launched attach(int, const LaunchSpec&);
    Launched() = default;
    void start(const LaunchSpec& spec, u64 namespaces);
    bool read_report();
    void reap();

    int pid_ = 0;
    OwnedFd pidfd_, control_, terminal_;
    std::vector<u8> message_;   // not sent yet
    std::vector<OwnedFd> fds_;  // that go with it
    std::optional<int> reported_, status_;
    bool init_ = true, detached_ = false, sent_ = false, started_ = false;
};

/// A process in new namespaces, which waits for send(). Throws ConfigError for what makes no sense
/// and HostError for what the kernel refuses.
Launched launch(const LaunchSpec& spec);

/// The same in the namespaces of a process that runs (its pidfd), whose root file system stays as
/// it is: of `spec`, all about root, mounts and ids maps is left unread. Its processes end with the
/// namespaces' PID 1, and kill() ends only the program itself.
Launched attach(int target, const LaunchSpec& spec);

}  // namespace polyvisor::host
