//! What `bench create` found out, as `--output json` writes it. Described in `docs/formats/bench-create.md`.

use std::collections::BTreeMap;

use offshoot_model::{OperationTiming, percentile};
use serde::Serialize;

use super::facts::HostFacts;
use super::variant::Variant;

/// The name of the shape.
pub(super) const FORMAT: &str = "offshoot-bench-create";
/// Grows when a field changes its meaning or goes.
pub(super) const VERSION: u32 = 1;

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) format: &'static str,
    pub(super) version: u32,
    pub(super) host: HostFacts,
    pub(super) settings: Settings,
    /// One for each kind of VM that was compared; the first is what the others are compared with.
    pub(super) variants: Vec<VariantReport>,
    /// One for each VM that answered, in the order in which they were asked for.
    pub(super) samples: Vec<Sample>,
    /// One for each VM that did not.
    pub(super) failures: Vec<RunFailure>,
    /// From the first request to the last answer, warm-up not counted.
    pub(super) wall_us: u64,
    /// Somebody pressed Ctrl-C: there are fewer samples than were asked for.
    pub(super) interrupted: bool,
}

/// What was asked for.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Settings {
    pub(super) image: String,
    pub(super) runs: u32,
    pub(super) warmup: u32,
    pub(super) parallel: u32,
    pub(super) ssh: bool,
    pub(super) hold: bool,
    pub(super) memory: u64,
    pub(super) cpus: u32,
}

/// One VM. All times but `began_us` are microseconds from the request to create it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Sample {
    /// From 1, over all variants.
    pub(super) run: u32,
    pub(super) variant: String,
    /// Its name.
    pub(super) vm: String,
    /// The request, microseconds since the epoch.
    pub(super) began_us: u64,
    /// There is such a VM.
    pub(super) created_us: u64,
    /// It runs: the answer to its start came.
    pub(super) running_us: u64,
    /// The output of the first command in it was read, and is what it should be.
    pub(super) exec_us: u64,
    /// Its SSH server took the key and ran `true`; absent without `--ssh`.
    pub(super) ssh_us: Option<u64>,
    /// What the daemon chose.
    pub(super) vmm: String,
    pub(super) root: String,
    /// `cold` or `template`: what it really was, also when `auto` was asked for.
    pub(super) boot: String,
    /// The daemon's operations on it up to then, with their stages.
    pub(super) operations: Vec<OperationTiming>,
}

impl Sample {
    /// When the last answer came.
    pub(super) fn end_us(&self) -> u64 {
        self.ssh_us.unwrap_or(self.exec_us)
    }
}

/// A VM that did not get there.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RunFailure {
    pub(super) run: u32,
    pub(super) variant: String,
    /// `create`, `start`, `exec`, `ssh`, `timings`.
    pub(super) step: &'static str,
    pub(super) error: String,
}

/// All VMs of one kind.
#[derive(Clone, Debug, Serialize)]
pub(super) struct VariantReport {
    #[serde(flatten)]
    pub(super) variant: Variant,
    pub(super) failed: usize,
    /// From the request until there is such a VM, until it runs, until its first command's output was read, until SSH
    /// answered.
    pub(super) created: Option<Spread>,
    pub(super) running: Option<Spread>,
    pub(super) exec: Option<Spread>,
    pub(super) ssh: Option<Spread>,
    /// The median of `exec`, divided by that of the first variant.
    pub(super) exec_to_first: Option<f64>,
    pub(super) stages: Vec<StageSpread>,
}

/// Where measures of the same thing lie, microseconds (percentiles by nearest rank).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Spread {
    pub(super) n: usize,
    pub(super) min_us: u64,
    pub(super) p50_us: u64,
    pub(super) p90_us: u64,
    pub(super) p99_us: u64,
    pub(super) max_us: u64,
}

impl Spread {
    /// `None` where nothing was measured.
    pub(super) fn of(mut measures: Vec<u64>) -> Option<Self> {
        measures.sort_unstable();
        Some(Self {
            n: measures.len(),
            min_us: *measures.first()?,
            p50_us: percentile(&measures, 50)?,
            p90_us: percentile(&measures, 90)?,
            p99_us: percentile(&measures, 99)?,
            max_us: *measures.last()?,
        })
    }
}

