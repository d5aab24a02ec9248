//! The result as text: one table of what was waited for, one of the stages.

use super::report::{Report, Spread, StageSpread, VariantReport};
use crate::output::{clean, table};
use crate::timings::milliseconds;

/// Stages whose median takes less would hide the others.
const TOO_SHORT_US: u64 = 50;

pub(super) fn text(report: &Report) -> String {
    let (host, settings) = (&report.host, &report.settings);
    let mut text = format!(
        "{} x {}, {} MiB, Linux {}, load {}\n{}, guests run by {}, guest kernel {}, offshoot {}\n\
         {} of {} MiB and {} vCPU, {} at once, {} for warm-up{}\n\n",
        host.cores,
        clean(&host.cpu),
        host.memory_mib,
        clean(&host.kernel),
        clean(&host.load),
        clean(&host.vmms.join(", ")),
        host.accel,
        host.guest_kernel.as_deref().map_or("none".into(), clean),
        clean(&host.offshoot),
        clean(&settings.image),
        settings.memory >> 20,
        settings.cpus,
        settings.parallel,
        settings.warmup,
        if settings.hold {
            ", all held until the end"
        } else {
            ""
        },
    );
    let several = report.variants.len() > 1;
    text.push_str(&waits(&report.variants, several));
    if several {
        text.push('\n');
        for variant in &report.variants[1..] {
            if let Some(ratio) = variant.exec_to_first {
                let (name, first) = (
                    clean(&variant.variant.name),
                    clean(&report.variants[0].variant.name),
                );
                text.push_str(&format!(
                    "{name} to {first}, medians until the first command: {ratio:.2}\n"
                ));
            }
        }
    }
    for variant in &report.variants {
        if variant.stages.is_empty() {
            continue;
        }
        text.push('\n');
        if several {
            text.push_str(&format!("{}\n", clean(&variant.variant.name)));
        }
        text.push_str(&stages(&variant.stages));
    }
    let (done, failed) = (report.samples.len(), report.failures.len());
    let seconds = report.wall_us as f64 / 1e6;
    text.push_str(&format!("\n{done} VMs in {seconds:.2} s"));
    if failed > 0 {
        text.push_str(&format!(", {failed} failed"));
    }
    if report.interrupted {
        text.push_str(", interrupted");
    }
    text.push('\n');
    text
}

fn waits(variants: &[VariantReport], several: bool) -> String {
    let rows = variants.iter().flat_map(|variant| {
        [
            ("request to created", variant.created),
            ("request to running", variant.running),
            ("request to first command's output", variant.exec),
            ("request to SSH's answer", variant.ssh),
        ]
        .into_iter()
        .filter_map(|(what, spread)| Some((what, spread?)))
        .map(|(what, spread)| {
            let name = variant.variant.name.clone();
            let first = if several {
                format!("{name}: {what}")
            } else {
                what.to_owned()
            };
            row(first, &spread)
        })
        .collect::<Vec<_>>()
    });
    table(&["", "N", "P50", "P90", "P99", "MIN", "MAX"], rows)
}

fn row(first: String, spread: &Spread) -> Vec<String> {
    let mut row = vec![first, spread.n.to_string()];
    let times = [
        spread.p50_us,
        spread.p90_us,
        spread.p99_us,
        spread.min_us,
        spread.max_us,
    ];
    row.extend(times.map(milliseconds));
    row
}

