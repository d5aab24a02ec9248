//! `template`: the saved VMs that others are restored from.

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use offshoot_api::client::Client;
use offshoot_api::template::TemplateSummary;
use offshoot_model::ByteSize;

use crate::age;
use crate::each::each;
use crate::error::Failure;
use crate::output::{Output, OutputArgs, json, line, now_ms, table};

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// List templates
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Remove templates; VMs that were restored from them run on
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
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
    #[arg(required = true, value_name = "TEMPLATE", value_parser = NonEmptyStringValueParser::new())]
    templates: Vec<String>,
}

pub(crate) async fn template(client: &Client, command: TemplateCommand) -> Result<u8, Failure> {
    match command {
        TemplateCommand::Ls(args) => ls(client, &args).await,
        TemplateCommand::Rm(args) => each(&args.templates, |id| client.remove_template(id)).await,
    }
}

async fn ls(client: &Client, args: &LsArgs) -> Result<u8, Failure> {
    let templates = client.templates().await?;
    if args.output.output == Output::Json {
        json(&templates)?;
    } else if args.quiet {
        let ids: String = templates
            .iter()
            .map(|template| format!("{}\n", template.id))
            .collect();
        line(&ids)?;
    } else {
        line(&ls_table(&templates, now_ms()))?;
    }
    Ok(0)
}

fn ls_table(templates: &[TemplateSummary], now_ms: u64) -> String {
    let rows = templates.iter().map(|template| {
        let of = template.of.as_ref();
        let text = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        vec![
            template.id.to_string(),
            match (of, &template.problem) {
                (_, Some(problem)) => problem.clone(),
                (Some(of), None) if of.images.is_empty() => of.base.to_string(),
                (Some(of), None) => of.images.join(", "),
                (None, None) => "-".into(),
            },
            text(of.map(|of| {
                let network = if of.network { "net" } else { "no net" };
                let memory = ByteSize::from_bytes(of.memory);
                format!("{} CPU, {memory}, {}, {network}", of.cpus, of.root)
            })),
            text(of.map(|of| age::ago(of.used_ms, now_ms))),
            template.vms.to_string(),
            ByteSize::from_bytes(template.disk_bytes).to_string(),
            ByteSize::from_bytes(template.memory_bytes).to_string(),
        ]
    });
    table(&["ID", "IMAGE", "MACHINE", "USED", "VMS", "DISK", "MEMORY"], rows)
}

#[cfg(test)]
mod tests {
    use offshoot_api::template::TemplateOf;
    use offshoot_model::{BaseId, KernelId, TemplateId};

    use super::*;

    #[test]
    fn template_ls_says_what_each_is_of() {
        let template = |id: u8, problem: Option<&str>| TemplateSummary {
            id: TemplateId::from_bytes(&[id; 16]),
            of: problem.is_none().then(|| TemplateOf {
                images: vec!["debian:bookworm".into()],
                base: BaseId::from_bytes(&[1; 16]),
                kernel: KernelId::from_bytes(&[2; 8]),
                vmm: "qemu 7.2.22".into(),
                cpus: 1,
                memory: 256 << 20,
                root: "block".into(),
                network: true,
                created_ms: 0,
                used_ms: 0,
            }),
            problem: problem.map(Into::into),
            vms: 3,
            disk_bytes: 60 << 20,
            memory_bytes: 60 << 20,
        };
        let all = [template(1, None), template(2, Some("it has no template.json"))];
        insta::assert_snapshot!(ls_table(&all, 60_000), @r#"
        ID                                 IMAGE                     MACHINE                     USED                 VMS   DISK    MEMORY
        01010101010101010101010101010101   debian:bookworm           1 CPU, 256MiB, block, net   About a minute ago   3     60MiB   60MiB
        02020202020202020202020202020202   it has no template.json   -                           -                    3     60MiB   60MiB
        "#);
    }
}
