#pragma once

namespace polyvisor::host {

/// The init program, as a file in memory that is sealed: nobody can change it, not even through
/// /proc/1/exe. It is made once and stays open; the descriptor is not the caller's.
int init_image();

}  // namespace polyvisor::host
