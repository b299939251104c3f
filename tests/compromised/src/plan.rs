//! What the test tells a process, by a file beside its program. The process maps the file before
//! it enters its jail, so it is no descriptor of it afterwards.
//!
//! ```text
//! 1                          number of the round, which the test writes last
//! canary /folder/canary
//! socket name-in-the-abstract-namespace
//! process 1234
//! ```

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use crate::mapping::Mapping;

/// Name of the file.
const FILE: &str = "compromised.plan";
/// Its length, padded with spaces.
const LENGTH: usize = 4096;
/// Length of its first line.
const ROUND: usize = 8;

/// What to attack.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Absolute path of a file that no process may reach. Beside it lies a folder `sub`, and a file
    /// `planted` is to be made.
    pub canary: CString,
    /// Name of a listening socket in the abstract namespace.
    pub socket: String,
    /// Processes of the VM.
    pub processes: Vec<i32>,
}

impl Plan {
    /// Writes the plan for a round of the programs in `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path, round: u32) -> std::io::Result<()> {
        let mut text = format!(
            "canary {}\nsocket {}\n",
            self.canary.to_string_lossy(),
            self.socket
        );
        for process in &self.processes {
            text += &format!("process {process}\n");
        }
        let body = LENGTH - ROUND;
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(folder.join(FILE))?;
        file.write_all_at(format!("{text:<body$}").as_bytes(), ROUND as u64)?;
        file.write_all_at(format!("{round:<7}\n").as_bytes(), 0)
    }

    fn parse(text: &str) -> Self {
        let mut plan = Self::default();
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("canary", path)) => plan.canary = CString::new(path).unwrap_or_default(),
                Some(("socket", name)) => name.clone_into(&mut plan.socket),
                Some(("process", pid)) => plan.processes.extend(pid.parse::<i32>().ok()),
                _ => {}
            }
        }
        plan
    }

    /// The path of the file that is to be planted.
    pub fn planted(&self) -> CString {
        let path = self.canary.to_string_lossy();
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        CString::new(format!("{folder}/planted")).unwrap_or_default()
    }
}

/// The file, once it is mapped.
static MAPPED: OnceLock<Option<Mapping>> = OnceLock::new();

/// Maps the plan: called before the jail is entered. Without a plan nothing is attempted.
pub fn prepare() {
    MAPPED.get_or_init(|| {
        let program = fs::read_link("/proc/self/exe").ok()?;
        let file = fs::File::open(program.with_file_name(FILE)).ok()?;
        Mapping::of_file(&file, LENGTH)
    });
}

/// The round and the plan as they are now.
pub fn now() -> Option<(u32, Plan)> {
    let bytes = MAPPED.get()?.as_ref()?.copy();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (round, body) = text.split_at_checked(ROUND)?;
    Some((round.trim().parse().ok()?, Plan::parse(body)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_as_written() {
        let folder = std::env::temp_dir().join(format!("anemone-plan-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let plan = Plan {
            canary: c"/folder with a space/canary".into(),
            socket: "name".into(),
            processes: vec![1, 23],
        };
        plan.write(&folder, 3).unwrap();
        let text = fs::read_to_string(folder.join(FILE)).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(text.len(), LENGTH);
        assert_eq!(text[..ROUND].trim(), "3");
        assert_eq!(Plan::parse(&text[ROUND..]), plan);
        assert_eq!(plan.planted().to_str(), Ok("/folder with a space/planted"));
    }
}
