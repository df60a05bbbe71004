"""From `hgrn2 train`, with the demo's settings, to `hgrn2 eval --tasks`: what was learnt shows in the harness."""

import json
import random
import sys
from pathlib import Path

import pytest
import yaml

from hgrn2 import cli
from hgrn2.inference.writing import Writer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'hgrn2[eval]'")
import datasets

from hgrn2.evaluation import harness_tasks
from hgrn2.train import plots

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.toml"
FACTS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hgrn2"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # as on a machine without a network
    monkeypatch.setattr(harness_tasks, "hub_reachable", lambda: False)
    # samples and pictures take longer than the run, and are tested elsewhere
    monkeypatch.setattr(Writer, "write", lambda *_: ())
    monkeypatch.setattr(plots, "plot_run", lambda run: [])
    order = random.Random(0)
    Path("text").mkdir()
    for i in range(30):
        lines = [f"The capital of {land} is {city}.\n" for land, city in order.choices(list(FACTS.items()), k=12)]
        Path("text", f"{i}.txt").write_text("".join(lines))
    flags = "--data text --tokenizer bpe:290 --batch-size 4 --seq-len 64 --max-steps 150 --validation-tokens 200"
    sizes = ["hidden_size=64", "expand_ratio=16", "num_hidden_layers=2", "intermediate_size=64"]
    train = ["train", "--config", str(DEMO), "--out", "run", *flags.split(), "--device", "cpu", "--set", *sizes]
    assert cli.main(train) == 0
    return Path("run")


def write_tasks(rows):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test",
        "doc_to_text": "{{query}}",
    }  # fmt: skip
    choose = {
        "task": "choose", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    write = {
        "task": "write", "output_type": "generate_until", "doc_to_target": " {{choices[gold]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (choose, write):
        Path(f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))


@pytest.mark.slow
def test_a_run_knows_what_it_read(run, capsys):
    lands = list(FACTS)
    rows = [{"query": f"The capital of {land} is", "choices": list(FACTS.values()), "gold": i}
            for i, land in enumerate(lands)]  # fmt: skip
    write_tasks(rows)
    tasks = ["--tasks", "choose.yaml", "write.yaml", "--json-out", "out.json", "--device", "cpu"]
    assert cli.main(["eval", str(run), *tasks]) == 0
    assert "|choose|" in capsys.readouterr().out
    found = json.loads(Path("out.json").read_text())["results"]
    assert found["choose"]["acc,none"] == 1
    assert found["write"]["exact_match,none"] == 1
