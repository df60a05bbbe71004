"""Several GPUs over NCCL: the losses of one GPU, for every way to share the work."""

import pytest
import torch

from hgrn2.train.parallel import ONE_PROCESS
from tests.train.ranks import rank_server, run_ranks, several
from tests.train.test_distributed import assert_same_curve, curve, data_dir, text_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# not a test here
__all__ = ["data_dir"]

MODEL = {"hidden_size": 256, "expand_ratio": 128, "intermediate_size": 512}
WAYS = {
    "batch": {},
    "accumulated": {"grad_accumulation": 2},
    "shard": {"shard": True},
    "kept": {"shard": True, "reshard": False, "activation_checkpointing": True},
    "pieces": {"context_parallel": 2},
    "both": {"context_parallel": 2, "shard": True},
    "compiled": {"shard": True, "compile": True},
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_gpus_give_the_losses_of_one(data_dir, tmp_path, precision):
    settings = {"device": "cuda", "precision": precision, "seq_len": 256, "max_steps": 8}
    calls = [(text_run, (tmp_path / name, data_dir, settings | way), MODEL) for name, way in WAYS.items()]
    with rank_server() as processes:
        found = run_ranks(processes, several, calls, timeout_s=280)
    assert [outcome.result for outcome in found] == [[8] * len(WAYS)] * 2
    for accumulation in (1, 2):
        one = tmp_path / f"one-{accumulation}"
        text_run(
            ONE_PROCESS, one, data_dir, settings | {"device": "cuda:0", "grad_accumulation": accumulation}, **MODEL
        )
    for name, way in WAYS.items():
        wanted = curve(tmp_path / f"one-{way.get('grad_accumulation', 1)}")
        assert_same_curve(curve(tmp_path / name), wanted, 1e-4 if precision == "float32" else 1e-2)
