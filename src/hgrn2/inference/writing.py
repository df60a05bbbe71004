"""Write text with a model: sampling, stop strings, and a state that can be saved and continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hgrn2.data.text_stream import TextStream
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM, ModelState
from hgrn2.models.sampling import PREFILL_TOKENS, Sampling, sample
from hgrn2.storage.json_files import parse_json
from hgrn2.storage.staging import check_writable_file, staged_file

_STATE_FORMAT = "hgrn2-state-3"
# without a checksum and the recent tokens
_OLD_STATE_FORMAT = "hgrn2-state-2"
# enough to know whether a word was begun, and how
_RECENT_TOKENS = 32
EndedBy = Literal["length", "stop", "end-of-text"]
# numbers of each tensor by which models are told apart
_SAMPLED = 64


def _first(texts: Sequence[str], where: str) -> int | None:
    """Return the position of the first occurrence of any text, or None."""
    return min((at for text in texts if (at := where.find(text)) >= 0), default=None)


def space_warning(tokenizer: Tokenizer, prompt: str) -> str | None:
    """Say in one line that a prompt ends in a space which belongs to the word after it; None if it does not.

    Many vocabularies hold " word" as one token; after a space of its own, a model has seldom seen the start of a word.
    """
    if tokenizer.splits_anywhere or not prompt.endswith(" ") or not prompt.strip():
        return None
    last = tokenizer.encode(prompt)[-1:]
    if tokenizer.decode(last).strip() or tokenizer.encode(prompt) == tokenizer.encode(prompt.rstrip(" ")):
        return None
    return "the prompt ends in a space, which this tokenizer writes as part of the next word; leave the space out"


def _fingerprint(model: HGRN2LM) -> str:
    """Tells models apart by their settings and the first numbers of each tensor, which training changes."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, x in model.named_parameters():
        # in one dtype, as a state goes from one to another
        some = x.detach().flatten()[:_SAMPLED].to("cpu", torch.bfloat16)
        digest.update(name.encode() + bytes(some.view(torch.uint8).tolist()))
    return digest.hexdigest()


