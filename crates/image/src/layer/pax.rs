//! Records of pax extended headers: `<length> <key>=<value>\n`, the length being that of the whole record.
//!
//! See POSIX.1-2017, pax, "pax Extended Header". Values are bytes: file capabilities hold newlines and NULs.

use super::entry::Time;
use super::error::TarProblem;

/// One key and its value.
pub(super) type Record = (Vec<u8>, Vec<u8>);

/// Takes the body of an extended header apart.
pub(super) fn records(mut body: &[u8]) -> Result<Vec<Record>, TarProblem> {
    let mut records = Vec::new();
    // Some writers fill the body with NULs up to the block.
    while body.first().is_some_and(|byte| *byte != 0) {
        let space = body
            .iter()
            .position(|byte| *byte == b' ')
            .ok_or(TarProblem::Pax)?;
        let length: usize = decimal(&body[..space])
            .and_then(|n| n.try_into().ok())
            .ok_or(TarProblem::Pax)?;
        if length <= space + 1 || length > body.len() || body[length - 1] != b'\n' {
            return Err(TarProblem::Pax);
        }
        let record = &body[space + 1..length - 1];
        let equals = record
            .iter()
            .position(|byte| *byte == b'=')
            .filter(|at| *at > 0)
            .ok_or(TarProblem::Pax)?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        body = &body[length..];
    }
    Ok(records)
}

/// A number of ASCII digits and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

/// A time as pax writes it: seconds, perhaps negative, perhaps with a fraction. Digits below nanoseconds are cut off.
pub(super) fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, &b""[..]),
    };
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let mut nanos = 0;
    for place in 0..9 {
        let digit = fraction.get(place).copied().unwrap_or(b'0');
        nanos = nanos * 10 + u32::from(digit.is_ascii_digit().then(|| digit - b'0')?);
    }
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(match (negative, nanos) {
        (false, _) => Time { seconds, nanos },
        (true, 0) => Time {
            seconds: -seconds,
            nanos,
        },
        // Nanoseconds always count forwards: -1.25 s is 0.75 s after -2 s.
        (true, _) => Time {
            seconds: -seconds - 1,
            nanos: 1_000_000_000 - nanos,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_bytes_and_not_lines() {
        let check = |body: &[u8], expected: Option<&[(&[u8], &[u8])]>| {
            let expected = expected.map(|r| {
                r.iter()
                    .map(|(k, v)| (k.to_vec(), v.to_vec()))
                    .collect::<Vec<_>>()
            });
            assert_eq!(records(body).ok(), expected, "{}", body.escape_ascii());
        };
        check(b"", Some(&[]));
        check(b"12 path=a/b\n", Some(&[(b"path", b"a/b")]));
        check(b"8 a=\n\n=\n\0\0", Some(&[(b"a", b"\n\n=")]));
        check(b"6 a=b\n5 c=\n", Some(&[(b"a", b"b"), (b"c", b"")]));
        for bad in [
            &b"x"[..],
            b"6 a=b",
            b"7 a=b\n",
            b"5 a=b\n",
            b"6 =bc\n",
            b"99999999999999999999999 a=b\n",
            b"-6 a=b\n",
            b"2 \n",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn times_count_forwards() {
        let check = |text: &str, expected: Option<(i64, u32)>| {
            assert_eq!(
                time(text.as_bytes()).map(|t| (t.seconds, t.nanos)),
                expected,
                "{text}"
            );
        };
        check("0", Some((0, 0)));
        check("1700000000.5", Some((1_700_000_000, 500_000_000)));
        check("1.0000000019", Some((1, 1)));
        check("-1.25", Some((-2, 750_000_000)));
        check("-3", Some((-3, 0)));
        for bad in [
            "",
            "-",
            ".5",
            "1.x",
            "1e3",
            "1.123456789x",
            "99999999999999999999",
        ] {
            check(bad, None);
        }
    }
}
