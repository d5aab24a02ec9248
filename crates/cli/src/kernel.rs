//! `kernel`: the kernel bundles that VMs boot.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use offshoot_api::client::Client;
use offshoot_api::kernel::{BuildQuery, DistroRequest, KernelSummary};
use offshoot_model::ByteSize;

use crate::age;
use crate::each::each;
use crate::error::Failure;
use crate::image::show;
use crate::output::{Output, OutputArgs, json, line, now_ms, table};
use crate::packing::{Owner, append_tree, tar_upload};
use crate::progress::Bars;

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// Make a kernel bundle
    Add(AddArgs),
    /// Compile a kernel for guests, with all drivers built in
    Build(BuildArgs),
    /// List kernel bundles
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Remove kernel bundles
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// Let new VMs boot a kernel bundle
    Default(DefaultArgs),
}

#[derive(Clone, Debug, Args)]
#[group(skip)]
pub(crate) struct AddArgs {
    /// From the distribution's own cloud kernel package, which is not installed
    #[arg(long, required_unless_present = "vmlinux", conflicts_with = "vmlinux")]
    distro: bool,
    /// Package to take [default: the newest cloud kernel]
    #[arg(long, requires = "distro", value_name = "NAME")]
    package: Option<String>,
    /// From a kernel of your own
    #[arg(long, value_name = "FILE")]
    vmlinux: Option<PathBuf>,
    /// Its modules: a folder like /lib/modules/RELEASE
    #[arg(long, requires = "vmlinux", conflicts_with = "distro", value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BuildArgs {
    /// Compilers at once [default: as many as there are processors]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    jobs: Option<u32>,
    /// Options to add or to change: lines like CONFIG_KVM=y
    #[arg(long, value_name = "FILE")]
    config_fragment: Option<PathBuf>,
    /// Tarball of Linux [default: the distribution's package linux-source-6.12, which is not installed]
    #[arg(long, value_name = "FILE")]
    source: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LsArgs {
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct RmArgs {
    /// Ids
    #[arg(required = true, value_name = "KERNEL", value_parser = NonEmptyStringValueParser::new())]
    kernels: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DefaultArgs {
    /// Id
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    kernel: String,
}

pub(crate) async fn kernel(client: &Client, command: KernelCommand) -> Result<u8, Failure> {
    match command {
        KernelCommand::Add(args) => add(client, args).await,
        KernelCommand::Build(args) => build(client, args).await,
        KernelCommand::Ls(args) => ls(client, &args).await,
        KernelCommand::Rm(args) => rm(client, &args).await,
        KernelCommand::Default(args) => {
            line(client.set_default_kernel(&args.kernel).await?.id.as_str())?;
            Ok(0)
        }
    }
}

async fn add(client: &Client, args: AddArgs) -> Result<u8, Failure> {
    let mut bars = Bars::new(args.quiet);
    let work = match args.vmlinux {
        None => {
            client
                .add_distro_kernel(&DistroRequest {
                    package: args.package,
                })
                .await?
        }
        Some(vmlinux) => {
            check_readable(&vmlinux, args.modules.as_deref())?;
            let modules = args.modules;
            let tar = tar_upload(move |tar| {
                append_tree(
                    tar,
                    &fs::canonicalize(vmlinux)?,
                    Path::new("vmlinux"),
                    Owner::Root,
                )?;
                match modules {
                    Some(folder) => append_modules(tar, &folder),
                    None => Ok(()),
                }
            });
            client.add_kernel_files(tar).await?
        }
    };
    let kernel: KernelSummary = work.finish(|event| bars.show(event)).await?;
    drop(bars);
    show(args.output, &kernel, |kernel| kernel.id.to_string())
}

async fn build(client: &Client, args: BuildArgs) -> Result<u8, Failure> {
    let mut bars = Bars::new(args.quiet);
    let files: Vec<_> = [("fragment", args.config_fragment), ("source", args.source)]
        .into_iter()
        .filter_map(|(name, path)| path.map(|path| (name, path)))
        .collect();
    for (name, path) in &files {
        check_file(name, path)?;
    }
    let tar = tar_upload(move |tar| {
        for (name, path) in files {
            append_tree(tar, &fs::canonicalize(path)?, Path::new(name), Owner::Root)?;
        }
        Ok(())
    });
    let work = client.build_kernel(&BuildQuery { jobs: args.jobs }, tar).await?;
    let kernel: KernelSummary = work.finish(|event| bars.show(event)).await?;
    drop(bars);
    show(args.output, &kernel, |kernel| kernel.id.to_string())
}

fn check_file(what: &str, path: &Path) -> Result<(), Failure> {
    let metadata = File::open(path).and_then(|file| file.metadata()).map_err(|e| {
        Failure::io(format!("cannot read the {what} `{}`", path.display()), &e)
            .hint("name a file that exists; see `offshoot kernel build --help`")
    })?;
    if metadata.is_file() {
        return Ok(());
    }
    Err(
        Failure::invalid(format!("the {what} `{}` is not a file", path.display()))
            .hint("give a file; see `offshoot kernel build --help`"),
    )
}

fn check_readable(vmlinux: &Path, modules: Option<&Path>) -> Result<(), Failure> {
    let cannot = |what: &str, path: &Path, e: &io::Error| {
        Failure::io(format!("cannot read the {what} `{}`", path.display()), e)
            .hint("name a file that exists; see `offshoot kernel add --help`")
    };
    let kernel = File::open(vmlinux)
        .and_then(|file| file.metadata())
        .map_err(|e| cannot("kernel", vmlinux, &e))?;
    if !kernel.is_file() {
        return Err(Failure::invalid(format!("`{}` is not a file", vmlinux.display()))
            .hint("give the kernel itself: `--vmlinux FILE`"));
    }
    if let Some(modules) = modules {
        fs::read_dir(modules).map_err(|e| cannot("modules in", modules, &e))?;
    }
    Ok(())
}

/// Everything in a modules folder except the links to the kernel's source, which lead out of it.
fn append_modules<W: io::Write>(tar: &mut tar::Builder<W>, folder: &Path) -> io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if entry.file_type()?.is_symlink() && (entry.file_name() == "build" || entry.file_name() == "source")
        {
            continue;
        }
        append_tree(
            tar,
            &entry.path(),
            &Path::new("modules").join(entry.file_name()),
            Owner::Root,
        )?;
    }
    Ok(())
}

async fn ls(client: &Client, args: &LsArgs) -> Result<u8, Failure> {
    let kernels = client.kernels().await?;
    if args.output.output == Output::Json {
        json(&kernels)?;
    } else if args.quiet {
        line(
            &kernels
                .iter()
                .map(|kernel| format!("{}\n", kernel.id))
                .collect::<String>(),
        )?;
    } else {
        line(&ls_table(&kernels, now_ms()))?;
    }
    Ok(0)
}

fn ls_table(kernels: &[KernelSummary], now_ms: u64) -> String {
    let rows = kernels.iter().map(|kernel| {
        vec![
            kernel.id.to_string(),
            kernel.release.clone(),
            kernel.source.clone(),
            kernel.features.join(","),
            age::ago(kernel.created_ms, now_ms),
            ByteSize::from_bytes(kernel.size).to_string(),
            if kernel.default { "*" } else { "" }.to_owned(),
        ]
    });
    table(
        &[
            "ID", "RELEASE", "SOURCE", "FEATURES", "CREATED", "SIZE", "DEFAULT",
        ],
        rows,
    )
}

async fn rm(client: &Client, args: &RmArgs) -> Result<u8, Failure> {
    each(&args.kernels, |kernel| client.remove_kernel(kernel)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_ls_marks_the_default() {
        let kernel = |id: u8, default| KernelSummary {
            id: offshoot_model::KernelId::from_bytes(&[id; 8]),
            release: "6.12.43+deb12-cloud-amd64".into(),
            source: "distro".into(),
            features: vec!["block".into(), "pmem".into()],
            created_ms: 0,
            size: 60 << 20,
            default,
        };
        insta::assert_snapshot!(ls_table(&[kernel(1, true), kernel(2, false)], 60_000), @r#"
        ID                 RELEASE                     SOURCE   FEATURES     CREATED              SIZE    DEFAULT
        0101010101010101   6.12.43+deb12-cloud-amd64   distro   block,pmem   About a minute ago   60MiB   *
        0202020202020202   6.12.43+deb12-cloud-amd64   distro   block,pmem   About a minute ago   60MiB
        "#);
    }

    #[test]
    fn modules_are_packed_without_the_links_to_the_source() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("kernel/fs")).unwrap();
        fs::write(dir.path().join("kernel/fs/erofs.ko"), "x").unwrap();
        fs::write(dir.path().join("modules.dep"), "").unwrap();
        std::os::unix::fs::symlink("/usr/src/linux", dir.path().join("build")).unwrap();
        let mut tar = tar::Builder::new(Vec::new());
        append_modules(&mut tar, dir.path()).unwrap();
        let packed = tar.into_inner().unwrap();
        let names: Vec<_> = tar::Archive::new(packed.as_slice())
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(
            names,
            [
                "modules/kernel",
                "modules/kernel/fs",
                "modules/kernel/fs/erofs.ko",
                "modules/modules.dep"
            ]
        );
    }
}
