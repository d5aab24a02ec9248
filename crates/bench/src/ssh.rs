//! SSH: the agent's own server beside a stock sshd in the same guest, by the same client over the same network.
//!
//! ```text
//! one VM with openssh-server: ours at port 22, sshd at port 2222; then, in turns,
//!     ssh VM true                              ─► from the client's start to its end
//!     ssh -tt VM, and nothing is said yet      ─► from the client's start to the shell's prompt
//! ```

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::daemon::{Daemon, IMAGE};
use crate::http::Api;
use crate::samples::{Samples, compare};

/// Connections of each kind to each server.
const RUNS: usize = 30;
/// The image with a server of its own.
const WITH_SSHD: &str = "bench-sshd:latest";
const VM: &str = "bench-ssh";
/// Where each server listens.
const OURS: u16 = 22;
const STOCK: u16 = 2222;
/// What bash shows root when it is ready.
const PROMPT: &[u8] = b"# ";
/// Longer than any prompt, with what a terminal is told before it.
const MOST: usize = 64 << 10;

/// What starts the image's own server for the same keys. No words of welcome: the first that comes is the prompt.
const START: &str = "set -e; mkdir -p /run/sshd /root/.ssh; chmod 700 /root/.ssh; touch /root/.hushlogin
cat >/root/.ssh/authorized_keys; ssh-keygen -A >/dev/null; chsh -s /bin/bash root; /usr/sbin/sshd -p 2222";

/// Prints it all.
pub(crate) fn beside_a_stock_sshd(daemon: &Daemon) -> Result<()> {
    daemon.ok(&[
        "image",
        "bootstrap",
        IMAGE,
        "--name",
        WITH_SSHD,
        "--include",
        "openssh-server",
    ])?;
    daemon.ok(&["run", "-d", "--name", VM, WITH_SSHD, "sleep", "100000"])?;
    let host = Api::at(&daemon.socket()).json("GET", &format!("/v1/ssh?vm={VM}"), None)?;
    let address = host["vms"][0]["ipv4"].as_str().context("the VM has no address")?;
    let key = daemon.scratch().join(".config/offshoot/id_ed25519");
    let public = std::fs::read_to_string(key.with_extension("pub")).context("no key of ours")?;
    daemon.ok_with_input(&["exec", "-i", VM, "sh", "-c", START], &public)?;
    let ssh = |port: u16, options: &[&str]| {
        let mut command = daemon.inside("ssh");
        command
            .args([
                "-F",
                "none",
                "-oBatchMode=yes",
                "-oIdentitiesOnly=yes",
                "-oIdentityAgent=none",
            ])
            .args([
                "-oStrictHostKeyChecking=no",
                "-oUserKnownHostsFile=/dev/null",
                "-oLogLevel=ERROR",
                "-i",
            ])
            .arg(&key)
            .args(["-p", &port.to_string()])
            .args(options)
            .arg(format!("root@{address}"));
        command
    };
    println!("SSH over the VM's network, ours beside a stock sshd in the same guest");
    for (what, options) in [("ssh VM true", &["-T"][..]), ("connect to prompt", &["-tt"][..])] {
        let (mut ours, mut stock) = (Samples::new(), Samples::new());
        let once = |port| match what {
            "ssh VM true" => run_true(ssh(port, options)),
            _ => until_prompt(ssh(port, options)),
        };
        // One of each first, so that nobody pays for cold caches.
        once(OURS)?;
        once(STOCK)?;
        for n in 0..RUNS {
            // Nobody always comes second.
            for port in if n % 2 == 0 { [OURS, STOCK] } else { [STOCK, OURS] } {
                let took = once(port)?;
                if port == OURS { &mut ours } else { &mut stock }.push(took);
            }
        }
        println!(" {what}");
        compare("offshoot-agent", &ours, "openssh-server", &stock);
        println!("  aim: at most 1.00\n");
    }
    daemon.ok(&["rm", "-f", VM])?;
    Ok(())
}

fn run_true(mut ssh: Command) -> Result<Duration> {
    let began = Instant::now();
    let output = ssh
        .arg("true")
        .stdin(Stdio::null())
        .output()
        .context("cannot run ssh")?;
    let took = began.elapsed();
    if !output.status.success() {
        bail!("ssh: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(took)
}

fn until_prompt(mut ssh: Command) -> Result<Duration> {
    let began = Instant::now();
    let mut child = ssh
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run ssh")?;
    let mut output = child.stdout.take().context("piped")?;
    let (mut said, mut piece) = (Vec::new(), [0; 4096]);
    while !said.windows(PROMPT.len()).any(|window| window == PROMPT) {
        let read = output.read(&mut piece)?;
        said.extend_from_slice(&piece[..read]);
        if read == 0 || said.len() > MOST {
            let _ = child.kill();
            let _ = child.wait();
            bail!("no prompt in: {}", String::from_utf8_lossy(&said));
        }
    }
    let took = began.elapsed();
    // Dropped, it is the end of the terminal's input.
    let _ = child.stdin.take().context("piped")?.write_all(b"exit\n");
    std::io::copy(&mut output, &mut std::io::sink())?;
    child.wait()?;
    Ok(took)
}
