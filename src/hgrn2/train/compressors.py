"""Bits per byte of general-purpose compressors, for comparison with a model."""

from __future__ import annotations

import lzma
import zlib

from hgrn2.data.tokenizer import Tokenizer
from hgrn2.data.tokens import TokenDataset

# wbits for gzip's format: deflate with a 2^15 window, header and checksum
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


def compressed_bits(dataset: TokenDataset, tokenizer: Tokenizer) -> tuple[dict[str, float], int]:
    """Return the bits per byte of gzip -9 and xz -9 for the text of a dataset, and the bytes of the text.

    Args:
        dataset: text as tokens; its concatenated documents are compressed.
        tokenizer: the tokenizer that made them.
    """
    compressors = {
        "gzip -9": zlib.compressobj(9, zlib.DEFLATED, _GZIP_WINDOW),
        "xz -9": lzma.LZMACompressor(preset=9),
    }
    sizes = dict.fromkeys(compressors, 0)
    num_text_bytes = 0
    for index in range(dataset.num_documents):
        text = tokenizer.decode(dataset.document_tokens(index)).encode("utf-8")
        num_text_bytes += len(text)
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(text))
    bits = {name: 8 * (sizes[name] + len(made.flush())) / max(num_text_bytes, 1) for name, made in compressors.items()}
    return bits, num_text_bytes
