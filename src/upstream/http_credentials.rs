//! What a binary cache is shown so that it lets us in: read from files, never from a URI.
//!
//! ```text
//! credentials file   one line: `user:password`, or a token (`Bearer <token>` where it has a colon)
//! netrc              machine <host> login <user> password <password>
//!                    default login … password …           for every other host; stands last
//! ```
//!
//! In netrc words are parted by white space; `"…"` with `\\` is one word; `#` at the beginning of a line makes a
//! comment; `macdef` goes to the next empty line. An entry without login is a user without name, as
//! some caches hand out. Source: the manual's `netrc-file`, curl's `lib/netrc.c`.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::HeaderValue;

/// What is sent as `Authorization`; not shown in any log.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials(HeaderValue);

/// A text that holds no credentials; it is not quoted, as it may yet be secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// It is empty.
    #[error("it is empty")]
    Empty,
    /// It has more than one line.
    #[error("it has more than one line: it must be user:password, or a token")]
    Lines,
    /// It cannot be sent.
    #[error("it holds characters that cannot be sent")]
    Characters,
}

impl Credentials {
    /// Reads a credentials file.
    pub fn parse(text: &str) -> Result<Self, CredentialsError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(CredentialsError::Empty);
        }
        if text.contains(['\n', '\r']) {
            return Err(CredentialsError::Lines);
        }
        if let Some(token) = text.strip_prefix("Bearer ") {
            return Self::bearer(token.trim_start());
        }
        match text.split_once(':') {
            Some((user, password)) => Self::basic(user, password),
            None => Self::bearer(text),
        }
    }

    /// Finds a host's entry in a netrc, or else the default one.
    pub fn from_netrc(text: &str, host: &str) -> Result<Option<Self>, CredentialsError> {
        let (mut named, mut default) = (None, None);
        let mut words = words(text).into_iter();
        // Entries: whether it is the one we look for, its login and its password.
        let mut entry: Option<(Fits, String, Option<String>)> = None;
        let mut end = |entry: Option<(Fits, String, Option<String>)>| match entry {
            Some((Fits::Host, user, Some(password))) if named.is_none() => {
                named = Some((user, password));
            }
            Some((Fits::Default, user, Some(password))) if default.is_none() => {
                default = Some((user, password));
            }
            _ => {}
        };
        while let Some(word) = words.next() {
            match word.as_str() {
                "machine" => {
                    end(entry.take());
                    let name = words.next().unwrap_or_default();
                    let fits = if name.eq_ignore_ascii_case(host) {
                        Fits::Host
                    } else {
                        Fits::Not
                    };
                    entry = Some((fits, String::new(), None));
                }
                "default" => {
                    end(entry.take());
                    entry = Some((Fits::Default, String::new(), None));
                }
                "login" | "password" => {
                    let value = words.next().unwrap_or_default();
                    match &mut entry {
                        Some((_, login, _)) if word == "login" => *login = value,
                        Some((_, _, password)) => *password = Some(value),
                        None => {}
                    }
                }
                "account" => drop(words.next()),
                _ => {}
            }
        }
        end(entry.take());
        let found = named.or(default);
        found
            .map(|(user, password)| Self::basic(&user, &password))
            .transpose()
    }

    /// Returns the header's value; it is marked as not to be logged.
    pub fn header(&self) -> HeaderValue {
        self.0.clone()
    }

    fn basic(user: &str, password: &str) -> Result<Self, CredentialsError> {
        Self::of(&format!(
            "Basic {}",
            STANDARD.encode(format!("{user}:{password}"))
        ))
    }

    fn bearer(token: &str) -> Result<Self, CredentialsError> {
        if token.is_empty() || token.contains(char::is_whitespace) {
            return Err(CredentialsError::Characters);
        }
        Self::of(&format!("Bearer {token}"))
    }

    fn of(value: &str) -> Result<Self, CredentialsError> {
        let mut value: HeaderValue = value.parse().map_err(|_| CredentialsError::Characters)?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

/// Whom an entry of a netrc is for.
enum Fits {
    Host,
    Default,
    Not,
}

/// The words of a netrc without comments and macros.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut in_macro = false;
    for line in text.lines() {
        if in_macro {
            in_macro = !line.trim().is_empty();
            continue;
        }
        if line.trim_start().starts_with('#') {
            continue;
        }
        let mut rest = line.chars().peekable();
        while let Some(c) = rest.next() {
            if c.is_whitespace() {
                continue;
            }
            let mut word = String::new();
            if c == '"' {
                while let Some(c) = rest.next().filter(|c| *c != '"') {
                    word.push(match (c, rest.peek()) {
                        ('\\', Some(_)) => rest.next().unwrap_or(c),
                        _ => c,
                    });
                }
            } else {
                word.push(c);
                while let Some(c) = rest.next_if(|c| !c.is_whitespace()) {
                    word.push(c);
                }
                if word == "macdef" {
                    in_macro = true;
                    break;
                }
            }
            words.push(word);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(credentials: Credentials) -> String {
        let header = credentials.header();
        assert!(header.is_sensitive());
        let text = header.to_str().unwrap().to_owned();
        match text.strip_prefix("Basic ") {
            Some(packed) => String::from_utf8(STANDARD.decode(packed).unwrap()).unwrap(),
            None => text,
        }
    }

    #[test]
    fn a_line_is_a_user_or_a_token() {
        let parse = |text| Credentials::parse(text).map(sent);
        assert_eq!(parse("me:p:w\n").as_deref(), Ok("me:p:w"));
        assert_eq!(parse("abc.def-_\n").as_deref(), Ok("Bearer abc.def-_"));
        assert_eq!(parse("Bearer a:b").as_deref(), Ok("Bearer a:b"));
        assert_eq!(parse(" \n"), Err(CredentialsError::Empty));
        assert_eq!(parse("a\nb"), Err(CredentialsError::Lines));
        assert_eq!(parse("a b"), Err(CredentialsError::Characters));
        let shown = format!("{:?}", Credentials::parse("me:secret").unwrap());
        assert!(!shown.contains("secret"));
    }

    #[test]
    fn netrc_entries_are_found() {
        let netrc = "# machine no login no password no\n\
            machine a.example login me password \"p \\\"w\"\n\
            machine b.example\n  password token\n  account x\n\
            macdef init\nmachine c.example login no password no\n\n\
            machine d.example login only\n\
            default login any password all\n";
        let find = |host| Credentials::from_netrc(netrc, host).unwrap().map(sent);
        assert_eq!(find("a.example").as_deref(), Some("me:p \"w"));
        assert_eq!(find("B.example").as_deref(), Some(":token"));
        assert_eq!(find("c.example").as_deref(), Some("any:all"));
        assert_eq!(find("d.example").as_deref(), Some("any:all"));
        let without = Credentials::from_netrc("machine a login b password c", "z");
        assert_eq!(without, Ok(None));
        for broken in [
            "",
            "machine",
            "login",
            "password x",
            "machine z password",
            "\"",
            "default",
        ] {
            assert!(Credentials::from_netrc(broken, "z").is_ok(), "{broken}");
        }
    }
}
