//! What was measured, as a table and as JSON.

use std::{fmt, io, path::Path};

use serde_json::json;

const RECALL_MIN: f64 = 0.95;
const RATIO_MAX: f64 = 1.2;

/// What was measured.
pub(super) struct Report {
    pub(super) vectors: usize,
    pub(super) dimensions: usize,
    pub(super) index_seconds: f64,
    pub(super) index_mib: f64,
    pub(super) rows: Vec<Row>,
    /// MiB, and the median in ms.
    pub(super) full_precision: Option<(f64, f64)>,
}

/// One filter.
pub(super) struct Row {
    map: Option<String>,
    matching: usize,
    recall: f64,
    bare_ms: f64,
    hub_ms: f64,
}

pub(super) fn median(of: &mut [f64]) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

impl Row {
    pub(super) fn new(
        map: Option<&str>,
        matching: usize,
        recall: f64,
        mut bare_ms: Vec<f64>,
        mut hub_ms: Vec<f64>,
    ) -> Self {
        Self {
            map: map.map(str::to_owned),
            matching,
            recall,
            bare_ms: median(&mut bare_ms),
            hub_ms: median(&mut hub_ms),
        }
    }

    fn ratio(&self) -> f64 {
        self.hub_ms / self.bare_ms
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let map = self.map.as_deref().unwrap_or("all maps");
        write!(
            f,
            "{map:>10} {:>8} {:>9.3} {:>8.2} {:>8.2} {:>6.2}",
            self.matching,
            self.recall,
            self.bare_ms,
            self.hub_ms,
            self.ratio()
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} vectors of {} dimensions, index {:.0} MiB made in {:.0} s",
            self.vectors, self.dimensions, self.index_mib, self.index_seconds
        )?;
        writeln!(f, "    filter  vectors recall@10   SQL ms   hub ms  ratio")?;
        for row in &self.rows {
            writeln!(f, "{row}")?;
        }
        if let Some((mib, ms)) = self.full_precision {
            writeln!(f, "in full precision: index {mib:.0} MiB, SQL {ms:.2} ms")?;
        }
        Ok(())
    }
}

impl Report {
    /// What is not as it has to be.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for row in &self.rows {
            if row.recall < RECALL_MIN {
                failures.push(format!("recall@10 is {:.3}, less than {RECALL_MIN}:{row}", row.recall));
            }
            if row.ratio() > RATIO_MAX {
                failures.push(format!(
                    "the hub takes {:.2} times the SQL, more than {RATIO_MAX}:{row}",
                    row.ratio()
                ));
            }
        }
        failures
    }

    pub(super) fn write(&self, file: &Path) -> io::Result<()> {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "map": row.map,
                    "vectors": row.matching,
                    "recall_at_10": row.recall,
                    "sql_ms": row.bare_ms,
                    "hub_ms": row.hub_ms,
                    "ratio": row.ratio(),
                })
            })
            .collect();
        let figures = json!({
            "vectors": self.vectors,
            "dimensions": self.dimensions,
            "index_seconds": self.index_seconds,
            "index_mib": self.index_mib,
            "rows": rows,
            "full_precision": self.full_precision.map(|(mib, ms)| json!({"index_mib": mib, "sql_ms": ms})),
        });
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(file, serde_json::to_string_pretty(&figures).expect("plain data"))
    }
}
