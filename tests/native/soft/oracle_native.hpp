// Runs Cases on the host's CPU: a traced child process with the oracle's pages, whose registers are
// set before, and read after, each single instruction.
#pragma once

#include <sys/types.h>

#include <vector>

#include "oracle_case.hpp"

namespace pvtest {

class NativeCpu {
  public:
    NativeCpu();
    ~NativeCpu();
    NativeCpu(const NativeCpu&) = delete;

    /// Empty, or why this host cannot be used (no ptrace, no AVX state, ...).
    const char* unusable() const { return unusable_; }
    /// Whether 16-bit code can be run: the host kernel may have no modify_ldt().
    bool has_16bit() const { return has_16bit_; }
    Outcome run(const Case& c);

  private:
    void start();
    bool set_state(const Case& c);
    bool get_state(UserState& state);
    void classify(Outcome& outcome, int signal, const Case& c);

    pid_t child_ = -1;
    u8* code_ = nullptr;
    u8* data_ = nullptr;
    std::vector<u8> xstate_;
    u64 ymm_offset_ = 0;  ///< of the upper halves of YMM in the XSAVE area; 0: no AVX
    const char* unusable_ = "";
    bool has_16bit_ = false;
};

}  // namespace pvtest
