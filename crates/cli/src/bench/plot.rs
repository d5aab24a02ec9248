//! The result as a picture (SVG 1.1): a bar for each VM, put together from its stages, the fastest first.
//!
//! ```text
//!  title, host, legend: the stages that take longest by their medians
//!  a variant (N, p50, p90, p99)       ╎         ╎
//!              │▇▇▇▇▇▇▇▇│▇▇▇▇│▇        ╎         ╎
//!              │▇▇▇▇▇▇▇▇▇│▇▇▇▇▇│▇▇     ╎         ╎
//!              │▇▇▇▇▇▇▇▇▇▇▇│▇▇▇▇▇│▇▇▇▇▇╎▇▇▇      ╎
//!              └─────────────────────────────── milliseconds from the request
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;

use offshoot_model::percentile;

use super::report::{Report, Sample, VariantReport};

/// Pixels.
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 30.0;
/// Where the legend begins.
const LEGEND: f64 = 64.0;
const LEGEND_COLUMNS: usize = 3;
const LEGEND_LINE: f64 = 18.0;
/// Between two variants, with room for a name.
const VARIANT_GAP: f64 = 44.0;

/// Stages with a colour of their own: more could not be told apart.
const MOST_STAGES: usize = 10;
/// Tableau's ten, which are told apart by most eyes.
const COLOURS: [&str; MOST_STAGES] = [
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#ff9da7", "#9c755f",
    "#d37295",
];
const OTHER: &str = "#bab0ac";
/// What the dashed lines mark.
const PERCENTS: [usize; 3] = [50, 90, 99];

/// A piece of a bar.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    label: String,
    start_us: u64,
    end_us: u64,
}

/// What a VM's time went for, one after another without gaps, up to its last answer. A stage that has parts is shown as
/// its parts; what lies between is called so.
fn segments(sample: &Sample) -> Vec<Segment> {
    let mut pieces = Vec::new();
    for operation in &sample.operations {
        let offset = operation.began_us.saturating_sub(sample.began_us);
        let has_parts = |name: &str| operation.stages.iter().any(|s| s.within.as_deref() == Some(name));
        for stage in operation.stages.iter().filter(|stage| !has_parts(&stage.stage)) {
            pieces.push(Segment {
                label: format!("{} {}", stage.operation, stage.stage),
                start_us: stage.start_us.saturating_add(offset),
                end_us: stage.end_us().saturating_add(offset),
            });
        }
    }
    pieces.push(Segment {
        label: "first command".into(),
        start_us: sample.running_us,
        end_us: sample.exec_us,
    });
    if let Some(ssh_us) = sample.ssh_us {
        pieces.push(Segment {
            label: "SSH".into(),
            start_us: sample.exec_us,
            end_us: ssh_us,
        });
    }
    pieces.sort_by_key(|piece| piece.start_us);
    let end = sample.end_us();
    let mut filled: Vec<Segment> = Vec::new();
    let mut at = 0;
    for piece in pieces {
        let (start_us, end_us) = (piece.start_us.clamp(at, end), piece.end_us.clamp(at, end));
        if start_us > at {
            filled.push(between(at, start_us));
        }
        if end_us > start_us {
            filled.push(Segment {
                start_us,
                end_us,
                ..piece
            });
        }
        at = at.max(end_us);
    }
    if end > at {
        filled.push(between(at, end));
    }
    filled
}

fn between(start_us: u64, end_us: u64) -> Segment {
    Segment {
        label: BETWEEN.into(),
        start_us,
        end_us,
    }
}

/// What no stage accounts for.
const BETWEEN: &str = "between stages";

/// The colours of the stages that take longest by their medians in any variant, longest first, with these medians.
fn legend(report: &Report) -> Vec<(String, u64, &'static str)> {
    let mut longest: BTreeMap<String, u64> = BTreeMap::new();
    for variant in &report.variants {
        let mut times: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for sample in of_variant(report, variant) {
            let mut sums: BTreeMap<String, u64> = BTreeMap::new();
            for segment in segments(sample) {
                *sums.entry(segment.label).or_default() += segment.end_us - segment.start_us;
            }
            for (label, sum) in sums {
                times.entry(label).or_default().push(sum);
            }
        }
        for (label, mut sums) in times {
            sums.sort_unstable();
            let median = percentile(&sums, 50).unwrap_or(0);
            let known = longest.entry(label).or_default();
            *known = (*known).max(median);
        }
    }
    longest.remove(BETWEEN);
    let mut order: Vec<_> = longest.into_iter().collect();
    order.sort_by_key(|(_, median)| std::cmp::Reverse(*median));
    order
        .into_iter()
        .zip(COLOURS)
        .map(|((label, median), colour)| (label, median, colour))
        .collect()
}

