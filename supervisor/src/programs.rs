//! Where the programs are that the supervisor starts.

use std::env;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Names the only folder to look in.
const OVERRIDE: &str = "ANEMONE_LIBEXEC";

/// Where programs are when the environment does not say it.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// A program is not where it should be.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("cannot find {}; looked in {looked_in}", program.display())]
pub struct NotFound {
    program: PathBuf,
    looked_in: String,
}

/// The folders to look in, first match wins.
#[derive(Debug)]
pub struct Programs {
    folders: Vec<PathBuf>,
}

impl Programs {
    /// `$ANEMONE_LIBEXEC` if it is set; else the folder of this program and `../libexec/anemone`
    /// beside it.
    pub fn new() -> Self {
        if let Some(folder) = env::var_os(OVERRIDE) {
            return Self {
                folders: vec![folder.into()],
            };
        }
        let mut folders = Vec::new();
        if let Ok(program) = env::current_exe()
            && let Some(folder) = program.parent()
        {
            folders.push(folder.to_owned());
            folders.extend(folder.parent().map(|up| up.join("libexec/anemone")));
        }
        Self { folders }
    }

    /// The program of that name, or the one that the configuration puts in its place.
    pub fn find(&self, name: &str, replacement: Option<&Path>) -> Result<PathBuf, NotFound> {
        if let Some(path) = replacement {
            return if path.is_file() {
                Ok(path.to_owned())
            } else {
                Err(NotFound {
                    program: path.to_owned(),
                    looked_in: "the path that `binary` names".to_owned(),
                })
            };
        }
        find(&self.folders, name)
    }

    /// The same for a program that is not ours: it may also be in a folder of `$PATH`.
    pub fn find_or_in_path(
        &self,
        name: &str,
        replacement: Option<&Path>,
    ) -> Result<PathBuf, NotFound> {
        if let Some(path) = replacement {
            return match path.is_file() {
                true => Ok(path.to_owned()),
                false => Err(NotFound {
                    program: path.to_owned(),
                    looked_in: format!("the path that `{name}` names"),
                }),
            };
        }
        let path = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
        let mut folders = self.folders.clone();
        folders.extend(env::split_paths(&path).filter(|folder| folder.is_absolute()));
        find(&folders, name)
    }
}

fn find(folders: &[PathBuf], name: &str) -> Result<PathBuf, NotFound> {
    folders
        .iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| NotFound {
            program: name.into(),
            looked_in: folders
                .iter()
                .map(|folder| folder.display().to_string())
                .collect::<Vec<_>>()
                .join(", "),
        })
}
