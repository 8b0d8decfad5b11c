//! The words that `ssh` is started with. Nothing here starts anything.
//!
//! ```text
//! ssh [USER@]HOST -x -a -T <ours> <NIX_SSHOPTS> -i KEY -C -pPORT <defaults> -- nix-daemon --stdio [--store S]
//! ```
//!
//! ssh takes the first value of each option, on the command line before ssh_config: what our
//! promises rest on stands before `NIX_SSHOPTS`, what the operator may change stands after it.
//! Source: ssh(1), ssh_config(5), `SSHMaster::addCommonSSHOpts` in `libstore/ssh.cc`.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use super::ssh::{SshTarget, TargetError};
use super::wire::Purpose;

/// All that the words of one login depend on.
#[derive(Clone, Copy, Debug)]
pub struct Login<'a> {
    /// Where to.
    pub target: &'a SshTarget,
    /// The file that holds the pinned host key alone.
    pub known_hosts: Option<&'a Path>,
    /// Bound of whoever dials; ssh's own is a second less, at least one.
    pub connect_timeout: Duration,
    /// What for.
    pub purpose: Purpose,
}

/// Splits `NIX_SSHOPTS` as a shell would, with quotes and backslashes (Nix 2.26 and later).
pub fn split_options(text: &str) -> Result<Vec<String>, TargetError> {
    shlex::split(text).ok_or_else(|| TargetError::Options(text.to_owned()))
}

/// Refuses names that ssh would take for options or for something else than a name.
pub fn check(target: &SshTarget) -> Result<(), TargetError> {
    check_name("host name", &target.host)?;
    if target.host.contains(['@', '/']) {
        return Err(bad_name(
            "host name",
            &target.host,
            "it holds an @ or a slash",
        ));
    }
    match &target.user {
        Some(user) => check_name("user name", user),
        None => Ok(()),
    }
}

/// Writes the one line of a known_hosts file that pins a key.
///
/// Its host is `*`, because ssh looks up `[host]:port`, a `HostName` or a `HostKeyAlias`
/// as ssh_config says; the file is for one builder alone, and jump hosts are other processes
/// that do not read it.
pub fn known_hosts(host_key: &str) -> Result<String, TargetError> {
    let line = host_key.trim();
    let mut words = line.split_ascii_whitespace();
    match (words.next(), words.next()) {
        (Some(kind), Some(key)) if !line.contains(char::is_control) && !kind.starts_with('@') => {
            Ok(format!("* {kind} {key}\n"))
        }
        _ => Err(TargetError::HostKey),
    }
}

/// Returns the words that start the daemon, for the account's shell.
///
/// The program's own words go as they are, as Nix sends them, so that `~` and variables work;
/// the store's URI is quoted, since `?` and `&` mean something to shells.
pub fn daemon(target: &SshTarget) -> Vec<String> {
    let mut words: Vec<_> = program(target)
        .into_iter()
        .map(|word| sibling(&word, "nix-store", "nix-daemon").unwrap_or(word))
        .collect();
    words.push("--stdio".to_owned());
    words.extend(store(target));
    words
}

/// Returns the words that start `nix-store --serve`, which may only read, for the account's shell.
pub fn serve(target: &SshTarget) -> Vec<String> {
    let mut words = nix_store(target);
    words.push("--serve".to_owned());
    words
}

/// Returns the words that run `nix-store`, found beside the daemon, for the account's shell.
pub fn nix_store(target: &SshTarget) -> Vec<String> {
    let mut words = program(target);
    let named = words.iter().any(|word| base(word) == "nix-store");
    let beside = |word: &String| sibling(word, "nix-daemon", "nix-store");
    match words.iter_mut().find_map(|w| beside(w).map(|s| (w, s))) {
        Some((word, store)) => *word = store,
        None if named => {}
        None => words = vec!["nix-store".to_owned()],
    }
    words.extend(store(target));
    words
}

