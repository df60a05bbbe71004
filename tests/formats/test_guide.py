"""The commands that the guide shows about layouts run as they stand there."""

import re
import shlex
import sys
from pathlib import Path

from hgrn2 import cli
from hgrn2.data import train_bpe
from hgrn2.formats.opening import open_folder
from hgrn2.models import presets
from hgrn2.train.checkpoint import CheckpointStore, create_run, model_tensors
from tests.formats.published import FLA_CONFIG, draw, fla_shapes, merged, write
from tests.models.cases import make_model

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "checkpoints.md"


def test_commands_of_the_guide(tmp_path, monkeypatch):
    section = GUIDE.read_text(encoding="utf-8").split("## Convert\n")[1].split("\n## ")[0]
    commands = [shlex.split(line) for line in re.findall(r"^hgrn2 (.+)$", section, re.MULTILINE)]
    assert len(commands) >= 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hgrn2"])
    tokenizer = train_bpe(["a text"], 257)
    tokenizer.save(write(tmp_path / "hgrn2-1.3B-100B", FLA_CONFIG, merged(draw(fla_shapes()))))
    config = presets.variant("fla", vocab_size=257, hidden_size=16, num_hidden_layers=1, expand_ratio=4)
    run = tmp_path / "runs" / "RUN"
    create_run(run, {"model": config.to_dict()}, tokenizer)
    CheckpointStore(run, 1).save(
        model=model_tensors(make_model(config)), optimizer={}, task={}, state={"step": 1, "best": {"step": 1}},
        config={"model": config.to_dict()}, best_step=1,
    )  # fmt: skip
    for command in commands:
        assert cli.main(command) == 0, command
        if command[0] == "convert":
            wanted = command[command.index("--to") + 1]
            assert open_folder(Path(command[2])).layout.name == wanted