/// One stage over all VMs of one kind; a VM that did not have it does not count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct StageSpread {
    /// `create`, `start`.
    pub(super) operation: String,
    pub(super) stage: String,
    /// The stage that it is a part of.
    pub(super) within: Option<String>,
    #[serde(flatten)]
    pub(super) spread: Spread,
}

/// What the samples and failures of one variant come to.
pub(super) fn summarise(
    variants: Vec<Variant>,
    samples: &[Sample],
    failures: &[RunFailure],
) -> Vec<VariantReport> {
    let mut reports: Vec<VariantReport> = Vec::new();
    for variant in variants {
        let mine: Vec<_> = samples
            .iter()
            .filter(|sample| sample.variant == variant.name)
            .collect();
        let spread = |of: fn(&Sample) -> Option<u64>| Spread::of(mine.iter().filter_map(|s| of(s)).collect());
        let exec = spread(|sample| Some(sample.exec_us));
        let first = reports.first().map_or(exec, |first| first.exec);
        reports.push(VariantReport {
            failed: failures
                .iter()
                .filter(|failure| failure.variant == variant.name)
                .count(),
            created: spread(|sample| Some(sample.created_us)),
            running: spread(|sample| Some(sample.running_us)),
            ssh: spread(|sample| sample.ssh_us),
            exec_to_first: exec
                .zip(first)
                .map(|(mine, first)| mine.p50_us as f64 / first.p50_us.max(1) as f64),
            exec,
            stages: stages(&mine),
            variant,
        });
    }
    reports
}

