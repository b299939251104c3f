//! ELF64 executables (System V ABI, chapter 4 and 5; Linux `include/xen/interface/elfnote.h`).

use std::ops::Range;

use crate::place::Places;
use crate::source::Source;
use crate::{Error, layout};

pub(crate) const MAGIC: &[u8] = b"\x7FELF";

/// How much of the beginning of a file [`Elf::parse`] needs to see: enough for 1169 program
/// headers where linkers put them.
pub(crate) const PREFIX: usize = 64 << 10;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Notes of kernels have hundreds of bytes.
const NOTES_MAX: u64 = 1 << 20;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Something to load: all fields in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Where it begins in the file.
    pub(crate) offset: u64,
    /// How much of it is in the file; the rest is zero.
    pub(crate) file_size: u64,
    /// Guest-physical address.
    pub(crate) address: u64,
    /// Its size in memory.
    pub(crate) memory_size: u64,
}

impl Segment {
    /// The addresses it occupies.
    pub(crate) fn memory(&self) -> Range<u64> {
        self.address..self.address + self.memory_size
    }

    /// The bytes of the file that it comes from.
    pub(crate) fn file(&self) -> Range<u64> {
        self.offset..self.offset + self.file_size
    }
}

/// The headers of an ELF file, checked against the size of the file.
#[derive(Debug)]
pub(crate) struct Elf {
    entry: u64,
    pub(crate) segments: Vec<Segment>,
    notes: Vec<Note>,
}

#[derive(Debug)]
struct Note {
    file: Range<u64>,
    alignment: usize,
}

/// Little-endian fields of a header. Callers have checked its length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|n| self.0[offset + n])
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}

impl Elf {
    /// Reads the headers from the first [`PREFIX`] bytes (or fewer) of a file of `size` bytes.
    pub(crate) fn parse(prefix: &[u8], size: u64) -> Result<Self, Error> {
        if !prefix.starts_with(MAGIC) {
            return Err(Error::ElfFormat("it does not begin with 0x7F `ELF`"));
        }
        let Some(header) = prefix.get(..HEADER_SIZE) else {
            return Err(Error::Truncated {
                what: "ELF header",
                end: HEADER_SIZE as u64,
                size,
            });
        };
        let header = Fields(header);
        let [class, data] = header.bytes(4);
        let format = [
            (class != 2, "it is a 32-bit file"),
            (data != 1, "it is big-endian"),
            (header.u16(18) != 62, "it is for another architecture"),
            (!matches!(header.u16(16), 2 | 3), "it is not executable"),
        ];
        if let Some((_, why)) = format.into_iter().find(|(wrong, _)| *wrong) {
            return Err(Error::ElfFormat(why));
        }

        let wrong = |why| Error::Elf {
            what: "header",
            why,
        };
        let (offset, count) = (header.u64(32), header.u16(56) as usize);
        if count == 0 {
            return Err(wrong("it has no program headers"));
        }
        if header.u16(54) as usize != PROGRAM_HEADER_SIZE {
            return Err(wrong("its program headers have a size other than 56 bytes"));
        }
        let length = count * PROGRAM_HEADER_SIZE;
        let end = offset.checked_add(length as u64);
        let end = end.ok_or_else(|| wrong("the program headers lie beyond 64 bits"))?;
        if end > size {
            let what = "ELF program header table";
            return Err(Error::Truncated { what, end, size });
        }
        let Some(table) = prefix.get(offset as usize..end as usize) else {
            return Err(wrong(
                "the program headers lie beyond the first 64 KiB of the file",
            ));
        };
        let mut elf = Self {
            entry: header.u64(24),
            segments: Vec::new(),
            notes: Vec::new(),
        };
        for header in table.chunks_exact(PROGRAM_HEADER_SIZE) {
            elf.add(&Fields(header), size)?;
        }
        if elf.segments.is_empty() {
            return Err(wrong("it has no segments to load"));
        }
        Ok(elf)
    }

    fn add(&mut self, header: &Fields<'_>, size: u64) -> Result<(), Error> {
        let kind = header.u32(0);
        if !matches!(kind, PT_LOAD | PT_NOTE) {
            return Ok(());
        }
        let wrong = |why| Error::Elf {
            what: "program header",
            why,
        };
        let [offset, address, file_size, memory_size, alignment] =
            [8, 24, 32, 40, 48].map(|at| header.u64(at));
        let end = offset.checked_add(file_size);
        let end = end.ok_or_else(|| wrong("the segment's file offset exceeds 64 bits"))?;
        if end > size {
            let what = "ELF segment";
            return Err(Error::Truncated { what, end, size });
        }
        if kind == PT_NOTE {
            self.notes.push(Note {
                file: offset..end,
                alignment: if alignment == 8 { 8 } else { 4 },
            });
            return Ok(());
        }
        if file_size > memory_size {
            return Err(wrong("the segment is larger in the file than in memory"));
        }
        if address.checked_add(memory_size).is_none() {
            return Err(wrong("the segment's address exceeds 64 bits"));
        }
        if memory_size > 0 {
            self.segments.push(Segment {
                offset,
                file_size,
                address,
                memory_size,
            });
        }
        Ok(())
    }

    /// Takes the memory of all segments.
    pub(crate) fn place(&self, places: &mut Places) -> Result<(), Error> {
        for segment in &self.segments {
            places.take("a segment of the kernel", segment.memory())?;
        }
        Ok(())
    }

    /// The entry point, if it is the physical address of something in a segment. It may be a
    /// virtual one in files that have another way in.
    pub(crate) fn entry(&self) -> Result<u64, Error> {
        self.check_entry(self.entry)
    }

    fn check_entry(&self, entry: u64) -> Result<u64, Error> {
        let inside = self.segments.iter().any(|s| s.memory().contains(&entry));
        if inside && entry < layout::MAPPED_END {
            Ok(entry)
        } else {
            Err(Error::Entry(entry))
        }
    }

    /// The address in the PVH note, if there is one.
    pub(crate) fn pvh_entry(&self, file: &Source<'_>) -> Result<Option<u32>, Error> {
        for note in &self.notes {
            if note.file.end - note.file.start > NOTES_MAX {
                continue;
            }
            let bytes = file.bytes(note.file.clone())?;
            if let Some(entry) = find_pvh_entry(&bytes, note.alignment) {
                return self.check_entry(entry).map(|entry| Some(entry as u32));
            }
        }
        Ok(None)
    }
}

/// Looks for the note `Xen`, `PHYS32_ENTRY`. A list that is damaged ends where it is.
fn find_pvh_entry(mut notes: &[u8], alignment: usize) -> Option<u64> {
    const NOTE_HEADER: usize = 12;
    while let Some((header, rest)) = notes.split_at_checked(NOTE_HEADER) {
        let header = Fields(header);
        let [name_size, value_size, kind] = [0, 4, 8].map(|at| header.u32(at));
        // What is aligned is the distance from the header's beginning, not from its end.
        let aligned = |at: usize| (NOTE_HEADER + at).next_multiple_of(alignment) - NOTE_HEADER;
        let value_at = aligned(name_size as usize);
        let name = rest.get(..name_size as usize)?;
        let value = rest.get(value_at..)?.get(..value_size as usize)?;
        if name == b"Xen\0" && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            return match value.len() {
                4 => Some(Fields(value).u32(0).into()),
                8 => Some(Fields(value).u64(0)),
                _ => None,
            };
        }
        notes = rest.get(aligned(value_at + value_size as usize)..)?;
    }
    None
}
