"""Our models as models of lm-evaluation-harness. Only this package imports lm_eval."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from hgrn2.data.tokenizer import Tokenizer
from hgrn2.data.transformers_files import TOKENIZER_CONFIG_FILE, write_transformers_files
from hgrn2.errors import UserError
from hgrn2.evaluation.messages import errors_only, one_line
from hgrn2.evaluation.scoring import NOT_FINITE, PIECE_TOKENS, Pair, Scored, affordable_rows, score_pairs
from hgrn2.hf.configuration import HGRN2Config
from hgrn2.hf.language import HGRN2ForCausalLM
from hgrn2.models import HGRN2LM

AUTO = "auto"

# the harness's decorators hide the types of the functions they wrap
_HFLM: Any = HFLM
_evaluate: Any = simple_evaluate


class HGRN2Harness(_HFLM):
    """The harness's model class for transformers, without its length limit: texts are never truncated.

    Contexts and documents of any length are read in pieces with carried state, which gives the same result as one
    pass. Logits are computed for continuations only, a bounded number at a time.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer. Its start tokens precede every context and, once, every document. An empty context or
            prompt becomes `prefix_token_id`, so that the first token has a predecessor.
        batch_size: rows read at a time; "auto" chooses by memory (`hgrn2.evaluation.scoring.affordable_rows`).

    Example:
        >>> import lm_eval                                                                  # doctest: +SKIP
        >>> lm = HGRN2Harness(*open_for_transformers(*hgrn2.load(run, "latest", "cpu"), run))   # doctest: +SKIP
        >>> lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])                           # doctest: +SKIP
    """

    def __init__(
        self, model: HGRN2ForCausalLM, tokenizer: PreTrainedTokenizerBase, batch_size: int | str = AUTO
    ) -> None:
        # the base class warns three times that it was given a model object
        with errors_only("lm_eval.models"):
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
            )

    @property
    def max_length(self) -> int:
        """A number beyond any text: there is no maximum length."""
        return 2**40

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each whole document, after the start token."""
        texts = [request.args[0] for request in requests]
        # with the tokenizer's own start token, the model would have to predict that as well
        documents = [self.tok_encode(text, add_special_tokens=False) for text in texts]
        pairs: list[Pair] = [((self.prefix_token_id,), document) for document in documents]
        found = self._score(pairs, "documents", disable_tqdm)
        for text, scored in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), scored.nats)
        return [scored.nats for scored in found]

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for texts, _, rest in requests:
            if not rest:
                raise UserError(
                    f"continuation {texts[1]!r} adds no token to its context {texts[0][-20:]!r}; start it with a space "
                    "(target_delimiter of the task)"
                )
        # the harness moves trailing white space of a context to the continuation, which may empty the context
        pairs: list[Pair] = [(context or (self.prefix_token_id,), rest) for _, context, rest in requests]
        found = self._score(pairs, "continuations", disable_tqdm)
        for (texts, *_), scored in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, (scored.nats, scored.is_greedy))
        return [(scored.nats, scored.is_greedy) for scored in found]

    def _score(self, pairs: list[Pair], what: str, disable_tqdm: bool) -> list[Scored]:
        # the score of an empty document
        found = [Scored(0.0, True)] * len(pairs)
        filled = [i for i, (_, rest) in enumerate(pairs) if rest]
        if not filled:
            return found
        rows = self._rows(max(len(context) + len(rest) for context, rest in pairs))
        with tqdm(total=len(filled), desc=f"Reading {what}", disable=disable_tqdm) as bar:
            for batch in score_pairs(self.model, [pairs[i] for i in filled], rows):
                for i, scored in batch:
                    found[filled[i]] = scored
                bar.update(len(batch))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate after prompts of any length; none is truncated.

        Raises:
            UserError: the model's outputs are not finite.
        """
        if not requests:
            return []
        asked = self.batch_size_per_gpu
        self.batch_size_per_gpu = self._rows(max(len(self.tok_encode(request.args[0])) or 1 for request in requests))
        try:
            # the harness would leave its own bar open, and an error message would start on the same line
            with tqdm(total=len(requests), desc="Writing", disable=disable_tqdm) as self._written:
                return super().generate_until(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = asked

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        piece = max(1, PIECE_TOKENS // context.shape[0])
        settings |= {"prefill_chunk_size": piece, "logits_processor": LogitsProcessorList([_Finite()])}
        found = super()._model_generate(context, max_length, stop, **settings)
        self._written.update(len(found))
        return found

    def tok_batch_encode(self, strings: list[str], *args: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token ids of prompts [R, T] and their mask [R, T], int64; empty prompts get the prefix token."""
        ids, mask = super().tok_batch_encode(strings, *args, **settings)
        if ids.shape[1] == 0:
            # torch makes an empty list a float tensor
            ids, mask = (torch.zeros(len(strings), 1, dtype=torch.long) for _ in range(2))
        # the harness pads on the left
        empty = mask.sum(1) == 0
        ids[empty, -1] = self.prefix_token_id
        mask[empty, -1] = 1
        return ids, mask

    def _rows(self, longest: int) -> int:
        if self.batch_size_per_gpu != AUTO:
            return int(self.batch_size_per_gpu)
        rows = affordable_rows(self.model, longest)
        # the harness reports the batch sizes it used with its results
        self.batch_sizes[len(self.batch_sizes)] = rows
        return rows


