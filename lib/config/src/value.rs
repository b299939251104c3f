//! Types of single values. Each knows what it allows and says so when it finds something else.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Unexpected, Visitor};
use serde::ser::{Serialize, Serializer};
use thiserror::Error;

/// A value that is not allowed where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("found `{found}`, allowed: {allowed}")]
pub struct ValueError {
    /// What was found.
    pub found: String,
    /// What is allowed, in words.
    pub allowed: String,
}

impl ValueError {
    pub(crate) fn new(found: impl Into<String>, allowed: impl Into<String>) -> Self {
        Self {
            found: found.into(),
            allowed: allowed.into(),
        }
    }
}

/// A whole number from `MIN` to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Within<const MIN: u16, const MAX: u16>(u16);

impl<const MIN: u16, const MAX: u16> Within<MIN, MAX> {
    /// The number, if it is in range.
    pub fn new(number: u16) -> Result<Self, ValueError> {
        Self::from_u64(u64::from(number))
            .ok_or_else(|| ValueError::new(number.to_string(), Self::allowed()))
    }

    /// The number.
    pub fn get(self) -> u16 {
        self.0
    }

    /// The smallest number allowed.
    pub const fn min() -> Self {
        Self(MIN)
    }

    fn from_u64(number: u64) -> Option<Self> {
        let number = u16::try_from(number).ok()?;
        (MIN..=MAX).contains(&number).then_some(Self(number))
    }

    fn allowed() -> String {
        format!("a whole number from {MIN} to {MAX}")
    }
}

impl<const MIN: u16, const MAX: u16> Serialize for Within<MIN, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u16(self.0)
    }
}

impl<'de, const MIN: u16, const MAX: u16> Deserialize<'de> for Within<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number<const MIN: u16, const MAX: u16>;

        impl<const MIN: u16, const MAX: u16> Visitor<'_> for Number<MIN, MAX> {
            type Value = Within<MIN, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&Within::<MIN, MAX>::allowed())
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Self::Value, E> {
                Within::from_u64(number)
                    .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Self::Value, E> {
                u64::try_from(number)
                    .ok()
                    .and_then(Within::from_u64)
                    .ok_or_else(|| E::invalid_value(Unexpected::Signed(number), &self))
            }
        }

        deserializer.deserialize_u64(Number)
    }
}

/// Serde for types that are one word or text: written by `Display`, read by `FromStr`.
macro_rules! serde_as_text {
    ($name:ident) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;

                impl serde::de::Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str(&$name::allowed())
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse()
                            .map_err(|_| E::invalid_value(serde::de::Unexpected::Str(text), &self))
                    }
                }

                deserializer.deserialize_str(Text)
            }
        }
    };
}

pub(crate) use serde_as_text;

/// Defines a choice between words.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub enum $name {
            $($(#[$variant_meta])* $variant),+
        }

        impl $name {
            /// The words, in the order of the variants.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            fn allowed() -> String {
                Self::WORDS.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }

        impl FromStr for $name {
            type Err = ValueError;

            fn from_str(text: &str) -> Result<Self, ValueError> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(ValueError::new(text, Self::allowed())),
                }
            }
        }

        serde_as_text!($name);
    };
}

