# What the account of services.muster.builder may do, whatever was asked for: talk to the daemon as any user
# of this machine does, ask what a closure holds, and read build logs.
case ${SSH_ORIGINAL_COMMAND-} in
"nix-store --serve")
    exec nix-store --serve
    ;;
"nix-store --read-log /nix/store/"*)
    log=${SSH_ORIGINAL_COMMAND#nix-store --read-log }
    case $log in
    *[!0-9A-Za-z/+._?=-]*) echo "this is not the name of a derivation" >&2 && exit 1 ;;
    esac
    exec nix-store --read-log "$log"
    ;;
*)
    exec nix-daemon --stdio
    ;;
esac
