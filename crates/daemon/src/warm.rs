//! Which images have warm slots, and how many: those of the settings, and what clients asked for since.
//!
//! The engine makes, keeps and ends them ([`offshoot_engine::slots`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use offshoot_engine::engine::CreateRequest;
use offshoot_engine::operation::Stages;
use offshoot_model::VmConfig;
use tokio::sync::Notify;

use crate::app::Shared;
use crate::error::chain;
use crate::routes::vms::ready_to_create;

/// How often it is looked whether slots are still what is wanted: images get other content, kernels another default.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// The images that shall have warm slots.
pub struct WarmImages {
    wanted: Mutex<BTreeMap<String, usize>>,
    changed: Notify,
    /// Why there are fewer than are wanted, since the last look.
    problem: Mutex<Option<String>>,
}

impl WarmImages {
    /// Those of the settings.
    pub fn new(settings: BTreeMap<String, usize>) -> Self {
        Self {
            wanted: Mutex::new(settings),
            changed: Notify::new(),
            problem: Mutex::default(),
        }
    }

    fn wanted(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many each image shall have.
    pub fn all(&self) -> BTreeMap<String, usize> {
        self.wanted().clone()
    }

    /// Why there are fewer than are wanted, where the last look found a reason.
    pub fn problem(&self) -> Option<String> {
        self.problem
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn note(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// From now on, and until the daemon ends, an image has so many.
    pub fn set(&self, image: String, slots: usize) {
        if slots == 0 {
            self.wanted().remove(&image);
        } else {
            self.wanted().insert(image, slots);
        }
        self.changed.notify_one();
    }

    /// No image has any, until somebody asks again.
    pub fn clear(&self) {
        self.wanted().clear();
        self.changed.notify_one();
    }
}

/// Keeps as many slots as are wanted. Ends when the daemon is asked to.
pub fn keep(app: &Shared) {
    let app = Arc::clone(app);
    let end = app.end.clone();
    tokio::spawn(end.run_until_cancelled_owned(async move {
        loop {
            let (wanted, mut problem) = resolve(&app).await;
            if let Err(error) = app.engine.fill_slots(&wanted).await {
                tracing::warn!(causes = chain(&error), "cannot make a warm slot");
                problem.get_or_insert_with(|| chain(&error));
            }
            app.warm.note(problem);
            tokio::select! {
                () = app.engine.slots().taken() => {}
                () = app.warm.changed.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }));
}

/// What is wanted, as VMs of these images would be created now, and what stands in the way of the first that cannot be had. An
/// image that is not there has none.
async fn resolve(app: &Shared) -> (Vec<(CreateRequest, usize)>, Option<String>) {
    let images = app.warm.all();
    let (mut wanted, mut problem) = (Vec::new(), None);
    for (image, slots) in images {
        // Nobody asked for it, so it is no operation that is kept.
        let mut stages = Stages::begin("slot");
        match ready_to_create(app, VmConfig::new(&image), &mut stages).await {
            // The slot's own disks hold the base from then on; until then the next look finds out.
            Ok((request, _lease)) => wanted.push((request, slots)),
            Err(failure) => {
                let reason = failure.0.message;
                tracing::warn!(image, reason, "an image cannot have warm slots");
                problem.get_or_insert_with(|| format!("{image}: {reason}"));
            }
        }
    }
    (wanted, problem)
}
