//! The checks of one upstream, from its name to the bytes of a path.
//!
//! ```text
//! ssh     name, TCP, host key, login, remote program ─┐
//! daemon  socket ─────────────────────────────────────┼ protocol, store directory, trust ─┐
//! http    name, TCP, TLS, cache info ──────────────────────────────────────────────────────┼ known path,
//! file    cache info ──────────────────────────────────────────────────────────────────────┘ fetch, signature
//! ```
//!
//! A check that fails leaves out those that rest on it, and nothing else.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use tokio::time::timeout;

use super::finding::{Finding, Subject};
use super::network::{self, Place};
use super::{clock, split_remedy, ssh};
use crate::app::upstreams::Starter;
use crate::cli::units;
use crate::codec::digest;
use crate::config::{Config, Upstream};
use crate::nix::path_info::{Basis, PathInfo, Trust};
use crate::nix::store_path::StorePath;
use crate::nix::store_uri::StoreKind;
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::Request;
use crate::upstream::session::{Session, SessionOptions};
use crate::upstream::wire::{Dial, Purpose};
use crate::upstream::{self, Error};

/// All that the checks of one upstream share.
pub(super) struct Context<'c> {
    pub(super) starter: &'c Starter,
    pub(super) config: &'c Config,
    pub(super) upstream: &'c Upstream,
    /// A path that the operator says to be there.
    pub(super) path: Option<&'c StorePath>,
}

/// Checks one upstream; every step is bounded by the upstream's own timeouts.
pub(super) async fn check(context: &Context<'_>) -> Subject {
    let mut subject = Subject::new(&context.upstream.name, "upstream");
    let known = match context.upstream.uri.kind() {
        StoreKind::Ssh(authority) | StoreKind::SshNg(authority) => {
            match ssh::check(context, authority, &mut subject).await {
                Some(session) => ask_daemon(context, session, &mut subject).await,
                None => None,
            }
        }
        StoreKind::Daemon | StoreKind::Unix(_) | StoreKind::Local(_) => {
            match open(context, "socket", &mut subject).await {
                Some(session) => ask_daemon(context, session, &mut subject).await,
                None => None,
            }
        }
        StoreKind::Http(authority, _) => {
            let place = Place::of(authority, HTTP_PORT);
            network::cache(context, &place, &mut subject).await
        }
        StoreKind::Https(authority, _) => {
            let place = Place::of(authority, HTTPS_PORT);
            network::cache(context, &place, &mut subject).await
        }
        StoreKind::File(folder) => network::folder(context, folder.as_ref(), &mut subject),
        StoreKind::Unsupported(scheme) => {
            subject.add(Finding::failed(
                "name",
                format!("{scheme} stores cannot be asked"),
            ));
            None
        }
    };
    match known {
        Some(candidates) => store(context, &candidates, &mut subject).await,
        None => subject.skip(&STORE_CHECKS, "it cannot be asked"),
    }
    subject
}

/// Opens a session with the daemon; what fails is noted under `check` or what it is about.
pub(super) async fn open(
    context: &Context<'_>,
    check: &'static str,
    subject: &mut Subject,
) -> Option<Session> {
    let dial = match context.starter.dial(context.upstream, context.config) {
        Ok((dial, _)) => dial,
        Err(error) => {
            subject.add(Finding::failed(check, format!("{error:#}")));
            subject.skip(&DAEMON_CHECKS, "no daemon answers");
            return None;
        }
    };
    let mut options = SessionOptions {
        connect_timeout: context.upstream.connect_timeout,
        ..SessionOptions::default()
    };
    options.connection.store_dir = context.config.store_dir.clone();
    match Session::open(&*dial as &dyn Dial, Purpose::Nar, &options).await {
        Ok(session) => Some(session),
        Err(error) => {
            let text = match &error {
                Error::Down(text) | Error::Lost(text) | Error::Protocol(text) => text.to_string(),
                error => error.to_string(),
            };
            let (seen, remedy) = split_remedy(&text);
            // One that speaks, but what we do not: it is there.
            let other_version =
                matches!(error, Error::Protocol(_)) && seen.contains("speaks protocol");
            let about = if other_version { "protocol" } else { check };
            if other_version {
                subject.add(Finding::ok(check, "a nix-daemon answers"));
            }
            let mut finding = Finding::failed(about, seen);
            finding.remedy = remedy;
            subject.add(finding);
            let rest = DAEMON_CHECKS.iter().filter(|name| **name != about);
            let rest: Vec<_> = rest.copied().collect();
            subject.skip(&rest, "no daemon answers");
            None
        }
    }
}

