"""Text to batches: sources, tokenizers, prepared token datasets, and iterators over them."""

from hgrn2.data.batches import Batch, PackedBatches, StreamBatches
from hgrn2.data.find_tokenizer import load_tokenizer, train_bpe
from hgrn2.data.prepare import PreparedData, is_prepared, prepare
from hgrn2.data.sequential import SequentialWindows, sequential_windows
from hgrn2.data.sources import Corpus, open_corpus
from hgrn2.data.text_stream import TextStream
from hgrn2.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from hgrn2.data.tokens import TokenDataset

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "HFTokenizer",
    "PackedBatches",
    "PreparedData",
    "SequentialWindows",
    "StreamBatches",
    "TextStream",
    "TokenDataset",
    "Tokenizer",
    "is_prepared",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "sequential_windows",
    "train_bpe",
]
