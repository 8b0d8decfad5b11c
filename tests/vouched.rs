//! Sources that check their NARs themselves: they are taken at their word as long as they give the whole, and
//! nothing that rests on half a word is ever given whole.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use muster::codec::compression::Encoding;
use muster::nix::path_info::{PathInfo, Trust};
use muster::substituter::Substituter;
use support::*;

const BYTES: usize = 6 << 20;
const BREAK: usize = (3 << 20) + 12_345;

/// One path at several holders, the first of which gives the first bytes.
struct Holders {
    info: PathInfo,
    nar: Bytes,
    all: Vec<Arc<Scripted>>,
}

impl Holders {
    fn new(scripts: &[NarScript]) -> Self {
        let (info, nar) = path(1, BYTES, &[]);
        let all = scripts.iter().enumerate().map(|(number, script)| {
            let holder = Scripted::new(&format!("holder-{number}"));
            holder.add(&info, &nar);
            *holder.nar_script.lock().unwrap() = script.clone();
            holder
        });
        let all: Vec<_> = all.collect();
        all[0].vouches.store(true, Ordering::Relaxed);
        Self { info, nar, all }
    }

    /// The same where the first one's chunks are each right when they come, as it says.
    fn proven(scripts: &[NarScript]) -> Self {
        let holders = Self::new(scripts);
        holders.all[0].proves.store(true, Ordering::Relaxed);
        holders
    }

    /// Fetches the NAR as it is and as zstd, each from a substituter of its own; `check` judges it decoded.
    async fn fetched(&self, check: impl Fn(&Substituter, &Answer, Option<Vec<u8>>)) {
        for encoding in [Encoding::None, Encoding::Zstd] {
            let members = |upstreams| setup(upstreams, &Trust::Operator, encoding);
            let substituter = new_substituter(options(), members(&self.all[..1]));
            let hash = self.info.path.hash();
            assert!(substituter.narinfo(hash).await.is_some());
            substituter.replace(members(&self.all));
            let served = serve(substituter.clone()).await;
            let narinfo = get(served.address, &format!("/{hash}.narinfo")).await;
            let answer = get(served.address, &nar_target(&narinfo)).await;
            let nar = match encoding {
                Encoding::Zstd => zstd::decode_all(&answer.body[..]).ok(),
                _ => (answer.body.len() == BYTES).then(|| answer.body.clone()),
            };
            check(&substituter, &answer, nar);
        }
    }

    async fn are_cut(&self) {
        self.fetched(|_, answer, nar| {
            assert_eq!(answer.status, 200);
            assert!(answer.cut && nar.is_none(), "{} bytes", answer.body.len());
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_source_has_checked_is_not_hashed_again() {
    let holders = Holders::new(&[NarScript::FlipLast]);
    let mut other = holders.nar.to_vec();
    *other.last_mut().unwrap() ^= 1;
    holders
        .fetched(|_, answer, nar| {
            assert!(!answer.cut);
            // Its word is all there is: hashed, it would have been cut.
            assert!(nar.is_some_and(|nar| nar == other));
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_goes_on_where_a_checked_one_broke() {
    for (proves, vouches) in [(false, false), (false, true), (true, false), (true, true)] {
        let of = if proves {
            Holders::proven
        } else {
            Holders::new
        };
        let holders = of(&[NarScript::BreakAt(BREAK), NarScript::Whole]);
        holders.all[1].vouches.store(vouches, Ordering::Relaxed);
        holders
            .fetched(|substituter, answer, nar| {
                assert!(!answer.cut);
                assert!(nar.is_some_and(|nar| nar == holders.nar));
                assert_eq!(substituter.counters().nar_resumed.value(), 1);
            })
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_lies_about_what_was_given_is_passed_over() {
    let lie = NarScript::FlipFirstBreakAt(BYTES);
    for of in [Holders::new, Holders::proven] {
        let holders = of(&[NarScript::BreakAt(BREAK), lie.clone(), NarScript::Whole]);
        holders
            .fetched(|_, answer, nar| {
                assert!(!answer.cut);
                assert!(nar.is_some_and(|nar| nar == holders.nar));
            })
            .await;
        of(&[NarScript::BreakAt(BREAK), lie.clone()])
            .are_cut()
            .await;
    }
}

/// Nobody can tell any more whether what the client has is right, so nobody goes on from there.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_to_while_it_was_read_is_never_made_whole() {
    let scripts = [NarScript::WrittenAt(BREAK), NarScript::Whole];
    Holders::proven(&scripts).are_cut().await;
    // One that is hashed, or summed up, can be gone on from as ever.
    Holders::new(&scripts)
        .fetched(|_, answer, nar| assert!(!answer.cut && nar.is_some_and(|nar| nar.len() == BYTES)))
        .await;
}

/// Of a small one nothing was given yet: it is read from the next.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_one_that_was_written_to_is_read_from_another() {
    let (info, nar) = path(1, 100_000, &[]);
    let holders: Vec<_> = ["one", "two"].map(Scripted::new).into();
    holders[0].proves.store(true, Ordering::Relaxed);
    *holders[0].nar_script.lock().unwrap() = NarScript::WrittenAt(70_000);
    for holder in &holders {
        holder.add(&info, &nar);
    }
    let members = |upstreams| setup(upstreams, &Trust::Operator, Encoding::None);
    let substituter = new_substituter(options(), members(&holders[..1]));
    assert!(substituter.narinfo(info.path.hash()).await.is_some());
    substituter.replace(members(&holders));
    let served = serve(substituter).await;
    let narinfo = get(served.address, &format!("/{}.narinfo", info.path.hash())).await;
    let answer = get(served.address, &nar_target(&narinfo)).await;
    assert!(answer.status == 200 && !answer.cut && answer.body == nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_lies_about_the_rest_is_never_given_whole() {
    for (proves, vouches) in [(false, false), (false, true), (true, false), (true, true)] {
        let of = if proves {
            Holders::proven
        } else {
            Holders::new
        };
        let holders = of(&[NarScript::BreakAt(BREAK), NarScript::FlipLast]);
        holders.all[1].vouches.store(vouches, Ordering::Relaxed);
        holders.are_cut().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_checked_one_gave_wrongly_before_it_broke_is_never_made_whole() {
    let wrong = NarScript::FlipFirstBreakAt(BREAK);
    Holders::new(&[wrong, NarScript::Whole]).are_cut().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_breaks_before_its_first_byte_leaves_no_trace() {
    let holders = Holders::new(&[NarScript::BreakAt(0), NarScript::FlipLast]);
    holders.are_cut().await;
    let holders = Holders::new(&[NarScript::BreakAt(0), NarScript::Whole]);
    holders
        .fetched(|_, answer, nar| assert!(!answer.cut && nar.is_some_and(|nar| nar == holders.nar)))
        .await;
}
