"""transformers' classes in ONNX Runtime and through torch.export."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from hgrn2.hf import HGRN2Config, HGRN2ForCausalLM, HGRN2ForSequenceClassification
from tests.models.test_export import LENGTHS, assert_equal, tokens
from tests.onnx_runtime import exporter_warnings, needs_onnx, runtime

pytestmark = [*exporter_warnings]


def small_config(**settings: object) -> HGRN2Config:
    torch.manual_seed(0)
    return HGRN2Config(vocab_size=50, hidden_size=16, expand_ratio=8, num_hidden_layers=2, pad_token_id=0, **settings)


@pytest.mark.slow
@needs_onnx
@torch.no_grad()
def test_a_prompt_in_onnx(tmp_path):
    model = HGRN2ForCausalLM(small_config()).eval()
    torch.onnx.export(
        model, (), tmp_path / "m.onnx", kwargs={"input_ids": tokens(2, 70)}, dynamo=True,
        dynamic_shapes={"input_ids": {0: "B", 1: "T"}}, verbose=False,
    )  # fmt: skip
    run = runtime(tmp_path / "m.onnx")
    for length in LENGTHS:
        for batch in (1, 3):
            ids = tokens(batch, length)
            assert_equal(run(ids), [model(ids).logits])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("kind", "strict"), [(HGRN2ForCausalLM, True), (HGRN2ForSequenceClassification, False)])
def test_one_exported_program_for_every_length(kind, strict):
    model = kind(small_config(attn={"layers": [1], "num_heads": 2, "window_size": 5})).eval()
    shape = {0: Dim("B"), 1: Dim("T", min=2, max=4096)}
    given = {"input_ids": tokens(2, 70), "attention_mask": torch.ones(2, 70, dtype=torch.long)}
    program = torch.export.export(
        model, (), given, dynamic_shapes={"input_ids": shape, "attention_mask": shape}, strict=strict
    )
    module = program.module()
    for length in (2, 64, 1500, 4096):
        ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
        mask[0, : length // 2] = 0
        found, wanted = (net(input_ids=ids, attention_mask=mask).logits for net in (module, model))
        assert_equal(found[:, -1], wanted[:, -1])
