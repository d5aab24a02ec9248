//! The agent in a real VM, under emulation where there is nothing better.
//!
//! Needs QEMU and three files, named by the environment; without them the tests are skipped:
//!
//! - `OFFSHOOT_TEST_KERNEL`: a kernel, `vmlinux` or `bzImage`
//! - `OFFSHOOT_TEST_INITRAMFS`: an initramfs with the agent as `/init` and `/modules`
//! - `OFFSHOOT_TEST_ROOT`: a Debian root, EROFS
//! - `OFFSHOOT_TEST_SYSTEMD_ROOT`: the same with `systemd-sysv` (for the last test only)

#![expect(
    clippy::print_stderr,
    reason = "a test says what it measured and why it was skipped"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "what QEMU does outside has no event to wait for; every wait ends at a state"
)]

mod network;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use offshoot_agent_proto::client::{
    AgentClient, CallError, MainStart, OutputStream, ProcessEvent, ProcessEvents, StartRefusal,
};
use offshoot_agent_proto::v1;
use offshoot_agent_proto::v1::configure_request::Root;
use offshoot_agent_proto::v1::start_main_request::What as Start;

/// Longer than any boot or call takes under emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

const TERM: u32 = 15;

struct Images {
    kernel: PathBuf,
    initramfs: PathBuf,
    root: PathBuf,
}

fn images(root: &str) -> Option<Images> {
    let file = |name: &str| {
        let path = std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.exists());
        if path.is_none() {
            eprintln!("SKIPPED: {name} names no file");
        }
        path
    };
    Some(Images {
        kernel: file("OFFSHOOT_TEST_KERNEL")?,
        initramfs: file("OFFSHOOT_TEST_INITRAMFS")?,
        root: file(root)?,
    })
}

/// A QEMU of ours, gone with the test.
struct Machine {
    qemu: Child,
    folder: tempfile::TempDir,
    started: Instant,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    fn boot(images: &Images) -> Self {
        Self::boot_with(images, &[])
    }

    /// With more arguments for QEMU.
    fn boot_with(images: &Images, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let overlay = folder.path().join("overlay.ext4");
        File::create(&overlay).unwrap().set_len(64 << 20).unwrap();
        // As a seed is made.
        let mke2fs = Command::new("mke2fs")
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-b",
                "4096",
                "-m",
                "0",
                "-J",
                "size=4",
                "-O",
                "^resize_inode,meta_bg",
            ])
            .args([
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
            ])
            .arg(&overlay)
            .status();
        assert!(mke2fs.unwrap().success());
        // As the host does it with a seed: the disk is larger than its file system.
        File::options()
            .write(true)
            .open(&overlay)
            .unwrap()
            .set_len(4 << 30)
            .unwrap();
        let drive = |id: &str, file: &Path, more: &str| {
            let drive = format!("if=none,id={id},file={},format=raw{more}", file.display());
            [
                "-drive".to_owned(),
                drive,
                "-device".to_owned(),
                format!("virtio-blk-pci,drive={id},serial={id}"),
            ]
        };
        let socket = folder.path().join("agent.sock");
        let started = Instant::now();
        let qemu = Command::new("qemu-system-x86_64")
            .args([
                "-machine",
                "microvm,accel=tcg,pcie=on",
                "-cpu",
                "max",
                "-m",
                "512",
            ])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet reboot=t tsc=reliable no_timer_check tsc_early_khz={}",
                tsc_khz()
            ))
            .arg("-serial")
            .arg(format!("file:{}", folder.path().join("console.log").display()))
            .arg("-kernel")
            .arg(&images.kernel)
            .arg("-initrd")
            .arg(&images.initramfs)
            .args([
                "-device",
                "virtio-serial-pci",
                "-device",
                "virtserialport,chardev=agent,name=offshoot.agent",
            ])
            .arg("-chardev")
            .arg(format!(
                "socket,id=agent,path={},server=on,wait=off",
                socket.display()
            ))
            .args(drive("root", &images.root, ",readonly=on"))
            .args(drive("overlay", &overlay, ",discard=unmap,detect-zeroes=unmap"))
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64");
        let machine = Self {
            qemu,
            folder,
            started,
        };
        while !socket.exists() {
            assert!(machine.started.elapsed() < PATIENCE, "no socket");
            std::thread::sleep(Duration::from_millis(1));
        }
        machine
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    async fn connect(&self) -> AgentClient {
        let client = tokio::time::timeout(PATIENCE, AgentClient::connect_unix_link(&self.socket())).await;
        client
            .unwrap_or_else(|_| panic!("no agent: {}", self.console()))
            .unwrap()
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("console.log")).unwrap_or_default()
    }

    fn log(&self, what: &str) {
        eprintln!("{:>9.3} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// Waits until the machine has switched itself off.
    fn wait_for_power_off(&mut self) {
        let start = Instant::now();
        while self.qemu.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < PATIENCE, "still on: {}", self.console());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.log("off");
    }

    fn check_overlay(&self) {
        let check = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(self.folder.path().join("overlay.ext4"))
            .output()
            .unwrap();
        assert!(
            check.status.success(),
            "{}",
            String::from_utf8_lossy(&check.stdout)
        );
    }
}

