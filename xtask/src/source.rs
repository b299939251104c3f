//! Counts lines of Rust: neither blank nor comment, and not tests.

use std::fs;
use std::ops::AddAssign;
use std::path::Path;

use anyhow::{Context, Result};

/// What a folder of sources holds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Lines {
    /// Lines with code.
    pub code: u64,
    /// `unsafe` blocks, functions and implementations.
    pub unsafe_blocks: u64,
}

impl AddAssign for Lines {
    fn add_assign(&mut self, other: Self) {
        self.code += other.code;
        self.unsafe_blocks += other.unsafe_blocks;
    }
}

/// Counts a package: everything under its `src`, without files that hold tests only.
pub fn count(package: &Path) -> Result<Lines> {
    let mut total = Lines::default();
    let mut open = vec![package.join("src")];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            for entry in fs::read_dir(&path)? {
                open.push(entry?.path());
            }
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_test = name == "tests.rs" || path.components().any(|c| c.as_os_str() == "tests");
        if name.ends_with(".rs") && !is_test {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            total += count_text(&text);
        }
    }
    Ok(total)
}

/// Counts one file. A `#[cfg(test)]` item is left out to its closing brace, which rustfmt puts
/// alone on a line and as far to the left as the item began.
fn count_text(text: &str) -> Lines {
    let mut total = Lines::default();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let code = line.trim();
        if code.is_empty() || code.starts_with("//") {
            continue;
        }
        if code == "#[cfg(test)]" {
            let indent = &line[..line.len() - line.trim_start().len()];
            let closing = format!("{indent}}}");
            for line in lines.by_ref() {
                if line == closing
                    || (line.starts_with(indent)
                        && line.ends_with(';')
                        && !line[indent.len()..].starts_with(' '))
                {
                    break;
                }
            }
            continue;
        }
        total.code += 1;
        let code = code.split("//").next().unwrap_or(code);
        for start in ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern "] {
            total.unsafe_blocks += code.matches(start).count() as u64;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_blanks_and_tests_do_not_count() {
        let text = "//! Docs.\n\nuse a;\n\n/// More.\nfn f() {\n    // Why.\n    unsafe { g() } // unsafe {\n}\n\n\
            #[cfg(test)]\nmod tests {\n    fn t() {\n        unsafe { g() }\n    }\n}\n\
            fn after() {}\n#[cfg(test)]\nmod other;\nfn last() {}\n";
        let lines = count_text(text);
        assert_eq!(lines.code, 6);
        assert_eq!(lines.unsafe_blocks, 1);
    }
}
