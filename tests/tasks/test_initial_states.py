"""Training from states of other texts and from noise: where sequences start, and that runs resume alike."""

import itertools

import pytest
import torch

from hgrn2.data.prepare import prepare
from hgrn2.formats import run_folder
from hgrn2.models import HGRN2LM, HGRN2Config, ModelState
from hgrn2.tasks.base import TaskContext
from hgrn2.tasks.distillation import DistillationOptions
from hgrn2.tasks.initial_states import noise
from hgrn2.tasks.language import LanguageOptions, LanguageTask
from hgrn2.train.metrics import read_metrics
from hgrn2.train.runs import resume_language_run, start_language_run
from hgrn2.train.settings import RunSettings
from tests.refusals import refuses

KEYS = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8, "intermediate_size": 24}
KINDS = ["passed", "noise", "fitted-noise"]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for index in range(30):
        (folder / f"{index:02}.txt").write_text(f"document {index}: {' word' * (3 + index % 7)}\n")
    return prepare([str(folder)], "bytes", folder / "prepared", validation_fraction=0.3, progress=False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = HGRN2LM(HGRN2Config(**KEYS)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def task(data, kind, batch_size=3, **options):
    options = LanguageOptions(seq_len=24, initial_state=kind, **options)
    context = TaskContext(data=data, batch_size=batch_size, seed=0, device=torch.device("cpu"), sampler=None)
    return LanguageTask.build(options, context)


def states_of(model, batch, before):
    """Final states of the sequences of a packed batch, each computed alone."""
    found = []
    for n, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        own = None
        if before is not None and batch.carry_from[n] >= 0:
            own = before.select(batch.carry_from[n : n + 1])
        found.append(model(batch.input_ids[:, start:stop], own)[1])
    return found


def test_states_are_passed_from_windows_to_sequences_of_the_next_step(data, model):
    found = task(data, "passed")
    assert found.carries_state
    before = None
    with torch.no_grad():
        for _ in range(3):
            batch = found.next_batch()
            ends = torch.tensor([24, 48, 72])
            # the last sequence of a window holds its last token
            bounds = batch.cu_seqlens.long()
            assert bool((bounds[batch.carry_to] < ends).all() and (bounds[batch.carry_to + 1] == ends).all())
            found.loss(model, batch)
            alone = states_of(model, batch, before)
            for name, x in found.state_tensors().items():
                wanted = torch.cat([alone[n].tensors()[name] for n in batch.carry_to.tolist()])
                torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5)
            before = ModelState.from_tensors(found.state_tensors())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_sequences_starts_from_states(data, share):
    found = task(data, "passed", initial_state_share=share)
    chosen = torch.cat([found.next_batch().carry_from for _ in range(40)])
    assert abs((chosen >= 0).double().mean().item() - share) < 0.15
    if share:
        assert set(chosen[chosen >= 0].tolist()) == {0, 1, 2}
    again = task(data, "passed", initial_state_share=share)
    assert torch.equal(chosen, torch.cat([again.next_batch().carry_from for _ in range(40)]))


@kinds
def test_the_loss_depends_on_the_states(data, model, kind):
    plain, found = task(data, "zero"), task(data, kind)
    with torch.no_grad():
        losses = [(plain.loss(model, plain.next_batch()), found.loss(model, found.next_batch())) for _ in range(2)]
    assert losses[1][0] != losses[1][1]
    # in the first step there are no states of others
    assert torch.equal(*losses[0]) is (kind != "noise")


def test_noise_has_the_size_that_is_asked_for(data, model):
    drawn = noise(model, None, 50, 0.25, 0, 1)
    for x in drawn.tensors().values():
        assert abs(x.std().item() - 0.25) < 0.02
    _, state = model(torch.randint(257, (4, 60), generator=torch.Generator().manual_seed(0)))
    fitted = noise(model, state, 50, 1.0, 0, 1)
    for name, x in fitted.tensors().items():
        like = state.tensors()[name]
        assert abs(x.mean() - like.mean()) < 0.1 * like.std()
        assert abs(x.std() / like.std() - 1) < 0.1


@pytest.mark.slow
@kinds
def test_a_resumed_run_starts_from_the_same_states(data, tmp_path, kind):
    settings = RunSettings.from_flat(
        {
            "max_steps": 6,
            "batch_size": 2,
            "seq_len": 24,
            "learning_rate": 1e-2,
            "validation_every": 0,
            "checkpoint_every": 2,
            "keep_last": 10,
            "device": "cpu",
            "initial_state": kind,
            "initial_state_share": 0.7,
            "grad_accumulation": 2,
        }
    )
    start_language_run(tmp_path / "run", HGRN2Config(**KEYS), settings, data, data_settings={})

    def losses():
        return {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r}

    wanted = losses()
    assert len(wanted) >= 6
    for path in run_folder.checkpoints_of(tmp_path / "run")[::-2]:
        resume_language_run(path, data)
        assert losses() == wanted


def test_what_does_not_fit_is_refused(data):
    with refuses("contradiction", "initial_state", "passed", "stream"):
        LanguageOptions(initial_state="passed", stream=True)
    with refuses("contradiction", "initial_state", "teacher"):
        DistillationOptions(initial_state="noise", teacher="x")
    with refuses("invalid-value", "initial_state", "random", "noise"):
        LanguageOptions(initial_state="random")  # pyright: ignore[reportArgumentType]
    hybrid = HGRN2LM(HGRN2Config(**KEYS, layers="hgrn2,attention", mixers={"attention": {"num_heads": 2}}))
    found = task(data, "passed")
    with refuses("contradiction", "initial_state", "passed", "layers 1"):
        found.loss(hybrid, found.next_batch())
