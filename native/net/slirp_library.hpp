// libslirp, looked up when the first user network is made: a program that makes none loads neither
// it nor glib.
#pragma once

#include <slirp/libslirp.h>

namespace polyvisor::net {

struct SlirpLibrary {
    decltype(&::slirp_new) create;
    decltype(&::slirp_cleanup) cleanup;
    decltype(&::slirp_input) input;
    decltype(&::slirp_pollfds_fill) fill;
    decltype(&::slirp_pollfds_poll) poll;
    decltype(&::slirp_add_hostfwd) add_forward;
    decltype(&::slirp_remove_hostfwd) remove_forward;

    /// Throws HostError when it is not installed, or too old. It stays loaded.
    static const SlirpLibrary& get();
};

}  // namespace polyvisor::net
