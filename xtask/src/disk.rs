//! The demonstration's root disk: made on the host with random content, changed by the guest,
//! looked at on the host again.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::packages::Packages;
use crate::sh;

const PAYLOAD_BYTES: usize = 1 << 20;
/// Options of a file system with blocks as large as pages: persistent memory is mapped by blocks.
const PAGES: [&str; 4] = ["-q", "-F", "-b", "4096"];

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
                .args(PAGES)
                .args(["-L", "anemone", "-d"])
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

    /// After the guest with the cloud kernel has ended, see [`RootDisk::verify_for`].
    pub fn verify(&self, packages: &Packages) -> Result<()> {
        self.verify_for(packages, packages.release())
    }

    /// After the guest has ended: its file system must be sound, and hold what it had to write,
    /// its kernel's release among it.
    pub fn verify_for(&self, packages: &Packages, release: &str) -> Result<()> {
        check(packages, &self.image)?;
        let text = read(packages, &self.image, "/written-by-guest")?;
        let expected = format!("{}\n{release}\n", self.token);
        ensure!(
            text == expected.as_bytes(),
            "the guest wrote {:?}, not {expected:?}",
            String::from_utf8_lossy(&text)
        );
        if read(packages, &self.image, "/copy")? != self.payload {
            bail!("the guest's copy of the payload differs");
        }
        Ok(())
    }
}

/// An image with a file system that holds files under the names they have in it, of a size that
/// persistent memory can have.
pub fn of_files(packages: &Packages, files: &[(String, PathBuf)], image: &Path) -> Result<()> {
    let content = image.with_extension("content");
    sh::fresh(&content)?;
    let mut bytes = 0;
    for (name, file) in files {
        let path = content.join(name);
        sh::fresh(&path)?;
        bytes += fs::copy(file, &path).with_context(|| file.display().to_string())?;
    }
    sh::fresh(image)?;
    let mut make = packages.tool("mkfs.ext4")?;
    make.args(PAGES).arg("-d").arg(&content).arg(image);
    let size = ((bytes >> 20) * 5 / 4 + 8).next_multiple_of(16);
    sh::quiet(make.arg(format!("{size}M")))?;
    fs::remove_dir_all(&content)?;
    Ok(())
}

/// The file system in an image must be sound.
pub fn check(packages: &Packages, image: &Path) -> Result<()> {
    sh::quiet(packages.tool("e2fsck")?.arg("-fn").arg(image))
        .context("the guest left a damaged file system")?;
    Ok(())
}

/// Content of a file in the file system of an image; nothing if it is not there.
pub fn read(packages: &Packages, image: &Path, path: &str) -> Result<Vec<u8>> {
    let output = sh::quiet(
        packages
            .tool("debugfs")?
            .arg("-R")
            .arg(format!("cat {path}"))
            .arg(image),
    )?;
    Ok(output.stdout)
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
        assert_eq!(
            read(&packages, &disk.image, "/payload").unwrap(),
            disk.payload
        );
        assert!(disk.verify(&packages).is_err());
    }
}
