//! The kinds of values that a configuration holds, and how each is written.
//!
//! Every one is read by a visitor, because only errors made inside of one get their place in the file.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};

use super::listen::{ListenAddress, ListenError};
use super::{CompressionSetting, LocalStore, LogFormat};
use crate::nix::signature::PublicKey;
use crate::nix::store_path::StoreDir;
use crate::nix::store_uri::{StoreKind, StoreUri};

/// `machines = "/path"`, or `true` for the usual file, or `false` for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachinesSetting {
    /// `/etc/nix/machines`, if it is there.
    Usual,
    /// This file, which must be there.
    File(PathBuf),
    /// None.
    Off,
}

/// One value or a list of them.
#[derive(Clone, Debug)]
pub struct List<T>(pub Vec<T>);

/// A value that is written as text.
#[derive(Clone, Debug)]
pub struct Text<T>(pub T);

/// Seconds, whole or not; at most ten years.
#[derive(Clone, Copy, Debug)]
pub struct Seconds(pub Duration);

/// Seconds that are more than none.
#[derive(Clone, Copy, Debug)]
pub struct PositiveSeconds(pub Duration);

/// A number of bytes: `1000`, `"64M"`; K, M and G are powers of 1024.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

/// A whole number within these bounds.
#[derive(Clone, Copy, Debug)]
pub struct Number<const LEAST: u32, const MOST: u32>(pub u32);

/// How many of something, at least one.
pub type Count = Number<1, 1_000_000>;

/// A host that a binary cache may send us to: `host`, `host:port`, or `*` for any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern(pub String);

/// A type whose values are written as text, and say what is wrong with one.
pub trait FromText: Sized {
    /// What is expected, for the error about a number or a list in its stead.
    const EXPECTED: &'static str;

    /// Reads a value.
    fn from_text(text: &str) -> Result<Self, String>;
}

impl FromText for ListenAddress {
    const EXPECTED: &'static str = "an address such as \"127.0.0.1:5000\"";

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|error: ListenError| error.to_string())
    }
}

impl FromText for StoreUri {
    const EXPECTED: &'static str = "a store URI such as \"ssh-ng://builder\"";

    fn from_text(text: &str) -> Result<Self, String> {
        let uri = Self::parse(text).map_err(|error| error.to_string())?;
        match uri.kind() {
            StoreKind::Unsupported(scheme) => Err(format!(
                "{scheme:?} is no kind of store that can be asked; ssh-ng, ssh, unix, daemon, http, https and file are"
            )),
            _ => Ok(uri),
        }
    }
}

impl FromText for HostPattern {
    const EXPECTED: &'static str = "a host such as \"cdn.example\"";

    fn from_text(text: &str) -> Result<Self, String> {
        let foreign = |c: char| c.is_whitespace() || c.is_control() || "/@?#".contains(c);
        if text.is_empty() || text.contains(foreign) || (text.contains('*') && text != "*") {
            return Err(format!(
                "{text:?} is no host: a name, perhaps with a port, or \"*\" for any"
            ));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl FromText for PublicKey {
    const EXPECTED: &'static str = "a public key, \"name:base64\"";

    fn from_text(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|error| format!("no public key: {error}"))
    }
}

impl FromText for StoreDir {
    const EXPECTED: &'static str = "a directory such as \"/nix/store\"";

    fn from_text(text: &str) -> Result<Self, String> {
        Self::new(text).map_err(|error| error.to_string())
    }
}

impl FromText for PathBuf {
    const EXPECTED: &'static str = "a path";

    /// What a relative path is relative to nobody could know; a bare name is a credential's.
    fn from_text(text: &str) -> Result<Self, String> {
        let bare = !text.is_empty() && !text.contains('/');
        if bare || text.starts_with('/') {
            Ok(text.into())
        } else {
            Err(format!(
                "{text:?} is neither an absolute path nor the name of a credential"
            ))
        }
    }
}

impl FromText for CompressionSetting {
    const EXPECTED: &'static str = "auto, none, zstd or xz";

    fn from_text(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|setting| setting.name() == text);
        found.ok_or_else(|| format!("{text:?} is not {}", Self::EXPECTED))
    }
}

impl FromText for LocalStore {
    const EXPECTED: &'static str = "auto or daemon";

    fn from_text(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "daemon" => Ok(Self::Daemon),
            _ => Err(format!("{text:?} is not {}", Self::EXPECTED)),
        }
    }
}

impl FromText for LogFormat {
    const EXPECTED: &'static str = "text or json";

    fn from_text(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("{text:?} is not {}", Self::EXPECTED)),
        }
    }
}

