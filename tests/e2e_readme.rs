//! The README, followed to the letter: every line of every `sh` block is run on machines of the rig.
//!
//! A block is named by its heading and its place below it. Each must be named by a test here; a block that
//! none names fails `every_block_is_run`, so that no command line can be added without a test.

mod module;
mod rig;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use module::{build_deb, project};
use rig::{Lab, Machine, Muster, Output, Systemd};

/// A fenced block of the README.
#[derive(Debug)]
struct Block {
    heading: String,
    /// Its place among the blocks of its language below its heading.
    place: usize,
    language: String,
    text: String,
}

fn blocks() -> Vec<Block> {
    let readme = fs::read_to_string(project("README.md")).expect("read the README");
    let mut blocks: Vec<Block> = Vec::new();
    let mut heading = String::new();
    let mut open: Option<Block> = None;
    for line in readme.lines() {
        match (line.strip_prefix("```"), open.take()) {
            (Some(language), None) => {
                let known = blocks.iter().filter(|b| b.heading == heading);
                open = Some(Block {
                    heading: heading.clone(),
                    place: known.filter(|b| b.language == language).count(),
                    language: language.to_owned(),
                    text: String::new(),
                });
            }
            (Some(_), Some(block)) => blocks.push(block),
            (None, Some(mut block)) => {
                block.text.push_str(line);
                block.text.push('\n');
                open = Some(block);
            }
            (None, None) => {
                if let Some(title) = line.strip_prefix('#') {
                    title
                        .trim_start_matches('#')
                        .trim()
                        .clone_into(&mut heading);
                }
            }
        }
    }
    assert!(open.is_none(), "a block of the README does not end");
    blocks
}

/// The text of a block of a language.
#[track_caller]
fn text_of(language: &str, heading: &str, place: usize) -> String {
    let found = blocks()
        .into_iter()
        .find(|b| b.language == language && b.heading == heading && b.place == place);
    found
        .unwrap_or_else(|| panic!("no {language} block {place} below {heading:?}"))
        .text
}

/// The command lines of an `sh` block, without comments.
#[track_caller]
fn block(heading: &str, place: usize) -> Vec<String> {
    let text = text_of("sh", heading, place);
    let plain = |line: &str| {
        line.split("  #")
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    text.lines()
        .map(plain)
        .filter(|line| !line.is_empty())
        .collect()
}

#[test]
fn every_block_is_run() {
    let tests = include_str!("e2e_readme.rs");
    let commands: Vec<Block> = blocks()
        .into_iter()
        .filter(|b| b.language == "sh")
        .collect();
    assert!(commands.len() >= 8, "{commands:?}");
    for Block { heading, place, .. } in commands {
        let call = format!("block(\"{heading}\", {place})");
        assert!(tests.contains(&call), "no test runs {call}");
    }
}

#[test]
fn every_command_within_a_sentence_is_run_too() {
    let lines: Vec<String> = blocks()
        .into_iter()
        .filter(|b| b.language == "sh")
        .flat_map(|b| b.text.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let all = inline();
    assert!(all.len() >= 8, "{all:?}");
    for command in &all {
        let in_a_block = lines.iter().any(|line| line.starts_with(command.as_str()));
        let elsewhere = RUN_ELSEWHERE.iter().any(|(known, _)| known == command);
        assert!(in_a_block || elsewhere, "no test runs `{command}`");
    }
    for (known, _) in RUN_ELSEWHERE {
        let there = all.iter().any(|command| command == known);
        assert!(there, "{known} is not in the README any more");
    }
}

#[test]
fn every_command_of_muster_is_shown() {
    let readme = fs::read_to_string(project("README.md")).expect("read the README");
    let help = Command::new(program()).arg("--help").output();
    let help = String::from_utf8(help.expect("it starts").stdout).expect("it is text");
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let mut count = 0;
    for line in listed.take_while(|line| !line.is_empty()) {
        // What a line of its own has begins with two blanks; the rest are words of the one above.
        let name = line
            .strip_prefix("  ")
            .filter(|name| !name.starts_with(' '));
        let Some(name) = name.and_then(|name| name.split_whitespace().next()) else {
            continue;
        };
        count += 1;
        if !matches!(name, "completions" | "man") {
            assert!(readme.contains(&format!("muster {name}")), "{name}");
        }
    }
    assert!(count >= 9, "{help}");
}

#[test]
fn snippets_of_nix_and_toml_are_read() {
    for block in blocks() {
        let folder = tempfile::tempdir().expect("make a folder");
        let file = folder.path().join("snippet");
        fs::write(&file, &block.text).expect("write it");
        let mut command = match block.language.as_str() {
            "nix" => {
                let mut nix = Command::new("nix-instantiate");
                nix.args(["--store", "dummy://", "--parse"]);
                nix
            }
            "toml" => {
                let mut check = Command::new(program());
                check.args(["check-config", "--no-files"]);
                check
            }
            _ => continue,
        };
        let output = command.arg(&file).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}\n{said}", block.text);
    }
}

/// Command lines that stand within a sentence.
fn inline() -> Vec<String> {
    let readme = fs::read_to_string(project("README.md")).expect("read the README");
    let mut prose = String::new();
    let mut in_block = false;
    for line in readme.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
        } else if !in_block {
            prose.push_str(line);
            prose.push('\n');
        }
    }
    let spans = prose.split('`').skip(1).step_by(2);
    spans
        .map(|span| span.split_whitespace().collect::<Vec<_>>())
        .filter(|words| matches!(words.as_slice(), [first, _, ..] if PROGRAMS.contains(first)))
        .map(|words| words.join(" "))
        .collect()
}

