//! The command line as an operator meets it: mistakes with their places, keys that are Nix's own.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// A folder, and a muster that knows nothing of the machine around it.
struct Place(TempDir);

struct Ended {
    status: i32,
    out: String,
    err: String,
}

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("make a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::write(&path, text).expect("write a file");
        path.display().to_string()
    }

    fn muster(&self, args: &[&str]) -> Ended {
        self.run(env!("CARGO_BIN_EXE_muster"), args, "")
    }

    fn run(&self, program: &str, args: &[&str], input: &str) -> Ended {
        let mut child = Command::new(program)
            .args(args)
            .env("STATE_DIRECTORY", self.path("state"))
            .env("NIX_DAEMON_SOCKET_PATH", self.path("no-socket"))
            .env("NIX_CONFIG", "extra-experimental-features = nix-command")
            .env_remove("CREDENTIALS_DIRECTORY")
            .env_remove("MUSTER_CONFIG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let mut stdin = child.stdin.take().expect("stdin is piped");
        // A program that needs no input may be gone.
        _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let ended = child.wait_with_output().expect("wait for it");
        Ended {
            status: ended.status.code().unwrap_or(-1),
            out: String::from_utf8(ended.stdout).expect("text"),
            err: String::from_utf8(ended.stderr).expect("text"),
        }
    }
}

impl Ended {
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.status, 0, "{}{}", self.out, self.err);
        self.out
    }

    #[track_caller]
    fn refused(self, status: i32, words: &[&str]) {
        assert_eq!(self.status, status, "{}{}", self.out, self.err);
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in {}", self.err);
        }
        assert!(
            !self.err.contains('\x1b'),
            "colour only on a terminal: {:?}",
            self.err
        );
    }
}

#[test]
fn a_mistake_in_a_file_is_named_with_its_line_and_its_remedy() {
    let place = Place::new();
    for (text, at, words) in [
        (
            "priority = 30\nlisten-adress = \"x\"\n",
            "2:1",
            "did you mean \"listen\"?",
        ),
        ("priority = 30\npriority = 31\n", "2:1", "duplicate key"),
        ("priority = \n", "1:12", ""),
        ("\n\npriority = \"30\"", "3:12", "whole number"),
        ("priority = -1", "1:12", "whole number from 0"),
        ("max-encoders = 0", "1:16", "whole number from 1"),
        (
            "upstreams = [\n\"ssh-ng://a\",\n \"gopher://b\",\n]",
            "3:2",
            "gopher",
        ),
        (
            "upstreams = [\n{ uri = \"h\", trused = true }]",
            "2:14",
            "did you mean \"trusted\"?",
        ),
        (
            "[[upstreams]]\nuri = \"ssh://-oProxyCommand=x\"",
            "2:7",
            "starts with '-'",
        ),
        (
            "[[upstreams]]\nuri = \"h\"\ntrusted-public-keys = [\"a:b\"]",
            "3:24",
            "no public key",
        ),
        (
            "listen = [\"localhost:5000\"]",
            "1:11",
            "did you mean \"127.0.0.1:5000\"?",
        ),
        ("negative-ttl = \"3\"", "1:16", "a number of seconds"),
        ("roots-lifetime = 0", "1:18", "more than 0"),
        ("stall-timeout = 0", "1:17", "a whole number from 1 to 60"),
        ("stall-timeout = 61", "1:17", "a whole number from 1 to 60"),
        ("stall-timeout = -5", "1:17", "a whole number from 1 to 60"),
        ("memory-cache-size = \"64Q\"", "1:21", "64M"),
        ("compression = \"zst\"", "1:15", "auto, none, zstd or xz"),
        (
            "compression = \"xz\"\ncompression-level = 12",
            "2",
            "0 to 9",
        ),
        ("log = \"a=b=c\"", "1", "info"),
        ("secret-key-files = \"./k\"", "1:20", "absolute"),
        (
            "priority = 1\nsecret-key-files = [\"/none\"]",
            "2",
            "cannot read /none",
        ),
        ("machines = \"/none\"", "1", "machines file /none"),
        (
            "{\n \"colour\": 1}",
            "2:9",
            "unknown key \"colour\"; there are: listen, ",
        ),
        ("{\n \"priorty\": 1}", "2:10", "did you mean \"priority\"?"),
        ("{\n \"listen\": [\"x\"] }", "2:15", "not an address"),
        ("{", "1:1", "EOF"),
    ] {
        let file = place.write("muster.toml", text);
        let start = format!("error: {file}:{at}: ");
        let ended = place.muster(&["check-config", &file]);
        assert!(ended.err.starts_with(&start), "{text}: {}", ended.err);
        ended.refused(1, &[words]);
        place
            .muster(&["serve", "--config", &file])
            .refused(1, &[&start, words]);
    }
    place
        .muster(&["check-config", "/none.toml"])
        .refused(1, &["cannot read /none.toml"]);
    let json = place.muster(&["check-config", "/none.toml", "--json"]);
    assert_eq!(json.status, 1);
    assert!(json.out.contains("cannot read /none.toml"), "{}", json.out);
    assert!(
        !place.path("state").exists(),
        "nothing is made for a configuration of no use"
    );
}

