# From `nix.buildMachines` to Muster's configuration. Pure: builtins alone, so that any Nix evaluates it
# without nixpkgs; tests/nixos_module.rs does.
let
  inherit (builtins)
    attrNames
    concatLists
    concatStringsSep
    elem
    elemAt
    filter
    foldl'
    genList
    isAttrs
    isList
    length
    listToAttrs
    match
    replaceStrings
    toJSON
    ;
in
rec {
  # The settings that a running muster takes over at a restart alone: those of src/app/reload.rs.
  needingRestart = builtins.intersectAttrs {
    listen = null;
    store-dir = null;
    cache-dir = null;
    cache-size = null;
    compression-level = null;
    max-encoders = null;
    negative-ttl = null;
    revalidate-after = null;
    memory-cache-size = null;
    roots-lifetime = null;
    prefetch = null;
    prefetch-closure = null;
    prefetch-nars = null;
    stall-timeout = null;
    max-connections = null;
    stop-timeout = null;
    log = null;
    log-format = null;
  };

  # The upstreams that build machines stand for, each once: two lines for one host, user and port (x86_64
  # and i686) are one store, and the first says how it is reached. Returns
  #   upstreams    tables of Muster's configuration, in the order of the machines
  #   credentials  [ { name, path } ], the ssh keys, each once
  #   withoutKey   host names of machines that name no ssh key
  # A machine without protocol is reached by none, localhost is the local daemon, and those in `exclude`
  # (by hostName) are not wanted.
  fromBuildMachines =
    {
      buildMachines,
      exclude ? [ ],
    }:
    let
      wanted = filter (
        machine:
        machine.protocol or "ssh" != null
        && !elem machine.hostName exclude
        && !(machine.sshUser or null == null && machine.hostName == "localhost")
      ) buildMachines;
      stores = firstOfEach identity wanted;
      keyed = filter (machine: sshKey machine != null) stores;
      keys = unique (map sshKey keyed);
      names = listToAttrs (
        genList (i: {
          name = elemAt keys i;
          value = "ssh-key-${toString i}";
        }) (length keys)
      );
    in
    {
      upstreams = map (machine: {
        uri = storeUri machine (if sshKey machine == null then null else names.${sshKey machine});
      }) stores;
      credentials = map (path: {
        name = names.${path};
        inherit path;
      }) keys;
      withoutKey = map (machine: machine.hostName) (filter (machine: sshKey machine == null) stores);
    };

  # The store URI of a build machine, reached with the key in this credential; null: no key of its own.
  storeUri =
    machine: credential:
    let
      hostKey = machine.publicHostKey or null;
      own =
        (if credential == null then [ ] else [ "ssh-key=${encode credential}" ])
        ++ (if hostKey == null then [ ] else [ "base64-ssh-public-host-key=${encode hostKey}" ]);
      # Of two parameters of one name the first counts: what the machine says stands before its host's.
      said = parts machine.hostName;
      params = own ++ (if said.query == "" then [ ] else [ said.query ]);
    in
    "${machine.protocol or "ssh"}://"
    + authority machine
    + (if params == [ ] then "" else "?${concatStringsSep "&" params}");

  # The configuration file: JSON, which Muster reads as it reads TOML. What is null is left out, so that
  # Muster's own default counts.
  configText = settings: toJSON (withoutNull settings);

  # Upstreams that were written by name, as the list that Muster reads.
  namedUpstreams = tables: map (name: { inherit name; } // tables.${name}) (attrNames tables);

  # Attributes of a unit as its text. What is null is left out, a list is one line for each element.
  unitText =
    sections:
    let
      line =
        name: value:
        if value == null then
          ""
        else if isList value then
          concatStringsSep "" (map (line name) value)
        else
          "${name}=${if value == true then "true" else if value == false then "false" else toString value}\n";
      section = { name, attrs }: "[${name}]\n" + concatStringsSep "" (map (key: line key attrs.${key}) (attrNames attrs));
    in
    concatStringsSep "\n" (map section sections);

  # Percent-encodes what would end a parameter's value, or start something else.
  encode = replaceStrings [ "%" "&" "#" " " "\"" ] [ "%25" "%26" "%23" "%20" "%22" ];

  withoutNull =
    value:
    if isList value then
      map withoutNull value
    else if isAttrs value then
      listToAttrs (
        concatLists (
          map (
            name:
            if value.${name} == null then
              [ ]
            else
              [
                {
                  inherit name;
                  value = withoutNull value.${name};
                }
              ]
          ) (attrNames value)
        )
      )
    else
      value;

  unique = foldl' (seen: value: if elem value seen then seen else seen ++ [ value ]) [ ];

  # ---- what tells one store from another

  # The first machine of each identity.
  firstOfEach =
    identity: machines:
    (foldl'
      (
        found: machine:
        let
          id = identity machine;
        in
        if elem id found.ids then
          found
        else
          {
            ids = found.ids ++ [ id ];
            machines = found.machines ++ [ machine ];
          }
      )
      {
        ids = [ ];
        machines = [ ];
      }
      machines
    ).machines;

  # User, host and port, and the store there; how it is asked does not count.
  identity =
    machine:
    let
      found = match "((.*)@)?([^@]*)" (authority machine);
      pairs = filter builtins.isString (builtins.split "&" (parts machine.hostName).query);
      remote = filter (found: found != null) (map (match "remote-store=(.*)") pairs);
    in
    [
      (elemAt found 1)
      (lower (elemAt found 2))
      (if remote == [ ] then "" else elemAt (elemAt remote 0) 0)
    ];

  authority =
    machine:
    let
      user = machine.sshUser or null;
    in
    (if user == null then "" else "${user}@") + place machine;

  place = machine: (parts machine.hostName).place;

  sshKey = machine: machine.sshKey or null;

  parts =
    hostName:
    let
      found = match "([^?]*)([?](.*))?" hostName;
      query = elemAt found 2;
    in
    {
      place = elemAt found 0;
      query = if query == null then "" else query;
    };

  lower =
    let
      letters = text: genList (i: builtins.substring i 1 text) 26;
    in
    replaceStrings (letters "ABCDEFGHIJKLMNOPQRSTUVWXYZ") (letters "abcdefghijklmnopqrstuvwxyz");
}
