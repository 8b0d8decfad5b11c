//! The checks of this side: keys, ports, and what this machine's `nix.conf` says of us.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use super::finding::{Finding, Subject};
use crate::cli::http::Server;
use crate::cli::nix_conf::NixConf;
use crate::cli::status;
use crate::cli::units;
use crate::config::{self, Config, ListenAddress};
use crate::nix::signature::PublicKey;

/// What became of the signing keys when the configuration was read.
pub(super) enum Keys {
    /// They can be used.
    Read,
    /// They cannot; why.
    Refused(config::Error),
}

/// Checks keys, addresses and `nix.conf`.
pub(super) async fn check(config: &Config, keys: &Keys, url: Option<&str>) -> Subject {
    let mut subject = Subject::new("this side", "this side");
    signing(config, keys, &mut subject);
    for address in &config.listen {
        subject.add(port(address).await);
    }
    let found = tokio::task::spawn_blocking(|| {
        let daemon = NixConf::of_daemon();
        (daemon, NixConf::of_user())
    });
    match found.await {
        Ok((Ok(conf), of_user)) => nix_conf(config, &conf, of_user.as_ref(), url, &mut subject),
        Ok((Err(error), _)) => {
            let finding = Finding::failed("nix.conf", error);
            subject.add(finding.remedy("install Nix here, or leave this side out by --only"));
        }
        Err(error) => subject.add(Finding::failed("nix.conf", error.to_string())),
    }
    subject
}

fn signing(config: &Config, keys: &Keys, subject: &mut Subject) {
    let name = "signing key";
    match keys {
        Keys::Refused(error) => {
            // The remedy is in the words: `…: chmod 600 …`.
            let text = format!("{:#}", anyhow::Error::msg(chain(error)));
            subject.add(Finding::failed(name, text).remedy(match error {
                config::Error::Value { .. } => {
                    "name one key of each name, or make another with `muster key generate`"
                }
                config::Error::Key { cause, .. } if cause.is_missing() => {
                    "name a key that is there, or none: `muster serve` makes one"
                }
                _ => "the key must be readable for muster and nobody else (chmod 600, chown)",
            }));
        }
        Keys::Read => {
            for (key, file) in config.secret_keys.iter().zip(&config.secret_key_files) {
                let seen = format!("{} in {}, private", key.name(), file.display());
                subject.add(Finding::ok(name, seen));
            }
            for file in &config.unseen_keys {
                let seen = format!("{} is no file here: a credential?", file.display());
                let remedy = "`muster check --as-service` sees the credentials of the service";
                subject.add(Finding::note(name, seen).remedy(remedy));
            }
            if let Some(file) = &config.key_to_be_made {
                let seen = format!(
                    "none yet; the first `muster serve` makes {}",
                    file.display()
                );
                subject.add(Finding::note(name, seen));
            }
        }
    }
}

/// The error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Tells whether an address is free, or a Muster's already.
async fn port(address: &ListenAddress) -> Finding {
    let name = "port";
    let server = Server::listening(address);
    if let Ok(report) = status::report(&server).await {
        let version = report["version"].as_str().unwrap_or_default();
        let up = report["uptime-ms"].as_u64().unwrap_or_default();
        let up = units::duration(std::time::Duration::from_millis(up));
        let ours = env!("CARGO_PKG_VERSION");
        let seen = format!("{address} is held by muster {version}, up {up}");
        return match version == ours {
            true => Finding::ok(name, seen),
            false => Finding::note(name, format!("{seen}; this is muster {ours}: restart it")),
        };
    }
    match address {
        ListenAddress::Tcp(address) => tcp_port(*address),
        ListenAddress::Unix(path) => unix_socket(path),
    }
}

