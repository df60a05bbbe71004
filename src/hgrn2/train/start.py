"""Open a model to start a new run from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hgrn2.data.find_tokenizer import check_same_tokens, tokenizer_of
from hgrn2.data.model_files import read_companions
from hgrn2.data.prepared import PreparedData, is_prepared
from hgrn2.data.tokenizer import HFTokenizer, Tokenizer
from hgrn2.formats.opening import ModelFolder, open_folder
from hgrn2.formats.run_folder import locate_model, read_while_training


@dataclasses.dataclass(frozen=True)
class Start:
    """A model to start a new run from.

    Attributes:
        model: the model.
        tokenizer: its tokenizer; None if it has none.
        tokenizer_dir: the folder of the tokenizer.
    """

    model: ModelFolder
    tokenizer: Tokenizer | None
    tokenizer_dir: Path

    @classmethod
    def open(cls, path: Path) -> Start:
        """Open a run folder, a checkpoint, or a folder of any layout."""

        def read() -> Start:
            folder, tokenizer_dir = locate_model(path)
            tokenizer = tokenizer_of(tokenizer_dir)
            if isinstance(tokenizer, HFTokenizer):
                # keep chat template, special tokens and generation settings with the model
                tokenizer.companions = read_companions(tokenizer_dir, tokenizer.eot_id)
            return cls(open_folder(folder), tokenizer, tokenizer_dir)

        return read_while_training(path, read)

    def data_defaults(self, names: Sequence[str]) -> dict[str, Any]:
        """Return defaults for `data_settings`: the model's tokenizer, unless the data is prepared already."""
        prepared_already = len(names) == 1 and is_prepared(names[0])
        return {} if self.tokenizer is None or prepared_already else {"tokenizer": str(self.tokenizer_dir)}

    def own_tokenizer(self, data: PreparedData) -> PreparedData:
        """Return the data with the model's tokenizer, which may have more files than the one saved with the tokens."""
        return data if self.tokenizer is None else dataclasses.replace(data, tokenizer=self.tokenizer)

    def check_tokens(self, found: Tokenizer) -> None:
        """Raise UserError if the tokens of the data are not the model's."""
        check_same_tokens(self.tokenizer, found, f"model {self.model.path}")
