import contextlib
import itertools
import json
import math
import shutil

import pytest
import torch

from hgrn2.data.batches import Batch
from hgrn2.data.prepare import prepare
from hgrn2.devices import choose_device
from hgrn2.formats import run_folder
from hgrn2.formats.convert_model import convert_model
from hgrn2.formats.opening import open_folder
from hgrn2.loading import load
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.storage.lock import run_lock
from hgrn2.tasks.base import TaskContext
from hgrn2.tasks.language import LanguageTask, carried_loss, text_figures
from hgrn2.train import checkpoint
from hgrn2.train.display import PlainDisplay
from hgrn2.train.metrics import read_metrics
from hgrn2.train.run import evaluate_run
from hgrn2.train.runs import resume_language_run, saved_text_spec, start_language_run
from hgrn2.train.settings import RunSettings
from hgrn2.train.start import Start
from tests.refusals import refuses
from tests.train.tiny_run import saved_tensors

SETTINGS = {
    "max_steps": 12,
    "batch_size": 2,
    "seq_len": 24,
    "learning_rate": 1e-2,
    "validation_every": 6,
    "checkpoint_every": 4,
    "validation_tokens": 1000,
    "keep_last": 10,
    "device": "cpu",
}


def model_config(**changes):
    settings = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8}
    settings |= {"intermediate_size": 24, "dropout": 0.1}
    return HGRN2Config(**settings | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for index in range(40):
        words = " ".join(f"é{index * k % 13}" for k in range(5 + index))
        (folder / f"{index:02}.txt").write_text(f"document {index}: {words}\n", encoding="utf-8")
    return prepare([str(folder)], "bytes", folder / "prepared", validation_fraction=0.3, progress=False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HGRN2LM(model_config()).eval()


def task(data, **changes):
    settings = RunSettings.from_flat(SETTINGS | changes)
    context = TaskContext(settings.train.batch_size, settings.train.seed, data=data)
    return LanguageTask.build(settings.options, context)


def losses(run_dir):
    keys = ("kind", "step", "loss", "grad_norm", "val_loss")
    records = read_metrics(run_dir)
    return [tuple(r.get(k) for k in keys) for r in records if r["kind"] in ("train", "validation")]


def test_figures_by_hand():
    # 8 tokens of 1 bit each stand for 4 bytes: 2 bits per byte, perplexity 2
    figures = text_figures(8 * math.log(2), num_tokens=8, num_text_bytes=4)
    assert figures["val_loss"] == pytest.approx(math.log(2))
    assert figures["val_perplexity"] == pytest.approx(2.0)
    assert figures["val_bits_per_byte"] == pytest.approx(2.0)
    assert text_figures(1e9, 1, 1)["val_perplexity"] == math.inf


def test_bits_a_byte_of_a_model_that_knows_nothing(data):
    class Uniform:
        def loss(self, input_ids, targets, state=None, cu_seqlens=None, keep_state=True):
            num_targets = (targets >= 0).sum()
            return num_targets * math.log(257), num_targets, model_state

    model_state = HGRN2LM(model_config()).init_state(10_000)
    whole = data.validation
    figures = task(data, validation_tokens=10**6).evaluate(Uniform())
    # every byte of the text, and the end of every document
    assert figures["val_tokens"] == whole.num_text_bytes + whole.num_documents
    assert figures["val_text_bytes"] == whole.num_text_bytes
    wanted = math.log2(257) * (whole.num_text_bytes + whole.num_documents) / whole.num_text_bytes
    assert figures["val_bits_per_byte"] == pytest.approx(wanted)
    assert figures["val_perplexity"] == pytest.approx(257)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(7, 1), (24, 3), (100, 8)])
def test_validation_carries_the_state_whatever_the_window(data, model, seq_len, batch_size):
    with torch.no_grad():
        found = task(data, seq_len=seq_len, batch_size=batch_size, validation_tokens=10**6).evaluate(model)
        nats = 0.0
        bounds = [*data.validation.document_starts.tolist(), data.validation.num_tokens]
        for start, stop in itertools.pairwise(bounds):
            ids = torch.from_numpy(data.validation.tokens(start, stop))
            targets = torch.cat([ids[1:], torch.tensor([data.validation.eot_id])])
            nats += model.loss(ids[None], targets[None])[0].item()
    assert found["val_loss"] == pytest.approx(nats / found["val_tokens"], rel=1e-5)


