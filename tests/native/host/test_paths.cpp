// Paths beneath a root that somebody hostile has made: random trees of folders, files and symbolic
// links (absolute, with "..", in circles, to nowhere), against a walk of our own over a model of
// the tree; and a tree that changes while it is walked. What lies outside must stay as it is.
#include "host/init/paths.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/fd.hpp"
#include "check.hpp"
#include "random.hpp"

using namespace polyvisor;
using namespace polyvisor::host::init;
namespace fs = std::filesystem;

namespace {

struct Node {
    Node* parent = nullptr;
    bool folder = false;
    std::string link;  // not empty: a symbolic link
    std::map<std::string, std::unique_ptr<Node>> children;
    ino_t inode = 0;
};

const std::vector<std::string> kNames = {"a", "b", "c", "d"};

std::vector<std::string> split(const std::string& path) {
    std::vector<std::string> parts;
    std::string part;
    for (char c : path + "/") {
        if (c != '/') {
            part += c;
        } else if (!part.empty()) {
            parts.push_back(std::move(part));
            part.clear();
        }
    }
    return parts;
}

/// What Linux does (path_resolution(7)): the node, or an errno.
std::pair<Node*, int> walk(Node* root, const std::string& path) {
    std::vector<std::string> todo = split(path);
    std::reverse(todo.begin(), todo.end());
    Node* at = root;
    for (int links = 0; !todo.empty();) {
        const std::string name = todo.back();
        todo.pop_back();
        if (!at->folder) return {nullptr, ENOTDIR};
        if (name == ".") continue;
        if (name == "..") {
            if (at->parent != nullptr) at = at->parent;
            continue;
        }
        const auto found = at->children.find(name);
        if (found == at->children.end()) return {nullptr, ENOENT};
        Node* next = found->second.get();
        if (next->link.empty()) {
            at = next;
            continue;
        }
        if (++links > 40) return {nullptr, ELOOP};
        auto more = split(next->link);
        if (next->link.front() == '/') at = root;
        todo.insert(todo.end(), more.rbegin(), more.rend());
    }
    return {at, 0};
}

class Trees {
  public:
    explicit Trees(unsigned seed) : random_(seed) {}

    std::string path() {
        std::string result = pick(2) ? "/" : "";
        const u32 count = 1 + pick(5);
        for (u32 i = 0; i < count; ++i) {
            if (i > 0) result += pick(8) ? "/" : "//";
            const u32 kind = pick(8);
            result += kind == 0 ? ".." : kind == 1 ? "." : kNames[pick(4)];
        }
        return result;
    }
    void fill(Node& folder, const fs::path& where, int depth) {
        for (const std::string& name : kNames) {
            const u32 kind = pick(5);
            if (kind == 0) continue;
            auto node = std::make_unique<Node>();
            node->parent = &folder;
            const fs::path path = where / name;
            if (kind <= 2 && depth > 0) {
                node->folder = true;
                fs::create_directory(path);
                fill(*node, path, depth - 1);
            } else if (kind == 3) {
                std::ofstream(path) << name;
            } else {
                node->link = this->path();
                fs::create_symlink(node->link, path);
            }
            struct stat found;
            ::lstat(path.c_str(), &found);
            node->inode = found.st_ino;
            folder.children[name] = std::move(node);
        }
    }
    u32 pick(u32 count) { return random_.below(count); }

