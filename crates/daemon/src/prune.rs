//! What may go: a pure decision over what lies in the stores and who needs it. `sweep.rs` reads the facts and carries the
//! plan out; no file is touched here.
//!
//! ```text
//!              stays because of
//!   blob       an image that has it
//!   base       an image (with `all` only one that it could not be made from again), a VM
//!   tree       a VM whose root is shown as files: `virtiofs`, `copy`
//!   kernel     a VM, being the default
//!   download   nothing
//!   template   a VM that runs and was restored from it; in the sweep that follows by itself, its base
//! ```
//!
//! What nothing keeps stays nevertheless while it is younger than the grace time: somebody may be about to use it.

use std::collections::HashSet;
use std::time::Duration;

use offshoot_api::prune::PruneKind;
use offshoot_model::{BaseId, Digest, KernelId, TemplateId};

/// The root back ends whose VMs need the tree of a base.
pub const TREE_ROOTS: [&str; 2] = ["virtiofs", "copy"];

/// What lies in the stores, and who needs it. Times are milliseconds since the epoch.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Now.
    pub now_ms: u64,
    /// Every image.
    pub images: Vec<ImageFacts>,
    /// Every VM, running or not.
    pub vms: Vec<VmFacts>,
    /// Every blob.
    pub blobs: Vec<BlobFacts>,
    /// Every download that broke off.
    pub downloads: Vec<BlobFacts>,
    /// Everything in a base's place.
    pub bases: Vec<BaseFacts>,
    /// Every kernel bundle.
    pub kernels: Vec<KernelFacts>,
    /// Every template.
    pub templates: Vec<TemplateFacts>,
}

/// One image under all its names.
#[derive(Clone, Debug)]
pub struct ImageFacts {
    /// Its names as users write them.
    pub names: Vec<String>,
    /// Its manifest.
    pub digest: Digest,
    /// The base it has or would have.
    pub base: BaseId,
    /// Every blob it needs, each once; the reason when that cannot be told.
    pub blobs: Result<Vec<Digest>, String>,
}

/// What one VM needs.
#[derive(Clone, Debug)]
pub struct VmFacts {
    /// Where its root comes from.
    pub base: BaseId,
    /// What it boots.
    pub kernel: KernelId,
    /// Whether its root is shown as files.
    pub needs_tree: bool,
}

/// A blob, or what has come of one.
#[derive(Clone, Copy, Debug)]
pub struct BlobFacts {
    /// Which.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: u64,
    /// When it was stored or grew.
    pub at_ms: u64,
}

/// A base.
#[derive(Clone, Debug)]
pub struct BaseFacts {
    /// Which.
    pub id: BaseId,
    /// When it was made, or a VM was made from it.
    pub used_ms: u64,
    /// When its tree was made; absent when it has none.
    pub tree_ms: Option<u64>,
}

/// A kernel bundle.
#[derive(Clone, Debug)]
pub struct KernelFacts {
    /// Which.
    pub id: KernelId,
    /// When it was made.
    pub created_ms: u64,
    /// Whether new VMs boot it.
    pub default: bool,
}

/// A template.
#[derive(Clone, Debug)]
pub struct TemplateFacts {
    /// Which.
    pub id: TemplateId,
    /// The base that its VMs have; absent when no VM of this host can be restored from it.
    pub base: Option<BaseId>,
    /// When it was made, or a VM was last restored from it.
    pub used_ms: u64,
    /// Whether a VM runs that was restored from it.
    pub leased: bool,
}

/// How eager to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Also bases of images that no VM uses.
    pub all: bool,
    /// What is younger stays.
    pub grace: Duration,
    /// Also templates that a VM could be restored from.
    pub templates: bool,
}

impl Rules {
    /// What is tidied by itself after every change of the images: it is known that nobody makes anything.
    pub const SWEEP: Self = Self {
        all: false,
        grace: Duration::ZERO,
        templates: false,
    };
}

/// One thing that goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A blob.
    Blob(Digest),
    /// What has come of a download.
    Download(Digest),
    /// A base with all that is in it.
    Base(BaseId),
    /// The tree in a base that stays.
    Tree(BaseId),
    /// A kernel bundle.
    Kernel(KernelId),
    /// A template.
    Template(TemplateId),
}

impl Item {
    /// What it is, for the wire.
    pub fn kind(&self) -> PruneKind {
        match self {
            Self::Blob(_) => PruneKind::Blob,
            Self::Download(_) => PruneKind::Download,
            Self::Base(_) => PruneKind::Base,
            Self::Tree(_) => PruneKind::Tree,
            Self::Kernel(_) => PruneKind::Kernel,
            Self::Template(_) => PruneKind::Template,
        }
    }