/// Asks the daemon about itself and for some of its paths; `None`: its store is of no use.
async fn ask_daemon(
    context: &Context<'_>,
    session: Session,
    subject: &mut Subject,
) -> Option<Vec<StorePath>> {
    if subject.findings.is_empty() {
        subject.add(Finding::ok("socket", "a nix-daemon answers"));
    }
    let daemon = session.daemon().clone();
    subject.add(Finding::ok("protocol", daemon.to_string()));
    let bound = context.upstream.query_timeout;
    let store_dir = &context.config.store_dir;
    let nobodys: StorePath = NOBODYS.parse().ok()?;
    match timeout(bound, session.ask(Request::IsValidPath(nobodys))).await {
        Ok(Ok(Reply::Valid(_))) => {
            subject.add(Finding::ok("store directory", store_dir.as_str()));
        }
        failed => {
            let seen = match failed {
                Ok(Ok(_)) => "another answer than asked for".to_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {bound:?}"),
            };
            let remedy =
                format!("it must be {store_dir}, or give it a muster of its own (store-dir)");
            subject.add(Finding::failed("store directory", seen).remedy(remedy));
            subject.skip(&["trust"], "it cannot be asked");
            return None;
        }
    }
    subject.add(trust(context, daemon.trusted));
    if let Some(path) = context.path {
        return Some(vec![path.clone()]);
    }
    let first = async {
        let mut paths = session.all_paths()?;
        paths.next().await.unwrap_or_else(|| Ok(Vec::new()))
    };
    match timeout(LIST_WITHIN, first).await {
        Ok(Ok(mut paths)) => {
            paths.truncate(CANDIDATES_MAX);
            Some(paths)
        }
        Ok(Err(error)) => {
            subject.add(Finding::failed(
                "known path",
                format!("it cannot list its paths: {error}"),
            ));
            None
        }
        Err(_) => {
            let seen = format!("it does not list its paths within {LIST_WITHIN:?}");
            subject.add(Finding::failed("known path", seen));
            None
        }
    }
}

/// Who trusts whom: the operator this store, and its daemon us.
pub(super) fn trust(context: &Context<'_>, by_daemon: Option<bool>) -> Finding {
    let daemon = match by_daemon {
        Some(true) => "; its daemon trusts this account",
        Some(false) => "; its daemon does not trust this account, which only sign-all needs",
        None => "",
    };
    match &context.upstream.trust {
        Trust::Operator => Finding::ok("trust", format!("trusted: what it has is signed{daemon}")),
        Trust::Keys(keys) if keys.is_empty() => Finding::failed(
            "trust",
            format!("not trusted, and no key of it is known{daemon}"),
        )
        .remedy("set trusted = true if it is yours, or list its trusted-public-keys"),
        Trust::Keys(keys) => {
            let names: Vec<_> = keys.iter().map(|key| key.name().as_str()).collect();
            let names = names.join(" or ");
            Finding::ok("trust", format!("paths must be signed by {names}{daemon}"))
        }
    }
}

/// Asks for a path as the server does, fetches its NAR and looks at its signatures.
async fn store(context: &Context<'_>, candidates: &[StorePath], subject: &mut Subject) {
    let started = match context.starter.start(context.upstream, context.config) {
        Ok(started) => started,
        Err(error) => {
            subject.add(Finding::failed("known path", format!("{error:#}")));
            subject.skip(&["fetch", "signature"], "no path is known");
            return;
        }
    };
    let info = match find(context, &*started, candidates).await {
        Ok((info, finding)) => {
            subject.add(finding);
            info
        }
        Err(finding) => {
            subject.add(finding);
            subject.skip(&["fetch", "signature"], "no path is known");
            return;
        }
    };
    subject.add(fetch(context, &*started, &info).await);
    subject.add(signature(context, info));
}

