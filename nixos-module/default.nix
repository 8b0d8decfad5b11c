# Both modules; each is off until it is enabled.
{
  imports = [
    ./builder.nix
    ./client.nix
  ];
}
