//! Where the time of operations went, drawn as bars over time.
//!
//! ```text
//! STAGE                     START     TIME
//! start 1a2b3c4d            0.0ms     1834.2ms   ────────────────────────────────────────
//!   vmm.prepare             1.3ms     135.2ms    ██
//!   agent.after_boot        136.0ms   1503.0ms      ████████████████████████████████
//!     guest.boot            136.0ms   1400.0ms      ██████████████████████████████
//! ```
//!
//! What follows one another has the same indentation, what is a part of something stands below it. The bars of one operation
//! share one scale.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use offshoot_model::{OperationOutcome, OperationTiming, StageOutcome, StageTiming};
use serde::Serialize;

use crate::output::table;

/// How many characters stand for the longest operation.
const WIDTH: u64 = 40;

/// Hooks that have nothing to do in this VM take less; rows of them would hide the others.
const TOO_SHORT_US: u64 = 50;

/// The mark of what failed, which is always shown.
const FAILED: &str = " failed";

/// One row.
#[derive(Clone, Debug)]
struct Row {
    depth: usize,
    label: String,
    start_us: u64,
    /// `None`: something that happened, and took no time.
    duration_us: Option<u64>,
    /// How it did not end well.
    mark: &'static str,
    /// What fills its bar.
    fill: char,
}

impl Row {
    fn end_us(&self) -> u64 {
        self.start_us.saturating_add(self.duration_us.unwrap_or(0))
    }

    fn is_shown(&self) -> bool {
        self.mark == FAILED || self.duration_us.is_none_or(|us| us >= TOO_SHORT_US)
    }
}

/// Each operation on a scale of its own.
pub(crate) fn draw(operations: &[OperationTiming]) -> String {
    let waterfalls: Vec<_> = operations
        .iter()
        .map(|operation| of_operation(operation, &operation.kind, 0, 0))
        .collect();
    draw_all(&waterfalls)
}

fn draw_all(waterfalls: &[Vec<Row>]) -> String {
    let hidden = waterfalls.iter().flatten().filter(|row| !row.is_shown()).count();
    let rows = waterfalls.iter().flat_map(|rows| {
        let total = rows.iter().map(Row::end_us).max().unwrap_or(0).max(1);
        rows.iter().filter(|row| row.is_shown()).map(move |row| {
            let time = row.duration_us.map_or_else(String::new, milliseconds);
            vec![
                format!("{}{}", "  ".repeat(row.depth), row.label),
                milliseconds(row.start_us),
                time + row.mark,
                bar(row, total),
            ]
        })
    });
    let mut drawn = table(&["STAGE", "START", "TIME", ""], rows);
    if hidden > 0 {
        drawn.push_str(&format!("and {hidden} under 0.05 ms\n"));
    }
    drawn
}

/// An operation as it lies `offset_us` after the beginning of the scale.
fn of_operation(operation: &OperationTiming, name: &str, depth: usize, offset_us: u64) -> Vec<Row> {
    let mut rows = vec![Row {
        depth,
        label: format!("{name} {}", operation.operation),
        start_us: offset_us,
        duration_us: Some(operation.duration_us),
        mark: match operation.outcome {
            OperationOutcome::Done => "",
            OperationOutcome::Failed => FAILED,
        },
        fill: '─',
    }];
    rows.extend(
        operation
            .stages
            .iter()
            .map(|stage| of_stage(stage, depth + 1, offset_us)),
    );
    rows
}

fn of_stage(stage: &StageTiming, depth: usize, offset_us: u64) -> Row {
    Row {
        depth: depth + usize::from(stage.within.is_some()),
        label: stage.stage.clone(),
        start_us: stage.start_us.saturating_add(offset_us),
        duration_us: Some(stage.duration_us),
        mark: match stage.outcome {
            StageOutcome::Done => "",
            StageOutcome::Failed => FAILED,
            StageOutcome::Undone => " undone",
        },
        fill: '█',
    }
}

fn bar(row: &Row, total: u64) -> String {
    let place =
        |us: u64| usize::try_from(u128::from(us) * u128::from(WIDTH) / u128::from(total)).unwrap_or(0);
    let (from, to) = (place(row.start_us), place(row.end_us()));
    let fill = if row.duration_us.is_some() {
        row.fill
    } else {
        '◆'
    };
    let bar: String = std::iter::repeat_n(fill, (to - from).max(1)).collect();
    format!("{}{bar}", " ".repeat(from.min(WIDTH as usize - 1)))
}

