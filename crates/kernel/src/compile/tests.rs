//! Trees that build as Linux does, in a moment: a Makefile with its targets, run as real processes by the real sandbox.

use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use offshoot_model::{ErrorKind, Explain as _, Progress, ProgressEvent};

use super::*;
use crate::bundle::tests::agent;
use crate::store::{KernelBundle, KernelError, KernelStore};
use crate::vmlinux::tests::{BANNER, elf};

const MAKEFILE: &str = "\
VERSION = 6
PATCHLEVEL = 12
SUBLEVEL = 1

allnoconfig:
\tcp $(KCONFIG_ALLCONFIG) .config
\t@EXTRA_CONFIG@

vmlinux:
\t@test $$(id -u):$$(id -G) = @USER@:@USER@
\t@test \"$$(grep CapBnd /proc/self/status | tr -d '\\t')\" = CapBnd:0000000000000000
\t@! touch /etc/offshoot-was-here 2>/dev/null
\t@test $$(ls -d /proc/[0-9]* | wc -l) -lt 20
\t@test $$(tail -n +3 /proc/net/dev | wc -l) -le 1
\t@test \"$$KBUILD_BUILD_USER $$KBUILD_BUILD_TIMESTAMP\" = 'offshoot 2023-11-14'
\t@echo '  CC      one.o'
\t@echo '  CC      two.o'
\t@EXTRA@
\t@test -L vmlinux || cp kernel.elf vmlinux
";

struct Fixture {
    dir: tempfile::TempDir,
    store: KernelStore,
    /// A user for this test alone, so that its processes are told from others.
    user: u32,
}

/// What a build said, in order.
type Said = Arc<Mutex<Vec<String>>>;

fn listener() -> (Progress, Said) {
    let said = Said::default();
    let sink = Arc::clone(&said);
    let progress = Progress::new(move |event| {
        let line = match event {
            ProgressEvent::Started { label, .. } => label,
            ProgressEvent::Message { text } => text,
            ProgressEvent::Moved { done, .. } => format!("at {done}"),
            ProgressEvent::Finished { .. } => return,
        };
        sink.lock().unwrap().push(line);
    });
    (progress, said)
}

