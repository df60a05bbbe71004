from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hgrn2.data.tokens import TokenDataset


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory) -> Callable[..., TokenDataset]:
    """Builds a byte dataset from documents, each a text or a list of pieces."""
    # here, so that tests are collected without the extras
    import numpy as np

    from hgrn2.data.encode import EncodedPiece
    from hgrn2.data.tokenizer import ByteTokenizer
    from hgrn2.data.tokens import TokenDataset
    from hgrn2.data.writer import TokenWriter

    def make(documents: Iterable[str | list[str]], shard_tokens: int = 1 << 20) -> TokenDataset:
        directory = tmp_path_factory.mktemp("tokens") / "set"
        tokenizer = ByteTokenizer()
        writer = TokenWriter(directory, tokenizer, shard_tokens)
        for document in documents:
            pieces = [document] if isinstance(document, str) else document
            for index, piece in enumerate(pieces):
                tokens = tokenizer.encode_batch([piece])[0].astype(np.uint16)
                writer.add(EncodedPiece(tokens, len(tokens)), starts_document=index == 0)
        writer.close()
        return TokenDataset.open(directory)

    return make


@pytest.fixture
def corpus_dir(tmp_path):
    """A folder of 40 small text files."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for i in range(40):
        name = f"sub/{i:02d}.txt" if i % 3 else f"{i:02d}.txt"
        (folder / name).write_text(f"document number {i}\nwith é and {'x' * i}\n", encoding="utf-8")
    return folder
