//! What a virtual machine is made of, as its user says it.
//!
//! One set of structs is both the TOML file and the command line: [`Config`] and what it
//! contains. A table of the file can also be written in its short form, the text of the command
//! line option of the same name ([`keyvalue`]): `cpus = 2`, `console = "file=boot.log"`.
//!
//! Values that have a range or a form of their own are types that cannot hold anything else
//! ([`Within`], [`Size`], [`Id`], …), so an error carries the place where the value stands.
//! [`Config::resolve`] then fills in every default, applies the slot rules of the machine and
//! checks what concerns several keys at once; the result is a [`Vm`].

#![forbid(unsafe_code)]

mod balloon;
mod config;
pub mod keyvalue;
mod net;
mod share;
mod short;
mod value;
mod vhost_user;
mod vm;
mod vsock;

pub use balloon::Balloon;
pub use config::{
    Accel, Cgroup, CgroupPlace, Config, Console, Cpus, Disk, Error, Memory, PanicDevice, Pmem,
    Restart, Rng, Serial,
};
pub use net::{Card, Forward, Forwards, IfName, Mac, Net, Protocol, Uplink};
pub use share::{Fs, IdMap, Share, Tag};
pub use short::{Short, Switch};
pub use value::{
    AccelType, CommandLine, CpuModel, DiskSerial, Exposure, Format, Id, Ids, Machine, MemorySize,
    NetType, OnPanic, OnReboot, RestartLimit, RestartPolicy, Sandbox, ShareCache, ShareOwner,
    SinkType, Size, ValueError, Within,
};
pub use vhost_user::{DeviceType, VhostUser};
pub use vm::{Backend, Device, Invalid, Kind, PMEM_UNIT, SerialPort, Sink, Vm, bounce_region};
pub use vsock::{Cid, Vsock};
