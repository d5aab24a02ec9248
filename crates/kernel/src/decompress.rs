//! Unpacks what kernels and modules come compressed with, never into more than a limit.
//!
//! The format is told by its first bytes, as the kernel itself does (`lib/decompress.c`). Bytes after the end of the
//! stream are ignored: a kernel's payload carries its own unpacked size behind it.

use std::io::{self, Read};

use xz2::stream::Stream;

/// How much memory xz and lzma may take: the kernel's own images use a 128 MiB dictionary at most.
const LZMA_MEMORY: u64 = 256 << 20;
/// How much one block of the legacy LZ4 format unpacks to (`LEGACY_BLOCKSIZE` in lz4's `lz4io.c`).
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// Why bytes cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// The first bytes are of no known format.
    #[error("cannot tell how the data is compressed: it starts with {start}")]
    Unknown {
        /// The first bytes, in hex.
        start: String,
    },
    /// A format that is known and not supported.
    #[error("{format} compression is not supported")]
    Unsupported {
        /// Its name.
        format: &'static str,
    },
    /// It unpacks to too much.
    #[error("{format} data unpacks to more than {limit} bytes")]
    TooLarge {
        /// The name of the format.
        format: &'static str,
        /// The most that is allowed.
        limit: usize,
    },
    /// The stream is damaged or cut off.
    #[error("{format} data is damaged")]
    Damaged {
        /// The name of the format.
        format: &'static str,
        /// What the decoder said.
        #[source]
        source: io::Error,
    },
}

/// Unpacks `data` into at most `limit` bytes.
pub(crate) fn decompress(data: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    let damaged = |format| move |source| DecompressError::Damaged { format, source };
    match data {
        [0x1f, 0x8b, ..] => read_all("gzip", flate2::bufread::GzDecoder::new(data), limit),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream = Stream::new_stream_decoder(LZMA_MEMORY, 0)
                .map_err(io::Error::from)
                .map_err(damaged("xz"))?;
            read_all("xz", xz2::bufread::XzDecoder::new_stream(data, stream), limit)
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(data).map_err(damaged("zstd"))?;
            read_all("zstd", decoder.single_frame(), limit)
        }
        [0x5d, 0, 0, ..] => {
            let stream = Stream::new_lzma_decoder(LZMA_MEMORY)
                .map_err(io::Error::from)
                .map_err(damaged("lzma"))?;
            read_all("lzma", xz2::bufread::XzDecoder::new_stream(data, stream), limit)
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4_legacy(blocks, limit),
        [b'B', b'Z', b'h', ..] => Err(DecompressError::Unsupported { format: "bzip2" }),
        [0x89, b'L', b'Z', b'O', ..] => Err(DecompressError::Unsupported { format: "LZO" }),
        _ => Err(DecompressError::Unknown {
            start: hex::encode(&data[..data.len().min(6)]),
        }),
    }
}

fn read_all(format: &'static str, reader: impl Read, limit: usize) -> Result<Vec<u8>, DecompressError> {
    let mut unpacked = Vec::new();
    reader
        .take(limit as u64 + 1)
        .read_to_end(&mut unpacked)
        .map_err(|source| DecompressError::Damaged { format, source })?;
    if unpacked.len() > limit {
        return Err(DecompressError::TooLarge { format, limit });
    }
    Ok(unpacked)
}

