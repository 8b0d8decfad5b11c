//! The check that a NAR is the one its path info promised: SHA-256 and size, while it passes.
//!
//! [`verified`] lets chunks through as they come and holds back only the one that completes the
//! promised size, until the hash agrees. So whoever reads the stream to its end has the right bytes,
//! and of a wrong NAR nobody ever gets the last ones: the reader sees a cut. To hold more of them back, so that
//! they can be had from elsewhere, is for [`super::held_tail`].
//!
//! Hashing happens where the stream is polled, at most 256 KiB (about 120 µs with the processor's SHA
//! instructions) per item. This is not a parser: any bytes of the right hash pass. Where the bytes are known to be
//! right in another way, [`verified_by`] takes that for the hash.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{Stream, StreamExt as _, TryStreamExt as _};
use sha2::{Digest as _, Sha256};

use crate::nix::hash::NarHash;

/// The hash and size of the bytes seen so far.
#[derive(Clone, Debug, Default)]
pub struct NarDigest {
    sha256: Sha256,
    size: u64,
}

/// Why the bytes that came are not the NAR that was promised.
#[derive(Debug, thiserror::Error)]
pub enum DigestError<E> {
    /// The source itself failed, with bytes missing.
    #[error("the source of the nar failed")]
    Source(#[source] E),
    /// The source ended too early.
    #[error("the nar ended after {actual} of {expected} bytes")]
    Short {
        /// Bytes that came.
        actual: u64,
        /// Bytes promised.
        expected: u64,
    },
    /// The source went on after the last byte.
    #[error("the nar has more than the {expected} bytes that were promised")]
    Long {
        /// Bytes promised.
        expected: u64,
    },
    /// The size is right, the content is not.
    #[error("the nar hashes to {actual}, but {expected} was promised")]
    Mismatch {
        /// Hash of what came.
        actual: NarHash,
        /// Hash promised.
        expected: NarHash,
    },
}

/// How it is known that the bytes of a stream are the promised ones.
pub trait Proof {
    /// Hears of bytes at the end.
    fn update(&mut self, bytes: &[u8]);

    /// Judges all bytes, once there are as many as promised; an error is the hash that they have.
    fn judge(&self, expected: NarHash) -> Result<(), NarHash>;
}

impl Proof for NarDigest {
    fn update(&mut self, bytes: &[u8]) {
        Self::update(self, bytes);
    }

    fn judge(&self, expected: NarHash) -> Result<(), NarHash> {
        let actual = self.clone().finish();
        match actual == expected {
            true => Ok(()),
            false => Err(actual),
        }
    }
}

impl NarDigest {
    /// Adds bytes at the end.
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.size += bytes.len() as u64;
    }

    /// Returns how many bytes were added.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the hash of all bytes added.
    pub fn finish(self) -> NarHash {
        NarHash(self.sha256.finalize().into())
    }
}

/// Passes a NAR on while checking it against its promised hash and size in bytes.
///
/// The chunk that completes the size comes only when the hash agrees and the source has ended; an
/// error is the last item. A source that fails after it gave all bytes, and the right ones, does no
/// harm. Empty chunks are dropped, chunks over 256 KiB come in pieces. Dropping the stream drops the
/// source.
pub fn verified<S, E>(source: S, nar_hash: NarHash, nar_size: u64) -> VerifiedNar<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    verified_by(NarDigest::default(), source, nar_hash, nar_size)
}

/// Does the same with another proof than the hash of what passes here.
pub fn verified_by<P, S, E>(
    proof: P,
    source: S,
    nar_hash: NarHash,
    nar_size: u64,
) -> VerifiedNar<S, P>
where
    P: Proof + Unpin,
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    VerifiedNar {
        source,
        expected: (nar_hash, nar_size),
        proof,
        size: 0,
        unread: Bytes::new(),
        held: None,
        over: false,
    }
}

/// Reads a small NAR whole; what comes back is the promised NAR.
///
/// It takes as much memory as came, at most the promised size, which is the caller's to bound.
/// Dropping the future drops the source.
pub async fn whole<S, E>(
    source: S,
    nar_hash: NarHash,
    nar_size: u64,
) -> Result<Bytes, DigestError<E>>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    whole_of(verified(source, nar_hash, nar_size)).await
}

/// Reads a checked stream to its end, as [`whole`] does.
pub async fn whole_of<P, S, E>(mut chunks: VerifiedNar<S, P>) -> Result<Bytes, DigestError<E>>
where
    P: Proof + Unpin,
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    let first = chunks.try_next().await?.unwrap_or_default();
    let Some(second) = chunks.try_next().await? else {
        return Ok(first);
    };
    let mut nar = BytesMut::from(first);
    nar.extend_from_slice(&second);
    while let Some(chunk) = chunks.try_next().await? {
        nar.extend_from_slice(&chunk);
    }
    Ok(nar.freeze())
}

