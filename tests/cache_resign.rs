//! Narinfos of the folder signed anew after a change of keys: all of them, none twice, nobody else's.

mod cache;

use std::collections::HashMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cache::*;
use muster::cache::backend::{Backend as _, Record};
use muster::cache::disk::folder::FolderError;
use muster::cache::disk::resign::{Progress, Tally};
use muster::cache::disk::upkeep::Upkeep;
use muster::cache::disk::{DiskCache, text};
use muster::nix::fingerprint;
use muster::nix::narinfo::NarInfo;
use muster::nix::signature::{KeyName, PublicKey, SecretKey, Signature};
use muster::nix::signer::{Need, Signer};
use muster::nix::store_path::StoreDir;

/// More than share one sync.
const PATHS: u64 = 600;

fn new_key() -> SecretKey {
    let seed = zeroize::Zeroizing::new([8; 32]);
    SecretKey::from_seed(KeyName::new("test-muster-2").unwrap(), &seed)
}

fn signer(keys: &[SecretKey]) -> Signer {
    Signer::new(keys.to_vec(), StoreDir::default())
}

fn upkeep(dir: &Path) -> Upkeep {
    Upkeep::exclusive(dir, StoreDir::default()).unwrap()
}

/// A folder that no server uses, with many small entries.
async fn folder(count: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(dir.path(), options(1 << 30));
    let fills = (0..count).map(|number| {
        let (info, nar) = path(number, 10);
        let cache = &cache;
        async move { fill(cache, &info, &nar).await.unwrap() }
    });
    futures_util::future::join_all(fills).await;
    settle(&cache).await;
    cache.stop().await;
    dir
}

/// All narinfos, by their file names.
fn narinfos(dir: &Path) -> HashMap<String, String> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    let named = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().unwrap();
        name.ends_with(".narinfo").then_some((name, entry.path()))
    });
    named
        .map(|(name, path)| (name, fs::read_to_string(path).unwrap()))
        .collect()
}

/// The names of the keys whose signatures verify, of each narinfo the same.
fn all_signed_by(dir: &Path, keys: &[PublicKey]) -> Vec<String> {
    let mut all = narinfos(dir).into_values().map(|text| {
        let info = NarInfo::parse(&text, &StoreDir::default()).unwrap().info;
        let fingerprint = fingerprint::of_path(&info, &StoreDir::default());
        let verify = |s: &&Signature| keys.iter().any(|key| key.verifies(&fingerprint, s));
        let verified = info.signatures.iter().filter(verify);
        let names: Vec<_> = verified.map(|s| s.key_name().as_str().to_owned()).collect();
        assert_eq!(names.len(), info.signatures.len(), "none is wrong: {text}");
        names
    });
    let first = all.next().expect("there are narinfos");
    assert!(all.all(|names| names == first));
    first
}

#[tokio::test]
async fn every_narinfo_is_signed_anew_once_and_nothing_else_changes() {
    let dir = folder(PATHS).await;
    let keys = [key().public(), new_key().public()];
    assert_eq!(all_signed_by(dir.path(), &keys), ["test-muster-1"]);
    // Somebody else's, and something that only has the name of one.
    let foreign = "StorePath: /nix/store/00000000000000000000000000000000-x\nURL: nar/x.nar.xz\n";
    let theirs = dir.path().join(format!("{}.narinfo", "0".repeat(32)));
    fs::write(&theirs, foreign).unwrap();
    let believed = |_: &Record| true;

    // Both keys, as in the days of a rotation; then the new one alone.
    for (keys_now, names) in [
        (
            vec![key(), new_key()],
            &["test-muster-1", "test-muster-2"][..],
        ),
        (vec![new_key()], &["test-muster-2"]),
    ] {
        let mut seen = Vec::new();
        let step = |progress: Progress| seen.push((progress.done, progress.total));
        let tally = upkeep(dir.path()).re_sign(&signer(&keys_now), &[], &believed, step);
        let expected = Tally {
            signed: PATHS,
            foreign: 1,
            ..Tally::default()
        };
        assert_eq!(tally.unwrap(), expected);
        assert!(seen.is_sorted() && seen.len() > 1, "{seen:?}");
        assert_eq!(seen.last(), Some(&(PATHS + 1, PATHS + 1)));
        assert_eq!(fs::read_to_string(&theirs).unwrap(), foreign);
        fs::remove_file(&theirs).unwrap();
        assert_eq!(all_signed_by(dir.path(), &keys), names);
        fs::write(&theirs, foreign).unwrap();
    }
    let again = upkeep(dir.path()).re_sign(&signer(&[new_key()]), &[], &believed, |_| ());
    assert_eq!(again.unwrap().current, PATHS);
    let temp = fs::read_dir(dir.path().join(".muster/tmp")).unwrap();
    assert_eq!(temp.count(), 0);

    // The index lost: the folder is known again by the new key, grounds and all.
    fs::remove_file(dir.path().join(".muster/index.redb")).unwrap();
    fs::remove_file(&theirs).unwrap();
    let mut options = options(1 << 30);
    options.keys = vec![new_key().public()];
    let cache = DiskCache::open(dir.path(), options);
    settle(&cache).await;
    assert_eq!(cache.stats().entries, PATHS);
    let (info, nar) = path(7, 10);
    let record = cache.look_up(info.path.hash()).unwrap();
    assert_eq!(
        (&record.info, record.grounds.as_slice()),
        (&info, &[ground()][..])
    );
    assert_eq!(read(&cache, &record), Some(nar));
}

