//! One HTTP/1.1 question over a Unix socket, answered with all that the server sent.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// An answer; `complete` is false when the server cut it.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub complete: bool,
}

impl Response {
    /// A header's value; names are given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }

    /// A field of the narinfo that the body is.
    pub fn field(&self, name: &str) -> Option<String> {
        self.text().lines().find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(": ")
                .map(str::to_owned)
        })
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Asks and reads until the server closes; no answer at all within a minute is a panic.
pub fn request(socket: &Path, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
    ask(socket, method, target, headers)
        .unwrap_or_else(|error| panic!("no HTTP answer to {method} {target}: {error}"))
}

/// Asks a server that may die meanwhile; an error is no answer at all.
pub fn ask(
    socket: &Path,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
) -> io::Result<Response> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut head =
        format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    let mut bytes = Vec::new();
    let ended = stream.read_to_end(&mut bytes);
    let nothing = || io::Error::other(format!("it ended with {ended:?}"));
    parse(&bytes, method).ok_or_else(nothing)
}

fn parse(bytes: &[u8], method: &str) -> Option<Response> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(bytes.get(..end)?).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|l| l.split_once(':'))
        .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()))
        .collect();
    let rest = bytes.get(end + 4..)?;
    let mut response = Response {
        status,
        headers,
        body: Vec::new(),
        complete: true,
    };
    let length = response
        .header("content-length")
        .and_then(|v| v.parse::<usize>().ok());
    if response.header("transfer-encoding") == Some("chunked") {
        (response.body, response.complete) = dechunk(rest);
    } else {
        response.body = rest.to_vec();
        response.complete = method == "HEAD" || length.is_none_or(|n| n == rest.len());
    }
    Some(response)
}

/// The chunks joined, and whether the last one was there.
fn dechunk(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|w| w == b"\r\n") {
        let size = rest
            .get(..end)
            .map(|l| String::from_utf8_lossy(l).into_owned());
        let size = size.and_then(|l| usize::from_str_radix(l.trim(), 16).ok());
        let chunk = rest.get(end + 2..).unwrap_or_default();
        match size {
            Some(0) => return (body, true),
            Some(n) if chunk.len() >= n + 2 => {
                body.extend(chunk.iter().take(n));
                rest = chunk.get(n + 2..).unwrap_or_default();
            }
            _ => {
                body.extend(chunk);
                break;
            }
        }
    }
    (body, false)
}