  private:
    pvtest::Random random_;
};

std::size_t entries(const fs::path& folder) {
    std::size_t count = 0;
    for ([[maybe_unused]] const auto& entry : fs::recursive_directory_iterator(folder)) ++count;
    return count;
}

bool is_within(int fd, const fs::path& root) {
    const std::string real = fs::read_symlink("/proc/self/fd/" + std::to_string(fd)).string();
    return real == root.string() || real.rfind(root.string() + "/", 0) == 0;
}

void test_against_model(const fs::path& base) {
    for (unsigned seed = 0; seed < 60; ++seed) {
        const fs::path outside = base / std::to_string(seed), root = outside / "root";
        fs::create_directories(root);
        std::ofstream(outside / "a") << "outside";  // what ".." must not find
        Trees trees(seed);
        Node model;
        model.folder = true;
        struct stat found;
        ::stat(root.c_str(), &found);
        model.inode = found.st_ino;
        trees.fill(model, root, 3);
        const OwnedFd fd(::open(root.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
        for (int i = 0; i < 80; ++i) {
            const std::string path = trees.path();
            const auto [node, error] = walk(&model, path);
            const long got = open_in_root(fd.get(), path.c_str(), O_PATH);
            if (node == nullptr) {
                CHECK_EQ(got, static_cast<long>(-error));
                continue;
            }
            const OwnedFd opened(static_cast<int>(got));
            CHECK(got >= 0);
            CHECK(got >= 0 && ::fstat(opened.get(), &found) == 0 && found.st_ino == node->inode);
        }
        const std::size_t before = entries(outside) - entries(root);
        for (int i = 0; i < 40; ++i) {
            const std::string path = trees.path();
            const bool folder = trees.pick(2) != 0;
            const long got = make_in_root(fd.get(), path.c_str(), folder);
            if (got < 0) {
                CHECK(got == -ENOTDIR || got == -ELOOP || got == -ENOENT || got == -EEXIST);
                continue;
            }
            const OwnedFd made(static_cast<int>(got));
            CHECK(is_within(made.get(), root));
            const OwnedFd again(static_cast<int>(open_in_root(fd.get(), path.c_str(), O_PATH)));
            struct stat one, other;
            CHECK(::fstat(made.get(), &one) == 0 && ::fstat(again.get(), &other) == 0 &&
                  one.st_ino == other.st_ino);
        }
        CHECK_EQ(entries(outside) - entries(root), before);
    }
}

/// Somebody swaps a folder for a link to the outside, and back, all the time.
void test_against_race(const fs::path& base) {
    const fs::path root = base / "race" / "root", outside = base / "race" / "outside";
    fs::create_directories(root / "a");
    fs::create_directories(outside / "b");
    fs::create_symlink("../../outside", root / "link");
    std::atomic<bool> over = false;
    std::thread other([&] {
        while (!over) {
            // Atomic exchange of the two names.
            ::renameat2(AT_FDCWD, (root / "a").c_str(), AT_FDCWD, (root / "link").c_str(),
                        RENAME_EXCHANGE);
        }
    });
    const OwnedFd fd(::open(root.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    for (int i = 0; i < 3000; ++i) {
        const std::string path = "/a/x" + std::to_string(i) + "/y";
        const long got = make_in_root(fd.get(), path.c_str(), i % 2 != 0);
        if (got < 0) continue;
        const OwnedFd made(static_cast<int>(got));
        CHECK(is_within(made.get(), root));
    }
    over = true;
    other.join();
    CHECK_EQ(entries(outside), std::size_t{1});
}

void test_edges(const fs::path& base) {
    const fs::path root = base / "edges";
    fs::create_directories(root);
    fs::create_symlink("/proc/self/fd/0", root / "magic");
    fs::create_symlink("nowhere", root / "dangling");
    const OwnedFd fd(::open(root.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    CHECK_EQ(make_in_root(fd.get(), "/dangling", true), static_cast<long>(-ELOOP));
    CHECK_EQ(make_in_root(fd.get(), "/dangling/x", true), static_cast<long>(-ELOOP));
    CHECK_EQ(open_in_root(fd.get(), "/magic", O_PATH), static_cast<long>(-ENOENT));
    const OwnedFd host(::open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
    CHECK_EQ(open_in_root(host.get(), "/proc/self/root", O_PATH), static_cast<long>(-ELOOP));
    CHECK_EQ(open_in_root(host.get(), "/proc/self/exe", O_PATH), static_cast<long>(-ELOOP));
    const std::string long_path = "/" + std::string(5000, 'x');
    CHECK_EQ(make_in_root(fd.get(), long_path.c_str(), true), static_cast<long>(-ENAMETOOLONG));
}

}  // namespace

int main() {
    char name[] = "/tmp/polyvisor-paths-XXXXXX";
    if (::mkdtemp(name) == nullptr) return 1;
    const fs::path base = name;
    test_edges(base);
    test_against_model(base);
    test_against_race(base);
    fs::remove_all(base);
    return pvtest::finish("paths");
}
