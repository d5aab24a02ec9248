//! `run --verbose`: which VMM, which root and which boot the daemon chose, why, and what it passed over.

use offshoot_api::client::Client;
use offshoot_api::vm::{Decision, VmDetails};

use crate::error::report_and_go_on;
use crate::output::note;

/// Says on standard error what was decided for a VM, one line a decision. That it cannot be told is no reason to fail.
pub(crate) async fn tell(client: &Client, vm: &str) {
    match client.vm(vm).await {
        Ok(details) => {
            for line in lines(&details) {
                note(&line);
            }
        }
        Err(e) => report_and_go_on(e.into()),
    }
}

fn lines(details: &VmDetails) -> Vec<String> {
    let mut lines = vec![told("vmm", &details.vmm), told("root", &details.root)];
    lines.extend(details.boot.as_ref().map(|boot| told("boot", boot)));
    lines
}

/// `root: block (a reason; another); not pmem: its reason; not virtiofs: its reason`
fn told(what: &str, decision: &Decision) -> String {
    let mut line = format!("{what}: {}", decision.chosen);
    if !decision.reasons.is_empty() {
        line.push_str(&format!(" ({})", decision.reasons.join("; ")));
    }
    for other in &decision.passed_over {
        line.push_str(&format!("; not {}: {}", other.name, other.reason));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_api::vm::PassedOver;

    #[test]
    fn one_line_says_what_why_and_why_not() {
        let check = |reasons: &[&str], passed_over: &[(&str, &str)]| {
            let decision = Decision {
                chosen: "block".into(),
                reasons: reasons.iter().map(ToString::to_string).collect(),
                passed_over: passed_over
                    .iter()
                    .map(|(name, reason)| PassedOver {
                        name: (*name).into(),
                        reason: (*reason).into(),
                    })
                    .collect(),
            };
            told("root", &decision)
        };
        insta::assert_snapshot!(
            check(
                &["a shared root that works on every VMM"],
                &[("pmem", "the kernel has no nd_pmem"), ("virtiofs", "no virtiofsd")],
            ),
            @"root: block (a shared root that works on every VMM); not pmem: the kernel has no nd_pmem; not virtiofs: no virtiofsd"
        );
        insta::assert_snapshot!(check(&["asked for", "emulated"], &[]), @"root: block (asked for; emulated)");
        insta::assert_snapshot!(check(&[], &[]), @"root: block");
    }
}