fn tcp_port(address: SocketAddr) -> Finding {
    let name = "port";
    match TcpListener::bind(address) {
        Ok(_) => Finding::ok(name, format!("{address} is free; no muster runs there")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            let seen = format!("{address} is held by another program");
            Finding::failed(name, seen)
                .remedy("stop what holds it (ss -ltnp), or choose another with --listen")
        }
        Err(error) => Finding::failed(name, format!("{address}: {error}"))
            .remedy("name an address of this machine; ports below 1024 need CAP_NET_BIND_SERVICE"),
    }
}

fn unix_socket(path: &Path) -> Finding {
    let name = "port";
    let shown = path.display();
    let folder = path.parent().unwrap_or(Path::new("/"));
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Finding::failed(name, format!("unix:{shown} is held by another program"))
            .remedy("stop it, or choose another path with --listen");
    }
    match folder.is_dir() {
        true => Finding::ok(name, format!("unix:{shown} is free; no muster runs there")),
        false => Finding::failed(name, format!("{} is no folder", folder.display()))
            .remedy("make it first (RuntimeDirectory= does so for a service)"),
    }
}

fn nix_conf(
    config: &Config,
    conf: &NixConf,
    of_user: Option<&NixConf>,
    url: Option<&str>,
    subject: &mut Subject,
) {
    let urls = urls(config, url);
    let ours = |conf: &NixConf| {
        conf.substituters
            .iter()
            .find(|s| is_ours(s, &urls))
            .cloned()
    };
    let named = ours(conf);
    match (&named, of_user.and_then(ours), urls.first()) {
        (Some(named), _, _) => {
            subject.add(Finding::ok("nix.conf URL", format!("{named} ({})", conf.source)));
        }
        (None, _, None) => subject.add(
            Finding::skipped("nix.conf URL", "muster listens on a Unix socket only")
                .remedy("name the URL of the server before it by --url"),
        ),
        (None, Some(named), _) => subject.add(Finding::note(
            "nix.conf URL",
            format!("{named} is in this user's own nix.conf only: heeded if the user is in trusted-users"),
        )),
        (None, None, Some(url)) => subject.add(
            Finding::failed("nix.conf URL", format!("no substituter there is ours (asked: {})", conf.source))
                .remedy(format!(
                    "add to /etc/nix/nix.conf: extra-substituters = {url} (or say by --url what clients use)"
                )),
        ),
    }
    key(config, conf, subject);
    names(conf, subject);
    priority(config, conf, named.as_deref(), subject);
    negative_ttl(conf, subject);
}

fn key(config: &Config, conf: &NixConf, subject: &mut Subject) {
    let name = "nix.conf key";
    let ours: Vec<PublicKey> = config.secret_keys.iter().map(|key| key.public()).collect();
    let trusted = conf.keys();
    let Some(first) = ours.first() else {
        subject.skip(&[name], "no signing key could be read");
        return;
    };
    if let Some(key) = ours.iter().find(|key| trusted.contains(key)) {
        subject.add(Finding::ok(name, format!("{} is trusted", key.name())));
        return;
    }
    if !conf.require_sigs {
        subject.add(Finding::note(
            name,
            "require-sigs is false: signatures are not looked at",
        ));
        return;
    }
    let same_name = trusted
        .iter()
        .any(|key| ours.iter().any(|o| o.name() == key.name()));
    let seen = match same_name {
        true => format!(
            "trusted-public-keys has another key named {}, and the first of a name counts",
            first.name()
        ),
        false => format!("trusted-public-keys does not have {}", first.name()),
    };
    subject.add(Finding::failed(name, seen).remedy(format!(
        "add to /etc/nix/nix.conf: extra-trusted-public-keys = {first}"
    )));
}

fn names(conf: &NixConf, subject: &mut Subject) {
    let doubled = conf.doubled_names();
    subject.add(match doubled.is_empty() {
        true => Finding::ok("key names", "no two keys have one name"),
        false => Finding::failed(
            "key names",
            format!(
                "two different keys are named {}: Nix heeds the first alone",
                doubled.join(", ")
            ),
        )
        .remedy("remove one, or sign with a key of another name (muster key generate)"),
    });
}

