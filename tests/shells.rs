//! The completions in the real shells, and the manual pages as man shows them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// The folder of a completion script under the name that the shell looks for.
fn completions(shell: &str, file: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("make a folder");
    let script = run(Command::new(MUSTER).args(["completions", shell]));
    fs::write(folder.path().join(file), script.stdout).expect("write the script");
    folder
}

/// What it printed; it must succeed.
#[track_caller]
fn run(command: &mut Command) -> Output {
    let output = command.env("LC_ALL", "C.UTF-8").output();
    let output =
        output.unwrap_or_else(|e| panic!("{command:?} does not start: {e}; tests/run installs it"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

fn lines(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_flags() {
    let folder = completions("bash", "muster");
    let script = "source \"$0\" || exit 1
        ask() { COMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1)); _muster muster \"${@: -1}\" \"${@: -2:1}\"
                echo \"${COMPREPLY[*]}\"; }
        ask muster sign
        ask muster status --w
        ask muster cache v
        complete -p muster >&2";
    let bash = run(Command::new("bash")
        .args(["--norc", "-c", script])
        .arg(folder.path().join("muster")));
    assert_eq!(lines(&bash), ["sign-all", "--watch", "verify"]);
}

#[test]
fn zsh_completes_commands_and_flags() {
    let folder = completions("zsh", "_muster");
    // A shell on a terminal of its own; what it answers a tab with is read from there.
    let script = "zmodload zsh/zpty
        zpty -b inner TERM=dumb zsh -f -i
        zpty -w inner \"PS1=; fpath=($1 \\$fpath); autoload -Uz compinit; compinit -u -D; PS1='read''y>'\"
        await() {
            local all some
            repeat 600; do
                if zpty -rt inner some 2>/dev/null; then all+=$some; else sleep 0.05; fi
                [[ $all == *$1* ]] && return
            done
            print -r -- \"no $1 in $all\"; exit 1
        }
        await 'ready>'
        zpty -wn inner $'muster sig\\t'; await 'muster sign-all'
        zpty -wn inner $'\\Cumuster status --w\\t'; await 'status --watch'
        zpty -wn inner $'\\Cumuster cache v\\t'; await 'cache verify'
        print all of them";
    let zsh = run(Command::new("zsh")
        .args(["-f", "-c", script, "zsh"])
        .arg(folder.path()));
    assert_eq!(lines(&zsh), ["all of them"]);
}

#[test]
fn fish_completes_commands_and_flags() {
    let folder = completions("fish", "muster.fish");
    let script = "source $argv[1]
        for line in 'muster sign' 'muster status --w' 'muster cache v'
            complete -C $line
        end";
    let fish = run(Command::new("fish")
        .args(["--no-config", "-c", script])
        .arg(folder.path().join("muster.fish")));
    let words: Vec<_> = lines(&fish)
        .iter()
        .map(|line| line.split('\t').next().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(words, ["sign-all", "--watch", "verify"]);
}

#[test]
fn man_shows_each_page_without_a_complaint() {
    let folder = tempfile::tempdir().expect("make a folder");
    run(Command::new(MUSTER).arg("man").arg(folder.path()));
    let pages = fs::read_dir(folder.path()).expect("read the pages");
    let mut count = 0;
    for page in pages.flatten().map(|entry| entry.path()) {
        let shown = man(&page);
        let complaints = String::from_utf8_lossy(&shown.stderr).into_owned();
        assert_eq!(complaints, "", "{}", page.display());
        let text = lines(&shown);
        let name = page.file_stem().and_then(|name| name.to_str());
        let name = name.expect("a page has a name");
        // apropos finds it by this line.
        let title = text.iter().position(|line| line == "NAME").expect("NAME");
        let about = text.get(title + 1).expect("a line below it").trim();
        assert!(about.starts_with(&format!("{name} - ")), "{about}");
        for section in ["SYNOPSIS", "DESCRIPTION", "OPTIONS"] {
            assert!(text.iter().any(|line| line == section), "{name}: {section}");
        }
        let foot = text.iter().rfind(|line| !line.is_empty());
        let version = format!("muster {}", env!("CARGO_PKG_VERSION"));
        assert!(
            foot.is_some_and(|line| line.starts_with(&version)),
            "{foot:?}"
        );
        assert!(!text.iter().any(|line| line.contains('\\')), "{name}");
        count += 1;
    }
    assert!(count >= 15, "{count}");
}

/// The page as it is shown on a wide terminal.
fn man(page: &Path) -> Output {
    run(Command::new("man")
        .args(["--warnings=w", "--encoding=UTF-8", "--local-file"])
        .arg(page)
        .env("MANWIDTH", "200")
        .env("MAN_KEEP_FORMATTING", "")
        .env("MANPAGER", "cat"))
}

const MUSTER: &str = env!("CARGO_BIN_EXE_muster");
