//! Which of the paths that clients asked about belong to one fetch, and in which order they are wanted.
//! Pure decisions; [`super::ahead`] acts on them.
//!
//! A client that fetches has asked for the narinfo of each path that it lacks, so what is connected by
//! references with the NAR that it begins with is what it will want. Nix takes what refers to nothing
//! first, and among equals goes by name (`SubstitutionGoal::key`, `Worker::run`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::nix::path_info::PathInfo;
use crate::nix::store_path::StorePathHash;

/// Returns those that are connected with `first` and are not it, in the order a client wants them.
pub(super) fn wanted(
    first: StorePathHash,
    asked: &HashMap<StorePathHash, Arc<PathInfo>>,
) -> Vec<Arc<PathInfo>> {
    let connected = connected(first, asked);
    let heights = heights(&connected, asked);
    let mut wanted: Vec<_> = connected
        .iter()
        .filter(|hash| **hash != first)
        .filter_map(|hash| asked.get(hash))
        .collect();
    let height = |info: &PathInfo| heights.get(&info.path.hash()).copied().unwrap_or(0);
    wanted.sort_by(|a, b| {
        let by_height = height(a).cmp(&height(b));
        by_height.then_with(|| a.path.name().cmp(b.path.name()))
    });
    wanted.into_iter().cloned().collect()
}

/// Walks references both ways.
fn connected(
    first: StorePathHash,
    asked: &HashMap<StorePathHash, Arc<PathInfo>>,
) -> HashSet<StorePathHash> {
    let mut neighbours: HashMap<_, Vec<_>> = HashMap::new();
    for (hash, info) in asked {
        for reference in references(info).filter(|r| asked.contains_key(r)) {
            neighbours.entry(*hash).or_default().push(reference);
            neighbours.entry(reference).or_default().push(*hash);
        }
    }
    let mut seen = HashSet::from([first]);
    let mut open = vec![first];
    while let Some(hash) = open.pop() {
        for neighbour in neighbours.get(&hash).into_iter().flatten() {
            if seen.insert(*neighbour) {
                open.push(*neighbour);
            }
        }
    }
    seen
}

/// The longest way down from each path within the set: 0 for what refers to none of it.
fn heights(
    set: &HashSet<StorePathHash>,
    asked: &HashMap<StorePathHash, Arc<PathInfo>>,
) -> HashMap<StorePathHash, usize> {
    let below = |hash: StorePathHash| {
        let info = asked.get(&hash);
        let references = info.into_iter().flat_map(|info| references(info));
        references.filter(|r| set.contains(r))
    };
    let mut heights = HashMap::with_capacity(set.len());
    // Claims may be circular: what is on its way down counts as nothing.
    let mut under_way = HashSet::new();
    for start in set {
        let mut stack = vec![*start];
        while let Some(hash) = stack.last().copied() {
            if heights.contains_key(&hash) {
                stack.pop();
                continue;
            }
            let first_visit = under_way.insert(hash);
            let before = stack.len();
            if first_visit {
                let open = |r: &StorePathHash| !heights.contains_key(r) && !under_way.contains(r);
                stack.extend(below(hash).filter(open));
            }
            if stack.len() == before {
                let most = below(hash).filter_map(|r| heights.get(&r)).max();
                heights.insert(hash, most.map_or(0, |most| most + 1));
                stack.pop();
            }
        }
    }
    heights
}

fn references(info: &PathInfo) -> impl Iterator<Item = StorePathHash> {
    let own = info.path.hash();
    let hashes = info.references.iter().map(|path| path.hash());
    hashes.filter(move |hash| *hash != own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::hash::NarHash;
    use crate::nix::store_path::StorePath;

    fn path(name: &str) -> StorePath {
        let mut hash = [0; 20];
        hash.iter_mut().zip(name.bytes()).for_each(|(h, b)| *h = b);
        format!("{}-{name}", StorePathHash(hash)).parse().unwrap()
    }

    fn asked(graph: &[(&str, &[&str])]) -> HashMap<StorePathHash, Arc<PathInfo>> {
        let info = |(name, references): &(&str, &[&str])| {
            let info = PathInfo {
                path: path(name),
                nar_hash: NarHash::of(b""),
                nar_size: 0,
                references: references.iter().map(|r| path(r)).collect(),
                deriver: None,
                signatures: vec![],
                ca: None,
            };
            (info.path.hash(), Arc::new(info))
        };
        graph.iter().map(info).collect()
    }

    fn names(first: &str, graph: &[(&str, &[&str])]) -> Vec<String> {
        let wanted = wanted(path(first).hash(), &asked(graph));
        wanted.iter().map(|i| i.path.name().to_owned()).collect()
    }

    #[test]
    fn what_refers_to_nothing_comes_first_and_strangers_never() {
        let graph: &[(&str, &[&str])] = &[
            ("top", &["mid", "leaf-b", "top"]),
            ("mid", &["leaf-a", "leaf-c", "not-asked-for"]),
            ("leaf-a", &[]),
            ("leaf-b", &[]),
            ("leaf-c", &[]),
            ("stranger", &["other"]),
            ("other", &[]),
        ];
        assert_eq!(names("leaf-b", graph), ["leaf-a", "leaf-c", "mid", "top"]);
        assert_eq!(names("other", graph), ["stranger"]);
        assert_eq!(names("unknown", graph), [""; 0]);
    }

    #[test]
    fn circles_and_long_chains_end() {
        let circle: &[(&str, &[&str])] = &[("a", &["b"]), ("b", &["c"]), ("c", &["a"])];
        assert_eq!(names("a", circle).len(), 2);
        let all: Vec<String> = (0..20_000).map(|n| format!("n{n}")).collect();
        let below: Vec<[&str; 1]> = all.iter().skip(1).map(|n| [n.as_str()]).collect();
        let mut graph: Vec<(&str, &[&str])> = Vec::new();
        for (name, below) in all.iter().zip(&below) {
            graph.push((name, below));
        }
        let order = names("n0", &graph);
        assert_eq!(order.len(), 19_998);
        assert_eq!(order[0], "n19998");
    }
}
