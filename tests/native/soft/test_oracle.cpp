// Every user-mode instruction form, one step on the host's CPU against one step of the interpreter:
// random registers, flags, memory, page edges; in 64-bit code, in 32-bit code, and in 16-bit code
// with segments that are not flat. Driven by the instruction table (rows with kNative), so that no
// form can be forgotten.
//
// Agrees on AMD Zen 4. What manuals leave to the CPU is listed in oracle_compare.cpp and
// oracle_generate.cpp; another vendor's CPU may show that something is missing there.
//
//   POLYVISOR_TEST_SEED=n      another random sequence (the seed is printed)
//   POLYVISOR_TEST_COUNT=n     cases for each row (default 60)
//   POLYVISOR_TEST_ROW=text    only rows whose id starts with this text
#include <sys/auxv.h>

#include <map>
#include <memory>
#include <string>

#include "check.hpp"
#include "oracle_compare.hpp"
#include "oracle_generate.hpp"
#include "oracle_native.hpp"
#include "oracle_soft.hpp"
#include "zydis_compare.hpp"

namespace {

using namespace polyvisor;
using namespace polyvisor::soft;
using pvtest::Case;
using pvtest::Outcome;

const char* const kSizeNames[] = {"16-bit", "32-bit", "64-bit"};

struct Tally {
    unsigned rows = 0, absent = 0, cases = 0, faults = 0, differences = 0;
    std::map<std::string, unsigned> failing;  ///< by row
};

/// Instructions whose cases all end in an exception.
bool always_faults(Op op) {
    return op == Op::UD1_Gv_Ev || op == Op::UD2;
}

/// FS and GS base instructions need the host kernel to have enabled them.
bool usable_here(const OpInfo& row) {
    constexpr unsigned long kHwcap2Fsgsbase = 2;
    return row.feature != Feature::kFsgsbase || (getauxval(AT_HWCAP2) & kHwcap2Fsgsbase);
}

class Oracle {
  public:
    Oracle(u64 seed, u64 count) : random_(seed), count_(count) {}

    const char* unusable() const { return native_->unusable(); }
    const Tally& tally() const { return tally_; }

    void row(Op op) {
        const OpInfo& info = op_info(op);
        if (!specialised_->features().has(info.feature) || !usable_here(info)) {
            ++tally_.absent;
            return;
        }
        ++tally_.rows;
        unsigned completed = 0, made = 0;
        if (!(info.attrs & kNo64)) completed += cases(op, CodeSize::k64, count_, made);
        if (!(info.attrs & kOnly64)) {
            u64 count = info.attrs & kNo64 ? count_ : count_ / 4;
            completed += cases(op, CodeSize::k32, count, made);
            if (native_->has_16bit()) completed += cases(op, CodeSize::k16, count, made);
        }
        ++pvtest::checks;
        if (made == 0 || (completed < made / 4 && !always_faults(op))) {
            pvtest::fail(__FILE__, __LINE__,
                         std::string(info.id) + ": only " + std::to_string(completed) + " of " +
                             std::to_string(made) + " cases complete");
        }
    }

  private:
    /// Returns how many completed without an exception.
    unsigned cases(Op op, CodeSize size, u64 count, unsigned& made) {
        unsigned completed = 0;
        for (u64 n = 0; n < count; ++n) {
            Case c;
            if (!make_case(op, size, specialised_->features(), next_slot(), random_, c)) continue;
            ++made;
            Outcome host = native_->run(c);
            if (host.alive && host.vector < 0)
                ++completed;
            else
                ++tally_.faults;
            ++tally_.cases;
            judge(c, host, *generic_, "generic operation");
            judge(c, host, *specialised_, "engine");
            if (!host.alive) std::exit(pvtest::finish("test_oracle"));
        }
        return completed;
    }

    void judge(const Case& c, const Outcome& host, pvtest::SoftCpu& cpu, const char* which) {
        Outcome ours = cpu.run(c);
        ++pvtest::checks;
        std::vector<std::string> differences = pvtest::compare(c, ours, host);
        if (differences.empty()) return;
        ++tally_.differences;
        ++pvtest::failures;
        if (++tally_.failing[std::string(op_info(c.op).id)] > 2 || tally_.failing.size() > 60) {
            return;
        }
        pvtest::ZydisPeer peer(c.size);
        std::fprintf(stderr, "\n%s (%s, %s code): %s\n%s\n", std::string(op_info(c.op).id).c_str(),
                     which, kSizeNames[static_cast<unsigned>(c.size)],
                     peer.disassemble(std::span<const u8>(c.code, c.insn.length)).c_str(),
                     pvtest::describe(c).c_str());
        for (const std::string& line : differences) std::fprintf(stderr, "    %s\n", line.c_str());
    }

    u64 next_slot() {
        if (slot_ == pvtest::kCodeSize / pvtest::kCodeSlot) {
            slot_ = 0;
            native_ = std::make_unique<pvtest::NativeCpu>();
            generic_ = std::make_unique<pvtest::SoftCpu>(true);
            specialised_ = std::make_unique<pvtest::SoftCpu>(false);
        }
        return pvtest::kCodeBase + pvtest::kCodeSlot * slot_++;
    }

    pvtest::Random random_;
    u64 count_;
    u64 slot_ = 0;
    std::unique_ptr<pvtest::NativeCpu> native_ = std::make_unique<pvtest::NativeCpu>();
    std::unique_ptr<pvtest::SoftCpu> generic_ = std::make_unique<pvtest::SoftCpu>(true);
    std::unique_ptr<pvtest::SoftCpu> specialised_ = std::make_unique<pvtest::SoftCpu>(false);
    Tally tally_;
};

}  // namespace

int main() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    // The traced child inherits the sanitizer's shadow memory, so that addresses that should fault
    // do not. The operations themselves run under sanitizers in the other tests.
    std::fprintf(stderr, "test_oracle: not run: a sanitizer's shadow memory is in the way\n");
    return 0;
#endif
    u64 seed = pvtest::environment_number("POLYVISOR_TEST_SEED", 1);
    const char* only = std::getenv("POLYVISOR_TEST_ROW");
    std::fprintf(stderr, "seed %llu\n", static_cast<unsigned long long>(seed));
    Oracle oracle(seed, pvtest::environment_number("POLYVISOR_TEST_COUNT", 60));
    if (*oracle.unusable()) {
        std::fprintf(stderr, "test_oracle: not run: %s\n", oracle.unusable());
        return 0;
    }
    for (unsigned n = 0; n < kOpCount; ++n) {
        const OpInfo& info = op_info(static_cast<Op>(n));
        if (!(info.attrs & kNative) || (only && !info.id.starts_with(only))) continue;
        oracle.row(static_cast<Op>(n));
    }
    const Tally& tally = oracle.tally();
    for (const auto& [id, count] : tally.failing)
        std::fprintf(stderr, "%6u differences: %s\n", count, id.c_str());
    std::fprintf(
        stderr,
        "%u rows, %u absent on this host, %u cases (%u end in an exception), %u differences\n",
        tally.rows, tally.absent, tally.cases, tally.faults, tally.differences);
    return pvtest::finish("test_oracle");
}