#[tokio::test]
async fn a_pass_that_dies_leaves_whole_narinfos_and_is_gone_on_with() {
    let dir = folder(PATHS).await;
    let keys = [key().public(), new_key().public()];
    let sign = signer(&[new_key()]);
    let steps = AtomicUsize::new(0);
    let died = catch_unwind(AssertUnwindSafe(|| {
        let step = |_: Progress| {
            assert!(steps.fetch_add(1, Ordering::Relaxed) == 0, "killed");
        };
        upkeep(dir.path()).re_sign(&sign, &[], &|_| true, step)
    }));
    assert!(died.is_err());
    let signed = |key: &SecretKey| {
        let line = format!("Sig: {}:", key.name().as_str());
        let texts = narinfos(dir.path()).into_values();
        texts.filter(|text| text.contains(&line)).count() as u64
    };
    let done = signed(&new_key());
    assert!(done > 0 && done < PATHS, "{done}");
    assert_eq!(
        done + signed(&key()),
        PATHS,
        "each is the old one or the new one"
    );
    for text in narinfos(dir.path()).into_values() {
        assert!(text::read_file(&text, &keys, &StoreDir::default()).is_ok());
    }
    let rest = upkeep(dir.path())
        .re_sign(&sign, &[], &|_| true, |_| ())
        .unwrap();
    assert_eq!((rest.current, rest.signed), (done, PATHS - done));
    assert_eq!(all_signed_by(dir.path(), &keys), ["test-muster-2"]);
}

#[tokio::test]
async fn what_nobody_vouches_for_is_not_signed() {
    let dir = folder(3).await;
    let before = narinfos(dir.path());
    let sign = signer(&[new_key()]);
    let refused = Tally {
        refused: 3,
        ..Tally::default()
    };
    // Trust was withdrawn.
    let tally = upkeep(dir.path()).re_sign(&sign, &[], &|_| false, |_| ());
    assert_eq!(tally.unwrap(), refused);
    // The index is lost, and the key that signed is not known any more.
    fs::remove_file(dir.path().join(".muster/index.redb")).unwrap();
    let tally = upkeep(dir.path()).re_sign(&sign, &[], &|_| true, |_| ());
    assert_eq!(tally.unwrap(), refused);
    assert_eq!(narinfos(dir.path()), before);
    // A text that says more than was signed.
    let (name, text) = before.iter().next().unwrap();
    fs::write(
        dir.path().join(name),
        text.replace("NarSize: ", "NarSize: 1"),
    )
    .unwrap();
    let former = [key().public()];
    let tally = upkeep(dir.path()).re_sign(&sign, &former, &|_| true, |_| ());
    let tally = tally.unwrap();
    assert_eq!((tally.signed, tally.refused), (2, 1));
}

#[tokio::test]
async fn a_folder_in_use_is_left_to_its_server() {
    let dir = tempfile::tempdir().unwrap();
    let _cache = DiskCache::open(dir.path(), options(1 << 20));
    let refused = Upkeep::exclusive(dir.path(), StoreDir::default()).err();
    assert!(
        matches!(refused, Some(FolderError::InUse(_))),
        "{refused:?}"
    );
}

/// Keeps paths one by one; each narinfo is signed by the first key.
async fn keep(cache: &DiskCache, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let (info, nar) = path(number, 10);
        fill(cache, &info, &nar).await.unwrap();
    }
}

