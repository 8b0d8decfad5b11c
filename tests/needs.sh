# Sourced by the scripts beside it: installing what a fresh Debian 12 lacks.

fail() {
    echo "$0: $*" >&2
    exit 1
}

# need PROGRAM:PACKAGE...  installs the packages whose program is missing; asks apt nothing if none is.
need() {
    local pair program lacking=()
    for pair in "$@"; do
        program=${pair%%:*}
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || [ -e "$program" ] || lacking+=("${pair#*:}")
    done
    [ ${#lacking[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "install these first: ${lacking[*]}"
    [ "$(id -u)" = 0 ] || fail "needs root to install: ${lacking[*]}"
    echo "installing: ${lacking[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # Installing a package must not start its service: the tests run their own sshd and nix-daemon.
    local policy=/usr/sbin/policy-rc.d made=
    [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; made=1; }
    apt-get update -qq && apt-get install -qq -y --no-install-recommends "${lacking[@]}" >/dev/null ||
        { [ -z "$made" ] || rm -f $policy; fail "apt-get cannot install: ${lacking[*]}"; }
    [ -z "$made" ] || rm -f $policy
}

# Everything that the machines of the rig are made of.
need_rig() {
    need nix:nix-bin /usr/sbin/sshd:openssh-server ssh:openssh-client /bin/busybox:busybox-static \
        ip:iproute2 openssl:openssl nsenter:util-linux
}

# What cargo needs besides itself: a C compiler, for the compression libraries.
need_build() {
    command -v cargo >/dev/null || [ ! -x "$HOME/.cargo/bin/cargo" ] || PATH=$HOME/.cargo/bin:$PATH
    command -v cargo >/dev/null || fail "needs cargo of Rust 1.90 or newer"
    need cc:gcc /usr/include/stdlib.h:libc6-dev
}
