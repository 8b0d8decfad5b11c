//! A fuzz entry for answers, run by property tests; of no use to the program.

use bytes::BytesMut;

use super::request::{Awaited, Expected};
use super::session::{Event, Session};
use super::{Peer, ProtocolError, Version};
use crate::nix::store_path::StoreDir;

/// Reads arbitrary bytes as answers to arbitrary questions, whole and cut in pieces, and asserts
/// that both give the same events.
pub fn fuzz(data: &[u8]) {
    let Some(([minor, count], rest)) = data.split_first_chunk() else {
        return;
    };
    let peer = Peer {
        version: Version::new(1, 18 + minor % 21),
        nix_version: None,
        trusted: None,
        build_traces: *minor >= 128,
    };
    let (kinds, answers) = rest.split_at(usize::from(count % 16).min(rest.len()));
    let questions: Vec<_> = kinds.iter().map(|kind| Awaited::arbitrary(*kind)).collect();
    let whole = [answers.len()];
    let pieces: Vec<_> = answers.iter().map(|byte| usize::from(*byte % 19)).collect();
    let events = run(&peer, &questions, answers, whole.iter().copied());
    let pieces = pieces.into_iter().chain([1]);
    assert_eq!(run(&peer, &questions, answers, pieces.cycle()), events);
}

/// Feeds `answers` in chunks of these sizes; events that a border may split are joined.
pub(super) fn run(
    peer: &Peer,
    questions: &[Awaited],
    answers: &[u8],
    sizes: impl Iterator<Item = usize>,
) -> (Vec<Event>, Option<ProtocolError>) {
    let mut session = Session::new(peer, StoreDir::default());
    for question in questions {
        session.expect(Expected(question.clone()));
    }
    let (mut buffer, mut events) = (BytesMut::new(), Vec::new());
    let mut rest = answers;
    for size in sizes {
        let (chunk, behind) = rest.split_at(size.min(rest.len()));
        buffer.extend_from_slice(chunk);
        rest = behind;
        loop {
            match session.next(&mut buffer) {
                Ok(Some(event)) => join(&mut events, event),
                Ok(None) => break,
                Err(error) => {
                    // How much of an unfinished stream was told before depends on the borders.
                    if let Some(Event::NarChunk(_) | Event::Paths(_)) = events.last() {
                        events.pop();
                    }
                    assert_eq!(session.next(&mut buffer), Err(ProtocolError::Over));
                    return (events, Some(error));
                }
            }
        }
        if rest.is_empty() {
            break;
        }
    }
    (events, None)
}

fn join(events: &mut Vec<Event>, event: Event) {
    match (events.last_mut(), event) {
        (Some(Event::NarChunk(before)), Event::NarChunk(chunk)) => {
            *before = [&before[..], &chunk[..]].concat().into();
        }
        (Some(Event::Paths(before)), Event::Paths(paths)) => before.extend(paths),
        (_, event) => events.push(event),
    }
}
