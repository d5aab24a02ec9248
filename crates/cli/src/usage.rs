//! `df`: what everything takes on disk, and VMs in memory.

use clap::Args;
use offshoot_api::client::Client;
use offshoot_api::usage::{DiskUsage, MemoryUsage, SlotUsage};
use offshoot_model::ByteSize;

use crate::error::Failure;
use crate::output::{Output, OutputArgs, json, line, table};

#[derive(Clone, Debug, Args)]
pub(crate) struct DfArgs {
    /// Also every image, base, kernel and VM
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) async fn df(client: &Client, args: &DfArgs) -> Result<u8, Failure> {
    let usage = client.df().await?;
    match args.output.output {
        Output::Json => json(&usage)?,
        Output::Table if args.verbose => line(&format!("{}\n{}", summary(&usage), items(&usage)))?,
        Output::Table => line(&summary(&usage))?,
    }
    Ok(0)
}

fn size(bytes: u64) -> String {
    ByteSize::from_bytes(bytes).to_string()
}

fn summary(usage: &DiskUsage) -> String {
    let none = String::new;
    let disk = |of: fn(&offshoot_api::usage::VmDiskUsage) -> u64| {
        size(usage.vms.iter().map(|vm| of(&vm.disk)).sum())
    };
    let rows = [
        vec![
            "Images".to_owned(),
            usage.images.len().to_string(),
            size(usage.blobs.bytes),
            size(usage.blobs.shared),
            size(usage.blobs.unique),
            size(usage.blobs.reclaimable),
        ],
        vec![
            "Downloads".to_owned(),
            usage.downloads.count.to_string(),
            size(usage.downloads.bytes),
            none(),
            none(),
            size(usage.downloads.reclaimable),
        ],
        vec![
            "Bases".to_owned(),
            usage.bases.len().to_string(),
            size(usage.bases.iter().map(|base| base.bytes).sum()),
            none(),
            none(),
            size(usage.bases.iter().map(|base| base.reclaimable).sum()),
        ],
        vec![
            "Kernels".to_owned(),
            usage.kernels.len().to_string(),
            size(usage.kernels.iter().map(|kernel| kernel.bytes).sum()),
            none(),
            none(),
            size(usage.kernels.iter().map(|kernel| kernel.reclaimable).sum()),
        ],
        vec![
            "Templates".to_owned(),
            usage.templates.len().to_string(),
            size(usage.templates.iter().map(|template| template.bytes).sum()),
            none(),
            none(),
            size(usage.templates.iter().map(|template| template.reclaimable).sum()),
        ],
        vec![
            "VMs".to_owned(),
            usage.vms.len().to_string(),
            disk(|disk| disk.allocated),
            disk(|disk| disk.shared),
            disk(|disk| disk.unique),
            size(0),
        ],
        vec![
            "Logs".to_owned(),
            usage.logs.count.to_string(),
            size(usage.logs.bytes),
            none(),
            none(),
            size(usage.logs.reclaimable),
        ],
    ];
    let totals = &usage.totals;
    let mut text = table(
        &["TYPE", "COUNT", "SIZE", "SHARED", "UNIQUE", "RECLAIMABLE"],
        rows,
    );
    text.push_str(&format!("\nDisk:    {} in all\n", size(totals.disk)));
    text.push_str(&format!("Memory:  {}\n", memory(usage)));
    if usage.slots.count > 0 {
        let SlotUsage { count, bytes, memory } = usage.slots;
        text.push_str(&format!(
            "Slots:   {count} warm, {} of memory, {} on disk\n",
            size(memory.pss),
            size(bytes)
        ));
    }
    text.push_str(&format!(
        "Prune:   `offshoot prune` frees {}, `offshoot prune --all` {}\n",
        size(totals.reclaimable),
        size(totals.reclaimable_all)
    ));
    text
}

fn memory(usage: &DiskUsage) -> String {
    let running = usage.vms.iter().filter(|vm| vm.memory.is_some()).count();
    let MemoryUsage {
        pss, unique, swap, ..
    } = usage.totals.memory;
    let mut text = match running {
        0 => return "no VM runs".to_owned(),
        1 => "1 VM takes".to_owned(),
        _ => format!("{running} VMs take"),
    };
    text.push_str(&format!(
        " {}: {} private, and {} as a part of shared pages",
        size(pss),
        size(unique),
        size(pss.saturating_sub(unique))
    ));
    if swap > 0 {
        text.push_str(&format!("; {} in swap", size(swap)));
    }
    text
}

