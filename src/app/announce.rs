//! What is printed at start: the lines for `nix.conf`, and each upstream with its state.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use crate::config::{Config, ListenAddress};
use crate::substituter::Setup;
use crate::substituter::member::Member;
use crate::upstream::Link;

/// Prints where it listens and what a client's `nix.conf` needs.
pub(super) fn start(config: &Config, addresses: &[ListenAddress], setup: &Setup) {
    let keys = setup.publisher.public_keys();
    let mut text = format!("muster {} listens on", env!("CARGO_PKG_VERSION"));
    for address in addresses {
        match address {
            ListenAddress::Tcp(address) => text.push_str(&format!(" http://{address}")),
            ListenAddress::Unix(path) => text.push_str(&format!(" unix:{}", path.display())),
        }
    }
    if let Some(path) = &config.generated_key {
        text.push_str(&format!("\nmade a new signing key: {}", path.display()));
    }
    text.push_str("\n\nAdd these lines to /etc/nix/nix.conf of each client:\n\n");
    text.push_str(&format!("extra-substituters = {}\n", url(addresses)));
    text.push_str(&format!("extra-trusted-public-keys = {keys}\n"));
    text.push_str("narinfo-cache-negative-ttl = 60\n\n");
    if !addresses.iter().any(|a| matches!(a, ListenAddress::Tcp(_))) {
        text.push_str(
            "Nix cannot use a Unix socket: put an HTTP server before it, and its address in the first line.\n",
        );
    }
    if setup.members.is_empty() {
        text.push_str("No upstreams: name builders in /etc/nix/machines or with --upstream.\n");
    }
    print(&text);
}

/// Prints each upstream as soon as it is known whether it answers.
pub(super) async fn upstreams(setup: Arc<Setup>) {
    let settled = setup.members.iter().map(|member| async move {
        let mut link = member.upstream.link();
        let known = link.wait_for(|link| !matches!(link, Link::Connecting { .. }));
        let _ = tokio::time::timeout(SETTLING, known).await;
        // A store of another directory shows itself at the first question only.
        tokio::time::sleep(FIRST_QUESTION).await;
        member
    });
    let mut settled: FuturesUnordered<_> = settled.collect();
    while let Some(member) = settled.next().await {
        print(&line(member));
    }
}

fn line(member: &Member) -> String {
    let name = member.upstream.name();
    match member.link() {
        Link::Up { peer } => format!("upstream {name}: well, {peer}\n"),
        Link::Down { error, .. } => {
            format!("upstream {name}: sick, {error}; tried again in the background\n")
        }
        Link::Connecting { .. } => {
            format!("upstream {name}: silent so far; tried again in the background\n")
        }
    }
}

/// The URL by which clients reach this machine best: from elsewhere too, if they can.
fn url(addresses: &[ListenAddress]) -> String {
    let tcp: Vec<_> = addresses
        .iter()
        .filter_map(|address| match address {
            ListenAddress::Tcp(address) => Some(address),
            ListenAddress::Unix(_) => None,
        })
        .collect();
    let reachable = tcp.iter().find(|address| !address.ip().is_loopback());
    match reachable.or(tcp.first()) {
        Some(address) if address.ip().is_unspecified() => {
            format!("http://{}:{}", crate::config::hostname(), address.port())
        }
        Some(address) => format!("http://{address}"),
        // Of whatever stands before the socket.
        None => format!("http://{}", crate::config::hostname()),
    }
}

fn print(text: &str) {
    // Nobody reading is no reason to stop.
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

const SETTLING: Duration = Duration::from_secs(6);
const FIRST_QUESTION: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_is_one_that_clients_reach() {
        let url = |texts: &[&str]| {
            let addresses: Vec<ListenAddress> =
                texts.iter().map(|text| text.parse().unwrap()).collect();
            url(&addresses)
        };
        let host = crate::config::hostname();
        assert_eq!(url(&["127.0.0.1:5000"]), "http://127.0.0.1:5000");
        assert_eq!(url(&["unix:/run/m", "[::1]:80"]), "http://[::1]:80");
        assert_eq!(url(&["127.0.0.1:1", "10.0.0.1:2"]), "http://10.0.0.1:2");
        for any in ["0.0.0.0:5000", "[::]:5000"] {
            assert_eq!(url(&[any]), format!("http://{host}:5000"));
        }
        assert_eq!(url(&["unix:/run/m"]), format!("http://{host}"));
    }
}