def test_a_spoilt_state_does_not_reach_a_fresh_sequence(model):
    ids = torch.randint(257, (1, 12), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        ids,
        ids.clone(),
        cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32),
        carry_from=torch.tensor([-1, 1]),
        carry_to=torch.tensor([0, 1]),
    )
    with torch.no_grad():
        first, carried = carried_loss(model.loss, batch, None)
        continued, _ = carried_loss(model.loss, batch, carried)
        spoilt = carried.map(torch.clone)
        for tensor in spoilt.tensors().values():
            tensor[0] = float("nan")
        found, _ = carried_loss(model.loss, batch, spoilt)
    assert spoilt.tensors().keys() == carried.tensors().keys()
    assert found.item() == continued.item() != first.item()


def test_a_skipped_step_forgets_the_streams(data, model):
    stream = task(data, stream=True, batch_size=3)
    stream.loss(model, stream.next_batch())
    assert stream.state_tensors()
    assert all(not t.requires_grad for t in stream.state_tensors().values())
    stream.step_skipped()
    assert not stream.state_tensors()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"stream": True}, {"optimizer": "muon", "precision": "bfloat16"}])
def test_a_run_and_its_resumption(data, tmp_path, changes):
    settings = RunSettings.from_flat(SETTINGS | changes)
    prompts = []

    def sampler(model, prompt):
        assert not model.training
        prompts.append(prompt)
        return f"sample {torch.rand(()).item()}"

    run_dir = tmp_path / "run"
    done = start_language_run(run_dir, model_config(), settings, data, data_settings={"named": "so"}, sampler=sampler)
    assert done.result.stopped_by is None
    assert prompts == [""]
    assert [p.name for p in done.pictures] == ["loss.png", "memory.png"]
    assert done.result.last_validation["step"] == 12
    assert done.result.last_validation["val_bits_per_byte"] > 0
    config = json.loads((run_dir / "config.json").read_text())
    assert config["model"] == model_config().to_dict()
    # a default that depends on the budget is kept as a number of its own
    flat = settings.to_flat() | {"teacher": None, "distill_weight": None, "distill_temperature": None}
    assert config["train"] == flat | {"warmup_steps": 1}
    assert config["data"] == {
        "named": "so",
        "prepared": str(data.directory),
        "run_was_at": str(run_dir),
        "fingerprints": {"train": data.train.fingerprint, "validation": data.validation.fingerprint},
    }

    wanted = losses(run_dir)
    first = [r["loss"] for r in read_metrics(run_dir) if r["kind"] == "train"]
    assert first[-1] < first[0]
    for path in run_folder.checkpoints_of(run_dir)[::-2]:
        resume_language_run(path, data, sampler=sampler)
        assert losses(run_dir) == wanted

    again = HGRN2LM(HGRN2Config.from_dict(run_folder.read_config(run_dir)["model"]))
    checkpoint.load_model_tensors(again, saved_tensors(run_dir), run_dir)
    for (name, one), (_, two) in zip(again.named_parameters(), done.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"stream": True, "precision": "bfloat16"}], ids=["packed", "streams"])
def test_activation_checkpointing_changes_no_loss(data, tmp_path, changes):
    found = []
    for on in (False, True):
        settings = RunSettings.from_flat(
            SETTINGS | changes | {"max_steps": 4, "validation_every": 0, "activation_checkpointing": on}
        )
        done = start_language_run(tmp_path / str(on), model_config(), settings, data, data_settings={})
        assert done.model.activation_checkpointing is on
        opened = HGRN2LM.load(str(tmp_path / str(on)), device="cpu")
        assert torch.equal(opened.lm_head.weight, done.model.lm_head.weight)
        found.append(losses(tmp_path / str(on)))
    assert found[0] == found[1]
    assert len(found[0]) > 4


@pytest.mark.slow
def test_a_finished_run_can_be_given_more_steps(data, tmp_path):
    settings = RunSettings.from_flat(SETTINGS)
    start_language_run(tmp_path / "run", model_config(), settings, data, data_settings={})
    done = resume_language_run(tmp_path / "run", data, changes={"max_steps": 15})
    assert done.result.counters.step == 15
    assert run_folder.read_config(tmp_path / "run")["train"]["max_steps"] == 15


