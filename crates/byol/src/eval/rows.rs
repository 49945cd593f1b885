//! What an evaluation yields: named values, each with its interval, as a table and as a file.

use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use crate::{files, random};

/// Draws of a bootstrap.
const DRAWS: usize = 1000;

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What it is: `kNN accuracy, k = 20`.
    pub name: String,
    /// The value; shares in [0, 1].
    pub value: f64,
    /// 95 % interval by bootstrap over the test images; none where the figure is of no sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// Whether the value is a share, to be shown in percent.
    pub share: bool,
}

impl Row {
    /// A share with its interval: `statistic` of the test images at these positions, of `n` in all.
    pub fn share(name: impl Into<String>, n: usize, seed: u64, statistic: impl Fn(&[usize]) -> f64 + Sync) -> Row {
        Row { share: true, ..Row::sampled(name, n, seed, statistic) }
    }

    /// A figure that is not a share, with its interval.
    pub fn sampled(name: impl Into<String>, n: usize, seed: u64, statistic: impl Fn(&[usize]) -> f64 + Sync) -> Row {
        let all: Vec<usize> = (0..n).collect();
        let value = statistic(&all);
        Row { name: name.into(), value, interval: Some(bootstrap(n, seed, statistic)), share: false }
    }

    /// Shares that are figures of the same sample, with their intervals, of one bootstrap.
    pub fn shares(
        names: Vec<String>,
        n: usize,
        seed: u64,
        statistics: impl Fn(&[usize]) -> Vec<f64> + Sync,
    ) -> Vec<Row> {
        let values = statistics(&(0..n).collect::<Vec<_>>());
        assert_eq!(names.len(), values.len(), "each figure has a name");
        let intervals = bootstrap_all(n, seed, values.len(), statistics);
        let row = |((name, value), interval)| Row { name, value, interval: Some(interval), share: true };
        names.into_iter().zip(values).zip(intervals).map(row).collect()
    }

    /// A figure without an interval.
    pub fn plain(name: impl Into<String>, value: f64) -> Row {
        Row { name: name.into(), value, interval: None, share: false }
    }

    /// The accuracy of predictions.
    pub fn accuracy(name: impl Into<String>, seed: u64, predicted: &[usize], labels: &[usize]) -> Row {
        let right: Vec<bool> = predicted.iter().zip(labels).map(|(p, l)| p == l).collect();
        Row::rate(name, seed, &right)
    }

    /// How often something is so.
    pub fn rate(name: impl Into<String>, seed: u64, hits: &[bool]) -> Row {
        let rate = |at: &[usize]| at.iter().filter(|i| hits[**i]).count() as f64 / at.len().max(1) as f64;
        Row::share(name, hits.len(), seed, rate)
    }

    /// The value as people read it: shares in percent.
    pub fn shown(&self) -> String {
        show(self.value, self.share)
    }

    /// The interval as people read it; empty where there is none.
    pub fn shown_interval(&self) -> String {
        let Some([low, high]) = self.interval else { return String::new() };
        format!("{} to {}", show(low, self.share), show(high, self.share))
    }
}

fn show(value: f64, share: bool) -> String {
    if share { format!("{:.1} %", 100.0 * value) } else { format!("{value:.4}") }
}

/// The 2.5th and 97.5th percentile of a statistic over samples of `n` positions with replacement (Efron 1979). Samples that have no such
/// statistic, for which it is no number, do not count.
pub fn bootstrap(n: usize, seed: u64, statistic: impl Fn(&[usize]) -> f64 + Sync) -> [f64; 2] {
    bootstrap_all(n, seed, 1, |at| vec![statistic(at)])[0]
}

/// The same for `figures` statistics of the same samples.
fn bootstrap_all(
    n: usize,
    seed: u64,
    figures: usize,
    statistics: impl Fn(&[usize]) -> Vec<f64> + Sync,
) -> Vec<[f64; 2]> {
    let draw = |d: usize| {
        let mut rng = random::stream(&[random::Domain::Bootstrap as u64, seed, d as u64]);
        let at: Vec<usize> = (0..n).map(|_| random::below(&mut rng, n)).collect();
        statistics(&at)
    };
    let draws: Vec<Vec<f64>> = (0..DRAWS).into_par_iter().map(draw).collect();
    let interval = |figure: usize| {
        let mut values: Vec<f64> = draws.iter().map(|draw| draw[figure]).filter(|v| !v.is_nan()).collect();
        values.sort_by(f64::total_cmp);
        match values.len().checked_sub(1) {
            Some(last) => [values[values.len() / 40], values[last - values.len() / 40]],
            None => [f64::NAN; 2],
        }
    };
    (0..figures).map(interval).collect()
}

