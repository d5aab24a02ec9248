//! What files are like, told by the same few lines of shell in a guest and on the host.
//!
//! What is expected of a guest is unpacked from the image's layers by tar(1), which knows nothing of us.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::text;

/// Everything about regular files whose names come on standard input, relative to the working directory.
pub const FILE_FACTS: &str = "set -e; export LC_ALL=C; list=$(cat)
printf '%s\\n' \"$list\" | xargs -d '\\n' stat -c '%n mode=%f owner=%u:%g links=%h size=%s changed=%Y' --
printf '%s\\n' \"$list\" | xargs -d '\\n' sha256sum --";

/// The same for names of any kind: what holds for folders, devices and links as well.
pub const ODD_FACTS: &str = "set -e; export LC_ALL=C
xargs -d '\\n' stat -c '%N mode=%f owner=%u:%g device=%t:%T' --";

/// Extended attributes in hex. Debian's smallest perl can ask for them; 192 is `lgetxattr` on x86-64.
pub const XATTR_FACTS: &str = r#"export LC_ALL=C; exec xargs -d '\n' perl -e '
for my $file (@ARGV) {
    for my $attribute ("security.capability", "user.colour") {
        my ($path, $name, $value) = ($file, $attribute, "\0" x 256);
        my $length = syscall(192, $path, $name, $value, 256);
        print "$file $attribute ", $length < 0 ? "none" : unpack("H*", substr($value, 0, $length)), "\n";
    }
}'"#;

/// Unpacks layers, lowest first, with owners, modes, times and attributes. They may hold no whiteouts.
pub fn unpack(layers: &[PathBuf]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for layer in layers {
        let output = Command::new("tar")
            .args([
                "--numeric-owner",
                "--xattrs",
                "--xattrs-include=*",
                "-p",
                "-x",
                "-C",
            ])
            .arg(dir.path())
            .arg("-f")
            .arg(layer)
            .output()
            .expect("tar");
        assert!(output.status.success(), "tar: {}", text(&output.stderr));
    }
    dir
}

/// So many regular files below `root/below`, none large, spread evenly over all of them.
pub fn sample(root: &Path, below: &str, count: usize) -> String {
    let output = Command::new("sh")
        .args([
            "-c",
            "find \"$0\" -xdev -type f -size -256k | LC_ALL=C sort",
            below,
        ])
        .current_dir(root)
        .output()
        .expect("find");
    let all = text(&output.stdout);
    let all: Vec<&str> = all.lines().collect();
    assert!(all.len() >= count, "only {} files below {below}", all.len());
    let chosen = (0..count).map(|n| all[n * all.len() / count]);
    chosen.map(|name| format!("{name}\n")).collect()
}

/// What `script` says on the host about `names` below `root`.
pub fn view(root: &Path, script: &str, names: &str) -> String {
    let mut child = Command::new("sh")
        .args(["-c", script])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("sh");
    let mut pipe = child.stdin.take().expect("piped");
    let names = names.to_owned();
    let writer = std::thread::spawn(move || pipe.write_all(names.as_bytes()));
    let output = child.wait_with_output().expect("sh ends");
    let _ = writer.join();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout).trim_end_matches('\n').to_owned()
}