fn priority(config: &Config, conf: &NixConf, named: Option<&str>, subject: &mut Subject) {
    let name = "priority";
    let of = |url: &str| {
        let (_, query) = url.split_once('?')?;
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs
            .find(|(key, _)| *key == "priority")?
            .1
            .parse::<u32>()
            .ok()
    };
    let public = conf
        .substituters
        .iter()
        .find(|url| url.contains("cache.nixos.org"));
    let Some(public) = public else {
        subject.skip(&[name], "nix.conf does not name cache.nixos.org");
        return;
    };
    let theirs = of(public).unwrap_or(PUBLIC_PRIORITY);
    let ours = named.and_then(of).unwrap_or(config.priority);
    let seen = format!("{ours}, cache.nixos.org has {theirs}; lower is asked first");
    subject.add(match ours < theirs {
        true => Finding::ok(name, seen),
        false => Finding::failed(name, seen).remedy(format!(
            "set priority = 30 in muster's configuration, or ?priority={} on its URL",
            theirs.saturating_sub(1).min(30)
        )),
    });
}

fn negative_ttl(conf: &NixConf, subject: &mut Subject) {
    let name = "negative TTL";
    let Some(seconds) = conf.negative_ttl else {
        subject.skip(&[name], "this Nix does not say");
        return;
    };
    let seen = format!("{seconds} s");
    subject.add(match seconds <= NEGATIVE_TTL_MAX {
        true => Finding::ok(name, seen),
        false => Finding::failed(
            name,
            format!("{seen}: what was just built stays unknown for so long"),
        )
        .remedy("add to /etc/nix/nix.conf: narinfo-cache-negative-ttl = 60"),
    });
}

/// The URLs by which a client of this machine may name us, the likeliest first.
fn urls(config: &Config, url: Option<&str>) -> Vec<String> {
    if let Some(url) = url {
        return vec![url.trim_end_matches('/').to_owned()];
    }
    let hostname = config::hostname();
    let mut urls = Vec::new();
    for address in &config.listen {
        let ListenAddress::Tcp(address) = address else {
            continue;
        };
        let port = address.port();
        let mut add = |host: &str| urls.push(format!("http://{host}:{port}"));
        let any = address.ip().is_unspecified();
        match address.ip() {
            ip if any => {
                add(if ip.is_ipv4() { "127.0.0.1" } else { "[::1]" });
                add(&hostname);
            }
            std::net::IpAddr::V4(ip) => add(&ip.to_string()),
            std::net::IpAddr::V6(ip) => add(&format!("[{ip}]")),
        }
        if any || address.ip().is_loopback() {
            add("localhost");
        }
    }
    urls
}

fn is_ours(substituter: &str, urls: &[String]) -> bool {
    let (place, _) = substituter.split_once('?').unwrap_or((substituter, ""));
    let place = place.trim_end_matches('/');
    let host = place.split("://").nth(1).unwrap_or_default();
    // The port of http may be left out.
    let with_port = match host.contains(':') {
        true => place.to_owned(),
        false => format!("{place}:80"),
    };
    urls.iter().any(|url| url == place || *url == with_port)
}

const PUBLIC_PRIORITY: u32 = 40;
const NEGATIVE_TTL_MAX: u64 = 300;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_url_is_known_in_every_form() {
        let urls: Vec<String> = ["http://127.0.0.1:5000", "http://b:80"]
            .map(str::to_owned)
            .into();
        for url in [
            "http://127.0.0.1:5000",
            "http://127.0.0.1:5000/?priority=10",
            "http://b",
            "http://b:80/",
        ] {
            assert!(is_ours(url, &urls), "{url}");
        }
        for url in [
            "https://127.0.0.1:5000",
            "http://127.0.0.1:5001",
            "http://127.0.0.1:5000/x",
            "b",
        ] {
            assert!(!is_ours(url, &urls), "{url}");
        }
    }
}
