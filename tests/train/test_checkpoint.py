import hashlib
import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hgrn2.data import ByteTokenizer, load_tokenizer
from hgrn2.errors import UserError
from hgrn2.formats import run_folder
from hgrn2.storage.hashed import write_safetensors
from hgrn2.storage.lock import run_lock
from hgrn2.train import checkpoint
from tests.refusals import refuses
from tests.train.tiny_run import TinyModel, saved_tensors

CONFIG = {"model": {"hidden_size": 8}, "train": {"max_steps": 3}}


def save(store, step, best_step=None):
    torch.manual_seed(step)
    return store.save(
        model=checkpoint.model_tensors(TinyModel()),
        optimizer={"head.weight/step": torch.tensor(float(step))},
        task={},
        state={"step": step, "best": {"step": best_step, "val_loss": 1.0} if best_step else None},
        config=CONFIG,
        best_step=best_step,
    )


@pytest.fixture
def run_dir(tmp_path):
    checkpoint.create_run(tmp_path / "run", CONFIG, ByteTokenizer())
    return tmp_path / "run"


@pytest.fixture
def store(run_dir):
    return checkpoint.CheckpointStore(run_dir, keep_last=2)


def names(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_safetensors_file_is_the_librarys_format(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 3).T,
        "none": torch.zeros(0, 7),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.arange(4, dtype=torch.float64),
        "ids": torch.arange(5),
    }
    digest = write_safetensors(tmp_path / "x", tensors)
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_round_trip(store):
    path = save(store, 7)
    read = checkpoint.load_checkpoint(path)
    model = TinyModel()
    checkpoint.load_model_tensors(model, read.model, path)
    torch.manual_seed(7)
    wanted = TinyModel()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    assert read.optimizer == {"head.weight/step": torch.tensor(7.0)}
    assert read.state["step"] == 7
    assert run_folder.read_config(path) == CONFIG


def test_sums_file_is_what_sha256sum_reads(store):
    path = save(store, 7)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.count(": OK") == 5


def test_the_last_and_the_best_are_kept(store, run_dir):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        save(store, step, best)
    assert names(run_dir) == ["step-00000002", "step-00000004", "step-00000005"]
    save(store, 6, 6)
    assert names(run_dir) == ["step-00000005", "step-00000006"]
    # kept until the next checkpoint is whole
    store.set_aside_after(5)
    assert names(run_dir) == ["replaced-step-00000006", "step-00000005"]
    assert store.latest() == run_dir / "checkpoints" / "step-00000005"
    save(store, 6, 6)
    assert names(run_dir) == ["step-00000005", "step-00000006"]


def test_the_same_step_again_replaces(store, run_dir):
    save(store, 3)
    (run_dir / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"")
    checkpoint.load_checkpoint(save(store, 3))
    assert names(run_dir) == ["step-00000003"]


