"""Generate text with a model: sampling, stop strings, and a state that can be saved and continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM, ModelState
from hgrn2.models.fingerprint import fingerprint
from hgrn2.models.sampling import Sampling, sample
from hgrn2.serve.reading import PlainReader, Reader
from hgrn2.serve.text import CONTEXT_TOKENS, StoppableText
from hgrn2.storage.tensor_files import read_tensors, write_tensors

_STATE_FORMAT = "hgrn2-state-3"
# has no checksum and no recent tokens
_OLD_STATE_FORMAT = "hgrn2-state-2"
EndedBy = Literal["length", "stop", "end-of-text"]
_REMEDY = "name a file made with --state-out"


def space_warning(tokenizer: Tokenizer, prompt: str) -> str | None:
    """Return a one-line warning if a prompt ends in a space that belongs to the next word's token; otherwise None.

    Many vocabularies have " word" as one token. In their training data a separate space rarely precedes a word.
    """
    if tokenizer.splits_anywhere or not prompt.endswith(" ") or not prompt.strip():
        return None
    last = tokenizer.encode(prompt)[-1:]
    if tokenizer.decode(last).strip() or tokenizer.encode(prompt) == tokenizer.encode(prompt.rstrip(" ")):
        return None
    return "the prompt ends in a space, which this tokenizer writes as part of the next word; leave the space out"


class Writer:
    """Generate text after prompts; the state keeps everything read and written so far.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer.
        sampling: how tokens are sampled.
        reader: reads the tokens, such as `hgrn2.serve.reading.fast_reader(model)`; None for the model's forward pass.

    Attributes:
        num_written: number of tokens sampled by the last `write`, including the token that ended the text.
        ended_by: why the last `write` stopped: "length" (max_tokens), "stop" (a stop text) or "end-of-text".
    """

    def __init__(self, model: HGRN2LM, tokenizer: Tokenizer, sampling: Sampling, reader: Reader | None = None):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = model.lm_head.weight.device
        self.generator = torch.Generator(self.device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.reader = PlainReader(model) if reader is None else reader
        # tokens of the text that the model has not read yet
        self.pending = list(tokenizer.start_ids)
        # the last tokens of the text, as context for decoding the next ones
        self.recent: list[int] = []
        self.seen = torch.zeros((1, tokenizer.vocab_size), dtype=torch.bool, device=self.device)
        self.num_written = 0
        self.ended_by: EndedBy = "length"

    @property
    def state(self) -> ModelState:
        """The state after the tokens read."""
        return self.reader.state

    def write(self, prompt: str, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Continue a prompt and yield the text as it is generated.

        Args:
            prompt: text to continue, appended to everything read or written before; may be empty.
            max_tokens: maximum number of tokens to generate.
            stop: texts that end the generation; they are not yielded.

        Yields:
            Text in whole characters, until max_tokens, a stop text or an end token. Appended to the prompt, it equals
            the decoding of all tokens together.

        Raises:
            UserError: a stop text is empty.
        """
        ids = self.tokenizer.continue_text(prompt, self.tokenizer.decode(self.recent))
        after = [*self.recent, *ids][-CONTEXT_TOKENS:]
        text = StoppableText(self.tokenizer, after, stop, after_text=bool(prompt.strip()))
        self.pending += ids
        self._remember(ids)
        self.num_written, self.ended_by = 0, "length"
        for _ in range(max_tokens):
            token = int(sample(self._read(), self.sampling, self.seen, self.generator))
            self.pending = [token]
            self.num_written += 1
            if token in self.tokenizer.end_ids:
                self.recent, self.ended_by = [], "end-of-text"
                break
            self._remember([token])
            if piece := text.push(token):
                yield piece
            if text.is_stopped:
                self.ended_by = "stop"
                return
        piece = text.flush()
        if text.is_stopped:
            self.ended_by = "stop"
        if piece:
            yield piece

    def _remember(self, ids: Sequence[int]) -> None:
        self.recent = [*self.recent, *ids][-CONTEXT_TOKENS:]

    def _read(self) -> Tensor:
        """Feed the pending tokens to the model; return logits [1, vocab_size of the tokenizer]."""
        self.seen[0, torch.tensor(self.pending, device=self.device)] = True
        logits = self.reader.read(self.pending)[:, : self.tokenizer.vocab_size]
        self.pending = []
        if not bool(logits.isfinite().all()):
            raise UserError("generate: the model's outputs are not finite; use another checkpoint", "not-finite")
        return logits

    def save_state(self, path: Path) -> None:
        """Write the state to a file atomically; `load_state` continues from it.

        Args:
            path: the file to write.

        Raises:
            UserError: the file cannot be written.
        """
        about = {
            "format": _STATE_FORMAT, "pending": self.pending, "recent": self.recent,
            "tokenizer": self.tokenizer.fingerprint(), "model": fingerprint(self.model),
        }  # fmt: skip
        tensors = self.reader.state.tensors() | {"seen": self.seen, "generator": self.generator.get_state()}
        write_tensors(path, about, {name: x.cpu().contiguous() for name, x in tensors.items()})

    def load_state(self, path: Path) -> None:
        """Continue from a saved state.

        Raises:
            UserError: the file is missing, damaged, or belongs to another model or tokenizer.
        """
        about, tensors = read_tensors(path, (_STATE_FORMAT, _OLD_STATE_FORMAT), _REMEDY, (_OLD_STATE_FORMAT,))
        if about.get("tokenizer") != self.tokenizer.fingerprint():
            raise UserError(f"{path}: made with another tokenizer; name the model it was made with", "mismatch")
        if about.get("model") != fingerprint(self.model):
            raise UserError(f"{path}: made with another model; name the model it was made with", "mismatch")
        bad = UserError(f"{path}: incomplete or damaged; name a file made with --state-out", "damaged")
        try:
            seen, generator = tensors.pop("seen"), tensors.pop("generator")
            pending, recent = about["pending"], about.get("recent", [])
            state = ModelState.from_tensors(tensors).check(self.model.state_spec(), 1).to(self.device)
        except UserError as error:
            raise UserError(f"{path}: {error}", error.code) from None
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
        # an explicit seed replaces the saved generator; a generator of another device type cannot be restored
        if self.sampling.seed is None and generator.shape == self.generator.get_state().shape:
            try:
                draws = torch.rand(4, generator=torch.Generator(self.device).set_state(generator), device=self.device)
            except (RuntimeError, TypeError):
                raise bad from None
            # a generator with an all-zero state returns the same number forever
            if bool((draws == draws[0]).all()):
                raise bad
            self.generator.set_state(generator)
        elif generator.dtype != torch.uint8 or generator.dim() != 1:
            raise bad
        if not recent and "recent" not in about:
            # files of earlier versions have only the pending tokens
            recent = [token for token in pending if token not in self.tokenizer.end_ids]
        self.reader.state, self.seen, self.pending, self.recent = state, seen.to(self.device), pending, recent

    def _is_text(self, ids: Any) -> bool:
        known = range(self.tokenizer.vocab_size)
        return isinstance(ids, list) and all(type(token) is int and token in known for token in ids)
