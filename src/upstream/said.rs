//! What a scripted daemon says, for the tests of this floor.

/// Numbers, as the protocol has them.
pub(super) fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// A text, with its length and padded.
pub(super) fn text(text: &str) -> Vec<u8> {
    let mut out = numbers(&[text.len() as u64]);
    out.extend_from_slice(text.as_bytes());
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// An error with these words, in the place of an answer.
pub(super) fn error(words: &str) -> Vec<u8> {
    let head = [
        numbers(&[ERROR]),
        text("Error"),
        numbers(&[0]),
        text("Error"),
    ];
    [head.concat(), text(words), numbers(&[0, 0])].concat()
}

/// What stands before an answer, and before an error.
pub(super) const LAST: u64 = 0x616c_7473;
const ERROR: u64 = 0x6378_7470;