fn items(usage: &DiskUsage) -> String {
    let count = |n: u64| n.to_string();
    let images = usage.images.iter().map(|image| {
        vec![
            image.references.join(" "),
            image.digest.short(),
            size(image.bytes),
            size(image.shared),
            size(image.unique),
            match (&image.problem, &image.base) {
                (Some(_), _) => "(damaged)".to_owned(),
                (None, Some(base)) => base.to_string(),
                (None, None) => "(not prepared)".to_owned(),
            },
        ]
    });
    let bases = usage.bases.iter().map(|base| {
        let parts = base.parts;
        vec![
            base.id.to_string(),
            base.images.join(" "),
            count(base.vms),
            size(base.bytes),
            size(parts.root),
            size(parts.overlay_seed + parts.work_seed),
            size(parts.tree),
            size(base.reclaimable),
        ]
    });
    let kernels = usage.kernels.iter().map(|kernel| {
        vec![
            kernel.id.to_string(),
            kernel.release.clone(),
            count(kernel.vms),
            size(kernel.bytes),
            size(kernel.reclaimable),
            if kernel.default { "*" } else { "" }.to_owned(),
        ]
    });
    let vms = usage.vms.iter().map(|vm| {
        let memory = |of: fn(&MemoryUsage) -> u64| {
            vm.memory
                .as_ref()
                .map_or(String::new(), |memory| size(of(memory)))
        };
        vec![
            vm.name.to_string(),
            vm.id.to_string(),
            vm.state.to_string(),
            vm.base.to_string(),
            size(vm.disk.allocated),
            size(vm.disk.shared),
            size(vm.disk.unique),
            size(vm.log_bytes),
            memory(|memory| memory.rss),
            memory(|memory| memory.pss),
            memory(|memory| memory.unique),
        ]
    });
    [
        "Images:\n\n".to_owned(),
        table(
            &["REFERENCE", "DIGEST", "SIZE", "SHARED", "UNIQUE", "BASE"],
            images,
        ),
        "\nBases:\n\n".to_owned(),
        table(
            &[
                "ID",
                "IMAGES",
                "VMS",
                "SIZE",
                "ROOT",
                "SEEDS",
                "TREE",
                "RECLAIMABLE",
            ],
            bases,
        ),
        "\nKernels:\n\n".to_owned(),
        table(
            &["ID", "RELEASE", "VMS", "SIZE", "RECLAIMABLE", "DEFAULT"],
            kernels,
        ),
        "\nVMs:\n\n".to_owned(),
        table(
            &[
                "NAME", "ID", "STATE", "BASE", "DISK", "SHARED", "UNIQUE", "LOGS", "RSS", "PSS", "PRIVATE",
            ],
            vms,
        ),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_api::image::BaseParts;
    use offshoot_api::usage::{
        BaseUsage, BlobUsage, FileUsage, ImageUsage, KernelUsage, UsageTotals, VmDiskUsage, VmUsage,
    };
    use offshoot_model::{BaseId, Digest, KernelId, VmId, VmState};

    const MIB: u64 = 1 << 20;

    fn example() -> DiskUsage {
        let image = |references: &[&str], unique, base, problem: Option<&str>| ImageUsage {
            references: references.iter().map(ToString::to_string).collect(),
            digest: Digest::from_bytes([7; 32]),
            bytes: 30 * MIB + unique,
            shared: 30 * MIB,
            unique,
            base,
            problem: problem.map(str::to_owned),
        };
        let base = BaseId::from_bytes(&[1; 16]);
        let memory = MemoryUsage {
            processes: 1,
            rss: 200 * MIB,
            pss: 120 * MIB,
            unique: 100 * MIB,
            shared: 100 * MIB,
            swap: 0,
        };
        let vm = |id: u8, name: &str, state, memory| VmUsage {
            id: VmId::from_bytes(&[id; 6]),
            name: name.parse().unwrap(),
            state,
            base: base.clone(),
            disk: VmDiskUsage {
                allocated: 5 * MIB,
                unique: 4 * MIB,
                shared: MIB,
            },
            log_bytes: 8192,
            memory,
        };
        DiskUsage {
            blobs: BlobUsage {
                count: 8,
                bytes: 54 * MIB,
                shared: 30 * MIB,
                unique: 22 * MIB,
                unneeded: 2 * MIB,
                reclaimable: 2 * MIB,
            },
            downloads: FileUsage {
                count: 1,
                bytes: MIB,
                reclaimable: MIB,
            },
            images: vec![
                image(
                    &["debian:bookworm", "debian:12"],
                    20 * MIB,
                    Some(base.clone()),
                    None,
                ),
                image(&["app:v1"], 2 * MIB, None, None),
                image(&["old:1"], 0, None, Some("blob x is damaged")),
            ],
            bases: vec![BaseUsage {
                id: base.clone(),
                images: vec!["debian:bookworm".into(), "debian:12".into()],
                vms: 2,
                bytes: 681 * MIB,
                parts: BaseParts {
                    root: 180 * MIB,
                    overlay_seed: MIB / 2,
                    work_seed: MIB / 2,
                    tree: 500 * MIB,
                },
                reclaimable: 500 * MIB,
            }],
            kernels: vec![KernelUsage {
                id: KernelId::from_bytes(&[2; 8]),
                release: "6.12.43+deb12-cloud-amd64".into(),
                default: true,
                vms: 2,
                bytes: 60 * MIB,
                reclaimable: 0,
            }],
            templates: Vec::new(),
            slots: SlotUsage::default(),
            vms: vec![
                vm(0xab, "web", VmState::Running, Some(memory)),
                vm(0x12, "clever-otter", VmState::Stopped, None),
            ],
            logs: FileUsage {
                count: 4,
                bytes: 16_384,
                reclaimable: 0,
            },
            totals: UsageTotals {
                disk: 804 * MIB,
                reclaimable: 503 * MIB,
                reclaimable_all: 503 * MIB,
                prune_grace_s: 3600,
                memory,
            },
        }
    }

    #[test]
    fn df_looks_like_dockers() {
        insta::assert_snapshot!(summary(&example()), @r#"
        TYPE        COUNT   SIZE     SHARED   UNIQUE   RECLAIMABLE
        Images      3       54MiB    30MiB    22MiB    2MiB
        Downloads   1       1MiB                       1MiB
        Bases       1       681MiB                     500MiB
        Kernels     1       60MiB                      0B
        Templates   0       0B                         0B
        VMs         2       10MiB    2MiB     8MiB     0B
        Logs        4       16KiB                      0B

        Disk:    804MiB in all
        Memory:  1 VM takes 120MiB: 100MiB private, and 20MiB as a part of shared pages
        Prune:   `offshoot prune` frees 503MiB, `offshoot prune --all` 503MiB
        "#);
        insta::assert_snapshot!(summary(&DiskUsage::default()), @r#"
        TYPE        COUNT   SIZE   SHARED   UNIQUE   RECLAIMABLE
        Images      0       0B     0B       0B       0B
        Downloads   0       0B                       0B
        Bases       0       0B                       0B
        Kernels     0       0B                       0B
        Templates   0       0B                       0B
        VMs         0       0B     0B       0B       0B
        Logs        0       0B                       0B

        Disk:    0B in all
        Memory:  no VM runs
        Prune:   `offshoot prune` frees 0B, `offshoot prune --all` 0B
        "#);
    }

    #[test]
    fn verbose_df_lists_everything() {
        insta::assert_snapshot!(items(&example()), @r#"
        Images:

        REFERENCE                   DIGEST         SIZE    SHARED   UNIQUE   BASE
        debian:bookworm debian:12   070707070707   50MiB   30MiB    20MiB    01010101010101010101010101010101
        app:v1                      070707070707   32MiB   30MiB    2MiB     (not prepared)
        old:1                       070707070707   30MiB   30MiB    0B       (damaged)

        Bases:

        ID                                 IMAGES                      VMS   SIZE     ROOT     SEEDS   TREE     RECLAIMABLE
        01010101010101010101010101010101   debian:bookworm debian:12   2     681MiB   180MiB   1MiB    500MiB   500MiB

        Kernels:

        ID                 RELEASE                     VMS   SIZE    RECLAIMABLE   DEFAULT
        0202020202020202   6.12.43+deb12-cloud-amd64   2     60MiB   0B            *

        VMs:

        NAME           ID             STATE     BASE                               DISK   SHARED   UNIQUE   LOGS   RSS      PSS      PRIVATE
        web            abababababab   running   01010101010101010101010101010101   5MiB   1MiB     4MiB     8KiB   200MiB   120MiB   100MiB
        clever-otter   121212121212   stopped   01010101010101010101010101010101   5MiB   1MiB     4MiB     8KiB
        "#);
    }

    #[test]
    fn memory_of_several_vms_is_what_adds_up() {
        let mut usage = example();
        usage.vms[1].memory = usage.vms[0].memory;
        usage.totals.memory.pss = 240 * MIB;
        usage.totals.memory.unique = 200 * MIB;
        usage.totals.memory.swap = MIB;
        insta::assert_snapshot!(memory(&usage), @r#"
        2 VMs take 240MiB: 200MiB private, and 40MiB as a part of shared pages; 1MiB in swap
        "#);
    }
}
