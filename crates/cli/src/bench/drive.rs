//! Makes the VMs, watches the clock, and leaves nothing.
//!
//! A request to create a VM is always waited for, also after Ctrl-C: only then is it known what there is to remove. What
//! comes after it is given up at once.

use std::pin::pin;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::{StreamExt as _, stream};
use offshoot_api::channel::{ExecStart, Status};
use offshoot_api::client::{Client, DaemonMessage};
use offshoot_api::operation::OperationsQuery;
use offshoot_api::vm::{ListQuery, RemoveQuery};
use offshoot_model::{ErrorKind, ProcessConfig, VmConfig, VmId, VmName};
use tokio::sync::watch;

use super::BenchArgs;
use super::facts;
use super::report::{FORMAT, Report, RunFailure, Sample, Settings, VERSION, summarise};
use super::ssh::{self, Key};
use super::variant::{Variant, variants};
use crate::error::{Failure, report_and_go_on};
use crate::image::prepare_image;
use crate::output::note;
use crate::signals::Signals;
use crate::timings::micros;

/// What the VMs do meanwhile. Should this program be killed, they end by themselves, and are removed because they do.
const MAIN: [&str; 2] = ["sleep", "3600"];
/// How long one VM may take before it counts as failed: a daemon that hangs shall not hang the benchmark.
const PATIENCE: Duration = Duration::from_secs(300);
/// How many VMs are removed at once in the end.
const REMOVED_AT_ONCE: usize = 4;

/// Measures all that was asked for.
pub(super) async fn drive(client: &Client, args: &BenchArgs) -> Result<Report, Failure> {
    let host = facts::gather(client).await?;
    prepare(client, &args.image, args.quiet).await?;
    let kinds = variants(args);
    let fleet = Fleet {
        client,
        args,
        prefix: format!("bench-{}", random_digits()?),
        key: args.ssh.then(Key::of_this_user).transpose()?,
        stop: watch::Sender::new(false),
    };
    let mut signals = Signals::catch()?;
    let Some(measured) = fleet.measure_or_stop(&kinds, &mut signals).await else {
        return Err(fleet.left_behind());
    };
    let removed = tokio::select! {
        removed = fleet.remove_all() => removed,
        () = signals.cancelled() => return Err(fleet.left_behind()),
    };
    let Measured {
        mut samples,
        failures,
        wall,
    } = measured?;
    removed?;
    samples.sort_by_key(|sample| sample.run);
    let config = fleet.config("", &kinds[0])?;
    Ok(Report {
        format: FORMAT,
        version: VERSION,
        host,
        settings: Settings {
            image: args.image.clone(),
            runs: args.runs,
            warmup: args.warmup,
            parallel: args.parallel,
            ssh: args.ssh,
            hold: args.hold,
            memory: config.memory.bytes(),
            cpus: config.cpus,
        },
        variants: summarise(kinds, &samples, &failures),
        samples,
        failures,
        wall_us: micros(wall),
        interrupted: *fleet.stop.borrow(),
    })
}

/// Nobody pays for the first preparation of the image.
async fn prepare(client: &Client, image: &str, quiet: bool) -> Result<(), Failure> {
    match client.find_image(image).await? {
        Some(found) if found.prepared => Ok(()),
        Some(_) => prepare_image(client, image, false, quiet).await.map(drop),
        None => Err(
            Failure::new(ErrorKind::NotFound, format!("no such image: `{image}`"))
                .hint("`offshoot image ls` lists the images; `--image` chooses one"),
        ),
    }
}

