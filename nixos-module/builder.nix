# services.muster.builder: lets clients read this machine's store, by ssh or by HTTP, and signs it.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkIf mkOption types;
  cfg = config.services.muster.builder;
  pure = import ./lib.nix;
  units = import ./units.nix;
  account = "muster-builder";

  http = cfg.enable && cfg.transport == "http";
  ssh = cfg.enable && cfg.transport == "ssh";

  signKey = lib.optional (cfg.signKeyPath != null) "sign-key";
  credentials = map (name: "${name}:${cfg.signKeyPath}") signKey;

  listen = map (address: "${address}:${toString cfg.port}") cfg.listen;
  settings = cfg.settings // {
    machines = false;
    local-daemon = true;
    inherit listen;
    secret-key-files = signKey;
  };
  # Of no use among the settings.
  ownOptions = builtins.intersectAttrs {
    machines = null;
    local-daemon = null;
    listen = null;
    secret-key-files = null;
  } cfg.settings;
  configText = pkgs.writeText "muster-builder.json" (pure.configText settings);
  configFile =
    if cfg.checkConfig then
      pkgs.runCommand "muster-builder-checked.json" { } ''
        ${lib.getExe cfg.package} check-config --no-files ${configText}
        cp ${configText} $out
      ''
    else
      configText;

  unit = units.serve {
    name = account;
    description = "Muster over this machine's own store";
    muster = lib.getExe cfg.package;
    kill = "${pkgs.coreutils}/bin/kill";
    config = "/etc/muster/builder.toml";
    inherit credentials;
    sshKey = "ssh-key";
    knownHosts = "known-hosts";
  };
  socket = units.socket {
    name = account;
    inherit listen;
  };
  signAll = units.signAll {
    muster = lib.getExe cfg.package;
    inherit credentials;
    secretKeys = signKey;
  };

  forcedCommand = pkgs.writeShellScript "muster-builder-command" ''
    PATH=${lib.makeBinPath [ config.nix.package ]}
    ${builtins.readFile ./forced-command.sh}
  '';

  secretPath = types.strMatching "/.*" // {
    description = "absolute path as a string, outside of the Nix store";
  };
in
{
  options.services.muster.builder = {
    enable = lib.mkEnableOption "a builder whose store Muster on other machines can ask";

    package = lib.mkPackageOption pkgs "muster" { };

    transport = mkOption {
      type = types.enum [
        "ssh"
        "http"
      ];
      default = "ssh";
      description = ''
        ssh: an account `muster-builder` that may talk to nix-daemon and nothing else.
        http: Muster over this machine's own store, for whoever can reach the port.
      '';
    };

    authorizedKeys = mkOption {
      type = types.listOf types.singleLineStr;
      default = [ ];
      description = "Public ssh keys of the clients (transport ssh).";
    };

    listen = mkOption {
      type = types.nonEmptyListOf types.str;
      default = [
        "0.0.0.0"
        "[::]"
      ];
      description = "Addresses to listen on (transport http).";
    };

    port = mkOption {
      type = types.port;
      default = 5000;
      description = "Port to listen on (transport http).";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to open the port in the firewall (transport http).";
    };

    settings = mkOption {
      type = types.submodule { freeformType = (pkgs.formats.json { }).type; };
      default = { };
      description = "Further keys of Muster's configuration file (transport http); see examples/config.toml.";
    };

    checkConfig = mkOption {
      type = types.bool;
      default = pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform;
      defaultText = lib.literalExpression "pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform";
      description = "Whether the configuration is checked when the system is built.";
    };

    signKeyPath = mkOption {
      type = types.nullOr secretPath;
      default = null;
      example = "/run/secrets/muster-key";
      description = ''
        File of the key to sign with, as `muster key generate` makes it; only root need be able to read it.
        Without one, Muster over HTTP makes its own, and there is no sign-all.
      '';
    };

    signAll = {
      enable = lib.mkEnableOption "signing every path of this machine's store, so that it is trusted wherever it is copied";

      schedule = mkOption {
        type = types.str;
        default = "daily";
        description = "When, in the form of {manpage}`systemd.time(7)`.";
      };
    };
  };

  config = lib.mkMerge [
    (mkIf cfg.enable {
      assertions = [
        {
          assertion = ownOptions == { };
          message = ''
            services.muster.builder.settings has ${lib.concatStringsSep ", " (lib.attrNames ownOptions)}, for which there are
            options of their own, or which a builder cannot change: listen and port, signKeyPath.
          '';
        }
        {
          assertion = ssh -> cfg.authorizedKeys != [ ];
          message = "services.muster.builder.authorizedKeys is empty: nobody could log in.";
        }
        {
          assertion = cfg.signAll.enable -> cfg.signKeyPath != null;
          message = "services.muster.builder.signAll needs a key: set services.muster.builder.signKeyPath.";
        }
        {
          assertion = cfg.signKeyPath == null || !lib.hasPrefix builtins.storeDir cfg.signKeyPath;
          message = "services.muster.builder.signKeyPath lies in the Nix store, where everybody can read it; name its path as a string.";
        }
        {
          assertion =
            http && config.services.muster.client.enable -> cfg.port != config.services.muster.client.port;
          message = "services.muster.builder and services.muster.client cannot share a port: set one of them to another.";
        }
      ];
      environment.systemPackages = [ cfg.package ];
    })

    (mkIf ssh {
      users.users.${account} = {
        description = "Muster on other machines";
        isSystemUser = true;
        group = account;
        useDefaultShell = true;
        openssh.authorizedKeys.keys = map (key: "restrict,command=\"${forcedCommand}\" ${key}") cfg.authorizedKeys;
      };
      users.groups.${account} = { };
      services.openssh.enable = true;
      nix.settings.extra-allowed-users = [ account ];
    })

    (mkIf http {
      users.users.${account} = {
        description = "Muster over this machine's own store";
        isSystemUser = true;
        group = account;
      };
      users.groups.${account} = { };
      environment.etc."muster/builder.toml".source = configFile;
      systemd.sockets.${account} = socket // {
        wantedBy = [ "sockets.target" ];
      };
      systemd.services.${account} = unit // {
        wantedBy = [ "multi-user.target" ];
        reloadTriggers = [ configFile ];
        # With the service its socket is opened anew.
        restartTriggers = [ (builtins.toJSON (pure.needingRestart settings)) ];
      };
      networking.firewall.allowedTCPPorts = mkIf cfg.openFirewall [ cfg.port ];
      nix.settings.extra-allowed-users = [ account ];
    })

    (mkIf (cfg.enable && cfg.signAll.enable) {
      systemd.services.muster-sign-all = signAll // {
        after = [ "nix-daemon.socket" ];
        startAt = cfg.signAll.schedule;
      };
      systemd.timers.muster-sign-all.timerConfig = {
        Persistent = true;
        RandomizedDelaySec = "1h";
      };
    })
  ];

  meta.maintainers = [ ];
}
