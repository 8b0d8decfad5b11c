# Sourced by run: machines as small containers, made by the scripts of tests/rig.
#
# Each has a /nix, an address and processes of its own; its first process lives as long as this shell keeps
# a pipe open (fd 9), so nothing is left behind however the shell ends.

declare -A pid_of
hub=

make_lab() {
    lab=$(mktemp -d "${TMPDIR:-/tmp}/muster-two-builders-XXXXXX")
    chmod 755 "$lab"
    mkdir -p "$lab/share/bin"
    cp "$MUSTER" "$lab/share/bin/muster"
    cp "$rig/workload.nix" "$lab/share/"
    echo '127.0.0.1 localhost' >"$lab/share/hosts"
    ssh-keygen -q -t ed25519 -N '' -C two-builders -f "$lab/share/id_ed25519"
    mkfifo "$lab/life"
    exec 9<>"$lab/life"
    unshare --net -- sh "$rig/hub-init" "$lab" <"$lab/life" >"$lab/hub.log" 2>&1 9>&- &
    hub=$!
    await_line up "$lab/hub.log"
}

end_lab() {
    local name
    for name in "${!pid_of[@]}"; do kill -KILL "${pid_of[$name]}" 2>/dev/null || true; done
    exec 9>&-
    [ -z "$hub" ] || wait "$hub" || true
}

make_machine() { # NAME NUMBER
    local name=$1 dir=$lab/$1 files=$lab/$1/files address=10.77.0.$2 unshare
    mkdir -p "$files/root/.ssh" "$files/etc/ssh" "$files/etc/nix"
    cp "$lab/share/id_ed25519" "$files/root/.ssh/"
    cp "$lab/share/id_ed25519.pub" "$files/root/.ssh/authorized_keys"
    printf 'Host *\n  UserKnownHostsFile /lab/known_hosts\n  BatchMode yes\n  LogLevel ERROR\n' >"$files/root/.ssh/config"
    chmod -R go= "$files/root"
    ssh-keygen -q -t ed25519 -N '' -C '' -f "$files/etc/ssh/lab_host_key"
    echo "$address $name" >>"$lab/share/hosts"
    echo "$name,$address $(cat "$files/etc/ssh/lab_host_key.pub")" >>"$lab/share/known_hosts"
    echo "$nix_conf" >"$files/etc/nix/nix.conf"
    echo "$sshd_config" >"$files/etc/ssh/lab_sshd_config"

    unshare --mount --uts --ipc --pid --net --fork --kill-child -- sh "$rig/machine-init" \
        "$name" "$dir" / "$lab/share" <"$lab/life" >"$dir/init.log" 2>&1 9>&- &
    unshare=$!
    disown
    await_line up "$dir/init.log"
    # The kernel ends this file without a newline, which read takes for a failure.
    read -r "pid_of[$name]" _ <"/proc/$unshare/task/$unshare/children" || true
    nsenter -t "$hub" -n -- sh -ec "
        ip link add m$2 type veth peer name eth0 netns ${pid_of[$name]}
        ip link set m$2 master hub; ip link set m$2 up"
    nsenter -t "${pid_of[$name]}" -n -- sh -ec "ip addr add $address/24 dev eth0; ip link set eth0 up"
}

# inside NAME COMMAND  runs a shell line in a machine, for at most two minutes.
inside() {
    timeout -k 5 120 nsenter -t "${pid_of[$1]}" -m -u -i -n -p -r -w -- \
        env -i HOME=/root USER=root LANG=C.UTF-8 PATH=/lab/bin:/usr/sbin:/usr/bin:/sbin:/bin sh -c "$2" </dev/null 9>&-
}

start_builder() { # NAME
    inside "$1" 'setsid /usr/sbin/sshd -f /etc/ssh/lab_sshd_config; setsid nix-daemon >/run/nix-daemon.log 2>&1 &'
    await "inside $1 'ssh-keyscan -T 1 $1 >/dev/null 2>&1 && [ -S /nix/var/nix/daemon-socket/socket ]'" 100 "$1's services"
}

# signal NAME SIGNAL PROGRAM...  to every process of that name in a machine.
signal() {
    local machine=$1 signal=$2
    shift 2
    inside "$machine" "for p in $*; do for d in /proc/[0-9]*; do
        case \$(cat \$d/comm 2>/dev/null) in \$p*) kill -$signal \${d#/proc/} ;; esac; done; done; sleep 0.2" || true
}

# empty NAME  forgets the store and all that Nix remembers.
empty() {
    rm -rf --one-file-system "$lab/$1/nix/"{store,var}
    inside "$1" 'rm -rf /root/.cache'
}

await() { # COMMAND TENTHS WHAT
    local tries=0
    until eval "$1"; do
        tries=$((tries + 1))
        [ $tries -lt "$2" ] || fail "$3 did not come up"
        sleep 0.1
    done
}

await_line() { # LINE FILE
    local tries=0
    until grep -qx "$1" "$2" 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || fail "no machine can be made; are namespaces or overlayfs refused here? $(tail -n 3 "$2")"
        sleep 0.1
    done
}

nix_conf='sandbox = false
build-users-group =
substituters =
builders =
require-sigs = true
trusted-users = root
max-jobs = 2
fsync-metadata = false
flake-registry =
extra-experimental-features = nix-command'

sshd_config='HostKey /etc/ssh/lab_host_key
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
StrictModes no
PidFile none
UseDNS no
MaxStartups 200:30:400'
