//! The order in which the cache on disk syncs, names and removes its files, as the kernel was asked: what a power
//! cut leaves follows from it, and nothing else can be seen of that.

mod cache;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use muster::cache::backend::Backend as _;
use muster::cache::disk::DiskCache;

use cache::{fill, options, path, settle, wait};

/// Each of them is half of what fits, so that the third makes the first go.
const FILLED: usize = 500_000;
const BYTES_MAX: u64 = 1_100_000;
const FILLS: u64 = 3;

const CALLS: &str = "trace=fsync,fdatasync,syncfs,rename,renameat,renameat2,unlink,unlinkat";

/// Fills until something is evicted; run by the test below.
#[test]
#[ignore = "the test of the order runs and watches it"]
fn a_process_that_is_watched() {
    let dir = PathBuf::from(std::env::var_os("MUSTER_TEST_CACHE").expect("run by its test"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let cache = DiskCache::open(&dir, options(BYTES_MAX));
        for number in 0..FILLS {
            let (info, nar) = path(number, FILLED);
            fill(&cache, &info, &nar).await.unwrap();
        }
        wait("eviction", || cache.stats().evictions == 1).await;
        settle(&cache).await;
        cache.stop().await;
    });
}

#[test]
fn files_are_synced_before_they_are_named_and_unnamed_before_they_are_removed() {
    let place = tempfile::tempdir().unwrap();
    let (dir, trace) = (place.path().join("cache"), place.path().join("trace"));
    let mut strace = Command::new("strace");
    // With the paths of descriptors, and those of several threads in one order.
    strace.args(["-f", "-y", "-e", CALLS, "-o"]).arg(&trace);
    strace.arg(std::env::current_exe().unwrap());
    strace.args(["--exact", "a_process_that_is_watched", "--ignored"]);
    strace.env("MUSTER_TEST_CACHE", &dir);
    let output = strace.stdout(Stdio::piped()).output();
    let output = output.expect("strace is needed for this test");
    assert!(output.status.success(), "{output:?}");
    let text = fs::read_to_string(&trace).unwrap();
    let calls = Calls::parse(&text);
    assert_eq!(calls.named(".nar.zst").len() as u64, FILLS, "{text}");
    assert_eq!(calls.named(".narinfo").len() as u64, FILLS, "{text}");
    for nar in calls.named(".nar.zst") {
        calls.are_in_order_of_commit(nar, &dir, &text);
    }
    let removed = calls.removed(&dir.join("nar"));
    assert_eq!(removed.len(), 1, "{text}");
    for nar in removed {
        calls.are_in_order_of_removal(nar, &dir, &text);
    }
}

/// One call to the kernel: the lines at which it began and was answered.
struct Call {
    name: String,
    /// Paths, its own and those of its descriptors.
    paths: Vec<PathBuf>,
    begun: usize,
    ended: usize,
}

/// All that went well, in the order in which they began.
struct Calls(Vec<Call>);

impl Calls {
    fn parse(text: &str) -> Self {
        let mut calls: Vec<Call> = Vec::new();
        // Calls of threads that are not answered yet, by thread.
        let mut open = std::collections::HashMap::new();
        for (number, line) in text.lines().enumerate() {
            let (thread, line) = line.split_once(' ').expect("a thread and its call");
            let line = line.trim_start();
            if line.starts_with("<... ") {
                let place = open.remove(thread).expect("it was begun");
                let call: &mut Call = &mut calls[place];
                call.ended = if went_well(line) { number } else { usize::MAX };
            } else if let Some((name, arguments)) = line.split_once('(') {
                let mut ended = usize::MAX;
                if line.ends_with("<unfinished ...>") {
                    open.insert(thread, calls.len());
                } else if went_well(line) {
                    ended = number;
                }
                calls.push(Call {
                    name: name.to_owned(),
                    paths: paths(arguments),
                    begun: number,
                    ended,
                });
            }
        }
        calls.retain(|call| call.ended != usize::MAX);
        Self(calls)
    }

    /// Renames to names that end so.
    fn named(&self, end: &str) -> Vec<&Call> {
        let found = self.0.iter().filter(|call| {
            let to = call.paths.last();
            call.name.starts_with("rename")
                && to.is_some_and(|to| to.to_string_lossy().ends_with(end))
        });
        found.collect()
    }

    /// Removals of files in this very folder.
    fn removed(&self, folder: &Path) -> Vec<&Call> {
        let found = self.0.iter().filter(|call| {
            let parent = call.paths.last().and_then(|path| path.parent());
            call.name.starts_with("unlink") && parent == Some(folder)
        });
        found.collect()
    }

    /// Whether a file or folder was synced, after one call was answered and before another began.
    fn synced(&self, path: &Path, after: usize, before: usize) -> bool {
        self.0.iter().any(|call| {
            let is_it = call.name == "syncfs" || call.paths.iter().any(|it| it == path);
            call.name.contains("sync") && is_it && call.begun > after && call.ended < before
        })
    }

    /// narinfos into temp files -> sync all -> rename NARs -> sync -> rename narinfos -> sync
    fn are_in_order_of_commit(&self, nar: &Call, dir: &Path, text: &str) {
        let [from, to] = &nar.paths[..] else {
            panic!("two names: {:?}", nar.paths);
        };
        assert!(self.synced(from, 0, nar.begun), "{from:?}\n{text}");
        let name = to.file_name().unwrap().to_string_lossy();
        let (hash, _) = name.split_once('-').expect("the hash of its path");
        let narinfos = self.named(&format!("{hash}.narinfo"));
        let [narinfo] = narinfos[..] else {
            panic!("one narinfo of {hash}\n{text}");
        };
        let text_from = &narinfo.paths[0];
        assert!(
            self.synced(text_from, 0, narinfo.begun),
            "{text_from:?}\n{text}"
        );
        let named = self.synced(&dir.join("nar"), nar.ended, narinfo.begun);
        assert!(named, "the NAR's name before {hash}.narinfo\n{text}");
        assert!(
            self.synced(dir, narinfo.ended, usize::MAX),
            "{hash}\n{text}"
        );
    }

    /// narinfo -> sync -> NAR
    fn are_in_order_of_removal(&self, nar: &Call, dir: &Path, text: &str) {
        let name = nar.paths[0].file_name().unwrap().to_string_lossy();
        let (hash, _) = name.split_once('-').expect("the hash of its path");
        let narinfo = dir.join(format!("{hash}.narinfo"));
        let narinfos = self.removed(dir);
        let found = narinfos.iter().find(|call| call.paths[0] == narinfo);
        let narinfo = found.unwrap_or_else(|| panic!("{hash}.narinfo goes\n{text}"));
        let gone = self.synced(dir, narinfo.ended, nar.begun);
        assert!(gone, "{hash}.narinfo before its NAR\n{text}");
    }
}

fn went_well(line: &str) -> bool {
    line.trim_end().ends_with("= 0")
}

/// The paths among arguments: `"/a"` of a name, `5</a>` of a descriptor.
fn paths(arguments: &str) -> Vec<PathBuf> {
    let parts = arguments.split(['"', '<', '>']);
    let paths = parts.filter(|part| part.starts_with('/'));
    paths.map(PathBuf::from).collect()
}
