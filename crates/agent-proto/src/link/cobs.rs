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
        while let Some(first) = data.first() {
            if self.run == MAX_RUN {
                self.close_run(MAX_RUN + 1);
            }
            if *first == 0 {
                self.close_run(self.run + 1);
                data = self.push_zeros(&data[1..]);
                continue;
            }
            let window = &data[..data.len().min(MAX_RUN - self.run)];
            let length = find_zero(window).unwrap_or(window.len());
            self.out.extend_from_slice(&window[..length]);
            self.run += length;
            data = &data[length..];
        }
    }

    /// Appends the zeros that `data` begins with, which is what tars, disks and memory are full of: after a zero each
    /// is an empty run.
    fn push_zeros<'d>(&mut self, data: &'d [u8]) -> &'d [u8] {
        let zeros = data.iter().take_while(|byte| **byte == 0).count();
        if zeros > 0 {
            self.out[self.code_at] = 1;
            self.out.resize(self.out.len() + zeros, 1);
            self.code_at = self.out.len() - 1;
        }
        &data[zeros..]
    }

    /// Ends the frame with its delimiter.
    pub(super) fn finish(self) {
        self.out[self.code_at] = (self.run + 1) as u8;
        self.out.push(0);
    }
}

/// The first zero. Runs in binary data are mostly short, and then calling a search costs more than the search.
fn find_zero(window: &[u8]) -> Option<usize> {
    const SHORT: usize = 8;
    let (near, far) = window.split_at(window.len().min(SHORT));
    near.iter()
        .position(|byte| *byte == 0)
        .or_else(|| memchr::memchr(0, far).map(|at| at + near.len()))
}

/// Undoes the stuffing of one frame without its delimiter; returns the payload's length, or nothing for bytes that
/// no encoder made.
pub(super) fn decode_in_place(frame: &mut [u8]) -> Option<usize> {
    let (mut from, mut to) = (0, 0);
    while from < frame.len() {
        let code = usize::from(frame[from]);
        if code == 1 && from + 1 < frame.len() {
            frame[to] = 0;
            (from, to) = (from + 1, to + 1);
            continue;
        }
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
    fn zeros_are_empty_runs() {
        for length in [1_usize, 2, 253, 254, 255, 300, 5000] {
            for lead in [0_usize, 1, 253, 254, 255] {
                let data = [vec![9; lead], vec![0; length], vec![9], vec![0; length]].concat();
                assert_eq!(
                    cobs::decode_vec(&encode(&[&data])).unwrap(),
                    data,
                    "{lead} {length}"
                );
            }
        }
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
