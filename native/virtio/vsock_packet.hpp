// The packets of virtio-vsock (virtio 1.2, 5.10.6).
#pragma once

#include "base/types.hpp"

namespace polyvisor::virtio {

struct __attribute__((packed)) VsockHeader {
    u64 src_cid = 0, dst_cid = 0;
    u32 src_port = 0, dst_port = 0;
    u32 len = 0;  ///< of the payload
    u16 type = 0, op = 0;
    u32 flags = 0;
    u32 buf_alloc = 0;  ///< bytes that the sender can hold of this connection
    u32 fwd_cnt = 0;    ///< bytes that it has passed on, modulo 2^32
};
static_assert(sizeof(VsockHeader) == 44);

struct VsockPacket {
    enum Type : u16 { kStream = 1 };
    enum Op : u16 {
        kRequest = 1,
        kResponse = 2,
        kRst = 3,
        kShutdown = 4,
        kRw = 5,
        kCreditUpdate = 6,
        kCreditRequest = 7,
    };
    enum ShutdownFlag : u32 { kNoReceive = 1, kNoSend = 2, kNeither = 3 };
    enum Event : u32 { kTransportReset = 0 };
};

}  // namespace polyvisor::virtio
