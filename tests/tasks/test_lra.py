"""Long Range Arena as tasks of the trainer: every task trains, resumes, validates by length and shows samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hgrn2 import cli
from hgrn2.models import HGRN2Config
from hgrn2.tasks import TaskContext, find_task
from hgrn2.tasks.generators.listops import WORDS
from hgrn2.tasks.registry import make_options
from hgrn2.train.metrics import read_metrics
from hgrn2.train.settings import RunSettings
from tests.refusals import refuses

MODEL = ["hidden_size=16", "num_hidden_layers=2", "expand_ratio=8", "intermediate_size=16"]
LISTOPS = {"max_length": 60, "min_length": 10, "training_examples": 64, "test_examples": 40}
CONFIGS = Path(__file__).parents[2] / "docs" / "reproduce" / "lra"


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def reviews(folder, num=24):
    folder.mkdir()
    for name in ("train", "test"):
        lines = [json.dumps([("good " if i % 2 else "bad ") * (1 + i), i % 2]) for i in range(num)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def images(folder, num=40):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        x = generator.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=x, labels=np.arange(num) % 10)


def pairs(folder, num=24):
    folder.mkdir()
    for name in ("train", "test"):
        lines = [f"{i % 2}.0\tP{i}\tQ{i}\t{'text ' * (i + 1)}\tother" for i in range(num)]
        (folder / f"new_aan_pairs.{name}.tsv").write_text("\n".join(lines))


def prepare(name):
    """Return the options of a small run of a task, whose data are made."""
    if name == "lra-listops":
        return LISTOPS
    if name == "lra-text":
        reviews(Path("imdb"))
        return {"data": "imdb", "max_length": 64}
    if name == "lra-retrieval":
        pairs(Path("aan"))
        return {"data": "aan", "max_length": 64}
    if name == "lra-image":
        images(Path("cifar"))
        return {"data": "cifar", "augment": "flip-shift"}
    return {"training_examples": 16, "test_examples": 8}


def as_flags(options):
    return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in options.items()]


@pytest.mark.parametrize(
    "name",
    [
        "lra-listops",
        pytest.param("lra-text", marks=pytest.mark.slow),
        "lra-retrieval",
        pytest.param("lra-image", marks=pytest.mark.slow),
        pytest.param("lra-pathfinder", marks=pytest.mark.slow),
    ],
)
def test_a_task_trains_resumes_and_is_reported(name, capsys):
    options = prepare(name)
    words = ["train", "--task", name, "--device", "cpu", "--set", *MODEL, "--task-set", *as_flags(options)]
    words += ["--batch-size", "8", "--validation-every", "2", "--checkpoint-every", "2"]
    assert cli.main([*words, "--max-steps", "4", "--out", "whole"]) == 0
    records = [r for r in read_metrics(Path("whole")) if r["kind"] == "validation"]
    assert 0 <= records[-1]["val_accuracy"] <= 1
    assert "classes" in Path("whole/report.html").read_text()
    assert cli.main(["train", "--resume", "whole", "--max-steps", "6"]) == 0
    assert read_metrics(Path("whole"))[-1]["step"] == 6
    assert cli.main(["task", name, "--samples", "2", "--task-set", *as_flags(options)]) == 0
    shown = capsys.readouterr().out
    if name in ("lra-image", "lra-pathfinder"):
        assert f"{name}.png" in shown
        assert Path(f"{name}.png").stat().st_size > 1000
    else:
        assert "bad" in shown or "text" in shown or "[M" in shown or "[SM" in shown


def test_a_resumed_run_equals_an_uninterrupted_one():
    words = ["train", "--task", "lra-listops", "--device", "cpu", "--set", *MODEL, "--task-set", *as_flags(LISTOPS)]
    words += ["--batch-size", "16", "--warmup-steps", "1", "--schedule", "constant", "--checkpoint-every", "3"]
    assert cli.main([*words, "--max-steps", "6", "--out", "whole"]) == 0
    assert cli.main([*words, "--max-steps", "3", "--out", "part"]) == 0
    assert cli.main(["train", "--resume", "part", "--max-steps", "6"]) == 0
    curves = [[r["loss"] for r in read_metrics(Path(run)) if r["kind"] == "train"] for run in ("whole", "part")]
    assert curves[0] == curves[1]


def built(name, batch_size=8, **options):
    task = find_task(name)
    found = make_options(task, options)
    config = HGRN2Config(hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=16,
                         **task.model_settings(found))  # fmt: skip
    return task.build(found, TaskContext(batch_size, 0, model_config=config)), task.build_model(found, config)


def test_an_epoch_has_every_example_once_and_batches_of_few_widths():
    task, _ = built("lra-listops", **LISTOPS)
    batches = [task.next_batch() for _ in range(8)]
    rows = {
        bytes(x)
        for batch in batches
        for x in torch.nn.functional.pad(batch.inputs, (0, 60 - batch.inputs.shape[1])).numpy()
    }
    assert len(rows) == 64
    assert {batch.inputs.shape[1] for batch in batches} <= {15, 30, 45, 60}
    for batch in batches:
        assert int(batch.lengths.max()) <= batch.inputs.shape[1]
    again, _ = built("lra-listops", **LISTOPS)
    assert torch.equal(again.next_batch().inputs, batches[0].inputs)
    assert not torch.equal(task.next_batch().labels, batches[0].labels)


def test_listops_are_the_values_of_expressions():
    task, _ = built("lra-listops", **LISTOPS)

    def value(words):
        word = words.pop(0)
        if not word.startswith("["):
            return int(word)
        found = []
        while words[0] != "]":
            found.append(value(words))
        words.pop(0)
        return {"[MIN": min, "[MAX": max, "[SM": lambda x: sum(x) % 10, "[MED": lambda x: int(np.median(x))}[word](
            found
        )

    batch = task.next_batch()
    for tokens, length, label in zip(batch.inputs, batch.lengths, batch.labels, strict=True):
        assert value([WORDS[t] for t in tokens[:length]]) == label


def test_official_sizes_of_listops():
    options = make_options(find_task("lra-listops"), {})
    assert (options.training_examples, options.test_examples) == (96_000, 2000)
    assert (options.min_length, options.max_length, options.max_depth, options.max_args) == (501, 1999, 10, 10)


def test_accuracy_by_length_and_beyond():
    task, model = built("lra-listops", **LISTOPS, eval_lengths=[80])
    model.eval()
    with torch.no_grad():
        figures = task.evaluate(model)
    buckets = {k: v for k, v in figures.items() if k.startswith("val_accuracy_length_")}
    assert set(buckets) <= {f"val_accuracy_length_{n}" for n in (15, 30, 45, 60)}
    lengths = task._held_out[""].longest
    counts = {n: int(((lengths > n - 15) & (lengths <= n)).sum()) for n in (15, 30, 45, 60)}
    weighted = sum(buckets.get(f"val_accuracy_length_{n}", 0) * count for n, count in counts.items()) / 40
    assert weighted == pytest.approx(figures["val_accuracy"])
    assert "val_accuracy_beyond_80" in figures
    assert int(task._held_out["_beyond_80"].longest.min()) > 60


def test_hold_out_leaves_the_test_examples_alone():
    prepare("lra-text")
    task, _ = built("lra-text", data="imdb", max_length=64, hold_out=8)
    assert len(task._train) == 16
    assert len(task._held_out[""]) == 8
    few, _ = built("lra-text", data="imdb", max_length=64, validation_examples=8)
    assert few._held_out[""].labels.tolist() != [0, 1] * 4
    with refuses("contradiction", "hold_out", 24):
        built("lra-text", data="imdb", hold_out=24)


def test_mirrored_and_moved_images():
    prepare("lra-image")
    plain, _ = built("lra-image", data="cifar")
    moved, _ = built("lra-image", data="cifar", augment="flip")
    a, b = plain.next_batch(), moved.next_batch()
    x, y = a.inputs.view(8, 32, 32), b.inputs.view(8, 32, 32)
    kinds = [(torch.equal(p, q), torch.equal(p.flip(1), q)) for p, q in zip(x, y, strict=True)]
    assert all(sum(kind) == 1 for kind in kinds)
    assert len({kind[0] for kind in kinds}) == 2
    assert plain.prepared(a.inputs).shape == (8, 1024, 1)
    colours, model = built("lra-image", data="cifar", colours="rgb", directions="2d")
    batch = colours.next_batch()
    assert model(colours.prepared(batch.inputs), None).shape == (8, 10)


def test_a_task_learns():
    prepare("lra-text")
    torch.manual_seed(0)
    task, model = built("lra-text", data="imdb", max_length=64)
    optimizer = torch.optim.AdamW(model.parameters(), 0.03)
    for _ in range(30):
        loss = task.loss(model, task.next_batch()).loss_sum / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.evaluate(model.eval())["val_accuracy"] > 0.9


def test_wrong_options_are_refused():
    prepare("lra-text")
    with refuses("contradiction", "batch_size", 24):
        built("lra-text", 25, data="imdb")
    with refuses("contradiction", "2d"):
        built("lra-text", data="imdb", directions="2d")
    with refuses("not-found", "nowhere"):
        built("lra-text", data="nowhere")
    with refuses("not-found", "nowhere"):
        built("lra-retrieval", data="nowhere")
    with refuses("invalid-value", "eval_lengths", 40):
        built("lra-listops", **LISTOPS, eval_lengths=[40])
    with refuses("invalid-value", "size", 48):
        built("lra-pathfinder", size=48)
    task, _ = built("lra-text", data="imdb", max_length=64)
    with refuses("damaged", "batches", -1):
        task.load_state({"batches": -1}, {})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_configurations_are_valid(path):
    tables = cli.config_file.read_toml(path)
    task = find_task(tables["task"].pop("name"))
    settings = RunSettings.from_flat(tables["train"], task.name, tables["task"])
    config = HGRN2Config(**tables["model"] | task.model_settings(settings.options))
    with torch.device("meta"):
        task.build_model(settings.options, config)


def test_pretraining_on_hidden_tokens_and_a_start_from_it():
    words = ["train", "--task", "lra-listops", "--device", "cpu", "--set", *MODEL, "--batch-size", "16"]
    options = as_flags(LISTOPS)
    assert cli.main([*words, "--max-steps", "4", "--out", "pre", "--task-set", *options, "objective=masked"]) == 0
    assert cli.main([*words, "--max-steps", "2", "--out", "fine", "--task-set", *options, "start=pre"]) == 0
    task, model = built("lra-listops", **LISTOPS, objective="masked")
    batch = task.next_batch()
    assert not batch.is_masked[torch.arange(batch.inputs.shape[1]) >= batch.lengths[:, None]].any()
    assert 0.05 < float(batch.is_masked.sum() / batch.lengths.sum()) < 0.25
    # hidden tokens do not enter
    changed = torch.where(batch.is_masked, (batch.inputs + 1) % 15, batch.inputs)
    torch.testing.assert_close(
        *(model.masked_logits(x, batch.lengths, batch.is_masked) for x in (batch.inputs, changed))
    )
    loss = task.loss(model, batch).loss_sum / 8
    logits = model.masked_logits(batch.inputs, batch.lengths, batch.is_masked)[batch.is_masked]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, batch.inputs[batch.is_masked].long()))
    _, started = built("lra-listops", **LISTOPS, start="pre")
    _, other = built("lra-listops", **LISTOPS)
    found = {name for name, p in started.state_dict().items() if not torch.equal(p, other.state_dict()[name])}
    assert "embeddings.weight" in found
    with refuses("mismatch", "pre", "positions"):
        built("lra-listops", **LISTOPS, start="pre", positions=True)
    with refuses("not-found", "nowhere"):
        built("lra-listops", **LISTOPS, start="nowhere")
    prepare("lra-retrieval")
    with refuses("unsupported", "masked"):
        built("lra-retrieval", data="aan", objective="masked")
