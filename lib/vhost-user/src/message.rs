//! Request codes, feature bits and payload layouts.

use std::fmt;

use crate::{Error, Result};

/// Bytes of a message header: request, flags and payload size, 32 bits each (Spec, "Header").
pub const HEADER_SIZE: usize = 12;
/// Most bytes of device configuration in one message. The Spec sets no limit; front ends and back
/// ends in use agree on this one.
pub const MAX_CONFIG_SIZE: usize = 256;
/// Most memory regions in one table, and so most descriptors in one message (Spec, "Memory
/// regions description").
pub const MAX_REGIONS: usize = 8;
/// Longest payload this crate sends or accepts; the longest defined one is a configuration
/// message, 12 bytes of header and [`MAX_CONFIG_SIZE`] of data.
pub const MAX_PAYLOAD: usize = 12 + MAX_CONFIG_SIZE;

/// Protocol version in the low two bits of the header's flags.
pub const VERSION: u32 = 1;
/// Mask of the version bits.
pub const VERSION_MASK: u32 = 0x3;
/// Flag: this message is a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Flag: the sender wants an acknowledgement (Spec, "REPLY_ACK").
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Virtio feature bit by which a back end says that it has protocol features
/// (VHOST_USER_F_PROTOCOL_FEATURES). Never shown to the guest.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol feature bits (Spec, "Protocol features"); only those this crate can use.
pub mod protocol_features {
    /// The back end tells how many queues it has.
    pub const MQ: u64 = 1 << 0;
    /// Requests without a reply of their own can be acknowledged.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The back end can send requests over a second socket.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// The device configuration can be read and written.
    pub const CONFIG: u64 = 1 << 9;
    /// What is in flight is tracked in memory that outlives the back end.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// The device can be reset.
    pub const RESET_DEVICE: u64 = 1 << 13;
}

/// In SET_VRING_KICK, CALL and ERR: the message carries no descriptor.
pub const VRING_NO_FD: u64 = 1 << 8;
/// In SET_VRING_ADDR: writes to the used ring are logged at the log address.
pub const VRING_ADDR_LOG: u32 = 1;

macro_rules! requests {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $code:literal, $text:literal;)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum $name {
            $(#[doc = $text] $variant = $code,)*
        }

        impl $name {
            /// The request with this code, if this crate knows it.
            pub fn from_code(code: u32) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// Its code in the header.
            pub fn code(self) -> u32 {
                self as u32
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $text,)*
                })
            }
        }
    };
}

requests! {
    /// Requests of the front end (Spec, "Front-end message types").
    Request {
        GetFeatures = 1, "GET_FEATURES";
        SetFeatures = 2, "SET_FEATURES";
        SetOwner = 3, "SET_OWNER";
        ResetOwner = 4, "RESET_OWNER";
        SetMemTable = 5, "SET_MEM_TABLE";
        SetVringNum = 8, "SET_VRING_NUM";
        SetVringAddr = 9, "SET_VRING_ADDR";
        SetVringBase = 10, "SET_VRING_BASE";
        GetVringBase = 11, "GET_VRING_BASE";
        SetVringKick = 12, "SET_VRING_KICK";
        SetVringCall = 13, "SET_VRING_CALL";
        SetVringErr = 14, "SET_VRING_ERR";
        GetProtocolFeatures = 15, "GET_PROTOCOL_FEATURES";
        SetProtocolFeatures = 16, "SET_PROTOCOL_FEATURES";
        GetQueueNum = 17, "GET_QUEUE_NUM";
        SetVringEnable = 18, "SET_VRING_ENABLE";
        SetBackendReqFd = 21, "SET_BACKEND_REQ_FD";
        GetConfig = 24, "GET_CONFIG";
        SetConfig = 25, "SET_CONFIG";
        GetInflightFd = 31, "GET_INFLIGHT_FD";
        SetInflightFd = 32, "SET_INFLIGHT_FD";
        ResetDevice = 34, "RESET_DEVICE";
    }
}

/// Code of the back end's only request used here (Spec, "Back-end message types").
pub const BACKEND_CONFIG_CHANGE: u32 = 2;

/// Where a split virtqueue lies, in the front end's user addresses, which a [memory
/// region](crate::MemoryRegion) maps to guest addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddr {
    /// Descriptor table.
    pub descriptor: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// Guest physical address at which writes to the used ring are logged.
    pub log: Option<u64>,
}

/// Memory in which a back end tracks what it has in flight, as a message describes it (Spec,
/// "Inflight description").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflightDescription {
    /// Bytes of the file that belong to it.
    pub size: u64,
    /// Where in the file it begins.
    pub offset: u64,
    /// Number of virtqueues it has room for.
    pub queues: u16,
    /// Number of entries of each.
    pub queue_size: u16,
}

impl InflightDescription {
    pub(crate) fn write(&self) -> Vec<u8> {
        // The Spec's structure is padded to 8 bytes in every implementation.
        Writer::default()
            .u64(self.size)
            .u64(self.offset)
            .u16(self.queues)
            .u16(self.queue_size)
            .u32(0)
            .0
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self> {
        let description = Self {
            size: reader.u64()?,
            offset: reader.u64()?,
            queues: reader.u16()?,
            queue_size: reader.u16()?,
        };
        // With or without the padding.
        if !reader.is_empty() {
            reader.u32()?;
        }
        Ok(description)
    }
}

/// Puts a payload together.
#[derive(Default)]
pub(crate) struct Writer(pub Vec<u8>);

impl Writer {
    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend_from_slice(value);
        self
    }
}

/// Takes a payload apart. The length is checked once, by [`finish`](Self::finish) or by a read
/// past the end.
pub(crate) struct Reader<'a> {
    what: &'a dyn fmt::Display,
    bytes: &'a [u8],
    length: usize,
}

impl<'a> Reader<'a> {
    /// `what` names the message in errors.
    pub fn new(what: &'a dyn fmt::Display, bytes: &'a [u8]) -> Self {
        Self {
            what,
            bytes,
            length: bytes.len(),
        }
    }

    fn bad_length(&self) -> Error {
        Error::protocol(format!(
            "{} has a payload of {} bytes, which is not its length",
            self.what, self.length
        ))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self
            .bytes
            .split_first_chunk()
            .ok_or_else(|| self.bad_length())?;
        self.bytes = rest;
        Ok(*head)
    }

    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_ne_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_ne_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_ne_bytes(self.array()?))
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// Nothing may be left.
    pub fn finish(self) -> Result<()> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(self.bad_length())
        }
    }
}
