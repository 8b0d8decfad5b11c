//! Our formats against the real Nix on this machine: each reads, believes and equals the other's.
//!
//! Needs `nix` 2.8 or later in `PATH` and fails without it. Everything happens in stores below a
//! temporary folder; nothing is built in `/nix`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bytes::Bytes;
use muster::codec::compression::{Encoder, EncoderOptions, Encoding};
use muster::nix::cache_info::CacheInfo;
use muster::nix::fingerprint;
use muster::nix::hash::NarHash;
use muster::nix::narinfo::NarInfo;
use muster::nix::path_info::Trust;
use muster::nix::realisation::{DrvOutput, Realisation};
use muster::nix::signature::{KeyName, PublicKey, SecretKey};
use muster::nix::store_path::{StoreDir, StorePath};

/// `foo` refers to itself and to `dep`; `top` is content-addressed and depends on `ca`, which is, too.
const EXPRESSION: &str = r#"
let
  dep = builtins.toFile "dep" "dep";
  system = builtins.currentSystem;
  make = name: text: derivation {
    inherit name system;
    builder = "/bin/sh";
    args = [ "-c" "echo ${text} > $out" ];
    __contentAddressed = true;
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
  };
in rec {
  foo = derivation {
    name = "foo";
    inherit system;
    builder = "/bin/sh";
    args = [ "-c" "echo ${dep} $out > $out" ];
  };
  ca = make "ca" dep;
  top = make "top" "${ca}";
}
"#;

