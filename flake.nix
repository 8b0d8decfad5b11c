{
  description = "Muster: one signed Nix substituter for all of your builders";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      forAll = make: nixpkgs.lib.genAttrs systems (system: make (import nixpkgs { inherit system; overlays = [ self.overlays.default ]; }));
    in
    {
      overlays.default = final: prev: { muster = final.callPackage ./nixos-module/package.nix { }; };

      packages = forAll (pkgs: {
        inherit (pkgs) muster;
        default = pkgs.muster;
      });

      nixosModules =
        let
          # With our package where nixpkgs has none of that name yet.
          with-package = module: {
            imports = [ module ];
            nixpkgs.overlays = [ self.overlays.default ];
          };
        in
        {
          default = with-package ./nixos-module;
          builder = with-package ./nixos-module/builder.nix;
          client = with-package ./nixos-module/client.nix;
        };

      checks = forAll (pkgs: {
        inherit (pkgs) muster;
        nixos = pkgs.testers.runNixOSTest (import ./nixos-module/test.nix);
      });

      formatter = forAll (pkgs: pkgs.nixfmt-rfc-style);
    };
}
