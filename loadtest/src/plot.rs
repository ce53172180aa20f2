//! The picture of a run: latency, deliveries, and the server's memory and CPU, second by second. SVG written by hand.
//!
//! Memory: the text, about 60 bytes a point and line. Errors: none; what was not measured is not drawn.

use std::fmt::Write as _;

use crate::report::Point;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 66.0;
const PANEL: f64 = 170.0;
const GAP: f64 = 64.0;
const BOTTOM: f64 = 40.0;
/// Points of a line: more cannot be told apart at this width.
const POINTS_MAX: usize = 900;

/// One line of a panel.
struct Line {
    name: &'static str,
    color: &'static str,
    values: Vec<Option<f64>>,
}

/// Some lines over a common scale.
struct Panel {
    title: &'static str,
    unit: &'static str,
    logarithmic: bool,
    lines: Vec<Line>,
}

/// The picture of `points`.
pub fn svg(points: &[Point], title: &str) -> String {
    let points = thinned(points);
    let panels: Vec<Panel> = panels(&points).into_iter().filter(Panel::has_values).collect();
    let seconds: Vec<f64> = points.iter().map(|point| point.second).collect();
    let height = TOP + panels.len() as f64 * (PANEL + GAP) + BOTTOM - GAP / 2.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" font-family=\"system-ui, -apple-system, 'Segoe UI', sans-serif\" font-size=\"12\">\n\
         <title>{title}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"32\" font-size=\"17\" font-weight=\"600\" fill=\"#111827\">{title}</text>\n",
        title = escaped(title),
    );
    if panels.is_empty() {
        out.push_str("<text x=\"76\" y=\"80\" fill=\"#6b7280\">Nothing was measured.</text>\n");
    }
    for (number, panel) in panels.iter().enumerate() {
        panel.draw(&mut out, TOP + number as f64 * (PANEL + GAP) + 24.0, &seconds);
    }
    out.push_str("</svg>\n");
    out
}

/// At most [`POINTS_MAX`] of them, evenly; of each stretch that is passed over, the one with the highest latency stands.
fn thinned(points: &[Point]) -> Vec<Point> {
    let stretch = points.len().div_ceil(POINTS_MAX).max(1);
    let worst = |stretch: &[Point]| stretch.iter().max_by_key(|point| point.max_us).cloned();
    points.chunks(stretch).filter_map(worst).collect()
}

fn panels(points: &[Point]) -> Vec<Panel> {
    let line = |name, color, value: &dyn Fn(&Point) -> Option<f64>| Line {
        name,
        color,
        values: points.iter().map(value).collect(),
    };
    let millis = |us: Option<u64>| us.map(|us| us as f64 / 1000.0);
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    let cpu = Line { name: "of a core", color: "#d97706", values: shares(points) };
    vec![
        Panel {
            title: "Latency, from the event's stamp to its bytes read",
            unit: "ms",
            logarithmic: true,
            lines: vec![
                line("max", "#9ca3af", &|point| millis(point.max_us)),
                line("p99", "#dc2626", &|point| millis(point.p99_us)),
                line("p50", "#2563eb", &|point| millis(point.p50_us)),
            ],
        },
        Panel {
            title: "Deliveries a second",
            unit: "",
            logarithmic: false,
            lines: vec![line("deliveries", "#059669", &|point| Some(point.deliveries as f64))],
        },
        Panel {
            title: "Connections",
            unit: "",
            logarithmic: false,
            lines: vec![line("open", "#0891b2", &|point| Some(point.open as f64))],
        },
        Panel {
            title: "Server memory",
            unit: "MiB",
            logarithmic: false,
            lines: vec![
                line("RSS", "#c4b5fd", &|point| point.server.and_then(|server| server.rss_bytes).map(mib)),
                line("PSS", "#7c3aed", &|point| point.server.and_then(|server| server.pss_bytes).map(mib)),
            ],
        },
        Panel { title: "Server CPU", unit: "%", logarithmic: false, lines: vec![cpu] },
    ]
}