words! {
    /// A version of a machine.
    Machine {
        /// The first one.
        #[default]
        Virt1 = "virt-1",
    }
}
words! {
    /// Which accelerator runs the guest.
    AccelType {
        /// The first in the build that can run a stock kernel on this host.
        #[default]
        Auto = "auto",
        /// Linux KVM.
        Kvm = "kvm",
        /// A software CPU.
        Soft = "soft",
        /// No CPU; a test drives the machine over a socket.
        None = "none",
    }
}
words! {
    /// What the guest sees as its CPU: `anemone cpu-models` describes them.
    CpuModel {
        /// The host's CPU as far as the accelerator passes it on.
        #[default]
        Host = "host",
        /// The x86-64 baseline.
        V1 = "x86-64-v1-1",
        /// Level 2 of the psABI.
        V2 = "x86-64-v2-1",
        /// Level 3 of the psABI.
        V3 = "x86-64-v3-1",
    }
}
words! {
    /// Format of a disk image.
    Format {
        /// The bytes of the disk, one after the other.
        #[default]
        Raw = "raw",
    }
}
words! {
    /// What a guest may keep in its caches of a shared directory.
    ShareCache {
        /// Nothing.
        None = "none",
        /// Names and attributes for a second, data until a file is opened that has changed.
        #[default]
        Auto = "auto",
        /// Everything: nobody else changes the directory.
        Always = "always",
    }
}
words! {
    /// Whose the files are that a guest makes in a shared directory.
    ShareOwner {
        /// The user's who runs the VM.
        #[default]
        Oneself = "self",
        /// The guest's users'.
        Guest = "guest",
    }
}
words! {
    /// Where a console goes that needs no path.
    SinkType {
        /// Standard input and output of `anemone`.
        Stdio = "stdio",
        /// A pseudo-terminal, whose name is printed.
        Pty = "pty",
        /// There is no such device.
        #[default]
        None = "none",
    }
}
words! {
    /// Where the frames of a network card go that needs no name.
    NetType {
        /// To passt, which needs no privilege.
        #[default]
        User = "user",
    }
}
words! {
    /// What happens when the guest resets.
    OnReboot {
        /// It starts again.
        #[default]
        Restart = "restart",
        /// The VM ends.
        Stop = "stop",
    }
}
words! {
    /// What happens when the guest's kernel panics.
    OnPanic {
        /// The VM ends with an error.
        #[default]
        Stop = "stop",
        /// The guest starts again.
        Restart = "restart",
        /// Only a line in the log; the guest goes on.
        Ignore = "ignore",
    }
}
words! {
    /// What happens when a device process ends while the VM runs.
    RestartPolicy {
        /// It is started again; the guest sees a pause.
        #[default]
        Always = "always",
        /// The VM ends with an error.
        Never = "never",
    }
}
words! {
    /// What a process does that its jail forbids.
    Sandbox {
        /// It dies, with a report.
        #[default]
        On = "on",
        /// It goes on, with a report.
        Log = "log",
    }
}

/// How often a device process may be started again, written `COUNT/SECONDS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartLimit {
    /// Most restarts of one process within the time.
    pub count: u32,
    /// The time in seconds.
    pub seconds: u32,
}

impl RestartLimit {
    /// Largest value of both numbers.
    const MAX: u32 = 1_000_000;

    fn allowed() -> String {
        "COUNT/SECONDS, both from 1 to 1000000, such as 10/60: at most 10 restarts within 60 seconds"
            .to_owned()
    }
}

impl Default for RestartLimit {
    fn default() -> Self {
        Self {
            count: 10,
            seconds: 60,
        }
    }
}

impl fmt::Display for RestartLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.count, self.seconds)
    }
}

impl FromStr for RestartLimit {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            let number = text.parse().ok().filter(|_| digits);
            number.filter(|number| (1..=Self::MAX).contains(number))
        };
        let limit = text.split_once('/').and_then(|(count, seconds)| {
            Some(Self {
                count: number(count)?,
                seconds: number(seconds)?,
            })
        });
        limit.ok_or_else(|| ValueError::new(text, Self::allowed()))
    }
}

serde_as_text!(RestartLimit);

/// Ids with `+` between them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ids(pub Vec<Id>);

impl Ids {
    fn allowed() -> String {
        "ids of devices with + between them, such as disk0+rng".to_owned()
    }
}

impl fmt::Display for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, id) in self.0.iter().enumerate() {
            write!(f, "{}{id}", if number > 0 { "+" } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for Ids {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let ids: Result<_, _> = text.split('+').map(str::parse).collect();
        ids.map(Self)
            .map_err(|_| ValueError::new(text, Self::allowed()))
    }
}

serde_as_text!(Ids);

words! {
    /// How much of the guest's memory a back end sees.
    Exposure {
        /// All of it: the fast path.
        #[default]
        Shared = "shared",
        /// None of it: the VMM copies requests into a region of the device's own.
        Bounce = "bounce",
    }
}

/// A number of bytes, written like `4096`, `512M` or `2GiB`: K, M, G and T are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Size(pub u64);

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl Size {
    fn allowed() -> String {
        "a size such as 4096, 512M or 2GiB (K, M, G, T: powers of 1024)".to_owned()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for Size {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let error = || ValueError::new(text, Self::allowed());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let unit = unit
            .strip_suffix("iB")
            .filter(|u| !u.is_empty())
            .unwrap_or(unit);
        let mut letters = unit.chars();
        let factor = match (letters.next(), letters.next()) {
            (None, _) => 1,
            (Some(letter), None) => UNITS
                .iter()
                .find(|(unit, _)| letter.eq_ignore_ascii_case(unit))
                .map(|(_, shift)| 1u64 << shift)
                .ok_or_else(error)?,
            _ => return Err(error()),
        };
        number.checked_mul(factor).map(Self).ok_or_else(error)
    }
}

serde_as_text!(Size);

/// Size of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize(Size);

impl MemorySize {
    /// The smallest: below it a stock kernel does not even unpack itself.
    pub const MIN: u64 = 32 << 20;
    /// The largest: what every x86-64 CPU with virtualisation can address (40 bits).
    pub const MAX: u64 = 1 << 40;
    /// Memory comes in pieces of this size, so that huge pages can back all of it.
    pub const STEP: u64 = 2 << 20;

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0.0
    }

    fn allowed() -> String {
        "a size from 32M to 1T in steps of 2M, such as 512M or 2G".to_owned()
    }
}

impl Default for MemorySize {
    fn default() -> Self {
        Self(Size(512 << 20))
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for MemorySize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.parse::<Size>() {
            Ok(Size(bytes))
                if (Self::MIN..=Self::MAX).contains(&bytes) && bytes % Self::STEP == 0 =>
            {
                Ok(Self(Size(bytes)))
            }
            _ => Err(ValueError::new(text, Self::allowed())),
        }
    }
}

serde_as_text!(MemorySize);

/// Defines text of a certain form.
macro_rules! text {
    ($(#[$meta:meta])* $name:ident, $allowed:expr, $valid:expr) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            fn allowed() -> String {
                $allowed.to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ValueError;

            fn from_str(text: &str) -> Result<Self, ValueError> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(ValueError::new(text, Self::allowed()))
                }
            }
        }

