//! The throughput of both guests as a picture.

use crate::outcome::{Measured, Outcome, Short};
use std::fmt::Write;

const WIDTH: f64 = 860.0;
/// Where the bars begin, and how long they can be.
const LEFT: f64 = 180.0;
const LENGTH: f64 = 560.0;
const TOP: f64 = 70.0;
const BAR: f64 = 9.0;
const GROUP: f64 = 26.0;

/// Bars for each case: 10^6 bytes in a second, on a logarithmic scale. Colours are such that they can be read on light
/// and on dark; where the viewer says which, text follows.
pub fn draw(outcome: &Outcome) -> String {
    let rates = || outcome.cases.iter().flat_map(|case| [case.protected.mb_per_s, case.unprotected.mb_per_s]);
    let decade = |rate: f64| rate.max(1e-6).log10();
    let low = rates().map(decade).fold(f64::MAX, f64::min).floor();
    let high = rates().map(decade).fold(low + 1.0, f64::max).ceil();
    let x = |rate: f64| LEFT + LENGTH * (decade(rate) - low) / (high - low);
    let bottom = TOP + GROUP * outcome.cases.len() as f64;

    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {}" font-family="sans-serif" font-size="12">
<title>Throughput with bounce buffers and without, isolation {}</title>
<style>
text {{ fill: #57606a }} .p {{ fill: #d4730c }} .u {{ fill: #2f81c7 }} .grid {{ stroke: #8b949e; stroke-opacity: 0.35 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #a8b1bb }} }}
</style>
<text x="{LEFT}" y="20" font-size="15">Throughput in MB/s, isolation {}: more is better</text>
<rect class="p" x="{LEFT}" y="32" width="12" height="9"/><text x="{}" y="41">protected: payloads bounce</text>
<rect class="u" x="{}" y="32" width="12" height="9"/><text x="{}" y="41">unprotected: buffers are shared</text>
"##,
        bottom + 20.0,
        outcome.isolation,
        outcome.isolation,
        LEFT + 18.0,
        LEFT + 220.0,
        LEFT + 238.0,
    );
    // Writing to a string does not fail.
    for power in low as i32..=high as i32 {
        let (rate, at) = (10f64.powi(power), x(10f64.powi(power)));
        let _ = writeln!(svg, r#"<line class="grid" x1="{at:.1}" y1="{TOP}" x2="{at:.1}" y2="{bottom:.1}"/>"#);
        let _ = writeln!(svg, r#"<text x="{at:.1}" y="{}" text-anchor="middle">{rate}</text>"#, TOP - 8.0);
    }
    for (index, Measured { name, protected, unprotected, slowdown, .. }) in outcome.cases.iter().enumerate() {
        let y = TOP + GROUP * index as f64 + 4.0;
        let middle = y + BAR + 4.0;
        let _ = writeln!(svg, r#"<text x="{}" y="{middle:.1}" text-anchor="end">{name}</text>"#, LEFT - 8.0);
        for (class, side, y) in [("p", protected, y), ("u", unprotected, y + BAR)] {
            let (rate, end) = (side.mb_per_s, x(side.mb_per_s).max(LEFT + 1.0));
            let width = end - LEFT;
            let _ = write!(svg, r#"<rect class="{class}" x="{LEFT}" y="{y:.1}" width="{width:.1}" height="{BAR}">"#);
            let _ = writeln!(svg, "<title>{rate:.3} MB/s</title></rect>");
        }
        let end = x(protected.mb_per_s.max(unprotected.mb_per_s)) + 8.0;
        let _ = writeln!(svg, r#"<text x="{end:.1}" y="{middle:.1}">{} times as long</text>"#, Short(*slowdown));
    }
    svg.push_str("</svg>\n");
    svg
}