class _Finite(LogitsProcessor):
    """Raise on logits that are not finite; otherwise argmax of NaN would pass for an answer."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # suppressed tokens have -inf, so check the sum
        if not bool(scores.logsumexp(-1).isfinite().all()):
            raise UserError(NOT_FINITE, "not-finite")
        return scores


def open_for_transformers(
    own: HGRN2LM, tokenizer: Tokenizer, folder: Path
) -> tuple[HGRN2ForCausalLM, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer as classes of transformers; the weights are shared, not copied.

    Args:
        own: the model, on its device.
        tokenizer: its tokenizer.
        folder: the folder of the tokenizer. Settings for transformers in it take precedence: other models may start a
            text with another token than the end of text.

    Raises:
        UserError: transformers cannot read those settings.
    """
    theirs = _open_tokenizer(tokenizer, folder)
    ids = {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if ids["eos_token_id"] is None:
        ids["eos_token_id"] = tokenizer.eot_id
    with torch.device("meta"):
        model = HGRN2ForCausalLM(HGRN2Config(**own.config.to_dict(), **ids))
    model.load_state_dict(own.state_dict(), assign=True)
    model.tie_weights()
    unknown = range(len(theirs), own.config.vocab_size)
    # all end tokens; config.json names only one
    model.generation_config.eos_token_id = sorted(tokenizer.end_ids)  # pyright: ignore[reportOptionalMemberAccess]
    # never generate ids that the tokenizer does not know
    model.generation_config.suppress_tokens = list(unknown) or None  # pyright: ignore[reportOptionalMemberAccess]
    model.config.name_or_path = str(folder)
    return model.eval(), theirs


def _open_tokenizer(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as made:
        place = folder
        if not (folder / TOKENIZER_CONFIG_FILE).exists():
            place = Path(made)
            write_transformers_files(tokenizer, place)
        try:
            found = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except Exception as error:  # damaged files raise errors of several libraries
            raise UserError(
                f"{place}: transformers cannot open the tokenizer ({one_line(error)}); correct or "
                f"remove {TOKENIZER_CONFIG_FILE}",
                "unreadable",
            ) from error
    if found.eos_token_id is None:
        found.eos_token = found.convert_ids_to_tokens(tokenizer.eot_id)
    return found


def evaluate_tasks(lm: HGRN2Harness, tasks: Sequence[Task | Group], **settings: Any) -> dict[str, Any]:
    """Run tasks.

    Args:
        lm: the model.
        tasks: tasks from `hgrn2.evaluation.harness_tasks.open_tasks`.
        **settings: arguments of `lm_eval.simple_evaluate`: num_fewshot, limit, ...

    Returns:
        The harness's results; individual samples only with log_samples=True.

    Raises:
        UserError: a task does not fit its data, needs something unavailable, or one of its functions fails.
    """
    settings = {"log_samples": False, "batch_size": lm.batch_size, "device": str(lm.device)} | settings
    # the tasks are already open; without a manager the harness would index its own again
    settings = {"task_manager": TaskManager(include_defaults=False)} | settings
    try:
        # the harness prints to stdout, which is kept for the results
        with errors_only("lm_eval"), redirect_stdout(sys.stderr):
            found = _evaluate(lm, tasks=list(tasks), **settings)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # out of memory on a CPU is a plain RuntimeError with this text
        if "DefaultCPUAllocator" in str(error):
            raise
        raise UserError(f"tasks cannot be run: {one_line(error)}", "unsupported") from error
    assert found is not None, "the first process gets results"
    return found


def results_table(results: dict[str, Any]) -> str:
    """Return the harness's own table of results, with group results below."""
    kinds = ["results", "groups"] if results.get("groups") else ["results"]
    return "\n".join(make_table(results, kind) for kind in kinds)


def results_json(results: dict[str, Any]) -> str:
    """Return the results as the JSON that the harness writes."""
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"
