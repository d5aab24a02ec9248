//! Prometheus' text format, read strictly (Prometheus, "Exposition formats", version 0.0.4).
//!
//! A scrape that breaks a rule fails the test: what a lenient reader skips would be a number that nobody sees.

use std::collections::{BTreeMap, BTreeSet};

/// A series' labels, by name.
pub type Labels = BTreeMap<String, String>;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    families: BTreeMap<String, Family>,
}

/// Everything of one metric.
#[derive(Clone, Debug, Default)]
struct Family {
    kind: String,
    help: String,
    samples: Vec<Sample>,
}

#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    labels: Labels,
    value: f64,
}

impl Scrape {
    /// Reads a scrape; fails where it breaks a rule.
    pub fn parse(text: &str) -> Self {
        Self::read(text).unwrap_or_else(|why| panic!("{why} in\n{text}"))
    }

    /// The value of one series; 0 where there is none, as it is of a counter that nothing moved yet.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels: Labels = labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let mut samples = self.families.values().flat_map(|family| &family.samples);
        let found = samples.find(|sample| sample.name == name && sample.labels == labels);
        found.map_or(0.0, |sample| sample.value)
    }

    /// The names of all metrics.
    pub fn names(&self) -> BTreeSet<&str> {
        self.families.keys().map(String::as_str).collect()
    }

    /// Every value that a label has anywhere.
    pub fn label_values(&self) -> BTreeSet<&str> {
        let samples = self.families.values().flat_map(|family| &family.samples);
        samples
            .flat_map(|sample| sample.labels.values())
            .map(String::as_str)
            .collect()
    }

    fn read(text: &str) -> Result<Self, String> {
        if !text.ends_with('\n') {
            return Err("the last line does not end".into());
        }
        let mut scrape = Self::default();
        // The family that is being told; one that was told may not come back.
        let mut current = String::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let name = match line.strip_prefix("# ") {
                Some(comment) => scrape.comment(comment)?,
                None => scrape.sample(line)?,
            };
            if name != current {
                if scrape
                    .families
                    .get(&name)
                    .is_some_and(|family| family.samples.len() > 1)
                {
                    return Err(format!("`{name}` is told in pieces"));
                }
                current = name;
            }
        }
        for (name, family) in &scrape.families {
            family.check(name)?;
        }
        Ok(scrape)
    }

    fn comment(&mut self, comment: &str) -> Result<String, String> {
        let mut words = comment.splitn(3, ' ');
        let (keyword, name, rest) = (words.next(), words.next(), words.next());
        let name = name
            .filter(|name| is_name(name, true))
            .ok_or(format!("a bad comment `{comment}`"))?;
        let rest = rest
            .filter(|rest| !rest.is_empty())
            .ok_or(format!("nothing about `{name}`"))?;
        let family = self.families.entry(name.to_owned()).or_default();
        let slot = match keyword {
            Some("HELP") => &mut family.help,
            Some("TYPE") => &mut family.kind,
            _ => return Err(format!("a comment that is neither HELP nor TYPE: `{comment}`")),
        };
        if !slot.is_empty() || !family.samples.is_empty() {
            return Err(format!("`{name}` is described twice, or late"));
        }
        *slot = rest.to_owned();
        Ok(name.to_owned())
    }

    fn sample(&mut self, line: &str) -> Result<String, String> {
        let bad = || format!("a bad line `{line}`");
        let end = line.find(['{', ' ']).ok_or_else(bad)?;
        let (name, rest) = line.split_at(end);
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(rest) => labels(rest).ok_or_else(bad)?,
            None => (Labels::new(), rest),
        };
        let value = match rest.strip_prefix(' ').ok_or_else(bad)? {
            "+Inf" => f64::INFINITY,
            "-Inf" => f64::NEG_INFINITY,
            // Rust would read words that Prometheus does not.
            text if text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b)) => {
                text.parse().map_err(|_| bad())?
            }
            _ => return Err(bad()),
        };
        if !is_name(name, true) {
            return Err(bad());
        }
        let parts = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|part| name.strip_suffix(part));
        let owner = parts
            .filter(|owner| {
                self.families
                    .get(*owner)
                    .is_some_and(|family| family.kind == "histogram")
            })
            .chain([name])
            .next()
            .unwrap_or(name)
            .to_owned();
        let family = self.families.entry(owner.clone()).or_default();
        let sample = Sample {
            name: name.to_owned(),
            labels,
            value,
        };
        let same = |other: &&Sample| other.name == sample.name && other.labels == sample.labels;
        if family.samples.iter().find(same).is_some() {
            return Err(format!("a series twice: `{line}`"));
        }
        family.samples.push(sample);
        Ok(owner)
    }
}

impl Family {
    fn check(&self, name: &str) -> Result<(), String> {
        if self.help.is_empty() || self.samples.is_empty() {
            return Err(format!("`{name}` lacks HELP or samples"));
        }
        match self.kind.as_str() {
            "gauge" => Ok(()),
            "counter" if name.ends_with("_total") && self.samples.iter().all(|s| s.value >= 0.0) => Ok(()),
            "histogram" => self.check_histogram(name),
            kind => Err(format!("`{name}` is no {kind}")),
        }
    }

