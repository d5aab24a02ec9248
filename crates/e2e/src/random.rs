//! Numbers that look random and can be had again: a failed test names its seed.

use std::time::{SystemTime, UNIX_EPOCH};

/// SplitMix64 (Steele, Lea, Flood, 2014).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Seeded by `OFFSHOOT_TEST_SEED`, else by the time; says which.
    pub fn seeded() -> Self {
        let seed = match std::env::var("OFFSHOOT_TEST_SEED") {
            Ok(text) => text.parse().expect("OFFSHOOT_TEST_SEED is a number"),
            Err(_) => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |time| u64::from(time.subsec_nanos())),
        };
        crate::tell(&format!("OFFSHOOT_TEST_SEED={seed}"));
        Self(seed)
    }

    /// Another row of numbers, for another thread: it depends on the seed alone, not on what the others do.
    pub fn fork(&mut self) -> Self {
        Self(u64::from(self.next_u32()) << 32 | u64::from(self.next_u32()))
    }

    /// From 0 to just below 1.
    pub fn fraction(&mut self) -> f64 {
        // As exact as a test needs.
        f64::from(self.next_u32()) / f64::from(u32::MAX)
    }

    /// From 0 to just below `end`, which is more than 0.
    pub fn below(&mut self, end: usize) -> usize {
        // The remainder prefers small numbers by less than one in a million for what tests choose from.
        self.next_u32() as usize % end
    }

    fn next_u32(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 32) as u32
    }
}
