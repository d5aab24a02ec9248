//! Measures of one side, and how they and two sides are printed.

use std::time::Duration;

use offshoot_model::percentile;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Milliseconds.
    Ms,
    /// 1024 bytes.
    KiB,
    /// 1024 × 1024 bytes.
    MiB,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::KiB => "KiB",
            Self::MiB => "MiB",
        }
    }
}

/// Measures of the same thing, in order of size.
#[derive(Clone, Debug)]
pub(crate) struct Samples {
    unit: Unit,
    values: Vec<f64>,
}

impl Samples {
    /// For times, printed in milliseconds.
    pub(crate) fn new() -> Self {
        Self::of(Unit::Ms)
    }

    /// For measures that are printed in `unit`.
    pub(crate) fn of(unit: Unit) -> Self {
        Self {
            unit,
            values: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, time: Duration) {
        self.put(time.as_secs_f64() * 1000.0);
    }

    pub(crate) fn push_bytes(&mut self, bytes: u64) {
        let unit = match self.unit {
            Unit::Ms => unreachable!("bytes are no time"),
            Unit::KiB => 1024.0,
            Unit::MiB => 1024.0 * 1024.0,
        };
        // Exact up to 8 PiB.
        self.put(bytes as f64 / unit);
    }

    fn put(&mut self, value: f64) {
        let at = self.values.partition_point(|other| *other <= value);
        self.values.insert(at, value);
    }

    /// The smallest value that `percent` of all do not exceed (nearest rank); 0 where there is none.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        percentile(&self.values, percent).unwrap_or_default()
    }

    pub(crate) fn print(&self, name: &str) {
        let unit = self.unit.name();
        println!(
            "  {name:<34} N {:>3}   p50 {:>9.2} {unit}   p90 {:>9.2} {unit}   p99 {:>9.2} {unit}",
            self.values.len(),
            self.percentile(50),
            self.percentile(90),
            self.percentile(99)
        );
    }

    /// The medians of both, one by the other.
    pub(crate) fn ratio_to(&self, other: &Self) -> f64 {
        self.percentile(50) / other.percentile(50)
    }
}

/// Prints A, B and A/B.
pub(crate) fn compare(a_name: &str, a: &Samples, b_name: &str, b: &Samples) {
    a.print(a_name);
    b.print(b_name);
    println!("  ratio of the medians: {:.2}", a.ratio_to(b));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(samples: &Samples, percent: usize, expected: f64) {
        let found = samples.percentile(percent);
        assert!((found - expected).abs() < 1e-9, "{percent}: {found}");
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut samples = Samples::new();
        for n in (1..=10).rev() {
            samples.push(Duration::from_millis(n));
        }
        for (percent, ms) in [(50, 5.0), (90, 9.0), (99, 10.0), (1, 1.0)] {
            check(&samples, percent, ms);
        }
        check(&Samples::new(), 50, 0.0);
    }

    #[test]
    fn bytes_are_told_in_their_unit() {
        let (mut small, mut large) = (Samples::of(Unit::KiB), Samples::of(Unit::MiB));
        for bytes in [3 << 20, 1 << 20, 2 << 20] {
            small.push_bytes(bytes);
            large.push_bytes(bytes);
        }
        check(&small, 50, 2048.0);
        check(&large, 50, 2.0);
        assert!((small.ratio_to(&small) - 1.0).abs() < 1e-9);
    }
}