/// Blocks of a little-endian length and that many bytes, each unpacking to 8 MiB, the last one to less.
fn lz4_legacy(mut data: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    const FORMAT: &str = "lz4";
    let damaged = |why: String| DecompressError::Damaged {
        format: FORMAT,
        source: io::Error::new(io::ErrorKind::InvalidData, why),
    };
    let mut unpacked = Vec::new();
    let mut block = vec![0; LZ4_LEGACY_BLOCK];
    // Only the unpacked size, four bytes, may follow the last block; it cannot be told from a block's length other than
    // by the data ending behind it.
    while let Some((length, rest)) = data.split_first_chunk::<4>() {
        if rest.is_empty() && !unpacked.is_empty() {
            break;
        }
        let length = u32::from_le_bytes(*length) as usize;
        let packed = rest
            .get(..length)
            .ok_or_else(|| damaged("it ends within a block".into()))?;
        let size =
            lz4_flex::block::decompress_into(packed, &mut block).map_err(|e| damaged(e.to_string()))?;
        if unpacked.len() + size > limit {
            return Err(DecompressError::TooLarge {
                format: FORMAT,
                limit,
            });
        }
        unpacked.extend_from_slice(&block[..size]);
        data = &rest[length..];
        if size < LZ4_LEGACY_BLOCK {
            break;
        }
    }
    if unpacked.is_empty() {
        return Err(damaged("it holds no block".into()));
    }
    Ok(unpacked)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    pub(crate) fn xz(data: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        xz2::bufread::XzEncoder::new(data, 1)
            .read_to_end(&mut packed)
            .unwrap();
        packed
    }

    fn lzma(data: &[u8]) -> Vec<u8> {
        let stream = Stream::new_lzma_encoder(&xz2::stream::LzmaOptions::new_preset(1).unwrap()).unwrap();
        let mut packed = Vec::new();
        xz2::bufread::XzEncoder::new_stream(data, stream)
            .read_to_end(&mut packed)
            .unwrap();
        packed
    }

    pub(crate) fn zstd(data: &[u8]) -> Vec<u8> {
        zstd::encode_all(data, 1).unwrap()
    }

    fn lz4(data: &[u8]) -> Vec<u8> {
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        for block in data.chunks(LZ4_LEGACY_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed
    }

    type Pack = fn(&[u8]) -> Vec<u8>;
    const FORMATS: [(&str, Pack); 5] = [
        ("gzip", gzip),
        ("xz", xz),
        ("zstd", zstd),
        ("lzma", lzma),
        ("lz4", lz4),
    ];

    #[test]
    fn every_format_unpacks_with_its_size_behind_it_and_within_the_limit() {
        // More than one legacy LZ4 block.
        let data: Vec<u8> = (0..LZ4_LEGACY_BLOCK as u32 / 4 + 9999)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect();
        for (name, pack) in FORMATS {
            let mut packed = pack(&data);
            packed.extend((data.len() as u32).to_le_bytes());
            assert_eq!(
                decompress(&packed, data.len()).unwrap().len(),
                data.len(),
                "{name}"
            );
            assert!(decompress(&packed, data.len()).unwrap() == data, "{name}");
            let error = decompress(&packed, data.len() - 1).unwrap_err();
            assert!(
                matches!(error, DecompressError::TooLarge { .. }),
                "{name}: {error:?}"
            );
            let error = decompress(&packed[..packed.len() / 2], data.len()).unwrap_err();
            assert!(
                matches!(error, DecompressError::Damaged { .. }),
                "{name}: {error:?}"
            );
        }
    }

    #[test]
    fn the_real_lz4_tool_writes_what_we_read() {
        let data: Vec<u8> = (0..3_000_000_u32).flat_map(|n| (n / 5).to_le_bytes()).collect();
        let dir = tempfile::tempdir().unwrap();
        let (plain, packed) = (dir.path().join("a"), dir.path().join("a.lz4"));
        std::fs::write(&plain, &data).unwrap();
        let Ok(status) = std::process::Command::new("lz4")
            .arg("-lq")
            .arg(&plain)
            .arg(&packed)
            .status()
        else {
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED: lz4 is not installed");
            }
            return;
        };
        assert!(status.success());
        assert!(decompress(&std::fs::read(&packed).unwrap(), data.len()).unwrap() == data);
    }

    #[test]
    fn what_is_no_stream_is_refused() {
        for (bytes, expected) in [
            (
                &b""[..],
                "cannot tell how the data is compressed: it starts with ",
            ),
            (
                b"plain text",
                "cannot tell how the data is compressed: it starts with 706c61696e20",
            ),
            (b"BZh9", "bzip2 compression is not supported"),
            (b"\x89LZO", "LZO compression is not supported"),
            (b"\x1f\x8b", "gzip data is damaged"),
            (b"\x02\x21\x4c\x18", "lz4 data is damaged"),
            (b"\x02\x21\x4c\x18\xff\xff\xff\xff", "lz4 data is damaged"),
        ] {
            assert_eq!(decompress(bytes, 1000).unwrap_err().to_string(), expected);
        }
    }

    proptest! {
        #[test]
        fn damaged_streams_never_exceed_the_limit(
            format in 0..FORMATS.len(), at in any::<prop::sample::Index>(), value in any::<u8>(),
        ) {
            let data = vec![7; 100_000];
            let mut packed = FORMATS[format].1(&data);
            let at = at.index(packed.len());
            packed[at] = value;
            if let Ok(unpacked) = decompress(&packed, data.len()) {
                prop_assert!(unpacked.len() <= data.len());
            }
        }
    }
}