/// CPU time between two points over the time between them, in per cent of a core.
fn shares(points: &[Point]) -> Vec<Option<f64>> {
    let mut before: Option<&Point> = None;
    let share = |point| {
        let earlier: &Point = before.replace(point)?;
        let spent = point.server?.cpu_ns.saturating_sub(earlier.server?.cpu_ns);
        let passed = point.second - earlier.second;
        (passed > 0.0).then(|| spent as f64 / 1e9 / passed * 100.0)
    };
    points.iter().map(share).collect()
}

impl Panel {
    fn has_values(&self) -> bool {
        self.lines.iter().any(|line| line.values.iter().flatten().any(|value| *value > 0.0))
    }

    fn draw(&self, out: &mut String, top: f64, seconds: &[f64]) {
        let values = || self.lines.iter().flat_map(|line| line.values.iter().flatten().copied());
        let highest = values().fold(0.0, f64::max);
        let ticks = if self.logarithmic {
            // Below a microsecond there is nothing to see.
            let lowest = values().filter(|value| *value > 0.0).fold(highest, f64::min).max(0.001);
            decades(lowest, highest)
        } else {
            steps(highest)
        };
        let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
        let scale = |value: f64| if self.logarithmic { value.max(low).log10() } else { value };
        let y = |value: f64| top + PANEL - (scale(value) - scale(low)) / (scale(high) - scale(low)) * PANEL;
        let last = seconds.last().copied().unwrap_or(1.0).max(1.0);
        let right = WIDTH - RIGHT;
        let x = |second: f64| LEFT + second / last * (right - LEFT);
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"600\" fill=\"#374151\">{}</text>",
            top - 12.0,
            self.title
        );
        self.legend(out, top - 12.0);
        for tick in ticks {
            let at = y(tick);
            let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
            let _ = writeln!(
                out,
                "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#e5e7eb\"/><text x=\"{:.1}\" y=\"{:.1}\" \
                 text-anchor=\"end\" fill=\"#6b7280\">{}{unit}</text>",
                LEFT - 8.0,
                at + 4.0,
                number(tick),
            );
        }
        for tick in steps(last).into_iter().filter(|tick| *tick <= last) {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#6b7280\">{} s</text>",
                x(tick),
                top + PANEL + 18.0,
                number(tick),
            );
        }
        for line in &self.lines {
            let mut path = String::new();
            let mut pen_is_down = false;
            for (second, value) in seconds.iter().zip(&line.values) {
                if let Some(value) = value {
                    let _ = write!(path, "{}{:.1} {:.1}", if pen_is_down { 'L' } else { 'M' }, x(*second), y(*value));
                }
                pen_is_down = value.is_some();
            }
            if !path.is_empty() {
                let _ = writeln!(
                    out,
                    "<path d=\"{path}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\" stroke-linejoin=\"round\" \
                     stroke-linecap=\"round\"/>",
                    line.color
                );
            }
        }
    }

    /// The lines' names, from the right.
    fn legend(&self, out: &mut String, y: f64) {
        let mut right = WIDTH - RIGHT;
        for line in self.lines.iter().rev() {
            let _ = writeln!(
                out,
                "<text x=\"{right:.1}\" y=\"{y:.1}\" text-anchor=\"end\" fill=\"#374151\">{}</text>",
                line.name
            );
            right -= line.name.len() as f64 * 6.3 + 8.0;
            let _ = writeln!(
                out,
                "<path d=\"M{:.1} {:.1}H{right:.1}\" stroke=\"{}\" stroke-width=\"3\" stroke-linecap=\"round\"/>",
                right - 16.0,
                y - 4.0,
                line.color
            );
            right -= 32.0;
        }
    }
}

/// Powers of ten around what was measured.
fn decades(lowest: f64, highest: f64) -> Vec<f64> {
    let first = lowest.log10().floor() as i32;
    let last = (highest.log10().ceil() as i32).max(first + 1);
    (first..=last).map(|power| 10f64.powi(power)).collect()
}

