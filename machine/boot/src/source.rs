//! Reading the files.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, ReadVolatile};

use crate::Error;

/// A file whose size is known.
pub(crate) struct Source<'a> {
    name: &'static str,
    file: &'a File,
    pub(crate) size: u64,
}

impl<'a> Source<'a> {
    pub(crate) fn new(name: &'static str, file: &'a File) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(|source| Error::Read {
            file: name,
            offset: 0,
            source,
        })?;
        if !metadata.is_file() {
            return Err(Error::NotAFile(name));
        }
        if metadata.len() == 0 {
            return Err(Error::Empty(name));
        }
        Ok(Self {
            name,
            file,
            size: metadata.len(),
        })
    }

    fn failed(&self, offset: u64) -> impl FnOnce(io::Error) -> Error + use<> {
        let file = self.name;
        move |source| Error::Read {
            file,
            offset,
            source,
        }
    }

    /// The first `length` bytes, or the whole file if it is shorter.
    pub(crate) fn prefix(&self, length: usize) -> Result<Vec<u8>, Error> {
        let length = self.size.min(length as u64);
        self.bytes(0..length)
    }

    /// A part of the file, which must lie in it.
    pub(crate) fn bytes(&self, range: Range<u64>) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file
            .read_exact_at(&mut bytes, range.start)
            .map_err(self.failed(range.start))?;
        Ok(bytes)
    }

    /// Reads a part of the file from its beginning to its end.
    pub(crate) fn window(&self, range: Range<u64>) -> Window<'a> {
        Window {
            file: self.file,
            range,
        }
    }

    /// Reads a part of the file straight into guest memory.
    pub(crate) fn copy(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        address: u64,
        length: u64,
    ) -> Result<(), Error> {
        let mut file = self.file;
        file.seek(SeekFrom::Start(offset))
            .map_err(self.failed(offset))?;
        let inaccessible = |source| Error::GuestMemory { address, source };
        let slices = memory
            .get_slices(GuestAddress(address), length as usize, Permissions::Write)
            .map_err(inaccessible)?;
        for slice in slices {
            let mut slice = slice.map_err(inaccessible)?;
            file.read_exact_volatile(&mut slice)
                .map_err(|source| self.failed(offset)(io::Error::other(source)))?;
        }
        Ok(())
    }
}

/// A part of a file as a stream.
pub(crate) struct Window<'a> {
    file: &'a File,
    range: Range<u64>,
}

impl Window<'_> {
    /// Bytes that are left.
    pub(crate) fn left(&self) -> u64 {
        self.range.end - self.range.start
    }
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.left().min(buffer.len() as u64) as usize;
        let read = self.file.read_at(&mut buffer[..length], self.range.start)?;
        self.range.start += read as u64;
        Ok(read)
    }
}
