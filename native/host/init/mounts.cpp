#include "host/init/mounts.hpp"

#include <linux/mount.h>

#include "host/init/report.hpp"
#include "host/init/sys.hpp"

namespace polyvisor::host::init {

namespace {

constexpr int kAtEmptyPath = 0x1000, kAtRecursive = 0x8000;

/// One option of a list: "name" or "name=value", which is copied so that it can end with a zero.
long configure(int context, const char* option, std::size_t length) {
    char text[4096];
    if (length >= sizeof text) return -kEnametoolong;
    char* value = nullptr;
    for (std::size_t i = 0; i < length; ++i) {
        text[i] = option[i];
        if (text[i] == '=' && value == nullptr) {
            text[i] = '\0';
            value = text + i + 1;
        }
    }
    text[length] = '\0';
    return value != nullptr ? sys(kSysFsconfig, context, FSCONFIG_SET_STRING, text, value, 0)
                            : sys(kSysFsconfig, context, FSCONFIG_SET_FLAG, text, nullptr, 0);
}

}  // namespace

int new_file_system(const char* type, const char* source, const char* options, u32 attributes,
                    const char* target) {
    const Fd context(check(sys(kSysFsopen, type, FSOPEN_CLOEXEC), "use the file system", type));
    if (source != nullptr) {
        check(sys(kSysFsconfig, context.get(), FSCONFIG_SET_STRING, "source", source, 0),
              "name the source of the mount on", target);
    }
    for (const char* at = options; at != nullptr && *at != '\0';) {
        std::size_t length = 0;
        while (at[length] != '\0' && at[length] != ',') ++length;
        if (length > 0) {
            check(configure(context.get(), at, length), "use the options of the mount on", target);
        }
        at += length + (at[length] == ',' ? 1 : 0);
    }
    check(sys(kSysFsconfig, context.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0),
          "make the file system for", target);
    return static_cast<int>(check(sys(kSysFsmount, context.get(), FSMOUNT_CLOEXEC, attributes),
                                  "make the mount for", target));
}

long copy_mount(int directory, const char* path, bool recursive) {
    const int empty = *path == '\0' ? kAtEmptyPath : 0;
    return sys(kSysOpenTree, directory, path,
               OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | empty | (recursive ? kAtRecursive : 0));
}

long add_attributes(int mount, u32 attributes, bool recursive) {
    mount_attr wanted{};
    wanted.attr_set = attributes;
    if (attributes == 0) return 0;
    return sys(kSysMountSetattr, mount, "", kAtEmptyPath | (recursive ? kAtRecursive : 0), &wanted,
               sizeof wanted);
}

long attach_mount(int mount, int place) {
    return sys(kSysMoveMount, mount, "", place, "",
               MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

}  // namespace polyvisor::host::init
