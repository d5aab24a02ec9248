//! `image`: everything that comes into the store, and what is there.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, Subcommand};
use offshoot_api::client::{Client, Upload};
use offshoot_api::image::{
    BootstrapRequest, ImageQuery, ImageRemoveQuery, ImageSummary, ImportQuery, PrepareQuery, PullRequest,
    SeedState, WarmRequest,
};
use offshoot_model::ByteSize;

use crate::age;
use crate::credentials;
use crate::each::each;
use crate::error::{ERROR, Failure, report_and_go_on};
use crate::output::{Output, OutputArgs, json, line, note, now_ms, table};
use crate::packing::{Owner, append_tree, tar_upload};
use crate::progress::Bars;
use crate::verify::{VerifyArgs, verify};

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Fetch an image from a registry
    Pull(PullArgs),
    /// Take an image from an archive: docker save, OCI layout, or a root file system's tar
    Import(ImportArgs),
    /// Make an image from a Debian mirror
    Bootstrap(BootstrapArgs),
    /// List images
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Show everything about an image, as JSON
    Inspect(InspectArgs),
    /// Remove images
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// Make an image ready to start VMs from
    Prepare(PrepareArgs),
    /// Keep VMs of an image ready that are nobody's yet: the next ones that are created take them over
    Warm(WarmArgs),
    /// Check that an image and what was made of it are undamaged; status 1 when they are not
    Verify(VerifyArgs),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct WarmArgs {
    /// Image, such as debian:bookworm
    reference: String,
    /// How many, until the daemon ends; 0 for none. `warm_slots` in its settings keeps them
    #[arg(value_name = "SLOTS")]
    slots: u32,
}

async fn warm(client: &Client, args: WarmArgs) -> Result<u8, Failure> {
    let request = WarmRequest {
        reference: args.reference,
        slots: args.slots,
    };
    client.warm_image(&request).await?;
    Ok(0)
}

