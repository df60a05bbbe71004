# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from hgrn2.models import HGRN2LM, HGRN2Config, presets
from hgrn2.nn.mixers import HGRN2
from tests.models.cases import FULL, SIZE, config_of, make_model, tokens
from tests.refusals import refuses


def on_meta(config):
    with torch.device("meta"):
        return HGRN2LM(config)


# loss


@pytest.mark.parametrize("name", ["fla", "official-lra", "tied", "full-attention"])
def test_the_loss_is_the_cross_entropy_of_the_logits(name):
    model = make_model(config_of(name))
    ids, targets = tokens(2, 17), tokens(2, 17, seed=2)
    targets[0, :5] = -100
    targets[1, -1] = -100
    found, count, state = model.loss(ids, targets)
    logits, wanted_state = model(ids)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert int(count) == 2 * 17 - 6
    for key, x in wanted_state.tensors().items():
        assert torch.equal(state.tensors()[key], x)
    names = [n for n, _ in model.named_parameters()]
    grads = [torch.autograd.grad(3 * x, list(model.parameters())) for x in (found, wanted)]
    for n, one, two in zip(names, *grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, msg=n)


def test_a_loss_without_targets_is_zero():
    model = make_model(config_of("fla"))
    found = model.loss(tokens(1, 5), torch.full((1, 5), -100))
    assert (found.sum.item(), found.mean.item(), int(found.num_targets)) == (0.0, 0.0, 0)
    found.mean.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_the_parts_of_a_loss_have_names(compiled):
    model = make_model(config_of("fla"), torch.float32)
    ids, targets = tokens(2, 9), tokens(2, 9, seed=2)
    targets[0, :3] = -100
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager") if compiled else model.loss
    found = loss(ids, targets)
    total, count, state = found
    assert total is found.sum
    assert state is found.state
    assert int(count) == int(found.num_targets) == 15
    wanted = F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found.mean, wanted)
    found.mean.backward()
    assert all(p.grad is not None for n, p in model.named_parameters())
    assert repr(found).startswith(f"LossOutput(mean={wanted.item():.4g}, num_targets=15, state=ModelState(3 layers")


def test_a_state_prints_in_one_line_and_moves():
    model = make_model(config_of("short-conv"), torch.bfloat16)
    state = model.init_state(2)
    assert repr(state) == f"ModelState(3 layers, 2 sequences, {state.num_bytes:,} bytes, bfloat16, float32, cpu)"
    assert state.num_sequences == 2
    moved = state.to("meta")
    assert {x.device.type for x in moved.tensors().values()} == {"meta"}
    assert {n: x.dtype for n, x in moved.tensors().items()} == {n: x.dtype for n, x in state.tensors().items()}
    empty = model.hidden_states(tokens(1, 3), keep_state=False)[1]
    assert (repr(empty), empty.num_sequences) == ("ModelState(3 layers, no tensors kept)", 0)
    for index in ([0], torch.tensor([0.0]), torch.tensor([[0]])):
        with refuses("invalid-value", "index"):
            state.select(index)


def test_the_loss_in_windows_is_that_of_the_whole():
    model = make_model(config_of("short-conv"))
    ids = tokens(1, 21)
    whole, _, _ = model.loss(ids[:, :-1], ids[:, 1:])
    first, _, state = model.loss(ids[:, :8], ids[:, 1:9])
    second, _, _ = model.loss(ids[:, 8:-1], ids[:, 9:], state)
    torch.testing.assert_close(first + second, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["fla", "official-lm", "official-lra", "short-conv-2-bias", "window-attention"])