/// Runs lines one after another in a folder inside; each must succeed.
#[track_caller]
fn follow(systemd: &Systemd<'_>, folder: &str, lines: &[String]) -> Vec<Output> {
    lines
        .iter()
        .map(|line| {
            let got = systemd.run(&format!("cd {folder} && {line}"));
            assert!(
                got.rc == 0,
                "{line}\n{got}\n{}",
                systemd.journal("muster.service")
            );
            got
        })
        .collect()
}

/// A machine with what a newcomer has: a checkout, the built package beside it, ssh's files and builders.
fn newcomer<'m>(lab: &Lab, machine: &'m Machine, machines: &str) -> Systemd<'m> {
    let share = lab.share();
    let lines = block("Three ways to run it", 0);
    let (build, rest) = lines.split_first().expect("the block has lines");
    assert_eq!(build, "bash debian/build");
    build_deb(&share.join("bin/muster"), &share.join("target/debian"), "1");
    let systemd = Systemd::boot(machine);
    systemd.write("/etc/nix/machines", 0o644, machines);
    systemd
        .run("mkdir -p /root/.ssh && cp /lab/known_hosts /root/.ssh/known_hosts && rm /root/.ssh/config")
        .ok();
    follow(&systemd, "/lab", rest);
    let log = "extra-trusted-public-keys";
    systemd.await_log("muster.service", 30.0, log);
    systemd
}

fn realise(systemd: &Systemd<'_>, path: &str) {
    let got = systemd.run(&format!("nix-store --realise {path} --option max-jobs 0"));
    assert!(got.rc == 0, "{got}\n{}", systemd.journal("muster.service"));
}

