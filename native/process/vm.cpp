#include "process/vm.hpp"

#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.hpp"

namespace polyvisor::process {

namespace {

constexpr u64 kFilesRoom = 256 << 20;  // for what is mapped of files, and stacks
constexpr u64 kTablesRoom = 32 << 20;
// Many programs, each somewhere else, leave more tables than are worth keeping.
constexpr u64 kMostTables = 1 << 20;

// There is no interrupt controller, and nothing that would interrupt.
class NoInterrupts final : public LocalInterrupts {
  public:
    bool pending() const override { return false; }
    int acknowledge() override { return -1; }
    u8 cr8() const override { return 0; }
    void set_cr8(u8) override {}
    bool read_msr(u32, u64&) override { return false; }
    bool write_msr(u32, u64) override { return false; }
    u64 mmio_base() const override { return ~u64{0}; }
    void mmio_read(u32, std::span<u8>) override {}
    void mmio_write(u32, std::span<const u8>) override {}
    void reset(bool) override {}
};

std::unique_ptr<Engine> make_engine(const VmConfig& config, GuestMemory& memory, Bus& pio,
                                    Bus& mmio, Clock& clock, u64& xcr0) {
    const u64 khz = config.offer.native_tsc_khz != 0 ? config.offer.native_tsc_khz : 1'000'000;
    clock.set_tsc_khz(khz);
    EngineConfig engine{
        memory, pio, mmio, clock,
        make_cpuid_policy("host", config.offer.features, 1, khz,
                          {config.offer.physical_bits, config.offer.arch_capabilities, {}})};
    engine.port_exits = engine.hypercall_exits = true;
    engine.cpus = Vm::kMostCpus;  // at most; they are made as threads need them
    const FeatureSet& features = engine.cpuid.features;
    xcr0 = features.has(Feature::kAvx) ? 7 : features.has(Feature::kXsave) ? 3 : 1;
    return config.make_engine(engine);
}

}  // namespace

// What a Vm begins with: nothing, an image, or another one's memory.
struct Vm::Origin {
    std::shared_ptr<const VmImage> image{};
    Vm* parent = nullptr;
    bool alone = false;

