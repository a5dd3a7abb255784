#include "host/ids.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.hpp"

namespace polyvisor::host {

namespace {

void write_file(int pid, const char* name, const std::string& text) {
    const std::string path = "/proc/" + std::to_string(pid) + "/" + name;
    const OwnedFd file(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
    if (!file ||
        ::write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
        throw_errno("the kernel refuses the map '" + text + "' of ids (" + name + ")", path);
    }
}

std::string lines(const IdMap& map) {
    std::string result;
    for (const IdRange& range : map) {
        result += std::to_string(range.inside) + " " + std::to_string(range.outside) + " " +
                  std::to_string(range.count) + "\n";
    }
    return result;
}

void run_helper(const char* program, int pid, const IdMap& map) {
    std::vector<std::string> words{program, std::to_string(pid)};
    for (const IdRange& range : map) {
        for (u32 number : {range.inside, range.outside, range.count}) {
            words.push_back(std::to_string(number));
        }
    }
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    pid_t child = 0;
    const int error = ::posix_spawnp(&child, program, nullptr, nullptr, arguments.data(), environ);
    if (error != 0) {
        throw HostError(error, program,
                        std::string("several ids in a sandbox of an ordinary user need ") +
                            program + "; install the package uidmap");
    }
    int status = 0;
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (status != 0) {
        throw HostError(EPERM, program,
                        std::string(program) +
                            " refuses these ids; give the user a range in "
                            "/etc/subuid and /etc/subgid");
    }
}

bool is_only(const IdMap& map, u32 id) {
    return map.size() == 1 && map[0].count == 1 && map[0].outside == id;
}

}  // namespace

bool write_id_maps(int pid, const IdMap& uids, const IdMap& gids) {
    if (::geteuid() == 0) {
        write_file(pid, "gid_map", lines(gids));
        write_file(pid, "uid_map", lines(uids));
        return true;
    }
    if (is_only(uids, ::geteuid()) && is_only(gids, ::getegid())) {
        // Without that, giving up a group could be a way to a file that is denied to the group.
        write_file(pid, "setgroups", "deny");
        write_file(pid, "gid_map", lines(gids));
        write_file(pid, "uid_map", lines(uids));
        return false;
    }
    run_helper("newgidmap", pid, gids);
    run_helper("newuidmap", pid, uids);
    return true;
}

}  // namespace polyvisor::host