/// Round steps from 0 to no less than `highest`, about five of them.
fn steps(highest: f64) -> Vec<f64> {
    let rough = highest.max(1e-9) / 5.0;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|times| times * magnitude).find(|step| *step >= rough * 0.999);
    let step = step.unwrap_or(rough);
    let count = (highest / step * 0.999).ceil().max(1.0) as usize;
    (0..=count).map(|number| number as f64 * step).collect()
}

/// A number for people: `12k`, `0.05`.
fn number(value: f64) -> String {
    let trimmed = |text: String| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    };
    match value {
        _ if value >= 1e6 => trimmed(format!("{:.2}", value / 1e6)) + "M",
        _ if value >= 10_000.0 => trimmed(format!("{:.1}", value / 1e3)) + "k",
        _ if value >= 1.0 || value == 0.0 => trimmed(format!("{value:.1}")),
        _ => trimmed(format!("{value:.4}")),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Sample;

    fn point(second: u32) -> Point {
        let server = Sample {
            pss_bytes: Some(30 << 20),
            rss_bytes: Some(40 << 20),
            cpu_ns: u64::from(second) * 500_000_000,
            ..Sample::default()
        };
        Point {
            second: f64::from(second),
            open: 1000,
            deliveries: 5000,
            p50_us: Some(900),
            p99_us: (second != 3).then_some(4000),
            max_us: Some(90_000),
            server: Some(server),
        }
    }

    /// Every tag is closed and every number is one.
    fn check(picture: &str) {
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
        assert!(!picture.contains("NaN") && !picture.contains("inf"), "{picture}");
        let mut open = Vec::new();
        for tag in picture.split('<').skip(1).map(|rest| rest.split('>').next().expect("it ends")) {
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name), "{picture}"),
                None if tag.ends_with('/') => {}
                None => open.push(tag.split(' ').next().expect("a name")),
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn all_panels_are_drawn() {
        let picture = svg(&(1..=10).map(point).collect::<Vec<_>>(), "a <b> & \"c\"");
        check(&picture);
        for name in ["Latency", "Deliveries", "Connections", "Server memory", "Server CPU", "a &lt;b&gt; &amp;"] {
            assert!(picture.contains(name), "{name}");
        }
        let p99 =
            picture.lines().find(|line| line.contains("#dc2626") && line.contains("fill=\"none\"")).expect("a line");
        assert_eq!(p99.matches('M').count(), 2, "a second that was not measured is a gap");
        // Half a core, at half the height between 0 and 100.
        assert_eq!(shares(&[point(1), point(2)]), [None, Some(50.0)]);
    }

    #[test]
    fn what_was_not_measured_is_not_drawn() {
        check(&svg(&[], "nothing"));
        let picture = svg(&[Point { server: None, p50_us: None, p99_us: None, max_us: None, ..point(1) }], "one");
        check(&picture);
        assert!(!picture.contains("Server") && !picture.contains("Latency") && picture.contains("Deliveries"));
        check(&svg(&[Point { max_us: Some(0), ..point(0) }, point(0)], "zeros"));
    }

    #[test]
    fn a_day_fits() {
        let picture = svg(&(0..86_400).map(point).collect::<Vec<_>>(), "a day");
        check(&picture);
        assert!(picture.len() < 300_000, "{}", picture.len());
    }

    #[test]
    fn scales_are_round() {
        assert_eq!(steps(9.3), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(steps(5000.0), [0.0, 1000.0, 2000.0, 3000.0, 4000.0, 5000.0]);
        assert_eq!(steps(1.0).last(), Some(&1.0));
        assert_eq!(decades(0.5, 90.0), [0.1, 1.0, 10.0, 100.0]);
        assert_eq!(decades(1.0, 1.0), [1.0, 10.0]);
        assert_eq!(
            [number(0.0), number(0.05), number(2.5), number(120.0), number(12_500.0), number(2e6)],
            ["0", "0.05", "2.5", "120", "12.5k", "2M"]
        );
    }
}
