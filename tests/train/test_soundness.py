"""Checkpoints that were renamed, linked, mixed or truncated: refused, and never at the cost of another."""

import json
import shutil

import pytest

from hgrn2.errors import UserError
from hgrn2.formats import run_folder
from hgrn2.formats.soundness import looks_whole
from hgrn2.train import checkpoint
from tests.refusals import refuses
from tests.train.tiny_run import losses, run

SETTINGS = {
    "max_steps": 6,
    "batch_size": 2,
    "validation_every": 0,
    "checkpoint_every": 2,
    "keep_last": 2,
}


def folder(run_dir, step):
    return run_dir / "checkpoints" / f"step-{step:08d}"


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    run(run_dir, SETTINGS)
    return run_dir


@pytest.fixture
def run_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def test_a_renamed_checkpoint_is_refused_and_stays(run_dir):
    shutil.rmtree(folder(run_dir, 4))
    folder(run_dir, 6).rename(folder(run_dir, 99))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with refuses("damaged", "step-00000006"):
        run(run_dir, SETTINGS | {"max_steps": 50, "checkpoint_every": 0})
    with refuses("damaged", "step-00000006"):
        run_folder.locate_model(run_dir)
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    folder(run_dir, 99).rename(folder(run_dir, 6))
    assert run(run_dir, SETTINGS | {"max_steps": 8}).counters.step == 8


def test_nothing_is_removed_before_the_next_checkpoint_is_whole(run_dir, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    checkpoint.CheckpointStore(run_dir, 2).set_aside_after(4)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_text", full)
        with pytest.raises(UserError, match="No space left"):
            run(run_dir, SETTINGS)
    assert names(run_dir) == ["replaced-step-00000006", "step-00000004"]
    run(run_dir, SETTINGS)
    assert names(run_dir) == ["step-00000004", "step-00000006"]


def test_a_link_is_removed_as_a_link(run_dir, tmp_path):
    elsewhere = tmp_path / "another disk"
    folder(run_dir, 4).rename(elsewhere)
    folder(run_dir, 4).symlink_to(elsewhere)
    wanted = losses(run_dir)
    run(run_dir, SETTINGS | {"max_steps": 10})
    assert names(run_dir) == ["step-00000008", "step-00000010"]
    assert looks_whole(elsewhere, "step-00000004")
    assert losses(run_dir)[: len(wanted)] == wanted


def test_what_a_kill_left_behind_a_link_is_no_reason_to_stop(run_dir, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (run_dir / "checkpoints" / ".tmp-removed-step-00000002").symlink_to(tmp_path / "kept")
    assert run(run_dir, SETTINGS | {"max_steps": 8}).counters.step == 8
    assert (tmp_path / "kept" / "file").exists()
    assert names(run_dir) == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("harm", ["renamed", "truncated", "emptied", "mixed", "a number too large"])
def test_a_bad_checkpoint_pushes_no_good_one_out(run_dir, harm):
    bad = shutil.copytree(folder(run_dir, 6), folder(run_dir, 7))
    if harm == "truncated":
        bad.rename(folder(run_dir, 5))
        bad = folder(run_dir, 5)
        state = json.loads((bad / "state.json").read_text()) | {"step": 5}
        (bad / "state.json").write_text(json.dumps(state))
        weights = (bad / "model.safetensors").read_bytes()
        (bad / "model.safetensors").write_bytes(weights[:-7])
    elif harm == "emptied":
        for path in bad.iterdir():
            path.write_bytes(b"")
    elif harm == "mixed":
        shutil.copy(folder(run_dir, 4) / "state.json", bad)
    elif harm == "a number too large":
        (bad / "state.json").write_text('{"step": ' + "9" * 6000 + "}")
    if bad.name != "step-00000005":
        with refuses("damaged", "step-00000006"):
            run(run_dir, SETTINGS | {"max_steps": 8})
        # out of the way, where the run goes on from an older one
        checkpoint.CheckpointStore(run_dir, 2).set_aside_after(6)
    run(run_dir, SETTINGS | {"max_steps": 8})
    whole = [path.name for path in run_folder.checkpoints_of(run_dir) if looks_whole(path, path.name)]
    assert whole == ["step-00000006", "step-00000008"]
    assert len(names(run_dir)) == 3


def test_a_checkpoint_killed_just_before_its_last_rename_is_whole(run_dir):
    folder(run_dir, 6).rename(run_dir / "checkpoints" / ".tmp-step-00000006")
    checkpoint.CheckpointStore(run_dir, 2).remove_leftovers()
    assert names(run_dir) == ["step-00000004", "step-00000006"]
    assert checkpoint.load_checkpoint(folder(run_dir, 6)).state["step"] == 6
