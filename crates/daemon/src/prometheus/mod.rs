//! Numbers for Prometheus: `GET /metrics` on the API's socket and, if asked for, over TCP on this machine.
//!
//! ```text
//! engine::measure ─┐
//! requests ────────┼─► recorder ─► text of a scrape
//! scrape: VMs, storage, traffic, process ─┘
//! ```
//!
//! What happens is counted when it happens; what is, is looked at when somebody asks. Labels are states, kinds, routes and
//! the like, never a VM's name: there is a bounded number of series.

mod listener;
mod names;
mod process;
mod requests;
mod storage;
mod traffic;

use std::time::Duration;

use anyhow::Context as _;
use metrics::gauge;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use offshoot_model::VmState;

pub use listener::{LoopbackAddress, listen};
pub use requests::measured;
use storage::Storage;

use crate::app::Shared;

/// The media type of the text format (Prometheus, "Exposition formats", version 0.0.4).
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Where durations fall, seconds: from the stages that only look (100 µs) to a boot under emulation on a busy host.
const BUCKETS: [f64; 16] = [
    0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

/// How often measured durations are sorted into buckets. Until then each takes eight bytes, and nobody may ever scrape.
const SORT_EVERY: Duration = Duration::from_secs(10);

/// Every state, so that one that no VM is in shows as 0.
const STATES: [VmState; 7] = VmState::ALL;

/// Everything that is counted.
pub struct Numbers {
    handle: PrometheusHandle,
    storage: Storage,
    traffic: traffic::Seen,
}

impl Numbers {
    /// Counts from now on. Once in a process, within the async runtime.
    pub fn install() -> anyhow::Result<Self> {
        let recorder = builder()?.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).context("something else counts already")?;
        names::describe();
        process::began();
        gauge!(names::BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        let sorted = handle.clone();
        tokio::spawn(async move {
            let mut often = tokio::time::interval(SORT_EVERY);
            loop {
                often.tick().await;
                sorted.run_upkeep();
            }
        });
        Ok(Self {
            handle,
            storage: Storage::default(),
            traffic: traffic::Seen::default(),
        })
    }

    /// The text of one scrape.
    pub async fn scrape(&self, app: &Shared) -> String {
        self.storage.refresh(app).await;
        let vms = app.engine.list();
        let states = vms.iter().map(|handle| handle.view.borrow().life.state);
        for (state, count) in by_state(states) {
            gauge!(names::VMS, "state" => state.as_str()).set(float(count));
        }
        let taps = app.engine.networks().taps().facts();
        gauge!(names::TAP_POOL_WANTED).set(float(taps.wanted as u64));
        gauge!(names::TAP_POOL_READY).set(float(taps.ready as u64));
        gauge!(names::WARM_SLOTS).set(float(app.engine.slots().list().len() as u64));
        self.traffic.refresh(app).await;
        process::look();
        self.handle.render()
    }
}

fn builder() -> anyhow::Result<PrometheusBuilder> {
    let seconds = Matcher::Suffix("_seconds".into());
    PrometheusBuilder::new()
        .set_buckets_for_metric(seconds, &BUCKETS)
        .context("cannot lay out histograms")
}

/// How many VMs are in each state.
fn by_state(states: impl Iterator<Item = VmState>) -> Vec<(VmState, u64)> {
    let mut counts = STATES.map(|state| (state, 0));
    for state in states {
        for (known, count) in &mut counts {
            *count += u64::from(*known == state);
        }
    }
    counts.to_vec()
}

/// A number as Prometheus has all numbers. Counts below 2⁵³ stay exact.
#[expect(clippy::cast_precision_loss, reason = "nothing here comes near 2^53")]
fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_a_number() {
        let vms = [VmState::Running, VmState::Stopped, VmState::Running];
        let counts = by_state(vms.into_iter());
        let of = |state| counts.iter().find(|(known, _)| *known == state).unwrap().1;
        assert_eq!(counts.len(), STATES.len());
        assert_eq!(
            (of(VmState::Running), of(VmState::Stopped), of(VmState::Failed)),
            (2, 1, 0)
        );
        // One that is missing from the list would count nowhere.
        assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>(), 3);
    }

    #[test]
    fn durations_fall_into_buckets() {
        let recorder = builder().unwrap().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            names::describe();
            let stage =
                metrics::histogram!(offshoot_engine::measure::STAGE_SECONDS, "stage" => "root.prepare");
            stage.record(Duration::from_micros(50));
            stage.record(Duration::from_millis(2200));
        });
        let text = recorder.handle().render();
        for line in [
            "# TYPE offshoot_stage_duration_seconds histogram",
            r#"offshoot_stage_duration_seconds_bucket{stage="root.prepare",le="0.0001"} 1"#,
            r#"offshoot_stage_duration_seconds_bucket{stage="root.prepare",le="1"} 1"#,
            r#"offshoot_stage_duration_seconds_bucket{stage="root.prepare",le="2.5"} 2"#,
            r#"offshoot_stage_duration_seconds_bucket{stage="root.prepare",le="+Inf"} 2"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(
            text.contains("# HELP offshoot_stage_duration_seconds How long"),
            "{text}"
        );
    }
}