/// All figures of an evaluation with what they rest on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Table {
    /// The evaluation: `knn`, `linear`.
    pub evaluation: String,
    /// The encoder file.
    pub encoder: String,
    /// The data.
    pub data: String,
    /// Seed of all random draws.
    pub seed: u64,
    /// What else was set: with data, encoder and seed it says which table may take the place of which.
    pub settings: serde_json::Value,
    /// What was found beside the figures: the settings that were chosen, verdicts.
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    pub found: serde_json::Value,
    /// The figures.
    pub rows: Vec<Row>,
}

impl Table {
    /// Whether a file is not there, or of the same data and settings.
    fn may_replace(&self, path: &Path) -> bool {
        let Ok(text) = std::fs::read_to_string(path) else { return !path.exists() };
        let Ok(found) = serde_json::from_str::<serde_json::Value>(&text) else { return true };
        let same = |key: &str, own: serde_json::Value| found.get(key) == Some(&own);
        same("data", self.data.clone().into())
            && same("encoder", self.encoder.clone().into())
            && same("seed", self.seed.into())
            && same("settings", self.settings.clone())
    }

    /// The value of that name.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.rows.iter().find(|row| row.name == name).map(|row| row.value)
    }

    /// Writes the table into a run, as `eval/EVALUATION.json`; beside one of other data or settings, as `eval/EVALUATION-2.json`, and so on.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, run: &Path) -> std::io::Result<std::path::PathBuf> {
        let folder = run.join("eval");
        std::fs::create_dir_all(&folder)?;
        let names = (1..).map(|i| match i {
            1 => format!("{}.json", self.evaluation),
            i => format!("{}-{i}.json", self.evaluation),
        });
        let path = names.map(|name| folder.join(name)).find(|path| self.may_replace(path)).expect("numbers do not end");
        let text = serde_json::to_string_pretty(self).expect("a table is plain data") + "\n";
        files::write_whole(&path, text.as_bytes())?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_about_the_value_and_narrows_with_the_sample() {
        let of = |n: usize| {
            let hits: Vec<bool> = (0..n).map(|i| i % 4 == 0).collect();
            let row = Row::rate("rate", 1, &hits);
            let [low, high] = row.interval.unwrap();
            assert!(low < row.value && row.value < high && (row.value - 0.25).abs() < 1e-9);
            // The normal approximation is good here.
            let half = 1.96 * (0.25 * 0.75 / n as f64).sqrt();
            assert!(((high - low) / (2.0 * half) - 1.0).abs() < 0.2, "{low} to {high}, half a width is {half}");
            high - low
        };
        assert!(of(400) > 2.0 * of(4000));
    }

    #[test]
    fn a_table_replaces_its_like_alone() {
        let run = tempfile::tempdir().unwrap();
        let table = |data: &str, value: f64| Table {
            evaluation: "knn".into(),
            encoder: "e".into(),
            data: data.into(),
            seed: 0,
            settings: serde_json::json!({ "k": 20 }),
            found: serde_json::json!({ "chosen": value }),
            rows: vec![Row::plain("x", value)],
        };
        let save = |data: &str, value: f64| {
            let path = table(data, value).save(run.path()).unwrap();
            path.file_name().unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!([save("a", 1.0), save("b", 2.0), save("a", 3.0)], ["knn.json", "knn-2.json", "knn.json"]);
        assert!(std::fs::read_to_string(run.path().join("eval/knn.json")).unwrap().contains("3.0"));
    }

    #[test]
    fn a_row_shows_shares_in_percent() {
        let row = Row { name: "x".into(), value: 0.1234, interval: Some([0.1, 0.2]), share: true };
        assert_eq!((row.shown().as_str(), row.shown_interval().as_str()), ("12.3 %", "10.0 % to 20.0 %"));
        assert_eq!(Row::plain("y", 1.5).shown(), "1.5000");
    }
}
