//! A part of a checked stream, as a `Range` request asks for it.
//!
//! What lies before the part is read and dropped, what lies behind it is read to the end: the
//! last chunk of the part is given out only when the whole stream has proved right.

use std::ops::Range;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};

/// Gives the bytes `range` of a stream; an error of the stream ends it without the last chunk.
///
/// Dropping it drops the stream.
pub fn slice<S, E>(source: S, range: Range<u64>) -> impl Stream<Item = Result<Bytes, E>> + Send
where
    S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
    E: Send,
{
    let state = State {
        source,
        range,
        offset: 0,
        held: None,
        done: false,
    };
    stream::unfold(state, |mut state| async move {
        let item = state.next().await?;
        Some((item, state))
    })
}

struct State<S> {
    source: S,
    range: Range<u64>,
    offset: u64,
    held: Option<Bytes>,
    done: bool,
}

impl<S, E> State<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    async fn next(&mut self) -> Option<Result<Bytes, E>> {
        while !self.done {
            match self.source.next().await {
                Some(Ok(chunk)) => {
                    let part = self.part(chunk);
                    if part.is_empty() {
                        continue;
                    }
                    if let Some(earlier) = self.held.replace(part) {
                        return Some(Ok(earlier));
                    }
                }
                Some(Err(error)) => {
                    self.done = true;
                    self.held = None;
                    return Some(Err(error));
                }
                None => self.done = true,
            }
        }
        self.held.take().map(Ok)
    }

    /// Cuts a chunk to what lies in the range.
    fn part(&mut self, chunk: Bytes) -> Bytes {
        let start = self.offset;
        let end = start + chunk.len() as u64;
        self.offset = end;
        let from = self.range.start.clamp(start, end) - start;
        let to = self.range.end.clamp(start, end) - start;
        // Both lie within the chunk, so they fit; an empty part is the safe answer otherwise.
        match (usize::try_from(from), usize::try_from(to)) {
            (Ok(from), Ok(to)) if from < to => chunk.slice(from..to),
            _ => Bytes::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all<T>(items: impl Stream<Item = T>) -> Vec<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(items.collect())
    }

    fn source(sizes: &[usize], fail: bool) -> impl Stream<Item = Result<Bytes, ()>> + Send + Unpin {
        let mut next = 0_u8;
        let mut chunks = Vec::new();
        for size in sizes {
            let chunk = (0..*size).map(|_| {
                next = next.wrapping_add(1);
                next
            });
            chunks.push(Ok(Bytes::from(chunk.collect::<Vec<u8>>())));
        }
        if fail {
            chunks.push(Err(()));
        }
        stream::iter(chunks)
    }

    proptest! {
        #[test]
        fn is_the_same_as_cutting_the_whole(
            sizes in proptest::collection::vec(0_usize..50, 0..10),
            a in 0_u64..300,
            b in 0_u64..300,
        ) {
            let range = a.min(b)..a.max(b);
            let whole = all(source(&sizes, false).map(Result::unwrap)).concat();
            let part = all(slice(source(&sizes, false), range.clone()).map(Result::unwrap)).concat();
            let size = whole.len();
            let cut = |at: u64| usize::try_from(at).unwrap().min(size);
            prop_assert_eq!(&part[..], &whole[cut(range.start)..cut(range.end)]);
        }
    }

    #[test]
    fn the_last_chunk_is_kept_when_the_stream_fails_behind_the_part() {
        let items = all(slice(source(&[10, 10, 10], true), 0..20));
        assert_eq!(items.len(), 2);
        assert_eq!(items[0].as_ref().unwrap().len(), 10);
        assert!(items[1].is_err());
    }
}
