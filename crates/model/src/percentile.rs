//! The one percentile that every table of measures shows.

/// The smallest of `sorted` that `percent` of all do not exceed (nearest rank); `None` where there is none.
pub fn percentile<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_nearest_rank() {
        let ten: Vec<u64> = (1..=10).collect();
        for (percent, expected) in [(0, 1), (1, 1), (50, 5), (90, 9), (91, 10), (99, 10), (100, 10)] {
            assert_eq!(percentile(&ten, percent), Some(expected), "{percent}");
        }
        assert_eq!(percentile(&[7], 50), Some(7));
        assert_eq!(percentile::<u64>(&[], 50), None);
    }
}
