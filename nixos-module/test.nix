# Two builders and a client, as NixOS machines: nix build .#checks.x86_64-linux.nixos
#
# The client finds builder a by ssh in its nix.buildMachines, and asks builder b by HTTP.
{ pkgs, lib, ... }:
let
  # For this test alone; the ssh keys are those of nixpkgs' own tests.
  ssh = import "${pkgs.path}/nixos/tests/ssh-keys.nix" pkgs;
  clientKey = {
    secret = "vm-test-1:hK4wJ1YU/ko1NsR6SBaH6nYSJIx+MDYAXnMQa+JlTCWQzHoK7oyiBEGiB4Ed4KGOmpakfvflhsMniWwcdzoKmw==";
    public = "vm-test-1:kMx6Cu6MogRBogeBHeChjpqWpH735YbDJ4lsHHc6Cps=";
  };
  builderKey = {
    secret = "vm-test-builder-1:IQfc7C75hPXtGRBvNEK64jA4vQiz37HGqTBDW4DG8x76G4Pt6OWCgdp60esH3DWTomG7mWGKypaHnUpWTqvMrA==";
    public = "vm-test-builder-1:+huD7ejlgoHaetHrB9w1k6Jhu5lhisqWh51KVk6rzKw=";
  };

  # Paths that the builders have and the client does not.
  path = name: pkgs.writeText name "built on ${name}";
  onA = path "on-a";
  onB = path "on-b";
  onBoth = path "on-both";
  foreign = path "foreign";

  secret = text: {
    inherit text;
    mode = "0400";
  };
  common = {
    imports = [ ./default.nix ];
    virtualisation.writableStore = true;
    nix.settings.substituters = lib.mkForce [ ];
    nix.settings.experimental-features = [ "nix-command" ];
  };
in
{
  name = "muster";

  nodes = {
    a = {
      imports = [ common ];
      system.extraDependencies = [ onA onBoth ];
      services.muster.builder = {
        enable = true;
        authorizedKeys = [ ssh.snakeOilPublicKey ];
        signAll.enable = true;
        signKeyPath = "/etc/builder-key";
      };
      environment.etc.builder-key = secret builderKey.secret;
    };

    b = {
      imports = [ common ];
      system.extraDependencies = [ onB onBoth ];
      services.muster.builder = {
        enable = true;
        transport = "http";
        openFirewall = true;
        signKeyPath = "/etc/builder-key";
      };
      environment.etc.builder-key = secret builderKey.secret;
    };

    # A binary cache that signs with a key that nobody knows.
    stranger = {
      imports = [ common ];
      system.extraDependencies = [ foreign ];
      services.muster.builder = {
        enable = true;
        transport = "http";
        openFirewall = true;
      };
    };

    client = {
      imports = [ common ];
      nix.buildMachines = [
        {
          hostName = "a";
          sshUser = "muster-builder";
          protocol = "ssh-ng";
          system = pkgs.stdenv.hostPlatform.system;
          sshKey = "/etc/ssh-key";
        }
      ];
      programs.ssh.extraConfig = "StrictHostKeyChecking accept-new";
      environment.etc.ssh-key = secret ssh.snakeOilPrivateKey;
      environment.etc.muster-key = secret clientKey.secret;
      services.muster.client = {
        enable = true;
        signKeyPaths = [ "/etc/muster-key" ];
        publicKeys = [ clientKey.public ];
        upstreams.b = {
          uri = "http://b:5000";
          trusted-public-keys = [ builderKey.public ];
        };
        upstreams.stranger = {
          uri = "http://stranger:5000";
          trusted-public-keys = [ builderKey.public ];
        };
      };
      nix.settings.substituters = lib.mkOverride 10 [ "http://127.0.0.1:5000?priority=30" ];
    };
  };

  testScript = ''
    start_all()
    for builder in [b, stranger]:
        builder.wait_for_unit("muster-builder.service")
    a.wait_for_unit("sshd.service")
    client.wait_for_unit("muster.socket")
    client.wait_until_succeeds("curl -f http://127.0.0.1:5000/nix-cache-info")

    def realise(path):
        return f"nix-store --realise {path} --store /root/other-store"

    with subtest("a path of each builder"):
        client.wait_until_succeeds(realise("${onA}"))
        client.wait_until_succeeds(realise("${onB}"))

    with subtest("the credentials are not in the store"):
        client.fail("grep -rqF '${clientKey.secret}' /etc/systemd/system/muster.service")

    with subtest("a foreign signature is refused"):
        client.fail(realise("${foreign}"))

    with subtest("the local store is signed"):
        a.succeed("systemctl start muster-sign-all.service")
        a.succeed("nix store verify --no-contents --sigs-needed 1 --option trusted-public-keys '${builderKey.public}' ${onA}")

    with subtest("a builder that is gone costs nothing"):
        a.shutdown()
        client.succeed(realise("${onBoth}"))
  '';
}
