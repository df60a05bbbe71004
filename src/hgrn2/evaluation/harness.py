"""The model in lm-evaluation-harness, and its tasks; nothing else imports lm_eval."""

from __future__ import annotations

import difflib
import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import datasets.config
import datasets.exceptions
import huggingface_hub.constants
import torch
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from hgrn2.data.hub import hub_reachable
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.data.transformers_files import TOKENIZER_CONFIG_FILE, write_transformers_files
from hgrn2.errors import UserError
from hgrn2.evaluation.scoring import NOT_FINITE, PIECE_TOKENS, Pair, Scored, affordable_rows, score_pairs
from hgrn2.hf.configuration import HGRN2Config
from hgrn2.hf.language import HGRN2ForCausalLM
from hgrn2.models import HGRN2LM

AUTO = "auto"

# the harness's decorators hide the types of what they wrap
_HFLM: Any = HFLM
_evaluate: Any = simple_evaluate


class HGRN2Harness(_HFLM):
    """The harness's class of transformers models, but for lengths: nothing is ever cut off.

    A context or a document of any length is read in pieces with the state carried, which is what one pass computes.
    Only continuations get logits, a bounded number at a time.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer; what it puts before a text stands before a context and, once, before a document. A
            context or prompt of no tokens becomes `prefix_token_id`, something that the first token can follow.
        batch_size: rows read at a time, or "auto" (see `hgrn2.evaluation.scoring.affordable_rows`).

    Example:
        >>> import lm_eval                                                                  # doctest: +SKIP
        >>> lm = HGRN2Harness(*open_for_transformers(*hgrn2.load(run, "latest", "cpu"), run))   # doctest: +SKIP
        >>> lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])                           # doctest: +SKIP
    """

    def __init__(
        self, model: HGRN2ForCausalLM, tokenizer: PreTrainedTokenizerBase, batch_size: int | str = AUTO
    ) -> None:
        # that it was given a model, which it warns of in three ways, is meant
        with _errors_only("lm_eval.models"):
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
            )

    @property
    def max_length(self) -> int:
        """There is none; more than fits anywhere, for those who ask."""
        return 2**40

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Scores whole documents: log p of each after the beginning of a text."""
        texts = [request.args[0] for request in requests]
        # with the tokenizer's own beginning as well the model would be asked to predict that
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
                    f"continuation {texts[1]!r} adds no token of its own to its context {texts[0][-20:]!r}; begin it "
                    "with a space, which target_delimiter of a task is for"
                )
        # white space at the end of a context counts as the continuation's, which may leave nothing
        pairs: list[Pair] = [(context or (self.prefix_token_id,), rest) for _, context, rest in requests]
        found = self._score(pairs, "continuations", disable_tqdm)
        for (texts, *_), scored in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, (scored.nats, scored.is_greedy))
        return [(scored.nats, scored.is_greedy) for scored in found]

    def _score(self, pairs: list[Pair], what: str, disable_tqdm: bool) -> list[Scored]:
        # what stands for a document of no text
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
        """Writes after prompts, whose whole length is read.

        Raises:
            UserError: the model's outputs are not finite.
        """
        if not requests:
            return []
        asked = self.batch_size_per_gpu
        self.batch_size_per_gpu = self._rows(max(len(self.tok_encode(request.args[0])) or 1 for request in requests))
        try:
            # the harness's own bar would stay open, and an error's line begin behind it
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
        """The tokens of prompts [R, T] and which are real [R, T], int64; those of no tokens are the prefix token."""
        ids, mask = super().tok_batch_encode(strings, *args, **settings)
        if ids.shape[1] == 0:
            # torch takes what is empty for float
            ids, mask = (torch.zeros(len(strings), 1, dtype=torch.long) for _ in range(2))
        # the harness fills rows up on the left
        empty = mask.sum(1) == 0
        ids[empty, -1] = self.prefix_token_id
        mask[empty, -1] = 1
        return ids, mask

    def _rows(self, longest: int) -> int:
        if self.batch_size_per_gpu != AUTO:
            return int(self.batch_size_per_gpu)
        rows = affordable_rows(self.model, longest)
        # the harness notes the sizes it found beside its results
        self.batch_sizes[len(self.batch_sizes)] = rows
        return rows


class _Finite(LogitsProcessor):
    """Refuses logits that are no numbers: the greedy choice among them would pass for an answer."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # -inf is what tokens that are never written get
        if not bool(scores.logsumexp(-1).isfinite().all()):
            raise UserError(NOT_FINITE, "not-finite")
        return scores


