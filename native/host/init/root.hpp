// The root file system of the new namespaces: made of what the launcher says, and entered.
#pragma once

#include "host/wire.hpp"

namespace polyvisor::host::init {

/// A message of the launcher in this process's memory.
struct Message {
    const u8* base;

    const Wire& wire() const { return *reinterpret_cast<const Wire*>(base); }
    /// Null for none.
    const char* text(WireText offset) const {
        return offset ? reinterpret_cast<const char*>(base + offset) : nullptr;
    }
    template <class T>
    const T* list(const WireList& list) const {
        return reinterpret_cast<const T*>(base + list.offset);
    }
};

/// Builds the file system beneath the new root, makes it this process's and lets go of the host's.
/// `root_mount` is a mount that the launcher has made, or -1.
void enter_root(const Message& message, int root_mount);

}  // namespace polyvisor::host::init
