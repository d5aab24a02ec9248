//! Files of the store from outside: what they take, what they hold, and how they are damaged for a test.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use crate::text;

/// What a file, or a folder with all that is in it, takes on disk, bytes, by du(1).
pub fn allocated(path: &Path) -> u64 {
    let output = Command::new("du")
        .args(["-s", "-B1"])
        .arg(path)
        .output()
        .expect("du");
    let words = text(&output.stdout);
    // It fails for what vanishes meanwhile, and still counts the rest.
    let bytes = words.split_whitespace().next().and_then(|word| word.parse().ok());
    bytes.unwrap_or_else(|| panic!("du {}: {}", path.display(), text(&output.stderr)))
}

/// The SHA-256 of a file, 64 digits.
pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum")
        .arg("--")
        .arg(path)
        .output()
        .expect("sha256sum");
    assert!(output.status.success(), "{}", text(&output.stderr));
    // A name with a backslash gives a line that begins with one.
    text(&output.stdout).trim_start_matches('\\')[..64].to_owned()
}

/// The SHA-256 of a file's name, time and content, 64 digits; holes are not read, so that a thin disk takes no time.
pub fn sha256_of_data(path: &Path) -> String {
    let output = Command::new("sh")
        .args([
            "-c",
            "tar --sparse --hole-detection=seek -cPf - -- \"$0\" | sha256sum",
        ])
        .arg(path)
        .output()
        .expect("tar");
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        text(&output.stderr)
    );
    text(&output.stdout)[..64].to_owned()
}

/// Gives a file bytes of its own, as others may have it by hard links: every test does, from the golden data.
pub fn own_copy(path: &Path) {
    let mut name = path.file_name().expect("a file").to_owned();
    name.push(".own");
    let copy = path.with_file_name(name);
    let copied = Command::new("cp")
        .args(["--preserve=all", "--sparse=always", "--"])
        .args([path, &copy])
        .status();
    assert!(copied.is_ok_and(|status| status.success()), "cp");
    std::fs::rename(copy, path).expect("rename");
}

/// Turns the bits of one byte of a file that is the test's own; gives what it was.
pub fn flip_byte(path: &Path, at: u64) -> u8 {
    let mut byte = [0];
    let file = std::fs::File::open(path).expect("open");
    file.read_exact_at(&mut byte, at).expect("read");
    put_byte(path, at, !byte[0]);
    byte[0]
}

/// Writes one byte of a file that is the test's own, and keeps its times.
pub fn put_byte(path: &Path, at: u64, byte: u8) {
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("open");
    let modified = file.metadata().and_then(|meta| meta.modified()).expect("a time");
    file.write_all_at(&[byte], at).expect("write");
    // What damages a disk does not leave a new time behind.
    file.set_modified(modified).expect("set the time");
    file.sync_all().expect("sync");
}