def open_for_transformers(
    own: HGRN2LM, tokenizer: Tokenizer, folder: Path
) -> tuple[HGRN2ForCausalLM, PreTrainedTokenizerBase]:
    """A model and its tokenizer as transformers' classes; the weights are shared, not copied.

    Args:
        own: the model, on its device.
        tokenizer: its tokenizer.
        folder: where the tokenizer comes from. If its settings for transformers are there too, they count: models from
            elsewhere may begin a text with another token than the end of text.

    Raises:
        UserError: those settings are none.
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
    # every token that ends a text, of which config.json names one
    model.generation_config.eos_token_id = sorted(tokenizer.end_ids)  # pyright: ignore[reportOptionalMemberAccess]
    # what the tokenizer does not know is never written
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
        except Exception as error:  # whatever a damaged or foreign file makes of several libraries
            raise UserError(
                f"{place}: transformers cannot open the tokenizer ({_reason(error)}); mend {TOKENIZER_CONFIG_FILE} or "
                "take it away",
                "unreadable",
            ) from error
    if found.eos_token_id is None:
        found.eos_token = found.convert_ids_to_tokens(tokenizer.eot_id)
    return found


def evaluate_tasks(lm: HGRN2Harness, tasks: Sequence[Task | Group], **settings: Any) -> dict[str, Any]:
    """Runs tasks.

    Args:
        lm: the model.
        tasks: as `open_tasks` gives them.
        **settings: arguments of `lm_eval.simple_evaluate`: num_fewshot, limit, ...

    Returns:
        The harness's results, without the single samples unless log_samples=True.

    Raises:
        UserError: a task does not fit its data, or wants what is not to be had; one of its functions fails.
    """
    settings = {"log_samples": False, "batch_size": lm.batch_size, "device": str(lm.device)} | settings
    # the tasks are there; without one it would look through its own again
    settings = {"task_manager": TaskManager(include_defaults=False)} | settings
    try:
        # it prints on its way, among what is asked for
        with _errors_only("lm_eval"), redirect_stdout(sys.stderr):
            found = _evaluate(lm, tasks=list(tasks), **settings)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # how torch says on a CPU that there is no memory
        if "DefaultCPUAllocator" in str(error):
            raise
        raise UserError(f"tasks cannot be run: {_reason(error)}", "unsupported") from error
    assert found is not None, "the first process gets results"
    return found


def results_table(results: dict[str, Any]) -> str:
    """The harness's own table of its results, those of groups below."""
    kinds = ["results", "groups"] if results.get("groups") else ["results"]
    return "\n".join(make_table(results, kind) for kind in kinds)


def results_json(results: dict[str, Any]) -> str:
    """The harness's results as it writes them."""
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"


def open_tasks(names: Sequence[str], folder: Path | None = None) -> list[Task | Group]:
    """Tasks with their data.

    Args:
        names: of tasks, groups and tags, those of the folder or the harness's own, or paths of task files.
        folder: where further task files lie. Data files named there with a relative path are looked for where the
            program runs, then beside the task file.

    Raises:
        UserError: a task that does not exist, a file that cannot be read, data that is not there.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError("no task named; name one or more, see lm-eval ls tasks")
    manager = _manager(names, folder)
    opened: dict[str, Task | Group] = {}
    for name in names:
        try:
            with _errors_only("lm_eval"), _without_attempts():
                loaded = manager.load(name)
        except Exception as error:  # of YAML, of the file's own functions, of datasets and the network
            raise UserError(f"task {name!r} cannot be opened: {_task_reason(error)}") from error
        for task in loaded["tasks"].values():
            _check_metrics(name, task)
        groups = loaded.get("groups", {})
        inner = {child for children in loaded.get("group_map", {}).values() for child in children}
        tops: dict[str, Task | Group] = {key: group for key, group in groups.items() if key not in inner}
        tops = tops or dict(loaded["tasks"])
        if twice := opened.keys() & tops.keys():
            raise UserError(f"task {min(twice)!r} is named twice; leave one out", "contradiction")
        opened |= tops
    return list(opened.values())


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """Knows all the tasks named."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with task files (.yaml)", "not-found")
    files = [name for name in names if Path(name).suffix in {".yaml", ".yml"}]
    for path in [*files, *sorted(folder.rglob("*.yaml") if folder else ())]:
        _check_task_file(Path(path))
    include = None if folder is None else str(folder)
    manager = TaskManager(include_path=include, include_defaults=False)
    own = dict(manager.task_index) | {name: _entry(Path(name)) for name in files}
    # to look through the harness's own thousands takes many seconds; groups and tags may have some of them as members
    if not all(name in own and own[name].kind in (Kind.TASK, Kind.PY_TASK) for name in names):
        with _errors_only("lm_eval"):
            manager = TaskManager(include_path=include)
    for name, entry in own.items():
        manager.task_index[name] = _with_data_beside(entry)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see lm-eval ls tasks, or name a .yaml"
            raise UserError(f"no task named {name!r}; {hint}", "unknown-name")
    return manager


