//! The last bytes of a NAR on its way, held back until all of it is known to be right.
//!
//! ```text
//! chunks ──▶ those before the tail pass at once
//!       └──▶ the tail: held, until it is let go or forgotten
//! ```
//!
//! A hash tells of a whole NAR alone, so whatever is wrong is known when the last byte came. What is held then can
//! be had again from somebody else, what was given cannot. The tail begins at a byte that the NAR's size tells, so
//! nothing is held before that, and chunks are cut there; but the chunk that completes the NAR is held whole, however
//! large it is, as it is wrong if the NAR is. Nothing is hashed here.

use std::collections::VecDeque;

use bytes::Bytes;

use super::chunks::append;

/// The chunks of one NAR that are held back, and where it is.
#[derive(Clone, Debug)]
pub struct HeldTail {
    /// Bytes of the NAR.
    size: u64,
    /// The first byte that is held back.
    from: u64,
    /// Bytes that passed.
    given: u64,
    held: VecDeque<Bytes>,
    /// Bytes in those.
    held_bytes: u64,
}

impl HeldTail {
    /// Begins a NAR of `size` bytes, the last `tail_bytes` of which are to be held back.
    pub fn new(size: u64, tail_bytes: u64) -> Self {
        Self {
            size,
            from: size.saturating_sub(tail_bytes),
            given: 0,
            held: VecDeque::new(),
            held_bytes: 0,
        }
    }

    /// Begins a NAR of which nothing is held back.
    pub fn nothing() -> Self {
        Self {
            from: u64::MAX,
            ..Self::new(u64::MAX, 0)
        }
    }

    /// Returns how many bytes of a chunk that comes now would pass, before the others are held.
    pub fn passes(&self, chunk: &[u8]) -> usize {
        if self.came().saturating_add(chunk.len() as u64) >= self.size {
            return 0;
        }
        match usize::try_from(self.from.saturating_sub(self.came())) {
            Ok(room) => room.min(chunk.len()),
            Err(_) => chunk.len(),
        }
    }

    /// Takes a chunk and returns what of it passes, which may be nothing.
    pub fn take(&mut self, mut chunk: Bytes) -> Bytes {
        let passing = chunk.split_to(self.passes(&chunk));
        self.given += passing.len() as u64;
        self.hold(chunk);
        passing
    }

    /// Takes a chunk that is known to be right: it is held only if the NAR is complete by it, or something is held.
    pub fn take_right(&mut self, chunk: Bytes) -> Bytes {
        if !self.held.is_empty() || self.came() + chunk.len() as u64 >= self.size {
            self.hold(chunk);
            return Bytes::new();
        }
        self.given += chunk.len() as u64;
        chunk
    }

    /// Returns the bytes that passed: from there on another may give the NAR.
    pub fn given(&self) -> u64 {
        self.given
    }

    /// Returns the bytes that came: those that passed and those that are held.
    pub fn came(&self) -> u64 {
        self.given + self.held_bytes
    }

    /// Throws away what is held.
    pub fn forget(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
    }

    /// Lets the next chunk of the tail go; `None` when nothing is held.
    pub fn let_go(&mut self) -> Option<Bytes> {
        let chunk = self.held.pop_front()?;
        self.given += chunk.len() as u64;
        self.held_bytes -= chunk.len() as u64;
        Some(chunk)
    }