fn random_digits() -> Result<String, Failure> {
    let mut bytes = [0; 3];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes))
        .map_err(|e| Failure::io("cannot make up a name", &e))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn now_us() -> u64 {
    micros(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// The VMs of one benchmark.
struct Fleet<'a> {
    client: &'a Client,
    args: &'a BenchArgs,
    /// What all their names begin with, and nobody else's.
    prefix: String,
    key: Option<Key>,
    /// Set by Ctrl-C.
    stop: watch::Sender<bool>,
}

/// What came of all runs.
#[derive(Default)]
struct Measured {
    samples: Vec<Sample>,
    failures: Vec<RunFailure>,
    wall: Duration,
}

/// What came of one run.
enum Outcome {
    Sample(Box<Sample>, Instant),
    Failed(RunFailure),
    Stopped,
}

/// A step that failed.
struct StepFailure {
    step: &'static str,
    failure: Failure,
}

fn at(step: &'static str) -> impl FnOnce(Failure) -> StepFailure {
    move |failure| StepFailure { step, failure }
}

impl Fleet<'_> {
    /// Measures, until Ctrl-C at most. Nothing that was begun goes on when this returns, unless the user insists on
    /// leaving: then there is nothing.
    async fn measure_or_stop(
        &self,
        kinds: &[Variant],
        signals: &mut Signals,
    ) -> Option<Result<Measured, Failure>> {
        let mut measuring = pin!(self.measure(kinds));
        loop {
            tokio::select! {
                measured = &mut measuring => return Some(measured),
                () = signals.cancelled() => {
                    if self.stop.send_replace(true) {
                        return None;
                    }
                    note("stopping: removing the benchmark's VMs");
                }
            }
        }
    }

    /// The user did not wait for the end.
    fn left_behind(&self) -> Failure {
        let prefix = &self.prefix;
        note(&format!(
            "some VMs may be left: `offshoot ps -a` shows those named {prefix}-…"
        ));
        Failure::cancelled()
    }

    async fn stopped(&self) {
        // The sender lives as long as `self`.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    async fn measure(&self, kinds: &[Variant]) -> Result<Measured, Failure> {
        for kind in kinds {
            for n in 1..=self.args.warmup {
                self.tell(&format!("warm-up {n} of {}: {}", self.args.warmup, kind.name));
                let name = format!("{}-{}-w{n}", self.prefix, kind_number(kinds, kind));
                match self.run(0, &name, kind).await {
                    Outcome::Sample(..) => {}
                    Outcome::Stopped => return Ok(Measured::default()),
                    Outcome::Failed(failed) => {
                        let message = format!("the warm-up ({}) failed at {}", kind.name, failed.step);
                        return Err(Failure::internal(message).because(failed.error));
                    }
                }
            }
        }
        let began = Instant::now();
        let mut last = began;
        let mut measured = Measured::default();
        let runs = order(kinds, self.args.runs);
        let all = runs.len();
        let mut outcomes = stream::iter(runs)
            .map(|(run, kind)| async move {
                let name = format!("{}-{run}", self.prefix);
                self.run(run, &name, kind).await
            })
            .buffer_unordered(self.args.parallel as usize);
        while let Some(outcome) = outcomes.next().await {
            match outcome {
                Outcome::Sample(sample, end) => {
                    last = last.max(end);
                    measured.samples.push(*sample);
                }
                Outcome::Failed(failed) => measured.failures.push(failed),
                Outcome::Stopped => {}
            }
            let done = measured.samples.len() + measured.failures.len();
            self.tell(&format!("{done} of {all}"));
        }
        measured.wall = last - began;
        Ok(measured)
    }

    fn tell(&self, text: &str) {
        if !self.args.quiet && !*self.stop.borrow() {
            note(text);
        }
    }

    fn config(&self, name: &str, kind: &Variant) -> Result<VmConfig, Failure> {
        let mut config = VmConfig::new(&self.args.image);
        if !name.is_empty() {
            let parsed: Result<VmName, _> = name.parse();
            config.name = Some(parsed.map_err(|e| Failure::explained(&e))?);
        }
        config.entrypoint = Some(Vec::new());
        config.cmd = MAIN.map(str::to_owned).to_vec();
        config.auto_remove = true;
        config.boot = kind.boot;
        config.root = kind.root;
        config.kernel = kind.kernel.clone();
        config.memory = self.args.memory.unwrap_or(config.memory);
        config.cpus = self.args.cpus.unwrap_or(config.cpus);
        Ok(config)
    }

    /// One VM, from its request to its removal.
    async fn run(&self, run: u32, name: &str, kind: &Variant) -> Outcome {
        let failed = |failed: StepFailure| {
            Outcome::Failed(RunFailure {
                run,
                variant: kind.name.clone(),
                step: failed.step,
                error: failed.failure.told(),
            })
        };
        if *self.stop.borrow() {
            return Outcome::Stopped;
        }
        let config = match self.config(name, kind) {
            Ok(config) => config,
            Err(failure) => return failed(at("create")(failure)),
        };
        let (began, began_us) = (Instant::now(), now_us());
        let vm = match self.client.create_vm(&config).await {
            Ok(vm) => vm,
            Err(error) => return failed(at("create")(error.into())),
        };
        let mut sample = Sample {
            run,
            variant: kind.name.clone(),
            vm: name.to_owned(),
            began_us,
            created_us: micros(began.elapsed()),
            running_us: 0,
            exec_us: 0,
            ssh_us: None,
            vmm: String::new(),
            root: String::new(),
            boot: String::new(),
            operations: Vec::new(),
        };
        let outcome = tokio::select! {
            answered = tokio::time::timeout(PATIENCE, self.answers(&vm.id, began, &mut sample)) => match answered {
                Ok(Ok(end)) => Outcome::Sample(Box::new(sample), end),
                Ok(Err(failure)) => failed(failure),
                Err(_) => failed(at("patience")(Failure::internal(format!("no answer within {PATIENCE:?}")))),
            },
            () = self.stopped() => Outcome::Stopped,
        };
        if !self.args.hold || run == 0 || !matches!(outcome, Outcome::Sample(..)) {
            self.remove(vm.id.as_str()).await;
        }
        outcome
    }

    /// Waits for every answer of a VM, and fills in when it came. Gives the moment of the last one.
    async fn answers(&self, id: &VmId, began: Instant, sample: &mut Sample) -> Result<Instant, StepFailure> {
        let (client, vm) = (self.client, id.as_str());
        client.start_vm(vm).await.map_err(|e| at("start")(e.into()))?;
        sample.running_us = micros(began.elapsed());
        self.first_command(vm, &sample.vm).await.map_err(at("exec"))?;
        let mut end = Instant::now();
        sample.exec_us = micros(end - began);
        if let Some(key) = &self.key {
            ssh::answers(client, vm, key).await.map_err(at("ssh"))?;
            end = Instant::now();
            sample.ssh_us = Some(micros(end - began));
        }
        // It is measured; what follows only tells of it.
        let query = OperationsQuery {
            vm: Some(VmName::from(id)),
            ..OperationsQuery::default()
        };
        let told = async {
            sample.operations = client.operations(&query).await?;
            let details = client.vm(vm).await?;
            (sample.vmm, sample.root) = (details.vmm.chosen, details.root.chosen);
            sample.boot = details.boot.map(|boot| boot.chosen).unwrap_or_default();
            Ok::<_, Failure>(())
        };
        told.await.map_err(at("timings"))?;
        Ok(end)
    }

    /// Runs a command whose output nobody could know before, and reads it.
    async fn first_command(&self, vm: &str, word: &str) -> Result<(), Failure> {
        let process = ProcessConfig {
            argv: vec!["echo".into(), word.into()],
            ..ProcessConfig::default()
        };
        let start = ExecStart {
            process,
            window: None,
            detach: false,
        };
        let (_sink, mut stream) = self.client.exec(vm, &start).await?.split();
        let mut said = Vec::new();
        loop {
            match stream.next().await? {
                Some(DaemonMessage::Stdout(bytes) | DaemonMessage::Stderr(bytes)) => said.extend(bytes),
                Some(DaemonMessage::Status(Status::Exited { code: 0 }))
                    if said == format!("{word}\n").as_bytes() =>
                {
                    return Ok(());
                }
                Some(DaemonMessage::Status(status)) => {
                    let said = String::from_utf8_lossy(&said);
                    return Err(Failure::internal(format!(
                        "`echo {word}` wrote `{said}` and ended so: {status:?}"
                    )));
                }
                None => return Err(Failure::internal("the daemon closed the session")),
            }
        }
    }

    async fn remove(&self, vm: &str) {
        match self.client.remove_vm(vm, &RemoveQuery { force: true }).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => {
                let failure = Failure::from(error);
                report_and_go_on(failure.hint(format!("remove it with `offshoot rm -f {vm}`")));
            }
        }
    }

    /// Removes what is left of them, by their names.
    async fn remove_all(&self) -> Result<(), Failure> {
        let vms = self.client.vms(&ListQuery { all: true }).await?;
        let mine = vms.iter().filter(|vm| {
            let rest = vm.name.as_str().strip_prefix(&self.prefix);
            rest.is_some_and(|rest| rest.starts_with('-'))
        });
        stream::iter(mine)
            .for_each_concurrent(REMOVED_AT_ONCE, |vm| self.remove(vm.id.as_str()))
            .await;
        Ok(())
    }
}

fn kind_number(kinds: &[Variant], kind: &Variant) -> usize {
    kinds.iter().position(|other| other == kind).unwrap_or(0)
}

/// Every run with its number, from 1: the kinds in turns, and none of them always first.
fn order(kinds: &[Variant], runs: u32) -> Vec<(u32, &Variant)> {
    let rounds = (0..runs as usize).flat_map(|round| {
        let first = round % kinds.len();
        kinds[first..].iter().chain(&kinds[..first])
    });
    (1..).zip(rounds).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::{Boot, RootRequest};

    #[test]
    fn kinds_take_turns_and_none_is_always_first() {
        let kind = |name: &str| Variant {
            name: name.into(),
            boot: Boot::Auto,
            root: RootRequest::Auto,
            kernel: None,
        };
        let kinds = [kind("a"), kind("b")];
        let order: Vec<_> = order(&kinds, 3)
            .into_iter()
            .map(|(run, kind)| format!("{run}{}", kind.name))
            .collect();
        assert_eq!(order, ["1a", "2b", "3b", "4a", "5a", "6b"]);
    }
}
