//! Templates that no VM of this host will be restored from: damaged ones, and those of another VMM, processor or version.

use offshoot_engine::templates::TemplateInfo;
use offshoot_model::{ByteSize, Finding, Fix, Severity};

use super::fix::Mended;
use crate::app::App;
use crate::error::{Answer, Failure};
use crate::sweep::unreadable_templates;

const PART: &str = "templates";

/// Nothing where there are none.
pub(super) async fn check(app: &App) -> Vec<Finding> {
    match look(app).await {
        Ok(found) if found.is_empty() => Vec::new(),
        Ok(found) => vec![judge(&found)],
        Err(Failure(error)) => vec![
            Finding::new(
                PART,
                Severity::Warning,
                error.message,
                "look at `templates` in the data directory",
            )
            .id("templates-unreadable")
            .cost("VMs boot their kernel"),
        ],
    }
}

async fn look(app: &App) -> Answer<Vec<TemplateInfo>> {
    let Some(templates) = app.engine.templates() else {
        return Ok(Vec::new());
    };
    templates.look_at_vmms().await;
    let templates = std::sync::Arc::clone(templates);
    crate::blocking::blocking("looking at templates", move || {
        templates.list().map_err(|error| unreadable_templates(&error))
    })
    .await
}

fn problem(found: &TemplateInfo) -> Option<&str> {
    let damage = found.stored.as_ref().err();
    damage.or(found.stale.as_ref()).map(String::as_str)
}

fn judge(found: &[TemplateInfo]) -> Finding {
    let useless: Vec<_> = found.iter().filter(|found| problem(found).is_some()).collect();
    let Some(first) = useless.first() else {
        let message = match found.len() {
            1 => "1 template is of this host".to_owned(),
            count => format!("{count} templates are of this host"),
        };
        return Finding::ok(PART, message).id("templates");
    };
    let disk = ByteSize::from_bytes(useless.iter().map(|found| found.disk.bytes()).sum());
    let count = match useless.len() {
        1 => "1 template is".to_owned(),
        count => format!("{count} templates are"),
    };
    Finding::new(
        PART,
        Severity::Warning,
        format!(
            "{count} of no use ({disk}); {}: {}",
            first.id,
            problem(first).unwrap_or_default()
        ),
        "offshoot doctor --fix",
    )
    .id("template-useless")
    .cost("disk space; the next VM of such a kind boots its kernel, and its template is made again")
    .fix(Fix::RemoveTemplates)
}

/// Removes those that are of no use. VMs that were restored from them keep what they have.
pub(super) async fn remove_useless(app: &App) -> Answer<Mended> {
    let mut mended = Mended::default();
    let Some(templates) = app.engine.templates() else {
        return Ok(mended);
    };
    for found in look(app).await? {
        let Some(why) = problem(&found) else { continue };
        match templates.remove(&found.id).await {
            Ok(()) => mended.did(format!("removed template {}: {why}", found.id)),
            Err(error) => mended.could_not(error.into()),
        }
    }
    Ok(mended)
}

#[cfg(test)]
mod tests {
    use offshoot_model::TemplateId;

    use super::*;

    fn template(n: u8, damage: &str) -> TemplateInfo {
        TemplateInfo {
            id: TemplateId::from_bytes(&[n; 16]),
            stored: Err(damage.into()),
            stale: None,
            disk: ByteSize::from_mib(10),
            held: ByteSize::from_mib(0),
        }
    }

    #[test]
    fn what_is_of_no_use_is_counted_and_one_is_named() {
        let bad = judge(&[
            template(1, "it has no template.json"),
            template(2, "it is damaged"),
        ]);
        assert_eq!(
            (bad.severity, bad.fix),
            (Severity::Warning, Some(Fix::RemoveTemplates))
        );
        for word in [
            "2 templates",
            "20MiB",
            "01010101010101010101010101010101",
            "no template.json",
        ] {
            assert!(bad.message.contains(word), "{word}: {bad:?}");
        }
    }
}
