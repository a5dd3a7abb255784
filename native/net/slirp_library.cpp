#include "net/slirp_library.hpp"

#include <dlfcn.h>

#include <cerrno>
#include <string>

#include "base/error.hpp"

namespace polyvisor::net {

namespace {

constexpr const char* kName = "libslirp.so.0";

SlirpLibrary load() {
    void* library = ::dlopen(kName, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw HostError(ENOENT, kName,
                        std::string("user networking needs libslirp, which cannot be loaded (") +
                            ::dlerror() + "); install the package libslirp0");
    }
    SlirpLibrary result;
    auto find = [&](const char* name, auto& function) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(::dlsym(library, name));
        if (function == nullptr) {
            throw HostError(ENOSYS, kName,
                            std::string("user networking needs libslirp 4.1 or later: this one has "
                                        "no ") +
                                name);
        }
    };
    find("slirp_new", result.create);
    find("slirp_cleanup", result.cleanup);
    find("slirp_input", result.input);
    find("slirp_pollfds_fill", result.fill);
    find("slirp_pollfds_poll", result.poll);
    find("slirp_add_hostfwd", result.add_forward);
    find("slirp_remove_hostfwd", result.remove_forward);
    return result;
}

}  // namespace

const SlirpLibrary& SlirpLibrary::get() {
    static const SlirpLibrary library = load();  // tried again after an exception
    return library;
}

}  // namespace polyvisor::net
