//! The way to a server: its name, its port, and what a binary cache says of itself.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::clock::Difference;
use super::finding::{Finding, Subject};
use super::upstream::{self, CANDIDATES_MAX, Context};
use crate::cli::http::Server;
use crate::nix::cache_info::CacheInfo;
use crate::nix::store_path::StorePath;
use crate::nix::store_uri::authority::Authority;

/// A host and a port.
pub(super) struct Place {
    pub(super) host: String,
    pub(super) port: u16,
}

impl Place {
    pub(super) fn of(authority: &Authority, default_port: u16) -> Self {
        Self {
            host: authority.host().to_ssh(),
            port: authority.port().unwrap_or(default_port),
        }
    }
}

/// Looks the name up and connects; `false`: it cannot be reached.
pub(super) async fn reach(place: &Place, within: Duration, subject: &mut Subject) -> bool {
    let Place { host, port } = place;
    let looking = tokio::net::lookup_host((host.as_str(), *port));
    let addresses: Vec<SocketAddr> = match timeout(within, looking).await {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(error)) => {
            subject.add(
                Finding::failed("name", format!("{host} is not known: {error}")).remedy(
                    "check the name, or give it a HostName in ssh_config or a line in /etc/hosts",
                ),
            );
            subject.skip(&["TCP"], "its address is not known");
            return false;
        }
        Err(_) => {
            subject.add(
                Finding::failed("name", format!("{host} is not found within {within:?}"))
                    .remedy("no name server answers: see /etc/resolv.conf"),
            );
            subject.skip(&["TCP"], "its address is not known");
            return false;
        }
    };
    let ips: Vec<_> = addresses.iter().map(|at| at.ip().to_string()).collect();
    subject.add(Finding::ok("name", format!("{host} is {}", ips.join(", "))));
    let mut failed = Vec::new();
    for address in &addresses {
        match timeout(within, TcpStream::connect(address)).await {
            Ok(Ok(_)) => {
                subject.add(Finding::ok("TCP", format!("{address} accepts")));
                return true;
            }
            Ok(Err(error)) => failed.push((format!("{address}: {error}"), error.kind())),
            Err(_) => failed.push((
                format!("{address}: no answer within {within:?}"),
                std::io::ErrorKind::TimedOut,
            )),
        }
    }
    let refused = failed
        .iter()
        .any(|(_, kind)| *kind == std::io::ErrorKind::ConnectionRefused);
    let remedy = match refused {
        true => format!("nothing listens there; is the server running, and port {port} right?"),
        false => "it is down, or a firewall drops the packets".to_owned(),
    };
    let seen: Vec<_> = failed.into_iter().map(|(seen, _)| seen).collect();
    subject.add(Finding::failed("TCP", seen.join("; ")).remedy(remedy));
    false
}

/// Checks a binary cache over HTTP up to what it says of itself; returns paths to ask it for.
pub(super) async fn cache(
    context: &Context<'_>,
    place: &Place,
    subject: &mut Subject,
) -> Option<Vec<StorePath>> {
    let within = context.upstream.connect_timeout;
    if !reach(place, within, subject).await {
        subject.skip(
            &["TLS", "cache info", "store directory", "trust", "clock"],
            "it cannot be reached",
        );
        return None;
    }
    let url = context.upstream.uri.kind().to_string();
    let secure = url.starts_with("https:");
    let before = SystemTime::now();
    let asked = Server::Url(url)
        .get("/nix-cache-info", within + context.upstream.query_timeout)
        .await;
    let answer = match asked {
        Ok(answer) => answer,
        Err(error) => {
            let check = if secure { "TLS" } else { "cache info" };
            let remedy = match secure {
                true => {
                    "its certificate must be signed by an authority of this machine (/etc/ssl/certs)"
                }
                false => "what listens there must be an HTTP server",
            };
            subject.add(Finding::failed(check, format!("{error:#}")).remedy(remedy));
            subject.skip(&["store directory", "trust", "clock"], "it does not answer");
            return None;
        }
    };
    if secure {
        subject.add(Finding::ok("TLS", "its certificate is good"));
    }
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    if answer.status != OK {
        let seen = format!("status {} to /nix-cache-info", answer.status);
        let remedy = "check the URL: a binary cache has a nix-cache-info at its root";
        subject.add(Finding::failed("cache info", seen).remedy(remedy));
        subject.skip(&["store directory", "trust"], "it is no binary cache");
        return None;
    }
    let usable = cache_info(context, &text, subject);
    subject.add(match answer.date {
        Some(theirs) => {
            let difference = Difference::of(theirs, before, SystemTime::now());
            upstream::clock_finding(difference)
        }
        None => Finding::skipped("clock", "it does not tell its time"),
    });
    usable.then(|| candidates(context))
}

/// Checks a binary cache in a folder up to what it says of itself.
pub(super) fn folder(
    context: &Context<'_>,
    folder: &Path,
    subject: &mut Subject,
) -> Option<Vec<StorePath>> {
    let file = folder.join("nix-cache-info");
    match std::fs::read_to_string(&file) {
        Ok(text) => cache_info(context, &text, subject).then(|| candidates(context)),
        Err(error) => {
            let seen = format!("cannot read {}: {error}", file.display());
            let remedy = "name the folder of a binary cache, as `nix copy --to file://…` makes it";
            subject.add(Finding::failed("cache info", seen).remedy(remedy));
            subject.skip(&["store directory", "trust"], "it is no binary cache");
            None
        }
    }
}

fn cache_info(context: &Context<'_>, text: &str, subject: &mut Subject) -> bool {
    let ours = &context.config.store_dir;
    match CacheInfo::parse(text) {
        Ok(info) if info.store_dir == *ours => {
            subject.add(Finding::ok(
                "cache info",
                format!("priority {}", info.priority),
            ));
            subject.add(Finding::ok("store directory", ours.as_str()));
            subject.add(upstream::trust(context, None));
            true
        }
        Ok(info) => {
            subject.add(Finding::ok(
                "cache info",
                format!("priority {}", info.priority),
            ));
            let seen = format!("its store is {}, ours is {ours}", info.store_dir);
            let remedy = "give it a muster of its own (store-dir)";
            subject.add(Finding::failed("store directory", seen).remedy(remedy));
            subject.skip(&["trust"], "it is of no use");
            false
        }
        Err(error) => {
            subject.add(Finding::failed("cache info", error.to_string()));
            subject.skip(&["store directory", "trust"], "it is no binary cache");
            false
        }
    }
}

/// Paths that a cache, which cannot list its own, may have: the operator's, or this machine's.
fn candidates(context: &Context<'_>) -> Vec<StorePath> {
    if let Some(path) = context.path {
        return vec![path.clone()];
    }
    let Ok(entries) = std::fs::read_dir(context.config.store_dir.as_str()) else {
        return Vec::new();
    };
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let paths = names.filter_map(|name| name.parse::<StorePath>().ok());
    paths
        .filter(|path| !path.is_derivation())
        .take(CANDIDATES_MAX)
        .collect()
}

const OK: u16 = 200;
