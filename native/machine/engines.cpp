#include "machine/engines.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>

#include "base/error.hpp"
#include "kvm/engine.hpp"
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

EngineStatus probe_kvm() {
    try {
        kvm_system();
        return {"kvm", "", "Linux's KVM, on the CPU's own virtualization"};
    } catch (const EngineUnavailable& error) {
        return {"kvm", error.reason, error.what()};
    }
}

struct Row {
    const char* name;
    EngineStatus (*probe)();
    EngineOffer (*offer)();
    std::unique_ptr<Engine> (*create)(const EngineConfig&);
};

const Row kEngines[] = {
    {"kvm", probe_kvm, [] { return kvm::make_offer(*kvm_system()); },
     [](const EngineConfig& config) { return kvm::create_engine(kvm_system(), config); }},
#ifdef PV_HAVE_SOFT
    {"soft", probe_soft, offer_soft,
     [](const EngineConfig& config) { return soft::create_engine(config); }},
#else
    {"soft", probe_soft, nullptr, nullptr},
#endif
};

#ifdef PV_HAVE_SOFT
// The soft engine without its specialised handlers: what tests compare it with. Never chosen by
// auto, and not listed.
const Row kReference = {"soft-reference", probe_soft, offer_soft,
                        [](const EngineConfig& config) {
                            EngineConfig reference = config;
                            reference.reference = true;
                            return soft::create_engine(reference);
                        }};
#endif

const Row& choose(const std::string& name) {
#ifdef PV_HAVE_SOFT
    if (name == kReference.name) return kReference;
#endif
    std::string known = "auto";
    EngineStatus why;
    for (const Row& row : kEngines) {
        known += std::string(", ") + row.name;
        if (name != row.name && name != "auto") continue;
        EngineStatus status = row.probe();
        if (status.reason.empty()) return row;
        why = status;
    }
    if (why.name.empty()) {
        throw ConfigError("engine", "there is no engine '" + name + "'; choose one of " + known);
    }
    throw EngineUnavailable(why.name, why.reason,
                            "engine " + why.name + " cannot run here: " + why.message);
}

}  // namespace

std::vector<EngineStatus> engines() {
    std::vector<EngineStatus> result;
    for (const Row& row : kEngines) result.push_back(row.probe());
    return result;
}

std::string resolve_engine(const std::string& name) {
    return choose(name).name;
}

EngineOffer engine_offer(const std::string& name) {
    return choose(name).offer();
}

std::unique_ptr<Engine> create_engine(const std::string& name, const EngineConfig& config) {
    return choose(name).create(config);
}

}  // namespace polyvisor
