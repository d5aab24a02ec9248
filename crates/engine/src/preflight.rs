//! What the capabilities' own checks say of this host: asked before a start that is known to be doomed, and after one
//! that failed.
//!
//! A healthy host pays nothing for it: a check is asked again only where the last look found a failure. `doctor` is
//! answered from the same place, so the two never disagree.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use offshoot_model::{Finding, Severity, VmName};

use crate::capability::Capability;
use crate::error::VmError;

pub(crate) struct Preflight {
    capabilities: Vec<Arc<dyn Capability>>,
    /// Names of those whose last check found a failure.
    failing: Mutex<BTreeSet<&'static str>>,
}

impl Preflight {
    pub(crate) fn new(capabilities: Vec<Arc<dyn Capability>>) -> Self {
        Self {
            capabilities,
            failing: Mutex::default(),
        }
    }

    fn failing(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, capability: &dyn Capability) -> Vec<Finding> {
        let findings = capability.check().await;
        let failed = findings
            .iter()
            .any(|finding| finding.severity == Severity::Failure);
        if failed {
            self.failing().insert(capability.name());
        } else {
            self.failing().remove(capability.name());
        }
        findings
    }

    /// Every finding of every capability.
    pub(crate) async fn look(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for capability in &self.capabilities {
            findings.extend(self.ask(&**capability).await);
        }
        findings
    }

    /// What is amiss now, after the named capability failed: every failure, whose concern it may be, and its own warnings.
    pub(crate) async fn explain(&self, name: &str) -> Vec<Finding> {
        let mut amiss = Vec::new();
        for capability in &self.capabilities {
            let mut findings = self.ask(&**capability).await;
            let own = capability.name() == name;
            findings.retain(|finding| match finding.severity {
                Severity::Failure => true,
                Severity::Warning => own,
                Severity::Ok => false,
            });
            amiss.extend(findings);
        }
        amiss
    }

    /// What one capability says now that makes every start fail.
    async fn failures_of(&self, name: &str) -> Vec<Finding> {
        let Some(capability) = self.capabilities.iter().find(|c| c.name() == name) else {
            return Vec::new();
        };
        let mut findings = self.ask(&**capability).await;
        findings.retain(|finding| finding.severity == Severity::Failure);
        findings
    }

    /// Refuses a start that cannot work, for a reason that was found before and is still there.
    pub(crate) async fn refuse_the_doomed(&self, name: &VmName) -> Result<(), VmError> {
        let failing = self.failing().clone();
        for failing in failing {
            let findings = self.failures_of(failing).await;
            if !findings.is_empty() {
                return Err(VmError::Unfit {
                    name: name.clone(),
                    findings,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[derive(Default)]
    struct Fickle {
        broken: AtomicBool,
        asked: AtomicUsize,
    }

    #[async_trait]
    impl Capability for Fickle {
        fn name(&self) -> &'static str {
            "fickle"
        }

        async fn check(&self) -> Vec<Finding> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let severity = if self.broken.load(Ordering::Relaxed) {
                Severity::Failure
            } else {
                Severity::Ok
            };
            vec![crate::capabilities::finding(
                "fickle", severity, "so it is", "mend it",
            )]
        }
    }

    #[tokio::test]
    async fn a_start_is_refused_as_long_as_a_failure_that_was_seen_is_there() {
        let fickle = Arc::new(Fickle::default());
        let preflight = Preflight::new(vec![Arc::clone(&fickle) as Arc<dyn Capability>]);
        let name: VmName = "web".parse().unwrap();
        let asked = || fickle.asked.load(Ordering::Relaxed);
        preflight.refuse_the_doomed(&name).await.unwrap();
        assert_eq!(asked(), 0, "a host that was not found wanting is not asked");
        assert_eq!(preflight.explain("fickle").await, []);
        assert_eq!(preflight.explain("nobody").await, []);
        assert_eq!(preflight.failures_of("nobody").await, []);

        fickle.broken.store(true, Ordering::Relaxed);
        preflight.refuse_the_doomed(&name).await.unwrap();
        assert_eq!(preflight.look().await.len(), 1);
        let refused = preflight.refuse_the_doomed(&name).await.unwrap_err();
        assert!(matches!(&refused, VmError::Unfit { findings, .. } if findings[0].message == "so it is"));

        fickle.broken.store(false, Ordering::Relaxed);
        preflight.refuse_the_doomed(&name).await.unwrap();
        let before = asked();
        preflight.refuse_the_doomed(&name).await.unwrap();
        assert_eq!(asked(), before, "mended is forgotten");
    }
}
