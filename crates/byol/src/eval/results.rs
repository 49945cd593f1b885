//! Results of an evaluation: named values with confidence intervals, stored as JSON in the run.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{atomic_write, random};

/// Bootstrap samples per interval.
const BOOTSTRAP_SAMPLES: usize = 1000;

/// Metric with its confidence interval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResultRow {
    /// Metric name, e.g. `kNN accuracy, k = 20`.
    pub name: String,
    /// Value; fractions are in [0, 1].
    pub value: f64,
    /// 95 % bootstrap interval over the test images; `None` for a metric that is not an average
    /// over them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// True for a fraction, which is shown in percent.
    #[serde(rename = "share")]
    pub is_fraction: bool,
}

impl ResultRow {
    /// Builds a fraction with its interval. `statistic` computes it from indices into the `n` test
    /// images.
    pub fn fraction(
        name: impl Into<String>,
        n: usize,
        seed: u64,
        statistic: impl Fn(&[usize]) -> f64 + Sync,
    ) -> ResultRow {
        ResultRow { is_fraction: true, ..ResultRow::with_interval(name, n, seed, statistic) }
    }

    /// Builds a value that is not a fraction, with its interval. `statistic` computes it from
    /// indices into the `n` test images.
    pub fn with_interval(
        name: impl Into<String>,
        n: usize,
        seed: u64,
        statistic: impl Fn(&[usize]) -> f64 + Sync,
    ) -> ResultRow {
        let all: Vec<usize> = (0..n).collect();
        let value = statistic(&all);
        ResultRow { name: name.into(), value, interval: Some(bootstrap(n, seed, statistic)), is_fraction: false }
    }

    /// Builds several fractions whose intervals come from the same bootstrap samples.
    ///
    /// # Panics
    /// If `statistics` does not return one value per name.
    pub fn fractions(
        names: Vec<String>,
        n: usize,
        seed: u64,
        statistics: impl Fn(&[usize]) -> Vec<f64> + Sync,
    ) -> Vec<ResultRow> {
        let values = statistics(&(0..n).collect::<Vec<_>>());
        assert_eq!(names.len(), values.len(), "one name per statistic");
        let intervals = bootstrap_all(n, seed, values.len(), statistics);
        let row = |((name, value), interval)| ResultRow { name, value, interval: Some(interval), is_fraction: true };
        names.into_iter().zip(values).zip(intervals).map(row).collect()
    }

    /// Builds a value without an interval.
    pub fn without_interval(name: impl Into<String>, value: f64) -> ResultRow {
        ResultRow { name: name.into(), value, interval: None, is_fraction: false }
    }

    /// Accuracy of `predicted` against `labels`.
    pub fn accuracy(name: impl Into<String>, seed: u64, predicted: &[usize], labels: &[usize]) -> ResultRow {
        let correct: Vec<bool> = predicted.iter().zip(labels).map(|(p, l)| p == l).collect();
        ResultRow::hit_rate(name, seed, &correct)
    }

    /// Fraction of `hits` that are true.
    pub fn hit_rate(name: impl Into<String>, seed: u64, hits: &[bool]) -> ResultRow {
        let rate =
            |indices: &[usize]| indices.iter().filter(|i| hits[**i]).count() as f64 / indices.len().max(1) as f64;
        ResultRow::fraction(name, hits.len(), seed, rate)
    }

    /// Value for display, in percent for a fraction.
    pub fn formatted_value(&self) -> String {
        format_value(self.value, self.is_fraction)
    }

    /// Interval for display; empty if there is none.
    pub fn formatted_interval(&self) -> String {
        let Some([low, high]) = self.interval else { return String::new() };
        format!("{} to {}", format_value(low, self.is_fraction), format_value(high, self.is_fraction))
    }
}

fn format_value(value: f64, is_fraction: bool) -> String {
    if is_fraction { format!("{:.1} %", 100.0 * value) } else { format!("{value:.4}") }
}

/// Percentile bootstrap (Efron 1979): the 2.5th and 97.5th percentile of `statistic` over samples
/// of `n` indices drawn with replacement. Samples for which the statistic is NaN are dropped.
pub fn bootstrap(n: usize, seed: u64, statistic: impl Fn(&[usize]) -> f64 + Sync) -> [f64; 2] {
    bootstrap_all(n, seed, 1, |indices| vec![statistic(indices)])[0]
}

/// [`bootstrap`] of `count` statistics on the same samples.
fn bootstrap_all(n: usize, seed: u64, count: usize, statistics: impl Fn(&[usize]) -> Vec<f64> + Sync) -> Vec<[f64; 2]> {
    let evaluate_sample = |sample: usize| {
        let mut rng = random::stream(&[random::Domain::Bootstrap as u64, seed, sample as u64]);
        let indices: Vec<usize> = (0..n).map(|_| random::below(&mut rng, n)).collect();
        statistics(&indices)
    };
    let samples: Vec<Vec<f64>> = (0..BOOTSTRAP_SAMPLES).into_par_iter().map(evaluate_sample).collect();
    let interval = |k: usize| {
        let mut values: Vec<f64> = samples.iter().map(|sample| sample[k]).filter(|v| !v.is_nan()).collect();
        values.sort_by(f64::total_cmp);
        match values.len().checked_sub(1) {
            Some(last) => [values[values.len() / 40], values[last - values.len() / 40]],
            None => [f64::NAN; 2],
        }
    };
    (0..count).map(interval).collect()
}

