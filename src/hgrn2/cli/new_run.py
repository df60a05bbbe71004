"""Start a new run for `hgrn2 train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2.cli.processes import main_first
from hgrn2.cli.samples import make_sampler
from hgrn2.cli.text_flags import refuse_text_flags
from hgrn2.data.progress import announce
from hgrn2.data.settings import data_settings, prepare_data
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.storage.staging import check_writable_folder
from hgrn2.tasks.distillation import DistillationOptions, check_teacher
from hgrn2.train.parallel import Parallel
from hgrn2.train.settings import RunSettings
from hgrn2.train.start import Start


@dataclass(frozen=True)
class NewRun:
    """A run to start.

    Attributes:
        out: folder of the run.
        settings: settings of the run.
        configure: returns the configuration of the model; takes a default size of the vocabulary, or None.
        start: model to take the weights from; None for new weights.
        text_flags: values of the flags that only tasks on text accept, by name.
        data_table: table [data] of the configuration file.
        has_budget: whether file or flags name a budget.
    """

    out: Path
    settings: RunSettings
    configure: Callable[..., Any]
    start: Start | None
    text_flags: Mapping[str, Any]
    data_table: Mapping[str, Any]
    has_budget: bool

    def train(self, parallel: Parallel) -> Any:
        """Check everything, prepare text if the task reads it, and train.

        Args:
            parallel: the ranks that train together.

        Returns:
            The `hgrn2.train.run.Run`.

        Raises:
            UserError: a setting or a flag is invalid, or training fails.
        """
        return self._train_on_text(parallel) if self.settings.task.reads_text else self._train_on_task(parallel)

    def _train_on_text(self, parallel: Parallel) -> Any:
        from hgrn2.train.runs import start_language_run

        start, flags, table = self.start, self.text_flags, self.data_table
        defaults = {} if start is None else start.data_defaults(flags["data"] or table.get("data", ()))
        prepared = None if flags["prepared"] is None else str(flags["prepared"])
        sources = data_settings(
            defaults | dict(table), data=list(flags["data"]), validation=list(flags["validation"]),
            text_field=flags["text-field"], tokenizer=flags["tokenizer"], prepared=prepared,
        )  # fmt: skip
        # report mistakes before preparing the data, those of settings first
        self.configure(None)
        if isinstance(self.settings.options, DistillationOptions):
            check_teacher(self.settings.options)
        parallel.on_main(self._check_place)
        # the others reuse the tokens that the main rank has prepared
        data, kept = main_first(
            parallel,
            lambda: prepare_data(sources, self.out, flags["rebuild"] and parallel.is_main, self._check_tokenizer),
        )
        # already prepared tokens may come from any tokenizer
        self._check_tokenizer(data.tokenizer)
        if start is not None:
            data = start.own_tokenizer(data)
        self._announce_budget()
        return start_language_run(
            self.out, self.configure(data.tokenizer.vocab_size), self.settings, data, data_settings=kept,
            start=None if start is None else start.model, sampler=make_sampler(data.tokenizer),
            compressors=flags["compressors"], parallel=parallel,
        )  # fmt: skip

    def _train_on_task(self, parallel: Parallel) -> Any:
        from hgrn2.train.runs import start_task_run

        name = self.settings.task.name
        refuse_text_flags(name, self.text_flags)
        if self.data_table:
            raise UserError(f"task {name!r} reads no text; drop [data] from the file", "contradiction")
        model = self.configure()
        parallel.on_main(self._check_place)
        self._announce_budget()
        start = None if self.start is None else self.start.model
        return start_task_run(self.out, model, self.settings, start=start, parallel=parallel)

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        tokenizer.check_fits(self.configure(tokenizer.vocab_size).vocab_size)
        if self.start is not None:
            self.start.check_tokens(tokenizer)

    def _check_place(self) -> None:
        from hgrn2.devices import choose_device
        from hgrn2.train.checkpoint import check_new_run

        choose_device(self.settings.train.device)
        check_writable_folder(self.out)
        check_new_run(self.out)

    def _announce_budget(self) -> None:
        if not self.has_budget:
            announce("no budget given: 1,000 steps; --max-steps, --max-tokens or --max-time-s set another")
