"""Text to batches: sources, tokenizers, prepared token datasets, and iterators over batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hgrn2.data.find_tokenizer import load_tokenizer, train_bpe
from hgrn2.data.prepare import prepare
from hgrn2.data.prepared import PreparedData, is_prepared
from hgrn2.data.sources import Corpus, open_corpus
from hgrn2.data.text_stream import TextStream
from hgrn2.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from hgrn2.data.tokens import TokenDataset

if TYPE_CHECKING:
    from hgrn2.data.batches import Batch, PackedBatches, StreamBatches
    from hgrn2.data.sequential import SequentialWindows, sequential_windows

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

# these need torch; a process that only tokenises does not, so they are imported on first use
_WITH_TORCH = {
    "Batch": "batches",
    "PackedBatches": "batches",
    "SequentialWindows": "sequential",
    "StreamBatches": "batches",
    "sequential_windows": "sequential",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hgrn2.data.{_WITH_TORCH[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