pub(crate) fn milliseconds(us: u64) -> String {
    format!("{}.{}ms", us / 1000, us % 1000 / 100)
}

/// A `run` as its client saw it, with what the daemon did meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct RunTimings {
    /// When the client began, microseconds since the epoch, by the clock that the daemon has as well.
    pub(crate) began_us: u64,
    /// Until the client was done.
    pub(crate) duration_us: u64,
    /// When the first byte of output came, microseconds since it began; absent when none came.
    pub(crate) first_output_us: Option<u64>,
    /// What the client waited for, one after another.
    pub(crate) stages: Vec<StageTiming>,
    /// What the daemon did to the VM.
    pub(crate) operations: Vec<OperationTiming>,
}

impl RunTimings {
    /// One waterfall: each operation of the daemon below what the client waited for when it began.
    pub(crate) fn draw(&self) -> String {
        let mut rows = vec![Row {
            depth: 0,
            label: "run".into(),
            start_us: 0,
            duration_us: Some(self.duration_us),
            mark: "",
            fill: '─',
        }];
        let offset = |operation: &OperationTiming| operation.began_us.saturating_sub(self.began_us);
        let mut first_output = self.first_output_us;
        for (at, stage) in self.stages.iter().enumerate() {
            let next = self.stages.get(at + 1).map(|next| next.start_us);
            let is_within = |us: u64| (at == 0 || us >= stage.start_us) && next.is_none_or(|next| us < next);
            rows.push(of_stage(stage, 1, 0));
            for operation in &self.operations {
                let offset = offset(operation);
                if is_within(offset) {
                    let name = format!("offshootd {}", operation.kind);
                    rows.extend(of_operation(operation, &name, 2, offset));
                }
            }
            if let Some(start_us) = first_output.take_if(|us| is_within(*us)) {
                rows.push(Row {
                    depth: 2,
                    label: "first output".into(),
                    start_us,
                    duration_us: None,
                    mark: "",
                    fill: ' ',
                });
            }
        }
        draw_all(&[rows])
    }
}