fn sign_with(cache: &DiskCache, keys: &[SecretKey], believed: bool) {
    let (signer, public) = (signer(keys), keys.iter().map(SecretKey::public).collect());
    let sign = move |record: &Record| {
        believed.then(|| match signer.need(&record.info) {
            Need::Signatures(made) => made,
            _ => panic!("a record has no signature of ours"),
        })
    };
    cache.sign_with(public, trust(believed), Arc::new(sign));
}

fn trust(believed: bool) -> String {
    format!("believed: {believed}")
}

async fn all_become_signed_by(dir: &Path, key: &SecretKey) {
    let line = format!("Sig: {}:", key.name().as_str());
    let is_right = |text: String| text.matches("Sig:").count() == 1 && text.contains(&line);
    wait("signing", || narinfos(dir).into_values().all(is_right)).await;
    let signed_by = dir.join(".muster/signed-by");
    let mark = format!("{}\ntrust {}\n", key.public(), trust(true));
    let noted = || fs::read_to_string(&signed_by).is_ok_and(|t| t == mark);
    wait("note of it", noted).await;
}

#[tokio::test]
async fn a_running_cache_signs_anew_what_it_has_and_what_is_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(dir.path(), options(1 << 30));
    sign_with(&cache, &[key()], true);
    keep(&cache, 0..150).await;
    let (info, nar) = path(999, 10);
    let mut under_way = cache.begin(info.nar_size).unwrap();
    let file = zstd::encode_all(nar.as_slice(), 1).unwrap();
    under_way.write(&file).unwrap();
    // A reload.
    sign_with(&cache, &[new_key()], true);
    all_become_signed_by(dir.path(), &new_key()).await;
    // What the fill's client began with is the old key's.
    let text = |file: &_| narinfo(&info, file);
    under_way
        .commit(info.clone(), vec![ground()], text)
        .await
        .unwrap();
    let expected = ["test-muster-2"];
    assert_eq!(all_signed_by(dir.path(), &[new_key().public()]), expected);
    assert_eq!(narinfos(dir.path()).len(), 151);
    let record = cache.look_up(info.path.hash()).unwrap();
    assert_eq!(read(&cache, &record), Some(nar));
    cache.stop().await;

    // The next start is with other keys again: that is seen without a reload, too.
    let cache = DiskCache::open(dir.path(), options(1 << 30));
    sign_with(&cache, &[key()], true);
    all_become_signed_by(dir.path(), &key()).await;
    assert_eq!(folder_is_whole(dir.path()), 151);
    let record = cache.look_up(info.path.hash()).unwrap();
    assert!(record.info.signatures.is_empty() && record.grounds == [ground()]);
}

#[tokio::test]
async fn what_is_not_believed_any_more_loses_its_signatures_until_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(dir.path(), options(1 << 30));
    sign_with(&cache, &[key()], true);
    keep(&cache, 0..150).await;
    all_become_signed_by(dir.path(), &key()).await;
    let before = narinfos(dir.path());
    let (info, nar) = path(999, 10);
    let mut under_way = cache.begin(info.nar_size).unwrap();
    let file = zstd::encode_all(nar.as_slice(), 1).unwrap();
    under_way.write(&file).unwrap();

    // The keys are the same, the trust is not.
    sign_with(&cache, &[key()], false);
    let unsigned = || {
        narinfos(dir.path())
            .into_values()
            .all(|text| !text.contains("Sig:"))
    };
    wait("loss of the signatures", unsigned).await;
    let text = |file: &_| narinfo(&info, file);
    under_way
        .commit(info.clone(), vec![ground()], text)
        .await
        .unwrap();
    assert!(unsigned() && narinfos(dir.path()).len() == 151);
    assert!(!dir.path().join(".muster/signed-by").exists());
    cache.stop().await;

    // Nothing else is lost, over a restart too.
    let cache = DiskCache::open(dir.path(), options(1 << 30));
    sign_with(&cache, &[key()], false);
    settle(&cache).await;
    assert_eq!(cache.stats().entries, 151);
    assert!(unsigned());
    let record = cache.look_up(info.path.hash()).unwrap();
    assert_eq!(record.grounds, [ground()]);
    assert_eq!(read(&cache, &record), Some(nar));
    sign_with(&cache, &[key()], true);
    all_become_signed_by(dir.path(), &key()).await;
    let after = narinfos(dir.path());
    assert!(before.iter().all(|(name, text)| after[name] == *text));
}