@pytest.mark.parametrize(
    ("changes", "config_changes", "code", "name"),
    [
        ({}, {"vocab_size": 100}, "mismatch", "257"),
        ({"seq_len": 10**6}, {}, "contradiction", "seq_len 1000000"),
        ({"device": "cuda:99"}, {}, "unavailable", "'cuda:99'"),
        ({"device": "toaster"}, {}, "unknown-name", "'toaster'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(data, tmp_path, changes, config_changes, code, name):
    settings = RunSettings.from_flat(SETTINGS | changes)
    with refuses(code, name):
        start_language_run(tmp_path / "run", model_config(**config_changes), settings, data, data_settings={})
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_data_is_refused(data, tmp_path):
    (tmp_path / "other.txt").write_text("something else entirely\n" * 100)
    other = prepare([str(tmp_path / "other.txt")], "bytes", tmp_path / "prepared", progress=False)
    settings = RunSettings.from_flat(SETTINGS | {"max_steps": 2})
    start_language_run(tmp_path / "run", model_config(), settings, data, data_settings={})
    with refuses("mismatch", "train", "validation", "--prepared"):
        resume_language_run(tmp_path / "run", other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"seq_len": 32}, "mismatch", ["seq_len 24", "32"]),
        ({"seed": 3}, "mismatch", ["seed 0", "3"]),
        ({"optimizer": "muon"}, "invalid-value", ["optimizer state", "muon"]),
        ({"learning_rate": 5.0, "damage": True}, "damaged", ["model.safetensors"]),
    ],
)
def test_a_refused_resumption_leaves_the_run_as_it_was(data, tmp_path, changes, code, names):
    run_dir = tmp_path / "run"
    start_language_run(
        run_dir, model_config(), RunSettings.from_flat(SETTINGS | {"max_steps": 2}), data, data_settings={}
    )
    before = (run_dir / "config.json").read_text()
    given = dict(changes)
    if given.pop("damage", False):
        (run_folder.checkpoints_of(run_dir)[-1] / "model.safetensors").write_bytes(b"")
    with refuses(code, *names):
        resume_language_run(run_dir, data, changes=given)
    assert (run_dir / "config.json").read_text() == before


def test_auto_device_is_one_that_works():
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["meta", "cpu:99"])
def test_devices_that_compute_nothing(name):
    with refuses("unavailable", f"'{name}'"):
        choose_device(name)


def test_packed_documents_keep_no_state(data, model):
    for stream, wanted in [(False, False), (True, True)]:
        asked = []

        def loss(*args, keep_state, asked=asked, **settings):
            asked.append(keep_state)
            return model.loss(*args, keep_state=keep_state, **settings)

        batch = task(data, stream=stream).next_batch()
        _, carried = carried_loss(loss, batch, None)
        assert asked == [wanted]
        assert (carried is not None) is wanted


# one process at a time


def test_the_lock_decides_whose_folder_it_is(data, tmp_path):
    def start():
        start_language_run(tmp_path / "run", model_config(), SETTINGS, data, data_settings={})

    with run_lock(tmp_path / "run"):
        with refuses("in-use", tmp_path / "run"):
            start()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    start()
    with refuses("already-exists", tmp_path / "run"):
        start()


@pytest.mark.slow
def test_resuming_goes_on_from_what_is_there_once_the_lock_is_held(data, tmp_path, monkeypatch):
    start_language_run(tmp_path / "run", model_config(), SETTINGS, data, data_settings={})
    wanted = losses(tmp_path / "run")

    @contextlib.contextmanager
    def held_after_another_process_went_back(run_dir):
        with run_lock(run_dir) as check_lock:
            checkpoint.CheckpointStore(run_dir, 10).set_aside_after(8)
            yield check_lock

    monkeypatch.setattr("hgrn2.train.run.run_lock", held_after_another_process_went_back)
    result = resume_language_run(tmp_path / "run", data).result
    assert result.counters.step == 12
    assert losses(tmp_path / "run") == wanted


def read_by_convert(run_dir):
    convert_model(run_dir, run_dir.parent / "converted", "native", "same", "5GB", "latest")
    return run_dir.parent / "converted"


