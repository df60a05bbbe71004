import dataclasses
import errno
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from hgrn2.train.curves import smooth
from hgrn2.train.gates import GateSummary, measure_gates
from hgrn2.train.metrics import MetricsWriter
from hgrn2.train.plots import memory_figure, plot_run
from tests.refusals import refuses


class ConstantGates:
    """Layer l forgets with the l-th half-life, but for its first channel, which never does."""

    def __init__(self, half_lives):
        self.half_lives = half_lives

    def gate_statistics(self, input_ids, cu_seqlens=None):
        layers = []
        for index, half_life in enumerate(self.half_lives):
            gate = torch.full((*input_ids.shape, 4), 0.5 ** (1 / half_life))
            gate[..., 0] = 1.0
            layers.append(
                {
                    "layer": 2 * index,
                    "lower_bound": torch.full((4,), 0.25),
                    "forget_gate": gate,
                    "state_norm": half_life,
                }
            )
        return layers


def record(run_dir, num_steps=40):
    with MetricsWriter(run_dir) as metrics:
        for step in range(1, num_steps + 1):
            loss = None if step == 5 else 2.0 + math.exp(-step)
            common = {"step": step, "tokens": step * 64, "elapsed_s": step * 0.5}
            metrics.write({"kind": "train", "loss": loss, "smoothed_loss": 2.1, **common})
            if step % 10 == 0:
                metrics.write({"kind": "validation", "val_loss": 2.5, "val_bits_per_byte": 1.2, **common})


def test_half_life_is_recovered():
    gates = measure_gates(ConstantGates([1.0, 10.0, 1000.0]), torch.zeros(2, 8, dtype=torch.long))
    np.testing.assert_allclose(gates.half_life_tokens[:, 1:], [[1.0] * 3, [10.0] * 3, [1000.0] * 3], rtol=1e-3)
    # a gate of exactly 1 has an endless memory, which is cut off where float32 ends
    assert np.all(gates.half_life_tokens[:, 0] > 1e7)
    assert np.all(np.isfinite(gates.half_life_tokens))
    assert gates.forget_gate_counts.sum(1).tolist() == [2 * 8 * 4] * 3
    assert gates.forget_gate_counts[0, 25] == 2 * 8 * 3
    assert gates.layer.tolist() == [0, 2, 4]
    assert gates.state_norm.tolist() == [1.0, 10.0, 1000.0]


def test_a_model_without_gates_has_no_summary():
    assert measure_gates(ConstantGates([]), torch.zeros(1, 8, dtype=torch.long)) is None


def test_gates_that_are_not_finite_have_no_summary():
    assert measure_gates(ConstantGates([1.0, math.nan]), torch.zeros(1, 8, dtype=torch.long)) is None


def test_gates_survive_the_file(tmp_path):
    gates = measure_gates(ConstantGates([1.0, 10.0]), torch.zeros(1, 8, dtype=torch.long))
    gates.save(tmp_path)
    read = GateSummary.load(tmp_path)
    for name, value in vars(gates).items():
        np.testing.assert_array_equal(getattr(read, name), value)
    assert [p.name for p in tmp_path.iterdir()] == ["gates.npz"]


def test_damaged_gates(tmp_path):
    gates = measure_gates(ConstantGates([1.0, 10.0]), torch.zeros(1, 8, dtype=torch.long))
    path = gates.save(tmp_path)
    good, arrays = path.read_bytes(), vars(gates)
    middle = len(good) // 2

    def written(**changes):
        np.savez_compressed(path, **arrays | changes)
        return path.read_bytes()

    damaged = [
        b"",
        b"not numpy's",
        b"PK\x03\x04 not a zip",
        good[:middle],
        good[:60] + bytes(byte ^ 255 for byte in good[60:middle]) + good[middle:],
        written(layer=np.array([{}, {}], dtype=object)),
        written(state_norm=np.zeros(3)),
        written(state_norm=np.array([1.0, np.nan])),
        written(lower_bound=np.array([["a"], ["b"]])),
    ]
    np.save(path.with_suffix(".npy"), np.zeros(3))
    damaged.append(path.with_suffix(".npy").read_bytes())
    for content in damaged:
        path.write_bytes(content)
        with refuses("damaged", path) as caught:
            GateSummary.load(tmp_path)
        assert "pickle" not in str(caught.value)
    path.unlink()
    with refuses("not-found", path):
        GateSummary.load(tmp_path)


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path):
    record(tmp_path)
    assert [p.name for p in plot_run(tmp_path)] == ["loss.png"]
    measure_gates(ConstantGates([1.0, 10.0]), torch.zeros(1, 8, dtype=torch.long)).save(tmp_path)
    paths = plot_run(tmp_path)
    assert [p.name for p in paths] == ["loss.png", "memory.png"]
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 0.05
    assert len(list((tmp_path / "plots").iterdir())) == 2


@pytest.mark.parametrize(("longest", "wanted"), [(6.0, {"1", "2", "5"}), (1e4, {"1", "100", "10k"})])
def test_half_lives_are_plain_numbers(longest, wanted):
    gates = measure_gates(ConstantGates([1.0, longest]), torch.zeros(1, 8, dtype=torch.long))
    half_lives = np.array([[1.0] * 4, [longest] * 4])
    figure = memory_figure(dataclasses.replace(gates, half_life_tokens=half_lives))
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[2].yaxis.get_ticklabels(which="both")]
    assert not any("10^" in label for label in labels)
    assert wanted <= set(labels)


def test_a_run_of_one_step_is_drawn(tmp_path):
    record(tmp_path, num_steps=1)
    assert plot_run(tmp_path)[0].exists()


def test_a_last_validation_that_was_not_finite_is_drawn(tmp_path):
    record(tmp_path, num_steps=10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        last = {"kind": "validation", "step": 11, "tokens": 704, "elapsed_s": 6.0, "val_loss": None}
        file.write(json.dumps(last) + "\n")
    assert plot_run(tmp_path)[0].exists()


def test_gates_of_a_run_without_a_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "start", "step": 0}) + "\n")
    measure_gates(ConstantGates([1.0, 10.0]), torch.zeros(1, 8, dtype=torch.long)).save(tmp_path)
    assert [p.name for p in plot_run(tmp_path)] == ["memory.png"]


def test_many_draw_the_same_run_at_once(tmp_path, monkeypatch):
    record(tmp_path)
    savefig, waiting = Figure.savefig, [True]

    def savefig_beside_another(self, *args, **options):
        savefig(self, *args, **options)
        if waiting and waiting.pop():
            plot_run(tmp_path)

    monkeypatch.setattr(Figure, "savefig", savefig_beside_another)
    (path,) = plot_run(tmp_path)
    assert not waiting
    assert [p.name for p in path.parent.iterdir()] == ["loss.png"]


def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch):
    record(tmp_path)

    def savefig(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="No space left"):
        plot_run(tmp_path)
    assert list((tmp_path / "plots").iterdir()) == []


def test_nothing_to_draw(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "start", "step": 0}) + "\n")
    with refuses("not-found", tmp_path):
        plot_run(tmp_path)


def test_smoothing_keeps_a_straight_line_and_the_ends():
    line = np.arange(500.0)
    smoothed = smooth(line)
    np.testing.assert_allclose(smoothed[:-5], line[:-5])
    assert abs(smoothed[-1] - line[-1]) < 4
    np.testing.assert_allclose(smooth(np.array([3.0])), [3.0])
