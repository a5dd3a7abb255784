#pragma once

namespace polyvisor::host::init {

/// The loopback interface of a new network namespace is down; programs expect it up.
void raise_loopback();

}  // namespace polyvisor::host::init
