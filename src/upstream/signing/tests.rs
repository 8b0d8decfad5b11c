//! Scripted daemons that die, refuse and lose paths; real ones are in `tests/sign_all.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use zeroize::Zeroizing;

use super::*;
use crate::nix::signature::{KeyName, SecretKey};
use crate::nix::store_path::StoreDir;
use crate::upstream::said::{LAST, error, numbers, text};
use crate::upstream::wire::{Guard, Wire};

/// A store whose daemon of protocol 1.34 does what a test says.
#[derive(Default)]
struct Store {
    /// Paths that are there, and the signatures that they got.
    paths: Mutex<BTreeMap<String, Vec<String>>>,
    /// Paths that are collected between their info and their signature: the daemon then dies.
    collected: Mutex<BTreeSet<String>>,
    /// Paths that the daemon dies on whenever they are to be signed.
    deadly: BTreeSet<String>,
    /// What it says to every signature.
    refusal: Option<&'static str>,
    /// What it says to signatures of this path.
    locked: Option<String>,
    /// Signatures that it takes in one session before it dies.
    session_signatures: Option<usize>,
    sessions: Mutex<usize>,
}

#[async_trait]
impl Dial for Arc<Store> {
    async fn dial(&self, _purpose: Purpose) -> Result<Wire, Error> {
        *self.sessions.lock().unwrap() += 1;
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let store = Arc::clone(self);
        tokio::spawn(async move { store.serve(theirs).await });
        let (reader, writer) = tokio::io::split(ours);
        Ok(Wire {
            reader: Box::new(reader),
            writer: Box::new(writer),
            guard: Guard::default(),
        })
    }
}

impl Store {
    fn with(paths: usize) -> Self {
        let paths = (0..paths).map(|place| (numbered(place), Vec::new()));
        Self {
            paths: Mutex::new(paths.collect()),
            ..Self::default()
        }
    }

    fn signed(&self) -> usize {
        let paths = self.paths.lock().unwrap();
        paths
            .values()
            .filter(|signatures| !signatures.is_empty())
            .count()
    }

    /// Answers until the client leaves, or until it "dies": `None`.
    async fn serve(&self, mut stream: DuplexStream) -> Option<()> {
        for _ in 0..2 {
            stream.read_u64_le().await.ok()?;
        }
        say(&mut stream, &numbers(&[0x6478_696f, 0x122])).await?;
        for _ in 0..2 {
            stream.read_u64_le().await.ok()?;
        }
        say(&mut stream, &[text("2.8.0"), numbers(&[LAST])].concat()).await?;
        let mut taken = 0;
        loop {
            let answer = match stream.read_u64_le().await.ok()? {
                23 => self.all_paths(),
                26 => self.path_info(&read_text(&mut stream).await?),
                37 => {
                    let path = read_text(&mut stream).await?;
                    let mut signatures = Vec::new();
                    for _ in 0..stream.read_u64_le().await.ok()? {
                        signatures.push(read_text(&mut stream).await?);
                    }
                    taken += signatures.len();
                    if self.session_signatures.is_some_and(|max| taken > max) {
                        return None;
                    }
                    self.add(&path, signatures)?
                }
                other => panic!("operation {other}"),
            };
            say(&mut stream, &answer).await?;
        }
    }

    fn all_paths(&self) -> Vec<u8> {
        let paths = self.paths.lock().unwrap();
        let head = numbers(&[LAST, paths.len() as u64]);
        let paths = paths.keys().map(|path| text(path));
        [head, paths.collect::<Vec<_>>().concat()].concat()
    }

    fn path_info(&self, path: &str) -> Vec<u8> {
        let paths = self.paths.lock().unwrap();
        let Some(signatures) = paths.get(path) else {
            return numbers(&[LAST, 0]);
        };
        let list = signatures.iter().map(|signature| text(signature));
        let list = list.collect::<Vec<_>>().concat();
        [
            numbers(&[LAST, 1]),
            text(""),
            text(&"0".repeat(64)),
            numbers(&[0, 0, 120, 0, signatures.len() as u64]),
            list,
            text(""),
        ]
        .concat()
    }

    /// `None`: the daemon dies, as the real one does for a path that is not there.
    fn add(&self, path: &str, signatures: Vec<String>) -> Option<Vec<u8>> {
        let mut paths = self.paths.lock().unwrap();
        if let Some(words) = self.refusal {
            return Some(error(words));
        }
        if self.locked.as_deref() == Some(path) {
            return Some(error(&format!("path '{path}' is locked")));
        }
        if !signatures.is_empty() {
            if self.collected.lock().unwrap().remove(path) {
                paths.remove(path);
            }
            if self.deadly.contains(path) {
                return None;
            }
        }
        paths.get_mut(path)?.extend(signatures);
        Some(numbers(&[LAST, 1]))
    }
}

async fn say(stream: &mut DuplexStream, bytes: &[u8]) -> Option<()> {
    stream.write_all(bytes).await.ok()
}

async fn read_text(stream: &mut DuplexStream) -> Option<String> {
    let len = usize::try_from(stream.read_u64_le().await.ok()?).unwrap();
    let mut bytes = vec![0; len.next_multiple_of(8)];
    stream.read_exact(&mut bytes).await.ok()?;
    bytes.truncate(len);
    Some(String::from_utf8(bytes).unwrap())
}

fn numbered(place: usize) -> String {
    format!("/nix/store/{place:032}-x")
}

