//! A bare QEMU that goes on from a template of ours: the arguments of a VM that was restored, and nobody but a client of its agent,
//! which asks for what every VM is asked. What a daemon adds is the difference.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use offshoot_agent_proto::client::{AgentClient, ProcessEvent};
use offshoot_agent_proto::v1;
use offshoot_agent_proto::v1::{configure_request, start_main_request};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use crate::bare::{DISKS, copy_seeds, copy_sparse, first_below, with_disk, words_of};
use crate::daemon::{Daemon, IMAGE};

/// The address that the saved guest has, and the one that this one gets.
const SAVED_MAC: &str = "02:00:00:00:00:01";
const MAC: &str = "02:00:00:00:00:02";

/// How long QEMU may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// How to start it.
pub(crate) struct BareRestore {
    program: String,
    arguments: Vec<String>,
    state: PathBuf,
    agent: PathBuf,
    control: PathBuf,
    root: String,
    disks: Vec<(PathBuf, PathBuf)>,
    /// Of the daemon's networks (ip-netns(8)), for the TAP.
    namespace: String,
    host_key: String,
    runtime: Runtime,
}

impl BareRestore {
    /// Takes the command line of a VM that was restored, and copies of what it was restored from: QEMU before 8.2 opens the file
    /// of a private mapping for writing.
    pub(crate) fn like_a_vm_of(daemon: &Daemon, memory: &str) -> Result<Self> {
        daemon.ok(&[
            "run", "-d", "--name", "model", "--memory", memory, "--boot", "template", IMAGE, "sleep", "1000",
        ])?;
        let details = daemon.inspect("model")?;
        let words = words_of(details["pid"].as_i64().context("no pid")?)?;
        daemon.ok(&["rm", "-f", "model"])?;
        let (program, rest) = words.split_first().context("an empty command line")?;

        let scratch = daemon.scratch();
        let template = first_below(&daemon.data().join("templates"))?;
        let [memory, state] = ["memory", "state"].map(|name| (template.join(name), scratch.join(name)));
        for (from, to) in [&memory, &state] {
            copy_sparse(from, to)?;
        }
        let base = first_below(&daemon.data().join("bases"))?;
        let disks = DISKS.map(|(disk, seed)| (base.join(seed), scratch.join(format!("bare-{disk}"))));
        let [agent, control] = ["bare-agent.sock", "bare-qmp.sock"].map(|name| scratch.join(name));
        let mut root = None;
        let mut arguments: Vec<String> = Vec::new();
        for word in rest {
            let id = || word.split(',').nth(1).unwrap_or_default();
            let listening =
                |id: &str, at: &Path| format!("socket,id={id},path={},server=on,wait=off", at.display());
            arguments.push(if word.starts_with("socket,id=agent") {
                listening("agent", &agent)
            } else if word.starts_with("socket,id=qmp") {
                listening("qmp", &control)
            } else if word.starts_with("tap,id=") {
                // A saved device wants a TAP, made and deleted by QEMU.
                format!("tap,{},ifname=bare,script=no,downscript=no", id())
            } else if word.starts_with("memory-backend-file,id=ram,") {
                let options = word.split(',').map(|option| match option.split_once('=') {
                    Some(("mem-path", _)) => format!("mem-path={}", memory.1.display()),
                    _ => option.to_owned(),
                });
                options.collect::<Vec<_>>().join(",")
            } else {
                with_disk(word, &disks).unwrap_or_else(|| word.clone())
            });
            let serial = word.split(',').find_map(|option| option.strip_prefix("serial="));
            if let Some(serial) = serial.filter(|serial| !["overlay", "work"].contains(serial)) {
                root = Some(serial.to_owned());
            }
        }
        Ok(Self {
            program: program.clone(),
            arguments,
            state: state.1,
            agent,
            control,
            root: root.context("no disk with the root")?,
            disks: disks.to_vec(),
            namespace: daemon.namespace().to_owned(),
            host_key: host_key(&scratch.join("bare-key"))?,
            runtime: Builder::new_current_thread().enable_all().build()?,
        })
    }

