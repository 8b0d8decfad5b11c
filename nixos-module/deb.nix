# The units of the .deb, as texts by file name; debian/ holds what this says, and a test compares them.
let
  lib = import ./lib.nix;
  units = import ./units.nix;
  section = name: attrs: { inherit name attrs; };

  # Each file of /etc/muster/credentials is the credential muster_FILE, and none need be there.
  credentials = [ "muster:/etc/muster/credentials" ];
  serve = units.serve {
    inherit credentials;
    muster = "/usr/bin/muster";
    kill = "/bin/kill";
    config = "/etc/muster/muster.toml";
    sshKey = "muster_ssh-key";
    knownHosts = "muster_known-hosts";
    # Debian's own packages of Nix keep the daemon's socket for this group.
    groups = [ "nix-users" ];
  };
  socket = units.socket { listen = [ "127.0.0.1:5000" ]; };
  signAll = units.signAll {
    inherit credentials;
    muster = "/usr/bin/muster";
    secretKeys = [ "muster_secret-key" ];
  };
in
{
  "muster.service" = lib.unitText [
    (section "Unit" serve.unitConfig)
    (section "Service" serve.serviceConfig)
    (section "Install" { WantedBy = "multi-user.target"; Also = "muster.socket"; })
  ];
  "muster.socket" = lib.unitText [
    (section "Unit" socket.unitConfig)
    (section "Socket" socket.socketConfig)
    (section "Install" { WantedBy = "sockets.target"; })
  ];
  "muster-sign-all.service" = lib.unitText [
    (section "Unit" signAll.unitConfig)
    (section "Service" signAll.serviceConfig)
  ];
  "muster-sign-all.timer" = lib.unitText [
    (section "Unit" { Description = "Sign every path of the Nix store, daily"; })
    (section "Timer" { OnCalendar = "daily"; RandomizedDelaySec = "1h"; Persistent = true; })
    (section "Install" { WantedBy = "timers.target"; })
  ];
}
