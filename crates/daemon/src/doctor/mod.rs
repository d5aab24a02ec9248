//! What is wrong with this host: every capability's own check, and what is no VM's concern.
//!
//! Capabilities answer for what a start needs, so that `doctor` and a start never disagree; a failure of theirs refuses
//! every start. What belongs to none of them is asked here, and refuses nothing.
//!
//! ```text
//! engine.check() ─┐
//! modes … network ┴─► distinct ─► report ─► GET  /v1/system/doctor
//!                                   └─► fix ─► POST /v1/system/doctor/fix
//! ```

mod clock;
mod database;
mod fix;
mod images;
mod leftovers;
mod limits;
mod modes;
mod network;
mod slots;
mod templates;
mod tools;

use std::collections::HashSet;

use offshoot_model::Finding;

use crate::app::App;

pub use fix::mend;

/// Every finding there is now.
pub async fn report(app: &App) -> Vec<Finding> {
    let mut findings = app.engine.check().await;
    findings.extend(images::check(&app.images).await);
    findings.extend(templates::check(app).await);
    findings.extend(slots::check(app));
    findings.extend(database::check(app.engine.db(), &app.data_dir).await);
    findings.extend(modes::check(app).await);
    findings.push(leftovers::judge(&leftovers::look(app).await));
    findings.push(clock::check());
    findings.extend(limits::check());
    findings.extend(tools::check());
    findings.extend(network::check(app.engine.networks().namespace()));
    distinct(findings)
}

/// Without what several capabilities found alike: a full disk is one finding, told by the first of them.
fn distinct(findings: Vec<Finding>) -> Vec<Finding> {
    let mut seen = HashSet::new();
    let is_new = |found: &Finding| seen.insert((found.id.clone(), found.message.clone()));
    findings.into_iter().filter(is_new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_found_alike_is_told_once() {
        let full = |capability: &str, place: &str| Finding::ok(capability, place).id("disk-full");
        let told = distinct(vec![
            full("folders", "/data"),
            full("overlay", "/data"),
            full("folders", "/run"),
        ]);
        assert_eq!(told, [full("folders", "/data"), full("folders", "/run")]);
    }
}
