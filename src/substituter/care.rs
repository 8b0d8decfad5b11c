//! The background care for upstreams: probing the sick, vetting the new, waking after sleep.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tracing::info;

use crate::nix::store_path::StorePathHash;

use super::member::Member;
use super::shared::Shared;
use super::{Substituter, now};

impl Substituter {
    /// Probes sick upstreams and notices when the machine has slept; runs until it is dropped.
    pub async fn care(&self) {
        let mut clock = (now(), SystemTime::now());
        loop {
            tokio::time::sleep(CARE_INTERVAL).await;
            let now = (now(), SystemTime::now());
            let setup = self.shared.setup();
            if has_slept(clock, now) {
                info!("the machine was asleep, connecting anew");
                setup.members.iter().for_each(|m| m.wake(now.0));
            }
            clock = now;
            for member in &setup.members {
                // One that hangs is left to itself; the others, and the clock, are not.
                if let Some(cared) = member.begin_care(now.0) {
                    let shared = Arc::clone(&self.shared);
                    self.shared.tasks.spawn(async move {
                        shared.care_for(&cared, now.0).await;
                    });
                }
            }
        }
    }
}

impl Shared {
    async fn care_for(&self, member: &Member, now: Instant) {
        if member.wants_vetting() {
            let mut nobody = StorePathHash([0; 20]);
            fastrand::fill(&mut nobody.0);
            self.vetting().insert(nobody, member.id);
            member.vet(nobody).await;
            self.vetting().remove(&nobody);
        }
        member.probe(now).await;
    }

    /// Tells whether this is a question of our own that came back.
    pub(super) fn came_back(&self, hash: StorePathHash) -> bool {
        let asked = self.vetting().get(&hash).copied();
        let setup = self.setup();
        if let Some(member) = asked.and_then(|id| setup.member(id)) {
            member.mark_as_ourselves();
        }
        asked.is_some()
    }
}

/// Tells whether the wall clock ran well ahead of the monotonic one, which stops in sleep.
fn has_slept(before: (Instant, SystemTime), now: (Instant, SystemTime)) -> bool {
    let running = now.0.saturating_duration_since(before.0);
    let wall = now.1.duration_since(before.1).unwrap_or_default();
    wall > running + SLEEP_MIN
}

const CARE_INTERVAL: Duration = Duration::from_millis(250);
const SLEEP_MIN: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_of_the_wall_clock_alone_is_sleep() {
        let before = (Instant::now(), SystemTime::now());
        let after = |running, wall| {
            let (running, wall) = (Duration::from_secs(running), Duration::from_secs(wall));
            has_slept(before, (before.0 + running, before.1 + wall))
        };
        assert!(!after(1, 1));
        assert!(!after(60, 62));
        assert!(after(1, 600));
    }
}
