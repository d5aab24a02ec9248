//! Mending what can be mended safely: nothing that anybody needs is deleted, nothing outside of the daemon's own
//! directories is changed, and doing it twice does nothing more.

use std::collections::{BTreeSet, HashSet};

use offshoot_api::doctor::{DoctorFixReport, FixOutcome};
use offshoot_api::error::ApiError;
use offshoot_model::{BaseId, ByteSize, Finding, Fix, Progress, ProgressUnit};
use offshoot_rootfs::base::{BaseError, base_id};

use super::{database, leftovers, modes, report, templates};
use crate::app::App;
use crate::blocking::blocking;
use crate::error::{Answer, Failure};

/// Does every fix that a finding asks for, and looks again. One that fails does not keep the others from being done.
/// Dropping the future ends it between two steps.
pub async fn mend(app: &App, progress: &Progress) -> Answer<DoctorFixReport> {
    let mut fixes = Vec::new();
    for fix in wanted(&report(app).await) {
        let task = progress.start(words(fix), ProgressUnit::Items, None);
        let mut mended = Mended::default();
        if let Err(failure) = run(app, fix, progress, &mut mended).await {
            mended.could_not(failure);
        }
        progress.finish(task);
        fixes.push(mended.outcome(fix));
    }
    Ok(DoctorFixReport {
        fixes,
        findings: report(app).await,
    })
}

/// Each fix once, modes first: what others can reach now is the most urgent.
fn wanted(findings: &[Finding]) -> BTreeSet<Fix> {
    findings.iter().filter_map(|found| found.fix).collect()
}

/// What a fix did, a line for each thing, and why it did not do all of it: the first reason.
#[derive(Debug, Default)]
pub(super) struct Mended {
    done: Vec<String>,
    failed: Option<ApiError>,
}

impl Mended {
    /// It did this.
    pub(super) fn did(&mut self, line: String) {
        tracing::info!("doctor {line}");
        self.done.push(line);
    }

    /// It could not do this, and goes on with the rest.
    pub(super) fn could_not(&mut self, Failure(error): Failure) {
        tracing::warn!(?error, "doctor could not mend something");
        self.failed.get_or_insert(error);
    }

    pub(super) fn outcome(self, fix: Fix) -> FixOutcome {
        FixOutcome {
            fix,
            done: self.done,
            failed: self.failed,
        }
    }
}

fn words(fix: Fix) -> &'static str {
    match fix {
        Fix::TightenModes => "tightening modes",
        Fix::RefreshKernel => "refreshing the kernel's agent",
        Fix::PrepareBases => "preparing bases again",
        Fix::SweepLeftovers => "sweeping leftovers",
        Fix::RemoveTemplates => "removing templates",
        Fix::CheckpointDatabase => "writing the database's log back",
    }
}

async fn run(app: &App, fix: Fix, progress: &Progress, mended: &mut Mended) -> Answer<()> {
    match fix {
        Fix::TightenModes => *mended = modes::tighten(app).await?,
        Fix::RefreshKernel => refresh_kernel(app, mended).await?,
        Fix::PrepareBases => prepare_bases(app, progress, mended).await?,
        Fix::SweepLeftovers => *mended = leftovers::sweep(app).await,
        Fix::RemoveTemplates => *mended = templates::remove_useless(app).await?,
        Fix::CheckpointDatabase => {
            let (before, after) = database::checkpoint(app.engine.db(), &app.data_dir).await?;
            let [before, after] = [before, after].map(ByteSize::from_bytes);
            mended.did(format!("cut the database's log from {before} to {after}"));
        }
    }
    Ok(())
}

/// VMs that exist keep the bundle they were made with.
async fn refresh_kernel(app: &App, mended: &mut Mended) -> Answer<()> {
    let old = app.kernels.default()?;
    let fresh = app.kernels.refresh(&old.id, &app.agent).await?;
    if fresh.id != old.id {
        mended.did(format!(
            "put this version's agent into kernel {}, which is {} now",
            old.id, fresh.id
        ));
    }
    Ok(())
}

