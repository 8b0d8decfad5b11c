//! A fuzz entry for answers, run by property tests; of no use to the program.

use bytes::BytesMut;

use super::request::{Awaited, Expected};
use super::session::{Event, Session};
use crate::nix::store_path::StoreDir;
use crate::nix::worker_protocol::ProtocolError;

/// Reads arbitrary bytes as answers to arbitrary questions, whole and cut in pieces, and asserts
/// that both give the same events.
pub fn fuzz(data: &[u8]) {
    let Some((count, rest)) = data.split_first() else {
        return;
    };
    let (kinds, answers) = rest.split_at(usize::from(count % 8).min(rest.len()));
    let kind = |byte: &u8| match byte % 4 {
        0 => Awaited::Paths,
        _ => Awaited::Infos(usize::from(byte / 4)),
    };
    let questions: Vec<_> = kinds.iter().map(kind).collect();
    let dir = StoreDir::default();
    let whole = [answers.len()];
    let events = run(&dir, &questions, answers, whole.into_iter());
    let pieces: Vec<_> = answers.iter().map(|byte| usize::from(*byte % 19)).collect();
    let pieces = pieces.into_iter().chain([1]).cycle();
    assert_eq!(run(&dir, &questions, answers, pieces), events);
}

/// Feeds `answers` in chunks of these sizes.
pub(super) fn run(
    store_dir: &StoreDir,
    questions: &[Awaited],
    answers: &[u8],
    sizes: impl Iterator<Item = usize>,
) -> (Vec<Event>, Option<ProtocolError>) {
    let mut session = Session::new(store_dir.clone());
    for question in questions {
        session.expect(Expected(*question));
    }
    let (mut buffer, mut events) = (BytesMut::new(), Vec::new());
    let mut rest = answers;
    for size in sizes {
        let (chunk, behind) = rest.split_at(size.min(rest.len()));
        buffer.extend_from_slice(chunk);
        rest = behind;
        loop {
            match session.next(&mut buffer) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => {
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
