# The sandbox of Muster's units. Pure: no nixpkgs, only names and values of systemd.exec(5).
#
# `systemd-analyze security` puts `serve` at 1.1 of 10, where 10 is a service without any; what remains is
# the network itself. tests/nixos_module.rs holds it at 1.5 or better, and looks for misspelt names.
rec {
  # What every unit of ours does without.
  common = {
    CapabilityBoundingSet = "";
    AmbientCapabilities = "";
    DeviceAllow = "";
    DevicePolicy = "closed";
    KeyringMode = "private";
    LockPersonality = true;
    MemoryDenyWriteExecute = true;
    NoNewPrivileges = true;
    PrivateDevices = true;
    PrivateMounts = true;
    PrivateTmp = true;
    PrivateUsers = true;
    ProcSubset = "pid";
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHome = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    ProtectSystem = "strict";
    RemoveIPC = true;
    RestrictNamespaces = true;
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
    SystemCallErrorNumber = "EPERM";
    SystemCallFilter = [ "@system-service" "~@privileged @resources" ];
    UMask = "0077";
  };

  # The server: a user of its own, and the network for clients and ssh. What it writes others may read, so
  # that nginx can serve the folder of its cache; state and runtime folders are closed by their own modes.
  serve = common // {
    UMask = "0022";
    RestrictAddressFamilies = [ "AF_UNIX" "AF_INET" "AF_INET6" ];
  };

  # sign-all of the local store: root, because adding signatures takes a trusted user of the daemon, but
  # with nothing of root's powers, and no network.
  signAll = common // {
    IPAddressDeny = "any";
    PrivateNetwork = true;
    RestrictAddressFamilies = [ "AF_UNIX" ];
  };
}
