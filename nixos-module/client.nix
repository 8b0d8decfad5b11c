# services.muster.client: one signed substituter in front of this machine's builders.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.muster.client;
  pure = import ./lib.nix;
  units = import ./units.nix;
  json = pkgs.formats.json { };

  found = pure.fromBuildMachines {
    buildMachines = lib.optionals cfg.fromBuildMachines config.nix.buildMachines;
    exclude = cfg.excludeMachines;
  };

  # Options that name files become names of credentials.
  credentialOptions = {
    sshKeyPath = "ssh-key";
    credentialsPath = "credentials";
    netrcPath = "netrc";
  };
  named = lib.mapAttrs (
    name: upstream:
    let
      credential =
        option: if upstream.${option} == null then null else "${credentialOptions.${option}}-of-${name}";
      uri =
        if upstream.sshKeyPath == null then
          upstream.uri
        else
          upstream.uri
          + (if lib.hasInfix "?" upstream.uri then "&" else "?")
          + "ssh-key=${pure.encode (credential "sshKeyPath")}";
    in
    removeAttrs upstream (lib.attrNames credentialOptions)
    // {
      inherit uri;
    }
    // lib.optionalAttrs (upstream.credentialsPath != null) {
      credentials-file = credential "credentialsPath";
    }
    // lib.optionalAttrs (upstream.netrcPath != null) {
      netrc-file = credential "netrcPath";
    }
  ) cfg.upstreams;
  namedCredentials = lib.concatLists (
    lib.mapAttrsToList (
      name: upstream:
      lib.concatMap (
        option:
        lib.optional (upstream.${option} != null) {
          name = "${credentialOptions.${option}}-of-${name}";
          path = upstream.${option};
        }
      ) (lib.attrNames credentialOptions)
    ) cfg.upstreams
  );

  signKeys = lib.imap0 (i: path: {
    name = "sign-key-${toString i}";
    inherit path;
  }) cfg.signKeyPaths;
  credentials =
    found.credentials
    ++ namedCredentials
    ++ signKeys
    ++ lib.optional (cfg.sshKeyPath != null) {
      name = "ssh-key";
      path = cfg.sshKeyPath;
    }
    ++ lib.optional (cfg.knownHostsPath != null) {
      name = "known-hosts";
      path = cfg.knownHostsPath;
    };

  settings = cfg.settings // {
    machines = false;
    listen = listen;
    upstreams = pure.namedUpstreams named ++ found.upstreams;
    secret-key-files = map (key: key.name) signKeys;
  };
  # Of no use among the settings.
  ownOptions = builtins.intersectAttrs {
    machines = null;
    listen = null;
    upstreams = null;
    secret-key-files = null;
  } cfg.settings;
  configText = pkgs.writeText "muster.json" (pure.configText settings);
  configFile =
    if cfg.checkConfig then
      pkgs.runCommand "muster-checked.json" { } ''
        ${lib.getExe cfg.package} check-config --no-files ${configText}
        cp ${configText} $out
      ''
    else
      configText;

  listen = map (address: "${address}:${toString cfg.port}") cfg.listen;
  unit = units.serve {
    muster = lib.getExe cfg.package;
    kill = "${pkgs.coreutils}/bin/kill";
    config = "/etc/muster/muster.toml";
    credentials = map (credential: "${credential.name}:${credential.path}") credentials;
    sshKey = "ssh-key";
    knownHosts = "known-hosts";
  };
  socket = units.socket { inherit listen; };

  # What a client on this machine calls it. The first address, as loopback where it is all of them.
  host =
    let
      first = builtins.head cfg.listen;
    in
    if first == "0.0.0.0" then
      "127.0.0.1"
    else if first == "[::]" then
      "[::1]"
    else
      first;

  # A path as text: a key must never be copied into the store, as a path literal would be.
  secretPath = types.strMatching "/.*" // {
    description = "absolute path as a string, outside of the Nix store";
  };
