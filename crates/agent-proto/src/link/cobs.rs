//! Consistent overhead byte stuffing (Cheshire and Baker, 1997), in runs instead of bytes.
//!
//! The crate `cobs` is byte by byte, which emulated guests feel: 10 MB of output passes here twice. It is what the
//! tests compare with.

/// The longest run that one code byte can announce.
const MAX_RUN: usize = 254;

/// Appends one stuffed frame to a buffer, piece by piece.
pub(super) struct Encoder<'a> {
    out: &'a mut Vec<u8>,
    /// Where the code byte of the open run is.
    code_at: usize,
    run: usize,
}

impl<'a> Encoder<'a> {
    /// Starts a frame at the end of `out`.
    pub(super) fn new(out: &'a mut Vec<u8>) -> Self {
        let code_at = out.len();
        out.push(0);
        Self { out, code_at, run: 0 }
    }

    fn close_run(&mut self, code: usize) {
        // At most MAX_RUN + 1, which is 255.
        self.out[self.code_at] = code as u8;
        self.code_at = self.out.len();
        self.out.push(0);
        self.run = 0;
    }

    /// Appends bytes of the payload.
    pub(super) fn push(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.run == MAX_RUN {
                self.close_run(MAX_RUN + 1);
            }
            let window = &data[..data.len().min(MAX_RUN - self.run)];
            if let Some(zero) = memchr::memchr(0, window) {
                self.out.extend_from_slice(&window[..zero]);
                let code = self.run + zero + 1;
                self.close_run(code);
                data = &data[zero + 1..];
            } else {
                self.out.extend_from_slice(window);
                self.run += window.len();
                data = &data[window.len()..];
            }
        }
    }

    /// Ends the frame with its delimiter.
    pub(super) fn finish(self) {
        self.out[self.code_at] = (self.run + 1) as u8;
        self.out.push(0);
    }
}

/// Undoes the stuffing of one frame without its delimiter; returns the payload's length, or nothing for bytes that
/// no encoder made.
pub(super) fn decode_in_place(frame: &mut [u8]) -> Option<usize> {
    let (mut from, mut to) = (0, 0);
    while from < frame.len() {
        let code = usize::from(frame[from]);
        let end = from + code;
        if code == 0 || end > frame.len() {
            return None;
        }
        frame.copy_within(from + 1..end, to);
        to += code - 1;
        from = end;
        if code <= MAX_RUN && from < frame.len() {
            frame[to] = 0;
            to += 1;
        }
    }
    Some(to)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(pieces: &[&[u8]]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = Encoder::new(&mut out);
        for piece in pieces {
            encoder.push(piece);
        }
        encoder.finish();
        out
    }

    #[test]
    fn runs_around_the_longest_come_back() {
        for length in [0_usize, 1, 253, 254, 255, 507, 508, 509, 1000] {
            for zero in [None, Some(0), Some(length / 2), Some(length.saturating_sub(1))] {
                let mut data = vec![7_u8; length];
                if let Some(at) = zero.filter(|at| *at < length) {
                    data[at] = 0;
                }
                let encoded = encode(&[&data]);
                assert_eq!(cobs::decode_vec(&encoded).unwrap(), data, "{length} {zero:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn the_crate_reads_what_we_write(data in proptest::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..1500), cut in any::<prop::sample::Index>()) {
            let (a, b) = data.split_at(cut.index(data.len() + 1));
            let mut encoded = encode(&[a, b]);
            prop_assert_eq!(encoded.iter().filter(|byte| **byte == 0).count(), 1);
            prop_assert_eq!(&cobs::decode_vec(&encoded).unwrap(), &data);
            let end = encoded.len() - 1;
            let length = decode_in_place(&mut encoded[..end]).unwrap();
            prop_assert_eq!(&encoded[..length], &data[..]);
        }

        #[test]
        fn any_bytes_decode_or_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Some(length) = decode_in_place(&mut bytes) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}
