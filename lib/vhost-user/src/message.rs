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

/// Puts a payload together.
#[derive(Default)]
pub(crate) struct Writer(pub Vec<u8>);

impl Writer {
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

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_ne_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_ne_bytes(self.array()?))
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