impl Fixture {
    /// `None`, with the reason, where this host cannot compile.
    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
    async fn new(number: u32) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: compiling gives up rights, and needs root for that");
            return None;
        }
        let missing = tools::missing().await.unwrap();
        if !missing.is_empty() {
            eprintln!("SKIPPED: this host lacks {}", names(&missing));
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("agent"), agent(b"one")).unwrap();
        std::fs::write(dir.path().join("agent2"), agent(b"two")).unwrap();
        let store = KernelStore::open(&dir.path().join("data")).unwrap();
        Some(Self {
            dir,
            store,
            user: 1_899_000_000 + number,
        })
    }

    /// A tarball whose Makefile does more: to configure, and to compile.
    fn tarball(&self, configure: &str, compile: &str) -> PathBuf {
        let makefile = MAKEFILE
            .replace("@EXTRA_CONFIG@", configure)
            .replace("@EXTRA@", compile)
            .replace("@USER@", &self.user.to_string());
        let kernel = elf(object::elf::EM_X86_64.0, 18, BANNER);
        let mut tar = tar::Builder::new(Vec::new());
        for (name, data) in [
            ("linux/Makefile", makefile.as_bytes()),
            ("linux/kernel.elf", &kernel),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_mtime(1_700_000_000);
            header.set_size(data.len() as u64);
            tar.append_data(&mut header, name, data).unwrap();
        }
        let path = self.dir.path().join("linux.tar");
        std::fs::write(&path, tar.into_inner().unwrap()).unwrap();
        path
    }

    fn options(&self, source: PathBuf) -> CompileOptions {
        CompileOptions {
            source: Some(source),
            jobs: Some(2),
            user: self.user,
            ..CompileOptions::default()
        }
    }

    async fn compile(&self, options: &CompileOptions) -> Result<KernelBundle, KernelError> {
        let (progress, _) = listener();
        self.store
            .compile(&self.dir.path().join("agent"), options, &progress)
            .await
    }

    fn left_in_tmp(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("data/tmp"))
            .unwrap()
            .count()
    }

    fn processes(&self) -> usize {
        let ours = |entry: &std::fs::DirEntry| {
            let name = entry.file_name();
            name.to_string_lossy().bytes().all(|b| b.is_ascii_digit())
                && entry.metadata().is_ok_and(|metadata| metadata.uid() == self.user)
        };
        std::fs::read_dir("/proc").unwrap().flatten().filter(ours).count()
    }

    /// What is given up is cleared away in the background.
    async fn all_is_gone(&self) {
        let began = Instant::now();
        while self.left_in_tmp() > 0 || self.processes() > 0 {
            assert!(began.elapsed() < Duration::from_secs(20), "something is left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(self.store.list().unwrap(), []);
    }
}

#[tokio::test]
async fn a_tree_becomes_a_bundle_once() {
    let Some(fixture) = Fixture::new(1).await else {
        return;
    };
    let options = fixture.options(fixture.tarball("", "sh -c 'echo said >&2'"));
    let (progress, said) = listener();
    let (one, two) = (
        fixture.dir.path().join("agent"),
        fixture.dir.path().join("agent2"),
    );
    let bundle = fixture.store.compile(&one, &options, &progress).await.unwrap();
    let said_before: Vec<_> = said.lock().unwrap().drain(..).collect();
    assert_eq!(
        said_before,
        [
            "unpacking the source",
            "configuring Linux 6.12.1",
            "compiling Linux 6.12.1",
            "at 1",
            "at 2",
            "unpacking the kernel",
            "writing the initramfs"
        ]
    );
    assert_eq!(bundle.manifest.release, "6.12.1-test");
    assert_eq!(bundle.manifest.modules, [""; 0]);
    assert!(
        matches!(&bundle.manifest.source, KernelSource::Compiled { package, .. } if package == "tarball")
    );
    assert_eq!(fixture.left_in_tmp(), 0);
    // There is no other.
    assert_eq!(fixture.store.default().unwrap(), bundle);

    let again = fixture.store.compile(&one, &options, &progress).await.unwrap();
    assert_eq!(again, bundle);
    let words = format!("kernel {} was compiled of the same before", bundle.id);
    assert_eq!(*said.lock().unwrap(), [words]);
    let fresh = fixture.store.compile(&two, &options, &progress).await.unwrap();
    assert_ne!(fresh.id, bundle.id);
    assert_eq!(fresh.manifest.source, bundle.manifest.source);
    assert_eq!(fixture.store.default().unwrap(), bundle);
    assert_eq!(fixture.left_in_tmp(), 0);

    let other = CompileOptions {
        fragment: "CONFIG_KVM=y\n".into(),
        ..options
    };
    fixture.store.compile(&one, &other, &progress).await.unwrap();
    let compiled = |said: &[String]| said.iter().filter(|line| line.starts_with("compiling")).count();
    assert_eq!(compiled(&said.lock().unwrap()), 1);
}

#[tokio::test]
async fn a_compiler_that_fails_is_told_with_its_last_words() {
    let Some(fixture) = Fixture::new(2).await else {
        return;
    };
    let tarball = fixture.tarball("", "echo 'one.c:1: error: boom' >&2; exit 3");
    let error = fixture.compile(&fixture.options(tarball)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadContent);
    assert_eq!(error.to_string(), "cannot compile a kernel");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        cause.starts_with("compiling Linux 6.12.1 failed (exit status: 2):\n"),
        "{cause}"
    );
    assert!(cause.contains("\none.c:1: error: boom\n"), "{cause}");
    assert!(
        error.hints()[0].contains("--config-fragment"),
        "{:?}",
        error.hints()
    );
    fixture.all_is_gone().await;
}

#[tokio::test]
async fn an_option_that_is_dropped_fails_the_build() {
    let Some(fixture) = Fixture::new(3).await else {
        return;
    };
    let tarball = fixture.tarball(
        "sed -i '/CONFIG_EROFS_FS=/d;s/^# CONFIG_VT is.*/CONFIG_VT=y/' .config",
        "",
    );
    let error = fixture.compile(&fixture.options(tarball)).await.unwrap_err();
    assert_eq!(
        std::error::Error::source(&error).unwrap().to_string(),
        "Linux 6.12.1 does not take 2 of the options:\n  # CONFIG_VT is not set\n  CONFIG_EROFS_FS=y"
    );
    fixture.all_is_gone().await;
}

#[tokio::test]
async fn what_is_no_kernel_is_not_taken() {
    let Some(fixture) = Fixture::new(4).await else {
        return;
    };
    let check = async |compile: &str, expected: &str| {
        let tarball = fixture.tarball("", compile);
        let error = fixture.compile(&fixture.options(tarball)).await.unwrap_err();
        assert_eq!(std::error::Error::source(&error).unwrap().to_string(), expected);
        fixture.all_is_gone().await;
    };
    // Root reads it: a link may not choose what.
    check(
        "mv kernel.elf x && ln -s x kernel.elf && ln -s kernel.elf vmlinux && rm -f x",
        "make left no vmlinux",
    )
    .await;
}