#[test]
fn a_mistake_in_a_flag_is_a_wrong_command_line() {
    let place = Place::new();
    for (args, words) in [
        (&["serve", "--upstream", "gopher://b1"][..], "gopher"),
        (
            &["serve", "--upstream", "ssh-ng://-oProxyCommand=x"],
            "-oProxyCommand",
        ),
        (&["serve", "--listen", "127.0.0.1:x"], "127.0.0.1:x"),
        (&["serve", "--compression", "bzip2"], "zstd"),
        (&["serve", "--priority", "low"], "low"),
        (
            &["serve", "--machines", "m", "--no-machines"],
            "--no-machines",
        ),
        (&["key", "generate", "a:b"], "a:b"),
        (&["serv"], "serve"),
    ] {
        place.muster(args).refused(2, &[words]);
    }
    place.muster(&[]).refused(2, &["Usage"]);
    for (args, words) in [
        (
            &["serve", "--secret-key-file", "/none"][..],
            &[
                "cannot read /none",
                "muster key generate NAME --secret-key-file /none",
            ][..],
        ),
        (
            &["sign-all", "--secret-key-file", "/none"],
            &["cannot read /none", "muster key generate"],
        ),
        (
            &["serve", "--secret-key-file", "none"],
            &["cannot read none", "LoadCredential="],
        ),
        (
            // An address for documents, which no machine has.
            &["serve", "--no-machines", "--listen", "192.0.2.1:5000"],
            &["192.0.2.1:5000", "this machine has no such address"],
        ),
        (
            &["cache", "stats", "--cache-dir", "/none"],
            &["no muster keeps NARs in /none", "--cache-dir"],
        ),
    ] {
        place.muster(args).refused(1, words);
    }
}

#[test]
fn json_and_toml_say_the_same() {
    let place = Place::new();
    let toml = place.write(
        "a.toml",
        "listen = \"unix:/run/muster/socket\"\nmachines = false\npriority = 5\n\
         upstreams = [\"ssh-ng://b1\", { uri = \"ssh://c\", name = \"c\", trusted = true }]\n",
    );
    let json = place.write(
        "b.json",
        "{ \"listen\": [\"unix:/run/muster/socket\"], \"machines\": false, \"priority\": 5, \"log\": null,\n\
         \"upstreams\": [{ \"uri\": \"ssh-ng://b1\", \"name\": null }, { \"uri\": \"ssh://c\", \"name\": \"c\", \"trusted\": true }] }",
    );
    let check = |file: &str| {
        let out = place.muster(&["check-config", file, "--json"]).ok();
        let mut value: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        value["config-file"].take();
        value
    };
    assert_eq!(check(&toml), check(&json));
    assert_eq!(check(&json)["upstreams"][1]["name"], "c");
    assert_eq!(check(&json)["listen"][0], "unix:/run/muster/socket");
}

