//! What a failed ssh means, and what the operator can do about it.
//!
//! ssh tells its reasons in words only; the known ones are matched and get a remedy, others are
//! shown as they are. Source: the messages of OpenSSH 8.4 to 9.9, and of Nix 2.3 to 2.34.

/// What is known of an ssh that failed.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// The host as it was configured.
    pub host: &'a str,
    /// The end of the error output: ssh's own words and those of the remote command.
    pub stderr: &'a str,
    /// ssh's exit code, which is the remote command's unless it is 255; `None`: still running, or
    /// ended by a signal.
    pub exit_code: Option<i32>,
    /// Whether a single host key is accepted.
    pub pinned: bool,
}

/// Tells the cause and the remedy in one line; `None` when there is nothing to tell.
pub fn diagnose(evidence: &Evidence) -> Option<String> {
    let said = meaningful(evidence.stderr);
    match (remedy(evidence), said.is_empty()) {
        (Some(remedy), false) => Some(format!("{said} ({remedy})")),
        (Some(remedy), true) => Some(remedy),
        (None, false) => Some(said),
        (None, true) => evidence
            .exit_code
            .map(|code| format!("ssh ended with exit code {code} and without a word")),
    }
}

/// Finds the remedy for the known causes, the more specific ones first.
pub fn remedy(evidence: &Evidence) -> Option<String> {
    let host = evidence.host;
    let said = |text: &str| evidence.stderr.contains(text);
    let no_key = said("Host key verification failed") || said("host key is known for");
    let changed = said("IDENTIFICATION HAS CHANGED");
    Some(if (no_key || changed) && evidence.pinned {
        format!(
            "{host} does not show the host key that is pinned for it, column 8 of the machines file"
        )
    } else if changed {
        format!(
            "the host key of {host} changed; if that is right, remove the old one with `ssh-keygen -R` and log in once by hand"
        )
    } else if no_key {
        format!(
            "the host key of {host} is not known here; log in once by hand as the user muster runs as, or pin the key in column 8 of the machines file"
        )
    } else if said("Too many authentication failures") {
        "the agent holds more keys than the server lets us try; set NIX_SSHOPTS=-oIdentitiesOnly=yes with an ssh-key".to_owned()
    } else if said("UNPROTECTED PRIVATE KEY") || said("bad permissions") {
        "make the key readable for its owner alone: chmod 600".to_owned()
    } else if said("Permission denied (") {
        format!(
            "{host} accepts no key that muster can use without asking; give one without a passphrase as ssh-key, or an agent (SSH_AUTH_SOCK)"
        )
    } else if said("Could not resolve hostname") {
        "check the name, or give it a HostName in ssh_config".to_owned()
    } else if said("Connection refused") {
        format!("no sshd listens there; is {host} up, and the port right?")
    } else if said("Connection timed out") || said("Operation timed out") {
        format!("{host} is down, or a firewall drops the packets")
    } else if said(SILENT) {
        format!("{host} stopped answering")
    } else if said("Bad configuration option") || said("unknown option") {
        "check NIX_SSHOPTS and ssh_config".to_owned()
    } else if said("protocol mismatch") {
        "the account seems to allow only `nix-store --serve`, which cannot look paths up by their hash; allow `nix-daemon --stdio` (NixOS: nix.sshServe.protocol = \"ssh-ng\")".to_owned()
    } else if said("cannot connect to socket") || said("daemon-socket") {
        format!("ssh works, but nix-daemon does not run on {host}, or the account may not use it")
    } else if evidence.exit_code == Some(NOT_FOUND) {
        "the program is not in the PATH of the account's login shell; name it in full: remote-program=/path/to/nix-daemon".to_owned()
    } else if evidence.exit_code == Some(NOT_EXECUTABLE) {
        "the remote program is there but cannot be run; see remote-program".to_owned()
    } else {
        return None;
    })
}

/// Tells whether ssh ended because the host gave no sign of life any more.
pub fn fell_silent(stderr: &str) -> bool {
    stderr.contains(SILENT)
}

