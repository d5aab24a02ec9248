//! The fake's QMP: one client at a time, as QEMU does it, and the little state that its answers depend on.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use offshoot_sys::process::inherited_fd;
use serde_json::{Value, json};

use super::{Arguments, Behaviour};

/// A command of ours has a few hundred bytes.
const MAX_LINE: u64 = 64 << 10;

struct Guest {
    run_state: &'static str,
    console: Vec<u8>,
    disks: HashMap<String, PathBuf>,
    /// Where events go.
    client: Option<UnixStream>,
    /// The process ends with this status.
    exit: Option<i32>,
}

struct Fake {
    guest: Mutex<Guest>,
    behaviour: Behaviour,
}

/// Serves QMP until told to quit or to die; returns the status to exit with.
///
/// Call it once, at the start of the program: it takes its sockets from the descriptors that the arguments name.
pub fn serve(arguments: Arguments, behaviour: Behaviour) -> io::Result<i32> {
    let qmp = UnixListener::from(inherited_fd(arguments.qmp)?);
    if let Some(agent) = arguments.agent {
        let agent = UnixListener::from(inherited_fd(agent)?);
        std::thread::spawn(move || swallow(&agent));
    }
    let fake = Arc::new(Fake {
        guest: Mutex::new(Guest {
            run_state: "running",
            console: behaviour.console.clone().into_bytes(),
            disks: arguments.disks,
            client: None,
            exit: None,
        }),
        behaviour,
    });
    let after = |wait: Option<Duration>, act: fn(&Fake)| {
        if let Some(wait) = wait {
            let fake = Arc::clone(&fake);
            #[expect(
                clippy::disallowed_methods,
                reason = "the time is what the fake is told to let pass"
            )]
            std::thread::spawn(move || {
                std::thread::sleep(wait);
                act(&fake);
            });
        }
    };
    // As after a crash: no event, no clean-up, nothing flushed.
    after(fake.behaviour.die_after, |_| std::process::abort());
    after(fake.behaviour.power_off_after, Fake::power_off);
    loop {
        let (stream, _) = qmp.accept()?;
        // A client that leaves in the middle is its own business.
        let _ = fake.talk(stream);
        if let Some(status) = fake.guest().exit {
            return Ok(status);
        }
    }
}

/// Reads the agent's link and answers nothing.
fn swallow(agent: &UnixListener) {
    for stream in agent.incoming().flatten() {
        let _ = io::copy(&mut &stream, &mut io::sink());
    }
}

impl Fake {
    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn power_off(&self) {
        let mut guest = self.guest();
        guest.run_state = "shutdown";
        guest.tell("SHUTDOWN", &json!({"guest": true, "reason": "guest-shutdown"}));
        guest.tell("STOP", &json!({}));
    }

    fn talk(&self, stream: UnixStream) -> io::Result<()> {
        if self.behaviour.hang {
            loop {
                std::thread::park();
            }
        }
        let mut writer = stream.try_clone()?;
        if self.behaviour.garbage {
            return writer.write_all(b"\x01\x02 220 this is no QMP\n");
        }
        writer.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n")?;
        self.guest().client = Some(stream.try_clone()?);
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if (&mut reader).take(MAX_LINE).read_line(&mut line)? == 0 {
                break;
            }
            let command: Value = serde_json::from_str(&line).unwrap_or_default();
            let name = command["execute"].as_str().unwrap_or_default();
            let mut guest = self.guest();
            let reply = if self.behaviour.refuse.iter().any(|refused| refused == name) {
                Err(format!("this fake refuses {name}"))
            } else {
                guest.carry_out(name, &command["arguments"], self.behaviour.deaf)
            };
            let mut reply = match reply {
                Ok(value) => json!({"return": value}),
                Err(desc) => json!({"error": {"class": "GenericError", "desc": desc}}),
            };
            reply["id"] = command["id"].clone();
            // Under the lock, so that no event comes into the middle of it.
            writer.write_all(format!("{reply}\r\n").as_bytes())?;
            if guest.exit.is_some() {
                break;
            }
        }
        self.guest().client = None;
        Ok(())
    }
}

impl Guest {
    fn tell(&mut self, event: &str, data: &Value) {
        if let Some(client) = &mut self.client {
            let line = json!({"event": event, "data": data, "timestamp": {"seconds": 0, "microseconds": 0}});
            // A client that left is told nothing.
            let _ = client.write_all(format!("{line}\r\n").as_bytes());
        }
    }

    fn carry_out(&mut self, command: &str, arguments: &Value, deaf: bool) -> Result<Value, String> {
        match command {
            "qmp_capabilities" | "system_powerdown" => {}
            "query-status" => {
                return Ok(json!({"status": self.run_state, "running": self.run_state == "running"}));
            }
            "stop" => self.change(("running", "paused"), "STOP"),
            "cont" => self.change(("paused", "running"), "RESUME"),
            "quit" if deaf => {}
            "quit" => {
                self.tell("SHUTDOWN", &json!({"guest": false, "reason": "host-qmp-quit"}));
                self.exit = Some(0);
            }
            "ringbuf-read" => {
                let said = std::mem::take(&mut self.console);
                return Ok(Value::String(
                    base64::engine::general_purpose::STANDARD.encode(said),
                ));
            }
            "query-named-block-nodes" => {
                let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
                let node = |(name, path)| json!({"node-name": name, "image": {"virtual-size": size(path)}});
                return Ok(self.disks.iter().map(node).collect());
            }
            "block_resize" => {
                let path = arguments["node-name"]
                    .as_str()
                    .and_then(|node| self.disks.get(node));
                let path = path.ok_or("Cannot find device")?;
                let size = arguments["size"]
                    .as_u64()
                    .ok_or("Parameter 'size' expects a number")?;
                let file = std::fs::OpenOptions::new().write(true).open(path);
                file.and_then(|file| file.set_len(size))
                    .map_err(|e| e.to_string())?;
            }
            _ => return Err(format!("The command {command} has not been found")),
        }
        Ok(json!({}))
    }

    fn change(&mut self, (from, to): (&str, &'static str), event: &str) {
        if self.run_state == from {
            self.run_state = to;
            self.tell(event, &json!({}));
        }
    }
}
