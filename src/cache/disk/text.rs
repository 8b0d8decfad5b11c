//! What is kept of a path, as text: a narinfo, and a line of ours for each ground of trust.
//!
//! ```text
//! …                                            as any narinfo
//! X-Muster-Ground: operator <upstream>
//! X-Muster-Ground: key <key name> <upstream>
//! X-Muster-Ground: content-address <upstream>
//! ```
//!
//! Nix reads over lines that it does not know. The narinfos in the folder carry our signatures, and by
//! them they are known again when the index is lost; the index has the same text without them.

use std::fmt::Write as _;

use super::super::backend::{Ground, NarFile, Record};
use super::super::nar_name::{FileHash, NarName};
use crate::nix::fingerprint;
use crate::nix::hash::{Algorithm, Hash};
use crate::nix::narinfo::{Compression, NarInfo};
use crate::nix::path_info::{Basis, PathInfo};
use crate::nix::signature::{KeyName, PublicKey, Signature};
use crate::nix::store_path::StoreDir;

/// Why a narinfo in the folder does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// It is none, or none of this store.
    #[error("it is no narinfo: {0}")]
    Malformed(String),
    /// It names another file than one of ours, as other programs' do; it is theirs.
    #[error("it names a file that is none of this cache's: {0}")]
    Foreign(String),
    /// Neither a key of ours nor its own name vouches for it.
    #[error("it is signed by none of the present keys")]
    Unsigned,
    /// Its file cannot be looked at just now, which says nothing of it.
    #[error("its nar cannot be opened now: {0}")]
    Unknown(String),
}

/// Writes a record for the index.
pub fn of_record(record: &Record, store_dir: &StoreDir) -> String {
    let file = record.file;
    let narinfo = NarInfo {
        url: record.name().map_or(NO_URL.to_owned(), |name| name.url()),
        compression: Compression::Zstd,
        file_hash: file.and_then(|file| Hash::new(Algorithm::Sha256, &file.hash.0)),
        file_size: file.map(|file| file.size_bytes),
        info: record.info.clone(),
    };
    let mut text = narinfo.render(store_dir);
    push_grounds(&mut text, &record.grounds);
    text
}

/// Reads a record of the index, or any narinfo whose file is one of ours.
pub fn read(text: &str, store_dir: &StoreDir) -> Result<Record, TextError> {
    let narinfo =
        NarInfo::parse(text, store_dir).map_err(|e| TextError::Malformed(e.to_string()))?;
    let grounds = text.lines().filter_map(ground).collect();
    let file = match narinfo.url.as_str() {
        NO_URL => None,
        _ => Some(file(&narinfo)?),
    };
    Ok(Record {
        info: narinfo.info,
        grounds,
        file,
    })
}

/// Reads a narinfo of the folder; only one that a key of ours signed, or that proves itself, counts.
///
/// Our own signatures are taken out again.
pub fn read_file(
    text: &str,
    keys: &[PublicKey],
    store_dir: &StoreDir,
) -> Result<Record, TextError> {
    let mut record = read(text, store_dir)?;
    if record.file.is_none() {
        return Err(TextError::Foreign(NO_URL.to_owned()));
    }
    if !is_vouched_for(&record.info, keys, store_dir) {
        return Err(TextError::Unsigned);
    }
    let ours = |s: &Signature| keys.iter().any(|key| key.name() == s.key_name());
    record.info.signatures.retain(|s| !ours(s));
    Ok(record)
}

/// Adds the grounds to a finished narinfo, once it is sure that it names its own file.
pub fn with_grounds(
    narinfo: &[u8],
    record: &Record,
    store_dir: &StoreDir,
) -> Result<String, TextError> {
    let text = str::from_utf8(narinfo).map_err(|e| TextError::Malformed(e.to_string()))?;
    let read = read(text, store_dir)?;
    if read.name() != record.name() || read.file != record.file {
        return Err(TextError::Foreign("it names another one".to_owned()));
    }
    let mut text = text.to_owned();
    if !text.ends_with('\n') {
        text.push('\n');
    }
    push_grounds(&mut text, &record.grounds);
    Ok(text)
}

fn is_vouched_for(info: &PathInfo, keys: &[PublicKey], store_dir: &StoreDir) -> bool {
    let fingerprint = fingerprint::of_path(info, store_dir);
    let verifies = |s: &Signature| keys.iter().any(|key| key.verifies(&fingerprint, s));
    info.signatures.iter().any(verifies) || info.proves_itself(store_dir)
}

/// The file that a narinfo names, if all that it says of it agrees.
fn file(narinfo: &NarInfo) -> Result<NarFile, TextError> {
    let foreign = || TextError::Foreign(narinfo.url.clone());
    let name = narinfo.url.strip_prefix("nar/").and_then(NarName::parse);
    let name = name.ok_or_else(foreign)?;
    let hash = narinfo.file_hash.as_ref().and_then(Hash::sha256);
    let agrees = narinfo.compression == Compression::Zstd
        && name.path_hash == narinfo.info.path.hash()
        && name.nar_hash == narinfo.info.nar_hash
        && hash == Some(name.file_hash.0);
    match (agrees, narinfo.file_size) {
        (true, Some(size_bytes)) => Ok(NarFile {
            hash: FileHash(name.file_hash.0),
            size_bytes,
        }),
        _ => Err(TextError::Malformed(
            "its lines disagree on the file".to_owned(),
        )),
    }
}