/// Results of an evaluation, with everything needed to reproduce it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResultTable {
    /// Evaluation name: `knn`, `linear`, …
    pub evaluation: String,
    /// Encoder file.
    pub encoder: String,
    /// Data set.
    pub data: String,
    /// Seed of all random draws.
    pub seed: u64,
    /// Other settings. Together with the data, encoder and seed they identify the evaluation: a
    /// newer table with the same identity replaces the older one.
    pub settings: serde_json::Value,
    /// Findings besides the metrics: selected hyperparameters, verdicts.
    #[serde(default, rename = "found", skip_serializing_if = "serde_json::Value::is_null")]
    pub details: serde_json::Value,
    /// Metrics.
    pub rows: Vec<ResultRow>,
}

/// Results stored in the folder of a run, with their files, by file name. Unreadable files are left
/// out.
pub fn stored(run: &Path) -> Vec<(PathBuf, ResultTable)> {
    let Ok(folder) = std::fs::read_dir(run.join("eval")) else { return Vec::new() };
    let mut files: Vec<PathBuf> = folder.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.retain(|file| file.extension().is_some_and(|e| e == "json"));
    let read = |file: &Path| serde_json::from_slice(&std::fs::read(file).ok()?).ok();
    files.into_iter().filter_map(|file| read(&file).map(|table| (file, table))).collect()
}

impl ResultTable {
    /// Returns true if this table may be written to `path`: there is no file, an unreadable one, or
    /// one of the same evaluation.
    fn may_replace(&self, path: &Path) -> bool {
        let Ok(text) = std::fs::read_to_string(path) else { return !path.exists() };
        let Ok(existing) = serde_json::from_str::<serde_json::Value>(&text) else { return true };
        let matches = |key: &str, own: serde_json::Value| existing.get(key) == Some(&own);
        matches("data", self.data.clone().into())
            && matches("encoder", self.encoder.clone().into())
            && matches("seed", self.seed.into())
            && matches("settings", self.settings.clone())
    }

    /// Value of the row called `name`.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.rows.iter().find(|row| row.name == name).map(|row| row.value)
    }

    /// Writes the table to `eval/EVALUATION.json` in the run's folder. If that file belongs to
    /// other data or settings, writes `eval/EVALUATION-2.json`, and so on. Returns the path.
    ///
    /// # Errors
    /// I/O errors.
    pub fn save(&self, run: &Path) -> std::io::Result<PathBuf> {
        let folder = run.join("eval");
        std::fs::create_dir_all(&folder)?;
        let names = (1..).map(|i| match i {
            1 => format!("{}.json", self.evaluation),
            i => format!("{}-{i}.json", self.evaluation),
        });
        let path =
            names.map(|name| folder.join(name)).find(|path| self.may_replace(path)).expect("an unused file name");
        let text = serde_json::to_string_pretty(self).expect("a table serializes") + "\n";
        atomic_write::write_whole(&path, text.as_bytes())?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_contains_the_value_and_narrows_with_sample_size() {
        let width = |n: usize| {
            let hits: Vec<bool> = (0..n).map(|i| i % 4 == 0).collect();
            let row = ResultRow::hit_rate("rate", 1, &hits);
            let [low, high] = row.interval.unwrap();
            assert!(low < row.value && row.value < high && (row.value - 0.25).abs() < 1e-9);
            // The normal approximation is good here.
            let half_width = 1.96 * (0.25 * 0.75 / n as f64).sqrt();
            assert!(((high - low) / (2.0 * half_width) - 1.0).abs() < 0.2, "{low} to {high}, expected ± {half_width}");
            high - low
        };
        assert!(width(400) > 2.0 * width(4000));
    }

    #[test]
    fn table_replaces_only_the_same_evaluation() {
        let run = tempfile::tempdir().unwrap();
        let table = |data: &str, value: f64| ResultTable {
            evaluation: "knn".into(),
            encoder: "e".into(),
            data: data.into(),
            seed: 0,
            settings: serde_json::json!({ "k": 20 }),
            details: serde_json::json!({ "chosen": value }),
            rows: vec![ResultRow::without_interval("x", value)],
        };
        let save = |data: &str, value: f64| {
            let path = table(data, value).save(run.path()).unwrap();
            path.file_name().unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!([save("a", 1.0), save("b", 2.0), save("a", 3.0)], ["knn.json", "knn-2.json", "knn.json"]);
        let values: Vec<f64> = stored(run.path()).iter().map(|(_, table)| table.value("x").unwrap()).collect();
        assert_eq!(values, [2.0, 3.0], "knn-2.json, knn.json");
    }

    #[test]
    fn fractions_are_shown_in_percent() {
        let row = ResultRow { name: "x".into(), value: 0.1234, interval: Some([0.1, 0.2]), is_fraction: true };
        assert_eq!((row.formatted_value().as_str(), row.formatted_interval().as_str()), ("12.3 %", "10.0 % to 20.0 %"));
        assert_eq!(ResultRow::without_interval("y", 1.5).formatted_value(), "1.5000");
    }
}
