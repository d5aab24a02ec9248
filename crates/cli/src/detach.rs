//! Finds Ctrl-P Ctrl-Q in what is typed, however it is cut into pieces.

use bytes::Bytes;

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

/// A matcher for the detach keys. A Ctrl-P is held back until the next key tells what it was.
#[derive(Debug, Default)]
pub(crate) struct DetachKeys {
    held: bool,
}

impl DetachKeys {
    /// What to pass on of `typed`, and whether the keys were typed; nothing after them is passed on.
    pub(crate) fn feed(&mut self, typed: &[u8]) -> (Bytes, bool) {
        let mut passed = Vec::with_capacity(typed.len() + 1);
        for &key in typed {
            if self.held && key == CTRL_Q {
                self.held = false;
                return (passed.into(), true);
            }
            if self.held {
                passed.push(CTRL_P);
            }
            self.held = key == CTRL_P;
            if !self.held {
                passed.push(key);
            }
        }
        (passed.into(), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_keys_are_found_and_everything_else_passes() {
        let check = |pieces: &[&[u8]], expected: &[u8], detached: bool| {
            let mut keys = DetachKeys::default();
            let mut passed = Vec::new();
            let mut found = false;
            for piece in pieces {
                let (bytes, end) = keys.feed(piece);
                passed.extend_from_slice(&bytes);
                found = end;
            }
            assert_eq!((passed.as_slice(), found), (expected, detached), "{pieces:?}");
        };
        check(&[b"ls\n"], b"ls\n", false);
        check(&[b"a\x10\x11b"], b"a", true);
        check(&[b"a\x10", b"\x11"], b"a", true);
        check(&[b"\x10", b"x"], b"\x10x", false);
        check(&[b"\x10\x10\x11"], b"\x10", true);
        check(&[b"\x11\x10"], b"\x11", false);
        check(&[b""], b"", false);
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(typed in prop::collection::vec(0x0fu8..0x13, 0..12), cut in 0usize..12) {
            let cut = cut.min(typed.len());
            let (whole, end) = DetachKeys::default().feed(&typed);
            let mut keys = DetachKeys::default();
            let (first, mut found) = keys.feed(&typed[..cut]);
            let mut joined = first.to_vec();
            if !found {
                let (second, end) = keys.feed(&typed[cut..]);
                joined.extend_from_slice(&second);
                found = end;
            }
            prop_assert_eq!((joined, found), (whole.to_vec(), end));
        }
    }
}
