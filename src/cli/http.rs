//! One question to a running Muster, over TCP, TLS or a Unix socket.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use anyhow::{anyhow, bail};
use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::{Request, Response, Uri};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;

use crate::config::ListenAddress;
use crate::upstream::http_tls::{tls, tls_without_certificates};

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Server {
    /// A URL without a slash at its end.
    Url(String),
    /// A Unix socket.
    Unix(PathBuf),
}

/// What a server answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Bytes,
}

impl Server {
    /// Reads `http://…`, `https://…`, `unix:/path` or `host:port`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with("unix:") {
            return match text.parse() {
                Ok(address) => Ok(Self::listening(&address)),
                Err(error) => Err(format!("{error}")),
            };
        }
        let url = match text.split_once("://") {
            Some(("http" | "https", _)) => text.to_owned(),
            Some((scheme, _)) => return Err(format!("{scheme} is not http, https or unix")),
            None => format!("http://{text}"),
        };
        let (url, _) = url.split_once('?').unwrap_or((&url, ""));
        // A port that is none is left out by `Uri`, and port 80 would be asked.
        let port_is_read = |uri: &Uri| {
            let authority = uri.authority().map_or("", |authority| authority.as_str());
            let place = authority.rsplit('@').next().unwrap_or_default();
            let (_, after) = place.rsplit_once(':').unwrap_or_default();
            after.ends_with(']') || after.is_empty() || uri.port_u16().is_some()
        };
        match url.parse::<Uri>() {
            Ok(uri) if uri.host().is_some() && port_is_read(&uri) => {
                Ok(Self::Url(url.trim_end_matches('/').to_owned()))
            }
            _ => Err(format!(
                "{text:?} is not a URL such as http://127.0.0.1:5000"
            )),
        }
    }

    /// Finds the server that listens there.
    pub(super) fn listening(address: &ListenAddress) -> Self {
        match address {
            ListenAddress::Unix(path) => Self::Unix(path.clone()),
            ListenAddress::Tcp(address) => {
                let mut address = *address;
                if address.ip().is_unspecified() {
                    address.set_ip(match address.is_ipv4() {
                        true => std::net::Ipv4Addr::LOCALHOST.into(),
                        false => std::net::Ipv6Addr::LOCALHOST.into(),
                    });
                }
                Self::Url(format!("http://{address}"))
            }
        }
    }

    /// Asks for a target such as `/healthz`; dropped, the question is given up.
    pub(super) async fn get(&self, target: &str, within: Duration) -> anyhow::Result<Answer> {
        let asked = tokio::time::timeout(within, self.ask(target)).await;
        asked.unwrap_or_else(|_| Err(anyhow!("no answer within {within:?}")))
    }

    async fn ask(&self, target: &str) -> anyhow::Result<Answer> {
        let response = match self {
            Self::Url(url) => {
                // As Nix has it; see `upstream::http_client`.
                let file = std::env::var_os("NIX_SSL_CERT_FILE").filter(|file| !file.is_empty());
                let tls = match tls(file.as_deref().map(Path::new)) {
                    Err(_) if url.starts_with("http://") => tls_without_certificates()?,
                    tls => tls?,
                };
                let https = HttpsConnectorBuilder::new()
                    .with_tls_config((*tls).clone())
                    .https_or_http()
                    .enable_http1()
                    .build();
                let client = Client::builder(TokioExecutor::new()).build(https);
                let request = request(&format!("{url}{target}"))?;
                client.request(request).await.map_err(plain)?
            }
            Self::Unix(path) => {
                let stream = UnixStream::connect(path).await?;
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
                let request = request(&format!("http://muster{target}"))?;
                let asking = async {
                    let response = sender.send_request(request).await?;
                    read(response).await
                };
                return tokio::select! {
                    answer = asking => answer,
                    ended = connection => {
                        ended?;
                        bail!("the connection was closed")
                    }
                };
            }
        };
        read(response).await
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Url(url) => f.write_str(url),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

fn request(uri: &str) -> anyhow::Result<Request<String>> {
    let uri: Uri = uri.parse()?;
    let host = uri.authority().map(ToString::to_string).unwrap_or_default();
    let request = Request::get(uri)
        .header("host", host)
        .header("user-agent", concat!("muster/", env!("CARGO_PKG_VERSION")));
    Ok(request.body(String::new())?)
}

async fn read(response: Response<Incoming>) -> anyhow::Result<Answer> {
    let (head, mut body) = response.into_parts();
    let mut bytes = BytesMut::new();
    while let Some(frame) = std::future::poll_fn(|c| Pin::new(&mut body).poll_frame(c)).await {
        if let Ok(data) = frame?.into_data() {
            bytes.extend_from_slice(&data);
        }
        if bytes.len() > BODY_BYTES_MAX {
            bail!("it answers more than {BODY_BYTES_MAX} bytes");
        }
    }
    Ok(Answer {
        status: head.status.as_u16(),
        body: bytes.freeze(),
    })
}

/// The causes in one line; the client's own words say nothing.
fn plain(error: hyper_util::client::legacy::Error) -> anyhow::Error {
    let mut text = String::new();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = if text.is_empty() {
                said
            } else {
                format!("{text}: {said}")
            };
        }
        cause = error.source();
    }
    match text.is_empty() {
        true => error.into(),
        false => anyhow!(text),
    }
}

