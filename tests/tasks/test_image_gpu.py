"""The image task on a GPU: compiled and captured steps give the losses of plain ones."""

from pathlib import Path

import pytest
import torch

from hgrn2.models.vision import load_model
from hgrn2.tasks.image import ImageOptions, ImageTask
from hgrn2.train.config import TrainConfig
from hgrn2.train.metrics import read_metrics
from hgrn2.train.runs import start_task_run
from hgrn2.train.settings import RunSettings
from tests.data import image_files as files

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch.compile asks every tensor for its gradient, and hides this warning unless warnings are errors
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


def losses(folder, out, **settings):
    options = ImageOptions(
        data=str(folder), crop_padding=1, flip=True, strength=0.5, erase=0.25, mixup=0.8, cutmix=1.0,
        label_smoothing=0.1, ema_decay=0.5, eval_batch_size=7,
    )  # fmt: skip
    changes = {"embed_dim": 128, "depth": 4, "mixers": {"hgrn2": {"expand_ratio": 64}}, "directions": "alternating-2d"}
    config = ImageTask.make_model_config("hgrn2_cct_small", ImageTask.model_settings(options) | changes)
    train = TrainConfig(max_steps=8, batch_size=16, device="cuda", validation_every=4, learning_rate=1e-3, **settings)
    start_task_run(out, config, RunSettings(train, ImageTask, options))
    records = read_metrics(out)
    held_out = [r["val_loss"] for r in records if r["kind"] == "validation"]
    return torch.tensor([r["loss"] for r in records if r["kind"] == "train"] + held_out, dtype=torch.float64)


@pytest.mark.parametrize("settings", [
    {"cuda_graph": True}, {"compile": True}, {"cuda_graph": True, "compile": True},
])  # fmt: skip
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_way_of_running_gives_the_same_losses(tmp_path, settings, precision):
    files.cifar_folder(tmp_path / "d")
    plain = losses(tmp_path / "d", tmp_path / "plain", precision=precision)
    other = losses(tmp_path / "d", tmp_path / "other", precision=precision, **settings)
    torch.testing.assert_close(other, plain, rtol=1e-3 if precision == "float32" else 3e-2, atol=1e-3)
    model, about = load_model(tmp_path / "other/model")
    assert len(about["classes"]) == 3
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert Path(tmp_path / "other/plots/contribution.png").is_file()


def test_dropped_paths_are_drawn_anew_in_captured_steps(tmp_path):
    files.cifar_folder(tmp_path / "d")
    options = ImageOptions(data=str(tmp_path / "d"))
    changes = {"embed_dim": 128, "depth": 4, "drop_path_rate": 0.5, "mixers": {"hgrn2": {"expand_ratio": 64}}}
    config = ImageTask.make_model_config("hgrn2_cct_small", ImageTask.model_settings(options) | changes)
    # a batch of all images and hardly any learning: only dropping changes the loss
    train = TrainConfig(
        max_steps=12, batch_size=24, device="cuda", cuda_graph=True, learning_rate=1e-12, validation_every=0
    )
    start_task_run(tmp_path / "run", config, RunSettings(train, ImageTask, options))
    found = [r["loss"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert len({round(x, 5) for x in found[4:]}) > 4
