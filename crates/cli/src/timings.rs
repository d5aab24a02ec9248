//! The stages of a VM's operations, drawn as bars over time.

use offshoot_model::{StageOutcome, StageTiming};

use crate::output::table;

/// How many characters stand for the longest operation.
const WIDTH: u64 = 40;

/// Hooks that have nothing to do in this VM take less; rows of them would hide the others.
const TOO_SHORT_US: u64 = 50;

/// One row per stage; the bars of one operation share one scale.
pub(crate) fn draw(timings: &[StageTiming]) -> String {
    let shown =
        |timing: &&StageTiming| timing.outcome != StageOutcome::Done || timing.duration_us >= TOO_SHORT_US;
    let hidden = timings.iter().filter(|timing| !shown(timing)).count();
    let rows = timings.iter().filter(shown).map(|timing| {
        let ends = timings
            .iter()
            .filter(|t| t.operation == timing.operation)
            .map(end);
        let total = ends.max().unwrap_or(0).max(1);
        let mark = match timing.outcome {
            StageOutcome::Done => "",
            StageOutcome::Failed => " failed",
            StageOutcome::Undone => " undone",
        };
        vec![
            timing.operation.clone(),
            timing.stage.clone(),
            milliseconds(timing.start_us),
            milliseconds(timing.duration_us) + mark,
            bar(timing, total),
        ]
    });
    let mut drawn = table(&["OPERATION", "STAGE", "START", "TIME", ""], rows);
    if hidden > 0 {
        drawn.push_str(&format!("and {hidden} under 0.05 ms\n"));
    }
    drawn
}

fn end(timing: &StageTiming) -> u64 {
    timing.start_us.saturating_add(timing.duration_us)
}

fn bar(timing: &StageTiming, total: u64) -> String {
    let place =
        |us: u64| usize::try_from(u128::from(us) * u128::from(WIDTH) / u128::from(total)).unwrap_or(0);
    let (from, to) = (place(timing.start_us), place(end(timing)));
    let length = (to - from).max(1);
    format!(
        "{}{}",
        " ".repeat(from.min(WIDTH as usize - 1)),
        "█".repeat(length)
    )
}

fn milliseconds(us: u64) -> String {
    format!("{}.{}ms", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_drawn_on_the_scale_of_their_operation() {
        let stage = |operation: &str, stage: &str, start_us, duration_us, outcome| StageTiming {
            operation: operation.into(),
            stage: stage.into(),
            start_us,
            duration_us,
            outcome,
        };
        let timings = [
            stage("create", "root.prepare", 0, 1000, StageOutcome::Done),
            stage("start", "root.plan", 0, 40, StageOutcome::Done),
            stage("start", "vmm.launch", 40, 499_960, StageOutcome::Done),
            stage("start", "agent.connect", 500_000, 1_500_000, StageOutcome::Failed),
            stage("start", "vmm.launch", 2_000_000, 0, StageOutcome::Undone),
        ];
        insta::assert_snapshot!(draw(&timings), @r#"
        OPERATION   STAGE           START      TIME
        create      root.prepare    0.0ms      1.0ms             ████████████████████████████████████████
        start       vmm.launch      0.0ms      499.9ms           ██████████
        start       agent.connect   500.0ms    1500.0ms failed             ██████████████████████████████
        start       vmm.launch      2000.0ms   0.0ms undone                                             █
        and 1 under 0.05 ms
        "#);
        assert_eq!(draw(&[]), "OPERATION   STAGE   START   TIME\n");
    }
}
