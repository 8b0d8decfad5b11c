{
  lib,
  rustPlatform,
  installShellFiles,
  stdenv,
}:
rustPlatform.buildRustPackage {
  pname = "muster";
  version = (lib.importTOML ../Cargo.toml).package.version;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../benches
      ../src
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;
  strictDeps = true;

  nativeBuildInputs = [ installShellFiles ];

  # The tests in tests/ want root, namespaces and a Nix to talk to; `bash tests/run` runs them.
  cargoTestFlags = [ "--lib" ];

  postInstall = lib.optionalString (stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
    $out/bin/muster man $TMPDIR/man
    installManPage $TMPDIR/man/*.1
    for shell in bash zsh fish; do
      $out/bin/muster completions $shell > muster.$shell
      installShellCompletion --cmd muster --$shell muster.$shell
    done
  '';

  meta = {
    description = "One signed Nix substituter for all of your builders";
    license = [
      lib.licenses.mit
      lib.licenses.asl20
    ];
    mainProgram = "muster";
    maintainers = [ ];
    platforms = lib.platforms.linux;
  };
}
