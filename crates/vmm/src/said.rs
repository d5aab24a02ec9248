//! What a program of ours complained, made fit for an error message.

/// The lines of what was said without control characters, which a terminal would act upon, and without empty lines.
pub(crate) fn plain_lines(said: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(said);
    let lines = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>());
    lines.filter(|line| !line.trim().is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_plain() {
        assert_eq!(
            plain_lines(b"a\x1b[31m\n\n \t\nb\0\r\n\xff"),
            ["a[31m", "b", "\u{fffd}"]
        );
        assert_eq!(plain_lines(b""), Vec::<String>::new());
    }
}