#[test]
fn the_example_shows_every_key() {
    let place = Place::new();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/config.toml");
    place.muster(&["check-config", example, "--no-files"]).ok();
    let text = fs::read_to_string(example).expect("read the example");

    let unknown = place.write("unknown.toml", "zzzzzzzz = 1");
    let error = place.muster(&["check-config", &unknown]).err;
    let (_, keys) = error
        .split_once("there are: ")
        .expect("the keys are listed");
    let keys: Vec<_> = keys.trim().split(", ").collect();
    assert!(keys.len() > 20, "{keys:?}");
    for key in keys {
        let shown = text.lines().any(|line| {
            let line = line.trim_start_matches('#');
            line.strip_prefix(key)
                .is_some_and(|rest| rest.starts_with(" = "))
        });
        assert!(shown, "{key} is not in examples/config.toml");
    }
}

#[test]
fn what_a_configuration_means_is_said() {
    let place = Place::new();
    let machines = place.write(
        "machines",
        "ssh-ng://nix@b1 x86_64-linux\nb2 - - many\nnix@b1 i686-linux\nb3:22;s3://b\n",
    );
    let public = "cache-1:lzZbJO7cF6BNjZ5MMOyMyF2Y5PAryxIWzx0p/mo8Xbw=";
    let file = place.write(
        "muster.toml",
        &format!(
            "machines = \"{machines}\"\nlocal-daemon = true\nupstreams = [\"ssh://c?trusted-public-keys={public}\", \
             \"ssh-ng://b3:22?remote-progam=x\", \"d?trusted=false\", \"http://e\", \
             \"https://cache.nixos.org\"]\n"
        ),
    );
    let ended = place.muster(&["check-config", &file]);
    assert_eq!(
        ended.status, 1,
        "Nix refuses a machines file with a bad line"
    );
    for words in [
        "listens on   127.0.0.1:5000\n",
        "upstream     ssh://c  (named by the operator; must be signed by cache-1)\n",
        "upstream     ssh-ng://b3:22  (named by the operator; trusted)\n",
        "upstream     ssh://d  (named by the operator; not trusted)\n",
        "warning      upstream ssh://d is not trusted",
        "upstream     http://e  (named by the operator; not trusted)\n",
        "upstream     https://cache.nixos.org  (named by the operator; must be signed by cache.nixos.org-1)\n",
        "warning      upstream http://e is not trusted",
        &format!("upstream     ssh-ng://nix@b1  ({machines}:1; trusted)\n"),
        "upstream     daemon  (this machine's own daemon; trusted)\n",
        "signs with   a key to be made at the first start",
        &format!(
            "error        {machines}:2:8: column 4 (max jobs): \"many\" is not a whole number"
        ),
        &format!("error        {machines}:4:7: column 1 (store URI): \"s3\""),
        "did you mean \"remote-program\"?",
        &format!("note         {machines}:4:1: Nix before 2.31"),
    ] {
        assert!(ended.out.contains(words), "no {words:?} in\n{}", ended.out);
    }
    assert_eq!(ended.out.matches("\nupstream ").count(), 7, "{}", ended.out);
    assert!(!place.path("state").exists(), "looking makes nothing");
}

