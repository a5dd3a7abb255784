// A device's State as bytes and back, for Device::save() and restore().
//
// A State has no padding and no bool, so that its bytes are the same for the same state and any
// bytes are a State, which restore() then validates: flags are u8.
#pragma once

#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/error.hpp"
#include "base/types.hpp"

namespace polyvisor {

template <class T>
std::vector<u8> save_pod(const T& state) {
    static_assert(std::has_unique_object_representations_v<T>, "State has padding");
    const u8* bytes = reinterpret_cast<const u8*>(&state);
    return {bytes, bytes + sizeof state};
}

/// Throws StateError when the size is not T's.
template <class T>
T load_pod(std::span<const u8> bytes, std::string_view device) {
    static_assert(std::has_unique_object_representations_v<T>, "State has padding");
    if (bytes.size() != sizeof(T)) {
        throw StateError("size", "the saved state of device '" + std::string(device) + "' has " +
                                     std::to_string(bytes.size()) + " bytes instead of " +
                                     std::to_string(sizeof(T)) +
                                     "; it is damaged or of another version");
    }
    T state;
    std::memcpy(&state, bytes.data(), sizeof state);
    return state;
}

/// Throws StateError, naming the field, unless `valid`.
inline void check_state(bool valid, std::string_view device, const char* field) {
    if (!valid) {
        throw StateError(field, "the saved state of device '" + std::string(device) +
                                    "' has an impossible value in '" + field + "'");
    }
}

}  // namespace polyvisor