/// In the order in which they first came.
fn stages(samples: &[&Sample]) -> Vec<StageSpread> {
    let mut order = Vec::new();
    let mut measures: BTreeMap<_, Vec<u64>> = BTreeMap::new();
    for stage in samples
        .iter()
        .flat_map(|sample| &sample.operations)
        .flat_map(|operation| &operation.stages)
    {
        let key = (stage.operation.clone(), stage.stage.clone(), stage.within.clone());
        let of_this = measures.entry(key.clone()).or_default();
        if of_this.is_empty() {
            order.push(key);
        }
        of_this.push(stage.duration_us);
    }
    let spread = |key: (String, String, Option<String>)| {
        let spread = Spread::of(measures.remove(&key).unwrap_or_default())?;
        let (operation, stage, within) = key;
        Some(StageSpread {
            operation,
            stage,
            within,
            spread,
        })
    };
    order.into_iter().filter_map(spread).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::facts;
    use offshoot_model::{Boot, OperationId, OperationOutcome, RootRequest, StageOutcome, StageTiming};

    fn operation(kind: &str, began_us: u64, stages: &[(&str, Option<&str>, u64, u64)]) -> OperationTiming {
        let timing = |(stage, within, start_us, duration_us): &(&str, Option<&str>, u64, u64)| StageTiming {
            operation: kind.into(),
            stage: (*stage).into(),
            within: within.map(str::to_owned),
            start_us: *start_us,
            duration_us: *duration_us,
            outcome: StageOutcome::Done,
        };
        let stages: Vec<_> = stages.iter().map(timing).collect();
        OperationTiming {
            operation: OperationId::from_bytes(&[1; 4]),
            kind: kind.into(),
            vm_id: None,
            subject: "bench".into(),
            began_us,
            duration_us: stages.iter().map(StageTiming::end_us).max().unwrap_or(0),
            outcome: OperationOutcome::Done,
            stages,
        }
    }

    /// A VM that took `ms` to boot.
    fn sample(run: u32, variant: &str, ms: u64) -> Sample {
        let boot = ms * 1000;
        let start = [
            ("vmm.prepare", None, 0, 100_000),
            ("agent.after_boot", None, 100_000, boot + 20_000),
            ("guest.boot", Some("agent.after_boot"), 100_000, boot),
            ("main.after_boot", None, boot + 120_000, 4000),
        ];
        Sample {
            run,
            variant: variant.into(),
            vm: format!("bench-0a1b2c-{run}"),
            began_us: 0,
            created_us: 5000,
            running_us: boot + 135_000,
            exec_us: boot + 150_000,
            ssh_us: Some(boot + 190_000),
            vmm: "qemu".into(),
            root: "block".into(),
            boot: "cold".into(),
            operations: vec![
                operation(
                    "create",
                    500,
                    &[("network", None, 0, 1000), ("row", None, 1000, 2500)],
                ),
                operation("start", 6000, &start),
            ],
        }
    }

    /// Two kinds of VMs, one of which failed once.
    pub(crate) fn report() -> Report {
        let variant = |name: &str, boot| Variant {
            name: name.into(),
            boot,
            root: RootRequest::Auto,
            kernel: None,
        };
        let samples: Vec<_> = (0..5)
            .flat_map(|n| {
                [
                    sample(2 * n + 1, "cold", 1500 + 40 * u64::from(n)),
                    sample(2 * n + 2, "template", 60 + 10 * u64::from(n)),
                ]
            })
            .collect();
        let failures = vec![RunFailure {
            run: 11,
            variant: "template".into(),
            step: "exec",
            error: "it wrote `x`, not `y`".into(),
        }];
        let variants = vec![variant("cold", Boot::Cold), variant("template", Boot::Template)];
        Report {
            format: FORMAT,
            version: VERSION,
            host: facts::tests::facts(),
            settings: Settings {
                image: "debian:bookworm".into(),
                runs: 6,
                warmup: 1,
                parallel: 2,
                ssh: true,
                hold: false,
                memory: 512 << 20,
                cpus: 1,
            },
            variants: summarise(variants, &samples, &failures),
            samples,
            failures,
            wall_us: 12_345_678,
            interrupted: false,
        }
    }

    #[test]
    fn variants_are_compared_with_the_first() {
        let report = report();
        let [cold, template] = report.variants.as_slice() else {
            panic!("two variants");
        };
        let exec = cold.exec.unwrap();
        assert_eq!((exec.n, exec.min_us, exec.p50_us), (5, 1_650_000, 1_730_000));
        assert_eq!(
            (exec.p90_us, exec.p99_us, exec.max_us),
            (1_810_000, 1_810_000, 1_810_000)
        );
        assert!((cold.exec_to_first.unwrap() - 1.0).abs() < 1e-9);
        assert!((template.exec_to_first.unwrap() - 230.0 / 1730.0).abs() < 1e-9);
        assert_eq!((cold.failed, template.failed), (0, 1));
        let names: Vec<_> = cold.stages.iter().map(|stage| stage.stage.as_str()).collect();
        assert_eq!(
            names,
            [
                "network",
                "row",
                "vmm.prepare",
                "agent.after_boot",
                "guest.boot",
                "main.after_boot"
            ]
        );
        assert_eq!(cold.stages[4].spread.p50_us, 1_580_000);
    }

    #[test]
    fn nothing_measured_is_nothing_and_not_zero() {
        assert_eq!(Spread::of(Vec::new()), None);
        let variant = report().variants[0].variant.clone();
        let empty = summarise(vec![variant], &[], &[]);
        assert_eq!((empty[0].exec, empty[0].exec_to_first), (None, None));
        assert!(serde_json::to_value(&empty[0]).unwrap()["exec"].is_null());
    }

    #[test]
    fn the_shape_is_the_documented_one() {
        let value = serde_json::to_value(report()).unwrap();
        assert_eq!(
            (&value["format"], &value["version"]),
            (&FORMAT.into(), &VERSION.into())
        );
        let keys = |value: &serde_json::Value| -> String {
            let object = value.as_object().unwrap();
            object.keys().map(String::as_str).collect::<Vec<_>>().join(" ")
        };
        insta::assert_snapshot!(keys(&value), @"failures format host interrupted samples settings variants version wall_us");
        insta::assert_snapshot!(keys(&value["host"]), @"accel cores cpu guest_kernel kernel kvm load memory_mib offshoot vmms");
        insta::assert_snapshot!(keys(&value["settings"]), @"cpus hold image memory parallel runs ssh warmup");
        insta::assert_snapshot!(keys(&value["variants"][0]), @"boot created exec exec_to_first failed kernel name root running ssh stages");
        insta::assert_snapshot!(keys(&value["variants"][0]["exec"]), @"max_us min_us n p50_us p90_us p99_us");
        insta::assert_snapshot!(keys(&value["variants"][0]["stages"][0]), @"max_us min_us n operation p50_us p90_us p99_us stage within");
        insta::assert_snapshot!(keys(&value["samples"][0]), @"began_us boot created_us exec_us operations root run running_us ssh_us variant vm vmm");
        insta::assert_snapshot!(keys(&value["failures"][0]), @"error run step variant");
    }
}