#[test]
fn machines_files_that_cannot_be_read_are_named_with_the_way_out() {
    let place = Place::new();
    let folder = place.path("folder").display().to_string();
    fs::create_dir(&folder).expect("make a folder");
    for args in [
        ["serve", "--machines", &folder],
        ["serve", "--machines", "/none"],
    ] {
        place.muster(&args).refused(
            1,
            &[
                &format!("machines file {}", args[2]),
                "--no-machines",
                "os error",
            ],
        );
    }
    let (a, b) = (
        place.path("a").display().to_string(),
        place.path("b").display().to_string(),
    );
    place.write(
        "a",
        &format!("ssh-ng://one\n@{b}\n@{folder}\n@/none\nssh-ng://two\n"),
    );
    place.write("b", &format!("# more\nssh-ng://three;@{a}\n"));
    let file = place.write("muster.toml", &format!("machines = \"{a}\"\n"));
    let checked = place.muster(&["check-config", &file]);
    assert_eq!(checked.status, 1);
    for words in [
        "upstream     ssh-ng://one ",
        "upstream     ssh-ng://two ",
        "upstream     ssh-ng://three ",
        &format!("error        {b}:2:16: cannot include \"{a}\": the file includes itself"),
        &format!("error        {a}:3:1: cannot include \"{folder}\": Is a directory"),
    ] {
        assert!(
            checked.out.contains(words),
            "no {words:?} in\n{}",
            checked.out
        );
    }
}

#[test]
fn places_that_cannot_be_used_are_named_with_the_way_out() {
    let place = Place::new();
    let file = place.write("file", "");
    let none = place.path("none/socket").display().to_string();
    for (listen, words) in [
        (format!("unix:{none}"), "make its folder first"),
        (format!("unix:{file}"), "which is no socket"),
    ] {
        let args = ["serve", "--no-machines", "--listen", &listen];
        place.muster(&args).refused(1, &[&listen, words]);
    }
    let held = std::os::unix::net::UnixListener::bind(place.path("held")).expect("bind");
    let listen = format!("unix:{}", place.path("held").display());
    let args = ["serve", "--no-machines", "--listen", &listen];
    place
        .muster(&args)
        .refused(1, &[&listen, "another process does"]);
    drop(held);
}

#[test]
fn keys_are_interchangeable_with_those_of_nix() {
    let place = Place::new();
    let (secret, public) = (place.path("ours.sec"), place.path("ours.pub"));
    let (secret, public) = (secret.to_str().unwrap(), public.to_str().unwrap());
    let generate = ["key", "generate", "ours-1", "--secret-key-file", secret];
    let out = place
        .muster(&[&generate[..], &["--public-key-file", public]].concat())
        .ok();
    assert_eq!(out, "");
    assert_eq!(
        fs::metadata(secret).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let (text, public) = (read(secret), read(public));
    assert!(public.starts_with("ours-1:"));
    assert_eq!(place.run(MUSTER, &["key", "public"], &text).ok(), public);
    let nix = place
        .run("nix", &["key", "convert-secret-to-public"], &text)
        .ok();
    assert_eq!(nix.trim(), public.trim());
    place.muster(&generate).refused(1, &["exists already"]);
    assert_eq!(read(secret), text);

    let theirs = place
        .run(
            "nix",
            &["key", "generate-secret", "--key-name", "theirs-1"],
            "",
        )
        .ok();
    let public = place
        .run("nix", &["key", "convert-secret-to-public"], &theirs)
        .ok();
    let shown = place.run(MUSTER, &["key", "public"], &theirs).ok();
    assert_eq!(shown.trim(), public.trim());
    let file = place.write("theirs.sec", &theirs);
    chmod(&file, 0o600);
    let config = place.write(
        "c.toml",
        &format!("machines = false\nsecret-key-files = [\"{file}\", \"{secret}\"]"),
    );
    let checked = place.muster(&["check-config", &config]).ok();
    assert!(
        checked.contains(&format!("signs with   {}  ({file})\n", public.trim())),
        "{checked}"
    );

    let to_stdout = place.muster(&["key", "generate", "out-1"]).ok();
    place.run(MUSTER, &["key", "public"], &to_stdout).ok();
    let garbled = place.run(MUSTER, &["key", "public"], "no key");
    garbled.refused(
        1,
        &["standard input holds no secret key", "muster key public <"],
    );
}

#[test]
fn a_key_file_that_others_can_read_is_refused_with_the_remedy() {
    let place = Place::new();
    let key = place.path("open.key").display().to_string();
    place
        .muster(&["key", "generate", "open-1", "--secret-key-file", &key])
        .ok();
    chmod(&key, 0o644);
    let remedy = format!("chmod 600 {key}");
    place
        .muster(&["serve", "--secret-key-file", &key])
        .refused(1, &["mode 0644", &remedy]);
    let config = place.write("c.toml", &format!("secret-key-files = [\"{key}\"]"));
    place
        .muster(&["check-config", &config])
        .refused(1, &["c.toml:1: ", &remedy]);
    let broken = place.write("broken.key", "no key at all\n");
    chmod(&broken, 0o600);
    place
        .muster(&["serve", "--secret-key-file", &broken])
        .refused(1, &[&broken, "no colon"]);
    chmod(&key, 0o400);
    let twice = [
        "serve",
        "--secret-key-file",
        &key,
        "--secret-key-file",
        &key,
    ];
    place
        .muster(&twice)
        .refused(1, &["two keys are named open-1"]);
}

#[test]
fn completions_and_manual_pages_are_written() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = place.muster(&["completions", shell]).ok();
        assert!(script.contains("check-config"), "{shell}");
    }
    assert!(place.muster(&["man"]).ok().contains("muster\\-serve(1)"));
    let pages = place.path("share/man1");
    place.muster(&["man", pages.to_str().unwrap()]).ok();
    for page in [
        "muster.1",
        "muster-serve.1",
        "muster-key.1",
        "muster-key-generate.1",
        "muster-check-config.1",
    ] {
        assert!(pages.join(page).is_file(), "{page}");
    }
    let serve = read(pages.join("muster-serve.1"));
    for word in ["upstream", "NIX_SSHOPTS", "SIGHUP"] {
        assert!(serve.contains(word), "{word}");
    }
    for args in [
        &["--help"][..],
        &["serve", "--help"],
        &["key", "generate", "--help"],
        &["--version"],
    ] {
        assert!(!place.muster(args).ok().is_empty());
    }
}

