//! Where scenarios run: in the outer guest of the nested rig, or right on a host whose xtask says
//! in `KEY=VALUE` arguments what is where.

use std::path::PathBuf;
use std::time::Duration;

/// Scenarios that write a root disk which is looked at afterwards, each one of its own. The outer
/// guest of the rig has them as its disks, in this order.
pub const ROOT_DISKS: [&str; 4] = ["demo", "pmem", "all-devices", "all-devices-bounce"];

/// A kernel and its initial RAM file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Which of Debian's kernels: `cloud`, `amd64` or `rt`.
    pub name: String,
    /// The kernel.
    pub kernel: PathBuf,
    /// busybox, modules of this kernel, and `tests/guest/inner/init.sh`.
    pub initramfs: PathBuf,
}

/// What scenarios need to know of their surroundings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Accelerator that every VM is started with.
    pub accel: String,
    /// Folder with the product's programs.
    pub programs: PathBuf,
    /// Guests that can be booted, the one that most scenarios use first.
    pub guests: Vec<Guest>,
    /// Root disk of a scenario of [`ROOT_DISKS`].
    pub disk: PathBuf,
    /// Such a disk to be copied.
    pub template: PathBuf,
    /// Folder for everything else that scenarios write.
    pub scratch: PathBuf,
    /// Command that runs qemu-storage-daemon, in words.
    pub storage_daemon: Vec<String>,
    /// passt.
    pub passt: PathBuf,
    /// Folder with curl and iperf3, their loader and their libraries, and busybox.
    pub clients: PathBuf,
    /// A file system with fio, its libraries and their loader, where there is one.
    pub fio: Option<PathBuf>,
    /// User that VMs run as instead of the runner's own.
    pub user: Option<u32>,
    /// Longest that anything may take.
    pub patience: Duration,
}

impl Place {
    /// The outer guest, as `xtask` has packed it, for a scenario.
    pub fn rig(scenario: &str) -> Self {
        let words = [
            "/qsd/lib64/ld-linux-x86-64.so.2",
            "--library-path",
            "/qsd/lib",
            "/qsd/bin/qemu-storage-daemon",
        ];
        let disk = ROOT_DISKS.iter().position(|name| *name == scenario);
        let letter = char::from(b'a' + disk.unwrap_or(0) as u8);
        Self {
            accel: "kvm".into(),
            programs: "/bin".into(),
            guests: vec![Guest {
                name: "cloud".into(),
                kernel: "/guest/kernel".into(),
                initramfs: "/guest/initramfs".into(),
            }],
            disk: format!("/dev/vd{letter}").into(),
            template: "/guest/root.img".into(),
            scratch: format!("/tmp/{scenario}").into(),
            storage_daemon: words.map(str::to_string).to_vec(),
            passt: "/bin/passt".into(),
            clients: "/clients".into(),
            fio: None,
            // Root is never needed.
            user: Some(1000),
            patience: Duration::from_secs(120),
        }
    }

    /// The guest with this kernel.
    pub fn guest(&self, name: &str) -> Option<&Guest> {
        self.guests.iter().find(|guest| guest.name == name)
    }

    /// A path in the scratch folder.
    pub fn scratch(&self, name: &str) -> String {
        self.scratch.join(name).display().to_string()
    }

    /// Arguments from which [`Place::parse`] makes this again, on a host: VMs run as the runner's
    /// own user.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("accel={}", self.accel),
            format!("programs={}", self.programs.display()),
            format!("disk={}", self.disk.display()),
            format!("template={}", self.template.display()),
            format!("scratch={}", self.scratch.display()),
            format!("patience={}", self.patience.as_secs()),
            format!("passt={}", self.passt.display()),
            format!("clients={}", self.clients.display()),
        ];
        arguments.extend(self.storage_daemon.iter().map(|w| format!("daemon={w}")));
        arguments.extend(self.fio.iter().map(|p| format!("fio={}", p.display())));
        for guest in &self.guests {
            arguments.push(format!("guest={}", guest.name));
            arguments.push(format!("kernel={}", guest.kernel.display()));
            arguments.push(format!("initramfs={}", guest.initramfs.display()));
        }
        arguments
    }

    /// Reads such arguments. `kernel` and `initramfs` belong to the `guest` before them.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut place = Self {
            accel: String::new(),
            programs: PathBuf::new(),
            guests: Vec::new(),
            disk: PathBuf::new(),
            template: PathBuf::new(),
            scratch: PathBuf::new(),
            storage_daemon: Vec::new(),
            passt: PathBuf::new(),
            clients: PathBuf::new(),
            fio: None,
            user: None,
            patience: Duration::ZERO,
        };
        for argument in arguments {
            let wrong = || format!("wrong argument {argument}");
            let (key, value) = argument.split_once('=').ok_or_else(wrong)?;
            match key {
                "accel" => place.accel = value.into(),
                "programs" => place.programs = value.into(),
                "disk" => place.disk = value.into(),
                "template" => place.template = value.into(),
                "scratch" => place.scratch = value.into(),
                "patience" => {
                    place.patience = Duration::from_secs(value.parse().map_err(|_| wrong())?);
                }
                "passt" => place.passt = value.into(),
                "clients" => place.clients = value.into(),
                "fio" => place.fio = Some(value.into()),
                "daemon" => place.storage_daemon.push(value.into()),
                "guest" => place.guests.push(Guest {
                    name: value.into(),
                    kernel: PathBuf::new(),
                    initramfs: PathBuf::new(),
                }),
                "kernel" => place.guests.last_mut().ok_or_else(wrong)?.kernel = value.into(),
                "initramfs" => place.guests.last_mut().ok_or_else(wrong)?.initramfs = value.into(),
                _ => return Err(wrong()),
            }
        }
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_say_everything_but_the_user() {
        let mut place = Place::rig("pmem");
        assert_eq!(place.disk, PathBuf::from("/dev/vdb"));
        place.accel = "soft".into();
        place.fio = Some("/fio.img".into());
        place.guests.push(Guest {
            name: "rt".into(),
            kernel: "/k n=1".into(),
            initramfs: "/i".into(),
        });
        let again = Place::parse(place.arguments().into_iter()).unwrap();
        place.user = None;
        assert_eq!(again, place);
    }

    #[test]
    fn nonsense_is_named() {
        for text in [
            "accel",
            "kernel=/without/a/guest",
            "patience=long",
            "colour=red",
        ] {
            let error = Place::parse([text.to_string()].into_iter()).unwrap_err();
            assert!(error.contains(text));
        }
    }
}
