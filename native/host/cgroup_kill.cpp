// How everything in a cgroup is stopped and killed: v2 has files for it; in v1 the freezer holds a
// fork bomb still while it is killed, and without a freezer it is done until nothing is left.
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fcntl.h>
#include <algorithm>
#include <cerrno>
#include <map>

#include "host/cgroup.hpp"

namespace polyvisor::host {

namespace {

using Clock = std::chrono::steady_clock;

// Whether a line "name value" is in the text.
bool has_line(const std::string& text, const std::string& line) {
    return ("\n" + text).find("\n" + line + "\n") != std::string::npos;
}

// Waits until `done()`, which is asked again when cgroup.events tells of a change, and now and
// then.
template <class Done>
bool wait_for(int directory, Clock::time_point end, Done done) {
    OwnedFd events(::openat(directory, "cgroup.events", O_RDONLY | O_CLOEXEC));
    for (int pause = 1;; pause = std::min(pause * 2, 20)) {
        if (events) {  // reading it is what makes poll() wait for the next change
            char text[256];
            if (::pread(events.get(), text, sizeof text, 0) < 0) return done();
        }
        if (done()) return true;
        if (Clock::now() >= end) return false;
        pollfd wait{events.get(), POLLPRI, 0};
        ::poll(&wait, 1, pause);
    }
}

bool empty(int directory, const Cgroup& cgroup) {
    std::string text;
    if (read_at(directory, "cgroup.events", text)) return has_line(text, "populated 0");
    return cgroup.processes().empty();
}

// SIGKILL to what is in it now. A process id may have been taken by somebody else between reading
// and killing: the pidfd is used only if the id is in the cgroup still once it is open.
void kill_each(const Cgroup& cgroup) {
    std::map<pid_t, OwnedFd> victims;
    for (pid_t pid : cgroup.processes()) {
        OwnedFd fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
        if (fd) victims.emplace(pid, std::move(fd));
        if (victims.size() >= 256) break;  // the rest has its turn in the next round
    }
    for (pid_t pid : cgroup.processes()) {
        if (auto found = victims.find(pid); found != victims.end()) {
            ::syscall(SYS_pidfd_send_signal, found->second.get(), SIGKILL, nullptr, 0);
        }
    }
}

}  // namespace

bool Cgroup::freeze(bool frozen, Duration timeout) const {
    const Part* part = counted_by();
    if (!part) return false;
    int directory = part->directory.get();
    auto end = Clock::now() + timeout;
    if (part->hierarchy->v2) {
        write(*part, {"cgroup.freeze", frozen ? "1" : "0", "freezer"}, "freezer");
        return wait_for(directory, end, [&] {
            std::string text;
            return read_at(directory, "cgroup.events", text) &&
                   has_line(text, frozen ? "frozen 1" : "frozen 0");
        });
    }
    write(*part, {"freezer.state", frozen ? "FROZEN" : "THAWED", "freezer"}, "freezer");
    return wait_for(directory, end, [&] {
        std::string text;
        return read_at(directory, "freezer.state", text) &&
               text == (frozen ? "FROZEN\n" : "THAWED\n");
    });
}

bool Cgroup::kill(Duration timeout) const {
    const Part* part = counted_by();
    if (!part) return true;
    int directory = part->directory.get();
    auto end = Clock::now() + timeout;
    if (empty(directory, *this)) return true;
    if (part->hierarchy->v2 && write_at(directory, "cgroup.kill", "1")) {
        return wait_for(directory, end, [&] { return empty(directory, *this); });
    }
    bool freezer = !part->hierarchy->v2 && part->hierarchy->has("freezer");
    return wait_for(directory, end, [&] {
        if (freezer) write_at(directory, "freezer.state", "FROZEN");
        kill_each(*this);
        if (freezer) write_at(directory, "freezer.state", "THAWED");
        return empty(directory, *this);
    });
}

}  // namespace polyvisor::host
