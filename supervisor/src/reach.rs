//! What of the host's files the supervisor still needs by name once the guest runs, and whoever it
//! starts then. Everything else is open already, and Landlock denies it from then on.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anemone_config::{Backend, Kind, Share, Sink, Vm};
use anemone_sandbox::{Access, Grant};

/// Where the dynamic loader finds libraries, for programs that are not ours.
const LIBRARIES: [&str; 6] = [
    "/etc/ld.so.cache",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
];

/// A path, and what is still done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    path: PathBuf,
    access: Access,
}

impl Place {
    fn new(path: impl Into<PathBuf>, access: Access) -> Self {
        let path = path.into();
        Self { path, access }
    }

    /// A shared directory.
    pub fn of_share(share: &Share) -> Self {
        let access = match share.readonly {
            true => Access::Read,
            false => Access::Change,
        };
        Self::new(share.path.clone().unwrap_or_default(), access)
    }

    /// "PATH (WHAT)".
    pub fn text(&self) -> String {
        let what = match self.access {
            Access::Read | Access::ReadFile => "read",
            Access::Change => "read and changed",
            Access::ReadWriteFile => "read and written",
            Access::Execute => "programs are started",
            Access::Remove => "names are removed",
        };
        format!("{} ({what})", self.path.display())
    }
}

/// All that a VM needs: `programs` are those of its processes, `socket` is its control socket, its
/// control groups are in `groups`.
pub fn of<'a>(
    vm: &Vm,
    programs: impl IntoIterator<Item = &'a Path>,
    socket: Option<&Path>,
    groups: Option<&Path>,
) -> Vec<Place> {
    let mut places = Vec::new();
    let mut add = |place: Place| {
        if !places.contains(&place) {
            places.push(place);
        }
    };
    // What lies beside a program too: another version may take its name.
    for program in programs {
        add(Place::new(folder_of(program), Access::Execute));
    }
    add(Place::new("/dev/null", Access::ReadWriteFile));
    // Sockets disappear with the VM.
    let mut sockets: Vec<&Path> = socket.into_iter().collect();
    let mut foreign = false;
    for device in &vm.devices {
        let Backend::Process(binary) = &device.backend else {
            continue;
        };
        foreign |= binary.is_some();
        match &device.kind {
            // Its process opens it again, for its own flags (`anemone-blk`).
            Kind::Disk {
                path: Some(path),
                readonly: true,
                ..
            } => add(Place::new(path, Access::ReadFile)),
            Kind::Disk {
                path: Some(path), ..
            } => add(Place::new(path, Access::ReadWriteFile)),
            Kind::Fs(share) => add(Place::of_share(share)),
            Kind::Vsock { socket, .. } => sockets.push(socket),
            Kind::Console {
                sink: Some(Sink::Unix(path)),
            } => sockets.push(path),
            _ => {}
        }
    }
    if let Some(port) = &vm.serial {
        foreign |= port.binary.is_some();
        if let Sink::Unix(path) = &port.sink {
            sockets.push(path);
        }
    }
    for socket in sockets {
        add(Place::new(folder_of(socket), Access::Remove));
    }
    if let Some(groups) = groups {
        add(Place::new(groups, Access::Remove));
    }
    if foreign {
        for path in LIBRARIES {
            add(Place::new(path, Access::Execute));
        }
    }
    places
}

/// The folder that a path lies in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Denies this process, and those that it starts from now on, all but these places. Returns the
/// version of Landlock's interface.
///
/// # Errors
/// This kernel has no Landlock.
pub fn narrow_to(places: &[Place]) -> io::Result<u32> {
    let mut objects = Vec::with_capacity(places.len());
    for place in places {
        let object = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&place.path);
        match object {
            Ok(object) => objects.push((object, place.access)),
            // It will not be needed, or its lack will be told then.
            Err(error) => log::debug!("{}: {error}", place.path.display()),
        }
    }
    let grants: Vec<_> = objects
        .iter()
        .map(|(object, access)| Grant {
            object: object.as_raw_fd(),
            access: *access,
        })
        .collect();
    // Its children of before are not under the same rules, and it must be able to end them.
    anemone_sandbox::landlock(&grants, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anemone_config::Config;

    fn places(text: &str) -> Vec<String> {
        let config = Config::from_toml(text, Path::new("vm.toml")).unwrap();
        let vm = config.resolve().unwrap();
        let programs = [Path::new("/x/anemone-vmm"), Path::new("/x/anemone-rng")];
        let places = of(&vm, programs, Some(Path::new("/run/a/1.sock")), None);
        places.iter().map(Place::text).collect()
    }

    #[test]
    fn only_what_the_configuration_names_is_left() {
        let all = places(
            "kernel = '/k'\nconsole = { unix = 'c.sock' }\n[vsock]\nsocket = '/v/s'\n\
             [[disk]]\npath = '/d/rw.img'\n[[disk]]\npath = '/d/ro.img'\nreadonly = true\n\
             [[disk]]\nsocket = '/s/blk'\n\
             [[fs]]\ntag = 'a'\npath = '/share'\n[[fs]]\ntag = 'b'\npath = '/ro'\nreadonly = true",
        );
        let expected = [
            "/x (programs are started)",
            "/dev/null (read and written)",
            "/d/rw.img (read and written)",
            "/d/ro.img (read)",
            "/share (read and changed)",
            "/ro (read)",
            "/run/a (names are removed)",
            ". (names are removed)",
            "/v (names are removed)",
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn programs_that_are_not_ours_find_libraries() {
        let with = places("kernel = '/k'\n[rng]\nbinary = '/x/rng'");
        assert!(with.contains(&"/usr/lib (programs are started)".to_owned()));
        let without = places("kernel = '/k'\n[rng]\nrate = '1K'");
        assert!(!without.iter().any(|place| place.contains("lib")));
    }
}