/// Reads `Sun, 06 Nov 1994 08:49:37 GMT`, the one form that servers send (RFC 9110, 5.6.7).
pub(super) fn date_of(text: &str) -> Option<SystemTime> {
    let mut words = text.split([' ', ':']).skip(1);
    let number = |words: &mut dyn Iterator<Item = &str>| words.next()?.parse::<u64>().ok();
    let day = number(&mut words)?;
    let name = words.next()?;
    let month = 1 + MONTHS.iter().position(|month| *month == name)? as u64;
    let year = number(&mut words)?;
    let (hour, minute) = (number(&mut words)?, number(&mut words)?);
    let second = number(&mut words)?;
    if !(1970..10_000).contains(&year) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin with March have their leap day last.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = y * 365 + y / 4 - y / 100 + y / 400 + (m * 153 + 2) / 5 + day - 1;
    let days = days.checked_sub(DAYS_BEFORE_1970)?;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];
/// From the first of March of the year 0.
const DAYS_BEFORE_1970: u64 = 719_468;
/// What is asked for is some kilobytes; `/healthz` has one for each upstream and divergent path.
const BODY_BYTES_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_named_as_people_do() {
        let parse = |text| Server::parse(text).map(|server| server.to_string());
        assert_eq!(parse("127.0.0.1:5000").unwrap(), "http://127.0.0.1:5000");
        assert_eq!(parse("https://cache/x/").unwrap(), "https://cache/x");
        assert_eq!(parse("http://cache?priority=3").unwrap(), "http://cache");
        assert_eq!(parse("unix:/run/m").unwrap(), "unix:/run/m");
        for text in ["unix:m", "ftp://x", "", "http://"] {
            assert!(parse(text).is_err(), "{text}");
        }
        let any: ListenAddress = "0.0.0.0:80".parse().unwrap();
        assert_eq!(Server::listening(&any).to_string(), "http://127.0.0.1:80");
    }

    #[test]
    fn dates_are_those_of_unix() {
        let seconds = |text| {
            let date = date_of(text)?.duration_since(SystemTime::UNIX_EPOCH);
            Some(date.unwrap().as_secs())
        };
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(
            seconds("Thu, 29 Feb 2024 00:00:00 GMT"),
            Some(1_709_164_800)
        );
        assert_eq!(seconds("Thu, 01 Jan 1970 00:00:01 GMT"), Some(1));
        assert_eq!(seconds("tomorrow"), None);
    }
}
