// From the initramfs to a root file system on a disk: what the initrd of polyvisor's own images
// does. The kernel's command line says how:
//
//   root=DEVICE  rootfstype=TYPE  rootflags=OPTIONS  ro|rw  init=PROGRAM
//   polyvisor.share=TAG:DIRECTORY[:ro]    a virtio-fs device to mount; may stand there repeatedly
#pragma once

#include "sys.h"

/// Mounts the shared folders that the command line names, below `root` ("" for here).
void root_mount_shares(const char* root);
/// Becomes the init of the root file system. /proc, /sys and /dev are mounted and move along.
/// Returns only on failure, which the console was told of.
void root_become(void);
