# The units, as attributes in the form of NixOS's systemd.services and systemd.sockets. Pure.
#
# One truth for NixOS (client.nix, builder.nix) and for the .deb (deb.nix writes them as text).
let
  hardening = import ./hardening.nix;
  present = (import ./lib.nix).withoutNull;
in
{
  # The server. `muster` and `kill` are programs, `config` is the configuration file; credentials are lines
  # "NAME:PATH". ssh finds the credentials sshKey and knownHosts, where they are, behind what the
  # configuration names for an upstream. The user `name` must exist. `groups` are those that the daemon's socket is open to, if not to all.
  serve =
    {
      name ? "muster",
      description ? "Muster, one signed Nix substituter for all builders",
      muster,
      kill,
      config,
      credentials,
      sshKey,
      knownHosts,
      groups ? null,
    }:
    {
      unitConfig = {
        Description = description;
        Documentation = "man:muster-serve(1)";
        Requires = "${name}.socket";
        # nix-daemon is not among them: it asks Muster, and Muster waits for it like for any builder.
        After = "${name}.socket network.target";
        # What cannot start ends up failed, and its socket with it: clients are refused at once, and go to other
        # substituters. While it were started over and over they would wait for minutes.
        StartLimitIntervalSec = 60;
        StartLimitBurst = 5;
      };
      serviceConfig = present (hardening.serve // {
        Type = "notify";
        ExecStart = "${muster} serve --config ${config}";
        ExecReload = "${kill} -HUP $MAINPID";
        User = name;
        SupplementaryGroups = groups;
        StateDirectory = name;
        StateDirectoryMode = "0700";
        # The folder is a binary cache for whoever reads it: no dynamic user, whose folders are closed to others.
        CacheDirectory = name;
        CacheDirectoryMode = "0755";
        RuntimeDirectory = name;
        RuntimeDirectoryMode = "0700";
        LoadCredential = credentials;
        Environment = "\"NIX_SSHOPTS=-oIdentityFile=%d/${sshKey} -oUserKnownHostsFile=%d/${knownHosts}\"";
        LimitNOFILE = 65536;
        Restart = "on-failure";
        RestartSec = 2;
        # Transfers that run at a stop have 30 s.
        TimeoutStopSec = 45;
        WatchdogSec = 60;
      });
    };

  # Its sockets: clients that come while the server starts or restarts wait in the kernel.
  socket =
    {
      name ? "muster",
      listen,
    }:
    {
      unitConfig.Description = "Sockets of ${name}";
      socketConfig = {
        ListenStream = listen;
        # So that 0.0.0.0 and [::] can stand side by side.
        BindIPv6Only = "ipv6-only";
        Backlog = 4096;
        NoDelay = true;
        # Sockets are opened before the network is up.
        FreeBind = true;
      };
    };

  # Signs what the local store has, so that it is trusted wherever it is copied.
  signAll =
    {
      muster,
      credentials,
      secretKeys,
    }:
    {
      unitConfig = {
        Description = "Sign every path of the Nix store";
        Documentation = "man:muster-sign-all(1)";
      };
      serviceConfig = hardening.signAll // {
        Type = "oneshot";
        ExecStart =
          "${muster} sign-all"
          + builtins.concatStringsSep "" (map (name: " --secret-key-file %d/${name}") secretKeys);
        LoadCredential = credentials;
        Nice = 10;
        IOSchedulingClass = "idle";
      };
    };
}