/// A builder's store with a directory of its own, and room for caches.
struct Lab {
    folder: tempfile::TempDir,
    store_dir: StoreDir,
    secret_key_files: Vec<PathBuf>,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        let store_dir = StoreDir::new(store.to_str().unwrap()).unwrap();
        fs::write(folder.path().join("lab.nix"), EXPRESSION).unwrap();
        fs::create_dir(folder.path().join("home")).unwrap();
        Self {
            folder,
            store_dir,
            secret_key_files: vec![],
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The builder's store as a store URI.
    fn store(&self) -> String {
        let root = self.folder.path().display();
        format!("local?store={root}/store&state={root}/state&log={root}/log")
    }

    /// A store elsewhere that holds the paths of the same directory.
    fn client(&self) -> String {
        let root = self.folder.path().display();
        let client = format!("{root}/client");
        format!(
            "local?store={root}/store&real={client}/store&state={client}/state&log={client}/log"
        )
    }

    fn cache(&self, name: &str) -> String {
        let root = self.folder.path().display();
        format!("file://{root}/{name}?store={root}/store")
    }

    fn try_run(&self, program: &str, arguments: &[&str]) -> Output {
        let keys = self.secret_key_files.iter().map(|f| f.to_str().unwrap());
        let config = format!(
            "extra-experimental-features = nix-command ca-derivations\n\
             substituters =\nbuild-users-group =\nsandbox = false\n\
             narinfo-cache-negative-ttl = 0\nnarinfo-cache-positive-ttl = 0\n\
             secret-key-files = {}\n",
            keys.collect::<Vec<_>>().join(" ")
        );
        Command::new("timeout")
            .args(["120", program])
            .args(arguments)
            .current_dir(self.folder.path())
            .env("HOME", self.path("home"))
            .env("XDG_CACHE_HOME", self.path("home/cache"))
            .env("NIX_CONF_DIR", self.path("none"))
            .env("NIX_CONFIG", config)
            .env_remove("NIX_REMOTE")
            .output()
            .unwrap()
    }

    /// What the program printed; fails with its own words.
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.try_run(program, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        let ok = output.status.success();
        assert!(ok, "{program} {arguments:?}: {}\n{errors}", output.status);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn build(&self, attribute: &str) -> StorePath {
        let store = self.store();
        let arguments = [
            "--store",
            &store,
            "--no-out-link",
            "lab.nix",
            "-A",
            attribute,
        ];
        self.store_dir
            .parse(&self.run("nix-build", &arguments))
            .unwrap()
    }

    /// Copies a path and its realisation with their closure into a cache.
    fn copy(&self, attribute: &str, cache: &str, parameters: &str) {
        let (from, to) = (self.store(), format!("{}{parameters}", self.cache(cache)));
        self.run(
            "nix",
            &[
                "copy", "--store", &from, "--to", &to, "-f", "lab.nix", attribute,
            ],
        );
    }

    /// Makes a key with Nix and gives its secret text.
    fn generate_key(&self, name: &str) -> String {
        let arguments = ["key", "generate-secret", "--key-name", name];
        let secret = self.run("nix", &arguments);
        fs::write(self.path(name), &secret).unwrap();
        secret
    }

    fn texts(&self, folder: &str, suffix: &str) -> Vec<String> {
        let files = fs::read_dir(self.path(folder)).unwrap();
        let files = files.map(|file| file.unwrap().path());
        let texts = files.filter(|file| file.to_str().unwrap().ends_with(suffix));
        let texts: Vec<_> = texts
            .map(|file| fs::read_to_string(file).unwrap())
            .collect();
        assert!(!texts.is_empty(), "no {suffix} in {folder}");
        texts
    }

    fn narinfos(&self, cache: &str) -> Vec<NarInfo> {
        let read = |text: &String| NarInfo::parse(text, &self.store_dir).unwrap();
        self.texts(cache, ".narinfo").iter().map(read).collect()
    }

    /// Empties the client.
    fn forget(&self) {
        fs::remove_dir_all(self.path("client")).unwrap();
    }

    fn dump(&self, path: &StorePath) -> Bytes {
        let absolute = self.store_dir.join(path);
        let output = self.try_run("nix-store", &["--dump", &absolute]);
        assert!(output.status.success());
        output.stdout.into()
    }
}

fn our_key() -> SecretKey {
    let name = KeyName::new("ours-1").unwrap();
    SecretKey::from_seed(name, &zeroize::Zeroizing::new([42; 32]))
}

#[test]
fn keys_of_nix_sign_alike_here() {
    let mut lab = Lab::new();
    let secret = SecretKey::parse(&lab.generate_key("nix-1")).unwrap();
    let file = fs::File::open(lab.path("nix-1")).unwrap();
    let public = Command::new("nix")
        .args(["--extra-experimental-features", "nix-command"])
        .args(["key", "convert-secret-to-public"])
        .stdin(file)
        .output()
        .unwrap();
    let public = PublicKey::parse(str::from_utf8(&public.stdout).unwrap()).unwrap();
    assert_eq!(public, secret.public());

    lab.secret_key_files = vec![lab.path("nix-1")];
    lab.build("foo");
    lab.copy("foo", "cache", "");
    let infos = lab.narinfos("cache").into_iter().map(|n| n.info);
    let signed: Vec<_> = infos.filter(|info| info.ca.is_none()).collect();
    assert_eq!(signed.len(), 1);
    for info in signed {
        let fingerprint = fingerprint::of_path(&info, &lab.store_dir);
        assert_eq!(info.signatures, [secret.sign(&fingerprint)]);
        assert!(public.verifies(&fingerprint, &info.signatures[0]));
    }
}

#[test]
fn narinfos_of_nix_round_trip_byte_for_byte() {
    let mut lab = Lab::new();
    for name in ["one-1", "two-1"] {
        lab.generate_key(name);
    }
    lab.secret_key_files = vec![lab.path("one-1"), lab.path("two-1")];
    lab.build("foo");
    lab.build("top");
    fs::write(lab.path("f"), "text").unwrap();
    lab.run("nix", &["store", "add-file", "--store", &lab.store(), "f"]);
    lab.run(
        "nix",
        &["store", "add-path", "--store", &lab.store(), "home"],
    );
    let mut seen = [0_usize; 5];
    for compression in ["none", "xz", "zstd"] {
        let key = lab.path("one-1");
        let parameters = format!("&compression={compression}&secret-key={}", key.display());
        let to = format!("{}{parameters}", lab.cache(compression));
        lab.run(
            "nix",
            &["copy", "--from", &lab.store(), "--to", &to, "--all"],
        );
        for text in lab.texts(compression, ".narinfo") {
            let read = NarInfo::parse(&text, &lab.store_dir).unwrap();
            assert_eq!(read.render(&lab.store_dir), text);
            assert_eq!(read.compression.name(), compression);
            let info = &read.info;
            for (count, has) in seen.iter_mut().zip([
                !info.references.is_empty(),
                info.references.contains(&info.path),
                info.ca.is_some(),
                info.deriver.is_some(),
                info.signatures.len() > 1,
            ]) {
                *count += usize::from(has);
            }
            assert!(
                info.ca.is_none() || info.proves_itself(&lab.store_dir),
                "{text}"
            );
        }
    }
    assert!(
        seen.iter().all(|count| *count > 0),
        "every kind occurs: {seen:?}"
    );
}

#[test]
fn nar_hashes_are_those_of_nix() {
    let lab = Lab::new();
    let foo = lab.build("foo");
    lab.copy("foo", "cache", "&compression=none");
    for narinfo in lab.narinfos("cache") {
        let info = narinfo.info;
        let nar = lab.dump(&info.path);
        assert_eq!(NarHash::of(&nar), info.nar_hash);
        assert_eq!(nar.len() as u64, info.nar_size);
    }
    let absolute = lab.store_dir.join(&foo);
    let hash = lab.run("nix-hash", &["--type", "sha256", "--base32", &absolute]);
    assert_eq!(NarHash::of(&lab.dump(&foo)).to_base32(), hash);
}

/// Writes a cache whose narinfos and NARs are ours, out of what Nix says of the paths.
async fn write_cache(lab: &Lab, infos: &[NarInfo], name: &str, encoding: Encoding) {
    let folder = lab.path(name);
    fs::create_dir_all(folder.join("nar")).unwrap();
    let store_dir = lab.store_dir.clone();
    let cache_info = CacheInfo {
        store_dir,
        want_mass_query: true,
        priority: 30,
    };
    fs::write(folder.join("nix-cache-info"), cache_info.render()).unwrap();
    let encoder = Encoder::new(EncoderOptions::default());
    for narinfo in infos {
        let mut ours = narinfo.clone();
        let nar = lab.dump(&ours.info.path);
        let file = encoder.encode_whole(encoding, nar).await.unwrap();
        ours.url = format!("nar/{}{}", ours.info.path.hash(), encoding.suffix());
        ours.compression = encoding.compression();
        (ours.file_hash, ours.file_size) = (None, None);
        fs::write(folder.join(&ours.url), file).unwrap();
        let fingerprint = fingerprint::of_path(&ours.info, &lab.store_dir);
        ours.info.signatures = vec![our_key().sign(&fingerprint)];
        let text = ours.render(&lab.store_dir);
        fs::write(
            folder.join(format!("{}.narinfo", ours.info.path.hash())),
            text,
        )
        .unwrap();
    }
}

#[tokio::test]
async fn nix_accepts_what_we_write_sign_and_compress() {
    let lab = Lab::new();
    let foo = lab.store_dir.join(&lab.build("foo"));
    lab.copy("foo", "theirs", "");
    let infos = lab.narinfos("theirs");
    let public = our_key().public().to_string();
    let stranger = public.replace("ours-1", "theirs-1");
    for encoding in Encoding::ALL {
        let name = encoding.name();
        write_cache(&lab, &infos, name, encoding).await;
        let cache = lab.cache(name);
        let verify = |key: &str| {
            let keys = ["--sigs-needed", "1", "--trusted-public-keys", key];
            let verify = ["store", "verify", "--recursive", "--store", &cache, &foo];
            lab.try_run("nix", &[&verify[..], &keys].concat())
        };
        let accepted = verify(&public);
        let words = String::from_utf8_lossy(&accepted.stderr);
        assert!(accepted.status.success(), "{name}: {words}");
        assert!(
            !verify(&stranger).status.success(),
            "{name}: by a strange key"
        );

        let to = lab.client();
        let keys = ["--option", "trusted-public-keys", &public];
        let copy = ["copy", "--from", &cache, "--to", &to, &foo];
        lab.run("nix", &[&copy[..], &keys].concat());
        let listed = lab.run("nix", &["path-info", "--store", &to, "--sigs", &foo]);
        assert!(listed.contains("ours-1:"), "{listed}");
        fs::remove_dir_all(lab.path("client/state")).unwrap();

        let narinfo = infos.iter().find(|n| n.info.path.name() == "foo").unwrap();
        let file = lab
            .path(name)
            .join(format!("{}.narinfo", narinfo.info.path.hash()));
        let text = fs::read_to_string(&file).unwrap();
        let size = format!("NarSize: {}", narinfo.info.nar_size);
        assert!(text.contains(&size));
        fs::write(&file, text.replace(&size, "NarSize: 7")).unwrap();
        assert!(
            !verify(&public).status.success(),
            "{name}: changed after it was signed"
        );
    }
}

#[test]
fn realisations_of_nix_round_trip_and_verify() {
    let mut lab = Lab::new();
    let keys = ["one-1", "two-1"].map(|name| SecretKey::parse(&lab.generate_key(name)).unwrap());
    lab.secret_key_files = vec![lab.path("one-1"), lab.path("two-1")];
    lab.build("top");
    lab.copy("top", "cache", "");
    let texts = lab.texts("cache/realisations", ".doi");
    // Nix 2.34 copies the realisation of what was named, older ones of all that it depends on, too.
    assert!(matches!(texts.len(), 1 | 2), "of top, or of ca and top");
    for text in texts {
        let read = Realisation::parse(text.as_bytes()).unwrap();
        assert_eq!(read.render(), text);
        for key in &keys {
            let trust = Trust::Keys(vec![key.public()]);
            assert!(read.clone().verify(&trust).is_ok(), "{text}");
        }
        let stranger = Trust::Keys(vec![our_key().public()]);
        assert!(read.clone().verify(&stranger).is_err());
        // Ed25519 signs the same text to the same bytes: ours are Nix's own.
        let unsigned = Realisation {
            signatures: vec![],
            ..read.clone()
        };
        let again = unsigned.verify(&Trust::Operator).unwrap().sign(&keys);
        for signature in &read.signatures {
            assert!(again.signatures.contains(signature), "{text}");
        }
    }
}

/// Takes everything out of a cache that Nix wrote and signs it with our key alone.
fn sign_anew(lab: &Lab, cache: &str) {
    let folder = lab.path(cache);
    for mut narinfo in lab.narinfos(cache) {
        let fingerprint = fingerprint::of_path(&narinfo.info, &lab.store_dir);
        narinfo.info.signatures = vec![our_key().sign(&fingerprint)];
        let file = folder.join(format!("{}.narinfo", narinfo.info.path.hash()));
        fs::write(file, narinfo.render(&lab.store_dir)).unwrap();
    }
    for text in lab.texts(&format!("{cache}/realisations"), ".doi") {
        let mut read = Realisation::parse(text.as_bytes()).unwrap();
        read.signatures.clear();
        let file = realisation_file(&folder, &read.id);
        let signed = read.verify(&Trust::Operator).unwrap().sign(&[our_key()]);
        assert!(file.exists());
        fs::write(file, signed.render()).unwrap();
    }
}

fn realisation_file(cache: &Path, id: &DrvOutput) -> PathBuf {
    cache.join("realisations").join(format!("{id}.doi"))
}

#[test]
fn nix_takes_realisations_by_our_signature_alone() {
    let lab = Lab::new();
    let top = lab.store_dir.join(&lab.build("top"));
    lab.copy("top", "cache", "");
    let (store, cache, client) = (lab.store(), lab.cache("cache"), lab.client());
    let derivations = ["copy", "--derivation", "--from", &store, "--to", &cache];
    lab.run(
        "nix",
        &[&derivations[..], &["-f", "lab.nix", "top"]].concat(),
    );

    let public = our_key().public().to_string();
    let trust = ["--option", "trusted-public-keys", &public];
    let stores = ["--from", &cache, "--eval-store", &store, "--to", &client];
    let copy = [&["copy"], &stores[..], &trust, &["-f", "lab.nix", "top"]].concat();
    let unsigned = lab.try_run("nix", &copy);
    let words = String::from_utf8_lossy(&unsigned.stderr);
    assert!(
        !unsigned.status.success() && words.contains("signature"),
        "{words}"
    );
    lab.forget();

    sign_anew(&lab, "cache");
    let signed = lab.texts("cache/realisations", ".doi");
    let copied = lab.try_run("nix", &copy);
    lab.forget();
    // Nix 2.34 first replaces the realisation in a cache that it can write to by an unsigned one.
    if lab.texts("cache/realisations", ".doi") == signed {
        let words = String::from_utf8_lossy(&copied.stderr);
        assert!(copied.status.success(), "{words}");
    } else {
        sign_anew(&lab, "cache");
    }

    // Nothing may be built, so all must be substituted.
    let build = ["--store", &client, "--no-out-link", "--max-jobs", "0"];
    let from = ["--option", "substituters", &cache, "lab.nix", "-A", "top"];
    assert_eq!(
        lab.run("nix-build", &[&build[..], &trust, &from].concat()),
        top
    );
    assert!(
        lab.path("client/store")
            .join(top.rsplit('/').next().unwrap())
            .exists()
    );
}