class Writer:
    """Read prompts and write after them, with everything read and written kept in the state.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        sampling: how tokens are drawn.

    Attributes:
        num_written: tokens that the last `write` drew, the one that ended the text included.
        ended_by: what ended it: "length" (max_tokens), "stop" (a stop text) or "end-of-text".
    """

    def __init__(self, model: HGRN2LM, tokenizer: Tokenizer, sampling: Sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = model.lm_head.weight.device
        self.generator = torch.Generator(self.device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.state = model.init_state(1)
        # tokens that belong to the text but not yet to the state
        self.pending = list(tokenizer.start_ids)
        # the last tokens of the text so far: what comes next is spelt after them
        self.recent: list[int] = []
        self.seen = torch.zeros((1, tokenizer.vocab_size), dtype=torch.bool, device=self.device)
        self.num_written = 0
        self.ended_by: EndedBy = "length"

    def write(self, prompt: str, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Continue a prompt, piece by piece as it is written.

        Args:
            prompt: text to continue; may be empty. It continues the text that was read or written before.
            max_tokens: most tokens to write.
            stop: texts that end the writing; they are not yielded.

        Yields:
            Text, always whole characters. Ends at max_tokens, a stop text or a token that ends a text. Joined after the
            prompt, the text is what the tokenizer makes of all the tokens together.

        Raises:
            UserError: a stop text is empty.
        """
        if "" in stop:
            raise UserError("generate: a stop text is empty; leave it out")
        ids = self.tokenizer.continue_text(prompt, self.tokenizer.decode(self.recent))
        self.pending += ids
        self._remember(ids)
        # words that the vocabulary lacks are text too, though they decode to nothing
        after_text = bool(prompt.strip()) or self.tokenizer.count_unknown(np.array(self.recent, np.int64)) > 0
        decoder = TextStream(self.tokenizer, self.recent, after_text=after_text)
        self.num_written, self.ended_by = 0, "length"
        held = ""
        # enough characters are held back that a stop text never shows its beginning
        longest = max((len(text) for text in stop), default=0)
        for _ in range(max_tokens):
            token = int(sample(self._read(), self.sampling, self.seen, self.generator))
            self.pending = [token]
            self.num_written += 1
            if token in self.tokenizer.end_ids:
                self.recent, self.ended_by = [], "end-of-text"
                break
            self._remember([token])
            held += decoder.push(token)
            shown = held + decoder.peek() if stop else held
            cut = _first(stop, shown)
            if cut is not None:
                self.ended_by = "stop"
                yield shown[:cut]
                return
            free = len(held) - max(longest - 1, 0)
            if free > 0:
                yield held[:free]
                held = held[free:]
        held += decoder.flush()
        cut = _first(stop, held)
        if cut is not None:
            self.ended_by = "stop"
            held = held[:cut]
        if held:
            yield held

    def _remember(self, ids: Sequence[int]) -> None:
        self.recent = [*self.recent, *ids][-_RECENT_TOKENS:]

    @torch.no_grad()
    def _read(self) -> Tensor:
        """Read what is pending into the state; return logits [1, tokens the tokenizer knows]."""
        tokens = torch.tensor([self.pending], device=self.device)
        self.seen[0, tokens[0]] = True
        for part in tokens.split(PREFILL_TOKENS, 1):
            x, self.state = self.model.hidden_states(part, self.state)
        self.pending = []
        logits = self.model.lm_head(x[:, -1])[:, : self.tokenizer.vocab_size]
        if not bool(logits.isfinite().all()):
            raise UserError("generate: the model's outputs are not finite; use another checkpoint", "not-finite")
        return logits

    def save_state(self, path: Path) -> None:
        """Write the state whole or not at all; `load_state` continues from it."""
        about = {
            "format": _STATE_FORMAT, "pending": self.pending, "recent": self.recent,
            "tokenizer": self.tokenizer.fingerprint(), "model": _fingerprint(self.model),
        }  # fmt: skip
        tensors = self.state.tensors() | {"seen": self.seen, "generator": self.generator.get_state()}
        tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
        check_writable_file(path)
        try:
            with staged_file(path) as partial:
                save_file(tensors, partial, {"hgrn2": json.dumps(about), "sha256": _digest(about, tensors)})
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: the state cannot be written ({error}); name another file or free some space", "unwritable"
            ) from None

    def load_state(self, path: Path) -> None:
        """Continue from a saved state.

        Raises:
            UserError: the file is missing, damaged, or of another model or tokenizer.
        """
        about, tensors = _read_state_file(path)
        if about.get("tokenizer") != self.tokenizer.fingerprint():
            raise UserError(f"{path}: made with another tokenizer; name the model it was made with", "mismatch")
        if about.get("model") != _fingerprint(self.model):
            raise UserError(f"{path}: made with another model; name the model it was made with", "mismatch")
        bad = UserError(f"{path}: incomplete or damaged; name a file made with --state-out", "damaged")
        try:
            seen, generator = tensors.pop("seen"), tensors.pop("generator")
            pending, recent = about["pending"], about.get("recent", [])
            state = ModelState.from_tensors(tensors).check_like(self.state)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise bad from None
        if not self._is_text(pending) or not pending or not self._is_text(recent):
            raise bad
        if seen.shape != self.seen.shape or seen.dtype != torch.bool:
            raise bad
        if not all(bool(x.isfinite().all()) for x in state.tensors().values()):
            raise UserError(
                f"{path}: holds numbers that are not finite; name a file made with --state-out", "not-finite"
            )
        # a seed replaces the saved generator; a generator of another device type cannot be restored
        if self.sampling.seed is None and generator.shape == self.generator.get_state().shape:
            try:
                draws = torch.rand(4, generator=torch.Generator(self.device).set_state(generator), device=self.device)
            except (RuntimeError, TypeError):
                raise bad from None
            # an all-zero state draws the same number forever
            if bool((draws == draws[0]).all()):
                raise bad
            self.generator.set_state(generator)
        elif generator.dtype != torch.uint8 or generator.dim() != 1:
            raise bad
        if not recent and "recent" not in about:
            # files of earlier versions hold no other tokens of the text
            recent = [token for token in pending if token not in self.tokenizer.end_ids]
        self.state, self.seen, self.pending, self.recent = state, seen.to(self.device), pending, recent

    def _is_text(self, ids: Any) -> bool:
        known = range(self.tokenizer.vocab_size)
        return isinstance(ids, list) and all(type(token) is int and token in known for token in ids)


def _read_state_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the description and the tensors of a state file, verified by its checksum."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = parse_json(metadata.get("hgrn2", "{}"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: no state can be read from it ({error}); name a file made with --state-out", "unreadable"
        ) from None
    if not isinstance(about, dict) or about.get("format") not in (_STATE_FORMAT, _OLD_STATE_FORMAT):
        raise UserError(f"{path}: not a state of this version; name a file made with --state-out", "version")
    digest = metadata.get("sha256")
    if digest is None and about["format"] == _OLD_STATE_FORMAT:
        return about, tensors
    if digest != _digest(about, tensors):
        raise UserError(
            f"{path}: damaged or edited (its content does not match its checksum); name another made with --state-out",
            "damaged",
        )
    return about, tensors


def _digest(about: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of everything in a state file."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
