//! Kernel modules and what they need. The package brings no `modules.dep` (that is made when it
//! is installed), so the dependencies are read from the modules themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The modules of one kernel, by name with underscores.
pub struct Modules {
    paths: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Finds all modules under `lib/modules/RELEASE`.
    pub fn scan(folder: &Path) -> Result<Self> {
        let mut paths = BTreeMap::new();
        let mut open = vec![folder.to_path_buf()];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
                let path = entry?.path();
                if path.is_dir() {
                    open.push(path);
                } else if let Some(name) = module_name(&path) {
                    paths.insert(name, path);
                }
            }
        }
        let list = folder.join("modules.builtin");
        let list = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
        let builtin = list.lines().filter_map(|l| module_name(Path::new(l)));
        Ok(Self {
            paths,
            builtin: builtin.collect(),
        })
    }

    /// The files of `names` and of all they depend on, in the order of loading, without what this
    /// kernel has built in. A name that it lacks is an error.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        for name in names {
            self.visit(name, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<PathBuf>) -> Result<()> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) {
            return Ok(());
        }
        let path = self
            .paths
            .get(&name)
            .with_context(|| format!("this kernel has no module {name}"))?;
        if order.contains(path) {
            return Ok(());
        }
        let image = fs::read(path).with_context(|| path.display().to_string())?;
        for dependency in depends(&image) {
            self.visit(&dependency, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

/// The `depends=` entry of a module's `.modinfo` section: NUL-terminated `key=value` strings.
/// Any other string of the file that looks like it would have to follow a NUL as well.
fn depends(image: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = image.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = &image[at + KEY.len()..];
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_string)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let module = |name: &str, depends: &str| {
            let text = format!("\x7fELF\0license=GPL\0depends={depends}\0name={name}\0");
            fs::create_dir_all(dir.path().join("kernel/a")).unwrap();
            fs::write(dir.path().join(format!("kernel/a/{name}.ko")), text).unwrap();
        };
        module("virtio", "");
        module("virtio_ring", "virtio");
        module("virtio-pci", "virtio,virtio_ring");
        fs::write(
            dir.path().join("modules.builtin"),
            "kernel/fs/ext4/ext-4.ko\n",
        )
        .unwrap();
        let modules = Modules::scan(dir.path()).unwrap();
        let names: Vec<_> = modules
            .load_order(&["ext_4", "virtio-pci", "virtio_ring"])
            .unwrap()
            .iter()
            .map(|p| module_name(p).unwrap())
            .collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci"]);
        assert!(modules.load_order(&["missing"]).is_err());
    }
}