        serde_as_text!($name);
    };
}

text! {
    /// Name of a VM or of one of its devices.
    Id,
    "1 to 32 letters, digits, `.`, `_` or `-`, the first a letter or a digit",
    |text| {
        (1..=32).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    }
}
text! {
    /// Serial number of a disk (virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID has 20 bytes).
    DiskSerial,
    "1 to 20 printable ASCII characters",
    |text| (1..=20).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
}
text! {
    /// Kernel command line. Linux on x86 takes 2048 bytes with the terminating NUL
    /// (`COMMAND_LINE_SIZE`).
    CommandLine,
    "at most 2047 bytes without control characters",
    |text| text.len() <= 2047 && !text.contains(char::is_control)
}

impl Id {
    /// A default of this crate, which has the form already.
    pub(crate) fn known(text: &str) -> Self {
        debug_assert!(text.parse::<Self>().is_ok(), "{text}");
        Self(text.to_owned())
    }
}

impl CommandLine {
    /// A default of this crate, which has the form already.
    pub(crate) fn known(text: &str) -> Self {
        debug_assert!(text.parse::<Self>().is_ok(), "{text}");
        Self(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_in_all_spellings() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1 << 10),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("2G", 2 << 30),
            ("3T", 3 << 40),
        ] {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "M",
            "iB",
            "1iB",
            "1GB",
            "1.5G",
            "-1",
            "+1",
            "1 G",
            "16777216T",
            "1MM",
        ] {
            let error = text.parse::<Size>().unwrap_err();
            assert_eq!(error.found, text);
        }
    }

    #[test]
    fn memory_has_a_range_and_a_step() {
        for text in ["32M", "512M", "1T", "34M"] {
            assert!(text.parse::<MemorySize>().is_ok(), "{text}");
        }
        for text in ["0", "30M", "33M", "1025G", "2T", "512"] {
            let error = text.parse::<MemorySize>().unwrap_err().to_string();
            assert!(error.contains("32M to 1T"), "{error}");
        }
    }

    #[test]
    fn words_name_the_alternatives() {
        assert_eq!("log".parse(), Ok(Sandbox::Log));
        assert_eq!(
            "qcow2".parse::<Format>().unwrap_err().to_string(),
            "found `qcow2`, allowed: `raw`"
        );
        assert_eq!(OnPanic::WORDS, ["stop", "restart", "ignore"]);
    }

    #[test]
    fn text_forms() {
        for good in ["a", "disk-0", "9.x_y"] {
            assert_eq!(good.parse::<Id>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a b", "ä", &"x".repeat(33)] {
            assert!(bad.parse::<Id>().is_err(), "{bad}");
        }
        assert!("x".repeat(2047).parse::<CommandLine>().is_ok());
        assert!("x".repeat(2048).parse::<CommandLine>().is_err());
        assert!("a\nb".parse::<CommandLine>().is_err());
        assert!("123456789012345678901".parse::<DiskSerial>().is_err());
    }

    proptest! {
        #[test]
        fn size_round_trip(bytes: u64) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = text.parse::<Size>();
            let _ = text.parse::<MemorySize>();
            let _ = text.parse::<Id>();
            let _ = text.parse::<CommandLine>();
        }
    }
}
