"""The image task: it trains by command, resumes with equal losses, and leaves a model and pictures."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from hgrn2.data.images import augment, open_sets
from hgrn2.formats import run_folder
from hgrn2.models.vision import VisionModel, load_model, preset
from hgrn2.tasks import TaskContext, find_task
from hgrn2.tasks.image import ImageOptions, ImageTask
from hgrn2.tasks.image.averages import RunningMean
from hgrn2.train.metrics import read_metrics
from hgrn2.train.settings import RunSettings
from tests.data import image_files as files
from tests.refusals import refuses
from tests.tasks.commands import command, curve, refused

ROOT = Path(__file__).resolve().parents[2]
FASHION = ROOT.parent / "shared/data/fashion-mnist"
SIZES = {
    "embed_dim": 16,
    "depth": 1,
    "patch_size": 2,
    "mixers": '{"hgrn2": {"expand_ratio": 8}}',
    "directions": "reverse",
}
MODEL = ["--device", "cpu", "--set", *(f"{key}={value}" for key, value in SIZES.items())]
STRONG = ["flip=true", "crop_padding=1", "strength=0.5", "erase=0.5", "mixup=0.4", "cutmix=1", "label_smoothing=0.1"]


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def task_of(options, batch_size=4, seed=0, grad_accumulation=1, **changes):
    config = preset("hgrn2_cct_nano", **{
        **ImageTask.model_settings(options), "embed_dim": 16, "patch_size": 2,
        "mixers": {"hgrn2": {"expand_ratio": 8}}, **changes,
    })  # fmt: skip
    context = TaskContext(batch_size, seed, torch.device("cpu"), config, grad_accumulation=grad_accumulation)
    return ImageTask(options, context), config


def test_it_trains_by_command_resumes_and_leaves_a_model_and_pictures(capsys):
    files.idx_folder(Path("data"), ".gz")
    settings = ["--batch-size", 5, "--max-steps", 4, "--validation-every", 2, "--checkpoint-every", 2]
    command("train", "--task", "image", "--data", "data", "--task-set", *STRONG, "ema_decay=0.5", *settings, *MODEL,
            "--out", "run")  # fmt: skip
    shown = capsys.readouterr().out
    for name in ("loss", "confusion", "misclassified", "contribution"):
        assert str(Path("run/plots") / f"{name}.png") in shown
        assert Path(f"run/plots/{name}.png").stat().st_size > 1000
    config = json.loads(Path("run/config.json").read_text())
    assert config["model"]["num_classes"] == 3
    assert config["model"]["img_size"] == [8, 8]
    assert config["task"]["options"]["data"] == "../data"
    wanted = curve("run")
    # moved with its data
    Path("there").mkdir()
    shutil.copytree("run", "there/again")
    shutil.copytree("data", "there/data")
    command("train", "--resume", run_folder.checkpoints_of(Path("there/again"))[0])
    assert curve("there/again") == wanted
    page = Path("run/report.html").read_text()
    assert "load_model" in page
    assert "has read 20 images" in page
    assert page.count("data:image/png;base64,") == 2
    assert "--to hf" not in page
    model, about = load_model("run/model")
    last = [r for r in read_metrics(Path("run")) if r["kind"] == "validation"][-1]
    pixels = torch.from_numpy(files.pixels(channels=1, seed=1)).permute(0, 3, 1, 2)
    logits = model(augment(pixels, torch.tensor(about["mean"]), torch.tensor(about["std"])))
    found = torch.nn.functional.cross_entropy(logits, torch.from_numpy(files.labels()).long())
    assert found.item() == pytest.approx(last["val_loss"], rel=1e-4)
    # the running mean, not the last weights
    other = VisionModel(model.config)
    from safetensors.torch import load_file

    other.load_state_dict(load_file(run_folder.checkpoints_of(Path("run"))[-1] / "model.safetensors"))
    assert not torch.equal(other.head.weight, model.head.weight)
    assert "run/model" in refused(capsys, "info", "run").replace("RUN", "run")


def test_every_image_comes_once_an_epoch():
    files.image_folder(Path("d"))
    task, _ = task_of(ImageOptions(data="d", validation="d"), batch_size=5)
    rows = torch.cat([task.next_batch().rows for _ in range(12)]).view(5, 12)
    for epoch in rows:
        assert sorted(epoch.tolist()) == list(range(12))
    assert rows[0].tolist() != rows[1].tolist()
    labels = task.next_batch()
    assert torch.equal(labels.labels, torch.from_numpy(task._train.labels)[labels.rows])


def test_streamed_images_are_those_in_memory():
    files.image_folder(Path("d"), size=(16, 16))
    found = {}
    for storage in ("memory", "stream"):
        task, config = task_of(ImageOptions(data="d", validation="d", storage=storage, workers=2), img_size=8)
        torch.manual_seed(0)
        model = VisionModel(config).eval()
        task.next_batch()
        state = task.state_dict()
        batch = task.next_batch()
        found[storage] = batch.labels, batch.pixels if storage == "stream" else task._pixels[batch.rows]
        task.load_state(state, {})
        again = task.next_batch()
        assert torch.equal(again.labels, batch.labels)
        figures = task.evaluate(model)
        assert figures["val_examples"] == 12
    assert torch.equal(found["memory"][0], found["stream"][0])
    assert torch.equal(found["memory"][1], found["stream"][1])


def test_arrays_are_resized_in_memory_whatever_the_storage():
    files.idx_folder(Path("d"))
    task, config = task_of(ImageOptions(data="d", storage="stream"), img_size=12)
    assert task._pixels.shape[1:] == (1, 12, 12)
    assert task.evaluate(VisionModel(config).eval())["val_examples"] == 12


def test_soft_labels_are_shares_of_both_images():
    files.idx_folder(Path("d"))
    task, _ = task_of(ImageOptions(data="d", mixup=1.0, cutmix=1.0), batch_size=6)
    batch = task.next_batch()
    assert batch.labels.shape == (6, 3)
    torch.testing.assert_close(batch.labels.sum(1), torch.ones(6))
    true = torch.from_numpy(task._train.labels)[batch.rows]
    for i in range(6):
        pair = {int(true[i]), int(true[5 - i])}
        assert set(batch.labels[i].nonzero().flatten().tolist()) <= pair


def test_the_last_epochs_train_on_plain_images():
    files.idx_folder(Path("d"))
    options = ImageOptions(data="d", mixup=1.0, strength=0.5, flip=True, epochs=4, plain_share=0.5)
    task, _ = task_of(options, batch_size=12)
    kinds = [(batch.labels.dim(), batch.colours is None) for batch in (task.next_batch() for _ in range(4))]
    assert kinds == [(2, False), (2, False), (1, True), (1, True)]


def test_the_running_mean_counts_steps_not_batches():
    files.idx_folder(Path("d"))
    task, config = task_of(ImageOptions(data="d", ema_decay=0.9), grad_accumulation=3)
    model = VisionModel(config).train()
    weight = model.head.weight
    with torch.no_grad():
        for step in range(3):
            weight.fill_(step)
            for _ in range(3):
                task.logits(model, task.next_batch())
    # decays 2 / 11 and 3 / 12
    wanted = 3 / 12 * (9 / 11 * 1) + 9 / 12 * 2
    torch.testing.assert_close(task.state_tensors()["head.weight"], torch.full_like(weight, wanted))


def test_the_running_mean():
    layer = torch.nn.BatchNorm1d(2)
    mean, wanted = RunningMean(0.3), 1.0
    mean.update(layer)
    for t in range(1, 6):
        with torch.no_grad():
            layer.weight += t
            layer.num_batches_tracked += 3
        mean.update(layer)
        decay = min(0.3, (1 + t) / (10 + t))
        wanted = decay * wanted + (1 - decay) * float(layer.weight[0].detach())
        assert mean.tensors["weight"].tolist() == pytest.approx([wanted] * 2)
    assert int(mean.tensors["num_batches_tracked"]) == 15
    again = RunningMean(0.3, {name: x.clone() for name, x in mean.state().items()})
    for both in (mean, again):
        both.update(layer)
    assert torch.equal(again.tensors["weight"], mean.tensors["weight"])
    assert RunningMean(0.3).state() == {}


def test_unreadable_images_are_counted():
    folder = files.image_folder(Path("d"))
    (folder / "ant/2.png").write_bytes(b"broken")
    task, config = task_of(ImageOptions(data="d", validation="d"))
    figures = task.evaluate(VisionModel(config).eval())
    # in both parts
    assert figures["skipped_images"] == 2
    assert figures["val_examples"] == 11


def test_a_non_square_image_and_a_grey_model():
    files.image_folder(Path("d"), size=(20, 12))
    task, config = task_of(ImageOptions(data="d"), img_size=(8, 12), in_chans=1)
    assert task._pixels.shape[1:] == (1, 8, 12)
    assert task.evaluate(VisionModel(config).eval())["val_loss"] > 0


@pytest.mark.slow
def test_it_learns():
    rng = np.random.default_rng(0)
    for label in range(2):
        for i in range(40):
            from PIL import Image

            x = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
            x[:, 4 * label : 4 * label + 4] += 100
            Path(f"d/{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(f"d/{label}/{i}.png")
    command("train", "--task", "image", "--data", "d", "--max-steps", 40, "--batch-size", 16, "--learning-rate", 0.01,
            *MODEL, "img_size=8", "--out", "run")  # fmt: skip
    assert [r for r in read_metrics(Path("run")) if r["kind"] == "validation"][-1]["val_accuracy"] == 1


@pytest.mark.parametrize("path", sorted((ROOT / "examples/images").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_are_valid(path):
    table = tomllib.loads(path.read_text())
    options = dict(table["task"])
    settings = RunSettings.from_flat(table["train"], options.pop("name"), options)
    keys = {"num_classes": 10, **table["model"]}
    config = ImageTask.make_model_config(keys.pop("preset"), keys)
    assert settings.task is ImageTask
    with torch.device("meta"):
        assert sum(p.numel() for p in VisionModel(config).parameters()) < 6.2e6


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not on this machine")
def test_fashion_mnist_has_the_names_of_its_classes():
    train, held_out = open_sets(str(FASHION), None, 0.1, 0)
    assert (len(train), len(held_out)) == (60000, 10000)
    assert held_out.classes[held_out.labels[0]] == "ankle boot"


def test_mistakes(capsys):
    files.image_folder(Path("d"))
    words = ["train", "--task", "image", "--max-steps", 1, *MODEL]
    assert "--data" in refused(capsys, *words)
    assert "nowhere" in refused(capsys, *words, "--data", "nowhere")
    assert "--data" in refused(capsys, *words, "--data", "d", "e")
    assert "--tokenizer" in refused(capsys, *words, "--data", "d", "--tokenizer", "bytes")
    assert "hgrn2_vit_tiny" in refused(capsys, *words, "--data", "d", "--model", "hgrn2_vit_tinny")
    assert "embed_dim" in refused(capsys, *words, "embed_dims=8", "--data", "d")
    assert "patch_size" in refused(capsys, *words, "img_size=9", "--data", "d")
    assert not Path("runs").exists()
    with refuses("mismatch", "num_classes", 3, 7):
        task_of(ImageOptions(data="d"), num_classes=7)
    with refuses("unsupported", "in_chans"):
        task_of(ImageOptions(data="d"), in_chans=4)
    with refuses("unknown-name", "mix_up", "mixup"):
        from hgrn2.tasks.registry import make_options

        make_options(find_task("image"), {"data": "d", "mix_up": 1})
    task, _ = task_of(ImageOptions(data="d"))
    with refuses("mismatch", "d"):
        task.load_state(task.state_dict() | {"fingerprint": "another"}, {})
    other, _ = task_of(ImageOptions(data="d", flip=True))
    with refuses("mismatch", "flip"):
        other.load_state(task.state_dict(), {})