    bool empty() const { return !image && parent == nullptr; }
    const PageTables::State& tables() const {
        return image ? image->tables : parent->tables_.state();
    }
    const Supervisor::State& supervisor() const {
        return image ? image->supervisor : parent->supervisor_.state();
    }
    Arena& fill(Arena& arena) const {
        if (image) arena.adopt(image->memory);
        if (parent != nullptr) arena.fork(parent->arena_, alone);
        return arena;
    }
};

Vm::Vm(const VmConfig& config, const Origin& origin)
    : config_(config),
      image_(origin.image),
      arena_(memory_, align_up(config.memory, kPageSize) + kFilesRoom + kTablesRoom, kTablesRoom),
      tables_(origin.empty() ? PageTables(arena_)
                             : PageTables(origin.fill(arena_), origin.tables())),
      engine_(make_engine(config, memory_, pio_, mmio_, clock_, xcr0_)),
      supervisor_(origin.empty()
                      ? Supervisor(arena_, tables_, counts_instructions())
                      : Supervisor(arena_, tables_, counts_instructions(), origin.supervisor())),
      clock_page_(clock_, config.offer.native_tsc_khz != 0, supervisor_.clock_page()),
      space_(arena_, tables_, config.memory,
             counts_instructions() ? AddressSpace::Files::kCopied : AddressSpace::Files::kMapped),
      interrupts_(std::make_unique<NoInterrupts>()) {
    if (counts_instructions()) arena_.outlive_files();
    arena_.set_growth([this] { engine_->sync_memory(); });
    cpus_.reserve(kMostCpus);
    fresh_.reserve(kMostCpus);
    is_fresh_.reserve(kMostCpus);
    if (origin.image) space_.restore(origin.image->space);
    if (origin.parent != nullptr) {
        space_.share(origin.parent->space_.budget());
        space_.restore(origin.parent->space_.state(), true);
    }
}

Vm::Vm(const VmConfig& config) : Vm(config, Origin{}) {}
Vm::Vm(const VmConfig& config, std::shared_ptr<const VmImage> image)
    : Vm(config, Origin{std::move(image)}) {}

Vm::~Vm() = default;

u32 Vm::take_cpu() {
    if (!idle_.empty()) {
        const u32 cpu = idle_.back();
        idle_.pop_back();
        return cpu;
    }
    const u32 cpu = static_cast<u32>(cpus_.size());
    if (cpu == kMostCpus) return kMostCpus;
    auto made = engine_->create_vcpu(cpu, interrupts_.get());
    fresh_.push_back(supervisor_.add_cpu(xcr0_));
    cpus_.push_back(std::move(made));
    is_fresh_.push_back(false);
    return cpu;
}

void Vm::begin(u32 cpu) {
    if (!is_fresh_[cpu]) refresh(cpu);
    is_fresh_[cpu] = false;
    supervisor_.restart(cpu);
}

void Vm::refresh(u32 cpu) {
    CpuState state = fresh_[cpu];
    if (counts_instructions()) state.instructions = cpus_[cpu]->save().instructions;
    cpus_[cpu]->restore(state);
    is_fresh_[cpu] = true;
}

void Vm::give_back(u32 cpu) {
    idle_.push_back(cpu);
}

void Vm::prepare(u32 cpu, const FpuState& fpu, u64 fs, u64 gs) {
    CpuState state = fresh_[cpu];
    state.fpu = fpu;
    state.segments[kFs].base = fs;
    state.segments[kGs].base = gs;
    if (counts_instructions()) state.instructions = cpus_[cpu]->save().instructions;
    cpus_[cpu]->restore(state);
    is_fresh_[cpu] = false;
    supervisor_.restart(cpu, fs, gs);
}

std::optional<u8> Vm::exchange_byte(u64 address, u8 byte) {
    if (space_.populate(align_down(address, kPageSize), kPageSize) != 0) return std::nullopt;
    const auto area = std::prev(space_.areas().upper_bound(address));
    if (!area->second.gpa || area->second.kind != AddressSpace::Kind::kPrivate) return std::nullopt;
    const Gpa gpa(area->second.gpa->value + (address - area->first));
    // By the kernel: the page may be a file's that was shortened, or become a copy of it.
    u8 before = 0;
    const auto copy = [](u8* to, const u8* from) {
        const iovec local{to, 1}, remote{const_cast<u8*>(from), 1};
        return ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0) == 1;
    };
    if (!copy(&before, arena_.host(gpa)) || !copy(arena_.host(gpa), &byte)) return std::nullopt;
    arena_.wrote(gpa, 1);
    return before;
}

std::shared_ptr<const VmImage> Vm::freeze() const {
    return std::make_shared<const VmImage>(VmImage{arena_.freeze(Arena::Files::kCopied),
                                                   tables_.state(), supervisor_.state(),
                                                   space_.state()});
}

std::shared_ptr<Vm> Vm::fork(bool alone) {
    // All of it may be copied, sooner or later.
    if (space_.used() > space_.left()) {
        throw HostError(ENOMEM, {}, "a process VM has too little memory for another process");
    }
    return std::shared_ptr<Vm>(new Vm(config_, Origin{{}, this, alone}));
}

void Vm::reset() {
    // KVM may have shadows of tables, and nobody tells it that the monitor has changed them: to
    // forget them all takes it longer than everything else here, and so does making them again.
    if (arena_.tables_since_image() <= kMostTables) {
        tables_.reset();
        arena_.reset(Arena::Tables::kKept);
    } else {
        arena_.reset();
        tables_.restore(image_->tables);
        supervisor_.restore(image_->supervisor);
        engine_->forget_tables();
    }
    space_.restore(image_->space);
}

void Vm::make_ready() {
    if (cpus_.empty()) give_back(take_cpu());
    refresh(idle_.back());
}

bool Vm::recycle() {
    // Tables stay where they were, as in reset().
    if (arena_.image() != nullptr || idle_.size() != cpus_.size()) return false;
    space_.clear();
    space_.share(std::make_shared<MemoryBudget>(config_.memory));
    if (arena_.allocated() != 0 || tables_.bytes() > kMostTables) return false;
    make_ready();
    return true;
}

}  // namespace polyvisor::process