/// Makes the bases again that are damaged, or that a VM needs and are gone, and the current ones of images that have only one
/// of an earlier version without a seed. One that belongs to no image in the store
/// cannot be made; where no VM needs it either, it goes.
async fn prepare_bases(app: &App, progress: &Progress, mended: &mut Mended) -> Answer<()> {
    let rows = app.engine.db().call(offshoot_store::db::Db::vms).await?;
    let needed: HashSet<BaseId> = rows.into_iter().map(|row| row.base_id).collect();
    let mut seen = HashSet::new();
    for image in app.images.list().await? {
        let id = base_id(&image.digest);
        if !seen.insert(id.clone()) {
            continue;
        }
        let (bases, wanted) = (app.images.bases.clone(), image.digest);
        let found = blocking("looking at a base", move || {
            Ok(bases.of_image(&wanted).map(|base| base.lacks()))
        })
        .await?;
        let lacks_seeds = found.as_ref().is_ok_and(|lacks| !lacks.is_empty());
        if !lacks_seeds && is_well(&found.map(drop), needed.contains(&id)) {
            continue;
        }
        // Without a seed it is an earlier version's, beside which the current one is made.
        match app.images.prepare(&image.reference, !lacks_seeds, progress).await {
            Ok(_) if lacks_seeds => mended.did(format!("made a base of {} with all seeds", image.reference)),
            Ok(_) => mended.did(format!("made the base of {} again", image.reference)),
            Err(failure) => mended.could_not(failure),
        }
    }
    let before = ids(app).await?;
    app.images.sweep_if_idle().await;
    let after = ids(app).await?;
    for id in before.difference(&after) {
        mended.did(format!("removed base {id}, which no image and no VM has"));
    }
    Ok(())
}

/// A base that was never made is none that must be made again.
fn is_well(found: &Result<(), BaseError>, needed: bool) -> bool {
    match found {
        Ok(()) => true,
        Err(BaseError::NotFound { .. }) => !needed,
        Err(_) => false,
    }
}

async fn ids(app: &App) -> Answer<BTreeSet<BaseId>> {
    let bases = app.images.bases.clone();
    blocking("listing bases", move || Ok(bases.ids()?.into_iter().collect())).await
}

#[cfg(test)]
mod tests {
    use offshoot_model::ErrorKind;

    use super::*;

    #[test]
    fn each_fix_is_done_once_and_modes_first() {
        let found = |fix: Option<Fix>| {
            let found = Finding::ok("x", "y");
            fix.map_or(found.clone(), |fix| found.fix(fix))
        };
        let findings = [
            Some(Fix::CheckpointDatabase),
            None,
            Some(Fix::TightenModes),
            Some(Fix::TightenModes),
        ];
        let wanted: Vec<_> = wanted(&findings.map(found)).into_iter().collect();
        assert_eq!(wanted, [Fix::TightenModes, Fix::CheckpointDatabase]);
    }

    #[test]
    fn only_what_is_needed_or_broken_is_made_again() {
        let id = BaseId::from_bytes(&[7; 16]);
        let missing = || Err(BaseError::NotFound { id: id.clone() });
        let damaged = || {
            Err(BaseError::Damaged {
                dir: "/d".into(),
                what: "it has no base.json",
            })
        };
        for (found, needed, expected) in [
            (Ok(()), true, true),
            (missing(), false, true),
            (missing(), true, false),
            (damaged(), false, false),
            (Err(BaseError::Format { dir: "/d".into() }), false, false),
        ] {
            assert_eq!(is_well(&found, needed), expected, "{found:?}");
        }
    }

    #[test]
    fn a_fix_that_fails_keeps_what_it_did_and_the_first_reason() {
        let mut mended = Mended::default();
        mended.did("one".into());
        for reason in ["full", "and fuller"] {
            mended.could_not(Failure::new(ErrorKind::NoSpace, reason));
        }
        mended.did("two".into());
        let outcome = mended.outcome(Fix::PrepareBases);
        assert_eq!(
            (outcome.fix, outcome.done),
            (Fix::PrepareBases, vec!["one".into(), "two".into()])
        );
        assert_eq!(outcome.failed.map(|error| error.message).as_deref(), Some("full"));
    }
}