def _check_metrics(name: str, task: Task) -> None:
    """Refuses metrics that the harness did not find; it would leave them out of the results."""
    if getattr(getattr(task, "config", None), "process_results", None) is not None:
        # the task computes them itself under names of its own; the harness looks for none of them
        return
    functions = getattr(task, "_metric_fn_list", None) or {}
    if unknown := [metric for metric, function in functions.items() if function is None]:
        raise UserError(
            f"task {name!r}: metric {unknown[0]!r} is neither the harness's nor on the Hub; correct its name",
            "unknown-name",
        )


def _check_task_file(path: Path) -> None:
    """Refuses what the harness would pass over in silence."""
    try:
        load_yaml(path, resolve_func=False)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read ({error.strerror}); name a task file", "unreadable"
        ) from None
    except Exception as error:
        raise UserError(f"{path}: not a task file: {_reason(error)}", "unreadable") from None


def _entry(path: Path) -> Entry:
    try:
        found = TaskIndex.entry_from_path(path)
    except ValueError:
        found = None
    if found is None or not isinstance(found.name, str):
        raise UserError(f"{path}: names no task (a line task: NAME) and no group; name another file", "unreadable")
    return found


def _with_data_beside(entry: Entry) -> Entry:
    """The entry with the paths of data files that lie beside the task's own file."""
    if entry.kind is not Kind.TASK or entry.yaml_path is None:
        return entry
    settings = load_yaml(entry.yaml_path, resolve_func=False)
    arguments = settings.get("dataset_kwargs")
    named = arguments.get("data_files") if isinstance(arguments, dict) else None
    beside = _map_texts(named, lambda text: _beside(text, entry.yaml_path.parent))  # pyright: ignore
    if beside == named:
        return entry
    # without a path the harness takes the settings as they are here
    try:
        settings = load_yaml(entry.yaml_path)
    except Exception:  # of the functions it names; the harness meets them again if the task is asked for
        return entry
    settings["dataset_kwargs"] = {**arguments, "data_files": beside}  # pyright: ignore[reportGeneralTypeIssues]
    return Entry(entry.name, entry.kind, None, settings, entry.tags)


def _beside(text: str, folder: Path) -> str:
    place = folder / text
    return str(place) if not Path(text).exists() and place.exists() else text


def _map_texts(value: Any, function: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_map_texts(x, function) for x in value]
    return {key: _map_texts(x, function) for key, x in value.items()} if isinstance(value, dict) else value


def _task_reason(error: Exception) -> str:
    """Return what is wrong, and what to do on a machine with network access."""
    chain = list(_chain(error))
    offline = any("offline" in f"{type(x).__name__} {x}".lower() or isinstance(x, ConnectionError) for x in chain)
    if offline:
        return (
            "its data is not in the local cache, and the Hugging Face Hub cannot be reached (offline); connect, or "
            "name a task file whose data is a local file"
        )
    no_rows = isinstance(chain[-1], StopIteration) or (isinstance(error, IndexError) and "size 0" in str(error))
    if no_rows:
        return "its data has no rows; name other data"
    return _reason(error)


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    """One line about an error of another library."""
    # which says nothing but that there is a cause
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = " ".join(str(error).split()).removesuffix(".")
    shown = lines if len(lines) <= 200 else f"{lines[:200]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


@contextmanager
def _without_attempts() -> Iterator[None]:
    """Refuse at once, without retries, what is not in the local cache while the Hub cannot be reached."""
    places: list[Any] = [huggingface_hub.constants, datasets.config]
    before = [place.HF_HUB_OFFLINE for place in places]
    offline = not hub_reachable()
    try:
        for place in places:
            place.HF_HUB_OFFLINE |= offline
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Keeps a logger from reporting less than errors for a while."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