    /// Holds a chunk, small ones joined: each would cost more than its bytes, and many at once would overrun a reader
    /// that counts chunks.
    fn hold(&mut self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        self.held_bytes += chunk.len() as u64;
        let apart = match self.held.back_mut() {
            Some(last) => append(last, chunk),
            None => Some(chunk),
        };
        self.held.extend(apart);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drained(tail: &mut HeldTail) -> Vec<u8> {
        std::iter::from_fn(|| tail.let_go()).flatten().collect()
    }

    #[test]
    fn the_last_bytes_are_held_and_nothing_before_them() {
        let mut tail = HeldTail::new(10, 3);
        assert_eq!(tail.take(Bytes::from_static(b"abcde")), "abcde");
        assert_eq!(tail.take(Bytes::from_static(b"fgh")), "fg");
        assert_eq!((tail.given(), tail.came()), (7, 8));
        assert_eq!(tail.take(Bytes::from_static(b"ij")), "");
        assert_eq!((tail.given(), tail.came()), (7, 10));
        assert_eq!(drained(&mut tail), b"hij");
        assert_eq!((tail.given(), tail.came()), (10, 10));
        assert_eq!(tail.let_go(), None);
    }

    #[test]
    fn a_forgotten_tail_is_taken_anew_from_where_it_began() {
        let mut tail = HeldTail::new(6, 4);
        assert_eq!(tail.take(Bytes::from_static(b"abcdx")), "ab");
        assert_eq!(tail.take(Bytes::from_static(b"x")), "");
        tail.forget();
        assert_eq!((tail.given(), tail.came()), (2, 2));
        assert_eq!(tail.take(Bytes::from_static(b"cd")), "");
        assert_eq!(tail.take(Bytes::from_static(b"ef")), "");
        assert_eq!(drained(&mut tail), b"cdef");
    }

    #[test]
    fn all_of_a_small_nar_is_held_and_so_is_what_is_too_much() {
        let mut tail = HeldTail::new(3, 100);
        assert_eq!(tail.take(Bytes::from_static(b"abc")), "");
        assert_eq!(tail.take(Bytes::from_static(b"d")), "");
        assert_eq!((tail.given(), tail.came()), (0, 4));
        tail.forget();
        assert_eq!(tail.came(), 0);
    }

    /// Else what of it passed would be counted as given, and then not be given for the rest being wrong.
    #[test]
    fn a_chunk_that_completes_the_nar_is_held_whole() {
        let mut tail = HeldTail::new(6, 1);
        assert_eq!(tail.take(Bytes::from_static(b"ab")), "ab");
        assert_eq!(tail.take(Bytes::from_static(b"cdef")), "");
        assert_eq!((tail.given(), tail.came()), (2, 6));
        tail.forget();
        assert_eq!(tail.take(Bytes::from_static(b"cdefgh")), "");
        assert_eq!((tail.given(), tail.came()), (2, 8));
    }

    #[test]
    fn nothing_may_be_held() {
        let mut tail = HeldTail::nothing();
        assert_eq!(tail.take(Bytes::from_static(b"abc")), "abc");
        assert_eq!(tail.take_right(Bytes::from_static(b"d")), "d");
        assert_eq!((tail.given(), tail.came()), (4, 4));
    }

    #[test]
    fn of_what_is_right_the_last_chunk_alone_is_held() {
        let mut tail = HeldTail::new(6, 4);
        assert_eq!(tail.take_right(Bytes::from_static(b"abcd")), "abcd");
        assert_eq!(tail.take_right(Bytes::from_static(b"ef")), "");
        assert_eq!(tail.take_right(Bytes::from_static(b"g")), "");
        assert_eq!((tail.given(), tail.came()), (4, 7));
        // Who takes over then has passed the tail's beginning.
        tail.forget();
        assert_eq!(tail.take(Bytes::from_static(b"ef")), "");
        assert_eq!(drained(&mut tail), b"ef");
    }

    #[test]
    fn small_chunks_are_held_together_and_large_ones_as_they_are() {
        let mut tail = HeldTail::new(1 << 20, 1 << 20);
        let large = Bytes::from(vec![1; 200 << 10]);
        let sizes = [4 << 10, 4 << 10, 200 << 10, 100 << 10, 1, 1];
        for size in sizes {
            assert_eq!(tail.take(large.slice(..size)), "");
        }
        let joined: Vec<_> = std::iter::from_fn(|| tail.let_go().map(|it| it.len())).collect();
        assert_eq!(joined, [208 << 10, 100 << 10, 2]);
        let mut tail = HeldTail::new(1 << 20, 1 << 20);
        (0..100_000).for_each(|_| drop(tail.take(Bytes::from_static(b"x"))));
        assert!(tail.held.len() < 5, "{} for 100 kB", tail.held.len());
        let mut tail = HeldTail::new(1 << 20, 1 << 20);
        assert_eq!(tail.take(large.clone()), "");
        let same = tail.let_go().unwrap();
        assert_eq!(same.as_ptr(), large.as_ptr(), "nothing is copied");
    }

    proptest::proptest! {
        #[test]
        fn all_bytes_come_out_in_order(
            nar in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
            tail_bytes in 0_u64..100,
            cuts in proptest::collection::vec(0_usize..40, 0..8),
        ) {
            let mut tail = HeldTail::new(nar.len() as u64, tail_bytes);
            let mut rest = Bytes::from(nar.clone());
            let mut out = vec![];
            let mut last = 0;
            for cut in cuts {
                let chunk = rest.split_to(cut.min(rest.len()));
                last = if chunk.is_empty() { last } else { chunk.len() };
                out.extend_from_slice(&tail.take(chunk));
            }
            last = if rest.is_empty() { last } else { rest.len() };
            out.extend_from_slice(&tail.take(rest));
            let held = nar.len().min(usize::try_from(tail_bytes).unwrap().max(last));
            proptest::prop_assert_eq!(out.len(), nar.len() - held);
            out.extend(drained(&mut tail));
            proptest::prop_assert_eq!(out, nar);
        }
    }
}
