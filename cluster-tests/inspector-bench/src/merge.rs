//! What all workloads come to, and the results of several calls as one: a whole run takes longer than a machine can often be kept quiet.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use crate::compare::round;
use crate::stats::geometric_mean;

const WORKLOADS: &str = "workloads";

/// The figures of workloads, by their names, with the means and the highest of their ratios beside them.
pub(crate) fn with_summary(workloads: Map<String, Value>) -> Map<String, Value> {
    let mut all = Map::new();
    for (name, of) in [
        ("", "/ratio/median"),
        ("noise_", "/noise_ratio/median"),
        ("reference_", "/reference_ratio/median"),
        ("inside_", "/inside_programs"),
    ] {
        // The part of the time spent in programs is what a ratio is above one.
        let offset = f64::from(u8::from(name == "inside_"));
        let ratios: Vec<f64> = workloads
            .values()
            .filter_map(|w| Some(w.pointer(of)?.as_f64()? + offset))
            .collect();
        let highest = ratios.iter().copied().fold(f64::NAN, f64::max);
        let mean = geometric_mean(&ratios);
        all.insert(format!("{name}geomean_ratio"), json!(round(mean)));
        all.insert(format!("{name}max_ratio"), json!(round(highest)));
    }
    all.insert(WORKLOADS.into(), Value::Object(workloads));
    all
}

/// Joins the last lines of files. Of a workload or another part that is in several of them the last one counts.
pub(crate) fn merge(files: &[PathBuf]) -> Result<Map<String, Value>> {
    let mut results = Vec::new();
    for file in files {
        let what = || format!("{}", file.display());
        let text = fs::read_to_string(file).with_context(what)?;
        let last = text.lines().last().unwrap_or_default();
        match serde_json::from_str(last).with_context(what)? {
            Value::Object(result) => results.push(result),
            other => bail!("{}: not a result: {other}", file.display()),
        }
    }
    Ok(joined(results))
}

fn joined(results: Vec<Map<String, Value>>) -> Map<String, Value> {
    let (mut all, mut workloads, mut seconds) = (Map::new(), Map::new(), 0);
    for mut result in results {
        if let Some(Value::Object(more)) = result.remove(WORKLOADS) {
            workloads.extend(more);
        }
        seconds += result.get("seconds").and_then(Value::as_u64).unwrap_or(0);
        let quick = all.get("quick") == Some(&json!(true));
        all.extend(result);
        if quick {
            all.insert("quick".into(), json!(true));
        }
    }
    if !workloads.is_empty() {
        all.extend(with_summary(workloads));
    }
    all.insert("seconds".into(), json!(seconds));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &str, ratio: f64, other: &str) -> Map<String, Value> {
        let figures = json!({
            "ratio": {"median": ratio}, "noise_ratio": {"median": 1.0},
            "reference_ratio": {"median": 2.0}, "inside_programs": 0.01,
        });
        let mut all = with_summary(Map::from_iter([(name.to_owned(), figures)]));
        all.insert(other.to_owned(), json!(5));
        all.insert("seconds".to_owned(), json!(10));
        all
    }

    #[test]
    fn means_are_made_anew() {
        let all = joined(vec![part("a", 2.0, "x"), part("b", 0.5, "y")]);
        assert_eq!(all["geomean_ratio"], json!(1.0));
        assert_eq!(all["max_ratio"], json!(2.0));
        assert_eq!(all["inside_max_ratio"], json!(1.01));
        assert_eq!((&all["x"], &all["y"]), (&json!(5), &json!(5)));
        assert_eq!(all["seconds"], json!(20));
        assert_eq!(all[WORKLOADS].as_object().map(Map::len), Some(2));
    }
}
