"""Image models: sizes, resolutions, timm's interface, and the layers against a loop over pixels' tokens."""

import dataclasses

import pytest
import torch

from hgrn2.models.vision import (
    PRESETS,
    VisionConfig,
    VisionModel,
    load_model,
    preset,
    save_model,
    token_contribution,
)  # fmt: skip
from hgrn2.models.vision.stem import sincos_positions
from tests.refusals import refuses

SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_classes": 3}
HGRN2 = {"mixers": {"hgrn2": {"expand_ratio": 8}}}
ATTENTION = {"layers": "attention", "mixers": {"attention": {"num_heads": 2, "rope_theta": None}}}


def small(**changes):
    torch.manual_seed(0)
    return VisionModel(VisionConfig(**{**SMALL, **(HGRN2 if "layers" not in changes else {}), **changes}))


def count(name):
    with torch.device("meta"):
        return sum(p.numel() for p in VisionModel(preset(name)).parameters())


def test_the_authors_sizes():
    assert count("hgrn2_vit_tiny") == pytest.approx(6.1e6, rel=0.01)
    assert count("hgrn2_vit_small") == pytest.approx(23.8e6, rel=0.01)
    config = preset("hgrn2_vit_tiny")
    assert (config.patch_size, config.position, config.global_pool, config.grid) == (14, "none", "avg", (16, 16))


@pytest.mark.parametrize("names", [
    ("hgrn2_vit_tiny", "hgrn1_vit_tiny", "plain_vit_tiny"),
    ("hgrn2_vit_small", "hgrn1_vit_small", "plain_vit_small"),
    ("hgrn2_cct_small", "hgrn1_cct_small", "plain_cct_small"),
])  # fmt: skip
def test_rivals_have_the_same_size(names):
    ours, *others = (count(name) for name in names)
    assert others == pytest.approx([ours] * len(others), rel=0.02)
    assert count("hgrn2_cct_small") <= 6e6


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration_that_json_keeps(name):
    config = preset(name)
    assert VisionConfig.from_dict(config.to_dict()) == config


def test_a_patch_model_equals_its_parts():
    model = small(directions="causal", layers="hgrn2", mixers={"hgrn2": {"expand_ratio": 8}}, depth=1).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    weight = model.patch_embed.proj.weight.flatten(1)
    tokens = patches @ weight.T + model.patch_embed.proj.bias
    block = model.layers[0]
    from hgrn2.nn.mixers import Context

    bound = torch.zeros(16, dtype=torch.float64)
    y = tokens + block.attn(block.attn_norm(tokens), None, Context(keep_state=False, lower_bound=bound))[0]
    y = model.norm(y + block.mlp(block.mlp_norm(y)))
    wanted = y.mean(1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("directions", ["bidirectional", "alternating", "alternating-2d", "2d", "2d-series"])
@pytest.mark.parametrize("changes", [{}, {"layers": "hgrn1", "mixers": {}}, ATTENTION])
def test_every_frame_trains_at_any_size(directions, changes):
    model = small(depth=4, directions=directions, position="sincos", drop_path_rate=0.5, drop_rate=0.1, **changes)
    for size in ((8, 8), (4, 12)):
        model.zero_grad()
        y = model(torch.randn(3, 3, *size))
        assert y.shape == (3, 3)
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_token_reaches_the_output_in_alternating_directions():
    model = small(directions="alternating").eval()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    tokens = model.forward_features(x)
    for place in (0, 15):
        (gradient,) = torch.autograd.grad(tokens[0, place].sum(), x, retain_graph=True)
        assert (gradient.abs().sum((0, 1)) > 0).all(), place


def test_learned_positions_fit_another_grid():
    model = small(position="learned").eval()
    assert model(torch.randn(1, 3, 8, 8)).shape == model(torch.randn(1, 3, 12, 6)).shape
    # unchanged at the size of training
    changed = small(position="none").eval()
    changed.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"})
    x = torch.randn(1, 3, 8, 8)
    tokens, _ = changed.embed(x)
    torch.testing.assert_close(model.embed(x)[0], tokens + model.pos_embed)


def test_sincos_positions_by_formula():
    found = sincos_positions(2, 3, 8, torch.device("cpu"))[0].view(2, 3, 8)
    for row, column in ((0, 0), (1, 2)):
        wanted = []
        for at in (row, column):
            angles = [at * 10000 ** -(i / 2) for i in range(2)]
            wanted += [*torch.tensor(angles).sin(), *torch.tensor(angles).cos()]
        torch.testing.assert_close(found[row, column], torch.stack(wanted).float())


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    block = small(drop_path_rate=0.5).layers[-1]
    assert float(block.drop_path) == 0.5
    torch.manual_seed(1)
    y = block._drop(torch.ones(4000, 2, 3))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert (y.flatten(1).amax(1) == y.flatten(1).amin(1)).all()
    assert float(y.mean()) == pytest.approx(1, abs=0.1)
    block.eval()
    assert (block._drop(torch.ones(8, 2, 3)) == 1).all()


def test_timms_interface():
    model = small(global_pool="seq").eval()
    x = torch.randn(2, 3, 8, 4)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 8, 16)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    weights = model.pool_weights(tokens)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    torch.testing.assert_close(pooled, (weights[:, :, None] * tokens).sum(1))
    last, maps = model.forward_intermediates(x, indices=[0, -1])
    assert [m.shape for m in maps] == [(2, 16, 4, 2)] * 2
    torch.testing.assert_close(last, tokens)
    torch.testing.assert_close(model.norm(maps[1].flatten(2).transpose(1, 2)), tokens)
    only = model.forward_intermediates(x, 1, norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(only[0], tokens)
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)
    assert model.num_classes == 0
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(1))
    assert model(x).shape == (2, 5)
    assert [info["num_chs"] for info in model.feature_info] == [16, 16]
    assert model.num_features == 16
    assert {"lower_bounds"} <= model.no_weight_decay()
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 8, 16)
    model.prune_intermediate_layers([0])
    assert len(model.layers) == 1