impl FromText for Bytes {
    const EXPECTED: &'static str = "a number of bytes, or a text such as \"64M\"";

    fn from_text(text: &str) -> Result<Self, String> {
        let malformed = || format!("{text:?} is not {}", Self::EXPECTED);
        let number = text.trim_end_matches(['K', 'M', 'G', 'T']);
        let shift = match text.strip_prefix(number).unwrap_or_default() {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(malformed()),
        };
        let number: u64 = number.parse().map_err(|_| malformed())?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(malformed)?;
        Ok(Self(bytes))
    }
}

struct TextVisitor<T>(std::marker::PhantomData<T>);

impl<T: FromText> Visitor<'_> for TextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        T::from_text(text).map_err(E::custom)
    }
}

impl<'de, T: FromText> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let visitor = TextVisitor(std::marker::PhantomData);
        deserializer.deserialize_any(visitor).map(Self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;
        impl Visitor<'_> for BytesVisitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(Bytes::EXPECTED)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Bytes, E> {
                let refused = |_| E::custom(format!("{bytes} is not {}", Bytes::EXPECTED));
                bytes.try_into().map(Bytes).map_err(refused)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                Bytes::from_text(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(BytesVisitor)
    }
}

struct NumberVisitor<const LEAST: u32, const MOST: u32>;

impl<const LEAST: u32, const MOST: u32> Visitor<'_> for NumberVisitor<LEAST, MOST> {
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from {LEAST} to {MOST}")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<u32, E> {
        match u32::try_from(number) {
            Ok(number) if (LEAST..=MOST).contains(&number) => Ok(number),
            _ => Err(E::invalid_value(de::Unexpected::Unsigned(number), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<u32, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
        }
    }
}

impl<'de, const LEAST: u32, const MOST: u32> Deserialize<'de> for Number<LEAST, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let visitor = NumberVisitor::<LEAST, MOST>;
        deserializer.deserialize_any(visitor).map(Self)
    }
}

struct SecondsVisitor {
    least: Duration,
}

impl Visitor<'_> for SecondsVisitor {
    type Value = Duration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of seconds")
    }

    fn visit_f64<E: de::Error>(self, seconds: f64) -> Result<Duration, E> {
        match Duration::try_from_secs_f64(seconds) {
            Ok(duration) if duration < self.least => {
                Err(E::custom("it must be more than 0 seconds"))
            }
            Ok(duration) if duration <= SECONDS_MAX => Ok(duration),
            _ => Err(E::custom(format!(
                "{seconds} is not a number of seconds up to ten years"
            ))),
        }
    }

    fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Duration, E> {
        // Exact far beyond the bound.
        self.visit_f64(u32::try_from(seconds).unwrap_or(u32::MAX).into())
    }

    fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Duration, E> {
        match u64::try_from(seconds) {
            Ok(seconds) => self.visit_u64(seconds),
            Err(_) => Err(E::custom(format!("{seconds} seconds are less than none"))),
        }
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let least = Duration::ZERO;
        deserializer
            .deserialize_any(SecondsVisitor { least })
            .map(Self)
    }
}

impl<'de> Deserialize<'de> for PositiveSeconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let least = Duration::from_millis(1);
        deserializer
            .deserialize_any(SecondsVisitor { least })
            .map(Self)
    }
}

impl<'de> Deserialize<'de> for MachinesSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MachinesVisitor;
        impl Visitor<'_> for MachinesVisitor {
            type Value = MachinesSetting;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the path of a machines file, or false")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<MachinesSetting, E> {
                Ok(if on {
                    MachinesSetting::Usual
                } else {
                    MachinesSetting::Off
                })
            }

            fn visit_str<E: de::Error>(self, path: &str) -> Result<MachinesSetting, E> {
                if path.starts_with('/') {
                    Ok(MachinesSetting::File(path.into()))
                } else {
                    Err(E::custom(format!("{path:?} is not an absolute path")))
                }
            }
        }
        deserializer.deserialize_any(MachinesVisitor)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ListVisitor<T> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    if list.len() == LIST_ITEMS_MAX {
                        let message = format!("the list has more than {LIST_ITEMS_MAX} items");
                        return Err(de::Error::custom(message));
                    }
                    list.push(item);
                }
                Ok(list)
            }

            fn visit_str<E: de::Error>(self, one: &str) -> Result<Vec<T>, E> {
                T::deserialize(de::value::StrDeserializer::new(one)).map(|one| vec![one])
            }
        }
        let visitor = ListVisitor(std::marker::PhantomData);
        deserializer.deserialize_any(visitor).map(Self)
    }
}

const SECONDS_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);
const LIST_ITEMS_MAX: usize = 1000;
