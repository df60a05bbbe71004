"""Directions of mixers: against loops over cells and scans, in float64, with padding and gradients."""

import math

import pytest
import torch
from torch.nn import functional

from hgrn2 import HGRN2Mixer
from hgrn2.nn.mixers import (
    DIRECTIONS,
    Context,
    find_mixer,
)
from hgrn2.nn.parameters import InitialValues

D = 8
OPTIONS = {
    "hgrn2": {"expand_ratio": 4, "v_activation": "silu"},
    "hgrn2-signed": {"expand_ratio": 4, "gate_range": "signed"},
    "hgrn2-conv": {"expand_ratio": 4, "conv_size": 4},
    "hgrn1-expanded": {"form": "real", "expand_ratio": 2},
    "hgrn1-real": {"form": "real"},
    "hgrn1-complex": {"form": "complex"},
    "gla": {"num_heads": 2},
    "griffin": {"num_blocks": 2},
    "mamba": {"state_size": 3},
    "attention": {"num_heads": 2, "num_kv_heads": 1},
    "attention-window": {"num_heads": 2, "window_size": 3},
}
GRIDS = [(1, 5), (5, 1), (1, 1), (3, 5)]


def make(name, direction, dtype=torch.float64):
    """A mixer with parameters that are all random."""
    found = find_mixer(name.split("-")[0])
    mixer = found.build(D, found.options(**OPTIONS[name]), direction=direction)
    mixer.reset_parameters(InitialValues(0.3, 0, 2, torch.Generator().manual_seed(1)))
    torch.manual_seed(2)
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return mixer.to(dtype)


