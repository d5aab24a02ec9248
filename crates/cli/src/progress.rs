//! Progress bars on standard error, where it is a terminal; nothing where it is not.

use std::collections::HashMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use offshoot_model::{ProgressEvent, ProgressUnit, TaskId};

use crate::output::clean;

/// How often a bar without a total shows that it lives.
const TICK: Duration = Duration::from_millis(120);

/// One bar per task that goes on.
#[derive(Debug)]
pub(crate) struct Bars {
    all: MultiProgress,
    bars: HashMap<TaskId, ProgressBar>,
}

impl Bars {
    pub(crate) fn new(quiet: bool) -> Self {
        let target = if quiet {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        Self {
            all: MultiProgress::with_draw_target(target),
            bars: HashMap::new(),
        }
    }

    /// Shows one step.
    pub(crate) fn show(&mut self, event: ProgressEvent) {
        match event {
            ProgressEvent::Started {
                task,
                label,
                unit,
                total,
            } => {
                let bar = self
                    .all
                    .add(total.map_or_else(ProgressBar::new_spinner, ProgressBar::new));
                bar.set_style(style(unit, total.is_some()));
                bar.set_message(clean(&label));
                if total.is_none() {
                    bar.enable_steady_tick(TICK);
                }
                self.bars.insert(task, bar);
            }
            ProgressEvent::Moved { task, done } => {
                if let Some(bar) = self.bars.get(&task) {
                    bar.set_position(done);
                }
            }
            ProgressEvent::Finished { task } => {
                if let Some(bar) = self.bars.remove(&task) {
                    bar.finish_and_clear();
                    self.all.remove(&bar);
                }
            }
            ProgressEvent::Message { text } => {
                // Fails only when standard error is closed.
                let _ = self.all.println(clean(&text));
            }
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        for bar in self.bars.values() {
            bar.finish_and_clear();
        }
        // Fails only when standard error is closed.
        let _ = self.all.clear();
    }
}

fn style(unit: ProgressUnit, total: bool) -> ProgressStyle {
    let template = match (unit, total) {
        (ProgressUnit::Bytes, true) => {
            "{msg:32!} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}"
        }
        (ProgressUnit::Items, true) => "{msg:32!} [{bar:30}] {pos}/{len}",
        (ProgressUnit::Bytes, false) => "{msg:32!} {spinner} {binary_bytes}",
        (ProgressUnit::Items, false) => "{msg:32!} {spinner}",
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_style_is_a_valid_template() {
        for unit in [ProgressUnit::Bytes, ProgressUnit::Items] {
            for total in [true, false] {
                style(unit, total);
            }
        }
        let template = "{msg:32!} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
        assert!(ProgressStyle::with_template(template).is_ok());
    }

    #[test]
    fn events_in_any_order_are_taken() {
        let mut bars = Bars::new(true);
        bars.show(ProgressEvent::Moved { task: 9, done: 1 });
        bars.show(ProgressEvent::Finished { task: 9 });
        for total in [None, Some(5)] {
            bars.show(ProgressEvent::Started {
                task: 1,
                label: "x".into(),
                unit: ProgressUnit::Items,
                total,
            });
        }
        bars.show(ProgressEvent::Moved { task: 1, done: 7 });
        assert_eq!(bars.bars[&1].position(), 7);
        bars.show(ProgressEvent::Finished { task: 1 });
        assert!(bars.bars.is_empty());
    }
}
