//! Tables for people and the same for programs.

use std::fmt::Write as _;
use std::fs;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::sh;

/// A table: its title, the names of its columns, and rows of as many values.
#[derive(Debug, Default)]
pub struct Table {
    title: String,
    columns: Vec<String>,
    rows: Vec<Vec<Value>>,
}

impl Table {
    /// An empty table.
    pub fn new(title: &str, columns: &[&str]) -> Self {
        Self {
            title: title.to_string(),
            columns: columns.iter().map(ToString::to_string).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row. Missing values at its end stay empty.
    pub fn row(&mut self, values: Vec<Value>) {
        self.rows.push(values);
    }

    /// Aligned columns: text to the left, numbers to the right.
    pub fn text(&self) -> String {
        let cells: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| (0..self.columns.len()).map(|i| cell(row.get(i))).collect())
            .collect();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| {
                let values = cells.iter().map(|row| row[i].chars().count());
                values
                    .chain([self.columns[i].chars().count()])
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let right: Vec<bool> = (0..self.columns.len())
            .map(|i| {
                self.rows
                    .iter()
                    .any(|row| row.get(i).is_some_and(Value::is_number))
            })
            .collect();
        let mut out = format!("{}\n", self.title);
        let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
        for row in [&self.columns, &rule].into_iter().chain(&cells) {
            let mut line = String::new();
            for (i, value) in row.iter().enumerate() {
                let width = widths[i];
                // Writing to a string cannot fail.
                let _ = match right[i] {
                    true => write!(line, "{value:>width$}  "),
                    false => write!(line, "{value:<width$}  "),
                };
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let pairs = self.columns.iter().cloned().zip(row.iter().cloned());
            Value::Object(pairs.collect::<Map<_, _>>())
        });
        serde_json::json!({ "title": self.title, "rows": rows.collect::<Vec<_>>() })
    }
}

/// Prints tables, and keeps them as text and JSON under `build/bench`.
pub fn publish(name: &str, tables: &[Table]) -> Result<()> {
    let folder = sh::build_dir("bench");
    fs::create_dir_all(&folder)?;
    let text = tables
        .iter()
        .map(Table::text)
        .collect::<Vec<_>>()
        .join("\n");
    print!("{text}");
    fs::write(folder.join(format!("{name}.txt")), &text)?;
    let json = Value::Array(tables.iter().map(Table::json).collect());
    fs::write(
        folder.join(format!("{name}.json")),
        serde_json::to_string_pretty(&json)? + "\n",
    )?;
    sh::progress(format_args!("kept as build/bench/{name}.txt and .json"));
    Ok(())
}

/// A number with two decimals.
pub fn decimal(value: f64) -> Value {
    Value::from((value * 100.0).round() / 100.0)
}

fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(n)) if n.is_f64() => format!("{:.2}", n.as_f64().unwrap_or(0.0)),
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new("Sizes", &["name", "bytes"]);
        table.row(vec!["a".into(), 5.into()]);
        table.row(vec!["longer".into(), 12345.into()]);
        assert_eq!(
            table.text(),
            "Sizes\nname    bytes\n------  -----\na           5\nlonger  12345\n"
        );
    }
}
