#include "base/error.hpp"

#include <cerrno>
#include <cstring>

namespace polyvisor {

HostError::HostError(int code, std::string path, const std::string& message)
    : Error(message + ": " + std::strerror(code)), code(code), path(std::move(path)) {}

void throw_errno(const std::string& what, const std::string& path) {
    throw HostError(errno, path, what);
}

}  // namespace polyvisor