fn push_grounds(text: &mut String, grounds: &[Ground]) {
    for Ground { upstream, basis } in grounds {
        // A line is a line; no real upstream is called so.
        if upstream.contains(char::is_control) {
            continue;
        }
        _ = match basis {
            Basis::Operator => writeln!(text, "{GROUND}operator {upstream}"),
            Basis::Signature(key) => writeln!(text, "{GROUND}key {key} {upstream}"),
            Basis::ContentAddress => writeln!(text, "{GROUND}content-address {upstream}"),
        };
    }
}

fn ground(line: &str) -> Option<Ground> {
    let (kind, rest) = line.strip_prefix(GROUND)?.split_once(' ')?;
    let (basis, upstream) = match kind {
        "operator" => (Basis::Operator, rest),
        "key" => {
            let (key, upstream) = rest.split_once(' ')?;
            (Basis::Signature(KeyName::new(key).ok()?), upstream)
        }
        "content-address" => (Basis::ContentAddress, rest),
        _ => return None,
    };
    Some(Ground {
        upstream: upstream.to_owned(),
        basis,
    })
}

const GROUND: &str = "X-Muster-Ground: ";
/// What stands for the URL where the NAR is not kept; in the index only.
const NO_URL: &str = "-";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::hash::NarHash;
    use crate::nix::signature::SecretKey;

    const SECRET: &str = "test-1:1FlgeDipndaPd3y6gxxOowecGBiNKZVjRBFQ2+Ok3faXNlsk7twXoE2Nnkww7IzIXZjk8CvLEhbPHSn+ajxdvA==";

    fn record(with_file: bool) -> Record {
        let key = SecretKey::parse(SECRET).unwrap();
        let foreign = Signature::parse(&key.sign("x").to_string().replace("test-1", "other-1"));
        let ground = |upstream: &str, basis| Ground {
            upstream: upstream.to_owned(),
            basis,
        };
        Record {
            info: PathInfo {
                path: "xgd4ijld16zz4n65lm0jzb4cfscm9vwi-input".parse().unwrap(),
                nar_hash: NarHash::of(b"nar"),
                nar_size: 3,
                references: vec!["xgd4ijld16zz4n65lm0jzb4cfscm9vwi-input".parse().unwrap()],
                deriver: None,
                signatures: vec![foreign.unwrap()],
                ca: None,
            },
            grounds: vec![
                ground("ssh-ng://root@b", Basis::Operator),
                ground(
                    "https://cache.example.org",
                    Basis::Signature(KeyName::new("cache.example.org-1").unwrap()),
                ),
                ground("a name with blanks", Basis::ContentAddress),
            ],
            file: with_file.then_some(NarFile {
                hash: FileHash([5; 32]),
                size_bytes: 7,
            }),
        }
    }

    #[test]
    fn a_record_reads_as_it_was_written() {
        let store = StoreDir::default();
        for record in [record(true), record(false)] {
            assert_eq!(read(&of_record(&record, &store), &store), Ok(record));
        }
    }

    #[test]
    fn a_file_counts_by_our_signature_over_its_own_content() {
        let (store, key) = (StoreDir::default(), SecretKey::parse(SECRET).unwrap());
        let keys = [key.public()];
        let record = record(true);
        let mut signed = record.clone();
        let signature = key.sign(&fingerprint::of_path(&signed.info, &store));
        signed.info.signatures.push(signature);
        signed.grounds.clear();
        let text = of_record(&signed, &store);
        let text = with_grounds(text.as_bytes(), &record, &store).unwrap();
        assert_eq!(read_file(&text, &keys, &store), Ok(record.clone()));
        assert_eq!(read_file(&text, &[], &store), Err(TextError::Unsigned));
        let forged = text.replace("NarSize: 3", "NarSize: 4");
        assert_eq!(read_file(&forged, &keys, &store), Err(TextError::Unsigned));
        let unsigned = of_record(&record, &store);
        assert_eq!(
            read_file(&unsigned, &keys, &store),
            Err(TextError::Unsigned)
        );
    }

    #[test]
    fn foreign_and_contradictory_files_are_told_apart() {
        let store = StoreDir::default();
        let text = of_record(&record(true), &store);
        let url = record(true).name().unwrap().url();
        let foreign = text.replace(
            &url,
            "nar/0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877.nar.xz",
        );
        assert!(matches!(read(&foreign, &store), Err(TextError::Foreign(_))));
        for wrong in [
            text.replace("Compression: zstd", "Compression: xz"),
            text.replace("FileSize: 7\n", ""),
            text.replace("StorePath: /nix/store/xgd", "StorePath: /nix/store/1gd"),
            text.replace("FileHash: sha256:", "FileHash: sha256:0"),
            String::new(),
        ] {
            assert!(
                matches!(read(&wrong, &store), Err(TextError::Malformed(_))),
                "{wrong}"
            );
        }
        let other = Record {
            file: None,
            ..record(true)
        };
        assert!(with_grounds(text.as_bytes(), &other, &store).is_err());
        assert!(with_grounds(b"\xff", &record(true), &store).is_err());
    }

    #[test]
    fn a_name_cannot_make_a_line() {
        let store = StoreDir::default();
        let mut record = record(true);
        record.grounds[0].upstream = "a\nX-Muster-Ground: operator b".to_owned();
        let read = read(&of_record(&record, &store), &store).unwrap();
        assert_eq!(read.grounds, record.grounds[1..]);
    }
}
