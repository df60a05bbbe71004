"""Sequences split over processes: outputs, losses and gradients of the whole model, wherever boundaries fall."""

import pytest
import torch

from hgrn2.data.batches import Batch
from hgrn2.models import HGRN2LM
from hgrn2.nn.loss import IGNORE
from hgrn2.ops.pieces import PieceGroup, Pieces
from hgrn2.train.config import TrainConfig
from tests.refusals import refuses
from tests.train.ranks import model_config, rank_server, run_ranks

LENGTH = 48
# at piece bounds of 2, 3 and 4 pieces, beside them, within them, several in one piece, none, and empty sequences
BOUNDS = [
    [0, 48],
    [0, 24, 48],
    [0, 23, 48],
    [0, 25, 48],
    [0, 1, 2, 47, 48],
    [0, 16, 33, 33, 48],
    [0, 5, 9, 11, 48],
    None,
]
MODELS = {
    "hgrn2": {},
    "conv": {"use_short_conv": True, "conv_size": 4},
    "floor": {"min_log_decay": -1.0, "use_lower_bound": False},
    "hybrid": {"layers": ("gla", "attention"), "mixers": {"attention": {"num_heads": 4}, "gla": {"num_heads": 4}}},
    "window": {
        "layers": ("attention", "hgrn2"),
        "mixers": {"attention": {"num_heads": 8, "num_kv_heads": 4, "window_size": 7}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def processes():
    with rank_server() as context:
        yield context


def batch_of(bounds):
    generator = torch.Generator().manual_seed(3)
    rows = 1 if bounds else 2
    ids = torch.randint(257, (rows, LENGTH), generator=generator)
    targets = torch.randint(257, (rows, LENGTH), generator=generator)
    targets[0, 20:26] = IGNORE
    return Batch(ids, targets, None if bounds is None else torch.tensor(bounds, dtype=torch.int32))


def losses_and_gradients(parallel, name, checkpointing):
    """Return for each batch the loss, and gradients of every parameter, of all ranks together."""
    torch.manual_seed(0)
    model = HGRN2LM(model_config(hidden_size=32, **MODELS[name])).double()
    model.activation_checkpointing = checkpointing
    # forget slowly, so that states count across pieces
    for parameter_name, p in model.named_parameters():
        if "f_proj.weight" in parameter_name:
            torch.nn.init.normal_(p, std=0.3)
    share = parallel.share(TrainConfig(max_steps=1, context_parallel=parallel.num_ranks))
    found = []
    for bounds in BOUNDS:
        batch, pieces = batch_of(bounds), None
        if share.pieces is not None:
            batch = batch.piece(share.pieces.index, share.pieces.count)
            pieces = Pieces(share.pieces, batch.continues, batch.passes, batch.whole_cu_seqlens)
        model.zero_grad()
        loss = model.loss(batch.input_ids, batch.targets, cu_seqlens=batch.cu_seqlens, keep_state=False, pieces=pieces)
        loss.sum.backward()
        values = {"loss": loss.sum.detach()}
        values |= {n: p.grad for n, p in model.named_parameters()}
        if parallel.num_ranks > 1:
            for x in values.values():
                torch.distributed.all_reduce(x)
        # as arrays: tensors would be sent through shared memory
        found.append({n: x.numpy().copy() for n, x in values.items()})
    return found


def every_model(parallel, names, checkpointing=False):
    return {name: losses_and_gradients(parallel, name, checkpointing) for name in names}


def compare(found, wanted):
    for name, batches in wanted.items():
        for bounds, own, other in zip(BOUNDS, found[name], batches, strict=True):
            for key, x in other.items():
                error = abs(own[key] - x).max()
                assert error <= 1e-9 * (1 + abs(x).max()), (name, bounds, key, error)


class _One:
    num_ranks = 1

    def share(self, config):
        from hgrn2.train.parallel import Share

        return Share()


def test_pieces_of_two_processes(processes):
    wanted = every_model(_One(), MODELS)
    # the second half must depend on the first
    assert wanted["hgrn2"][0]["loss"] != wanted["hgrn2"][1]["loss"]
    for outcome in run_ranks(processes, every_model, list(MODELS)):
        assert outcome.status == 0
        compare(outcome.result, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_pieces_of_more_processes(processes, num_ranks):
    # three processes cannot share four heads of attention
    names = [name for name in MODELS if num_ranks == 4 or name in ("hgrn2", "conv", "floor")]
    wanted = every_model(_One(), names, True)
    for outcome in run_ranks(processes, every_model, names, True, num_ranks=num_ranks):
        assert outcome.status == 0
        compare(outcome.result, wanted)


def test_bounds_of_pieces():
    batch = batch_of([0, 5, 24, 24, 40, 48])
    pieces = [batch.piece(i, 4) for i in range(4)]
    assert [piece.cu_seqlens.tolist() for piece in pieces] == [[0, 5, 12], [0, 12], [0, 12], [0, 4, 12]]
    assert pieces[0].continues == (False, True, False, True)
    assert pieces[0].passes == (False, True, False, False)
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces], 1), batch.input_ids)


def test_refused():
    pieces = Pieces(PieceGroup(None, 0, 2), (False, True), (False, True))
    ids = torch.zeros(1, 8, dtype=torch.long)
    for changes, code, name in (
        ({"layers": ("hgrn2", "rebased")}, "unsupported", "ReBased"),
        ({"layers": ("hgrn2", "attention"), "mixers": {"attention": {"num_heads": 1}}}, "contradiction", "Attention"),
        ({"gate_range": "signed"}, "unsupported", "HGRN2"),
    ):
        with refuses(code, name):
            HGRN2LM(model_config(**changes)).hidden_states(ids, pieces=pieces)
