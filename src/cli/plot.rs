//! Measurements as pictures.

use std::io::Write;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use sidereal::{Error, Result};

use super::output::OutputFile;
use super::tally::{LatencyReport, LoadReport};

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Latency against load, on a logarithmic scale.
pub fn plot(path: &Path, loads: &[LoadReport]) -> Result<()> {
    write(path, |area| {
        let most_load =
            loads.iter().filter_map(|load| load.offered_per_second).fold(1.0, f64::max) * 1.05;
        let latencies = || loads.iter().filter_map(|load| load.latency_ms);
        let most = latencies().map(|latency| latency.p99).fold(1.0, f64::max) * 1.3;
        let least = latencies().map(|latency| latency.p50).fold(most, f64::min).max(1e-3) / 1.3;
        let mut chart = ChartBuilder::on(area)
            .margin(16)
            .caption("Latency against load", ("sans-serif", 20))
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..most_load, (least..most).log_scale())?;
        chart
            .configure_mesh()
            .x_desc("requests a second that arrive")
            .y_desc("milliseconds")
            .draw()?;
        type Quantile = fn(&LatencyReport) -> f64;
        let quantiles: [(&str, RGBColor, Quantile); 3] = [
            ("p50", BLUE, |latency| latency.p50),
            ("p95", GREEN, |latency| latency.p95),
            ("p99", RED, |latency| latency.p99),
        ];
        for (name, color, quantile) in quantiles {
            let points = loads.iter().filter_map(|load| {
                Some((load.offered_per_second?, quantile(load.latency_ms.as_ref()?).max(least)))
            });
            chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?.label(name).legend(
                move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)),
            );
        }
        chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
        Ok(())
    })
}

/// Values by beam width.
pub struct Curve {
    pub name: String,
    pub points: Vec<(usize, f64)>,
}

/// Recall against beam width, widths on a logarithmic scale.
pub fn plot_recall(path: &Path, curves: &[Curve]) -> Result<()> {
    write(path, |area| {
        let points = || curves.iter().flat_map(|curve| &curve.points);
        let widest = points().map(|point| point.0).max().unwrap_or(1) as f64 * 1.1;
        let narrowest = points().map(|point| point.0).min().unwrap_or(1) as f64 / 1.1;
        let most = points().map(|point| point.1).fold(1e-3, f64::max) * 1.1;
        let mut chart = ChartBuilder::on(area)
            .margin(16)
            .caption("Recall against beam width", ("sans-serif", 20))
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d((narrowest..widest).log_scale(), 0.0..most)?;
        chart.configure_mesh().x_desc("beams").y_desc("recall, by item").draw()?;
        for (at, Curve { name, points }) in curves.iter().enumerate() {
            let color = Palette99::pick(at).to_rgba();
            let points = points.iter().map(|&(width, recall)| (width as f64, recall));
            let line = LineSeries::new(points, color.stroke_width(2)).point_size(3);
            chart.draw_series(line)?.label(name).legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2))
            });
        }
        chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
        Ok(())
    })
}

/// Draws a picture and writes it as a whole.
fn write(path: &Path, draw: impl Fn(&Area<'_>) -> Drawn) -> Result<()> {
    let mut svg = String::new();
    let picture = |svg: &mut String| -> Drawn {
        let area = SVGBackend::with_string(svg, (800, 500)).into_drawing_area();
        area.fill(&WHITE)?;
        draw(&area)?;
        Ok(area.present()?)
    };
    let failed = |reason: String| Error::OutputFile { path: path.to_path_buf(), reason };
    picture(&mut svg).map_err(|error| failed(error.to_string()))?;
    let write = || {
        let mut output = OutputFile::create(path)?;
        output.write_all(svg.as_bytes())?;
        output.finish()
    };
    write().map_err(|error| Error::io(path, error))
}
