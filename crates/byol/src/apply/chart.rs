//! Charts as SVG: a value with its interval for each of some named settings, a colour a series.

use std::fmt::Write;

/// A point of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Which setting: the place on the horizontal axis. Settings stand in the order of their first points.
    pub setting: String,
    /// Which series.
    pub series: String,
    /// The value.
    pub value: f64,
    /// Its interval, drawn as a whisker.
    pub interval: Option<[f64; 2]>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
/// Left, top, right, bottom.
const MARGIN: [f64; 4] = [64.0, 44.0, 16.0, 96.0];
const COLOURS: [&str; 4] = ["#1f5fbf", "#d2552d", "#3a8f4d", "#8a5bb5"];

/// The chart. Values are drawn as they are; the vertical axis begins at 0 or below the least value.
pub fn svg(title: &str, axis: &str, points: &[Point]) -> String {
    let [left, top, right, bottom] = MARGIN;
    let settings = in_order(points.iter().map(|p| p.setting.as_str()));
    let series = in_order(points.iter().map(|p| p.series.as_str()));
    let ends = |p: &Point| [p.value, p.interval.map_or(p.value, |i| i[0]), p.interval.map_or(p.value, |i| i[1])];
    let all = || points.iter().flat_map(ends).filter(|v| v.is_finite());
    let (low, high) = (all().fold(0.0f64, f64::min), all().fold(0.0f64, f64::max));
    let step = tick(high - low);
    let (low, high) = ((low / step).floor() * step, ((high / step).ceil() * step).max(step));
    let y = |v: f64| HEIGHT - bottom - (v - low) / (high - low) * (HEIGHT - top - bottom);
    let slot = (WIDTH - left - right) / settings.len().max(1) as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("<text x=\"{left}\" y=\"20\" font-size=\"15\">{}</text>", escaped(title)));
    let ticks = ((high - low) / step).round() as usize;
    for i in 0..=ticks {
        let v = low + i as f64 * step;
        line(format!(
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\"/>",
            WIDTH - right,
            y(v)
        ));
        line(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>", left - 8.0, y(v) + 4.0, short(v)));
    }
    let middle = (top + HEIGHT - bottom) / 2.0;
    line(format!(
        "<text x=\"16\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 16 {middle})\">{}</text>",
        escaped(axis)
    ));
    for (i, name) in settings.iter().enumerate() {
        let (x, y) = (left + slot * (i as f64 + 0.5), HEIGHT - bottom + 16.0);
        line(format!(
            "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"end\" transform=\"rotate(-25 {x:.1} {y})\">{}</text>",
            escaped(name)
        ));
    }
    for (k, name) in series.iter().enumerate() {
        let colour = COLOURS[k % COLOURS.len()];
        // Side by side, so that whiskers do not cover each other.
        let aside = (k as f64 - (series.len() as f64 - 1.0) / 2.0) * (slot * 0.2).min(12.0);
        for point in points.iter().filter(|p| p.series == *name && p.value.is_finite()) {
            let at = settings.iter().position(|s| *s == point.setting).unwrap_or(0);
            let x = left + slot * (at as f64 + 0.5) + aside;
            if let Some([from, to]) = point.interval {
                let (from, to) = (y(from), y(to));
                line(format!(
                    "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{from:.1}\" y2=\"{to:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>"
                ));
            }
            line(format!("<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"{colour}\"/>", y(point.value)));
        }
        if series.len() > 1 {
            let x = left + 120.0 * k as f64;
            line(format!("<circle cx=\"{:.1}\" cy=\"34\" r=\"5\" fill=\"{colour}\"/>", x + 5.0));
            line(format!("<text x=\"{:.1}\" y=\"38\">{}</text>", x + 16.0, escaped(name)));
        }
    }
    out.push_str("</svg>\n");
    out
}

/// Each once, in the order of their first appearance.
fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut all = Vec::new();
    for name in names {
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

/// A round step that parts a range into five to ten.
fn tick(range: f64) -> f64 {
    if range <= 0.0 || !range.is_finite() {
        return 1.0;
    }
    let power = 10f64.powf((range / 5.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| range / step <= 8.0).unwrap_or(power)
}

fn short(v: f64) -> String {
    let mut text = String::new();
    write!(text, "{:.3}", v).expect("a string takes everything");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_a_mark_for_every_value_and_escapes_names() {
        let point = |setting: &str, series: &str, value| Point {
            setting: setting.into(),
            series: series.into(),
            value,
            interval: Some([value - 1.0, value + 1.0]),
        };
        let points = [point("a < b", "one", 10.0), point("a < b", "two", 12.0), point("c", "one", f64::NAN)];
        let text = svg("title & more", "%", &points);
        // Two values, two of the legend; what is no number has no mark.
        assert_eq!(text.matches("<circle").count(), 4);
        assert!(text.contains("a &lt; b") && text.contains("title &amp; more") && !text.contains("NaN"));
        assert_eq!(tick(100.0), 20.0);
    }
}
