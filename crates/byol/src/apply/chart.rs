//! SVG charts: values with intervals per setting, curves, and scatter plots.

use std::fmt::Write;

/// A value of one series at one setting.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Name on the horizontal axis. Settings appear in the order of their first points.
    pub setting: String,
    /// Name in the legend. Each series has its own color.
    pub series: String,
    /// Position on the vertical axis.
    pub value: f64,
    /// Interval around the value, drawn as a whisker.
    pub interval: Option<[f64; 2]>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
/// Left, top, right and bottom margin.
const MARGIN: [f64; 4] = [64.0, 44.0, 16.0, 96.0];
/// Horizontal advance of a character of a slanted label.
const LABEL_ADVANCE: f64 = 6.5;
const COLORS: [&str; 4] = ["#1f5fbf", "#d2552d", "#3a8f4d", "#8a5bb5"];

/// Draws points with whiskers. The vertical axis starts at 0, or below the smallest negative value.
pub fn svg(title: &str, axis: &str, points: &[Point]) -> String {
    let [left, top, right, bottom] = MARGIN;
    let settings = unique(points.iter().map(|p| p.setting.as_str()));
    let series = unique(points.iter().map(|p| p.series.as_str()));
    let ends = |p: &Point| [p.value, p.interval.map_or(p.value, |i| i[0]), p.interval.map_or(p.value, |i| i[1])];
    let values = || points.iter().flat_map(ends).filter(|v| v.is_finite());
    let (low, high) = (values().fold(0.0f64, f64::min), values().fold(0.0f64, f64::max));
    let step = tick_step(high - low);
    let (low, high) = ((low / step).floor() * step, ((high / step).ceil() * step).max(step));
    let y = |v: f64| HEIGHT - bottom - (v - low) / (high - low) * (HEIGHT - top - bottom);
    let slot = (WIDTH - left - right) / settings.len().max(1) as f64;
    // Space for labels that begin left of the axis.
    let begin =
        |(i, name): (usize, &&str)| left + slot * (i as f64 + 0.5) - LABEL_ADVANCE * name.chars().count() as f64;
    let edge = settings.iter().enumerate().map(begin).fold(0.0, f64::min).floor();
    let width = WIDTH - edge;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"{edge} 0 {width} {HEIGHT}\" \
         width=\"{width}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect x=\"{edge}\" width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut push = |element: String| {
        out.push_str(&element);
        out.push('\n');
    };
    push(format!("<text x=\"{left}\" y=\"20\" font-size=\"15\">{}</text>", escape_html(title)));
    push(vertical_axis(axis, [low, high], step, y));
    for (i, name) in settings.iter().enumerate() {
        let (x, y) = (left + slot * (i as f64 + 0.5), HEIGHT - bottom + 16.0);
        push(format!(
            "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"end\" transform=\"rotate(-25 {x:.1} {y})\">{}</text>",
            escape_html(name)
        ));
    }
    for (k, name) in series.iter().enumerate() {
        let color = COLORS[k % COLORS.len()];
        // Series stand side by side, so that their whiskers do not overlap.
        let shift = (k as f64 - (series.len() as f64 - 1.0) / 2.0) * (slot * 0.2).min(12.0);
        for point in points.iter().filter(|p| p.series == *name && p.value.is_finite()) {
            let position = settings.iter().position(|s| *s == point.setting).unwrap_or(0);
            let x = left + slot * (position as f64 + 0.5) + shift;
            if let Some([from, to]) = point.interval {
                let (from, to) = (y(from), y(to));
                push(format!(
                    "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{from:.1}\" y2=\"{to:.1}\" \
                     stroke=\"{color}\" stroke-width=\"2\"/>"
                ));
            }
            push(format!("<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"{color}\"/>", y(point.value)));
        }
        if series.len() > 1 {
            let x = left + 120.0 * k as f64;
            push(format!("<circle cx=\"{:.1}\" cy=\"34\" r=\"5\" fill=\"{color}\"/>", x + 5.0));
            push(format!("<text x=\"{:.1}\" y=\"38\">{}</text>", x + 16.0, escape_html(name)));
        }
    }
    out.push_str("</svg>\n");
    out
}

/// Grid lines with their values from `low` to `high`, and the name of the axis. `y` maps a value to
/// its height.
fn vertical_axis(name: &str, [low, high]: [f64; 2], step: f64, y: impl Fn(f64) -> f64) -> String {
    let [left, top, right, bottom] = MARGIN;
    let ticks = ((high - low) / step).round() as usize;
    let tick = |i| {
        let v = low + i as f64 * step;
        let (end, text, y) = (WIDTH - right, left - 8.0, y(v));
        format!(
            "<line x1=\"{left}\" x2=\"{end}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\n\
             <text x=\"{text}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            y + 4.0,
            format_short(v)
        )
    };
    let middle = (top + HEIGHT - bottom) / 2.0;
    (0..=ticks).map(tick).collect::<String>()
        + &format!(
            "<text x=\"16\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 16 {middle})\">{}</text>",
            escape_html(name)
        )
}