#[derive(Clone, Debug, Args)]
struct Making {
    /// Make it ready to start VMs from as well
    #[arg(long, action = ArgAction::Set, value_name = "yes|no", default_value = "yes", default_missing_value = "yes",
        num_args = 0..=1, require_equals = true, value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    prepare: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PullArgs {
    /// Platform to take out of an index, such as linux/amd64 [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<String>,
    #[command(flatten)]
    making: Making,
    /// Image, such as debian:bookworm or localhost:5000/app
    reference: String,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ImportArgs {
    /// Reference to give it; needed where the archive names none
    #[arg(long, value_name = "REF")]
    name: Option<String>,
    #[command(flatten)]
    making: Making,
    /// Archive, folder with an OCI layout, or `-` for standard input
    path: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BootstrapArgs {
    /// Reference to give it [default: the recipe's name]
    #[arg(long, value_name = "REF")]
    name: Option<String>,
    /// Packages to install on top
    #[arg(long, value_name = "PKG,...", value_delimiter = ',')]
    include: Vec<String>,
    /// Another mirror than the host's
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    #[command(flatten)]
    making: Making,
    /// What to make, such as debian:bookworm
    #[arg(value_name = "debian:SUITE")]
    recipe: String,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LsArgs {
    /// Only references
    #[arg(short, long)]
    quiet: bool,
    /// Show whole digests
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// Image
    reference: String,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct RmArgs {
    /// Also when stopped VMs were made from it
    #[arg(short, long)]
    force: bool,
    /// Images
    #[arg(required = true, value_name = "REFERENCE")]
    references: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PrepareArgs {
    /// Also when it is ready: make it anew
    #[arg(short, long)]
    force: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
    /// Every image that is not ready, or was made ready by an earlier version
    #[arg(short, long, conflicts_with = "reference")]
    all: bool,
    /// Image
    #[arg(required_unless_present = "all")]
    reference: Option<String>,
}

pub(crate) async fn image(client: &Client, command: ImageCommand) -> Result<u8, Failure> {
    match command {
        ImageCommand::Pull(args) => pull(client, args).await,
        ImageCommand::Import(args) => import(client, args).await,
        ImageCommand::Bootstrap(args) => bootstrap(client, args).await,
        ImageCommand::Ls(args) => ls(client, &args).await,
        ImageCommand::Inspect(args) => {
            json(
                &client
                    .image(&ImageQuery {
                        reference: args.reference,
                    })
                    .await?,
            )?;
            Ok(0)
        }
        ImageCommand::Rm(args) => rm(client, args).await,
        ImageCommand::Prepare(args) => prepare(client, args).await,
        ImageCommand::Verify(args) => verify(client, args).await,
        ImageCommand::Warm(args) => warm(client, args).await,
    }
}

/// Pulls an image with the user's credentials and shows how far it is.
pub(crate) async fn pull_image(
    client: &Client,
    reference: &str,
    platform: Option<String>,
    prepare: bool,
    quiet: bool,
) -> Result<ImageSummary, Failure> {
    let auth = credentials::for_reference(reference).await?;
    let request = PullRequest {
        reference: reference.to_owned(),
        platform,
        auth,
        prepare,
    };
    let mut bars = Bars::new(quiet);
    Ok(client
        .pull(&request)
        .await?
        .finish(|event| bars.show(event))
        .await?)
}

pub(crate) async fn pull(client: &Client, args: PullArgs) -> Result<u8, Failure> {
    let Making {
        prepare,
        quiet,
        output,
    } = args.making;
    let image = pull_image(client, &args.reference, args.platform, prepare, quiet).await?;
    show(output, &image, |image| image.reference.clone())
}

async fn import(client: &Client, args: ImportArgs) -> Result<u8, Failure> {
    let upload = archive(&args.path)?;
    let query = ImportQuery {
        name: args.name,
        prepare: args.making.prepare,
    };
    let mut bars = Bars::new(args.making.quiet);
    let images = client
        .import(&query, upload)
        .await?
        .finish(|event| bars.show(event))
        .await?;
    drop(bars);
    show(args.making.output, &images, |images| {
        images
            .iter()
            .map(|image| format!("{}\n", image.reference))
            .collect()
    })
}

/// The archive at a path, as it will be sent.
fn archive(path: &Path) -> Result<Upload, Failure> {
    if path == Path::new("-") {
        if io::stdin().is_terminal() {
            return Err(Failure::invalid("cannot read an archive from a terminal")
                .hint("write `offshoot image import PATH`, or pipe an archive into it"));
        }
        return Ok(Upload::from_reader(tokio::io::stdin(), None));
    }
    let cannot = |e: &io::Error| {
        Failure::io(format!("cannot read the archive `{}`", path.display()), e)
            .hint("name a file or an OCI layout folder that exists; see `offshoot image import --help`")
    };
    let metadata = fs::metadata(path).map_err(|e| cannot(&e))?;
    if !metadata.is_dir() {
        let file = File::open(path).map_err(|e| cannot(&e))?;
        // A pipe has no length.
        let length = metadata.is_file().then_some(metadata.len());
        return Ok(Upload::from_reader(tokio::fs::File::from_std(file), length));
    }
    if !path.join("oci-layout").is_file() {
        let message = format!(
            "cannot import the folder `{}`: it holds no `oci-layout` file",
            path.display()
        );
        return Err(Failure::invalid(message).hint(format!(
            "import a root file system with `tar -C {} -c . | offshoot image import --name REF -`",
            path.display()
        )));
    }
    let layout = path.to_owned();
    Ok(tar_upload(move |tar| {
        // First what says what the rest is. Nothing else in the folder belongs to the layout.
        for name in ["oci-layout", "index.json", "blobs"] {
            append_tree(tar, &layout.join(name), Path::new(name), Owner::Root)?;
        }
        Ok(())
    }))
}

async fn bootstrap(client: &Client, args: BootstrapArgs) -> Result<u8, Failure> {
    let include = args
        .include
        .into_iter()
        .filter(|package| !package.is_empty())
        .collect();
    let Making {
        prepare,
        quiet,
        output,
    } = args.making;
    let request = BootstrapRequest {
        recipe: args.recipe,
        include,
        mirror: args.mirror,
        name: args.name,
        prepare,
    };
    let mut bars = Bars::new(quiet);
    let image = client
        .bootstrap(&request)
        .await?
        .finish(|event| bars.show(event))
        .await?;
    drop(bars);
    show(output, &image, |image| image.reference.clone())
}

/// Makes the base of an image and shows how far it is.
pub(crate) async fn prepare_image(
    client: &Client,
    reference: &str,
    force: bool,
    quiet: bool,
) -> Result<ImageSummary, Failure> {
    let query = PrepareQuery {
        reference: reference.to_owned(),
        force,
    };
    let mut bars = Bars::new(quiet);
    Ok(client
        .prepare(&query)
        .await?
        .finish(|event| bars.show(event))
        .await?)
}

async fn prepare(client: &Client, args: PrepareArgs) -> Result<u8, Failure> {
    let Some(reference) = &args.reference else {
        return prepare_all(client, &args).await;
    };
    let image = prepare_image(client, reference, args.force, args.quiet).await?;
    show(args.output, &image, |image| image.reference.clone())
}

/// One after the other, since each keeps all processors busy; goes on after errors.
async fn prepare_all(client: &Client, args: &PrepareArgs) -> Result<u8, Failure> {
    let mut seen = HashSet::new();
    let (mut done, mut status) = (Vec::new(), 0);
    for image in client.images().await? {
        // Several names of one image have one base.
        if !seen.insert(image.digest) || (is_ready(&image) && !args.force) {
            continue;
        }
        match prepare_image(client, &image.reference, args.force, args.quiet).await {
            Ok(image) => done.push(image),
            Err(failure) => {
                report_and_go_on(failure);
                status = ERROR;
            }
        }
    }
    show(args.output, &done, |images| {
        images
            .iter()
            .map(|image| format!("{}\n", image.reference))
            .collect()
    })?;
    Ok(status)
}

fn is_ready(image: &ImageSummary) -> bool {
    image.prepared && image.seeds != Some(SeedState::Missing)
}

/// What is told when a VM is made from an image whose base an earlier version made.
pub(crate) fn tell_of_missing_seeds(image: &ImageSummary, quiet: bool) {
    if !quiet && image.seeds == Some(SeedState::Missing) {
        note(&format!(
            "warning: an earlier version prepared `{0}`: its VMs start slower, because disks are built instead of cloned\n\
             hint: make it ready for this version with `offshoot image prepare {0}`, or all images with `--all`",
            image.reference
        ));
    }
}

pub(crate) async fn ls(client: &Client, args: &LsArgs) -> Result<u8, Failure> {
    let images = client.images().await?;
    if args.output.output == Output::Json {
        json(&images)?;
    } else if args.quiet {
        line(
            &images
                .iter()
                .map(|image| format!("{}\n", image.reference))
                .collect::<String>(),
        )?;
    } else {
        line(&ls_table(&images, now_ms(), args.no_trunc))?;
    }
    Ok(0)
}

fn ls_table(images: &[ImageSummary], now_ms: u64, whole: bool) -> String {
    let rows = images.iter().map(|image| {
        vec![
            image.reference.clone(),
            if whole {
                image.digest.to_string()
            } else {
                image.digest.short()
            },
            age::ago(image.created_ms, now_ms),
            ByteSize::from_bytes(image.size).to_string(),
            match (&image.problem, image.prepared) {
                (Some(_), _) => "(damaged)",
                (None, true) if !is_ready(image) => "(old)",
                (None, true) => "yes",
                (None, false) => "no",
            }
            .to_owned(),
        ]
    });
    table(&["REFERENCE", "DIGEST", "CREATED", "SIZE", "PREPARED"], rows)
}

pub(crate) async fn rm(client: &Client, args: RmArgs) -> Result<u8, Failure> {
    each(&args.references, |reference| async move {
        let query = ImageRemoveQuery {
            reference: reference.to_owned(),
            force: args.force,
        };
        client.remove_image(&query).await
    })
    .await
}

/// Shows the result of long work: its name, or all of it.
pub(crate) fn show<T: serde::Serialize>(
    output: OutputArgs,
    value: &T,
    name: impl Fn(&T) -> String,
) -> Result<u8, Failure> {
    match output.output {
        Output::Json => json(value)?,
        Output::Table => line(&name(value))?,
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_ls_looks_like_dockers() {
        let image = |reference: &str, size, prepared| ImageSummary {
            reference: reference.into(),
            digest: format!("sha256:{}", "0af1".repeat(16)).parse().unwrap(),
            created_ms: 0,
            size,
            prepared,
            seeds: prepared.then_some(SeedState::Current),
            problem: None,
        };
        let mut images = [
            image("debian:bookworm", 48 << 20, true),
            image("localhost:5000/app:v1", 1500, false),
            image("old:1", 0, true),
            image("before:1", 2048, true),
        ];
        images[3].seeds = Some(SeedState::Missing);
        images[2].problem = Some("blob x is damaged on disk".into());
        insta::assert_snapshot!(ls_table(&images, 90_000_000, false), @r#"
        REFERENCE               DIGEST         CREATED        SIZE     PREPARED
        debian:bookworm         0af10af10af1   25 hours ago   48MiB    yes
        localhost:5000/app:v1   0af10af10af1   25 hours ago   1.5KiB   no
        old:1                   0af10af10af1   25 hours ago   0B       (damaged)
        before:1                0af10af10af1   25 hours ago   2KiB     (old)
        "#);
    }

    #[test]
    fn a_folder_must_be_an_oci_layout() {
        let dir = tempfile::tempdir().unwrap();
        assert!(archive(dir.path()).is_err());
        fs::write(dir.path().join("oci-layout"), "{}").unwrap();
        assert!(archive(dir.path()).is_ok());
        assert!(archive(&dir.path().join("missing.tar")).is_err());
    }
}