@pytest.mark.slow
@pytest.mark.parametrize(
    "read", [lambda run_dir: load(run_dir, "latest", "cpu"), Start.open, read_by_convert],
    ids=["generate", "from", "convert"],
)  # fmt: skip
def test_reading_the_newest_checkpoint_while_it_is_removed(data, tmp_path, monkeypatch, read):
    start_language_run(tmp_path / "run", model_config(), SETTINGS, data, data_settings={})
    newest, opened = run_folder.checkpoints_of(tmp_path / "run")[-1], []

    def too_late(folder, **options):
        opened.append(folder)
        if folder == newest:
            shutil.rmtree(folder)
        return open_folder(folder, **options)

    # generate and eval go through hgrn2.load, which imports it when it is called
    for module in ("hgrn2.train.start", "hgrn2.formats.convert_model", "hgrn2.formats.opening"):
        monkeypatch.setattr(f"{module}.open_folder", too_late)
    assert read(tmp_path / "run")
    assert opened == [newest, run_folder.checkpoints_of(tmp_path / "run")[-1]]


class Meddling(PlainDisplay):
    """Does something in the middle of a run."""

    def __init__(self, step, act):
        super().__init__()
        self.step, self.act = step, act

    def train(self, record, progress, eta_s):
        if record["step"] == self.step:
            self.act()


@pytest.mark.slow
@pytest.mark.parametrize("begun_anew", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_is_another_by_now_is_left_alone(data, tmp_path, resumed, begun_anew):
    run_dir = tmp_path / "run"

    def start(display=None, **changes):
        config = SETTINGS | changes
        start_language_run(run_dir, model_config(), config, data, data_settings={}, display=display)

    def replace():
        run_dir.rename(tmp_path / "removed")
        if begun_anew:
            start(max_steps=3)

    def resume(display):
        resume_language_run(run_dir, data, changes={"max_steps": 12}, display=display)

    if resumed:
        start(max_steps=4)
    train = resume if resumed else start
    with refuses("in-use", tmp_path / "run"):
        train(Meddling(7, replace))
    if begun_anew:
        assert [path.name for path in run_folder.checkpoints_of(run_dir)] == ["step-00000003"]
    else:
        assert not run_dir.exists()


def test_a_run_that_learns_nothing_ends_well(data, tmp_path):
    """The time is up before the first step, or the first one spoils the weights."""
    no_steps = {k: v for k, v in SETTINGS.items() if k != "max_steps"} | {"max_time_s": 1e-300}
    result = start_language_run(tmp_path / "none", model_config(), no_steps, data, data_settings={})
    assert [path.name for path in result.pictures] == ["memory.png"]
    spoilt = SETTINGS | {"max_steps": 3, "learning_rate": 1e38, "warmup_steps": 0}
    one_layer = model_config(num_hidden_layers=1)
    result = start_language_run(tmp_path / "spoilt", one_layer, spoilt, data, data_settings={})
    assert [path.name for path in result.pictures] == ["loss.png"]
    # what the command line would show
    assert result.result.last_validation is None
    no_gates = model_config(attn={"layers": [0, 1], "num_heads": 2}, use_lower_bound=False)
    result = start_language_run(tmp_path / "attends", no_gates, no_steps, data, data_settings={})
    assert result.pictures == []


def test_a_step_that_ruins_the_bounds_ends_the_run_in_words(data, tmp_path):
    ruinous = SETTINGS | {"learning_rate": 1e38, "warmup_steps": 0}
    with refuses("not-finite", "step 1", "learning_rate"):
        start_language_run(tmp_path / "run", model_config(), ruinous, data, data_settings={})


def test_pictures_are_drawn_while_the_lock_is_held(data, tmp_path, monkeypatch):
    drawn = []

    def draw(run_dir):
        with refuses("in-use", run_dir), run_lock(run_dir):
            pass
        drawn.append(run_dir)
        return []

    monkeypatch.setattr("hgrn2.train.plots.plot_run", draw)
    start_language_run(tmp_path / "run", model_config(), SETTINGS, data, data_settings={})
    assert drawn == [tmp_path / "run"]


def test_a_folder_that_cannot_be_locked(data, tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with refuses("unwritable", tmp_path / "run"):
        start_language_run(tmp_path / "run", model_config(), SETTINGS, data, data_settings={})


def test_a_saved_run_is_evaluated_as_its_validation_was(data, tmp_path):
    run_dir = tmp_path / "run"
    done = start_language_run(run_dir, model_config(), SETTINGS, data, data_settings={})
    figures = evaluate_run(run_dir, saved_text_spec(data))
    assert figures == {key: value for key, value in done.result.last_validation.items() if key in figures}
    assert figures["val_tokens"] > 0
    # an earlier checkpoint has other weights
    earlier = evaluate_run(run_folder.checkpoints_of(run_dir)[0], saved_text_spec(data))
    assert earlier["val_loss"] > figures["val_loss"]