/// The rate of the counter that an emulated guest sees, which is the host's: without being told, the kernel measures it
/// against timers that a busy host makes irregular, and may never end.
fn tsc_khz() -> u64 {
    // SAFETY: every x86-64 has the instruction.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, from) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(100));
    (ticks() - from) / u64::try_from(start.elapsed().as_millis()).unwrap()
}

fn configuration() -> v1::ConfigureRequest {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    v1::ConfigureRequest {
        vm_id: "vm-1".into(),
        hostname: "pebble".into(),
        realtime_ns: now.as_nanos() as u64,
        entropy: Bytes::from(vec![7; 64]),
        root: Some(Root::RootBlockSerial("root".into())),
        overlay_serial: "overlay".into(),
        ..v1::ConfigureRequest::default()
    }
}

fn shell(script: &str) -> v1::Process {
    v1::Process {
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
        ..v1::Process::default()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Ended {
    status: i32,
    out: String,
    err: String,
}

async fn collect(mut events: ProcessEvents) -> Ended {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = loop {
        match events.next().await.expect("no status").unwrap() {
            ProcessEvent::Started { .. } => {}
            ProcessEvent::Output {
                stream: OutputStream::Stdout,
                data,
                ..
            } => out.extend_from_slice(&data),
            ProcessEvent::Output {
                stream: OutputStream::Stderr,
                data,
                ..
            } => err.extend_from_slice(&data),
            ProcessEvent::Lost { bytes } => panic!("{bytes} lost"),
            ProcessEvent::Exited { status } => break status,
            ProcessEvent::Refused(StartRefusal { status, message }) => {
                err = message.into_bytes();
                break status;
            }
        }
    };
    assert!(events.next().await.is_none());
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended {
        status,
        out: text(out),
        err: text(err),
    }
}

async fn exec(client: &AgentClient, process: v1::Process) -> Ended {
    collect(client.exec(process).await.unwrap().events).await
}

async fn out(client: &AgentClient, script: &str) -> String {
    let ended = exec(client, shell(script)).await;
    assert_eq!((ended.status, ended.err.as_str()), (0, ""), "{script}");
    ended.out
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async { tokio::time::timeout(10 * PATIENCE, test).await.expect("stuck") });
}

#[test]
#[ignore = "boots a VM: set OFFSHOOT_TEST_KERNEL, OFFSHOOT_TEST_INITRAMFS, OFFSHOOT_TEST_ROOT"]
fn a_vm_from_boot_to_power_off() {
    let Some(images) = images("OFFSHOOT_TEST_ROOT") else {
        return;
    };
    let mut machine = Machine::boot(&images);
    run(async {
        let client = machine.connect().await;
        machine.log("READY");
        let hello = client.hello().await.unwrap();
        machine.log(&format!("{hello:?}"));
        assert_eq!(
            (hello.vm_id.as_str(), hello.main),
            ("", v1::MainState::NotStarted)
        );
        let early = client
            .exec(shell("true"))
            .await
            .err()
            .expect("exec before configure");
        assert!(matches!(early, CallError::Refused { .. }), "{early}");

        configure(&machine, &client).await;
        main_process(&machine, &client).await;
        commands(&client).await;
        machine.log("commands");
        output_is_fast_and_whole(&machine, &client).await;
        terminal(&client).await;
        machine.log("terminal");
        copies(&machine, &client).await;
        let client = reconnect(&machine, client).await;

        let log = client.main_output(0).await.unwrap();
        client.signal_main(TERM).await.unwrap();
        assert_eq!(
            collect(log).await,
            Ended {
                status: 9,
                out: "hi\nbye\n".into(),
                err: String::new()
            }
        );
        assert_eq!(client.hello().await.unwrap().main, v1::MainState::Exited);
        assert!(client.signal_main(TERM).await.is_err());
        exec(
            &client,
            shell("nohup sleep 1000 >/dev/null 2>&1 & echo x >/var/lib/marker"),
        )
        .await;
        let start = Instant::now();
        assert!(
            client.shutdown(Duration::from_secs(5)).await.unwrap(),
            "not clean: {}",
            machine.console()
        );
        machine.log(&format!("shutdown answered after {:?}", start.elapsed()));
    });
    machine.wait_for_power_off();
    machine.check_overlay();
}

async fn configure(machine: &Machine, client: &AgentClient) {
    let stages = client.configure(configuration()).await.unwrap();
    machine.log(&format!("configured: {stages:?}"));
    assert_eq!(client.configure(configuration()).await.unwrap(), stages);
    let other = v1::ConfigureRequest {
        vm_id: "vm-2".into(),
        ..configuration()
    };
    assert!(client.configure(other).await.is_err());
    assert_eq!(client.hello().await.unwrap().vm_id, "vm-1");
}

async fn main_process(machine: &Machine, client: &AgentClient) {
    let script = "trap 'echo bye; exit 9' TERM; echo hi; while :; do sleep 0.1; done";
    let mut log = client.main_output(0).await.unwrap();
    let started = client.start_main(Start::Process(shell(script))).await.unwrap();
    assert!(matches!(started, MainStart::Started { .. }), "{started:?}");
    assert_eq!(client.start_main(Start::Init(true)).await.unwrap(), started);
    match log.next().await.unwrap().unwrap() {
        ProcessEvent::Output { offset: 0, data, .. } => assert_eq!(data, "hi\n"),
        other => panic!("{other:?}"),
    }
    machine.log("the main process said hi");
    assert_eq!(client.hello().await.unwrap().main, v1::MainState::Running);
}

async fn commands(client: &AgentClient) {
    assert!(out(client, "cat /etc/os-release").await.contains("bookworm"));
    assert_eq!(
        exec(client, shell("echo e >&2; exit 7")).await,
        Ended {
            status: 7,
            out: String::new(),
            err: "e\n".into()
        }
    );
    assert_eq!(exec(client, shell("kill -9 $$")).await.status, 137);
    let signals = out(
        client,
        "sed -n 's/^Sig\\(Blk\\|Ign\\):.*\\(.\\{8\\}\\)$/\\2/p' /proc/self/status",
    )
    .await;
    // Number 32 is the C library's own, ignored in whatever it spawned itself.
    assert_eq!(
        signals.replacen("80000000", "00000000", 1),
        "00000000\n00000000\n"
    );
    let missing = v1::Process {
        argv: vec!["nope".into()],
        ..v1::Process::default()
    };
    let missing = exec(client, missing).await;
    assert_eq!(
        (missing.status, missing.err.as_str()),
        (127, "exec: \"nope\": executable file not found in $PATH")
    );
    let as_user = v1::Process {
        user: "www-data".into(),
        working_dir: "/new/folder".into(),
        ..shell("id -un; id -G; pwd; umask")
    };
    assert_eq!(
        exec(client, as_user).await.out,
        "www-data\n33\n/new/folder\n0022\n"
    );
    let env = v1::Process {
        env: vec!["A=b c".into()],
        ..shell("echo $A $HOME $HOSTNAME")
    };
    assert_eq!(exec(client, env).await.out, "b c /root pebble\n");

    assert_eq!(
        out(
            client,
            "hostname; cat /etc/hostname; getent hosts pebble | tr -s ' '"
        )
        .await,
        "pebble\npebble\n127.0.1.1 pebble\n"
    );
    let mounts = out(client, "cut -d' ' -f2,3 /proc/self/mounts | sort").await;
    let expected = "/ overlay\n/dev devtmpfs\n/dev/mqueue mqueue\n/dev/pts devpts\n/dev/shm tmpfs\n/proc proc\n/run tmpfs\n\
        /sys sysfs\n/sys/fs/cgroup cgroup2\n/tmp tmpfs\n";
    assert_eq!(mounts, expected);
    let size: u64 = out(client, "df -B1 --output=size / | tail -1")
        .await
        .trim()
        .parse()
        .unwrap();
    assert!(size > 3 << 30, "not grown: {size}");
    let clock: u64 = out(client, "date +%s").await.trim().parse().unwrap();
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(now.abs_diff(clock) < 60);
    assert_eq!(
        out(
            client,
            "cat /sys/class/net/lo/operstate /proc/self/oom_score_adj; ls /proc/self/fd | wc -l"
        )
        .await,
        "unknown\n0\n4\n"
    );
    assert_eq!(out(client, "stat -c %a / /tmp /run /dev/shm; echo x > /dev/stdout; ls -d /lower /overlay /init 2>/dev/null || true").await, "755\n1777\n755\n1777\nx\n");
    // Orphans end up with PID 1, which reaps them.
    out(client, "(sleep 0.2 & echo) >/dev/null; sleep 0.5").await;
    let script =
        "for n in 1 2 3; do cat /proc/[0-9]*/stat 2>/dev/null | grep ') Z '; sleep 0.3; done || true";
    let zombies = out(client, script).await;
    // One that is there every time is not just about to be reaped.
    let stays = |line: &str| zombies.matches(line.split(')').next().unwrap_or(line)).count() > 2;
    assert!(!zombies.lines().any(stays), "{zombies}");
    assert_eq!(out(client, "for c in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $c; echo; done 2>/dev/null | grep -c ^@offshoot-agent").await, "1\n");

    let session = client
        .exec(v1::Process {
            stdin: true,
            ..shell("cat; echo end")
        })
        .await
        .unwrap();
    assert!(session.input.stdin(Bytes::from_static(b"piped")).await);
    assert!(session.input.close_stdin().await);
    assert_eq!(collect(session.events).await.out, "pipedend\n");
    let session = client.exec(shell("sleep 1000 & wait")).await.unwrap();
    assert!(session.input.signal(TERM).await);
    assert_eq!(collect(session.events).await.status, 143);
}

async fn output_is_fast_and_whole(machine: &Machine, client: &AgentClient) {
    let start = Instant::now();
    let all = out(client, "head -c 10000000 /dev/zero | tr '\\0' x").await;
    assert!(all.len() == 10_000_000 && all.bytes().all(|byte| byte == b'x'));
    machine.log(&format!(
        "10 MB of output through head | tr in {:?}",
        start.elapsed()
    ));
    let start = Instant::now();
    let process = v1::Process {
        argv: ["head", "-c", "10000000", "/dev/zero"]
            .map(str::to_owned)
            .to_vec(),
        ..v1::Process::default()
    };
    assert_eq!(exec(client, process).await.out.len(), 10_000_000);
    machine.log(&format!("10 MB of zeroes in {:?}", start.elapsed()));
    let start = Instant::now();
    let session = client
        .exec(v1::Process {
            stdin: true,
            ..shell("wc -c")
        })
        .await
        .unwrap();
    session.input.stdin(Bytes::from(vec![b'y'; 10_000_000])).await;
    session.input.close_stdin().await;
    assert_eq!(collect(session.events).await.out, "10000000\n");
    machine.log(&format!("10 MB of input in {:?}", start.elapsed()));
    let start = Instant::now();
    for _ in 0..20 {
        exec(
            client,
            v1::Process {
                argv: vec!["true".into()],
                ..v1::Process::default()
            },
        )
        .await;
    }
    machine.log(&format!("`true` takes {:?}", start.elapsed() / 20));
}

async fn terminal(client: &AgentClient) {
    let window = Some(v1::WindowSize { rows: 30, cols: 90 });
    let process = v1::Process {
        tty: true,
        stdin: true,
        window,
        ..shell("stty size; echo $TERM; trap 'stty size; exit 3' WINCH; echo ready; read x; read x")
    };
    let mut session = client.exec(process).await.unwrap();
    let mut seen = String::new();
    let status = loop {
        match session.events.next().await.unwrap().unwrap() {
            ProcessEvent::Output { data, .. } => {
                seen.push_str(&String::from_utf8_lossy(&data));
                if seen.ends_with("ready\r\n") {
                    session.input.resize(31, 91).await;
                }
            }
            ProcessEvent::Exited { status } => break status,
            _ => {}
        }
    };
    assert_eq!(
        (status, seen.as_str()),
        (3, "30 90\r\nxterm\r\nready\r\n31 91\r\n")
    );
    let session = client
        .exec(v1::Process {
            tty: true,
            stdin: true,
            ..shell("tty; sleep 1000")
        })
        .await
        .unwrap();
    let started = Instant::now();
    session.input.stdin(Bytes::from_static(b"\x03")).await;
    assert_eq!(collect(session.events).await.status, 130);
    assert!(started.elapsed() < Duration::from_secs(60));
}

async fn copies(machine: &Machine, client: &AgentClient) {
    let large: Vec<u8> = (0..5_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(large.len() as u64);
    header.set_mode(0o640);
    header.set_uid(33);
    header.set_gid(33);
    header.set_mtime(1_000_000_000);
    tar.append_data(&mut header, "folder/large", &large[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let start = Instant::now();
    assert_eq!(client.copy_in("/srv", &tar[..]).await.unwrap(), 1);
    machine.log(&format!("5 MB copied in within {:?}", start.elapsed()));
    assert_eq!(
        out(client, "stat -c '%a %u %g %Y %s' /srv/folder/large").await,
        "640 33 33 1000000000 5000000\n"
    );
    let start = Instant::now();
    let mut copied = client.copy_out("/srv/folder").await.unwrap();
    assert_eq!(copied.stat.name, "folder");
    let mut back = Vec::new();
    while let Some(bytes) = copied.tar.next().await {
        back.extend_from_slice(&bytes.unwrap());
    }
    machine.log(&format!("5 MB copied out within {:?}", start.elapsed()));
    let mut archive = tar::Archive::new(&back[..]);
    let entry = archive
        .entries()
        .unwrap()
        .map(Result::unwrap)
        .find(|entry| entry.path().unwrap().ends_with("large"));
    let mut content = Vec::new();
    entry.unwrap().read_to_end(&mut content).unwrap();
    assert!(content == large);
    let kind = |error: &CallError| offshoot_model_kind(error);
    assert_eq!(
        kind(&client.copy_out("/nowhere").await.err().unwrap()),
        "NotFound"
    );
    let onto_file = client.copy_in("/etc/passwd", &tar[..]).await.unwrap_err();
    assert!(
        std::error::Error::source(&onto_file)
            .unwrap()
            .to_string()
            .contains("not a directory"),
        "{onto_file:?}"
    );
    // A source that breaks is not the end of a tar.
    let broken = tokio::io::AsyncReadExt::chain(&tar[..100_000], Broken);
    assert!(client.copy_in("/srv", broken).await.is_err());
}

fn offshoot_model_kind(error: &CallError) -> String {
    match error {
        CallError::Refused { kind, .. } => format!("{kind:?}"),
        other => format!("{other}"),
    }
}

struct Broken;

impl tokio::io::AsyncRead for Broken {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Err(std::io::ErrorKind::InvalidData.into()))
    }
}

/// A host that dies in the middle of everything, more than once.
async fn reconnect(machine: &Machine, client: AgentClient) -> AgentClient {
    let session = client
        .exec(shell("while :; do head -c 100000 /dev/zero; done"))
        .await
        .unwrap();
    let mut events = session.events;
    for _ in 0..20 {
        events.next().await.unwrap().unwrap();
    }
    drop((events, session.input, client));
    for garbage in [&b""[..], b"\x05abc", b"\0\0\0\x09\x03abcdefgh", &[0xff; 5000]] {
        // QEMU serves one connection at a time, and takes the next when this one is gone.
        let mut dying = UnixStream::connect(machine.socket()).unwrap();
        dying.write_all(garbage).unwrap();
        drop(dying);
        let start = Instant::now();
        let client = machine.connect().await;
        let hello = client.hello().await.unwrap();
        machine.log(&format!("connected again within {:?}", start.elapsed()));
        assert_eq!(
            (hello.vm_id.as_str(), hello.main),
            ("vm-1", v1::MainState::Running)
        );
    }
    let client = machine.connect().await;
    assert_eq!(out(&client, "echo still here").await, "still here\n");
    out(
        &client,
        "kill $(pidof -s head) 2>/dev/null; pkill -f 'while :; do head' 2>/dev/null; true",
    )
    .await;
    client
}

#[test]
#[ignore = "boots a VM: set OFFSHOOT_TEST_KERNEL, OFFSHOOT_TEST_INITRAMFS, OFFSHOOT_TEST_ROOT"]
fn pid_1_becomes_an_init_of_the_images() {
    let Some(images) = images("OFFSHOOT_TEST_ROOT") else {
        return;
    };
    let mut machine = Machine::boot(&images);
    run(async {
        let client = machine.connect().await;
        client.configure(configuration()).await.unwrap();
        // A small init of our own, unless the image has one.
        let script = b"#!/bin/sh\ntrap '' USR2\necho $$ > /run/init-was-here\nwhile :; do sleep 0.1; done\n";
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(script.len() as u64);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        tar.append_data(&mut header, "init", &script[..]).unwrap();
        let tar = tar.into_inner().unwrap();
        client.copy_in("/usr/sbin", &tar[..]).await.unwrap();
        assert_eq!(
            client.start_main(Start::Init(true)).await.unwrap(),
            MainStart::Started { pid: 1 }
        );
        assert_eq!(client.hello().await.unwrap().main, v1::MainState::Init);
        assert_eq!(
            out(
                &client,
                "while ! [ -s /run/init-was-here ]; do sleep 0.1; done; cat /run/init-was-here"
            )
            .await,
            "1\n"
        );
        assert_eq!(
            out(&client, "tr '\\0' ' ' < /proc/1/cmdline").await,
            "/bin/sh /sbin/init "
        );
        exec(&client, shell("echo x > /var/lib/marker")).await;
        assert!(
            client.shutdown(Duration::from_millis(500)).await.unwrap(),
            "not clean: {}",
            machine.console()
        );
    });
    machine.wait_for_power_off();
}

#[test]
#[ignore = "boots a VM: set OFFSHOOT_TEST_KERNEL, OFFSHOOT_TEST_INITRAMFS, OFFSHOOT_TEST_SYSTEMD_ROOT"]
fn systemd_boots_and_ends_beside_the_agent() {
    let Some(images) = images("OFFSHOOT_TEST_SYSTEMD_ROOT") else {
        return;
    };
    let mut machine = Machine::boot(&images);
    run(async {
        let client = machine.connect().await;
        client.configure(configuration()).await.unwrap();
        assert_eq!(
            client.start_main(Start::Init(true)).await.unwrap(),
            MainStart::Started { pid: 1 }
        );
        let running = "until systemctl is-system-running 2>/dev/null | grep -Eq 'running|degraded'; do sleep 0.2; done; \
            systemctl is-system-running; systemctl --failed --no-legend; cat /proc/1/comm";
        let ended = exec(&client, shell(running)).await;
        machine.log(&format!("systemd: {ended:?}"));
        assert!(ended.out.ends_with("systemd\n"));
        let start = Instant::now();
        let clean = client.shutdown(Duration::from_secs(60)).await;
        machine.log(&format!(
            "shutdown answered {clean:?} after {:?}",
            start.elapsed()
        ));
        assert!(clean.unwrap());
    });
    machine.wait_for_power_off();
}
