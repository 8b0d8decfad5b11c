//! Nix's base-32: its own alphabet (no `e o u t`), least significant digit last.
//!
//! It is not RFC 4648: the number is read as little-endian and written from its most
//! significant digit. Source: `libutil/base-nix-32.cc` of Nix and the manual's glossary.

/// The digits, in the order of their value.
pub const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Returns how many digits `bytes` bytes take.
pub const fn encoded_len(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

/// Writes `bytes` as base-32 digits.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(encoded_len(bytes.len()));
    push(&mut text, bytes);
    text
}

/// Appends `bytes` as base-32 digits to `text`.
pub fn push(text: &mut String, bytes: &[u8]) {
    for digit in (0..encoded_len(bytes.len())).rev() {
        let bit = digit * 5;
        let (byte, shift) = (bit / 8, bit % 8);
        let low = u16::from(bytes[byte]);
        let high = bytes.get(byte + 1).map_or(0, |next| u16::from(*next));
        let value = ((low | high << 8) >> shift) & 0x1f;
        text.push(char::from(ALPHABET[usize::from(value)]));
    }
}

/// Reads exactly `N` bytes from base-32 digits.
///
/// `None` for a wrong length, a foreign digit, or bits set beyond the last byte.
pub fn decode<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    if digits.len() != encoded_len(N) {
        return None;
    }
    let mut bytes = [0_u8; N];
    for (place, digit) in digits.iter().rev().enumerate() {
        let value = VALUES[usize::from(*digit)];
        if value == FOREIGN {
            return None;
        }
        let bit = place * 5;
        let (byte, shift) = (bit / 8, bit % 8);
        let wide = u16::from(value) << shift;
        let [low, carry] = wide.to_le_bytes();
        bytes[byte] |= low;
        match bytes.get_mut(byte + 1) {
            Some(next) => *next |= carry,
            None if carry != 0 => return None,
            None => {}
        }
    }
    Some(bytes)
}

const FOREIGN: u8 = 0xff;

const VALUES: [u8; 256] = {
    let mut values = [FOREIGN; 256];
    let mut value = 0_u8;
    while value < 32 {
        values[ALPHABET[value as usize] as usize] = value;
        value += 1;
    }
    values
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_vectors() {
        // `nix hash to-base32 --type sha256` of the SHA-256 of the empty string, Nix 2.8.
        let empty: [u8; 32] = [
            0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f,
            0xb9, 0x24, 0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b,
            0x78, 0x52, 0xb8, 0x55,
        ];
        let text = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
        assert_eq!(encode(&empty), text);
        assert_eq!(decode::<32>(text.as_bytes()), Some(empty));
    }

    #[test]
    fn overflowing_top_digit_is_refused() {
        // 52 digits hold 260 bits; the four beyond 256 must be zero.
        let mut digits = [b'0'; 52];
        digits[0] = b'1';
        assert!(decode::<32>(&digits).is_some());
        digits[0] = b'2';
        assert_eq!(decode::<32>(&digits), None);
    }

    proptest! {
        #[test]
        fn round_trip(bytes: [u8; 20]) {
            prop_assert_eq!(decode::<20>(encode(&bytes).as_bytes()), Some(bytes));
        }

        #[test]
        fn any_text_that_decodes_is_canonical(text in "[0-9a-z]{32}") {
            if let Some(bytes) = decode::<20>(text.as_bytes()) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }
}
