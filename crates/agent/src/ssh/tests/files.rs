//! sftp and scp.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

use super::{PATIENCE, Rig, done, text};

impl Rig {
    async fn sftp(&self, user: &str, batch: &str) -> (bool, String, String) {
        fs::write(self.path("batch"), batch).unwrap();
        let mut command = self.client("sftp", "ed25519");
        command
            .arg("-b")
            .arg(self.path("batch"))
            .arg(format!("{user}@127.0.0.1"));
        let output = done(&mut command).await;
        (
            output.status.success(),
            text(&output.stdout),
            text(&output.stderr),
        )
    }
}

#[tokio::test]
async fn sftp_does_all_that_it_can() {
    let Some(rig) = Rig::new().await else { return };
    let folder = rig.path("d");
    let at = |name: &str| folder.join(name);
    fs::write(rig.path("small"), "small").unwrap();
    fs::set_permissions(rig.path("small"), fs::Permissions::from_mode(0o640)).unwrap();
    let (d, small, got) = (folder.display(), rig.path("small"), rig.path("got"));
    let batch = format!(
        "mkdir {d}\ncd {d}\npwd\nput -p {small} a\nrename a b\nchmod 600 b\nsymlink b link\nln b hard\n\
         ls -l\nget link {got}\ndf {d}\nmkdir sub\nrmdir sub\nrm hard\nput {small} over\nrename over b\n",
        small = small.display(),
        got = got.display(),
    );
    let (fine, out, err) = rig.sftp("root", &batch).await;
    assert!(fine, "{out}{err}");
    assert!(out.contains(&format!("Remote working directory: {d}")), "{out}");
    let line = |name: &str| {
        let mut lines = out.lines().filter(|line| !line.starts_with("sftp>"));
        let found = lines.find(|line| line.ends_with(&format!(" {name}")));
        found.unwrap_or_else(|| panic!("no {name} in {out}")).to_owned()
    };
    assert!(
        line("b").starts_with("-rw-------    2 root     root            5 "),
        "{out}"
    );
    assert!(line("link").starts_with("lrwxrwxrwx    1 root "), "{out}");
    assert_eq!(fs::read_to_string(got).unwrap(), "small");
    // OpenSSH renames over what is there, by its own extension.
    assert_eq!(fs::read_link(at("link")).unwrap().to_str(), Some("b"));
    assert_eq!(fs::metadata(at("b")).unwrap().mode() & 0o777, 0o640 & !0o022);
    assert!(!at("hard").exists() && !at("a").exists() && !at("over").exists());
    let (fine, _, err) = rig.sftp("root", "get /nonexistent/x\n").await;
    assert!(!fine && err.contains("not found"), "{err}");
}

#[tokio::test]
async fn files_are_those_of_who_logged_in() {
    let Some(rig) = Rig::new().await else { return };
    let theirs = rig.path("theirs");
    fs::create_dir(&theirs).unwrap();
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.starts_with("www-data:")).unwrap();
    let uid: u32 = line.split(':').nth(2).unwrap().parse().unwrap();
    chown(&theirs, Some(uid), Some(uid)).unwrap();
    fs::write(rig.path("x"), "x").unwrap();
    let (x, d) = (rig.path("x"), theirs.display());
    let (fine, out, err) = rig
        .sftp("www-data", &format!("put {} {d}/x\n", x.display()))
        .await;
    assert!(fine, "{out}{err}");
    assert_eq!(fs::metadata(theirs.join("x")).unwrap().uid(), uid);
    let (fine, _, err) = rig
        .sftp("www-data", &format!("get {}\n", rig.path("ed25519").display()))
        .await;
    assert!(!fine && err.contains("ermission denied"), "{err}");
    let (fine, _, err) = rig.sftp("www-data", "mkdir /root/x\n").await;
    assert!(!fine && err.contains("ermission denied"), "{err}");
}

#[tokio::test]
async fn folders_and_large_files_are_copied_whole() {
    let Some(rig) = Rig::new().await else { return };
    let tree = rig.path("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    let large: Vec<u8> = (0..25_000_000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(tree.join("a/large"), &large).unwrap();
    for n in 0..250 {
        fs::write(tree.join(format!("a/b/{n}")), n.to_string()).unwrap();
    }
    fs::set_permissions(tree.join("a/b/7"), fs::Permissions::from_mode(0o751)).unwrap();
    symlink("b/7", tree.join("a/link")).unwrap();
    for (old, more) in [(false, "-rp"), (true, "-rpO")] {
        // The old protocol needs the image's scp, and is otherwise the same.
        let (there, back) = (rig.path(&format!("there{old}")), rig.path(&format!("back{old}")));
        for (from, to) in [
            (
                tree.display().to_string(),
                format!("root@127.0.0.1:{}", there.display()),
            ),
            (
                format!("root@127.0.0.1:{}", there.display()),
                back.display().to_string(),
            ),
        ] {
            let mut command = rig.client("scp", "ed25519");
            let output = tokio::time::timeout(PATIENCE, command.args([more, &from, &to]).output());
            let output = output.await.expect("stuck").unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        assert!(fs::read(back.join("a/large")).unwrap() == large);
        assert_eq!(fs::read_dir(back.join("a/b")).unwrap().count(), 250);
        let (one, other) = (tree.join("a/b/7"), back.join("a/b/7"));
        let (one, other) = (fs::metadata(one).unwrap(), fs::metadata(other).unwrap());
        assert_eq!((one.mode(), one.mtime()), (other.mode(), other.mtime()));
    }
}
