# Derivations that build offline with nothing but /bin/busybox (static) and /usr/bin/openssl.
#
#   nix-build workload.nix -A dag --arg n 200 --argstr seed x
{ seed ? "s", n ? 200, width ? 20, sizeKB ? 4, sizeMB ? 1, sleep ? "0", system ? builtins.currentSystem }:
let
  make = name: script: extra: derivation ({
    inherit name system seed;
    builder = "/bin/busybox";
    args = [
      "sh" "-ec" ''
        for a in cat chmod date head ln mkdir printf seq sleep yes; do eval "$a() { /bin/busybox $a \"\$@\"; }"; done
        noise() { # MESSAGE-LENGTH: bytes that do not compress, the same at every build
          /usr/bin/openssl enc -aes-128-ctr -nosalt -iv 0 -in /dev/zero 2>/dev/null \
            -K $(printf %s "$seed$name" | /bin/busybox md5sum | head -c 32) | head -c $1 || true
        }
        ${script}
      ''
    ];
  } // extra);

  list = builtins.genList;
  mod = a: b: a - b * (a / b);
  kib = toString (sizeKB * 1024);
  mib = toString (sizeMB * 1048576);

  # n small paths in layers; each refers to three of the layer below.
  layers = list (l: list (i: make "node-${toString l}-${toString i}"
    "mkdir $out; printf '%s\\n' $below > $out/below; noise ${kib} > $out/data"
    {
      below = if l == 0 then [ ] else
        list (k: builtins.elemAt (builtins.elemAt layers (l - 1)) (mod (i * 7 + k * 3) width)) 3;
    }) width) (n / width);

  floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
in
rec {
  tiny = make "tiny" "echo $seed > $out" { };
  big = make "big" "noise ${mib} > $out" { };
  # Text of bytes that do not compress: each level of a compressor makes another file of it.
  text = make "text" "noise ${mib} | /usr/bin/openssl base64 > $out" { };
  soft = make "soft" "yes $seed | head -c ${mib} > $out || true" { };

  # The closure of dag is n + 1 paths.
  dag = make "dag" "mkdir $out; printf '%s\\n' $below > $out/below" { below = builtins.concatLists layers; };
  # The same, but its top refers to the last layer alone: what is below is learnt layer by layer.
  deep = make "deep" "mkdir $out; printf '%s\n' $below > $out/below" { below = builtins.elemAt layers (n / width - 1); };
  flat = make "flat" "printf '%s\\n' $parts > $out"
    { parts = list (i: make "flat-${toString i}" "noise ${kib} > $out" { }) n; };
  files = make "files" "mkdir $out; for i in $(seq ${toString n}); do echo $i $seed > $out/f$i; done" { };

  multi = make "multi" ''
    mkdir $out $dev $lib
    echo lib > $lib/lib.so; chmod +x $lib/lib.so; ln -s $lib/lib.so $out/lib.so; echo $out $lib > $dev/pc
  '' { outputs = [ "out" "dev" "lib" ]; };
  symlink = make "symlink" "ln -s ${tiny} $out" { };
  executable = make "executable" "echo '#!/bin/sh' > $out; chmod +x $out" { };
  selfReference = make "self-reference" "mkdir $out; echo $out > $out/me" { };

  # Everything that a NAR can hold.
  odd = make "odd+_.?=name" ''
    mkdir $out $out/empty "$out/sp ace" "$out/größe" "$out/日本語"
    echo x > "$out/日本語/ファイル"; echo y > "$out/größe/ß"; echo z > "$out/sp ace/a b"; : > $out/empty-file
    printf 'a' > "$out/new
    line"; printf 1234567 > $out/seven; printf 12345678 > $out/eight; echo A > $out/Case; echo a > $out/case
    printf '\377' > "$out/$(printf 'byte-\377')"
    echo '#!/bin/sh' > $out/run; chmod +x $out/run; ln -s run $out/near; ln -s /nowhere $out/dangling
    ln -s ${multi} $out/other; ln -s $out/run $out/self
    d=$out; for i in $(seq 40); do d=$d/d; mkdir $d; done; echo deep > $d/f
  '' { };

  fixedFlat = make "fixed-flat" "printf hello > $out" {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
  };
  fixedRecursive = make "fixed-recursive" "printf hello > $out" {
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
    outputHash = "sha256-CkMIecJm+LV/QJKg+TXPP6zUi7zN5XYNR0jKQFFx6Wk=";
  };

  # Content-addressed derivations: what they make is found by their realisations.
  floatingBase = make "floating-base" "mkdir $out; echo $seed > $out/x" floating;
  floatingUser = make "floating-user" "mkdir $out; echo ${floatingBase} > $out/x" floating;

  # The same store path with other bytes at every build.
  nondeterministic = make "nondeterministic" "head -c 64 /dev/urandom > $out" { };
  chatty = make "chatty" "for i in $(seq 2000); do echo line $i of $seed; done; echo done > $out" { };

  # foo needs a chain of n slow dependencies to be built, and refers to none of them; fooRef refers to all.
  chain = builtins.foldl'
    (before: i: make "dependency-${toString i}"
      "sleep ${sleep}; mkdir $out; printf '%s\\n' \"$before\" > $out/before; echo dependency ${toString i} is built"
      { before = if before == null then "" else before; })
    null (list (i: i + 1) n);
  foo = make "foo" "[ -e ${chain}/before ]; mkdir $out; echo foo > $out/foo; echo foo is built" { };
  fooRef = make "foo-ref" "mkdir $out; echo ${chain} > $out/foo; echo foo-ref is built" { };
}
