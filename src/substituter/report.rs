//! The state of a substituter as JSON, for `/healthz` and for people who ask.

use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::{Value, json};

use crate::upstream::Link;

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
        json!({
            "status": if sick { "degraded" } else { "ok" },
            "version": env!("CARGO_PKG_VERSION"),
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
            },
        })
    }
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
    json!({
        "uri": member.upstream.name(),
        "state": state,
        "peer": peer,
        "error": error,
        "trusted": member.is_trusted(),
        "found": member.found.load(Ordering::Relaxed),
        "refused": member.refused.load(Ordering::Relaxed),
    })
}
