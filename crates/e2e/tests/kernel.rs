//! Kernels that are compiled: by the real CLI and daemon out of a tree that builds in a moment, and once out of Linux itself.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use offshoot_e2e::{Daemon, IMAGE, SshClient, names, tar_of, tell, text, wait_until};
use rustix::process::Signal;
use serde_json::Value;

/// The daemon's user for compilers: the second id before the first VMM's (docs/config.md).
const BUILDER: u32 = 1_899_999_999;

/// A tarball with a Makefile that takes a kernel which is there for its own, after `script`.
fn tree(daemon: &Daemon, script: &str) -> PathBuf {
    let makefile = format!(
        "VERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 1\nallnoconfig:\n\tcp $(KCONFIG_ALLCONFIG) .config\n\
         vmlinux:\n\t@echo '  CC      one.o'\n\t@{script}\n\tcp kernel.elf vmlinux\n"
    );
    let listed: Value = serde_json::from_str(&daemon.ok(["kernel", "ls", "--output", "json"])).unwrap();
    let id = listed[0]["id"].as_str().expect("the golden kernel");
    let kernel = daemon.data().join("kernels").join(id).join("vmlinux");
    let path = daemon.root().join("linux.tar");
    tar_of(&path, |dir| {
        std::fs::create_dir(dir.join("linux")).unwrap();
        std::fs::write(dir.join("linux/Makefile"), makefile).unwrap();
        std::fs::copy(kernel, dir.join("linux/kernel.elf")).unwrap();
    });
    path
}

/// Processes of a build that have this word in their command line.
fn compilers(mark: &str) -> usize {
    let of_a_build = |pid: &String| {
        let folder = Path::new("/proc").join(pid);
        std::fs::metadata(&folder).is_ok_and(|metadata| metadata.uid() == BUILDER)
            && std::fs::read(folder.join("cmdline")).is_ok_and(|line| text(&line).contains(mark))
    };
    let pids = names(Path::new("/proc"));
    pids.iter()
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .filter(|pid| of_a_build(pid))
        .count()
}