fn signer() -> Arc<Signer> {
    let key = SecretKey::from_seed(KeyName::new("k-1").unwrap(), &Zeroizing::new([1; 32]));
    Arc::new(Signer::new(vec![key], StoreDir::default()))
}

fn options() -> SigningOptions {
    SigningOptions {
        retry_after: vec![Duration::from_millis(1); 3],
        ..SigningOptions::default()
    }
}

async fn open(store: &Arc<Store>, mode: Mode, tally: &Arc<Tally>) -> Result<Signing, SigningError> {
    let dial: Arc<dyn Dial> = Arc::new(Arc::clone(store));
    Signing::open(dial, signer(), mode, options(), Arc::clone(tally)).await
}

async fn sign(store: &Arc<Store>, tally: &Arc<Tally>) -> Result<(), SigningError> {
    let (_keep, stop) = watch::channel(false);
    let signing = open(store, Mode::Sign, tally).await?;
    let bound = Duration::from_secs(30);
    timeout(bound, signing.run(stop)).await.expect("it ends")
}

#[tokio::test]
async fn paths_that_are_collected_in_between_cost_a_session_and_nothing_else() {
    let store = Arc::new(Store {
        collected: Mutex::new([5, 700, 701, 1900].map(numbered).into()),
        ..Store::with(2000)
    });
    let tally = Arc::default();
    sign(&store, &tally).await.unwrap();
    let counts = tally.counts();
    assert_eq!((counts.signed, counts.gone), (1996, 4), "{counts:?}");
    assert_eq!((counts.failed, counts.signed_already), (0, 0));
    assert_eq!(store.signed(), 1996);
    let sessions = *store.sessions.lock().unwrap();
    assert!((2..=5).contains(&sessions), "{sessions} sessions");
}

#[tokio::test]
async fn a_path_that_kills_the_daemon_each_time_is_found_and_left_out() {
    let store = Arc::new(Store {
        deadly: [numbered(333), numbered(1500)].into(),
        ..Store::with(2000)
    });
    let tally = Arc::default();
    sign(&store, &tally).await.unwrap();
    let counts = tally.counts();
    assert_eq!((counts.signed, counts.failed), (1998, 2), "{counts:?}");
    assert_eq!(store.signed(), 1998);
    let failures = tally.failures();
    assert_eq!(failures.len(), 1);
    assert!(failures[0].reason.contains("ends the session"));
    let mut culprits: Vec<_> = failures[0]
        .examples
        .iter()
        .map(ToString::to_string)
        .collect();
    culprits.sort();
    assert_eq!(culprits.len(), 2);
    assert!(numbered(333).ends_with(&culprits[0]) && numbered(1500).ends_with(&culprits[1]));
}

#[tokio::test]
async fn sessions_that_end_early_are_gone_on_with() {
    let store = Arc::new(Store {
        session_signatures: Some(300),
        ..Store::with(1000)
    });
    let tally = Arc::default();
    sign(&store, &tally).await.unwrap();
    assert_eq!(tally.counts().signed, 1000);
    assert_eq!(store.signed(), 1000);
}

#[tokio::test]
async fn a_daemon_that_always_dies_is_given_up() {
    let store = Arc::new(Store {
        session_signatures: Some(0),
        ..Store::with(1000)
    });
    let tally = Arc::default();
    let error = sign(&store, &tally).await.unwrap_err();
    assert!(matches!(error, SigningError::Barren { .. }), "{error}");
    assert_eq!(store.signed(), 0);
}

#[tokio::test]
async fn a_refusal_is_told_before_anything_is_signed() {
    let store = Arc::new(Store {
        refusal: Some("you are not privileged to add signatures"),
        ..Store::with(10)
    });
    let tally = Arc::default();
    let refused = open(&store, Mode::Sign, &tally).await.err().unwrap();
    assert!(matches!(&refused, SigningError::Refused(words) if words.contains("privileged")));
    // Who only counts needs no permission.
    let (_keep, stop) = watch::channel(false);
    let counting = open(&store, Mode::Count, &tally).await.unwrap();
    counting.run(stop).await.unwrap();
    assert_eq!(tally.counts().signed, 10);
    assert_eq!(store.signed(), 0);
}

#[tokio::test]
async fn an_error_fails_its_own_path_alone() {
    let store = Arc::new(Store {
        locked: Some(numbered(7)),
        ..Store::with(100)
    });
    let tally = Arc::default();
    sign(&store, &tally).await.unwrap();
    assert_eq!((tally.counts().signed, tally.counts().failed), (99, 1));
    let reason = &tally.failures()[0].reason;
    assert_eq!(reason, "the store answered: path '…' is locked");
    assert_eq!(*store.sessions.lock().unwrap(), 1);
}

#[tokio::test]
async fn told_to_stop_it_finishes_what_is_under_way() {
    let store = Arc::new(Store::with(20_000));
    let tally = Arc::default();
    let signing = open(&store, Mode::Sign, &tally).await.unwrap();
    let (tell, stop) = watch::channel(false);
    let running = tokio::spawn(signing.run(stop));
    while tally.counts().signed == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    tell.send_replace(true);
    running.await.unwrap().unwrap();
    let counts = tally.counts();
    assert!(counts.signed < 20_000, "{counts:?}");
    // Nothing is under way any more that is not counted.
    assert_eq!(store.signed() as u64, counts.signed);
}

#[tokio::test]
async fn an_empty_store_is_done_at_once() {
    let tally = Arc::default();
    sign(&Arc::new(Store::default()), &tally).await.unwrap();
    assert_eq!(tally.counts().settled(), 0);
}
