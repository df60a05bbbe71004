"""`hgrn2 info --gpus`: memory on each GPU."""

from hgrn2.cli import main


def test_what_fits(capsys):
    assert main(["info", "1.3b", "--gpus", "2", "--batch-size", "16", "--gpu-gib", "40"]) == 0
    out = capsys.readouterr().out
    assert "2 GPUs of 40 GiB, 16 x 2,048 tokens" in out
    assert "--shard" in out
    assert "yes" in out
    assert "no " in out


def test_refused(capsys):
    for words in (["--gpus", "2"], ["1.3b", "--gpus", "0"], ["1.3b", "--gpu-gib", "40"]):
        assert main(["info", *words]) == 2
        assert "--gpu" in capsys.readouterr().err