/// Every command, however deep, as words to name it by.
fn commands(place: &Place, above: &[&str]) -> Vec<Vec<String>> {
    let help = place.muster(&[above, &["--help"]].concat()).ok();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| !line.is_empty());
    let names: Vec<_> = listed
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let mut all = vec![above.iter().map(ToString::to_string).collect()];
    for name in names {
        all.extend(commands(place, &[above, &[name]].concat()));
    }
    all
}

#[test]
fn every_command_says_what_its_status_and_its_json_mean() {
    let place = Place::new();
    let pages = place.path("man1");
    place.muster(&["man", pages.to_str().unwrap()]).ok();
    let all = commands(&place, &[]);
    assert!(all.len() >= 15, "{all:?}");
    for words in all {
        let mut args: Vec<_> = words.iter().map(String::as_str).collect();
        let page = read(pages.join(format!("{}.1", [&["muster"], &args[..]].concat().join("-"))));
        args.push("--help");
        let help = place.muster(&args).ok();
        // The commands of `muster cache` and `muster key` share what is said once above them.
        let shared = matches!(&*words, [above, _] if above == "cache");
        let above = matches!(&*words, [only] if only == "key");
        if !shared && !above {
            assert!(help.contains("Exit status:"), "{args:?}\n{help}");
            assert!(page.contains(".SH \"EXIT STATUS\""), "the page of {args:?}");
        }
        if help.contains("--json") && !shared {
            assert!(help.contains("JSON"), "{args:?}\n{help}");
            assert!(help.contains("added"), "{args:?} does not say what stays");
        }
        assert!(!help.contains('\x1b') && !page.contains('\x1b'));
    }
}

fn chmod(path: &str, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).expect("read a file")
}

const MUSTER: &str = env!("CARGO_BIN_EXE_muster");