/// The samples of a variant, the fastest first.
fn of_variant<'a>(report: &'a Report, variant: &VariantReport) -> Vec<&'a Sample> {
    let samples = report.samples.iter();
    let mut mine: Vec<_> = samples
        .filter(|sample| sample.variant == variant.variant.name)
        .collect();
    mine.sort_by_key(|sample| sample.end_us());
    mine
}

/// A bar's height and the distance to the next one.
fn bar_height(runs: usize) -> (f64, f64) {
    match runs {
        0..=40 => (13.0, 16.0),
        41..=150 => (6.0, 7.0),
        _ => (3.0, 3.0),
    }
}

/// The distance of the scale's marks, microseconds: 1, 2 or 5 times a power of ten, with ten marks at most.
fn step(end_us: u64) -> u64 {
    let mut power = 1;
    loop {
        for factor in [1, 2, 5] {
            if end_us / (power * factor) < 10 {
                return power * factor;
            }
        }
        power *= 10;
    }
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no place for them.
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

fn ms(us: u64) -> String {
    let ms = us as f64 / 1000.0;
    if us < 10_000 {
        format!("{ms:.1} ms")
    } else {
        format!("{ms:.0} ms")
    }
}

/// The pieces of a picture.
#[derive(Default)]
struct Picture {
    body: String,
}

impl Picture {
    fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" class="{class}">{}</text>"#,
            escaped(text)
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(
            self.body,
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" class="{class}"/>"#
        );
    }

    fn rectangle(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str, title: &str) {
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.2}" y="{y:.1}" width="{width:.2}" height="{height:.1}" fill="{fill}"><title>{}</title></rect>"#,
            escaped(title)
        );
    }
}

/// The whole picture.
pub(super) fn svg(report: &Report) -> String {
    let legend = legend(report);
    let end_us = report
        .samples
        .iter()
        .map(Sample::end_us)
        .max()
        .unwrap_or(0)
        .max(1);
    let scale = (WIDTH - LEFT - RIGHT) / end_us as f64;
    let x = |us: u64| LEFT + us as f64 * scale;
    let mut picture = Picture::default();
    head(&mut picture, report, &legend);

    let lines = (legend.len() + 1).div_ceil(LEGEND_COLUMNS);
    let top = LEGEND + LEGEND_LINE * lines as f64;
    let mut y = top;
    for variant in &report.variants {
        let samples = of_variant(report, variant);
        let (height, pitch) = bar_height(samples.len());
        y += VARIANT_GAP / 2.0;
        let what = if report.variants.len() > 1 {
            &variant.variant.name
        } else {
            "each VM, the fastest first"
        };
        let failed = match variant.failed {
            0 => String::new(),
            failed => format!(", {failed} failed"),
        };
        picture.text(
            LEFT,
            y - 6.0,
            "name",
            &format!(
                "{what} (N {}{failed}{})",
                samples.len(),
                percentile_words(&samples)
            ),
        );
        let first = y;
        for sample in &samples {
            if height > 10.0 {
                picture.text(LEFT - 6.0, y + height - 3.0, "number", &sample.run.to_string());
            }
            for segment in segments(sample) {
                let known = legend.iter().find(|(label, ..)| *label == segment.label);
                let colour = known.map_or(OTHER, |(.., colour)| colour);
                let width = (segment.end_us - segment.start_us) as f64 * scale;
                let title = format!("{}: {}", segment.label, ms(segment.end_us - segment.start_us));
                picture.rectangle((x(segment.start_us), y), (width, height), colour, &title);
            }
            y += pitch;
        }
        percentile_lines(&mut picture, &samples, &x, (first, y));
        y += VARIANT_GAP / 2.0;
    }
    axis(&mut picture, end_us, &x, (top, y));
    let height = y + 44.0;
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0}" viewBox="0 0 {WIDTH} {height:.0}">
<style>text{{font-family:sans-serif;font-size:12px;fill:#333}}.title{{font-size:16px;font-weight:bold}}.small,.number,.tick{{font-size:10px;fill:#666}}.name{{font-weight:bold}}.number{{text-anchor:end}}.tick{{text-anchor:middle}}.grid{{stroke:#ddd}}.axis{{stroke:#666}}.percentile{{stroke:#222;stroke-dasharray:3 3}}</style>
<rect width="100%" height="100%" fill="#fff"/>
{}</svg>
"##,
        picture.body
    )
}