fn stages(stages: &[StageSpread]) -> String {
    let shown = |stage: &&StageSpread| stage.spread.p50_us >= TOO_SHORT_US;
    let hidden = stages.iter().filter(|stage| !shown(stage)).count();
    let rows = stages.iter().filter(shown).map(|stage| {
        let indent = if stage.within.is_some() { "  " } else { "" };
        row(
            format!("{} {indent}{}", stage.operation, stage.stage),
            &stage.spread,
        )
    });
    let mut text = table(&["STAGE", "N", "P50", "P90", "P99", "MIN", "MAX"], rows);
    if hidden > 0 {
        text.push_str(&format!("and {hidden} under 0.05 ms\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    #[test]
    fn the_result_is_two_kinds_of_tables() {
        insta::assert_snapshot!(text(&report()), @r"
        2 x A CPU <1>, 24000 MiB, Linux 6.1.0, load 0.10 0.20 0.30
        qemu 7.2.0, guests run by tcg, guest kernel 6.12.0 (distro), offshoot 0.1.0
        debian:bookworm of 512 MiB and 1 vCPU, 2 at once, 1 for warm-up

                                                      N   P50        P90        P99        MIN        MAX
        cold: request to created                      5   5.0ms      5.0ms      5.0ms      5.0ms      5.0ms
        cold: request to running                      5   1715.0ms   1795.0ms   1795.0ms   1635.0ms   1795.0ms
        cold: request to first command's output       5   1730.0ms   1810.0ms   1810.0ms   1650.0ms   1810.0ms
        cold: request to SSH's answer                 5   1770.0ms   1850.0ms   1850.0ms   1690.0ms   1850.0ms
        template: request to created                  5   5.0ms      5.0ms      5.0ms      5.0ms      5.0ms
        template: request to running                  5   215.0ms    235.0ms    235.0ms    195.0ms    235.0ms
        template: request to first command's output   5   230.0ms    250.0ms    250.0ms    210.0ms    250.0ms
        template: request to SSH's answer             5   270.0ms    290.0ms    290.0ms    250.0ms    290.0ms

        template to cold, medians until the first command: 0.13

        cold
        STAGE                    N   P50        P90        P99        MIN        MAX
        create network           5   1.0ms      1.0ms      1.0ms      1.0ms      1.0ms
        create row               5   2.5ms      2.5ms      2.5ms      2.5ms      2.5ms
        start vmm.prepare        5   100.0ms    100.0ms    100.0ms    100.0ms    100.0ms
        start agent.after_boot   5   1600.0ms   1680.0ms   1680.0ms   1520.0ms   1680.0ms
        start   guest.boot       5   1580.0ms   1660.0ms   1660.0ms   1500.0ms   1660.0ms
        start main.after_boot    5   4.0ms      4.0ms      4.0ms      4.0ms      4.0ms

        template
        STAGE                    N   P50       P90       P99       MIN       MAX
        create network           5   1.0ms     1.0ms     1.0ms     1.0ms     1.0ms
        create row               5   2.5ms     2.5ms     2.5ms     2.5ms     2.5ms
        start vmm.prepare        5   100.0ms   100.0ms   100.0ms   100.0ms   100.0ms
        start agent.after_boot   5   100.0ms   120.0ms   120.0ms   80.0ms    120.0ms
        start   guest.boot       5   80.0ms    100.0ms   100.0ms   60.0ms    100.0ms
        start main.after_boot    5   4.0ms     4.0ms     4.0ms     4.0ms     4.0ms

        10 VMs in 12.35 s, 1 failed
        ");
    }

    #[test]
    fn one_kind_needs_no_name() {
        let mut report = report();
        report.variants.truncate(1);
        report.variants[0].stages.clear();
        report.failures.clear();
        report.interrupted = true;
        insta::assert_snapshot!(text(&report), @r"
        2 x A CPU <1>, 24000 MiB, Linux 6.1.0, load 0.10 0.20 0.30
        qemu 7.2.0, guests run by tcg, guest kernel 6.12.0 (distro), offshoot 0.1.0
        debian:bookworm of 512 MiB and 1 vCPU, 2 at once, 1 for warm-up

                                            N   P50        P90        P99        MIN        MAX
        request to created                  5   5.0ms      5.0ms      5.0ms      5.0ms      5.0ms
        request to running                  5   1715.0ms   1795.0ms   1795.0ms   1635.0ms   1795.0ms
        request to first command's output   5   1730.0ms   1810.0ms   1810.0ms   1650.0ms   1810.0ms
        request to SSH's answer             5   1770.0ms   1850.0ms   1850.0ms   1690.0ms   1850.0ms

        10 VMs in 12.35 s, interrupted
        ");
    }
}
