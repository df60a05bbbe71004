"""Sizes of a text under general-purpose compressors, to compare with a model's bits per byte."""

from __future__ import annotations

import lzma
import zlib

from hgrn2.data.tokenizer import Tokenizer
from hgrn2.data.tokens import TokenDataset

# gzip's format: deflate in a window of 2^15 with a header and a checksum
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


def compressed_bits(dataset: TokenDataset, tokenizer: Tokenizer) -> tuple[dict[str, float], int]:
    """Return the bits per byte that gzip -9 and xz -9 need for all text of a dataset, and the bytes of the text.

    Args:
        dataset: text as tokens; its documents are compressed end to end.
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