/// Draws a curve of `[x, y]` points with the last value in its title. Skips non-finite points.
pub fn curve(title: &str, x_axis: &str, points: &[[f64; 2]]) -> String {
    const W: f64 = 420.0;
    const H: f64 = 220.0;
    const SIDES: [f64; 4] = [52.0, 28.0, 12.0, 36.0];
    let [left, top, right, bottom] = SIDES;
    let points: Vec<[f64; 2]> = points.iter().copied().filter(|p| p.iter().all(|v| v.is_finite())).collect();
    let range = |axis: usize, from: f64| {
        let values = points.iter().map(|p| p[axis]);
        (values.clone().fold(from, f64::min), values.fold(f64::NEG_INFINITY, f64::max))
    };
    let ((x0, x1), (low, high)) = (range(0, 0.0), range(1, f64::INFINITY));
    let (x1, low, high) = if points.is_empty() { (1.0, 0.0, 1.0) } else { (x1.max(x0 + 1e-9), low, high) };
    let step = tick_step(high - low);
    let (low, high) =
        ((low / step).floor() * step, ((high / step).ceil() * step).max((low / step).floor() * step + step));
    let x = |v: f64| left + (v - x0) / (x1 - x0) * (W - left - right);
    let y = |v: f64| H - bottom - (v - low) / (high - low) * (H - top - bottom);
    let last = points.last().map_or(String::new(), |p| format!(": {}", format_short(p[1])));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {W} {H}\" \
         font-family=\"sans-serif\" font-size=\"11\" role=\"img\">\n\
         <text x=\"{left}\" y=\"16\" font-size=\"13\">{}{last}</text>\n",
        escape_html(title)
    );
    for i in 0..=((high - low) / step).round() as usize {
        let v = low + i as f64 * step;
        let (x, to, y) = (left - 6.0, W - right, y(v));
        out += &format!(
            "<line x1=\"{left}\" x2=\"{to}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#8884\"/>\
             <text x=\"{x}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            y + 4.0,
            format_short(v)
        );
    }
    out += &format!(
        "<text x=\"{left}\" y=\"{0}\">{1}</text><text x=\"{2}\" y=\"{0}\" text-anchor=\"end\">{3} {4}</text>\n",
        H - 18.0,
        format_short(x0),
        W - right,
        escape_html(x_axis),
        format_short(x1)
    );
    let line: Vec<String> = points.iter().map(|p| format!("{:.1},{:.1}", x(p[0]), y(p[1]))).collect();
    out += &format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>\n</svg>\n",
        line.join(" "),
        COLORS[0]
    );
    out
}

/// Draws a dot per position in [-1, 1]², colored by class unless `labels` (indices into `classes`)
/// is empty.
pub fn scatter(positions: &[[f32; 2]], labels: &[usize], classes: &[String]) -> String {
    const SIDE: f64 = 640.0;
    let legend = 20.0 * classes.len().min(MAX_LEGEND) as f64;
    let (width, height) = (if classes.is_empty() { SIDE } else { SIDE + 160.0 }, SIDE.max(legend + 20.0));
    let color = |class: usize| CLASS_COLORS[class % CLASS_COLORS.len()];
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\" role=\"img\">\n"
    );
    for (i, [x, y]) in positions.iter().enumerate() {
        let pixel = |v: f32| (f64::from(v) * 0.96 + 1.0) / 2.0 * SIDE;
        let fill = labels.get(i).map_or(COLORS[0], |class| color(*class));
        out += &format!(
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{fill}\" fill-opacity=\"0.7\"/>\n",
            pixel(*x),
            pixel(-*y)
        );
    }
    for (k, name) in classes.iter().take(MAX_LEGEND).enumerate() {
        let y = 20.0 + 20.0 * k as f64;
        out += &format!(
            "<circle cx=\"{}\" cy=\"{:.1}\" r=\"5\" fill=\"{}\"/><text x=\"{}\" y=\"{y}\">{}</text>\n",
            SIDE + 12.0,
            y - 4.0,
            color(k),
            SIDE + 24.0,
            escape_html(name)
        );
    }
    out + "</svg>\n"
}

/// Maximum number of classes in the legend of a scatter plot.
const MAX_LEGEND: usize = 30;

/// Colors of the classes in a scatter plot, repeated if there are more.
const CLASS_COLORS: [&str; 10] =
    ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#4f5bd5"];

/// Returns distinct names in the order of their first appearance.
fn unique<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut distinct = Vec::new();
    for name in names {
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    distinct
}

/// Returns a round tick distance that divides a range into at most eight parts.
fn tick_step(range: f64) -> f64 {
    if range <= 0.0 || !range.is_finite() {
        return 1.0;
    }
    let power = 10f64.powf((range / 5.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| range / step <= 8.0).unwrap_or(power)
}

/// Formats a number with at most three decimals.
fn format_short(v: f64) -> String {
    let mut text = String::new();
    write!(text, "{:.3}", v).expect("writing to a string does not fail");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Escapes text for HTML and SVG.
pub fn escape_html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chart_marks_every_finite_value_and_escapes_names() {
        let point = |setting: &str, series: &str, value| Point {
            setting: setting.into(),
            series: series.into(),
            value,
            interval: Some([value - 1.0, value + 1.0]),
        };
        let points = [point("a < b", "one", 10.0), point("a < b", "two", 12.0), point("c", "one", f64::NAN)];
        let text = svg("title & more", "%", &points);
        // Two values and two legend entries; NaN has no mark.
        assert_eq!(text.matches("<circle").count(), 4);
        assert!(text.contains("a &lt; b") && text.contains("title &amp; more") && !text.contains("NaN"));
        assert_eq!(tick_step(100.0), 20.0);
    }
}
