//! The login to a builder, step by step, with ssh's own words.

use std::time::{Duration, SystemTime};

use super::clock::Difference;
use super::finding::{Finding, Subject};
use super::network::{self, Place};
use super::upstream::{self, Context, DAEMON_CHECKS};
use crate::nix::store_uri::authority::Authority;
use crate::upstream::session::Session;
use crate::upstream::ssh::Ssh;
use crate::upstream::ssh_process::Attempt;
use crate::upstream::wire::Bounds;

/// Checks everything up to the greeting of the daemon; `None`: it does not come to that.
pub(super) async fn check(
    context: &Context<'_>,
    authority: &Authority,
    subject: &mut Subject,
) -> Option<Session> {
    let unreachable = |subject: &mut Subject, from: usize, why: &str| {
        subject.skip(LOGIN_CHECKS.get(from..).unwrap_or_default(), why);
        subject.skip(&DAEMON_CHECKS, why);
        subject.skip(&["clock"], why);
    };
    // With -v ssh says which host key it saw and how it logged in.
    let ssh = match context.starter.ssh(context.upstream, authority, &["-v"]) {
        Ok(ssh) => ssh,
        Err(error) => {
            subject.add(Finding::failed("login", format!("{error:#}")));
            unreachable(subject, LOGIN_CHECKS.len(), "ssh cannot be started");
            return None;
        }
    };
    if !reach(context, &ssh, authority, subject).await {
        unreachable(subject, 0, "it cannot be reached");
        return None;
    }
    let bounds = bounds(context);
    let attempt = match ssh.attempt(&["true".to_owned()], bounds).await {
        Ok(attempt) => attempt,
        Err(error) => {
            subject.skip(&["host key"], "ssh did not end");
            subject.add(Finding::failed("login", error.to_string()));
            unreachable(subject, 2, "nobody is logged in");
            return None;
        }
    };
    let (host_key, login) = judge(&attempt, ssh.pins_host_key());
    let logged_in = !attempt.ssh_failed();
    subject.add(host_key);
    subject.add(login);
    if !logged_in {
        unreachable(subject, 2, "nobody is logged in");
        return None;
    }
    let session = upstream::open(context, "remote program", subject).await;
    if session.is_some() {
        let program = ssh.daemon().join(" ");
        subject.add(Finding::ok("remote program", program));
    }
    subject.add(clock(&ssh, bounds).await);
    session
}

/// Looks the name up and connects, unless ssh goes another way.
async fn reach(
    context: &Context<'_>,
    ssh: &Ssh,
    authority: &Authority,
    subject: &mut Subject,
) -> bool {
    let heeded = ssh.heeded(bounds(context)).await;
    let heeded = match heeded {
        Ok(heeded) => heeded,
        Err(error) => {
            subject.add(
                Finding::failed("name", error.to_string())
                    .remedy("ssh refuses its own settings: check NIX_SSHOPTS and ssh_config"),
            );
            subject.skip(&["TCP"], "ssh refuses its settings");
            return false;
        }
    };
    let value = |key: &str| {
        let mut lines = heeded.lines().filter_map(|line| line.split_once(' '));
        let found = lines.find(|(name, _)| *name == key).map(|(_, value)| value);
        found.filter(|value| *value != "none")
    };
    if let Some(way) = value("proxyjump").or(value("proxycommand")) {
        subject.skip(&["name", "TCP"], &format!("ssh goes by way of {way}"));
        return true;
    }
    let place = Place {
        host: value("hostname").map_or_else(|| authority.host().to_ssh(), str::to_owned),
        port: value("port")
            .and_then(|port| port.parse().ok())
            .unwrap_or(SSH_PORT),
    };
    network::reach(&place, context.upstream.connect_timeout, subject).await
}

/// Tells from ssh's words how far a login came.
fn judge(attempt: &Attempt, pinned: bool) -> (Finding, Finding) {
    let stderr = &attempt.output.stderr;
    let said = attempt.said();
    let said = match said.is_empty() {
        true => "ssh ended without a word".to_owned(),
        false => said,
    };
    let failed = |check| {
        let mut finding = Finding::failed(check, &said).words(stderr);
        finding.remedy = attempt.remedy();
        finding
    };
    let shown = stderr
        .lines()
        .find_map(|line| line.split_once("Server host key: "))
        .map(|(_, key)| key.trim().to_owned());
    let how = if pinned { "as pinned" } else { "known here" };
    let accepted = |key: &str| Finding::ok("host key", format!("{key}, {how}"));
    let refused = [
        "Host key verification failed",
        "IDENTIFICATION HAS CHANGED",
        "host key is known for",
    ];
    if !attempt.ssh_failed() {
        let key = shown.as_deref().unwrap_or("accepted");
        let method = stderr.lines().rev().find_map(|line| {
            let (_, method) = line
                .strip_prefix("Authenticated to ")?
                .split_once(" using ")?;
            Some(
                method
                    .trim()
                    .trim_end_matches('.')
                    .trim_matches('"')
                    .to_owned(),
            )
        });
        let login = format!("logged in by {}", method.as_deref().unwrap_or("ssh"));
        return (accepted(key), Finding::ok("login", login).words(stderr));
    }
    if refused.iter().any(|text| stderr.contains(text)) {
        let login = Finding::skipped("login", "the host key is not accepted");
        return (failed("host key"), login);
    }
    let host_key = match shown {
        Some(key) => accepted(&key),
        None => Finding::skipped("host key", "the server has not shown one"),
    };
    (host_key, failed("login"))
}

async fn clock(ssh: &Ssh, bounds: Bounds) -> Finding {
    let before = SystemTime::now();
    let words = ["date".to_owned(), "+%s".to_owned()];
    let asked = ssh.attempt(&words, bounds).await;
    let seconds = asked.ok().and_then(|attempt| {
        let text = String::from_utf8_lossy(&attempt.output.stdout)
            .trim()
            .to_owned();
        text.parse::<u64>().ok()
    });
    match seconds {
        Some(seconds) => {
            let theirs = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            upstream::clock_finding(Difference::of(theirs, before, SystemTime::now()))
        }
        None => Finding::skipped("clock", "the account runs nothing but its daemon"),
    }
}

fn bounds(context: &Context<'_>) -> Bounds {
    Bounds {
        output_bytes_max: 64 << 10,
        time: context.upstream.connect_timeout + context.upstream.query_timeout,
    }
}

const SSH_PORT: u16 = 22;
const LOGIN_CHECKS: [&str; 3] = ["host key", "login", "remote program"];