/// Finds a small path, one that would be served if there is any.
async fn find(
    context: &Context<'_>,
    upstream: &dyn upstream::Upstream,
    candidates: &[StorePath],
) -> Result<(PathInfo, Finding), Finding> {
    let name = "known path";
    if candidates.is_empty() {
        let seen = "its store is empty, or none of this machine's paths is there";
        return Err(Finding::skipped(name, seen).remedy("name one that is there by --path"));
    }
    let bound = context.upstream.connect_timeout + context.upstream.query_timeout;
    let asked = timeout(bound, upstream.path_infos(candidates)).await;
    let answers =
        asked.map_err(|_| Finding::failed(name, format!("no answer within {bound:?}")))?;
    let mut error = None;
    let mut found: Vec<PathInfo> = Vec::new();
    for answer in answers {
        match answer {
            Ok(info) => found.extend(info),
            Err(failed) => error = Some(failed),
        }
    }
    let store_dir = &context.config.store_dir;
    let believed = |info: &PathInfo| {
        info.clone()
            .verify(&context.upstream.trust, store_dir)
            .is_ok()
    };
    let best = found.into_iter().min_by_key(|info| {
        let small = info.nar_size >= SMALL_MIN;
        (!believed(info), !small, info.nar_size)
    });
    let Some(info) = best else {
        return Err(match (error, context.path) {
            (Some(error), _) => Finding::failed(name, error.to_string()),
            (None, Some(path)) => Finding::failed(name, format!("it does not have {path}")),
            (None, None) => Finding::skipped(name, "it has none of this machine's paths")
                .remedy("name one that is there by --path"),
        });
    };
    let begun = Instant::now();
    match timeout(bound, upstream.path_info(info.path.hash())).await {
        Ok(Ok(Some(answer))) if answer.path == info.path => {
            let took = units::latency(begun.elapsed().as_secs_f64() * 1e3);
            let seen = format!("{}, found in {took}", info.path);
            Ok((info, Finding::ok(name, seen)))
        }
        Ok(Ok(_)) => {
            let seen = format!("it has {}, but does not find it by its hash", info.path);
            Err(Finding::failed(name, seen))
        }
        Ok(Err(error)) => Err(Finding::failed(name, error.to_string())),
        Err(_) => Err(Finding::failed(name, format!("no answer within {bound:?}"))),
    }
}

async fn fetch(
    context: &Context<'_>,
    upstream: &dyn upstream::Upstream,
    info: &PathInfo,
) -> Finding {
    let name = "fetch";
    if info.nar_size > FETCHED_BYTES_MAX {
        let seen = format!("{} is too large for a trial", info.path);
        return Finding::skipped(name, seen).remedy("name a small one by --path");
    }
    let bound = context.upstream.connect_timeout + FETCH_WITHIN;
    let fetching = async {
        let stream = upstream
            .nar(info)
            .await
            .map_err(|error| error.to_string())?;
        let stream = stream.ok_or("the path is gone")?;
        let whole = digest::whole(stream, info.nar_hash, info.nar_size).await;
        whole.map_err(|error| error.to_string())
    };
    match timeout(bound, fetching).await {
        Ok(Ok(_)) => {
            let size = units::size(info.nar_size);
            Finding::ok(name, format!("{size}, its hash is right"))
        }
        Ok(Err(error)) => {
            let finding = Finding::failed(name, format!("{}: {error}", info.path));
            let remedy = "if its bytes are wrong, repair its store: nix-store --verify --check-contents --repair";
            finding.remedy(remedy)
        }
        Err(_) => Finding::failed(name, format!("{} did not come within {bound:?}", info.path)),
    }
}

fn signature(context: &Context<'_>, info: PathInfo) -> Finding {
    let name = "signature";
    let carried: Vec<_> = info
        .signatures
        .iter()
        .map(|s| s.key_name().to_string())
        .collect();
    let carried = match carried.is_empty() {
        true => "none".to_owned(),
        false => carried.join(", "),
    };
    match info.verify(&context.upstream.trust, &context.config.store_dir) {
        Ok(verified) => match verified.basis() {
            Basis::Signature(key) => Finding::ok(name, format!("signed by {key}")),
            Basis::ContentAddress => Finding::ok(name, "needs none: its name proves its content"),
            Basis::Operator => {
                let seen = format!("not needed, as it is trusted (it carries: {carried})");
                Finding::ok(name, seen)
            }
        },
        Err(error) => Finding::failed(name, error.to_string()).remedy(
            "list the key that signs there in trusted-public-keys, sign its paths (nix store sign --all), \
             or set trusted = true if it is yours",
        ),
    }
}

/// Tells how far a clock is from ours.
pub(super) fn clock_finding(difference: clock::Difference) -> Finding {
    let seen = difference.to_string();
    match difference.tolerable() {
        true => Finding::ok("clock", seen),
        false => Finding::failed("clock", seen).remedy(
            "set both clocks by NTP (timedatectl set-ntp true): certificates and caches go by them",
        ),
    }
}

pub(super) const DAEMON_CHECKS: [&str; 3] = ["protocol", "store directory", "trust"];
pub(super) const STORE_CHECKS: [&str; 3] = ["known path", "fetch", "signature"];

const HTTP_PORT: u16 = 80;
const HTTPS_PORT: u16 = 443;
const NOBODYS: &str = "00000000000000000000000000000000-store-directory";
/// Paths among which a small one is looked for.
pub(super) const CANDIDATES_MAX: usize = 256;
/// Smaller NARs say little about a transfer.
const SMALL_MIN: u64 = 1 << 10;
const FETCHED_BYTES_MAX: u64 = 16 << 20;
const FETCH_WITHIN: Duration = Duration::from_secs(30);
/// A store of a million paths takes a slow disk a while to list.
const LIST_WITHIN: Duration = Duration::from_secs(60);