def test_leftovers_of_a_killed_process_are_removed(store, run_dir):
    save(store, 3)
    (run_dir / "checkpoints" / ".tmp-step-00000004").mkdir()
    (run_dir / ".config.json.1-abc.partial").touch()
    (run_dir / "checkpoints" / ".tmp-step-00000004" / "model.safetensors").write_bytes(b"half")
    assert store.latest().name == "step-00000003"
    checkpoint.CheckpointStore(run_dir, keep_last=2)
    assert names(run_dir) == [".tmp-step-00000004", "step-00000003"]
    store.remove_leftovers()
    assert names(run_dir) == ["step-00000003"]
    assert not list(run_dir.rglob(".*partial"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_harm_is_found_and_the_older_checkpoint_named(store, name, harm):
    good, bad = save(store, 1), save(store, 2)
    data = (bad / name).read_bytes()
    if harm == "truncate":
        (bad / name).write_bytes(data[:-1])
    elif harm == "flip":
        (bad / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    else:
        (bad / name).unlink()
    with pytest.raises(UserError) as caught:
        checkpoint.load_checkpoint(bad)
    message = str(caught.value)
    assert str(bad) in message
    assert name in message
    assert f"the newest good one before it is {good}" in message
    assert "\n" not in message


def test_no_older_checkpoint_is_good(store):
    older, bad = save(store, 1), save(store, 2)
    for path in (older, bad):
        (path / "SHA256SUMS").unlink()
    with refuses("damaged", "SHA256SUMS"):
        checkpoint.load_checkpoint(bad)


def test_a_failed_save_leaves_nothing(store, run_dir, monkeypatch):
    save(store, 1)
    monkeypatch.setattr(checkpoint, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        save(store, 2)
    assert names(run_dir) == ["step-00000001"]


def test_resume_point(store, run_dir, tmp_path):
    assert run_folder.resume_point(run_dir) == (run_dir, None)
    one, two = save(store, 1), save(store, 2)
    assert run_folder.resume_point(run_dir) == (run_dir, two)
    assert run_folder.resume_point(one) == (run_dir, one)
    with refuses("not-found", tmp_path):
        run_folder.resume_point(tmp_path)


def test_a_run_is_not_overwritten(store, run_dir):
    save(store, 1)
    for begin in (checkpoint.check_new_run, lambda folder: checkpoint.create_run(folder, CONFIG)):
        with refuses("already-exists", "--resume", run_dir):
            begin(run_dir)


def test_a_run_without_a_checkpoint_is_begun_anew(run_dir):
    (run_dir / "tokenizer.json").write_text("of another tokenizer")
    with run_lock(run_dir), refuses("in-use", run_dir):
        checkpoint.check_new_run(run_dir)
    checkpoint.check_new_run(run_dir)
    checkpoint.create_run(run_dir, CONFIG | {"train": {"seed": 7}}, ByteTokenizer())
    assert run_folder.read_config(run_dir)["train"] == {"seed": 7}
    assert not (run_dir / "tokenizer.json").exists()


@pytest.mark.parametrize("what", ["another config.json", "a checkpoint that was copied"])
def test_another_model_is_not_overwritten(store, run_dir, what):
    if what == "another config.json":
        (run_dir / "config.json").write_text('{"model_type": "hgrn2"}')
    else:
        shutil.copy(save(store, 1) / "model.safetensors", run_dir)
        shutil.rmtree(run_dir / "checkpoints")
    before = (run_dir / "config.json").read_text()
    with refuses("already-exists", run_dir):
        checkpoint.create_run(run_dir, CONFIG)
    assert (run_dir / "config.json").read_text() == before


def test_reading_while_checkpoints_come_and_go(store, run_dir):
    save(store, 1)
    read = []

    def gone_at_first():
        newest = run_folder.checkpoints_of(run_dir)[-1]
        read.append(newest.name)
        if len(read) < 3:
            save(store, 2 + 2 * len(read))
            save(store, 3 + 2 * len(read))
        return checkpoint.load_checkpoint(newest)

    found = run_folder.read_while_training(run_dir, gone_at_first)
    assert found.path.name == "step-00000007"
    assert read == ["step-00000001", "step-00000005", "step-00000007"]


def test_reading_a_damaged_checkpoint_fails_at_once(store, run_dir):
    (save(store, 1) / "model.safetensors").write_bytes(b"")
    read = []

    def damaged():
        read.append(1)
        return checkpoint.load_checkpoint(run_folder.checkpoints_of(run_dir)[-1])

    with refuses("damaged", "model.safetensors"):
        run_folder.read_while_training(run_dir, damaged)
    assert len(read) == 1


def test_broken_config(run_dir):
    (run_dir / "config.json").write_text('{"model": ')
    with refuses("unreadable", "config.json"):
        run_folder.read_config(run_dir)


def test_saved_model_from_run_checkpoint_and_folder(store, run_dir, tmp_path):
    best = save(store, 1, 1)
    for step in (2, 3):
        save(store, step, 1)
    # a model that was handed on: weights, settings and tokenizer, and no checksums
    out = tmp_path / "out"
    out.mkdir()
    for file in (best / "model.safetensors", best / "config.json", *run_dir.glob("*tokenizer*.json")):
        shutil.copy(file, out)
    for source, which in ((best, "latest"), (run_dir, "best"), (out, "latest")):
        folder, tokenizer_dir = run_folder.locate_model(source, which)
        torch.manual_seed(1)
        assert torch.equal(saved_tensors(source, which)["head.weight"], TinyModel().head.weight)
        assert run_folder.read_config(folder) == CONFIG
        assert load_tokenizer(tokenizer_dir).name == "bytes"
    assert run_folder.locate_model(run_dir)[0].name == "step-00000003"
    with refuses("not-found", "model.safetensors"):
        run_folder.locate_model(tmp_path)


def test_tied_weights_are_written_once_and_both_come_back(store):
    model = TinyModel()
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    model.head.weight = model.embedding.weight
    tensors = checkpoint.model_tensors(model)
    assert ("head.weight" in tensors) != ("embedding.weight" in tensors)
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        model.embedding.weight.zero_()
    checkpoint.load_model_tensors(model, wanted, store.latest())
    assert torch.equal(model.head.weight, wanted["embedding.weight"])


def test_tensors_of_another_model_are_refused(tmp_path):
    tensors = checkpoint.model_tensors(TinyModel())
    with refuses("mismatch", "'head.weight'"):
        checkpoint.load_model_tensors(TinyModel(), {k: v for k, v in tensors.items() if k != "head.weight"}, tmp_path)
    with refuses("mismatch", "lower_bounds", "[8]", "[16]"):
        checkpoint.load_model_tensors(TinyModel(hidden_size=16), tensors, tmp_path)


def test_state_is_plain_json(store):
    assert json.loads((save(store, 1) / "state.json").read_text())["step"] == 1


def test_folders_that_only_look_like_checkpoints_are_ignored(store, run_dir):
    path = save(store, 1)
    for name in ("step-²", "step-", "step-٣", "step-1x"):
        (run_dir / "checkpoints" / name).mkdir()
    assert run_folder.checkpoints_of(run_dir) == [path]
    assert run_folder.locate_model(run_dir)[0] == path
    with refuses("damaged", "SHA256SUMS"):
        checkpoint.load_checkpoint(run_dir / "checkpoints" / "step-²")


def test_the_best_checkpoint_is_gone(store, run_dir):
    best = save(store, 1, 1)
    newest = save(store, 2, 1)
    assert run_folder.locate_model(run_dir, "best")[0] == best
    shutil.rmtree(best)
    with refuses("not-found", "step 1"):
        run_folder.locate_model(run_dir, "best")
    assert run_folder.locate_model(run_dir)[0] == newest


def test_an_empty_checkpoint_is_named_once(store, run_dir):
    good = save(store, 1)
    empty = run_dir / "checkpoints" / "step-99999999"
    empty.mkdir()
    for load in (lambda: run_folder.locate_model(run_dir), lambda: checkpoint.load_checkpoint(empty)):
        with pytest.raises(UserError) as caught:
            load()
        assert str(caught.value).count(str(empty)) == 1
        assert f"the newest good one before it is {good}" in str(caught.value)


@pytest.mark.parametrize("harm", ["junk\n", "[" * 200_000, "a" * 64 + "\n", "\n"])
def test_damaged_checksums_are_named_with_their_line(store, run_dir, harm):
    good, bad = save(store, 1), save(store, 2)
    sums = bad / "SHA256SUMS"
    lines = sums.read_text()
    for content, number in ((harm, 1), (lines + harm, 6)):
        sums.write_text(content)
        for load in (lambda: run_folder.locate_model(run_dir), lambda: checkpoint.load_checkpoint(bad)):
            with pytest.raises(UserError) as caught:
                load()
            wanted = f"SHA256SUMS: damaged, line {number}; the newest good one before it is {good}"
            assert wanted in str(caught.value)
    sums.write_text(lines)
    (run_dir / "SHA256SUMS").write_text(harm)
    with refuses("damaged", "SHA256SUMS", "line 1"):
        run_folder.locate_model(run_dir)


def test_checksums_that_sha256sum_wrote_of_binary_files(store):
    path = save(store, 1)
    (path / "SHA256SUMS").write_text((path / "SHA256SUMS").read_text().replace("  ", " *"))
    checkpoint.load_checkpoint(path)


def test_a_link_that_leads_nowhere_is_pruned_as_a_checkpoint_is(store, run_dir):
    folder = run_dir / "checkpoints"
    # the best is not forgotten while its disk is away, and a newer one is not old
    for step, target in ((1, "/nowhere"), (2, "step-00000002"), (3, "/nowhere"), (9, "step-00000009")):
        (folder / f"step-{step:08d}").symlink_to(target)
    for step in (4, 5):
        save(store, step, 3)
    assert names(run_dir) == ["step-00000003", "step-00000004", "step-00000005", "step-00000009"]
    assert (folder / "step-00000003").is_symlink()
    store.set_aside_after(5)
    save(store, 6, 6)
    assert names(run_dir) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("harm", ["config", "empty", "loop"])
def test_a_damaged_checkpoint_that_is_named(store, run_dir, harm):
    good, bad = save(store, 1), save(store, 2)
    if harm == "config":
        (bad / "config.json").unlink()
    else:
        shutil.rmtree(bad)
        bad.mkdir() if harm == "empty" else bad.symlink_to(bad.name)
    assert run_folder.resume_point(bad) == run_folder.resume_point(run_dir) == (run_dir, bad)
    missing = "config.json" if harm == "config" else "SHA256SUMS"
    for read in (run_folder.read_checkpoint_config, checkpoint.load_checkpoint, run_folder.locate_model):
        with pytest.raises(UserError) as caught:
            read(bad)
        assert f"{missing} is missing; the newest good one before it is {good}" in str(caught.value)