    /// Its digest or id.
    pub fn name(&self) -> String {
        match self {
            Self::Blob(digest) | Self::Download(digest) => digest.to_string(),
            Self::Base(id) | Self::Tree(id) => id.to_string(),
            Self::Kernel(id) => id.to_string(),
            Self::Template(id) => id.to_string(),
        }
    }
}

/// What goes, and what could but for its age.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// These go, in this order.
    pub remove: Vec<Item>,
    /// Nothing needs these either, but they are too young.
    pub spare: Vec<Item>,
    /// What was not looked at, and why.
    pub notes: Vec<String>,
}

/// Says what nothing needs.
pub fn plan(facts: &Facts, rules: Rules) -> Plan {
    let mut plan = Plan::default();
    let grace_ms = u64::try_from(rules.grace.as_millis()).unwrap_or(u64::MAX);
    let mut drop_it = |item, at_ms: u64| {
        // A time to come is a clock that went back: then it is young.
        if facts.now_ms.saturating_sub(at_ms) >= grace_ms && (at_ms <= facts.now_ms || grace_ms == 0) {
            plan.remove.push(item);
        } else {
            plan.spare.push(item);
        }
    };

    for download in &facts.downloads {
        drop_it(Item::Download(download.digest), download.at_ms);
    }

    let used_bases: HashSet<_> = facts.vms.iter().map(|vm| &vm.base).collect();
    let there: HashSet<_> = facts.blobs.iter().map(|blob| blob.digest).collect();
    // A base that could not be made again stays even with `all`: it is all that is left of its image.
    let is_whole = |image: &ImageFacts| {
        let blobs = image.blobs.as_ref();
        blobs.is_ok_and(|blobs| blobs.iter().all(|digest| there.contains(digest)))
    };
    let image_bases: HashSet<_> = facts
        .images
        .iter()
        .filter(|image| !(rules.all && is_whole(image)))
        .map(|image| &image.base)
        .collect();
    let trees: HashSet<_> = facts
        .vms
        .iter()
        .filter(|vm| vm.needs_tree)
        .map(|vm| &vm.base)
        .collect();
    for base in &facts.bases {
        let kept = used_bases.contains(&base.id) || image_bases.contains(&base.id);
        if !kept {
            drop_it(Item::Base(base.id.clone()), base.used_ms);
        } else if let Some(made_ms) = base.tree_ms
            && !trees.contains(&base.id)
        {
            drop_it(Item::Tree(base.id.clone()), made_ms);
        }
    }

    let used_kernels: HashSet<_> = facts.vms.iter().map(|vm| &vm.kernel).collect();
    for kernel in &facts.kernels {
        if !kernel.default && !used_kernels.contains(&kernel.id) {
            drop_it(Item::Kernel(kernel.id.clone()), kernel.created_ms);
        }
    }

    let bases: HashSet<_> = facts
        .bases
        .iter()
        .map(|base| &base.id)
        .filter(|id| used_bases.contains(id) || image_bases.contains(id))
        .collect();
    for template in facts.templates.iter().filter(|template| !template.leased) {
        let useful = template.base.as_ref().is_some_and(|base| bases.contains(base));
        if rules.templates || !useful {
            drop_it(Item::Template(template.id.clone()), template.used_ms);
        }
    }

    let mut needed: HashSet<Digest> = HashSet::new();
    let mut unknown = Vec::new();
    for image in &facts.images {
        match &image.blobs {
            Ok(blobs) => needed.extend(blobs),
            Err(reason) => unknown.push((image.names.join("`, `"), reason)),
        }
    }
    if unknown.is_empty() {
        for blob in facts.blobs.iter().filter(|blob| !needed.contains(&blob.digest)) {
            drop_it(Item::Blob(blob.digest), blob.at_ms);
        }
    }
    plan.notes = unknown
        .into_iter()
        .map(|(names, reason)| format!("all blobs stay, because image `{names}` cannot be read: {reason}"))
        .collect();
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000_000;
    const HOUR: u64 = 3_600_000;

    fn digest(n: u8) -> Digest {
        Digest::from_bytes([n; 32])
    }

    fn base(n: u8) -> BaseId {
        BaseId::from_bytes(&[n; 16])
    }

    fn kernel(n: u8) -> KernelId {
        KernelId::from_bytes(&[n; 8])
    }

    fn image(n: u8, blobs: &[u8]) -> ImageFacts {
        ImageFacts {
            names: vec![format!("image-{n}")],
            digest: digest(n),
            base: base(n),
            blobs: Ok(blobs.iter().copied().map(digest).collect()),
        }
    }

    fn vm(base_of: u8, kernel_of: u8, needs_tree: bool) -> VmFacts {
        VmFacts {
            base: base(base_of),
            kernel: kernel(kernel_of),
            needs_tree,
        }
    }

    fn blob(n: u8, age_ms: u64) -> BlobFacts {
        BlobFacts {
            digest: digest(n),
            bytes: 1,
            at_ms: NOW - age_ms,
        }
    }

    fn base_facts(n: u8, age_ms: u64, tree_age_ms: Option<u64>) -> BaseFacts {
        BaseFacts {
            id: base(n),
            used_ms: NOW - age_ms,
            tree_ms: tree_age_ms.map(|age| NOW - age),
        }
    }

    fn kernel_facts(n: u8, age_ms: u64, default: bool) -> KernelFacts {
        KernelFacts {
            id: kernel(n),
            created_ms: NOW - age_ms,
            default,
        }
    }

    /// Two images that share blob 10; a VM of the first; bases, kernels and leftovers of every kind, old and young.
    fn facts() -> Facts {
        Facts {
            now_ms: NOW,
            images: vec![image(1, &[1, 10, 11]), image(2, &[2, 10, 12])],
            vms: vec![vm(1, 1, false), vm(5, 3, true)],
            blobs: [1, 2, 10, 11, 12, 13].map(|n| blob(n, 2 * HOUR)).to_vec(),
            downloads: vec![blob(20, 2 * HOUR), blob(21, 1)],
            bases: vec![
                base_facts(1, 2 * HOUR, Some(2 * HOUR)),
                base_facts(2, 2 * HOUR, None),
                base_facts(3, 2 * HOUR, Some(2 * HOUR)),
                base_facts(4, 1, None),
                base_facts(5, 2 * HOUR, Some(2 * HOUR)),
            ],
            kernels: vec![
                kernel_facts(1, 2 * HOUR, false),
                kernel_facts(2, 2 * HOUR, true),
                kernel_facts(3, 2 * HOUR, false),
                kernel_facts(4, 2 * HOUR, false),
                kernel_facts(5, 1, false),
            ],
            templates: Vec::new(),
        }
    }

    fn rules(all: bool, grace_ms: u64) -> Rules {
        Rules {
            all,
            grace: Duration::from_millis(grace_ms),
            templates: true,
        }
    }

    #[track_caller]
    fn check(facts: &Facts, rules: Rules, remove: &[Item], spare: &[Item]) {
        let plan = plan(facts, rules);
        assert_eq!(plan.remove, remove);
        assert_eq!(plan.spare, spare);
        assert_eq!(plan.notes, [""; 0]);
    }

    #[test]
    fn what_nothing_keeps_goes_once_it_is_old() {
        let old = [
            Item::Download(digest(20)),
            Item::Tree(base(1)),
            Item::Base(base(3)),
            Item::Kernel(kernel(4)),
            Item::Blob(digest(13)),
        ];
        let young = [
            Item::Download(digest(21)),
            Item::Base(base(4)),
            Item::Kernel(kernel(5)),
        ];
        check(&facts(), rules(false, HOUR), &old, &young);
        let (mut everything, none) = ([&old[..], &young[..]].concat(), []);
        everything.sort_by_key(Item::name);
        let mut at_once = plan(&facts(), rules(false, 0));
        at_once.remove.sort_by_key(Item::name);
        assert_eq!((at_once.remove, at_once.spare), (everything, none.to_vec()));
    }

    #[test]
    fn all_takes_bases_that_only_images_have() {
        let plan = plan(&facts(), rules(true, HOUR));
        assert!(plan.remove.contains(&Item::Base(base(2))));
        // Never one that a VM has, whatever its age; but the tree that this VM does not need.
        assert!(!plan.remove.contains(&Item::Base(base(1))));
        assert!(!plan.remove.contains(&Item::Base(base(5))));
        assert!(plan.remove.contains(&Item::Tree(base(1))));
        assert!(!plan.remove.contains(&Item::Tree(base(5))));
    }

    #[test]
    fn a_base_that_could_not_be_made_again_stays() {
        let only = Item::Base(base(2));
        let mut facts = facts();
        assert!(plan(&facts, rules(true, 0)).remove.contains(&only));
        facts.blobs.retain(|blob| blob.digest != digest(12));
        assert!(
            !plan(&facts, rules(true, 0)).remove.contains(&only),
            "a layer is missing"
        );
        facts.images[1].blobs = Err("damaged".into());
        assert!(
            !plan(&facts, rules(true, 0)).remove.contains(&only),
            "nobody knows its layers"
        );
    }

    #[test]
    fn each_need_keeps_what_it_needs() {
        for (need, kept) in [
            (vm(3, 1, false), Item::Base(base(3))),
            (vm(1, 1, true), Item::Tree(base(1))),
            (vm(1, 4, false), Item::Kernel(kernel(4))),
        ] {
            let mut facts = facts();
            assert!(plan(&facts, Rules::SWEEP).remove.contains(&kept), "{kept:?}");
            facts.vms.push(need);
            assert!(!plan(&facts, Rules::SWEEP).remove.contains(&kept), "{kept:?}");
            assert!(!plan(&facts, rules(true, 0)).remove.contains(&kept), "{kept:?}");
        }
        for (need, kept) in [
            (image(3, &[3]), Item::Base(base(3))),
            (image(6, &[6, 13]), Item::Blob(digest(13))),
        ] {
            let mut facts = facts();
            assert!(plan(&facts, Rules::SWEEP).remove.contains(&kept), "{kept:?}");
            facts.images.push(need);
            assert!(!plan(&facts, Rules::SWEEP).remove.contains(&kept), "{kept:?}");
        }
        let mut facts = facts();
        facts.images.remove(1);
        let plan = plan(&facts, Rules::SWEEP);
        assert!(plan.remove.contains(&Item::Blob(digest(12))));
        assert!(
            !plan.remove.contains(&Item::Blob(digest(10))),
            "the other image has it"
        );
    }

    #[test]
    fn an_image_that_cannot_be_read_keeps_all_blobs_and_says_so() {
        let mut facts = facts();
        facts.images[1].blobs = Err("blob x is damaged on disk".into());
        let plan = plan(&facts, rules(true, 0));
        assert!(!plan.remove.iter().any(|item| matches!(item, Item::Blob(_))));
        assert!(plan.remove.contains(&Item::Kernel(kernel(4))));
        assert_eq!(
            plan.notes,
            ["all blobs stay, because image `image-2` cannot be read: blob x is damaged on disk"]
        );
    }

    #[test]
    fn the_edges_of_the_grace_time() {
        for (age_ms, grace_ms, goes) in [
            (HOUR, HOUR, true),
            (HOUR - 1, HOUR, false),
            (0, HOUR, false),
            (0, 0, true),
            (u64::MAX, HOUR, false), // made in the time to come
            (u64::MAX, 0, true),
        ] {
            let facts = Facts {
                now_ms: NOW,
                blobs: vec![BlobFacts {
                    digest: digest(1),
                    bytes: 1,
                    at_ms: if age_ms == u64::MAX {
                        NOW + HOUR
                    } else {
                        NOW - age_ms
                    },
                }],
                ..Facts::default()
            };
            let plan = plan(&facts, rules(false, grace_ms));
            assert_eq!(plan.remove.len() == 1, goes, "age {age_ms}, grace {grace_ms}");
            assert_eq!(plan.remove.len() + plan.spare.len(), 1);
        }
    }

    #[test]
    fn empty_stores_have_nothing_to_lose() {
        check(&Facts::default(), rules(true, 0), &[], &[]);
    }

    #[test]
    fn a_template_stays_for_the_vms_that_run_from_it() {
        let template = |n: u8, base_of: Option<u8>, age_ms: u64, leased: bool| TemplateFacts {
            id: TemplateId::from_bytes(&[n; 16]),
            base: base_of.map(base),
            used_ms: NOW - age_ms,
            leased,
        };
        let facts = Facts {
            templates: vec![
                template(1, Some(1), 2 * HOUR, true),
                template(2, Some(1), 2 * HOUR, false),
                template(3, Some(1), 1, false),
                template(4, Some(9), 2 * HOUR, false),
                template(5, None, 2 * HOUR, false),
            ],
            ..facts()
        };
        let gone = |rules: Rules| -> Vec<u8> {
            let ids = (1..=5).map(|n| (n, Item::Template(TemplateId::from_bytes(&[n; 16]))));
            let plan = plan(&facts, rules);
            ids.filter(|(_, item)| plan.remove.contains(item))
                .map(|(n, _)| n)
                .collect()
        };
        assert_eq!(gone(rules(false, HOUR)), [2, 4, 5]);
        assert_eq!(gone(rules(false, 0)), [2, 3, 4, 5]);
        // By itself goes only what no VM can be restored from.
        assert_eq!(gone(Rules::SWEEP), [4, 5]);
    }
}
