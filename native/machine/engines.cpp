#include "machine/engines.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <map>
#include <mutex>

#include "base/error.hpp"
#include "kvm/engine.hpp"
#include "machine/engine_speed.hpp"
#if __has_include("soft/engine.hpp")
#include "soft/engine.hpp"
#include "soft/system.hpp"
#define PV_HAVE_SOFT 1
#endif

namespace polyvisor {

namespace {

EngineStatus probe_soft() {
#ifdef PV_HAVE_SOFT
    return {"soft", "", "an x86-64 CPU in user space; runs anywhere"};
#else
    return {"soft", "missing", "this build of polyvisor is without the soft engine"};
#endif
}

#ifdef PV_HAVE_SOFT
EngineOffer offer_soft() {
    return {.features = soft::implemented_features()};
}
#endif

// /dev/kvm, opened once per process: what it offers does not change while it is there. A failure is
// not kept, for it may be mended.
std::shared_ptr<const kvm::System> kvm_system() {
    static std::mutex mutex;
    static std::shared_ptr<const kvm::System> system;
    std::lock_guard lock(mutex);
    if (system == nullptr) system = std::make_shared<kvm::System>();
    return system;
}

EngineStatus works(const kvm::System& system) {
    return {"kvm", "", "Linux's KVM, on the CPU's own virtualization, at " + system.path()};
}

EngineStatus probe_kvm() {
    try {
        return works(*kvm_system());
    } catch (const EngineUnavailable& error) {
        return {"kvm", error.reason, error.what()};
    }
}

struct Row {
    const char* name;
    bool deterministic;
    EngineStatus (*probe)();
    EngineOffer (*offer)();
    std::unique_ptr<Engine> (*create)(const EngineConfig&);
};

const Row kEngines[] = {
    {"kvm", false, probe_kvm, [] { return kvm::make_offer(*kvm_system()); },
     [](const EngineConfig& config) { return kvm::create_engine(kvm_system(), config); }},
#ifdef PV_HAVE_SOFT
    {"soft", true, probe_soft, offer_soft,
     [](const EngineConfig& config) { return soft::create_engine(config); }},
#else
    {"soft", true, probe_soft, nullptr, nullptr},
#endif
};

#ifdef PV_HAVE_SOFT
// The soft engine without its specialised handlers: what tests compare it with. Never chosen by
// auto, and not listed.
const Row kReference = {"soft-reference", true, probe_soft, offer_soft,
                        [](const EngineConfig& config) {
                            EngineConfig reference = config;
                            reference.reference = true;
                            return soft::create_engine(reference);
                        }};
#endif

[[noreturn]] void unavailable(const EngineStatus& status) {
    throw EngineUnavailable(status.name, status.reason,
                            "engine " + status.name + " cannot run here: " + status.message);
}

const Row& find(const std::string& name) {
#ifdef PV_HAVE_SOFT
    if (name == kReference.name) return kReference;
#endif
    std::string known = "auto";
    for (const Row& row : kEngines) {
        known += std::string(", ") + row.name;
        if (name != row.name) continue;
        EngineStatus status = row.probe();
        if (!status.reason.empty()) unavailable(status);
        return row;
    }
    throw ConfigError("engine", "there is no engine '" + name + "'; choose one of " + known);
}

double speed_of(const Row& row) {
    static std::mutex mutex;
    static std::map<std::string, double> speeds;
    std::lock_guard lock(mutex);
    auto known = speeds.find(row.name);
    if (known != speeds.end()) return known->second;
    return speeds[row.name] = measure_speed(row.create, row.offer());
}

std::string show(double mips) {
    char text[32];
    std::snprintf(text, sizeof text, mips < 10 ? "%.1f" : "%.0f", mips);
    return text;
}

/// Why "auto" passes over `row`, whose probe found nothing wrong; "" when it takes it.
std::string objection(const Row& row, const Row& other) {
    try {
        double speed = speed_of(row), others = speed_of(other);
        if (speed >= others) return "";
        return "engine auto takes " + std::string(other.name) + ": " + row.name +
               " works here but runs " + show(speed) + " million instructions per second at ring " +
               "0, and " + other.name + " " + show(others);
    } catch (const EngineUnavailable& error) {
        return "engine auto takes " + std::string(other.name) + ": " + error.what();
    }
}

// The preferred engine, unless a later one is faster. A device that is not there at all is nothing
// to talk about; one that is there and cannot be used is.
EngineChoice choose_fastest(bool deterministic) {
    EngineChoice choice;
    EngineStatus why;
    std::vector<const Row*> usable;
    for (const Row& row : kEngines) {
        if (deterministic && !row.deterministic) continue;
        EngineStatus status = row.probe();
        if (status.reason.empty()) {
            usable.push_back(&row);
        } else if (why.name.empty()) {
            why = status;
        }
    }
    if (usable.empty()) unavailable(why);
    if (!why.name.empty() && why.reason != "missing") {
        choice.note = "engine auto takes " + std::string(usable.front()->name) + ": " + why.message;
    }
    while (usable.size() > 1) {
        std::string passed = objection(*usable[0], *usable[1]);
        if (passed.empty()) break;
        choice.note = std::move(passed);
        usable.erase(usable.begin());
    }
    choice.name = usable.front()->name;
    return choice;
}

// Of two offers what both have. Not the interrupt chips: their State is the same whoever plays
// them.
EngineOffer common(const EngineOffer& a, const EngineOffer& b) {
    EngineOffer both;
    both.features = a.features & b.features;
    // A TSC that one of them cannot change is the only one that all can have.
    const EngineOffer& fixed = !b.tsc_scaling || a.native_tsc_khz == 0 ? b : a;
    both.native_tsc_khz = fixed.native_tsc_khz;
    both.tsc_scaling = a.tsc_scaling && b.tsc_scaling;
    both.physical_bits = std::min(a.physical_bits, b.physical_bits);
    both.arch_capabilities = a.arch_capabilities & b.arch_capabilities;
    return both;
}

}  // namespace

std::vector<EngineStatus> engines() {
    std::vector<EngineStatus> result;
    for (const Row& row : kEngines) result.push_back(row.probe());
    return result;
}

EngineChoice choose_engine(const std::string& name, bool deterministic) {
    if (name != "auto") return {find(name).name, ""};
    static std::atomic<bool> told{false};
    EngineChoice choice = choose_fastest(deterministic);
    if (!choice.note.empty() && told.exchange(true)) choice.note.clear();
    return choice;
}

EngineOffer engine_offer(const std::string& name, bool portable) {
    const Row& own = find(name);
    EngineOffer offer = own.offer();
    if (!portable) return offer;
    bool irqchip = offer.irqchip;
    for (const Row& row : kEngines) {
        if (row.name == own.name || !row.probe().reason.empty()) continue;
        try {
            offer = common(offer, row.offer());
        } catch (const EngineUnavailable&) {
            // Its device opens but makes no machines: nothing to be portable to.
        }
    }
    offer.irqchip = irqchip;
    offer.irqchip_features = FeatureSet{};
    return offer;
}

std::unique_ptr<Engine> create_engine(const std::string& name, const EngineConfig& config) {
    return find(name).create(config);
}

double engine_speed(const std::string& name) {
    return speed_of(find(name));
}

KvmProbe probe_kvm_device(const std::string& path, bool measure) {
    KvmProbe probe;
    try {
        auto system = std::make_shared<const kvm::System>(path);
        probe.status = works(*system);
        if (!measure) return probe;
        probe.speed = measure_speed(
            [&](const EngineConfig& config) { return kvm::create_engine(system, config); },
            kvm::make_offer(*system));
    } catch (const EngineUnavailable& error) {
        probe.status = {"kvm", error.reason, error.what()};
    }
    return probe;
}

}  // namespace polyvisor