#[test]
fn a_compiled_kernel_is_listed_and_no_default_until_it_is_chosen() {
    let daemon = Daemon::start();
    let path = tree(&daemon, "true");
    let path = path.to_str().unwrap();
    let said = daemon.ok([
        "kernel", "build", "--jobs", "2", "--source", path, "--output", "json",
    ]);
    let kernel: Value = serde_json::from_str(&said).unwrap();
    let id = kernel["id"].as_str().unwrap();
    assert_eq!(kernel["default"], false);
    let source = kernel["source"].as_str().unwrap();
    assert!(source.starts_with("compiled tarball sha256:"), "{source}");
    let listed = daemon.ok(["kernel", "ls"]);
    assert!(
        listed
            .lines()
            .any(|line| line.starts_with(id) && line.contains("compiled")),
        "{listed}"
    );
    // The agent is alone in its initramfs.
    let manifest = std::fs::read(daemon.data().join("kernels").join(id).join("kernel.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["modules"], serde_json::json!([]));
    assert_eq!(manifest["source"]["kind"], "compiled");
    assert!(
        manifest["source"]["compiler"].as_str().unwrap().contains("gcc"),
        "{manifest}"
    );

    // A VM names its kernel.
    daemon.ok(["create", "--name", "one", "--kernel", id, IMAGE]);
    assert_eq!(daemon.inspect("one")["kernel"], id);
    let error = daemon
        .cli(["create", "--kernel", "0123456789abcdef", IMAGE])
        .fails(1);
    assert!(error.contains("there is no kernel 0123456789abcdef"), "{error}");
    daemon.cli(["create", "--kernel", "x", IMAGE]).fails(2);
    assert_eq!(daemon.ok(["kernel", "default", id]), id);
    daemon.ok(["create", "--name", "two", IMAGE]);
    assert_eq!(daemon.inspect("two")["kernel"], id);
    daemon.finish();
}

#[test]
fn a_build_that_fails_says_what_the_compiler_said() {
    let daemon = Daemon::start();
    let path = tree(&daemon, "echo 'one.c:7: error: boom'; exit 1");
    let path = path.to_str().unwrap();
    let error = daemon.cli(["kernel", "build", "--source", path]).fails(1);
    assert!(error.starts_with("error: cannot compile a kernel\n"), "{error}");
    for words in [
        "compiling Linux 6.12.1 failed",
        "\n    one.c:7: error: boom\n",
        "\nhint: ",
    ] {
        assert!(error.contains(words), "{error}");
    }
    let fragment = daemon.root().join("fragment");
    std::fs::write(&fragment, "CONFIG_KVM=m\n").unwrap();
    let fragment = fragment.to_str().unwrap();
    let error = daemon
        .cli(["kernel", "build", "--source", path, "--config-fragment", fragment])
        .fails(1);
    assert!(error.contains("line 1 of the configuration fragment"), "{error}");
    let error = daemon
        .cli(["kernel", "build", "--source", "/etc/hostname"])
        .fails(1);
    assert!(error.contains("the tarball gives no source of Linux"), "{error}");
    daemon.cli(["kernel", "build", "--source", "/nowhere"]).fails(1);
    daemon.cli(["kernel", "build", "--jobs", "0"]).fails(2);
    let tmp = daemon.data().join("tmp");
    wait_until("what failed to be cleared away", || names(&tmp).is_empty());
    daemon.finish();
}

#[test]
fn ctrl_c_and_a_dead_daemon_end_the_compilers() {
    let mut daemon = Daemon::start();
    // No other test's compiler sleeps as long.
    let mark = (10_000_000 + u64::from(std::process::id())).to_string();
    let path = tree(&daemon, &format!("sleep {mark}"));
    let path = path.to_str().unwrap();
    let tmp = daemon.data().join("tmp");

    let mut build = daemon.cli(["kernel", "build", "--source", path]).spawn();
    wait_until("the compiler to run", || compilers(&mark) > 0);
    let pid = rustix::process::Pid::from_child(&build);
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    build.wait().unwrap();
    wait_until("the compilers to end", || compilers(&mark) == 0);
    wait_until("the build's folder to go", || names(&tmp).is_empty());

    let mut build = daemon.cli(["kernel", "build", "--source", path]).spawn();
    wait_until("the compiler to run", || compilers(&mark) > 0);
    daemon.kill();
    build.wait().unwrap();
    wait_until("the compilers to end without their daemon", || {
        compilers(&mark) == 0
    });
    daemon.start_again();
    assert_eq!(names(&tmp), [""; 0]);
    daemon.finish();
}

/// Compiles 3,000 files. `OFFSHOOT_TEST_VMLINUX` names a kernel that was compiled before, which spares
/// it.
#[test]
#[ignore = "compiles Linux; `make soak` runs it"]
fn linux_is_compiled_and_does_what_guests_need() {
    let daemon = Daemon::start();
    let said = match std::env::var_os("OFFSHOOT_TEST_VMLINUX") {
        Some(path) => {
            let default: Value =
                serde_json::from_str(&daemon.ok(["kernel", "ls", "--output", "json"])).unwrap();
            let path = path.to_str().expect("a path in UTF-8");
            let said = daemon.ok(["kernel", "add", "--vmlinux", path, "--output", "json"]);
            daemon.ok(["kernel", "default", default[0]["id"].as_str().unwrap()]);
            said
        }
        None => daemon.ok(["kernel", "build", "--output", "json"]),
    };
    let kernel: Value = serde_json::from_str(&said).unwrap();
    let id = kernel["id"].as_str().unwrap();
    let release = kernel["release"].as_str().unwrap();
    assert_eq!(
        kernel["features"],
        serde_json::json!(["block", "pmem", "virtiofs", "net", "vsock"])
    );

    let shared = daemon.root().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("from-host"), "hello").unwrap();
    let volume = format!("{}:/mnt", shared.display());
    let mut run = vec!["run", "-d", "--name", "block", "--kernel", id, "--root", "block"];
    let has_virtiofsd = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"]
        .iter()
        .any(|path| Path::new(path).exists());
    if has_virtiofsd {
        run.extend(["-v", &volume]);
    } else {
        tell("SKIPPED: without virtiofsd no folder is shared");
    }
    run.extend([IMAGE, "sleep", "100000"]);
    daemon.ok(run);
    let pmem = [
        "--name", "pmem", "--kernel", id, "--root", "pmem", IMAGE, "sleep", "100000",
    ];
    daemon.ok([&["run", "-d"], &pmem[..]].concat());

    for vm in ["block", "pmem"] {
        let sh = |script: &str| daemon.ok(["exec", vm, "sh", "-ec", script]);
        assert_eq!(sh("uname -r"), release);
        assert!(!sh("cat /proc/filesystems").is_empty());
        // The root is the base below the overlay disk; the work disk has a file system of its own.
        assert_eq!(sh("stat -f -c %T / /root"), "overlayfs\next2/ext3");
        assert_eq!(
            sh("echo x > /etc/written; echo y > /root/kept; cat /etc/written /root/kept"),
            "x\ny"
        );
        // Words of containers and of systemd.
        assert_eq!(
            sh("unshare --user --map-root-user --mount --pid --net --ipc --uts --cgroup --fork id -u"),
            "0"
        );
        assert!(
            sh("cat /sys/fs/cgroup/cgroup.controllers 2>/dev/null || cat /proc/cgroups").contains("memory")
        );
        sh(
            "mkdir -p /tmp/l /tmp/u /tmp/w /tmp/m && mount -t tmpfs t /tmp/u && mkdir /tmp/u/u /tmp/u/w && \
            mount -t overlay o -o lowerdir=/tmp/l,upperdir=/tmp/u/u,workdir=/tmp/u/w /tmp/m && echo z > /tmp/m/z",
        );
        let client = SshClient::of(&daemon);
        assert_eq!(
            client.ok("ssh", [&format!("{vm}.vm.internal"), "uname", "-r"]),
            release
        );
    }
    // Over their network, by name.
    let listen = "perl -MIO::Socket::INET -e '$s=IO::Socket::INET->new(Listen=>1,LocalPort=>7,ReuseAddr=>1) or die; \
                  $c=$s->accept; print $c \"over\"'";
    let other = daemon.cli(["exec", "pmem", "sh", "-c", listen]).spawn();
    let connect =
        "perl -MIO::Socket::INET -e '$s=IO::Socket::INET->new(\"pmem.vm.internal:7\") or exit 1; print <$s>'";
    wait_until("the other VM to answer", || {
        let said = daemon.cli(["exec", "block", "sh", "-c", connect]).run();
        said.status.success() && text(&said.stdout) == "over"
    });
    assert!(other.wait_with_output().unwrap().status.success());
    if has_virtiofsd {
        assert_eq!(daemon.ok(["exec", "block", "cat", "/mnt/from-host"]), "hello");
        daemon.ok(["exec", "block", "sh", "-c", "echo back > /mnt/from-guest"]);
        assert_eq!(
            std::fs::read_to_string(shared.join("from-guest")).unwrap(),
            "back\n"
        );
    }
    assert!(daemon.ok(["exec", "pmem", "cat", "/proc/mounts"]).lines().count() > 3);
    for vm in ["block", "pmem"] {
        daemon.ok(["stop", vm]);
        daemon.ok(["start", vm]);
        assert_eq!(
            daemon.ok(["exec", vm, "cat", "/etc/written", "/root/kept"]),
            "x\ny"
        );
    }
    daemon.finish();
}