/// Times what a client waits for.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    began: Instant,
    began_us: u64,
    stages: Vec<StageTiming>,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            began: Instant::now(),
            began_us: micros(since),
            stages: Vec::new(),
        }
    }

    /// Waits for one thing.
    pub(crate) async fn stage<T>(&mut self, name: &str, work: impl Future<Output = T>) -> T {
        let start = self.began.elapsed();
        let result = work.await;
        self.stages.push(StageTiming {
            operation: "run".into(),
            stage: name.to_owned(),
            within: None,
            start_us: micros(start),
            duration_us: micros(self.began.elapsed() - start),
            outcome: StageOutcome::Done,
        });
        result
    }

    /// All of it, with what the daemon says.
    pub(crate) fn stop(self, first_output: Option<Instant>, operations: Vec<OperationTiming>) -> RunTimings {
        RunTimings {
            began_us: self.began_us,
            duration_us: micros(self.began.elapsed()),
            first_output_us: first_output.map(|then| micros(then.saturating_duration_since(self.began))),
            stages: self.stages,
            operations,
        }
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::OperationId;

    fn stage(stage: &str, within: Option<&str>, start_us: u64, duration_us: u64) -> StageTiming {
        StageTiming {
            operation: "start".into(),
            stage: stage.into(),
            within: within.map(str::to_owned),
            start_us,
            duration_us,
            outcome: StageOutcome::Done,
        }
    }

    fn operation(kind: &str, began_us: u64, duration_us: u64, stages: Vec<StageTiming>) -> OperationTiming {
        OperationTiming {
            operation: OperationId::from_bytes(&[u8::try_from(kind.len()).unwrap(); 4]),
            kind: kind.into(),
            vm_id: None,
            subject: "web".into(),
            began_us,
            duration_us,
            outcome: OperationOutcome::of(&stages),
            stages,
        }
    }

    fn create(began_us: u64) -> OperationTiming {
        operation(
            "create",
            began_us,
            1400,
            vec![stage("network", None, 0, 300), stage("row", None, 300, 1000)],
        )
    }

    #[test]
    fn stages_are_drawn_on_the_scale_of_their_operation() {
        let ended = |outcome, timing| StageTiming { outcome, ..timing };
        let start = vec![
            ended(StageOutcome::Undone, stage("root.prepare", None, 0, 40)),
            ended(StageOutcome::Undone, stage("vmm.prepare", None, 40, 499_960)),
            stage("limits.prepare", None, 500_000, 3),
            ended(
                StageOutcome::Failed,
                stage("agent.after_boot", None, 500_000, 1_500_000),
            ),
            stage("guest.boot", Some("agent.after_boot"), 500_000, 1_400_000),
            stage("vmm.stop", None, 2_000_000, 9000),
        ];
        insta::assert_snapshot!(draw(&[create(5), operation("start", 9, 2_009_900, start)]), @r"
        STAGE                START      TIME
        create 06060606      0.0ms      1.4ms             ────────────────────────────────────────
          network            0.0ms      0.3ms             ████████
          row                0.3ms      1.0ms                     █████████████████████████████
        start 05050505       0.0ms      2009.9ms failed   ────────────────────────────────────────
          vmm.prepare        0.0ms      499.9ms undone    █████████
          agent.after_boot   500.0ms    1500.0ms failed            ██████████████████████████████
            guest.boot       500.0ms    1400.0ms                   ████████████████████████████
          vmm.stop           2000.0ms   9.0ms                                                    █
        and 2 under 0.05 ms
        ");
        assert_eq!(draw(&[]), "STAGE   START   TIME\n");
    }

    #[test]
    fn a_run_is_one_waterfall() {
        let start = vec![
            stage("vmm.prepare", None, 100, 90_000),
            stage("agent.after_boot", None, 90_100, 700_000),
            stage("guest.boot", Some("agent.after_boot"), 90_100, 650_000),
            stage("main.after_boot", None, 790_200, 10_000),
        ];
        let timings = RunTimings {
            began_us: 1_000_000,
            duration_us: 1_000_000,
            first_output_us: Some(870_000),
            stages: vec![
                stage("image", None, 0, 1500),
                stage("create", None, 1500, 3000),
                stage("attach", None, 4500, 500),
                stage("start", None, 5000, 820_000),
                stage("main", None, 825_000, 100_000),
                stage("removal", None, 925_000, 75_000),
            ],
            operations: vec![
                create(1_002_000),
                operation("start", 1_005_500, 819_000, start),
                operation(
                    "stop",
                    1_925_500,
                    60_000,
                    vec![stage("vmm.stop", None, 0, 60_000)],
                ),
            ],
        };
        insta::assert_snapshot!(timings.draw(), @r"
        STAGE                           START     TIME
        run                             0.0ms     1000.0ms   ────────────────────────────────────────
          image                         0.0ms     1.5ms      █
          create                        1.5ms     3.0ms      █
            offshootd create 06060606   2.0ms     1.4ms      ─
              network                   2.0ms     0.3ms      █
              row                       2.3ms     1.0ms      █
          attach                        4.5ms     0.5ms      █
          start                         5.0ms     820.0ms    █████████████████████████████████
            offshootd start 05050505    5.5ms     819.0ms    ────────────────────────────────
              vmm.prepare               5.6ms     90.0ms     ███
              agent.after_boot          95.6ms    700.0ms       ████████████████████████████
                guest.boot              95.6ms    650.0ms       ██████████████████████████
              main.after_boot           795.7ms   10.0ms                                    █
          main                          825.0ms   100.0ms                                     ████
            first output                870.0ms                                                ◆
          removal                       925.0ms   75.0ms                                          ███
            offshootd stop 04040404     925.5ms   60.0ms                                          ──
              vmm.stop                  925.5ms   60.0ms                                          ██
        ");
    }

    #[tokio::test]
    async fn a_stopwatch_puts_one_after_another() {
        let mut watch = Stopwatch::start();
        assert_eq!(watch.stage("create", async { 7 }).await, 7);
        watch.stage("start", async {}).await;
        let timings = watch.stop(None, Vec::new());
        let names: Vec<_> = timings.stages.iter().map(|stage| stage.stage.as_str()).collect();
        assert_eq!(names, ["create", "start"]);
        assert!(timings.stages[1].start_us >= timings.stages[0].end_us());
        assert!(timings.duration_us >= timings.stages[1].end_us());
    }
}
