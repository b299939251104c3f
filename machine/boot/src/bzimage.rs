//! bzImage: a setup header, then a program that decompresses the kernel (Linux
//! `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header").

use std::io::BufRead;
use std::ops::Range;

use vm_memory::GuestMemoryMmap;

use crate::elf::{self, Elf, Segment};
use crate::linux::{SETUP_HEADER, SETUP_HEADER_END, ZeroPage};
use crate::payload::{self, Format};
use crate::place::Places;
use crate::source::Source;
use crate::{Error, layout};

const SETUP_SECTS: usize = 0x1F1;
const SYSSIZE: usize = 0x1F4;
const BOOT_FLAG: usize = 0x1FE;
const JUMP_OFFSET: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20E;
const LOADFLAGS: usize = 0x211;
const INITRD_ADDR_MAX: usize = 0x22C;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24C;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// What a header of the oldest protocol that is accepted contains at least.
const HEADER_END: usize = 0x264;

/// The protocol that says whether there is a 64-bit entry point.
const OLDEST: u16 = 0x020C;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
const SECTOR: u64 = 512;
/// Distance of the 64-bit entry point from the beginning of the protected-mode part.
const ENTRY64: u64 = 0x200;
/// The name of a release has at most 64 bytes (`__NEW_UTS_LEN`).
const RELEASE_MAX: usize = 64;

/// A bzImage whose header has been checked against the file.
pub(crate) struct BzImage {
    /// The setup header, from [`SETUP_HEADER`] on.
    header: Vec<u8>,
    /// Name of the kernel's release.
    pub(crate) release: String,
    /// Longest command line, without its NUL.
    pub(crate) cmdline_size: usize,
    /// The initramfs must end at or below this.
    pub(crate) initrd_limit: u64,
    /// Where in the file the protected-mode part lies.
    protected: Range<u64>,
    /// Where in the file the compressed kernel lies.
    payload: Range<u64>,
    /// The memory that the kernel needs before it knows what memory there is.
    memory: Range<u64>,
    kernel_64: bool,
}

impl BzImage {
    pub(crate) fn parse(file: &Source<'_>) -> Result<Self, Error> {
        let start = file.prefix(SETUP_HEADER_END)?;
        let u16_at = |at: usize| {
            start
                .get(at..at + 2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]))
        };
        if u16_at(BOOT_FLAG) != Some(0xAA55) || start.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
            return Err(Error::UnknownFormat);
        }
        let truncated = |what, end| Error::Truncated {
            what,
            end,
            size: file.size,
        };
        // A jump over the header says where it ends.
        let header_end = HEADER_END.max(
            start
                .get(JUMP_OFFSET)
                .map_or(0, |jump| MAGIC + usize::from(*jump)),
        );
        let header_end = header_end.min(SETUP_HEADER_END);
        let Some(header) = start.get(..header_end) else {
            return Err(truncated("setup header", header_end as u64));
        };
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let u32_at = |at| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;

        let version = u16_at(VERSION);
        if version < OLDEST {
            return Err(Error::OldProtocol(version));
        }
        if header[LOADFLAGS] & LOADED_HIGH == 0 {
            return Err(Error::SetupHeader(
                "it is a zImage, to be loaded below 1 MiB",
            ));
        }

        // Zero means four, for the sake of boot sectors of the nineties.
        let sectors = match header[SETUP_SECTS] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let setup_end = (sectors + 1) * SECTOR;
        if setup_end >= file.size {
            return Err(truncated("setup code", setup_end));
        }
        // Counted in units of 16 bytes; the last need not be full.
        let protected_end = setup_end + u64::from(u32_at(SYSSIZE)) * 16;
        if protected_end >= file.size + 16 {
            return Err(truncated("protected-mode code", protected_end));
        }
        let protected = setup_end..protected_end.min(file.size);
        let payload_start = setup_end + u64::from(u32_at(PAYLOAD_OFFSET));
        let payload = payload_start..payload_start + u64::from(u32_at(PAYLOAD_LENGTH));
        if payload.end > file.size {
            return Err(truncated("compressed payload", payload.end));
        }

        let address = u64_at(PREF_ADDRESS);
        let end = address.checked_add(u64::from(u32_at(INIT_SIZE)));
        let end = end.ok_or(Error::SetupHeader("its address exceeds 64 bits"))?;
        Ok(Self {
            header: header[SETUP_HEADER..].to_vec(),
            release: release(file, u16_at(KERNEL_VERSION), setup_end)?,
            cmdline_size: u32_at(CMDLINE_SIZE) as usize,
            initrd_limit: u64::from(u32_at(INITRD_ADDR_MAX)) + 1,
            protected,
            payload,
            memory: address..end,
            kernel_64: u16_at(XLOADFLAGS) & XLF_KERNEL_64 != 0,
        })
    }

    pub(crate) fn zero_page(&self) -> ZeroPage {
        ZeroPage::with_setup_header(&self.header)
    }

    /// Loads the kernel. Returns its 64-bit entry point and how it was loaded.
    pub(crate) fn load(
        &self,
        memory: &GuestMemoryMmap,
        file: &Source<'_>,
        places: &mut Places,
    ) -> Result<(u64, String), Error> {
        if !self.kernel_64 {
            return Err(Error::NoEntry64);
        }
        places.take("the kernel", self.memory.clone())?;
        if let Some(payload) = self.open_payload(file)? {
            let name = payload.format.name();
            let entry = self.load_payload(memory, payload)?;
            Ok((entry, format!("{name} payload")))
        } else {
            let start = self.memory.start;
            let length = self.protected.end - self.protected.start;
            if length <= ENTRY64 || length > self.memory.end - start {
                return Err(Error::SetupHeader(
                    "its protected-mode code is shorter than its entry point or longer than its \
                     memory",
                ));
            }
            file.copy(memory, self.protected.start, start, length)?;
            Ok((start + ENTRY64, "own decompressor".to_owned()))
        }
    }

    /// The payload, if it is in a format that can be decompressed here.
    fn open_payload<'a>(&self, file: &Source<'a>) -> Result<Option<Payload<'a>>, Error> {
        // The last four bytes say how long the decompressed payload is, in every format.
        const SIZE: u64 = 4;
        let Range { start, end } = self.payload;
        if end - start < payload::MAGIC_MAX as u64 + SIZE {
            return Ok(None);
        }
        let magic = file.bytes(start..start + payload::MAGIC_MAX as u64)?;
        let Some(format) = Format::of(&magic) else {
            return Ok(None);
        };
        let size = file.bytes(end - SIZE..end)?;
        let damaged = |source| Error::Payload {
            format: format.name(),
            source,
        };
        let size = u64::from(u32::from_le_bytes([size[0], size[1], size[2], size[3]]));
        if size > self.memory.end - self.memory.start {
            return Err(Error::SetupHeader(
                "its payload decompresses to more than the memory that it asks for",
            ));
        }
        Ok(Some(Payload {
            format,
            size,
            stream: format
                .open(file.window(start..end - format.trailer()))
                .map_err(damaged)?,
        }))
    }

    /// Decompresses the ELF file in the payload into guest memory. After it in the payload come
    /// relocations, for a kernel that is to run elsewhere: they are not read.
    fn load_payload(
        &self,
        memory: &GuestMemoryMmap,
        mut payload: Payload<'_>,
    ) -> Result<u64, Error> {
        let prefix = payload.take_prefix()?;
        let elf = Elf::parse(&prefix, payload.size)?;
        let own = &self.memory;
        let outside = |s: &Segment| s.address < own.start || s.memory().end > own.end;
        if elf.segments.iter().any(outside) {
            return Err(Error::Elf {
                what: "program header",
                why: "the segment lies outside the memory that the setup header asks for",
            });
        }
        elf.place(&mut Places::within(own.clone()))?;
        let entry = elf.entry()?;

        let end = elf.segments.iter().map(|s| s.file().end).max().unwrap_or(0);
        write_overlap(memory, &elf.segments, 0, &prefix)?;
        let mut position = prefix.len() as u64;
        while position < end {
            let bytes = payload.fill(position, end)?;
            write_overlap(memory, &elf.segments, position, bytes)?;
            let length = bytes.len();
            position += length as u64;
            payload.stream.consume(length);
        }
        Ok(entry)
    }
}