def test_autocast(name):
    config = config_of(name)
    model, exact = make_model(config, torch.float32).train(), make_model(config).train()
    ids, targets = tokens(2, 70), tokens(2, 70, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = model.loss(ids, targets)
        logits, state = model(ids)
        packed, _ = model(ids.view(1, -1), cu_seqlens=torch.tensor([0, 70, 140]))
        stepped, _ = model.step(ids[:, 0], state)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.isfinite().all()
    assert packed.isfinite().all()
    assert stepped.isfinite().all()
    assert all(x.dtype == torch.float32 for key, x in state.tensors().items() if key.endswith("recurrent"))
    wanted, _, _ = exact.loss(ids, targets)
    assert abs(loss.item() / wanted.item() - 1) < 0.05
    wanted.backward()
    for key, one in model.named_parameters():
        assert one.grad.dtype == torch.float32, key
        assert one.grad.isfinite().all(), key
    one, two = (torch.cat([p.grad.flatten().double() for p in m.parameters()]) for m in (model, exact))
    assert F.cosine_similarity(one, two, dim=0) > 0.98


@pytest.mark.parametrize("name", ["fla", "official-lra", "short-conv", "full-attention"])
def test_a_model_in_bfloat16(name):
    config = config_of(name)
    model, exact = make_model(config, torch.bfloat16), make_model(config)
    ids = tokens(2, 40)
    with torch.no_grad():
        logits, state = model(ids)
        stepped, _ = model.step(ids[:, 0], state)
        wanted, _ = exact(ids)
    assert logits.dtype == stepped.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.double().flatten(), wanted.flatten(), dim=0) > 0.97


# torch.compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("changes", [{}, {"use_short_conv": True, "lower_bound": "exclusive"}])
def test_a_block_is_compiled_once_for_all_layers(changes):
    torch._dynamo.reset()
    counters.clear()
    config = HGRN2Config.from_dict(SIZE | {"num_hidden_layers": 4} | changes)
    model = make_model(config, torch.float32).train()
    ids, targets, bounds = tokens(1, 24), tokens(1, 24, seed=2), torch.tensor([0, 9, 24])
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            model.model.compile_blocks(backend="aot_eager")
        model.zero_grad()
        for _ in range(2):
            loss = model.loss(ids, targets, cu_seqlens=bounds, keep_state=False).mean
            loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# torch's own tracing of autograd functions warns of itself
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# and looks at the gradients of what it goes on from after a break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ["official-lra", "window-attention"])
def test_compiles_without_a_break_but_in_packed_attention(name):
    torch._dynamo.reset()
    model = make_model(config_of(name), torch.float32).train()
    ids, targets = tokens(1, 24), tokens(1, 24, seed=2)
    bounds = torch.tensor([0, 9, 24])
    for settings in ({}, {"cu_seqlens": bounds}):
        # packed attention goes from sequence to sequence, which no graph can
        whole = config_of(name).attn is None or not settings
        compiled = torch.compile(model.loss, fullgraph=whole, backend="aot_eager")
        found, _, state = compiled(ids, targets, **settings)
        wanted, _, wanted_state = model.loss(ids, targets, **settings)
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(x, list(model.parameters())) for x in (found, wanted)]
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
        assert state.tensors().keys() == wanted_state.tensors().keys()
    torch._dynamo.reset()


# names, counts, initial values


def test_parameters_of_the_published_models():
    counts = {name: on_meta(presets.preset(name)).num_parameters() for name in presets.PRESETS}
    assert counts["wikitext-44m"] == 44_657_148
    assert counts["1.3b"] == 1_364_396_032
    assert counts["2.7b"] == 2_701_724_160
    assert abs(counts["150m"] / 150e6 - 1) < 0.02
    assert abs(counts["385m"] / 385e6 - 1) < 0.02
    assert counts["tiny"] < 10e6


def test_names_and_shapes_are_those_of_the_published_checkpoints():
    config = presets.b1_3()
    width, inner, vocab = config.hidden_size, 5632, 32000
    wanted = {"model.embeddings.weight": (vocab, width), "model.lower_bounds": (24, width)}
    for i in range(24):
        layer = f"model.layers.{i}"
        for name in ("attn_norm", "mlp_norm", "attn.g_norm"):
            wanted[f"{layer}.{name}.weight"] = (width,)
        for name in "qfio":
            wanted[f"{layer}.attn.{name}_proj.weight"] = (width, width)
        for name in ("gate", "up"):
            wanted[f"{layer}.mlp.{name}_proj.weight"] = (inner, width)
        wanted[f"{layer}.mlp.down_proj.weight"] = (width, inner)
    wanted |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    found = {name: tuple(x.shape) for name, x in on_meta(config).state_dict().items()}
    assert found == wanted
    assert len(found) == 244


