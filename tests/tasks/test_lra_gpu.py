"""Long Range Arena on a GPU: captured steps of padded batches give the losses of plain ones, for every mixer."""

import pytest
import torch

from hgrn2.models import HGRN2Config
from hgrn2.tasks import find_task
from hgrn2.train.metrics import read_metrics
from hgrn2.train.runs import start_task_run
from hgrn2.train.settings import RunSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = {"max_length": 256, "min_length": 20, "training_examples": 512, "test_examples": 64}


def losses(folder, mixer, **train):
    task = find_task("lra-listops")
    settings = RunSettings.from_flat(
        {"max_steps": 40, "batch_size": 32, "learning_rate": 1e-3, "device": "cuda", "precision": "bfloat16",
         "report": False, "checkpoint_every": 0, "save_best": False, **train},
        "lra-listops",
        OPTIONS,
    )  # fmt: skip
    options = {} if mixer == "hgrn2" else {"layers": (mixer,)}
    if mixer == "attention":
        options["mixers"] = {"attention": {"num_heads": 2}}
    config = HGRN2Config(
        hidden_size=128, num_hidden_layers=2, expand_ratio=64, intermediate_size=128,
        **task.model_settings(settings.options), **options,
    )  # fmt: skip
    start_task_run(folder, config, settings)
    records = read_metrics(folder)
    assert 0 <= next(r for r in records if r["kind"] == "validation")["val_accuracy"] <= 1
    return [r["loss"] for r in records if r["kind"] == "train"]


@pytest.mark.parametrize("mixer", ["hgrn2", "hgrn1", "attention", "mamba"])
def test_captured_steps(tmp_path, mixer):
    plain, captured = losses(tmp_path / "plain", mixer), losses(tmp_path / "captured", mixer, cuda_graph=True)
    assert len(plain) == len(captured) == 40
    assert captured == pytest.approx(plain, rel=0.02)
