//! A FUSE request as it comes over a virtqueue (virtio 1.3, 5.11.6): readable bytes are the header
//! and the arguments, writable bytes take the header of the reply and what follows it.

use std::sync::Arc;

use anemone_device::{Chain, Parts};
use vm_memory::GuestMemoryMmap;

use crate::fuse::{IN_HEADER, InHeader, OUT_HEADER, op};
use crate::state::Seen;

/// Arguments of a request at most, without the data of a write: an extended attribute of 64 KiB, or
/// names.
const MAX_ARGUMENTS: usize = 80 << 10;
/// Arguments of a write before its data.
pub const WRITE_IN: usize = 40;

/// A request. One is used again and again, so that requests are served without allocation.
#[derive(Default)]
pub struct Request {
    /// Number of the queue that it came over, and its chain.
    pub place: (usize, u16),
    /// An earlier process had taken it.
    pub again: bool,
    pub header: InHeader,
    /// What follows the header, up to the data of a write.
    pub args: Vec<u8>,
    /// The data of a write.
    pub data: Parts,
    /// Room for the reply, its header included.
    pub reply: Parts,
    /// What follows the header in `reply`, while it is being filled.
    pub target: Parts,
    /// What the names of a request that is carried out again meant before, if it is known.
    pub seen: Option<[Seen; 2]>,
    /// Keeps the parts mapped.
    memory: Option<Arc<GuestMemoryMmap>>,
}

impl Request {
    /// Takes up the request in `chain`.
    ///
    /// # Errors
    /// Why there is none, for the log. The chain is to be returned with nothing written.
    pub fn start(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        chain: Chain,
        queue: usize,
        again: bool,
    ) -> Result<(), String> {
        self.place = (queue, chain.head_index());
        self.again = again;
        self.seen = None;
        // The old parts, if any, are gone before their memory can be.
        let parts = Parts::of_chain(memory, chain, &mut self.data, &mut self.reply);
        self.memory = Some(Arc::clone(memory));
        parts.map_err(|unusable| unusable.to_string())?;
        let length = self.data.len();
        let mut header = [0; IN_HEADER];
        if !self.data.read(&mut header) {
            return Err(format!("{length} bytes are no request"));
        }
        self.header = InHeader::from_bytes(&header);
        let said = self.header.len as usize;
        if said < IN_HEADER || said > length {
            return Err(format!("{length} bytes that say they are {said}"));
        }
        self.data.truncate(said - IN_HEADER);
        let rest = said - IN_HEADER;
        let args = match self.header.opcode {
            op::WRITE => rest.min(WRITE_IN),
            _ => rest,
        };
        if args > MAX_ARGUMENTS {
            return Err(format!("{args} bytes of arguments"));
        }
        self.args.resize(args, 0);
        self.data.read(&mut self.args);
        Ok(())
    }

    /// Room for what follows the header of the reply.
    pub fn room(&self) -> usize {
        self.reply.len().saturating_sub(OUT_HEADER)
    }

    /// Writes the reply; how many bytes that were.
    pub fn answer(&mut self, reply: Result<&[u8], i32>) -> u32 {
        let reply = match reply {
            Ok(bytes) if bytes.len() > self.room() => Err(libc::EIO),
            other => other,
        };
        let (error, bytes) = match reply {
            Ok(bytes) => (0, bytes),
            Err(error) => (error, &[][..]),
        };
        match self.reply.write(&self.out_header(error, bytes.len())) {
            true => {
                self.reply.write(bytes);
                (OUT_HEADER + bytes.len()) as u32
            }
            // No room: a request that wants no reply.
            false => 0,
        }
    }

    /// Writes the header of a reply whose `len` other bytes are there already; how long it is.
    pub fn answer_in_place(&mut self, len: usize) -> u32 {
        match self.reply.write(&self.out_header(0, len)) {
            true => (OUT_HEADER + len) as u32,
            false => 0,
        }
    }

    fn out_header(&self, error: i32, len: usize) -> [u8; OUT_HEADER] {
        let mut header = [0; OUT_HEADER];
        header[..4].copy_from_slice(&((OUT_HEADER + len) as u32).to_ne_bytes());
        header[4..8].copy_from_slice(&(-error).to_ne_bytes());
        header[8..].copy_from_slice(&self.header.unique.to_ne_bytes());
        header
    }
}