def test_names_of_the_optional_parts():
    model = on_meta(HGRN2Config.from_dict(SIZE | {"use_short_conv": True, "attn": FULL, "use_lower_bound": False}))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert {n for n in shapes if "conv" in n} == {
        f"model.layers.{i}.attn.{n}_conv1d.weight" for i in (0, 2) for n in "qfi"
    }
    assert shapes["model.layers.0.attn.q_conv1d.weight"] == (16, 1, 4)
    assert shapes["model.layers.1.attn.k_proj.weight"] == (8, 16)
    assert "model.lower_bounds" not in shapes


def test_tied_weights_are_one_parameter():
    model = HGRN2LM(config_of("tied"))
    assert model.lm_head.weight is model.model.embeddings.weight
    assert {"lm_head.weight", "model.embeddings.weight"} <= model.state_dict().keys()
    assert "lm_head.weight" not in model.parameter_roles()
    assert model.num_parameters() == HGRN2LM(config_of("fla")).num_parameters() - 29 * 16


@pytest.mark.parametrize("name", ["fla", "tied", "official-lra", "full-attention"])
def test_built_without_memory_and_filled_later(name):
    config = config_of(name)
    model = on_meta(config)
    assert all(p.is_meta for p in model.parameters())
    assert model.init_state(3).num_bytes == HGRN2LM(config).init_state(3).num_bytes
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    torch.manual_seed(5)
    model.initialize()
    torch.manual_seed(5)
    wanted = HGRN2LM(config)
    torch.manual_seed(5)
    wanted.initialize()
    for (key, one), (_, two) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(one, two), key
    if config.tie_word_embeddings:
        assert model.lm_head.weight is model.model.embeddings.weight


def test_initial_values_follow_the_table():
    config = HGRN2Config(
        vocab_size=500, hidden_size=128, num_hidden_layers=8, expand_ratio=32, use_short_conv=True, use_bias=True,
        block_norm="layernorm", initializer_range=0.03, attn={"layers": [3], "num_heads": 4, "qkv_bias": True},  # type: ignore[arg-type]
    )  # fmt: skip
    torch.manual_seed(0)
    model = HGRN2LM(config)
    for name, p in model.named_parameters():
        if name.endswith(".bias") or name == "model.lower_bounds":
            assert not p.any(), name
        elif p.dim() == 1:
            assert bool((p == 1).all()), name
        else:
            std = 0.03 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.03
            tolerance = 4 / math.sqrt(2 * p.numel())
            assert abs(p.std().item() / std - 1) < tolerance, name
            assert abs(p.mean().item()) < 4 * std / math.sqrt(p.numel()), name
    bounds = torch.stack([torch.as_tensor(b) for b in model.model.bounds()])
    torch.testing.assert_close(bounds, (torch.arange(8) / 8)[:, None].expand(8, 128))


def test_an_initialisation_can_be_repeated():
    models = [HGRN2LM(config_of("fla")) for _ in range(2)]
    for model in models:
        model.initialize(torch.Generator().manual_seed(3))
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_untrained_model_is_indifferent():
    torch.manual_seed(0)
    model = HGRN2LM(presets.tiny(vocab_size=300)).eval()
    with torch.no_grad():
        ids = torch.randint(300, (1, 65))
        loss, count, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert abs(loss.item() / int(count) - math.log(300)) < 0.3