def make_mask(batch, length):
    """Padding before, after and between tokens; the first sequence has none, the last one at least one token."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0], mask[-1, length // 2] = True, True
    return mask


def paths_of(rows, columns):
    """Every sequence of cells that a scan reads."""
    cells = [[r * columns + c for c in range(columns)] for r in range(rows)]
    turned = [list(path) for path in zip(*cells, strict=True)]
    flat, flat_turned = ([cell for path in paths for cell in path] for paths in (cells, turned))
    paths = {
        "causal": [flat], "reverse": [flat[::-1]], "bidirectional": [flat, flat[::-1]],
        "columns": [flat_turned], "columns-reverse": [flat_turned[::-1]],
        "rows-both": cells + [path[::-1] for path in cells], "columns-both": turned + [path[::-1] for path in turned],
    }  # fmt: skip
    return paths | {"2d": paths["rows-both"] + paths["columns-both"]}


def scan_hgrn2(mixer, inputs, bound):
    """The recurrence of HGRN2, token by token, for inputs [1, T, H, K]."""
    q, z, v = (part[0] for part in inputs)
    bound = bound.reshape(z.shape[1:])
    f = bound + (1 - bound) * z.sigmoid()
    k = (1 - bound) * (-z).sigmoid()
    v = functional.silu(v) if mixer.v_activation == "silu" else v
    state, outputs = torch.zeros(*z.shape[1:], v.shape[-1], dtype=z.dtype), []
    for t in range(len(q)):
        state = f[t].unsqueeze(-1) * state + k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
        outputs.append(mixer.scale * (functional.silu(q[t]).unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs).unsqueeze(0)


def scan_hgrn1(mixer, inputs, bound):
    """The recurrence of HGRN1, token by token, for decays and writes [1, T, D]."""
    h, outputs = 0, []
    turn = 1 if mixer.theta is None else torch.exp(1j * mixer.theta)
    for keep, write in zip(inputs[0][0], inputs[1][0], strict=True):
        h = turn * keep * h + write
        outputs.append(h)
    return torch.stack(outputs).unsqueeze(0)


def scan(mixer, inputs, bound):
    """The causal scan of other mixers, which tests of their own compare with transcriptions."""
    return mixer.mix(inputs, None, Context(keep_state=False, lower_bound=bound))[0]


def mix_by_loops(mixer, name, x, bound, mask, paths):
    """Scan each path of cells for itself, without its padding, and add what a cell reads."""
    scans = {"hgrn2": scan_hgrn2, "hgrn1-real": scan_hgrn1, "hgrn1-expanded": scan_hgrn1, "hgrn1-complex": scan_hgrn1}
    outputs = []
    for row, valid in zip(x, mask, strict=True):
        context = Context(keep_state=False, lower_bound=bound)
        inputs, others, _ = mixer.project(row.unsqueeze(0), None, context)
        total = 0
        for path in paths:
            seen = torch.tensor([cell for cell in path if valid[cell]], dtype=torch.long)
            if len(seen):
                y = scans.get(name, scan)(mixer, tuple(part[:, seen] for part in inputs), bound)
                total = total + y.new_zeros(1, len(row), *y.shape[2:]).index_add(1, seen, y)
        outputs.append(mixer.finish(total, others))
    return torch.cat(outputs)


def check_equal(mixer, x, bound, mask, found, wanted):
    """Compare outputs at tokens and the gradients of the input, the bound and every parameter."""
    inputs = {"x": x, "bound": bound} | dict(mixer.named_parameters())
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(4))
    weights = weights * mask.unsqueeze(-1)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found * mask.unsqueeze(-1), wanted * mask.unsqueeze(-1), rtol=1e-9, atol=1e-11)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    one, two = (torch.autograd.grad((y * weights).sum(), list(inputs.values()), **options) for y in (found, wanted))
    for key, a, b in zip(inputs, one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def example(length, batch=3):
    torch.manual_seed(5)
    x = torch.randn(batch, length, D, dtype=torch.float64, requires_grad=True)
    bound = torch.rand(D, dtype=torch.float64).mul(0.9).requires_grad_()
    return x, bound


def bound_for(mixer, bound):
    return bound if mixer.uses_lower_bound else None


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "2d-series"])
@pytest.mark.parametrize("name", ["hgrn2", "hgrn2-signed", "hgrn1-real", "hgrn1-expanded", "hgrn1-complex", "gla"])
def test_outputs_and_gradients_are_those_of_loops_over_cells(name, direction, grid, masked):
    mixer = make(name, direction)
    x, bound = example(math.prod(grid))
    mask = make_mask(*x.shape[:2]) if masked else torch.ones(x.shape[:2], dtype=torch.bool)
    own = bound_for(mixer, bound)
    found, _ = mixer(x, None, Context(mask=mask if masked else None, lower_bound=own, grid=grid))
    wanted = mix_by_loops(mixer, name, x, own, mask, paths_of(*grid)[direction])
    check_equal(mixer, x, bound, mask, found, wanted)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["hgrn2", "hgrn1-complex"])
def test_the_series_form_mixes_columns_and_then_rows(name, grid, masked):
    mixer = make(name, "2d-series")
    x, bound = example(math.prod(grid))
    mask = make_mask(*x.shape[:2]) if masked else torch.ones(x.shape[:2], dtype=torch.bool)
    found, _ = mixer(x, None, Context(mask=mask if masked else None, lower_bound=bound, grid=grid))
    paths = paths_of(*grid)
    y = mix_by_loops(mixer, name, x, bound, mask, paths["columns-both"])
    check_equal(mixer, x, bound, mask, found, mix_by_loops(mixer, name, y, bound, mask, paths["rows-both"]))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", OPTIONS)
def test_reverse_is_causal_on_the_flipped_sequence(name, masked):
    mixer = make(name, "reverse")
    x, bound = example(9)
    mask = make_mask(*x.shape[:2]) if masked else torch.ones(x.shape[:2], dtype=torch.bool)
    own = bound_for(mixer, bound)
    found, _ = mixer(x, None, Context(mask=mask if masked else None, lower_bound=own))
    mixer.set_direction("causal")
    wanted, _ = mixer(x.flip(1), None, Context(mask=mask.flip(1) if masked else None, lower_bound=own))
    check_equal(mixer, x, bound, mask, found, wanted.flip(1))
    assert not torch.allclose(found, wanted)


@pytest.mark.parametrize("name", [name for name in OPTIONS if not name.startswith("attention")])
def test_bidirectional_is_a_forward_scan_and_a_flipped_one(name):
    mixer = make(name, "bidirectional")
    x, bound = example(9)
    own = bound_for(mixer, bound)
    found, _ = mixer(x, None, Context(lower_bound=own))
    inputs, others, _ = mixer.project(x, None, Context(lower_bound=own, order="bidirectional"))
    flipped = scan(mixer, tuple(part.flip(1) for part in inputs), own).flip(1)
    wanted = mixer.finish(scan(mixer, inputs, own) + flipped, others)
    check_equal(mixer, x, bound, torch.ones(x.shape[:2], dtype=torch.bool), found, wanted)


@pytest.mark.parametrize("direction", ["causal", "reverse", "bidirectional"])
@pytest.mark.parametrize("name", OPTIONS)
def test_padding_and_packing_change_nothing_for_the_tokens(name, direction):
    mixer = make(name, direction)
    x, bound = example(9)
    own, mask = bound_for(mixer, bound), make_mask(*x.shape[:2])
    single = [
        mixer(row[valid].unsqueeze(0), None, Context(lower_bound=own))[0] for row, valid in zip(x, mask, strict=True)
    ]
    wanted = torch.cat(single, 1)
    padded, _ = mixer(x, None, Context(mask=mask, lower_bound=own))
    bounds = torch.tensor([0, 0, *mask.sum(1).cumsum(0).tolist(), int(mask.sum())])
    packed, _ = mixer(x[mask].unsqueeze(0), None, Context(bounds, lower_bound=own))
    assert torch.isfinite(padded).all()
    for found in (padded[mask].unsqueeze(0), packed):
        check_equal(mixer, x, bound, torch.ones(found.shape[:2], dtype=torch.bool), found, wanted)


@pytest.mark.parametrize("direction", ["bidirectional", "2d", "2d-series"])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_sees_tokens_of_both_sides(window, direction):
    name = "attention" if window is None else "attention-window"
    mixer = make(name, direction)
    x, _ = example(6)
    mask = make_mask(*x.shape[:2])
    found, _ = mixer(x, None, Context(mask=mask, grid=(2, 3)))
    for row, valid, y in zip(x, mask, found, strict=True):
        q, k, v = (part[0] for part in mixer.project(row[valid].unsqueeze(0), None, Context()).inputs)
        k, v = (part.repeat_interleave(2 // part.shape[1], 1) for part in (k, v))
        scores = torch.einsum("the,she->hts", q, k) / q.shape[-1] ** 0.5
        place = torch.arange(len(q))
        far = (place.unsqueeze(0) - place.unsqueeze(1)).abs() >= (window or 99)
        mixed = torch.einsum("hts,she->the", scores.masked_fill(far, -torch.inf).softmax(-1), v)
        torch.testing.assert_close(y[valid], mixer.finish(mixed.flatten(1).unsqueeze(0))[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *(("hgrn2", direction) for direction in ("reverse", "bidirectional", "columns", "2d", "2d-series")),
        ("hgrn1-complex", "2d"),
        ("mamba", "bidirectional"),
        ("attention", "bidirectional"),
    ],
)
def test_a_compiled_mixer_equals_an_eager_one(name, direction):
    mixer = make(name, direction, torch.float32)
    x, bound = (t.detach().float() for t in example(12))
    own, mask = bound_for(mixer, bound), make_mask(*x.shape[:2])

    def call(x):
        return mixer(x, None, Context(mask=mask, keep_state=False, lower_bound=own, grid=(3, 4)))[0]

    torch.compiler.reset()
    outputs = [f(x) for f in (torch.compile(call, fullgraph=True, backend="aot_eager"), call)]
    found, wanted = (torch.autograd.grad(y.square().sum(), list(mixer.parameters())) for y in outputs)
    torch.testing.assert_close(outputs[0], outputs[1])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["2d", "2d-series"])
@pytest.mark.parametrize("name", ["hgrn2-conv", "griffin", "mamba"])
def test_convolutions_stay_within_rows_and_columns(name, direction):
    mixer, (rows, columns) = make(name, direction), (3, 5)
    x, bound = example(rows * columns)
    own = bound_for(mixer, bound)
    found, _ = mixer(x, None, Context(lower_bound=own, grid=(rows, columns)))

    def mix_along(x, axis):
        """The bidirectional mixer with every row or column as a sequence of its own."""
        cells = x.unflatten(1, (rows, columns))
        cells = cells if axis == "rows" else cells.transpose(1, 2)
        sequences = cells.flatten(0, 1)
        mixer.set_direction("bidirectional")
        y = mixer(sequences, None, Context(lower_bound=own))[0].unflatten(0, cells.shape[:2])
        return (y if axis == "rows" else y.transpose(1, 2)).flatten(1, 2)

    if direction == "2d-series":
        wanted = mix_along(mix_along(x, "columns"), "rows")
    else:
        # the separable convolution by hand: along rows, then along columns
        def convolve(conv, x):
            for axis in (2, 1):
                padded = functional.pad(x, (0, 0, 2, 1) if axis == 2 else (0, 0, 0, 0, 2, 1))
                taps = conv.weight[:, 0].unbind(1)
                x = sum(padded.narrow(axis, j, x.shape[axis]) * tap for j, tap in enumerate(taps))
            return x

        context = Context(lower_bound=own, grid=(rows, columns), order="bidirectional", axis="both")
        if name == "hgrn2-conv":
            parts = {"q": mixer.q_proj(x), "f": mixer.f_proj(x), "i": mixer.i_proj(x)}
            for part, z in zip(("q", "f", "i"), mixer.project(x, None, context).inputs, strict=True):
                y = convolve(getattr(mixer, f"{part}_conv1d"), parts[part].unflatten(1, (rows, columns)))
                torch.testing.assert_close(z.flatten(2), y.flatten(1, 2))
        inputs, others, _ = mixer.project(x, None, context)
        outputs = []
        for turned in (False, True):
            cells = [part.unflatten(1, (rows, columns)) for part in inputs]
            cells = [part.transpose(1, 2).flatten(0, 1) if turned else part.flatten(0, 1) for part in cells]
            y = mixer.mix_in_order(tuple(cells), Context(lower_bound=own, order="bidirectional"))
            y = y.unflatten(0, (len(x), -1))
            outputs.append((y.transpose(1, 2) if turned else y).flatten(1, 2))
        wanted = mixer.finish(sum(outputs), others)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    check_equal(mixer, x, bound, mask, found, wanted)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(0, 6, D), (2, 0, D)], ids=str)
@pytest.mark.parametrize("name", ["hgrn2-conv", "hgrn1-complex", "griffin", "mamba", "attention"])
def test_without_sequences_or_tokens(name, shape, direction):
    grid = (2, 3) if shape[1] else (0, 3)
    y, state = make(name, direction)(torch.zeros(shape, dtype=torch.float64), None, Context(grid=grid))
    assert y.shape == shape
    assert direction == "causal" or state == {}


@pytest.mark.parametrize("direction", ["2d", "2d-series"])
@pytest.mark.parametrize("grid", [(16, 16), pytest.param((64, 64), marks=pytest.mark.slow)], ids=str)
def test_larger_grids(grid, direction):
    mixer = make("hgrn2", direction)
    x, bound = example(math.prod(grid), batch=2)
    mask = make_mask(*x.shape[:2])
    with torch.no_grad():
        found, _ = mixer(x, None, Context(mask=mask, lower_bound=bound, grid=grid))
        paths, y = paths_of(*grid), x
        for key in ("2d",) if direction == "2d" else ("columns-both", "rows-both"):
            y = mix_by_loops(mixer, "hgrn2-signed", y, bound, mask, paths[key])
    torch.testing.assert_close(found[mask], y[mask], rtol=1e-9, atol=1e-11)


class ImageLayer(torch.nn.Module):
    """A layer over the cells of images [B, D, rows, columns] of any size."""

    def __init__(self, direction):
        super().__init__()
        self.mixer = HGRN2Mixer(16, 8, direction=direction)

    def forward(self, images):
        y, _ = self.mixer(images.flatten(2).transpose(1, 2), grid=tuple(images.shape[2:]), keep_state=False)
        return y.transpose(1, 2).unflatten(2, images.shape[2:])


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["columns", "2d"])
def test_one_program_for_images_of_every_size(direction):
    torch.manual_seed(0)
    layer = ImageLayer(direction).eval()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    calls = [compiled, torch.func.vmap(lambda image: layer(image.unsqueeze(0))[0])]
    if direction != "columns":
        # torch.export cannot prove a guard of the columns' strides
        names = {0: "batch", 2: "rows", 3: "columns"}
        sizes = {axis: torch.export.Dim(name, min=2, max=64) for axis, name in names.items()}
        example = (torch.randn(2, 16, 4, 6),)
        calls.append(torch.export.export(layer, example, dynamic_shapes=(sizes,)).module())
    for shape in ((3, 16, 5, 7), (2, 16, 8, 3)):
        images = torch.randn(shape)
        wanted = layer(images)
        for call in calls:
            torch.testing.assert_close(call(images), wanted)


@pytest.mark.parametrize(("direction", "passes"), [("reverse", 1), ("bidirectional", 1), ("2d", 1), ("2d-series", 2)])
@pytest.mark.parametrize("name", ["hgrn2", "hgrn1-real", "gla"])
def test_scans_read_the_projected_inputs_without_copies(name, direction, passes):
    mixer = make(name, direction)
    project, mix, projected, scanned = mixer.project, mixer.mix, [], []

    def watch_project(x, state, context):
        found = project(x, state, context)
        projected.extend(found.inputs)
        return found

    def watch_mix(inputs, state, context, *, reverse=False):
        scanned.append(inputs)
        return mix(inputs, state, context, reverse=reverse)

    mixer.project, mixer.mix = watch_project, watch_mix
    mixer(example(15)[0], None, Context(grid=(3, 5)))
    assert len(scanned) == {"reverse": 1, "bidirectional": 2, "2d": 4, "2d-series": 4}[direction]
    found = {part.untyped_storage().data_ptr() for inputs in scanned for part in inputs}
    assert found == {part.untyped_storage().data_ptr() for part in projected}
    assert len(projected) == passes * len(scanned[0])
