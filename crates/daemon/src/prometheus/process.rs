//! The daemon's own process, under the names that every Prometheus client uses.

use std::time::{SystemTime, UNIX_EPOCH};

use metrics::{counter, gauge};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use super::float;
use super::names::{CPU_SECONDS, MAX_FDS, OPEN_FDS, RESIDENT_BYTES, START_SECONDS};

/// Notes when the process began; called once, when it does.
pub(super) fn began() {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    gauge!(START_SECONDS).set(since.as_secs_f64());
}

/// Reads what the kernel says of this process. What cannot be read stays as it was.
pub(super) fn look() {
    if let Ok(memory) = offshoot_sys::smaps::memory_of(std::process::id()) {
        gauge!(RESIDENT_BYTES).set(float(memory.rss));
    }
    if let Some(count) = open_files() {
        gauge!(OPEN_FDS).set(float(count));
    }
    if let Some(most) = getrlimit(Resource::Nofile).current {
        gauge!(MAX_FDS).set(float(most));
    }
    let cpu = clock_gettime(ClockId::ProcessCPUTime).tv_sec;
    counter!(CPU_SECONDS).absolute(cpu.unsigned_abs());
}

fn open_files() -> Option<u64> {
    let open = std::fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    // One of them is the folder that is being read.
    Some(open.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[test]
    fn the_kernel_tells_what_we_take() {
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            began();
            look();
        });
        let text = recorder.handle().render();
        let value = |name: &str| -> f64 {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} is not in\n{text}"))
                .parse()
                .unwrap()
        };
        // A megabyte at least, and not more than any machine has.
        assert!((1e6..1e13).contains(&value(RESIDENT_BYTES)));
        assert!(value(OPEN_FDS) >= 3.0 && value(OPEN_FDS) <= value(MAX_FDS));
        // After this was written.
        assert!(value(START_SECONDS) > 1.7e9);
        assert!(value(CPU_SECONDS) < 1e9);
    }
}
