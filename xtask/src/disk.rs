//! The demonstration's root disk: made on the host with random content, changed by the guest,
//! looked at on the host again.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::packages::Packages;
use crate::sh;

const PAYLOAD_BYTES: usize = 1 << 20;

/// An ext4 image with a payload, its SHA-256, and a token that the guest must write back.
#[derive(Debug)]
pub struct RootDisk {
    /// The raw image.
    pub image: PathBuf,
    token: String,
    payload: Vec<u8>,
}

impl RootDisk {
    /// Makes an image of 16 MiB at `image`.
    pub fn make(packages: &Packages, image: &Path) -> Result<Self> {
        let content = image.with_extension("content");
        sh::fresh(&content)?;
        fs::create_dir_all(&content)?;
        let mut random = vec![0; PAYLOAD_BYTES + 16];
        fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let payload = random.split_off(16);
        let token: String = random.iter().map(|b| format!("{b:02x}")).collect();

        fs::write(content.join("payload"), &payload)?;
        fs::write(content.join("token"), format!("{token}\n"))?;
        let sum = sh::quiet(
            std::process::Command::new("sha256sum")
                .arg("payload")
                .current_dir(&content),
        )?;
        fs::write(content.join("payload.sha256"), sum.stdout)?;

        sh::fresh(image)?;
        sh::quiet(
            packages
                .tool("mkfs.ext4")?
                .args(["-q", "-F", "-L", "anemone", "-d"])
                .arg(&content)
                .arg(image)
                .arg("16M"),
        )?;
        fs::remove_dir_all(&content)?;
        Ok(Self {
            image: image.to_path_buf(),
            token,
            payload,
        })
    }

    /// After the guest has ended: its file system must be sound, and hold what it had to write.
    pub fn verify(&self, packages: &Packages) -> Result<()> {
        sh::quiet(packages.tool("e2fsck")?.arg("-fn").arg(&self.image))
            .context("the guest left a damaged file system")?;
        let text = self.read(packages, "/written-by-guest")?;
        let expected = format!("{}\n{}\n", self.token, packages.release());
        ensure!(
            text == expected.as_bytes(),
            "the guest wrote {:?}, not {expected:?}",
            String::from_utf8_lossy(&text)
        );
        if self.read(packages, "/copy")? != self.payload {
            bail!("the guest's copy of the payload differs");
        }
        Ok(())
    }

    fn read(&self, packages: &Packages, path: &str) -> Result<Vec<u8>> {
        let output = sh::quiet(
            packages
                .tool("debugfs")?
                .arg("-R")
                .arg(format!("cat {path}"))
                .arg(&self.image),
        )?;
        Ok(output.stdout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs the fetched packages; there is nothing to try without them.
    #[test]
    fn an_untouched_disk_does_not_pass() {
        if !sh::build_dir("packages/complete").exists() {
            eprintln!("packages are not fetched: nothing to make an image with");
            return;
        }
        let packages = crate::packages::fetch().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let disk = RootDisk::make(&packages, &dir.path().join("root.img")).unwrap();
        assert_eq!(disk.read(&packages, "/payload").unwrap(), disk.payload);
        assert!(disk.verify(&packages).is_err());
    }
}