impl Login<'_> {
    /// Returns ssh's arguments; `remote` is joined by blanks and read by the account's shell.
    pub fn arguments(&self, remote: &[String]) -> Vec<OsString> {
        let mut words = vec![OsString::from(self.destination())];
        words.extend(FIXED.iter().map(OsString::from));
        words.extend(keep_alive(self.purpose).iter().map(OsString::from));
        words.extend(self.pin());
        words.extend(self.target.options.iter().map(OsString::from));
        if let Some(file) = &self.target.key_file {
            words.extend(["-i".into(), file.into()]);
        }
        if self.target.compress {
            words.push("-C".into());
        }
        if let Some(port) = self.target.port {
            words.push(format!("-p{port}").into());
        }
        // A second less than whoever dials waits, so that ssh can still say what it waited for.
        let seconds = self.connect_timeout.as_secs().saturating_sub(1).max(1);
        words.push(format!("-oConnectTimeout={seconds}").into());
        words.push("--".into());
        words.extend(remote.iter().map(OsString::from));
        words
    }

    fn destination(&self) -> String {
        match &self.target.user {
            Some(user) => format!("{user}@{}", self.target.host),
            None => self.target.host.clone(),
        }
    }

    /// Lets the pinned key count alone: no other file, no DNS record, no learning of further ones.
    fn pin(&self) -> Vec<OsString> {
        let Some(file) = self.known_hosts else {
            return vec![];
        };
        let mut known_hosts = OsString::from("-oUserKnownHostsFile=");
        known_hosts.push(file);
        let mut words = vec![known_hosts];
        words.extend(PINNED.iter().map(OsString::from));
        words
    }
}

/// How soon silence ends a connection. ssh gives up after `interval * (count + 1)` seconds.
fn keep_alive(purpose: Purpose) -> [&'static str; 2] {
    match purpose {
        // A client waits for look-ups, so two seconds: no less can be said to ssh. A pulse mostly tells sooner.
        Purpose::Lookup => ["-oServerAliveInterval=1", "-oServerAliveCountMax=1"],
        Purpose::Nar | Purpose::Roots | Purpose::Closures => {
            ["-oServerAliveInterval=5", "-oServerAliveCountMax=3"]
        }
    }
}

fn program(target: &SshTarget) -> Vec<String> {
    if target.remote_program.is_empty() {
        vec!["nix-daemon".to_owned()]
    } else {
        target.remote_program.clone()
    }
}

fn store(target: &SshTarget) -> Option<String> {
    let store = target.remote_store.as_deref().filter(|s| !s.is_empty())?;
    // A NUL is the one thing that cannot be quoted, and no argument can carry it anyway.
    let quoted = shlex::try_quote(store).ok()?;
    Some(format!("--store {quoted}"))
}

fn sibling(word: &str, from: &str, to: &str) -> Option<String> {
    let folder = word.strip_suffix(from)?;
    (folder.is_empty() || folder.ends_with('/')).then(|| format!("{folder}{to}"))
}

fn base(word: &str) -> &str {
    word.rsplit('/').next().unwrap_or(word)
}

fn check_name(what: &'static str, text: &str) -> Result<(), TargetError> {
    if text.is_empty() {
        Err(bad_name(what, text, "it is empty"))
    } else if text.starts_with('-') {
        Err(bad_name(what, text, "it would be taken for an option"))
    } else if text.contains(|c: char| c.is_control() || c.is_whitespace()) {
        Err(bad_name(
            what,
            text,
            "it holds a blank or control character",
        ))
    } else {
        Ok(())
    }
}

fn bad_name(what: &'static str, text: &str, reason: &'static str) -> TargetError {
    let text = text.chars().take(100).collect();
    TargetError::Name { what, text, reason }
}

/// What must hold on every login, whatever ssh_config says.
const FIXED: &[&str] = &[
    // No X11, no agent, no terminal, no tunnels: the bytes of the protocol and nothing else.
    "-x",
    "-a",
    "-T",
    "-oClearAllForwardings=yes",
    // `LocalCommand` would write into the protocol, a `RemoteCommand` is refused beside ours.
    "-oPermitLocalCommand=no",
    "-oRemoteCommand=none",
    // A connection shared with the user's other sessions would delay look-ups, and end with them.
    "-oControlMaster=no",
    "-oControlPath=none",
    "-oBatchMode=yes",
    // Below INFO, ssh does not say that the server stopped answering.
    "-oLogLevel=INFO",
];