def test_activation_checkpointing_changes_nothing():
    model, x = small(), torch.randn(2, 3, 8, 8)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_roles():
    roles = small(stem="conv", global_pool="seq").parameter_roles()
    assert roles["patch_embed.convs.0.weight"] == "embedding"
    assert roles["head.weight"] == "head"
    assert roles["lower_bounds"] == "lower_bounds"
    assert roles["layers.0.attn.q_proj.weight"] == "matrix"
    assert roles["patch_embed.norms.0.weight"] == "vector"


def test_contribution_is_the_change_by_removing_a_token_of_a_linear_model():
    model = small(depth=1).double().eval()
    # without its layers the model is linear up to the norm, which is switched off by its weight
    maps = token_contribution(model, torch.randn(2, 3, 8, 4, dtype=torch.float64))
    assert maps.shape == (2, 4, 2)
    assert maps.isfinite().all()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    step = 1e-4
    tokens, grid = model.embed(images)
    tokens = tokens.detach()
    label = torch.tensor([1])

    def logit(z):
        return model.forward_head(model.run_from(z, grid))[0, 1]

    found = token_contribution(model, images, label).flatten()
    for place in (0, 7, 15):
        less, more = tokens.clone(), tokens.clone()
        less[0, place] *= 1 - step
        more[0, place] *= 1 + step
        slope = (logit(more) - logit(less)) / (2 * step)
        torch.testing.assert_close(found[place].double(), slope.detach(), rtol=1e-3, atol=1e-6)
    assert not model.training


def test_a_saved_model_is_the_same(tmp_path):
    model = small(stem="conv", global_pool="seq")
    model(torch.randn(4, 3, 8, 8))
    save_model(tmp_path / "m", model.config, model.state_dict(), {"classes": ["a", "b", "c"]})
    found, about = load_model(tmp_path / "m")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(found(x), model.eval()(x))
    assert about == {"classes": ["a", "b", "c"]}
    (tmp_path / "m/model.safetensors").write_bytes(b"broken")
    with refuses("damaged", "model.safetensors"):
        load_model(tmp_path / "m")
    with refuses("unreadable", "nothing"):
        load_model(tmp_path / "nothing")


def test_mistakes():
    with refuses("mismatch", "6", "in_chans"):
        small()(torch.randn(1, 6, 8, 8))
    with refuses("mismatch", "9 x 8", "patch_size"):
        small()(torch.randn(1, 3, 9, 8))
    with refuses("invalid-value", "images"):
        small()(torch.randn(3, 8, 8))
    with refuses("contradiction", "9 x 9", "patch_size"):
        VisionConfig(img_size=9, patch_size=2)
    with refuses("contradiction", "patch_size", 6):
        VisionConfig(img_size=12, patch_size=6, stem="conv")
    with refuses("unknown-name", "embed_dims", "embed_dim"):
        VisionConfig.from_dict({"embed_dims": 8})
    with refuses("unknown-name", "hgrn2_vit_tin", "hgrn2_vit_tiny"):
        preset("hgrn2_vit_tin")
    with refuses("unsupported", "rwkv6"):
        VisionConfig(
            **{**SMALL, "layers": "rwkv6", "mixers": {"rwkv6": {"head_size": 8}}, "directions": "bidirectional"}
        )
    with refuses("contradiction", "layers", "depth"):
        VisionConfig(**{**SMALL, "layers": "hgrn2,hgrn2,attention"})
    with refuses("invalid-value", "img_size"):
        VisionConfig(img_size=(32, 0))
    with refuses("unsupported", "num_classes"):
        token_contribution(small(num_classes=0), torch.randn(1, 3, 8, 8))
    with refuses("invalid-value", "indices"):
        small().forward_intermediates(torch.randn(1, 3, 8, 8), [7])


def test_changes_of_layers_and_depth_keep_the_rest():
    config = dataclasses.replace(VisionConfig(**SMALL, **HGRN2), directions="alternating")
    assert config.replace(depth=4).directions == ("causal", "reverse") * 2
    assert config.replace(layers="hgrn1").layer_mixers == ("hgrn1", "hgrn1")


@pytest.mark.slow
# dynamo looks at the gradients of its inputs
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_blocks_compile_once_for_each_direction():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = small(depth=8, directions="alternating-2d", drop_path_rate=0.1)
    model.compile_blocks(backend=backend, fullgraph=True)
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(graphs) == 4
