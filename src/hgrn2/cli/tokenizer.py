"""`hgrn2 tokenizer`: train a tokenizer."""

from __future__ import annotations

from pathlib import Path

import tyro

from hgrn2.cli.command import Command
from hgrn2.cli.parsing import Texts
from hgrn2.errors import UserError
from hgrn2.storage.staging import check_writable_folder, staged_directory


def tokenizer(
    out: tyro.conf.Positional[Path],
    data: Texts = ("stdlib",),
    vocab_size: int = 4096,
    text_field: str = "text",
) -> None:
    """Train a byte-level BPE tokenizer.

    Args:
        out: A new folder for tokenizer.json.
        data: Text files, folders, globs, .jsonl(.zst), .parquet, hf:NAME datasets, or stdlib.
        vocab_size: Tokens of the vocabulary, the 256 bytes and the end of text included.
        text_field: Key or column of the text in .jsonl, .parquet and datasets.
    """
    from hgrn2.data import open_corpus, train_bpe

    check_writable_folder(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists already; name another folder", "already-exists")
    pieces = (piece for document in open_corpus(data, text_field).documents() for piece in document.pieces)
    made = train_bpe(pieces, vocab_size)
    with staged_directory(out, replace=False) as stage:
        name = made.save(stage).name
    print(f"{out / name}: {made.vocab_size:,} tokens")


COMMAND = Command("tokenizer", tokenizer, order=70, aliases=("tokenize", "tokenise"))
