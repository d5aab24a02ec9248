//! What is compared: every combination of the values that were given.

use offshoot_model::{Boot, KernelId, RootRequest};
use serde::Serialize;

use super::BenchArgs;

/// One kind of VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Variant {
    /// What sets it apart from the others: `cold`, `template block`; `all` where there is only one.
    pub(super) name: String,
    pub(super) boot: Boot,
    pub(super) root: RootRequest,
    /// The default bundle when absent.
    pub(super) kernel: Option<KernelId>,
}

/// The word that the API has for it.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

/// Each once, in the order given.
fn distinct<T: Clone + PartialEq>(values: &[T]) -> Vec<T> {
    let mut distinct = Vec::new();
    for value in values {
        if !distinct.contains(value) {
            distinct.push(value.clone());
        }
    }
    distinct
}

/// Every combination; the first one is what the others are compared with.
pub(super) fn variants(args: &BenchArgs) -> Vec<Variant> {
    let (boots, roots) = (distinct(&args.boot), distinct(&args.root));
    let kernels = distinct(&args.kernel);
    let chosen: Vec<Option<KernelId>> = if kernels.is_empty() {
        vec![None]
    } else {
        kernels.into_iter().map(Some).collect()
    };
    let mut variants = Vec::new();
    for kernel in &chosen {
        for root in &roots {
            for boot in &boots {
                let mut words = Vec::new();
                if boots.len() > 1 {
                    words.push(word(boot));
                }
                if roots.len() > 1 {
                    words.push(word(root));
                }
                if let (Some(kernel), true) = (kernel, chosen.len() > 1) {
                    words.push(kernel.to_string());
                }
                variants.push(Variant {
                    name: if words.is_empty() {
                        "all".into()
                    } else {
                        words.join(" ")
                    },
                    boot: *boot,
                    root: *root,
                    kernel: kernel.clone(),
                });
            }
        }
    }
    variants
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: BenchArgs,
    }

    fn names(words: &[&str]) -> Vec<String> {
        let line = Line::try_parse_from([&["create"], words].concat()).unwrap();
        variants(&line.args)
            .into_iter()
            .map(|variant| variant.name)
            .collect()
    }

    #[test]
    fn what_is_compared_is_every_combination() {
        assert_eq!(names(&[]), ["all"]);
        assert_eq!(names(&["--boot", "cold", "--root", "block"]), ["all"]);
        assert_eq!(names(&["--boot", "cold,template,cold"]), ["cold", "template"]);
        assert_eq!(
            names(&["--boot", "cold", "--boot", "template", "--root", "block,copy"]),
            ["cold block", "template block", "cold copy", "template copy"]
        );
        let kernels = "0123456789abcdef,fedcba9876543210";
        assert_eq!(
            names(&["--kernel", kernels]),
            ["0123456789abcdef", "fedcba9876543210"]
        );
        for bad in [
            &["--boot", "warm"][..],
            &["--runs", "0"],
            &["--kernel", "x"],
            &["--parallel", "0"],
            &["image"],
        ] {
            assert!(
                Line::try_parse_from([&["create"], bad].concat()).is_err(),
                "{bad:?}"
            );
        }
    }
}