/// The stream that [`verified`] makes.
#[derive(Debug)]
pub struct VerifiedNar<S, P = NarDigest> {
    source: S,
    expected: (NarHash, u64),
    proof: P,
    /// Bytes that came.
    size: u64,
    /// What is left of a large chunk.
    unread: Bytes,
    /// The chunk that completes the NAR; it was judged.
    held: Option<Bytes>,
    /// Nothing comes any more.
    over: bool,
}

impl<S, P: Proof> VerifiedNar<S, P> {
    /// Counts one chunk; the proven end of the NAR is held, everything else comes back.
    fn take<E>(&mut self, chunk: Bytes) -> Result<Option<Bytes>, DigestError<E>> {
        let (_, expected) = self.expected;
        if self.held.is_some() || chunk.len() as u64 > expected - self.size {
            return Err(DigestError::Long { expected });
        }
        self.proof.update(&chunk);
        self.size += chunk.len() as u64;
        if self.size < expected {
            return Ok(Some(chunk));
        }
        self.judge()?;
        self.held = Some(chunk);
        Ok(None)
    }

    fn judge<E>(&self) -> Result<(), DigestError<E>> {
        let (expected, _) = self.expected;
        let judged = self.proof.judge(expected);
        judged.map_err(|actual| DigestError::Mismatch { actual, expected })
    }

    /// Judges the end of the source, `cause` if it was an error.
    fn end<E>(&mut self, cause: Option<E>) -> Option<Result<Bytes, DigestError<E>>> {
        let (_, expected) = self.expected;
        let actual = self.size;
        match (self.held.take(), cause) {
            (Some(last), _) => Some(Ok(last)),
            (None, Some(cause)) => Some(Err(DigestError::Source(cause))),
            (None, None) if actual < expected => Some(Err(DigestError::Short { actual, expected })),
            // Only a promise of 0 bytes comes here: any last chunk was held.
            (None, None) => self.judge().err().map(Err),
        }
    }
}

