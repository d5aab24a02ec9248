//! Times of one side, and how two sides are printed.

use std::time::Duration;

/// Times of the same thing.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn push(&mut self, time: Duration) {
        self.0.push(time);
        self.0.sort();
    }

    /// The smallest time that `percent` of all do not exceed (nearest rank).
    fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }

    pub(crate) fn print(&self, name: &str) {
        let ms = |percent| self.percentile(percent).as_secs_f64() * 1000.0;
        println!(
            "  {name:<34} N {:>3}   p50 {:>9.1} ms   p90 {:>9.1} ms   p99 {:>9.1} ms",
            self.0.len(),
            ms(50),
            ms(90),
            ms(99)
        );
    }
}

/// Prints A, B and A/B.
pub(crate) fn compare(a_name: &str, a: &Samples, b_name: &str, b: &Samples) {
    a.print(a_name);
    b.print(b_name);
    println!(
        "  ratio of the medians: {:.2}",
        a.percentile(50).as_secs_f64() / b.percentile(50).as_secs_f64()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut samples = Samples::new();
        for n in (1..=10).rev() {
            samples.push(Duration::from_millis(n));
        }
        for (percent, ms) in [(50, 5), (90, 9), (99, 10), (1, 1)] {
            assert_eq!(
                samples.percentile(percent),
                Duration::from_millis(ms),
                "{percent}"
            );
        }
    }
}
