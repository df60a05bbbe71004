"""fla's model as installed, run: its checkpoints, loaded here, give its logits.

Weights are far from their initial values, lower bounds far from uniform.
"""

import os

import pytest
import torch
from torch.nn import functional

from hgrn2.formats.opening import open_folder
from hgrn2.models import HGRN2LM
from tests.formats.installed_fla import import_fla
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# fla's float32 products are of ten bits by default; read when Triton compiles
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

HYBRID = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 37, "rope_theta": 500.0}
KINDS = {
    "plain": {},
    "short convolutions": {"use_short_conv": True},
    "tied": {"tie_word_embeddings": True},
    "no lower bound": {"use_lower_bound": False},
    "hybrid": {"attn": HYBRID},
    "norms without weights": {"elementwise_affine": False},
}
# up to 64 tokens fla takes its recurrent form, then its chunks, which take long to compile
CASES = [*((kind, 60) for kind in KINDS), ("plain", 200)]


def windowed_attention(q, k, v, causal=True, window_size=(-1, -1), **_):
    """Attention of flash_attn, if it is not installed: [B, T, heads, size], window_size keys back."""
    assert causal
    length, back = q.shape[1], window_size[0]
    i = torch.arange(length, device=q.device)
    seen = i[:, None] >= i[None, :]
    if back >= 0:
        seen &= i[:, None] - i[None, :] <= back
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


@pytest.fixture
def saved(request, tmp_path, monkeypatch):
    """fla's model with random weights, float32, and where it is saved."""
    fla = import_fla()
    monkeypatch.setattr(fla.attn, "flash_attn_func", windowed_attention)
    torch.manual_seed(0)
    config = fla.Config(
        hidden_size=256, num_hidden_layers=3, expand_ratio=64, vocab_size=300, intermediate_size=512, norm_eps=0.01,
        **KINDS[request.param],
    )  # fmt: skip
    theirs = fla.ForCausalLM(config).cuda().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn_like(parameter)
            if name == "model.lower_bounds":
                parameter.copy_(noise)
            elif "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * 0.7 / parameter.shape[-1] ** 0.5)
    theirs.save_pretrained(tmp_path)
    return theirs, tmp_path


def ours(folder, dtype, backend="auto"):
    opened = open_folder(folder)
    model = HGRN2LM(opened.config, backend=backend)
    opened.load_into(model)
    return model.to("cuda", dtype).eval()


@pytest.mark.parametrize(("saved", "length"), CASES, indirect=["saved"])
def test_logits_in_float32(saved, length):
    theirs, folder = saved
    ids = torch.randint(300, (2, length), device="cuda")
    with torch.no_grad():
        wanted = theirs(ids).logits
        found, _ = ours(folder, torch.float32)(ids)
    assert relative_error(found, wanted).rms < 1e-4


@pytest.mark.parametrize(("saved", "length"), CASES, indirect=["saved"])
def test_logits_in_bfloat16_are_as_near_to_the_truth(saved, length):
    theirs, folder = saved
    theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(folder)
    ids = torch.randint(300, (4, length), device="cuda")
    with torch.no_grad():
        truth, _ = ours(folder, torch.float64, "reference")(ids)
        rounded = theirs(ids).logits
        found, _ = ours(folder, torch.bfloat16)(ids)
    assert relative_error(found, truth).rms < 1.1 * relative_error(rounded, truth).rms < 0.1