def test_roles():
    roles = HGRN2LM(HGRN2Config.from_dict(SIZE | {"use_short_conv": True, "use_bias": True})).parameter_roles()
    assert roles["model.embeddings.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert roles["model.lower_bounds"] == "lower_bounds"
    assert {n.rsplit(".", 2)[1] for n, r in roles.items() if r == "matrix"} == {
        "q_proj", "f_proj", "i_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    vectors = {n for n, r in roles.items() if r == "vector"}
    assert "model.norm.weight" in vectors
    assert "model.layers.0.attn.q_conv1d.weight" in vectors
    assert all(n in vectors for n in roles if n.endswith("bias"))


# looking inside


@pytest.mark.parametrize("name", ["fla", "no-bound", "short-conv", "full-attention"])
def test_gate_statistics(name):
    model = make_model(config_of(name), torch.float32)
    ids = tokens(1, 12)
    bounds = torch.tensor([0, 5, 12])
    _, state = model(ids, cu_seqlens=bounds)
    statistics = model.gate_statistics(ids, cu_seqlens=bounds)
    recurrent = [i for i, layer in enumerate(model.model.layers) if isinstance(layer.attn, HGRN2)]
    assert [entry["layer"] for entry in statistics] == recurrent
    for entry in statistics:
        gate, bound = entry["forget_gate"], entry["lower_bound"]
        assert gate.shape == (1, 12, 16)
        assert bound.shape == (16,)
        assert bool(((gate >= bound) & (gate < 1)).all())
        norms = state.layers[entry["layer"]]["recurrent"].square().sum((2, 3)).sqrt()
        assert entry["state_norm"] == pytest.approx(norms.mean().item(), rel=1e-5)
    first = statistics[0]
    if first["layer"] == 0 and name == "fla":
        x = model.model.layers[0].attn_norm(model.model.embeddings(ids))
        torch.testing.assert_close(first["forget_gate"], model.model.layers[0].attn.f_proj(x).sigmoid())
    # nothing is left behind
    assert not any(layer.attn._forward_pre_hooks for layer in model.model.layers)


def test_a_loss_is_a_call_of_the_model():
    """Wrappers that shard a model, or spread it over processes, hook its call."""
    model = make_model(config_of("fla"))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    ids, targets = tokens(2, 5), tokens(2, 5, seed=2)
    wanted = F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten(), reduction="sum")
    for found in (model.loss(ids, targets), model(ids, targets=targets)):
        torch.testing.assert_close(found.sum, wanted)
    assert len(calls) == 3


def test_a_loss_of_other_shapes_is_refused():
    model = make_model(config_of("fla"))
    with refuses("contradiction", "targets", "[1, 4]", "[1, 5]"):
        model.loss(tokens(1, 5), tokens(1, 4))


IDS = tokens(2, 5)


@pytest.mark.parametrize(
    ("call", "code", "names"),
    [
        (lambda m: m([[1, 2]]), "invalid-value", ["input_ids", "list"]),
        (lambda m: m(IDS.numpy()), "invalid-value", ["input_ids", "ndarray"]),
        (lambda m: m(IDS[0]), "invalid-value", ["input_ids", "torch.int64", "[5]"]),
        (lambda m: m(IDS.float()), "invalid-value", ["input_ids", "torch.float32"]),
        (lambda m: m(IDS.bool()), "invalid-value", ["input_ids", "torch.bool"]),
        (lambda m: m(IDS.to("meta")), "invalid-value", ["input_ids", "meta", "cpu"]),
        (lambda m: m.loss(IDS, [1]), "invalid-value", ["targets", "list"]),
        (lambda m: m.loss(IDS, None), "invalid-value", ["targets", "None"]),
        (lambda m: m.loss(IDS, IDS + 29), "invalid-value", ["targets", "28", "-100"]),
        (lambda m: m.loss(IDS, IDS - 50), "invalid-value", ["targets", "28", "-100"]),
        (lambda m: m.step(IDS, m.init_state(2)), "invalid-value", ["token_ids", "[2, 5]"]),
        (lambda m: m.step([1, 2], m.init_state(2)), "invalid-value", ["token_ids", "list"]),
        (lambda m: m(IDS, {}), "invalid-value", ["state", "dict"]),
        (lambda m: m(IDS, m.init_state(2, "meta")), "invalid-value", ["state", "meta", "cpu"]),
        (lambda m: m(IDS, attention_mask=[[1]]), "invalid-value", ["attention_mask", "list", "[2, 5]"]),
        (
            lambda m: m(IDS, attention_mask=torch.ones(2, 4)),
            "invalid-value",
            ["attention_mask", "[2, 4]", "[2, 5]"],
        ),
        (lambda m: m(IDS[:1], cu_seqlens=[0, 5]), "invalid-value", ["cu_seqlens", "list"]),
        (
            lambda m: m(IDS[:1], cu_seqlens=torch.tensor([0, 5], device="meta")),
            "invalid-value",
            ["cu_seqlens", "meta", "input_ids"],
        ),
        (lambda m: m(IDS, cu_seqlens=torch.tensor([0, 5])), "contradiction", ["cu_seqlens"]),
        (lambda m: m.init_state("2"), "invalid-value", ["batch_size", "'2'"]),
        (lambda m: HGRN2LM({"vocab_size": 3}), "invalid-value", ["config", "dict", "hgrn2.HGRN2Config"]),
        (lambda m: HGRN2LM("tiny"), "invalid-value", ["config", "'tiny'", "hgrn2.HGRN2Config"]),
        (lambda m: m.gate_statistics([1]), "invalid-value", ["input_ids", "list"]),
        (lambda m: presets.preset(3), "invalid-value", ["name", "3"]),
        (lambda m: presets.variant(["fla"]), "invalid-value", ["name", "list"]),
    ],
)
def test_inputs_of_another_kind_are_refused_in_one_line(call, code, names):
    with refuses(code, *names) as caught:
        call(make_model(config_of("short-conv"), torch.float32))
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_any_width_are_ids():
    model = make_model(config_of("fla"), torch.float32)
    wanted = model.loss(IDS, IDS).sum
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(model.loss(IDS.to(dtype), IDS.to(dtype)).sum, wanted)


def test_padding_anywhere_leaves_the_tokens_alone():
    model = make_model(HGRN2Config.from_dict(SIZE | {"use_short_conv": True}))
    ids = torch.tensor([[5, 6, 7, 8, 9, 3]])
    expected, end = model(ids)
    for mask in ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]):
        keep = torch.tensor([mask])
        padded = torch.ones_like(keep).masked_scatter(keep.bool(), ids)
        found, state = model(padded, attention_mask=keep)
        torch.testing.assert_close(found[:, keep[0].bool()], expected)
        for name, x in end.tensors().items():
            torch.testing.assert_close(state.tensors()[name], x)