    /// Buckets count upwards to `+Inf`, which is all; each set of labels has buckets, sum and count.
    fn check_histogram(&self, name: &str) -> Result<(), String> {
        let mut buckets: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
        for sample in self.samples.iter().filter(|s| s.name.ends_with("_bucket")) {
            let mut labels = sample.labels.clone();
            let bound = labels
                .remove("le")
                .ok_or(format!("a bucket of `{name}` without `le`"))?;
            let bound = bound.parse().map_err(|_| format!("a bad bound of `{name}`"))?;
            buckets.entry(labels).or_default().push((bound, sample.value));
        }
        for (labels, buckets) in &buckets {
            let part = |part: &str| {
                let mut samples = self.samples.iter();
                let found = samples.find(|s| s.name == format!("{name}{part}") && s.labels == *labels);
                found
                    .map(|sample| sample.value)
                    .ok_or(format!("`{name}{part}` is missing"))
            };
            let rising = buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1);
            let all = buckets.last().filter(|(bound, _)| bound.is_infinite());
            if !rising || all.map(|(_, count)| *count) != Some(part("_count")?) || part("_sum")? < 0.0 {
                return Err(format!(
                    "the buckets of `{name}` {labels:?} do not add up: {buckets:?}"
                ));
            }
        }
        if self.samples.len() != buckets.values().map(|buckets| buckets.len() + 2).sum::<usize>() {
            return Err(format!("`{name}` has samples that belong to no buckets"));
        }
        Ok(())
    }
}

/// `name="value",…}` up to and with the brace, and what follows.
fn labels(text: &str) -> Option<(Labels, &str)> {
    let mut labels = Labels::new();
    let mut rest = text;
    loop {
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    c @ ('"' | '\\') => c,
                    _ => return None,
                }),
                (_, c) => value.push(c),
            }
        };
        if !is_name(name, false) || labels.insert(name.to_owned(), value).is_some() {
            return None;
        }
        rest = &after[end + 1..];
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => return Some((labels, rest.strip_prefix('}')?)),
        }
    }
}

fn is_name(text: &str, colon: bool) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || (colon && b == b':');
    text.bytes().all(fits) && text.bytes().next().is_some_and(|b| !b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_total What\n# TYPE a_total counter\na_total{x=\"1\"} 2\na_total{x=\"\\\"\\n\"} 3\n\n\
        # HELP h_seconds What\n# TYPE h_seconds histogram\nh_seconds_bucket{le=\"0.1\"} 1\n\
        h_seconds_bucket{le=\"+Inf\"} 2\nh_seconds_sum 0.7\nh_seconds_count 2\n";

    #[test]
    fn a_good_scrape_is_read() {
        let scrape = Scrape::parse(GOOD);
        assert_eq!(scrape.names(), BTreeSet::from(["a_total", "h_seconds"]));
        assert!((scrape.value("a_total", &[("x", "1")]) - 2.0).abs() < 1e-9);
        assert!((scrape.value("h_seconds_count", &[]) - 2.0).abs() < 1e-9);
        assert!(scrape.value("a_total", &[("x", "2")]).abs() < 1e-9);
        assert!(scrape.label_values().contains("\"\n"));
    }

    #[test]
    fn a_scrape_that_breaks_a_rule_is_not() {
        for (good, bad) in [
            ("a_total{x=\"1\"} 2", "a_total{x=\"1\"} two"),
            ("a_total{x=\"1\"} 2", "a_total{x=\"1\"} inf"),
            ("a_total{x=\"1\"} 2", "a_total{x=\"1\"} -2"),
            ("a_total{x=\"1\"} 2", "a_total{x=1} 2"),
            ("a_total{x=\"1\"} 2", "a_total{x=\"1\",x=\"2\"} 2"),
            ("a_total{x=\"1\"} 2", "a_total{1x=\"1\"} 2"),
            ("a_total{x=\"1\"} 2", "a_total{x=\"\\q\"} 2"),
            ("a_total{x=\"1\"} 2", "a_total{x=\"1\"}2"),
            ("a_total{x=\"1\"} 2", "a_total{x=\"1\"} 2\na_total{x=\"1\"} 2"),
            ("# HELP a_total What\n", ""),
            ("# TYPE a_total counter\n", ""),
            ("# TYPE a_total counter", "# TYPE a_total meter"),
            ("# HELP a_total What", "# HELP a_total What\n# HELP a_total What"),
            ("# HELP a_total What", "# NOTE a_total What"),
            ("a_total", "a"),
            ("h_seconds_count 2", "h_seconds_count 3"),
            ("h_seconds_count 2\n", "h_seconds_count 2"),
            ("h_seconds_sum 0.7\n", ""),
            ("le=\"0.1\"} 1", "le=\"0.1\"} 3"),
            ("h_seconds_bucket{le=\"+Inf\"} 2\n", ""),
            ("h_seconds_count 2\n", "h_seconds_count 2\na_total{x=\"3\"} 2\n"),
        ] {
            assert!(GOOD.contains(good), "{good}");
            let text = GOOD.replace(good, bad);
            assert!(Scrape::read(&text).is_err(), "{text}");
        }
    }
}