impl<P, S, E> Stream for VerifiedNar<S, P>
where
    P: Proof + Unpin,
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    type Item = Result<Bytes, DigestError<E>>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while !this.over {
            if this.unread.is_empty() {
                match ready!(this.source.poll_next_unpin(cx)) {
                    Some(Ok(chunk)) => this.unread = chunk,
                    Some(Err(cause)) => {
                        this.over = true;
                        return Poll::Ready(this.end(Some(cause)));
                    }
                    None => {
                        this.over = true;
                        return Poll::Ready(this.end(None));
                    }
                }
                continue;
            }
            let step = this.unread.len().min(STEP_BYTES);
            let chunk = this.unread.split_to(step);
            match this.take(chunk) {
                Ok(Some(chunk)) => return Poll::Ready(Some(Ok(chunk))),
                Ok(None) => {}
                Err(error) => {
                    this.over = true;
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        Poll::Ready(None)
    }
}

/// Bytes hashed at one go, so that no task keeps a thread for much longer than 100 µs.
const STEP_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use futures_util::stream;

    use super::*;

    type Item = Result<Bytes, &'static str>;

    /// All items of a stream that is never pending.
    fn read(
        chunks: &[Item],
        expected: (NarHash, u64),
    ) -> Vec<Result<Bytes, DigestError<&'static str>>> {
        let source = stream::iter(chunks.to_vec());
        verified(source, expected.0, expected.1)
            .collect::<Vec<_>>()
            .now_or_never()
            .unwrap()
    }

    fn chunk(text: &'static str) -> Item {
        Ok(Bytes::from_static(text.as_bytes()))
    }

    fn promise(nar: &str) -> (NarHash, u64) {
        (NarHash::of(nar.as_bytes()), nar.len() as u64)
    }

    /// What a reader got, and the error it ended with.
    fn got(items: Vec<Result<Bytes, DigestError<&'static str>>>) -> (Vec<u8>, Option<String>) {
        let mut bytes = vec![];
        let mut error = None;
        for item in items {
            assert!(error.is_none(), "an item after the error");
            match item {
                Ok(chunk) => bytes.extend_from_slice(&chunk),
                Err(e) => error = Some(e.to_string()),
            }
        }
        (bytes, error)
    }

    #[test]
    fn the_promised_nar_passes_whole() {
        let chunks = [chunk("ab"), chunk(""), chunk("cde"), chunk("f"), chunk("")];
        assert_eq!(
            got(read(&chunks, promise("abcdef"))),
            (b"abcdef".to_vec(), None)
        );
        assert_eq!(got(read(&[], promise(""))), (vec![], None));
    }

    #[test]
    fn a_wrong_last_byte_is_never_given_out() {
        let (bytes, error) = got(read(&[chunk("ab"), chunk("cx")], promise("abcd")));
        assert_eq!(bytes, b"ab");
        assert!(error.unwrap().contains("hashes to"));
    }

    #[test]
    fn a_wrong_first_byte_cuts_the_end() {
        let (bytes, error) = got(read(&[chunk("xb"), chunk("cd")], promise("abcd")));
        assert_eq!(bytes, b"xb");
        assert!(error.unwrap().contains("hashes to"));
    }

    #[test]
    fn too_few_and_too_many_bytes_are_told_apart() {
        let (bytes, error) = got(read(&[chunk("abc")], promise("abcd")));
        assert_eq!(
            (bytes, error.unwrap().as_str()),
            (b"abc".to_vec(), "the nar ended after 3 of 4 bytes")
        );
        for chunks in [
            &[chunk("abc"), chunk("de")][..],
            &[chunk("ab"), chunk("cd"), chunk("e")],
            &[chunk("abcde")],
        ] {
            let (bytes, error) = got(read(chunks, promise("abcd")));
            assert!(bytes.len() < 4);
            assert!(error.unwrap().contains("more than the 4 bytes"));
        }
        let (bytes, error) = got(read(&[chunk("a")], promise("")));
        assert!(bytes.is_empty() && error.unwrap().contains("more than the 0 bytes"));
    }

    #[test]
    fn a_failing_source_shows_unless_all_was_there() {
        let (bytes, error) = got(read(
            &[chunk("ab"), Err("gone"), chunk("cd")],
            promise("abcd"),
        ));
        assert_eq!(bytes, b"ab");
        assert_eq!(error.unwrap(), "the source of the nar failed");
        let (bytes, error) = got(read(
            &[chunk("ab"), chunk("cd"), Err("gone")],
            promise("abcd"),
        ));
        assert_eq!((bytes.as_slice(), error), (&b"abcd"[..], None));
    }

    #[test]
    fn chunks_pass_at_once_until_the_last() {
        let source = stream::iter([chunk("ab"), chunk("cd")]).chain(stream::pending());
        let mut nar = verified(source, NarHash::of(b"abcd"), 4);
        assert_eq!(nar.next().now_or_never().unwrap().unwrap().unwrap(), "ab");
        assert!(nar.next().now_or_never().is_none(), "the end has not come");
    }

    #[test]
    fn large_chunks_come_in_steps() {
        let nar = Bytes::from(vec![7; 3 * STEP_BYTES + 1]);
        let expected = (NarHash::of(&nar), nar.len() as u64);
        let source = stream::iter([Ok::<_, &str>(nar.clone())]);
        let chunks: Vec<_> = verified(source, expected.0, expected.1)
            .try_collect()
            .now_or_never()
            .unwrap()
            .unwrap();
        let sizes: Vec<_> = chunks.iter().map(|chunk: &Bytes| chunk.len()).collect();
        assert_eq!(sizes, [STEP_BYTES, STEP_BYTES, STEP_BYTES, 1]);
    }

    proptest::proptest! {
        #[test]
        fn only_the_promised_nar_comes_whole(
            nar in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..60),
            cuts in proptest::collection::vec(0_usize..20, 0..8),
            wrong: Option<(proptest::sample::Index, u8)>,
        ) {
            let expected = (NarHash::of(&nar), nar.len() as u64);
            let mut sent = nar.clone();
            if let Some((place, bits)) = wrong.filter(|_| !nar.is_empty()) {
                sent[place.index(nar.len())] ^= bits;
            }
            let mut rest = Bytes::from(sent.clone());
            let mut chunks = vec![];
            for cut in cuts {
                chunks.push(Ok(rest.split_to(cut.min(rest.len()))));
            }
            chunks.push(Ok(rest));
            let (bytes, error) = got(read(&chunks, expected));
            if sent == nar {
                proptest::prop_assert_eq!((bytes, error), (nar, None));
            } else {
                proptest::prop_assert!(error.is_some() && bytes.len() < nar.len());
            }
        }
    }

    #[test]
    fn whole_gives_all_or_an_error() {
        for chunks in [&[chunk("abcd")][..], &[chunk("a"), chunk("bc"), chunk("d")]] {
            let source = stream::iter(chunks.to_vec());
            let nar = whole(source, NarHash::of(b"abcd"), 4)
                .now_or_never()
                .unwrap();
            assert_eq!(nar.unwrap(), "abcd");
        }
        let source = stream::iter([chunk("abcx")]);
        let nar = whole(source, NarHash::of(b"abcd"), 4)
            .now_or_never()
            .unwrap();
        assert!(matches!(nar, Err(DigestError::Mismatch { .. })));
        let source = stream::iter([] as [Item; 0]);
        assert!(
            whole(source, NarHash::of(b"a"), 1)
                .now_or_never()
                .unwrap()
                .is_err()
        );
    }
}
