//! The state of a substituter as JSON: `/healthz`, and what `muster status --json` prints.
//!
//! The form is stable: keys are added, never renamed, removed or given another meaning. Times are in
//! milliseconds, sizes in bytes, counts since start; `null` stands for "not known" or "none".
//!
//! ```text
//! status      "ok", or "degraded" while an upstream is sick or the cache cannot be written
//! version     of the program
//! uptime-ms   since start
//! upstreams   one object each, in the order of the configuration:
//!   uri             its name
//!   state           "connecting", "well" or "sick"
//!   trusted         whether the operator vouches for it
//!   peer            what answers there, "Nix 2.18.1, protocol 1.35"
//!   error           why it is not connected
//!   retry-in-ms     until it is connected to anew
//!   last-error      { error, age-ms }: the last of any question or attempt, also if all is well since
//!   latency-ms      median of its latest 64 look-ups
//!   asked  hits     look-ups by clients that it was asked, and those it had the path of
//!   found           path infos found there, fetched ahead among them
//!   paths           all that it has, where it says so by itself (a muster on a builder)
//!   refused         answers that were not believed
//!   nars  nar-bytes NARs begun there, and their bytes that were read
//! narinfo     requests, memory-hits, found, prefetched, absent, absent-without-full-knowledge (404s
//!             said while somebody could not be asked), divergent (paths), in-memory
//! nar         requests, bytes (before compression), absent, resumed, cut, corrupt, passed (as the files that
//!             their upstreams keep), encoded (compressed here)
//! cache       what is kept on disk, null where nothing is: entries, bytes (reserved by running fills:
//!             bytes-reserved), bytes-max, look-ups (paths known without their NAR), hits and misses (NAR
//!             requests that were and were not answered from it), recalled (narinfos that came from it),
//!             fills, evictions, corrupt, degraded (why nothing can be written)
//! divergent   the first 100 paths of which upstreams have different NARs:
//!             { path, served (NAR hash), upstream, nar-hash }
//! ```

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cache::backend::Stats;
use crate::upstream::Link;

use super::counters::Counters;
use super::health::Standing;
use super::member::Member;
use super::{Substituter, now};

impl Substituter {
    /// Returns upstreams and figures. `status` is `ok`, or `degraded` while an upstream is sick.
    pub fn report(&self) -> Value {
        let now = now();
        let setup = self.setup();
        let upstreams: Vec<_> = setup.members.iter().map(|m| member(m, now)).collect();
        let sick = setup
            .members
            .iter()
            .any(|m| m.standing(now) == Standing::Sick);
        let counters = self.counters();
        let stats = self.shared.kept.as_ref().map(|kept| kept.backend.stats());
        let degraded = stats.as_ref().is_some_and(|stats| stats.degraded.is_some());
        json!({
            "status": if sick || degraded { "degraded" } else { "ok" },
            "version": env!("CARGO_PKG_VERSION"),
            "uptime-ms": milliseconds(counters.started.elapsed()),
            "upstreams": upstreams,
            "narinfo": {
                "requests": counters.narinfo_requests.value(),
                "memory-hits": counters.narinfo_memory_hits.value(),
                "found": counters.narinfo_found.value(),
                "prefetched": counters.narinfo_prefetched.value(),
                "absent": counters.narinfo_absent.value(),
                "absent-without-full-knowledge": counters.narinfo_absent_unsure.value(),
                "divergent": self.divergent_paths(),
                "in-memory": self.narinfos_in_memory(),
            },
            "nar": {
                "requests": counters.nar_requests.value(),
                "bytes": counters.nar_bytes.value(),
                "ahead": counters.nar_ahead.value(),
                "ahead-claimed": counters.nar_ahead_claimed.value(),
                "ahead-dropped": counters.nar_ahead_dropped.value(),
                "absent": counters.nar_absent.value(),
                "resumed": counters.nar_resumed.value(),
                "cut": counters.nar_cut.value(),
                "corrupt": counters.nar_corrupt.value(),
                "passed": counters.nar_passed.value(),
                "encoded": counters.nar_encoded.value(),
            },
            "cache": stats.map(|stats| cache(&stats, counters)),
            "divergent": self.divergences(),
        })
    }

    fn divergences(&self) -> Vec<Value> {
        let setup = self.setup();
        let store_dir = &setup.publisher.store_dir;
        let divergent = &self.shared.divergent;
        let divergent = divergent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = divergent.values().collect();
        all.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let first = all.into_iter().take(DIVERGENT_SHOWN_MAX);
        first
            .map(|it| {
                json!({
                    "path": store_dir.join(&it.path),
                    "served": it.served.to_string(),
                    "upstream": it.upstream,
                    "nar-hash": it.other.to_string(),
                })
            })
            .collect()
    }
}

fn cache(stats: &Stats, counters: &Counters) -> Value {
    let (requests, hits) = (counters.nar_requests.value(), counters.nar_kept.value());
    json!({
        "entries": stats.entries,
        "bytes": stats.bytes,
        "bytes-reserved": stats.bytes_reserved,
        "bytes-max": stats.bytes_max,
        "look-ups": stats.look_ups,
        "hits": hits,
        "misses": requests.saturating_sub(hits),
        "recalled": counters.narinfo_recalled.value(),
        "fills": stats.fills,
        "evictions": stats.evictions,
        "corrupt": stats.corrupt,
        "degraded": stats.degraded,
    })
}

fn member(member: &Member, now: Instant) -> Value {
    let state = match member.standing(now) {
        Standing::Connecting { .. } => "connecting",
        Standing::Well => "well",
        Standing::Sick => "sick",
    };
    let (peer, error) = match member.link() {
        Link::Up { peer } => (Some(peer.to_string()), None),
        Link::Down { error, .. } => (None, Some(error.to_string())),
        Link::Connecting { .. } => (None, None),
    };
    let figures = &member.figures;
    let last_error = figures.last_error().map(|last| {
        let age = now.saturating_duration_since(last.at);
        json!({ "error": &*last.text, "age-ms": milliseconds(age) })
    });
    json!({
        "uri": member.upstream.name(),
        "state": state,
        "peer": peer,
        "error": error,
        "retry-in-ms": figures.retry_in(now).map(milliseconds),
        "last-error": last_error,
        "latency-ms": figures.latency().map(|latency| latency.as_secs_f64() * 1e3),
        "trusted": member.is_trusted(),
        "asked": figures.asked.load(Ordering::Relaxed),
        "hits": figures.hits.load(Ordering::Relaxed),
        "found": member.found.load(Ordering::Relaxed),
        "paths": member.upstream.paths_known(),
        "refused": member.refused.load(Ordering::Relaxed),
        "nars": figures.nars.load(Ordering::Relaxed),
        "nar-bytes": figures.bytes(),
    })
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Enough to see a pattern; the log names each.
const DIVERGENT_SHOWN_MAX: usize = 100;