fn head(picture: &mut Picture, report: &Report, legend: &[(String, u64, &str)]) {
    let (host, settings) = (&report.host, &report.settings);
    let last = if settings.ssh {
        "SSH's answer"
    } else {
        "the first command's output"
    };
    let title = format!("{}: from the request for a VM to {last}", settings.image);
    picture.text(LEFT, 24.0, "title", &title);
    let facts = format!(
        "{} x {}, Linux {}, {}, guests run by {}, {} at once",
        host.cores,
        host.cpu,
        host.kernel,
        host.vmms.join(", "),
        host.accel,
        settings.parallel
    );
    picture.text(LEFT, 42.0, "small", &facts);
    let column = (WIDTH - LEFT - RIGHT) / LEGEND_COLUMNS as f64;
    let mut entries: Vec<(String, &str)> = legend
        .iter()
        .map(|(label, median, colour)| (format!("{label} ({})", ms(*median)), *colour))
        .collect();
    entries.push(("everything else".into(), OTHER));
    for (n, (label, colour)) in entries.iter().enumerate() {
        let at = (
            LEFT + column * (n % LEGEND_COLUMNS) as f64,
            LEGEND + LEGEND_LINE * (n / LEGEND_COLUMNS) as f64,
        );
        picture.rectangle((at.0, at.1 - 10.0), (12.0, 12.0), colour, label);
        picture.text(at.0 + 18.0, at.1, "legend", label);
    }
}

/// Lines through the bars of one variant.
fn percentile_lines(
    picture: &mut Picture,
    samples: &[&Sample],
    x: &impl Fn(u64) -> f64,
    (top, bottom): (f64, f64),
) {
    let ends = ends(samples);
    for us in PERCENTS.iter().filter_map(|percent| percentile(&ends, *percent)) {
        picture.line((x(us), top - 3.0), (x(us), bottom + 3.0), "percentile");
    }
}

/// `, p50 1730 ms, p90 …`; nothing where nothing was measured.
fn percentile_words(samples: &[&Sample]) -> String {
    let ends = ends(samples);
    let word = |percent: &usize| Some(format!(", p{percent} {}", ms(percentile(&ends, *percent)?)));
    PERCENTS.iter().filter_map(word).collect()
}

/// When the last answers came, in order of size.
fn ends(samples: &[&Sample]) -> Vec<u64> {
    samples.iter().map(|sample| sample.end_us()).collect()
}

fn axis(picture: &mut Picture, end_us: u64, x: &impl Fn(u64) -> f64, (top, bottom): (f64, f64)) {
    let step = step(end_us);
    let mut grid = Picture::default();
    for mark in (0..).map(|n| n * step).take_while(|us| *us <= end_us) {
        grid.line((x(mark), top + 4.0), (x(mark), bottom), "grid");
        picture.text(x(mark), bottom + 14.0, "tick", &ms(mark));
    }
    picture.line((LEFT, bottom), (WIDTH - RIGHT, bottom), "axis");
    picture.text(LEFT, bottom + 32.0, "small", "milliseconds from the request");
    // Behind the bars.
    picture.body.insert_str(0, &grid.body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    #[test]
    fn a_bar_has_no_gaps_and_nothing_twice() {
        let report = report();
        for sample in &report.samples {
            let segments = segments(sample);
            assert_eq!(segments[0].start_us, 0);
            assert_eq!(segments.last().unwrap().end_us, sample.end_us());
            assert!(segments.windows(2).all(|two| two[0].end_us == two[1].start_us));
            let labels: Vec<_> = segments.iter().map(|segment| segment.label.as_str()).collect();
            assert!(labels.contains(&"start guest.boot"), "{labels:?}");
            assert!(
                !labels.contains(&"start agent.after_boot"),
                "its parts stand for it"
            );
        }
    }

    #[test]
    fn the_longest_stages_have_colours() {
        let legend = legend(&report());
        assert_eq!(
            (legend[0].0.as_str(), legend[0].1),
            ("start guest.boot", 1_580_000)
        );
        assert!(legend.is_sorted_by(|a, b| a.1 >= b.1));
        assert!(legend.iter().all(|(label, ..)| label != BETWEEN));
    }

    #[test]
    fn the_scale_has_ten_marks_at_most() {
        for (end, expected) in [
            (1, 1),
            (9, 1),
            (10, 2),
            (1_730_000, 200_000),
            (5_000_000, 1_000_000),
        ] {
            assert_eq!(step(end), expected, "{end}");
            assert!(end / step(end) <= 10);
        }
    }

    #[test]
    fn every_bar_is_drawn_and_texts_are_escaped() {
        let report = report();
        let picture = svg(&report);
        let pieces: usize = report.samples.iter().map(|sample| segments(sample).len()).sum();
        let swatches = legend(&report).len() + 1;
        assert_eq!(picture.matches("<title>").count(), pieces + swatches);
        roxmltree::Document::parse(&picture).expect("XML");
        assert!(picture.contains("A CPU &lt;1&gt;") && !picture.contains("<1>"));
        assert!(picture.contains("template (N 5, 1 failed, p50 270 ms, p90 290 ms, p99 290 ms)"));
        assert_eq!(
            picture.matches(r#"class="percentile""#).count(),
            2 * PERCENTS.len()
        );
    }

    #[test]
    fn nothing_measured_is_a_picture_too() {
        let mut report = report();
        report.samples.clear();
        report.variants.clear();
        assert!(svg(&report).ends_with("</svg>\n"));
    }
}