#[tokio::test]
async fn a_build_that_is_given_up_leaves_nothing() {
    let Some(fixture) = Fixture::new(5).await else {
        return;
    };
    let tarball = fixture.tarball(
        "",
        "sleep 1000 & setsid sleep 1000 & echo '  CC      three.o'; sleep 1000",
    );
    let (progress, said) = listener();
    let (store, agent) = (fixture.store.clone(), fixture.dir.path().join("agent"));
    let options = fixture.options(tarball);
    let building = tokio::spawn(async move { store.compile(&agent, &options, &progress).await });
    let began = Instant::now();
    while !said.lock().unwrap().iter().any(|line| line == "at 3") {
        assert!(began.elapsed() < Duration::from_secs(20), "{said:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(fixture.processes() >= 3, "{}", fixture.processes());
    building.abort();
    assert!(building.await.unwrap_err().is_cancelled());
    fixture.all_is_gone().await;
    // Whoever comes next does not wait.
    let tarball = fixture.tarball("", "");
    fixture.compile(&fixture.options(tarball)).await.unwrap();
}

#[tokio::test]
async fn one_at_a_time_and_the_same_for_who_asks_meanwhile() {
    let Some(fixture) = Fixture::new(6).await else {
        return;
    };
    let options = fixture.options(fixture.tarball("", "sleep 0.3"));
    let agent = fixture.dir.path().join("agent");
    // As another process would.
    let other = KernelStore::open(&fixture.dir.path().join("data")).unwrap();
    let (progress, said) = listener();
    let (first, second, third) = tokio::join!(
        fixture.store.compile(&agent, &options, &progress),
        fixture.store.compile(&agent, &options, &progress),
        other.compile(&agent, &options, &progress),
    );
    let first = first.unwrap();
    assert_eq!((&second.unwrap(), &third.unwrap()), (&first, &first));
    let said = said.lock().unwrap();
    let count = |what: &str| said.iter().filter(|line| line.contains(what)).count();
    assert_eq!(count("compiling Linux"), 1, "{said:?}");
    // Both wait; the last one perhaps once more, for the one before it.
    assert!((2..=3).contains(&count("waiting for another kernel")), "{said:?}");
    assert_eq!(fixture.left_in_tmp(), 0);
}

#[tokio::test]
async fn a_disk_without_room_is_told_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    assert!(check_room(dir.path()).is_ok());
    let error = CompileError::NoRoom {
        path: "/data".into(),
        needed: ByteSize::from_mib(4096),
        available: ByteSize::from_mib(10),
    };
    assert_eq!(
        error.to_string(),
        "compiling takes 4GiB of disk, and /data has 10MiB left"
    );
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[test]
fn days_are_those_of_the_calendar() {
    for (seconds, expected) in [
        (0, "1970-01-01"),
        (951_782_400, "2000-02-29"),
        (1_700_000_000, "2023-11-14"),
        (1_798_761_599, "2026-12-31"),
        (4_107_542_400, "2100-03-01"),
    ] {
        assert_eq!(date(seconds), expected);
    }
}

#[test]
fn steps_are_told_from_other_words() {
    for (line, expected) in [
        ("  CC      fs/ext4/inode.o", true),
        ("  LD      vmlinux", true),
        ("  OBJCOPY x", true),
        ("  HOSTCC  scripts/kconfig/conf.o", true),
        ("make[1]: Entering directory", false),
        ("fs/x.c:1: warning: unused", false),
        ("  warning: unused", false),
    ] {
        assert_eq!(is_step(line), expected, "{line}");
    }
}

#[test]
fn errors_say_what_and_what_to_do() {
    let missing = |name, package| Missing { name, package };
    let error = CompileError::NotInstalled {
        missing: vec![missing("flex", "flex"), missing("libelf", "libelf-dev")],
    };
    assert_eq!(error.to_string(), "this host lacks flex, libelf");
    assert_eq!(
        error.hints(),
        ["run `apt-get install --no-install-recommends flex libelf-dev`"]
    );
    let error = CompileError::Lost {
        version: "6.12.1".into(),
        options: (0..22).map(|n| format!("CONFIG_{n}=y")).collect(),
    };
    let text = error.to_string();
    assert!(
        text.starts_with("Linux 6.12.1 does not take 22 of the options:\n  CONFIG_0=y\n"),
        "{text}"
    );
    assert!(text.ends_with("\n  CONFIG_19=y\n  and 2 more"), "{text}");
}

#[tokio::test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
async fn what_was_asked_for_is_in_the_source() {
    let fragment_digest = |plan: &CompilePlan| match &plan.source {
        KernelSource::Compiled { config, .. } => *config,
        other => panic!("{other:?}"),
    };
    let dir = tempfile::tempdir().unwrap();
    let tarball = dir.path().join("t");
    std::fs::write(&tarball, "x").unwrap();
    let options = CompileOptions {
        source: Some(tarball),
        ..CompileOptions::default()
    };
    let Ok(first) = plan(&options).await else {
        eprintln!("SKIPPED: this host cannot compile Linux");
        return;
    };
    assert!(
        first
            .source
            .to_string()
            .starts_with("compiled tarball sha256:2d711642"),
        "{}",
        first.source
    );
    let options = CompileOptions {
        fragment: "CONFIG_KVM=y\n".into(),
        ..options
    };
    let other = plan(&options).await.unwrap();
    assert_ne!(fragment_digest(&first), fragment_digest(&other));
}
