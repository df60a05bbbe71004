"""Load the tokenizer that the user names, from a file or the Hugging Face Hub, or train one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hgrn2.data.hub import hub_reachable
from hgrn2.data.model_files import ModelFiles, read_model_files, template_start
from hgrn2.data.tokenizer import (
    BYTES_FILE,
    BYTES_MARKER,
    EOT_NAMES,
    TOKENIZER_FILE,
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
)
from hgrn2.errors import UserError
from hgrn2.storage.json_files import parse_json

_BPE_REQUEST = re.compile(r"bpe:(\d+)")
# limit of a model's vocabulary too; for some larger values the library aborts the process
_MAX_TOKENS = 2**24
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def bpe_request(spec: object) -> int | None:
    """Return the vocabulary size in "bpe:4096", which asks for a trained tokenizer; None for anything else."""
    match = _BPE_REQUEST.fullmatch(spec) if isinstance(spec, str) else None
    if match is None:
        return None
    # int() refuses thousands of digits
    if len(match.group(1)) > 20:
        raise UserError(f"tokenizer {spec!r}: wanted a number of at most {_MAX_TOKENS}")
    return int(match.group(1))


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Train a byte-level BPE tokenizer; deterministic.

    Args:
        texts: the training texts, iterated once.
        vocab_size: number of tokens, including the 256 bytes and "<|endoftext|>" (id 0). A small corpus may give
            fewer.

    Raises:
        UserError: vocab_size is below 257 (the bytes and the end of text) or above 2^24.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small for a byte-level BPE; wanted at least 257")
    if vocab_size > _MAX_TOKENS:
        raise UserError(f"vocab_size {vocab_size} is too large for a byte-level BPE; wanted at most {_MAX_TOKENS}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return HFTokenizer(backend, f"bpe:{vocab_size}")


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: "bytes", a tokenizer.json, a directory that holds one or was written by `Tokenizer.save`, or the name
            of a model on the Hugging Face Hub. Offline, the name is looked up in the local cache.

    Raises:
        UserError: no usable tokenizer was found; the message says what was.

    Example:
        >>> load_tokenizer("bytes").vocab_size
        257
    """
    if not str(spec) or "\0" in str(spec):
        raise UserError(f"tokenizer {str(spec)!r}: names nothing; name a tokenizer.json, a folder with one, or 'bytes'")
    if spec == "bytes":
        return ByteTokenizer()
    if bpe_request(spec) is not None:
        raise UserError(
            f"tokenizer {spec!r} has yet to be trained; prepare data with it, or use train_bpe", "unsupported"
        )
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_directory(path)
    if path.is_file():
        return _load_file(path)
    looks_like_path = isinstance(spec, Path) or path.suffix in {".json", ".model"} or str(spec)[:1] in "./~"
    if looks_like_path or not _HUB_NAME.fullmatch(str(spec)):
        raise UserError(f"tokenizer {str(spec)!r}: no such file or directory", "not-found")
    return _load_hub(str(spec))


def _load_directory(path: Path) -> Tokenizer:
    # the folder of a byte tokenizer may hold an equivalent tokenizer.json for transformers
    if (path / BYTES_FILE).is_file():
        return _load_file(path / BYTES_FILE)
    if (path / TOKENIZER_FILE).is_file():
        return _load_file(path / TOKENIZER_FILE, read_model_files(path))
    sentencepiece = sorted(path.glob("*.model"))
    if sentencepiece:
        raise UserError(_sentencepiece_message(sentencepiece[0]), "unsupported")
    raise UserError(
        f"tokenizer {str(path)!r}: the directory holds no {TOKENIZER_FILE}; give one that does, or 'bytes'", "not-found"
    )


def _load_file(path: Path, about: ModelFiles | None = None) -> Tokenizer:
    if path.suffix == ".model":
        raise UserError(_sentencepiece_message(path), "unsupported")
    if path.suffix == ".gguf":
        write = f"AutoTokenizer.from_pretrained({str(path.parent)!r}, gguf_file={path.name!r}).save_pretrained('OUT')"
        raise UserError(
            f"tokenizer {str(path)!r} is a GGUF file; write a folder of it in Python, by transformers: {write}",
            "unsupported",
        )
    try:
        data = path.read_bytes()
        content = parse_json(data)
    except OSError as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}", "unreadable") from error
    except ValueError as error:
        raise UserError(
            f"tokenizer {str(path)!r} is not JSON ({error}); copy it again from where it came", "unreadable"
        ) from error
    if content == BYTES_MARKER:
        return ByteTokenizer()
    tokenizer = HFTokenizer.from_json(data.decode("utf-8-sig"), str(path), eot=about.eot if about else None)
    if about is not None:
        tokenizer.follow(
            about.eot, about.end_ids, template_start(tokenizer.backend) if about.begins_as_template else []
        )
    return tokenizer


def _load_hub(name: str) -> Tokenizer:
    from huggingface_hub import hf_hub_download

    online = hub_reachable()
    try:
        path = hf_hub_download(name, TOKENIZER_FILE, local_files_only=not online)
    except Exception as error:  # connection, permission and missing-file errors come from several libraries
        if not online:
            raise UserError(
                f"tokenizer {name!r}: no such file, not in the local cache, and the Hugging Face Hub cannot "
                "be reached (offline); connect, or give a tokenizer.json or 'bytes'",
                "unavailable",
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer {name!r}: no such file, and no {TOKENIZER_FILE} from the Hugging Face Hub: {reason}",
            "not-found",
        ) from error
    return HFTokenizer.from_json(Path(path).read_text(encoding="utf-8"), name)


def _sentencepiece_message(path: Path) -> str:
    return (
        f"tokenizer {str(path)!r} is a SentencePiece model, which tokenizers cannot read; convert "
        "it to tokenizer.json with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder, or None if it has none."""
    try:
        return load_tokenizer(folder)
    except UserError:
        if any(folder.glob("*tokenizer.json")):
            raise
        return None


def check_same_tokens(own: Tokenizer | None, data: Tokenizer, what: str) -> None:
    """Raise UserError if a model has a tokenizer and the data is in other tokens.

    Args:
        own: the model's; None where it has none, and the vocabulary's size is all there is to compare.
        data: the data's.
        what: the model, for the message.
    """
    if own is not None and own.fingerprint() != data.fingerprint():
        raise UserError(f"{what}: knows other tokens than those of the data ({data.name!r}); use its own tokenizer")