const PINNED: &[&str] = &[
    "-oGlobalKnownHostsFile=/dev/null",
    "-oStrictHostKeyChecking=yes",
    "-oVerifyHostKeyDNS=no",
    "-oUpdateHostKeys=no",
    "-oCheckHostIP=no",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> SshTarget {
        SshTarget {
            user: None,
            host: "builder".into(),
            port: None,
            key_file: None,
            host_key: None,
            compress: false,
            remote_program: vec![],
            remote_store: None,
            options: vec![],
        }
    }

    fn arguments(target: &SshTarget, known_hosts: Option<&Path>) -> Vec<String> {
        let login = Login {
            target,
            known_hosts,
            connect_timeout: Duration::from_millis(2500),
            purpose: Purpose::Lookup,
        };
        let words = login.arguments(&daemon(target));
        words
            .into_iter()
            .map(|w| w.into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_bare_host() {
        let words = arguments(&target(), None);
        assert_eq!(words[0], "builder");
        assert!(words.contains(&"-oServerAliveInterval=1".into()));
        assert!(words.contains(&"-oServerAliveCountMax=1".into()));
        assert!(words.contains(&"-oConnectTimeout=1".into()));
        assert_eq!(words[words.len() - 3..], ["--", "nix-daemon", "--stdio"]);
        assert!(!words.iter().any(|w| w.contains("KnownHosts")));
    }

    #[test]
    fn ours_stand_before_the_operators_and_defaults_after() {
        let target = SshTarget {
            user: Some("nix".into()),
            host: "fe80::1%eth0".into(),
            port: Some(2222),
            key_file: Some("/k e y".into()),
            compress: true,
            options: split_options("-o 'ProxyCommand=nc -X 5 %h %p' -oBatchMode=no").unwrap(),
            ..target()
        };
        let words = arguments(&target, Some(Path::new("/run/m/known-hosts-1")));
        let at = |word: &str| words.iter().position(|w| w == word).unwrap();
        assert_eq!(words[0], "nix@fe80::1%eth0");
        assert!(at("-oBatchMode=yes") < at("-oBatchMode=no"));
        assert!(at("-oUserKnownHostsFile=/run/m/known-hosts-1") < at("ProxyCommand=nc -X 5 %h %p"));
        assert!(at("-oStrictHostKeyChecking=yes") < at("ProxyCommand=nc -X 5 %h %p"));
        assert!(at("-oBatchMode=no") < at("/k e y"));
        assert!(at("-C") < at("--") && at("-p2222") < at("--"));
    }

    #[test]
    fn the_remote_program() {
        let with = |words: &[&str], store: Option<&str>| SshTarget {
            remote_program: words.iter().map(|w| (*w).to_owned()).collect(),
            remote_store: store.map(str::to_owned),
            ..target()
        };
        let daemon = |t: &SshTarget| daemon(t).join(" ");
        let store = |t: &SshTarget| nix_store(t).join(" ");

        assert_eq!(daemon(&with(&[], None)), "nix-daemon --stdio");
        assert_eq!(store(&with(&[], None)), "nix-store");
        let old = with(&["/opt/bin/nix-store"], None);
        assert_eq!(daemon(&old), "/opt/bin/nix-daemon --stdio");
        assert_eq!(store(&old), "/opt/bin/nix-store");
        let sudo = with(&["sudo", "~/bin/nix-daemon"], Some("local?root=/a b"));
        assert_eq!(
            daemon(&sudo),
            "sudo ~/bin/nix-daemon --stdio --store 'local?root=/a b'"
        );
        assert_eq!(
            store(&sudo),
            "sudo ~/bin/nix-store --store 'local?root=/a b'"
        );
        let served = serve(&sudo).join(" ");
        assert_eq!(
            served,
            "sudo ~/bin/nix-store --store 'local?root=/a b' --serve"
        );
        let own = with(&["my-nix-daemon"], None);
        assert_eq!(daemon(&own), "my-nix-daemon --stdio");
        assert_eq!(store(&own), "nix-store");
    }

    #[test]
    fn names_that_are_options_are_refused() {
        for host in ["", "-oProxyCommand=id", "a b", "a\n", "u@h", "a/b"] {
            let target = SshTarget {
                host: host.into(),
                ..target()
            };
            assert!(check(&target).is_err(), "{host:?}");
        }
        let user = SshTarget {
            user: Some("-l".into()),
            ..target()
        };
        assert!(check(&user).is_err());
        assert!(check(&target()).is_ok());
    }

    #[test]
    fn a_pinned_key_is_one_line() {
        let line = known_hosts("ssh-ed25519 AAAA root@b\n").unwrap();
        assert_eq!(line, "* ssh-ed25519 AAAA\n");
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 A\n* ssh-rsa B",
            "@cert-authority A B",
        ] {
            assert!(known_hosts(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn open_quotes_are_an_error() {
        assert!(split_options("-o 'a").is_err());
        assert_eq!(split_options("").unwrap(), Vec::<String>::new());
    }
}