#[test]
fn a_laptop_is_set_up_and_its_key_is_changed() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let paths: Vec<String> = ["1", "2", "3"]
        .map(|seed| b1.build_one("tiny", &format!("--argstr seed {seed}")))
        .into();
    let machine = lab.client(&[]);
    let laptop = newcomer(&lab, &machine, "ssh-ng://root@b1 x86_64-linux\n");
    laptop.run("systemctl start nix-daemon").ok();

    follow(
        &laptop,
        "/root",
        &block("One laptop in front of its builders", 0),
    );
    let conf = laptop.run("cat /etc/nix/nix.conf").ok().out;
    for name in [
        "extra-substituters",
        "extra-trusted-public-keys",
        "narinfo-cache-negative-ttl",
    ] {
        assert_eq!(conf.matches(name).count(), 1, "{conf}");
    }
    realise(&laptop, &paths[0]);

    follow(&laptop, "/root", &block("When something is wrong", 0));

    // The commands, with what a user has: a link to something that is built.
    laptop.run(&format!("ln -s {} /root/result", paths[0])).ok();
    laptop
        .run("printf 'experimental-features = nix-command\\n' >> /etc/nix/nix.conf")
        .ok();
    let said = follow(&laptop, "/root", &block("Commands", 0));
    assert!(said[2].out.contains("root@b1"), "{}", said[2]);
    laptop.run(&format!("test -e /root/copy{}", paths[0])).ok();
    let said = follow(&laptop, "/root", &block("Commands", 1));
    assert!(said[2].out.contains("signed"), "{}", said[2]);
    let signer = laptop.run("cat /root/office-1.pub").ok().out;
    b1.run(&format!(
        "nix store verify --no-contents --sigs-needed 1 --option trusted-public-keys '{}' {}",
        signer.trim(),
        paths[0]
    ))
    .ok();
    follow(&laptop, "/root", &block("Commands", 2));

    let signatures = |path: &str| {
        let name = path.trim_start_matches("/nix/store/");
        let hash: String = name.chars().take(32).collect();
        let got = laptop.run(&format!("curl -s http://127.0.0.1:5000/{hash}.narinfo"));
        let got = got.ok().out;
        got.lines()
            .filter_map(|l| l.strip_prefix("Sig: "))
            // Those that sign-all wrote are kept beside Muster's own.
            .filter(|sig| !sig.starts_with("office-1:"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(signatures(&paths[1]).len(), 1);
    let said = follow(&laptop, "/root", &block("Change the signing key", 0));
    let new = said.last().expect("it has lines").out.trim().to_owned();
    assert!(new.starts_with("office-muster-2:"), "{new}");
    // A client that knows the old key alone, then one that knows the new one alone.
    realise(&laptop, &paths[1]);
    assert_eq!(signatures(&paths[1]).len(), 2);
    laptop
        .run(&format!("sed -i 's|^extra-trusted-public-keys.*|extra-trusted-public-keys = {new}|' /etc/nix/nix.conf"))
        .ok();
    follow(&laptop, "/root", &block("Change the signing key", 1));
    let signed = signatures(&paths[2]);
    assert!(
        matches!(signed.as_slice(), [one] if one.starts_with("office-muster-2:")),
        "{signed:?}"
    );
    follow(&laptop, "/root", &block("Change the signing key", 2));
    realise(&laptop, &paths[2]);
    laptop.run("test ! -e /var/lib/muster/secret-key").ok();
}

#[test]
fn a_builder_serves_its_own_store_to_the_muster_of_a_client() {
    let lab = Lab::new();
    let (first, second) = (
        lab.machine("builder-a", rig::Nix::Debian12),
        lab.client(&[]),
    );
    let builder = newcomer(&lab, &first, "");
    builder.run("systemctl start nix-daemon").ok();
    let path = builder
        .run("echo a >/run/a && nix-store --add /run/a")
        .ok()
        .out;
    let path = path.trim();
    let said = follow(&builder, "/root", &block("A muster on each builder", 0));
    let key = said.last().expect("it has lines").out.trim().to_owned();
    assert!(key.starts_with("builder-a-muster-1:"), "{key}");
    // Any Nix can ask it as it is.
    let asked = format!("nix-store --realise {path} --option substituters http://builder-a:5000");
    second
        .run(&format!("{asked} --option trusted-public-keys '{key}'"))
        .ok();

    let third = lab.machine("laptop", rig::Nix::Debian12);
    let client = newcomer(&lab, &third, "");
    let toml = text_of("toml", "A muster on each builder", 0);
    let start = toml
        .find("builder-a-muster-1:")
        .expect("it names the builder's key");
    let end = toml
        .get(start..)
        .and_then(|t| t.find('"'))
        .expect("the key ends");
    let toml = toml.replace(toml.get(start..start + end).expect("a key"), &key);
    client.write("/etc/muster/muster.toml", 0o644, &toml);
    follow(&client, "/root", &block("A muster on each builder", 1));
    let own = client.run("cat /var/lib/muster/secret-key.pub").ok().out;
    client
        .run(&format!(
            "nix-store --realise {path} --option substituters http://127.0.0.1:5000 --option trusted-public-keys '{}'",
            own.trim()
        ))
        .ok();
}

#[test]
fn an_office_is_served_behind_nginx_with_tls() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let path = b1.build_one("tiny", "--argstr seed office");
    let machine = lab.machine("office", rig::Nix::Debian12);
    let client = lab.client(&[]);
    fs::OpenOptions::new()
        .append(true)
        .open(lab.share().join("hosts"))
        .and_then(|mut f| {
            std::io::Write::write_all(
                &mut f,
                format!("{} cache.example.org\n", machine.address).as_bytes(),
            )
        })
        .expect("name the server");
    let office = newcomer(&lab, &machine, "ssh-ng://root@b1 x86_64-linux\n");
    follow(
        &office,
        "/root",
        &block("One laptop in front of its builders", 0),
    );
    office
        .run(
            "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=cache.example.org \
             -addext subjectAltName=DNS:cache.example.org -keyout /etc/nginx/muster.key \
             -out /etc/nginx/muster.crt 2>/dev/null && cp /etc/nginx/muster.crt /lab/ca.crt && \
             rm -f /etc/nginx/sites-enabled/* && systemctl start nginx",
        )
        .ok();
    let lines = block("One muster for a whole office, behind nginx with TLS", 0);
    follow(&office, "/root", &lines);

    let key = office.run("cat /var/lib/muster/secret-key.pub").ok().out;
    client.configure(&format!(
        "extra-substituters = https://cache.example.org\nextra-trusted-public-keys = {}",
        key.trim()
    ));
    let got = client.run(&format!(
        "NIX_SSL_CERT_FILE=/lab/ca.crt nix-store --realise {path}"
    ));
    assert!(got.rc == 0, "{got}\n{}", office.journal("muster.service"));
    let ask = |target: &str| {
        let line = format!(
            "curl -s --cacert /lab/ca.crt https://cache.example.org/{target}; echo; \
             curl -s --cacert /lab/ca.crt -o /dev/null -w '%{{http_code}}' https://cache.example.org/{target}"
        );
        office.run(&line).ok().out
    };
    let name = path.trim_start_matches("/nix/store/");
    let narinfo = format!("{}.narinfo", name.chars().take(32).collect::<String>());
    assert!(
        ask(&narinfo).contains("Compression: zstd"),
        "{}",
        ask(&narinfo)
    );

    // With Muster away no client is given what makes it abort.
    office
        .run("systemctl stop muster.socket muster.service")
        .ok();
    let code = |target: &str| ask(target).lines().last().unwrap_or_default().to_owned();
    assert_eq!(code(&narinfo), "404");
    assert_eq!(code("nix-cache-info"), "502");
}

#[test]
fn it_can_be_tried_and_set_up_by_hand() {
    // `bash tests/run` is what runs this very test.
    let tried = block("Try it", 0);
    assert_eq!(tried.get(1).map(String::as_str), Some("bash tests/run"));
    let example = tried.first().expect("it has lines");
    let lab = Lab::new();
    run_here(example, &[("MUSTER", &lab.share().join("bin/muster"))]);

    let lines = block("Set it up", 0);
    let [install, serve] = lines.as_slice() else {
        panic!("{lines:?}");
    };
    // Cargo's own words, but not into this machine's ~/.cargo, and with what is compiled already.
    let folder = tempfile::tempdir().expect("make a folder");
    let target = Path::new(MUSTER)
        .ancestors()
        .nth(2)
        .expect("target/debug/muster");
    let install = format!(
        "{install} --locked --debug --root {}",
        folder.path().display()
    );
    run_here(&install, &[("CARGO_TARGET_DIR", target)]);
    let installed = folder.path().join("bin/muster");
    assert!(installed.exists());
    let args = serve
        .strip_prefix("muster serve")
        .expect("it serves")
        .trim();
    let b1 = lab.builder("b1");
    let path = b1.build_one("tiny", "");
    let client = lab.client(&["b1"]);
    let muster = Muster::serve(&client, args);
    client.substitutes_from(&muster);
    client.realise(&path).ok();
}

/// Runs a line in the project's folder, within ten minutes.
#[track_caller]
fn run_here(line: &str, environment: &[(&str, &Path)]) {
    let mut command = Command::new("sh");
    command.args(["-c", line]).current_dir(project("."));
    for (name, value) in environment {
        command.env(name, value);
    }
    rig::process::run(&mut command, b"", Duration::from_secs(600)).ok();
}

/// The program under test, as the machines of the lab have it.
fn program() -> PathBuf {
    std::env::var_os("MUSTER").map_or_else(|| MUSTER.into(), PathBuf::from)
}

const MUSTER: &str = env!("CARGO_BIN_EXE_muster");

/// Programs that a reader could be told to run.
const PROGRAMS: [&str; 16] = [
    "muster",
    "nix",
    "nix-store",
    "nix-build",
    "nix-instantiate",
    "nix-daemon",
    "systemctl",
    "journalctl",
    "curl",
    "bash",
    "sh",
    "cargo",
    "rm",
    "install",
    "apt",
    "ssh",
];

/// Command lines within a sentence that are in no block, and what runs them.
const RUN_ELSEWHERE: [(&str, &str); 11] = [
    (
        "nix-daemon --stdio",
        "sshd, in every test of tests/e2e_fetch.rs",
    ),
    ("nix-store --serve", "tests/upstream_closures.rs"),
    ("nix store sign --all", "benches/sign_all.rs"),
    ("nix log", "tests/e2e_fetch.rs"),
    ("muster serve --help", "tests/cli.rs"),
    ("muster sign-all --cache", "tests/sign_all_cache.rs"),
    ("cargo bench", "tests/run"),
    ("systemctl status muster.socket", "tests/e2e_systemd.rs"),
    ("journalctl -u muster", "tests/e2e_systemd.rs"),
    (
        "systemctl reset-failed muster.service muster.socket",
        "tests/e2e_systemd.rs",
    ),
    (
        "systemctl edit muster.socket",
        "an editor: the file that it writes is written by a block",
    ),
];