    /// Restores, makes it a VM like one of ours, starts a main process, runs `true`. Gives the time from the start of QEMU until its result is there.
    pub(crate) fn run(&self) -> Result<(Duration, Vec<(String, Duration)>)> {
        copy_seeds(&self.disks)?;
        for socket in [&self.agent, &self.control] {
            let _ = std::fs::remove_file(socket);
        }
        let state = std::fs::File::open(&self.state)?;
        let began = Instant::now();
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.namespace, &self.program])
            .args(&self.arguments)
            .stdin(state)
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot start QEMU")?;
        let done = self.runtime.block_on(self.talk(began));
        child.kill()?;
        child.wait()?;
        done
    }

    /// Waits until it has read the saved guest, which stands then, and lets it go on (QEMU's QMP reference).
    async fn go_on(&self, began: Instant) -> Result<()> {
        let stream = loop {
            match UnixStream::connect(&self.control).await {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > PATIENCE => return Err(error.into()),
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let mut ask = async |command: &str, arguments: Value| -> Result<Value> {
            let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
            write.write_all(line.as_bytes()).await?;
            loop {
                let line = lines.next_line().await?.context("QEMU hung up")?;
                let said: Value = serde_json::from_str(&line)?;
                if let Some(answer) = said.get("return") {
                    return Ok(answer.clone());
                }
                if said.get("error").is_some() {
                    bail!("{command}: {said}");
                }
            }
        };
        let nothing = || json!({});
        ask("qmp_capabilities", nothing()).await?;
        let on = json!([{"capability": "x-ignore-shared", "state": true}]);
        ask("migrate-set-capabilities", json!({"capabilities": on})).await?;
        ask("migrate-incoming", json!({"uri": "fd:0"})).await?;
        while ask("query-status", nothing()).await?["status"] != "paused" {
            if began.elapsed() > PATIENCE {
                bail!("the bare QEMU did not take the template");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ask("cont", nothing()).await?;
        Ok(())
    }

    async fn talk(&self, began: Instant) -> Result<(Duration, Vec<(String, Duration)>)> {
        self.go_on(began).await?;
        let gone_on = began.elapsed();
        let agent = loop {
            match AgentClient::connect_unix_link(&self.agent).await {
                Ok(agent) => break agent,
                Err(error) if began.elapsed() > PATIENCE => return Err(error.into()),
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        let mut entropy = vec![0; 64];
        offshoot_sys::random::fill(&mut entropy)?;
        let texts = |texts: [&str; 2]| texts.map(str::to_owned).to_vec();
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let stages = agent
            .configure(v1::ConfigureRequest {
                vm_id: "000000000000".into(),
                hostname: "bare".into(),
                realtime_ns: u64::try_from(now.as_nanos())?,
                entropy: entropy.into(),
                root: Some(configure_request::Root::RootBlockSerial(self.root.clone())),
                overlay_serial: "overlay".into(),
                work_serial: "work".into(),
                network: Some(v1::NetworkInterface {
                    mac: MAC.into(),
                    addresses: texts(["10.0.0.2/24", "fd00::2/64"]),
                    gateways: texts(["10.0.0.1", "fd00::1"]),
                    nameservers: texts(["10.0.0.1", "fd00::1"]),
                    domain: "vm.internal".into(),
                }),
                ssh: Some(v1::SshServer {
                    host_key: self.host_key.clone(),
                    port: 22,
                    yield_to_sshd: true,
                    ..v1::SshServer::default()
                }),
                restored: Some(v1::Restored {
                    mac: SAVED_MAC.into(),
                }),
                machine_id: "0123456789abcdef0123456789abcdef".into(),
                ..v1::ConfigureRequest::default()
            })
            .await?;
        let mut stages: Vec<_> = stages
            .into_iter()
            .map(|(name, time)| (format!("guest.{name}"), time))
            .collect();
        stages.push(("vmm".into(), gone_on));
        stages.push((
            "vmm to configured".into(),
            began.elapsed().saturating_sub(gone_on),
        ));
        let configured = began.elapsed();
        let process = |argv: &[&str]| v1::Process {
            argv: argv.iter().map(|word| (*word).into()).collect(),
            ..v1::Process::default()
        };
        agent
            .start_main(start_main_request::What::Process(process(&["sleep", "1000"])))
            .await?;
        stages.push(("main".into(), began.elapsed().saturating_sub(configured)));
        let started = began.elapsed();
        let mut session = agent.exec(process(&["true"])).await?;
        while let Some(event) = session.events.next().await {
            if let ProcessEvent::Exited { .. } = event? {
                stages.push(("exec".into(), began.elapsed().saturating_sub(started)));
                return Ok((began.elapsed(), stages));
            }
        }
        bail!("the bare guest ran no command")
    }
}

/// A new key for an SSH server (ssh-keygen(1)).
fn host_key(path: &Path) -> Result<String> {
    let _ = std::fs::remove_file(path);
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(path)
        .status()?;
    if !made.success() {
        bail!("ssh-keygen");
    }
    Ok(std::fs::read_to_string(path)?)
}