/// Joins the last lines that say something.
pub fn meaningful(stderr: &str) -> String {
    let lines: Vec<_> = stderr
        .lines()
        .map(|line| line.trim_matches(|c: char| c.is_whitespace() || c.is_control()))
        .filter(|line| !line.is_empty() && !is_noise(line))
        .collect();
    let skipped = lines.len().saturating_sub(LINES_MAX);
    let joined: String = lines
        .iter()
        .skip(skipped)
        .copied()
        .collect::<Vec<_>>()
        .join("; ");
    let surplus = joined.chars().count().saturating_sub(CHARS_MAX);
    joined
        .chars()
        .filter(|c| !c.is_control())
        .skip(surplus)
        .collect()
}

fn is_noise(line: &str) -> bool {
    line.starts_with("debug")
        || line.starts_with("Warning: Permanently added")
        // Of `ssh -v`.
        || line.starts_with("OpenSSH_")
        || line.starts_with("Authenticated to ")
        || line.starts_with("Transferred: sent ")
        || line.starts_with("Bytes per second: ")
        || line.starts_with("@@@")
        || line.starts_with("@ ")
        || line.starts_with("** ")
        || line.starts_with("ssh-keygen ")
        || line.starts_with("remove with:")
        || line == "Permission denied, please try again."
}

/// Of `Timeout, server b1 not responding.`
const SILENT: &str = "not responding";

/// Exit codes of POSIX shells.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
const LINES_MAX: usize = 3;
const CHARS_MAX: usize = 500;

#[cfg(test)]
mod tests {
    use super::*;

    fn of(stderr: &str, exit_code: i32) -> String {
        let evidence = Evidence {
            host: "b1",
            stderr,
            exit_code: Some(exit_code),
            pinned: false,
        };
        diagnose(&evidence).unwrap()
    }

    #[test]
    fn known_causes_get_their_remedy() {
        for (stderr, code, part) in [
            (
                "No ED25519 host key is known for b1 and you have requested strict checking.\r\nHost key verification failed.\r\n",
                255,
                "log in once by hand",
            ),
            (
                "@@@@@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
                255,
                "ssh-keygen -R",
            ),
            (
                "nix@b1: Permission denied (publickey).\n",
                255,
                "SSH_AUTH_SOCK",
            ),
            (
                "ssh: Could not resolve hostname b1: Name or service not known",
                255,
                "HostName",
            ),
            (
                "ssh: connect to host b1 port 22: Connection refused",
                255,
                "no sshd listens",
            ),
            (
                "ssh: connect to host b1 port 22: Connection timed out",
                255,
                "firewall",
            ),
            (
                "Timeout, server b1 not responding.\r\n",
                255,
                "stopped answering",
            ),
            (
                "bash: line 1: nix-daemon: command not found",
                127,
                "remote-program=",
            ),
            ("error: protocol mismatch", 1, "nix.sshServe.protocol"),
        ] {
            let said = of(stderr, code);
            assert!(said.contains(part), "{stderr:?} gave {said:?}");
        }
    }

    #[test]
    fn a_pinned_key_is_named_as_such() {
        let evidence = Evidence {
            host: "b1",
            stderr: "Host key verification failed.",
            exit_code: Some(255),
            pinned: true,
        };
        assert!(diagnose(&evidence).unwrap().contains("column 8"));
    }

    #[test]
    fn unknown_words_are_shown_and_noise_is_not() {
        let stderr = "Warning: Permanently added 'b1'.\ndebug1: x\none\ntwo\nthree\nfour\x1b[0m\n";
        assert_eq!(of(stderr, 1), "two; three; four[0m");
        assert_eq!(of("", 1), "ssh ended with exit code 1 and without a word");
        assert!(of(&"ä".repeat(5000), 1).chars().count() <= CHARS_MAX);
    }

    #[test]
    fn nothing_said_and_still_running() {
        let evidence = Evidence {
            host: "b1",
            stderr: "",
            exit_code: None,
            pinned: false,
        };
        assert_eq!(diagnose(&evidence), None);
    }
}