def test_a_state_or_ids_that_do_not_fit_are_refused():
    model = make_model(HGRN2Config.from_dict(SIZE))
    deeper = make_model(HGRN2Config.from_dict(SIZE | {"num_hidden_layers": SIZE["num_hidden_layers"] + 1}))
    ids = torch.tensor([[1, 2, 3]])
    with refuses("mismatch", "4 layers", "3"):
        model(ids, deeper.init_state(1))
    with refuses("mismatch", "2 sequences"):
        model(ids, model.init_state(2))
    with refuses("invalid-value", "input_ids", "28"):
        model(ids + model.config.vocab_size)
    with refuses("invalid-value", "cu_seqlens"):
        model(ids, cu_seqlens=torch.tensor([0, 2]))
    with refuses("unknown-name", "backend", "'foo'"):
        HGRN2LM(model.config, backend="foo")


# layers without channel mixers


def test_a_layer_without_a_channel_mixer_adds_its_mixer_only():
    model = make_model(config_of("fla").replace(intermediate_size=0))
    assert not any("mlp" in name for name, _ in model.named_parameters())
    ids = tokens(2, 9)
    x = model.model.embeddings(ids)
    bounds = [None] * len(model.model.layers)
    if model.model.lower_bounds is not None:
        p = model.model.lower_bounds.softmax(0)
        bounds = list((p.cumsum(0) - p[0]).unflatten(-1, (model.config.num_heads, -1)))
    from hgrn2.nn.mixers.base import Context

    for layer, bound in zip(model.model.layers, bounds, strict=True):
        x = x + layer.attn(layer.attn_norm(x), None, Context(lower_bound=bound))[0]
    torch.testing.assert_close(model(ids)[0], model.lm_head(model.model.norm(x)), rtol=1e-10, atol=1e-12)


def test_a_model_without_channel_mixers_is_counted():
    from hgrn2.models.cost import cost

    config = config_of("fla")
    with_mixer, without = cost(config, 64), cost(config.replace(intermediate_size=0), 64)
    per_layer = 3 * config.hidden_size * config.intermediate_size + config.hidden_size
    assert with_mixer.parameters - without.parameters == config.num_hidden_layers * per_layer
    assert with_mixer.activation_bytes_per_token > without.activation_bytes_per_token
