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

# need_memory MIB  has the machines' stores lie in memory, where so much is free.
need_memory() {
    local free
    free=$(df --output=avail -m /dev/shm 2>/dev/null | tail -n 1)
    [ "${free:-0}" -ge "$1" ] || fail "needs $1 MiB free in /dev/shm for the stores of the machines, or --disk"
    export TMPDIR=/dev/shm
}

# Everything that the machines of the rig are made of.
need_rig() {
    need nix:nix-bin /usr/sbin/sshd:openssh-server ssh:openssh-client /bin/busybox:busybox-static \
        ip:iproute2 openssl:openssl nsenter:util-linux
}

# What systemd's tools and a booted systemd are needed for: the units, the .deb, the README.
need_systemd() {
    need systemd-analyze:systemd systemd-nspawn:systemd-container dpkg-shlibdeps:dpkg-dev nginx:nginx-light curl:curl \
        "/usr/lib/$(uname -m)-linux-gnu/libnss_systemd.so.2:libnss-systemd" ssh:openssh-client
}

# Rust by rustup where there is none or too old a one (Debian 12 has 1.63), and a C compiler for the
# compression libraries.
need_build() {
    export PATH=$PATH:$HOME/.cargo/bin
    if ! rust_is_new_enough; then
        need curl:curl /etc/ssl/certs/ca-certificates.crt:ca-certificates
        echo "installing: Rust, by rustup"
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
            sh -s -- -q -y --no-modify-path --profile minimal -c rustfmt -c clippy ||
            fail "needs cargo of Rust $rust_min or newer, and rustup cannot be had: install it first"
        export PATH=$HOME/.cargo/bin:$PATH
        rust_is_new_enough || fail "needs cargo of Rust $rust_min or newer; this is $(cargo --version)"
    fi
    need cc:gcc /usr/include/stdlib.h:libc6-dev
}

rust_min=1.90

rust_is_new_enough() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d' ' -f2) || return 1
    [ -n "$version" ] && [ "$(printf '%s\n' "$rust_min" "$version" | sort -V | head -n 1)" = "$rust_min" ]
}
