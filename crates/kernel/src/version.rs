//! Debian's order of package versions (deb-version(7)).

use std::cmp::Ordering;

/// Compares `[epoch:]upstream[-revision]`.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    let ((epoch_a, upstream_a, revision_a), (epoch_b, upstream_b, revision_b)) = (split(a), split(b));
    epoch_a
        .cmp(&epoch_b)
        .then_with(|| compare_part(upstream_a, upstream_b))
        .then_with(|| compare_part(revision_a, revision_b))
}

fn split(version: &str) -> (u64, &str, &str) {
    let (epoch, rest) = match version.split_once(':') {
        Some((epoch, rest)) => (epoch.parse().unwrap_or(0), rest),
        None => (0, version),
    };
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
    (epoch, upstream, revision)
}

/// By turns the longest part without digits, by [`weight`], and the longest part of digits, as a number.
fn compare_part(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !a.is_empty() || !b.is_empty() {
        let is_digit = u8::is_ascii_digit;
        let (text_a, rest_a) = a.split_at(a.iter().position(is_digit).unwrap_or(a.len()));
        let (text_b, rest_b) = b.split_at(b.iter().position(is_digit).unwrap_or(b.len()));
        for at in 0..text_a.len().max(text_b.len()) {
            let order = weight(text_a.get(at)).cmp(&weight(text_b.get(at)));
            if order.is_ne() {
                return order;
            }
        }
        let (digits_a, digits_b);
        (digits_a, a) = rest_a.split_at(rest_a.iter().position(|b| !is_digit(b)).unwrap_or(rest_a.len()));
        (digits_b, b) = rest_b.split_at(rest_b.iter().position(|b| !is_digit(b)).unwrap_or(rest_b.len()));
        let (number_a, number_b) = (without_zeros(digits_a), without_zeros(digits_b));
        let order = number_a
            .len()
            .cmp(&number_b.len())
            .then_with(|| number_a.cmp(number_b));
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

fn without_zeros(digits: &[u8]) -> &[u8] {
    &digits[digits.iter().position(|b| *b != b'0').unwrap_or(digits.len())..]
}

/// `~` before the end, the end before letters, letters before all else.
fn weight(byte: Option<&u8>) -> u16 {
    match byte {
        Some(b'~') => 0,
        None => 1,
        Some(b) if b.is_ascii_alphabetic() => u16::from(*b) + 1,
        Some(b) => u16::from(*b) + 256,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn orders_as_dpkg_does() {
        let ascending = [
            "1.0~rc1-1",
            "1.0-1",
            "1.0-1+b1",
            "1.0+x-1",
            "1.01-2",
            "1.9-1",
            "1.10-1",
            "6.1.9-1",
            "6.1.192-2",
            "6.12.117-1~deb12u1",
            "6.12.117-1",
            "6.12.117-10",
            "1:0.1",
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} {b}");
            }
        }
        assert_eq!(compare("1.0", "1.00"), Ordering::Equal);
    }

    #[test]
    fn agrees_with_dpkg_itself() {
        let versions = [
            "6.1.0-1",
            "6.1.0~1",
            "6.1.0+1-1",
            "6.1a",
            "6.1.0a~b",
            "0:6.1.0-1",
            "6.1.0-1~",
            "6.01.0-1",
        ];
        for a in versions {
            for b in versions {
                let dpkg = |relation| {
                    std::process::Command::new("dpkg")
                        .args(["--compare-versions", a, relation, b])
                        .status()
                };
                let Ok(less) = dpkg("lt") else {
                    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
                    {
                        eprintln!("SKIPPED: dpkg is not installed");
                    }
                    return;
                };
                assert_eq!(compare(a, b).is_lt(), less.success(), "{a} lt {b}");
                assert_eq!(compare(a, b).is_eq(), dpkg("eq").unwrap().success(), "{a} eq {b}");
            }
        }
    }

    proptest! {
        #[test]
        fn is_an_order(a in "[0-9a-z.~+:-]{0,12}", b in "[0-9a-z.~+:-]{0,12}") {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            prop_assert!(compare(&a, &a).is_eq());
        }
    }
}