in
{
  options.services.muster.client = {
    enable = lib.mkEnableOption "Muster in front of this machine's builders, as one signed substituter";

    package = lib.mkPackageOption pkgs "muster" { };

    listen = mkOption {
      type = types.nonEmptyListOf types.str;
      default = [ "127.0.0.1" ];
      example = [ "0.0.0.0" "[::]" ];
      description = "Addresses to listen on. Who can reach them can fetch every path of every builder.";
    };

    port = mkOption {
      type = types.port;
      default = 5000;
      description = "Port to listen on.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to open the port in the firewall.";
    };

    fromBuildMachines = mkOption {
      type = types.bool;
      default = true;
      description = "Whether {option}`nix.buildMachines` are upstreams; several entries for one store are one.";
    };

    excludeMachines = mkOption {
      type = types.listOf types.str;
      default = [ ];
      description = "Build machines, by hostName, that are no upstreams.";
    };

    upstreams = mkOption {
      default = { };
      description = "Stores to ask beside the build machines, by name.";
      example = {
        office.uri = "ssh-ng://nix@office.example";
      };
      type = types.attrsOf (
        types.submodule {
          freeformType = json.type;
          options = {
            uri = mkOption {
              type = types.str;
              description = "How the store is reached, as Nix names it.";
            };
            sshKeyPath = mkOption {
              type = types.nullOr secretPath;
              default = null;
              description = "File of the ssh key to log in with; only root need be able to read it.";
            };
            credentialsPath = mkOption {
              type = types.nullOr secretPath;
              default = null;
              description = "File with `USER:PASSWORD`, or a token, for a binary cache.";
            };
            netrcPath = mkOption {
              type = types.nullOr secretPath;
              default = null;
              description = "File in the form of netrc with the password for a binary cache.";
            };
          };
        }
      );
    };

    sshKeyPath = mkOption {
      type = types.nullOr secretPath;
      default = null;
      example = "/root/.ssh/id_ed25519";
      description = "File of the ssh key for machines that name none of their own.";
    };

    knownHostsPath = mkOption {
      type = types.nullOr secretPath;
      default = null;
      example = "/root/.ssh/known_hosts";
      description = ''
        File of host keys for machines without publicHostKey, beside those of {option}`programs.ssh.knownHosts`.
      '';
    };

    settings = mkOption {
      type = types.submodule { freeformType = json.type; };
      default = { };
      example = {
        cache-size = "50G";
        compression = "zstd";
      };
      description = "Further keys of Muster's configuration file; see examples/config.toml.";
    };

    checkConfig = mkOption {
      type = types.bool;
      default = pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform;
      defaultText = lib.literalExpression "pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform";
      description = "Whether the configuration is checked when the system is built.";
    };

    signKeyPaths = mkOption {
      type = types.listOf secretPath;
      default = [ ];
      example = [ "/run/secrets/muster-key" ];
      description = ''
        Files of the keys to sign with, as `muster key generate` makes them; each signs each path. Only root
        need be able to read them. Without any, Muster makes a key at its first start and logs the public half.
      '';
    };

    publicKeys = mkOption {
      type = types.listOf types.str;
      default = [ ];
      description = ''
        Public halves of the signing keys: `muster key public < SECRET`. They cannot be had from the files
        when the system is built, because those are not there then.
      '';
    };

    useAsSubstituter = mkOption {
      type = types.bool;
      default = true;
      description = "Whether this machine's Nix uses it, by {option}`nix.settings`.";
    };

    substituterPriority = mkOption {
      type = types.ints.unsigned;
      default = 30;
      description = "Place among the substituters, lower first; cache.nixos.org has 40.";
    };

    negativeTtl = mkOption {
      type = types.ints.unsigned;
      default = 60;
      description = "Seconds for which Nix remembers \"not there\". Its own hour would hide what was built a minute ago.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = ownOptions == { };
        message = ''
          services.muster.client.settings has ${lib.concatStringsSep ", " (lib.attrNames ownOptions)}, for which there are
          options of their own: fromBuildMachines, listen and port, upstreams, signKeyPaths.
        '';
      }
      {
        assertion = cfg.useAsSubstituter -> cfg.publicKeys != [ ];
        message = ''
          services.muster.client.publicKeys is empty, and without its key Nix takes nothing from Muster. Show it
          with `muster key public < SECRET`, or set services.muster.client.useAsSubstituter to false.
        '';
      }
      {
        assertion = cfg.publicKeys == [ ] || cfg.signKeyPaths != [ ];
        message = "services.muster.client.publicKeys has keys, but signKeyPaths names no file to sign with.";
      }
      {
        assertion = found.withoutKey == [ ] || cfg.sshKeyPath != null;
        message = ''
          These build machines name no sshKey, and the service cannot see root's own: ${lib.concatStringsSep ", " found.withoutKey}.
          Set services.muster.client.sshKeyPath, give them an sshKey, or list them in excludeMachines.
        '';
      }
      {
        assertion = lib.all (name: builtins.match "[A-Za-z0-9._-]+" name != null) (lib.attrNames cfg.upstreams);
        message = "services.muster.client.upstreams: a name may hold letters, digits, dots, hyphens and underscores, because it becomes that of a credential.";
      }
      {
        assertion = lib.all (key: !lib.hasPrefix builtins.storeDir key.path) credentials;
        message = "services.muster.client: a secret lies in the Nix store, where everybody can read it; name its path as a string.";
      }
    ];

    environment.etc."muster/muster.toml".source = configFile;
    environment.systemPackages = [ cfg.package ];

    users.users.muster = {
      description = "Muster";
      isSystemUser = true;
      group = "muster";
    };
    users.groups.muster = { };

    systemd.sockets.muster = socket // {
      wantedBy = [ "sockets.target" ];
    };
    systemd.services.muster = unit // {
      wantedBy = [ "multi-user.target" ];
      path = [ config.programs.ssh.package ];
      # SIGHUP: upstreams that stay keep their connections.
      reloadTriggers = [ configFile ];
      # With the service its socket is opened anew.
      restartTriggers = [ (builtins.toJSON (pure.needingRestart settings)) ];
    };

    networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall [ cfg.port ];

    nix.settings = lib.mkMerge [
      { extra-allowed-users = [ "muster" ]; }
      (lib.mkIf cfg.useAsSubstituter {
        # Nix asks by what its URL says of the priority, else by nix-cache-info.
        substituters = [ "http://${host}:${toString cfg.port}?priority=${toString cfg.substituterPriority}" ];
        trusted-public-keys = cfg.publicKeys;
        narinfo-cache-negative-ttl = cfg.negativeTtl;
      })
    ];
  };

  meta.maintainers = [ ];
}