/// A payload while it is being decompressed.
struct Payload<'a> {
    format: Format,
    /// Its length when decompressed, as the file declares it.
    size: u64,
    stream: Box<dyn BufRead + 'a>,
}

impl Payload<'_> {
    /// The next decompressed bytes, which are at `position`; at least one.
    fn fill(&mut self, position: u64, needed: u64) -> Result<&[u8], Error> {
        let format = self.format.name();
        match self.stream.fill_buf() {
            Ok([]) => Err(Error::PayloadTruncated {
                format,
                got: position,
                needed,
            }),
            Ok(bytes) => Ok(bytes),
            Err(source) => Err(Error::Payload { format, source }),
        }
    }

    /// Takes what [`Elf::parse`] needs to see.
    fn take_prefix(&mut self) -> Result<Vec<u8>, Error> {
        let length = self.size.min(elf::PREFIX as u64) as usize;
        let mut prefix = Vec::with_capacity(length);
        while prefix.len() < length {
            let bytes = self.fill(prefix.len() as u64, length as u64)?;
            let bytes = &bytes[..bytes.len().min(length - prefix.len())];
            prefix.extend_from_slice(bytes);
            let taken = bytes.len();
            self.stream.consume(taken);
        }
        Ok(prefix)
    }
}

/// Writes those bytes of a file that belong to segments; `bytes` begins at `position`.
fn write_overlap(
    memory: &GuestMemoryMmap,
    segments: &[Segment],
    position: u64,
    bytes: &[u8],
) -> Result<(), Error> {
    for segment in segments {
        let file = segment.file();
        let start = file.start.max(position);
        let end = file.end.min(position + bytes.len() as u64);
        if start < end {
            let part = &bytes[(start - position) as usize..(end - position) as usize];
            layout::write(memory, segment.address + (start - file.start), part)?;
        }
    }
    Ok(())
}

/// The kernel's release, from the text that begins with it. For logs only: what is not
/// printable ends it.
fn release(file: &Source<'_>, pointer: u16, setup_end: u64) -> Result<String, Error> {
    let start = u64::from(pointer) + SECTOR;
    if pointer == 0 || start >= setup_end {
        return Ok("of unknown release".to_owned());
    }
    let end = setup_end.min(start + RELEASE_MAX as u64);
    let text = file.bytes(start..end)?;
    let release = text.iter().take_while(|byte| byte.is_ascii_graphic());
    Ok(release.map(|byte| char::from(*byte)).collect())
}
