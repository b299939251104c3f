//! The compression formats of Linux kernels (Linux `scripts/Makefile.lib`, `init/Kconfig`).
//!
//! Every decoder is a stream: a payload that decompresses to more than the kernel in it needs is
//! not read further, and one that promises more memory than is there costs none.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::GzDecoder;
use liblzma::bufread::XzDecoder;
use liblzma::stream::Stream;
use ruzstd::decoding::StreamingDecoder;

use crate::source::Window;

/// Bytes of a payload that [`Format::of`] looks at.
pub(crate) const MAGIC_MAX: usize = 6;

/// Size of the reads from the file.
const INPUT_BUFFER: usize = 256 << 10;
/// Size of the writes to guest memory, for decoders that leave it open.
const OUTPUT_BUFFER: usize = 256 << 10;
/// Most memory that an xz or lzma stream may ask for. The kernel's build uses dictionaries of at
/// most 128 MiB.
const LZMA_MEMORY: u64 = 160 << 20;

/// A format that can be decompressed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Gzip,
    Xz,
    Lzma,
    Zstd,
    Lz4,
}

impl Format {
    /// Recognises a payload by its first [`MAGIC_MAX`] bytes.
    pub(crate) fn of(magic: &[u8]) -> Option<Self> {
        let formats: [(&[u8], Self); 5] = [
            (b"\x1F\x8B\x08", Self::Gzip),
            (b"\xFD7zXZ\0", Self::Xz),
            (b"\x5D\0\0", Self::Lzma),
            (b"\x28\xB5\x2F\xFD", Self::Zstd),
            (&LZ4_LEGACY_MAGIC.to_le_bytes(), Self::Lz4),
        ];
        let found = formats
            .into_iter()
            .find(|(start, _)| magic.starts_with(start));
        found.map(|(_, format)| format)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Zstd => "zstd",
            Self::Lz4 => "LZ4",
        }
    }

    /// Length of what the kernel's build puts after the compressed stream: the decompressed
    /// size, except for gzip, whose stream ends with it.
    pub(crate) fn trailer(self) -> u64 {
        if self == Self::Gzip { 0 } else { 4 }
    }

    /// A stream of the decompressed bytes.
    pub(crate) fn open(self, window: Window<'_>) -> io::Result<Box<dyn BufRead + '_>> {
        let buffered = |window| BufReader::with_capacity(INPUT_BUFFER, window);
        let decoder: Box<dyn Read + '_> = match self {
            Self::Lz4 => return Ok(Box::new(Lz4Legacy::new(window)?)),
            Self::Gzip => Box::new(GzDecoder::new(buffered(window))),
            Self::Xz => {
                let stream = Stream::new_stream_decoder(LZMA_MEMORY, 0)?;
                Box::new(XzDecoder::new_stream(buffered(window), stream))
            }
            Self::Lzma => {
                let stream = Stream::new_lzma_decoder(LZMA_MEMORY)?;
                Box::new(XzDecoder::new_stream(buffered(window), stream))
            }
            Self::Zstd => {
                let stream = StreamingDecoder::new(buffered(window));
                Box::new(stream.map_err(io::Error::other)?)
            }
        };
        Ok(Box::new(BufReader::with_capacity(OUTPUT_BUFFER, decoder)))
    }
}

const LZ4_LEGACY_MAGIC: u32 = 0x184C_2102;
/// Decompressed size of every block but the last.
const LZ4_BLOCK: usize = 8 << 20;
/// Most that a block may have compressed: LZ4's bound for data that cannot be compressed.
const LZ4_COMPRESSED_MAX: usize = LZ4_BLOCK + LZ4_BLOCK / 255 + 16;

/// The legacy frame of LZ4 (LZ4 Frame Format Description, "Legacy frame"): a magic number, then
/// blocks, each behind its compressed size. Nothing marks the end but that of the input.
struct Lz4Legacy<'a> {
    window: Window<'a>,
    compressed: Vec<u8>,
    block: Vec<u8>,
    filled: usize,
    consumed: usize,
}

impl<'a> Lz4Legacy<'a> {
    fn new(mut window: Window<'a>) -> io::Result<Self> {
        // The format was recognised by it.
        window.read_exact(&mut [0; 4])?;
        Ok(Self {
            window,
            // Both at their largest: a buffer that grows leaves holes in the heap.
            compressed: Vec::with_capacity(LZ4_COMPRESSED_MAX),
            block: vec![0; LZ4_BLOCK],
            filled: 0,
            consumed: 0,
        })
    }

    fn next_block(&mut self) -> io::Result<()> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        self.filled = 0;
        self.consumed = 0;
        while self.filled == 0 && self.window.left() > 0 {
            let mut size = [0; 4];
            self.window.read_exact(&mut size)?;
            let size = u32::from_le_bytes(size);
            if size == LZ4_LEGACY_MAGIC {
                // Frames may follow one another.
                continue;
            }
            let length = size as usize;
            if length > LZ4_COMPRESSED_MAX {
                return Err(invalid(format!("a block claims to have {size} bytes")));
            }
            self.compressed.resize(length, 0);
            self.window.read_exact(&mut self.compressed)?;
            self.filled = lz4_flex::block::decompress_into(&self.compressed, &mut self.block)
                .map_err(|error| invalid(error.to_string()))?;
        }
        Ok(())
    }
}

impl Read for Lz4Legacy<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

impl BufRead for Lz4Legacy<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.consumed == self.filled {
            self.next_block()?;
        }
        Ok(&self.block[self.consumed..self.filled])
    }

    fn consume(&mut self, amount: usize) {
        self.consumed = (self.consumed + amount).min(self.filled);
    }
}
