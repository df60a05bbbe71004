"""lm-evaluation-harness: its results from every layout, for texts of any length, and what goes wrong in one line."""

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

from hgrn2 import cli
from hgrn2.data import ByteTokenizer, load_tokenizer, train_bpe
from hgrn2.data.documents import text_document
from hgrn2.formats.convert import convert
from hgrn2.formats.opening import open_folder
from hgrn2.inference.scoring import score
from hgrn2.inference.writing import Sampling, Writer
from hgrn2.loading import load
from hgrn2.models import HGRN2LM, presets
from hgrn2.train.checkpoint import CheckpointStore, create_run, model_tensors

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'hgrn2[eval]'")

import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hgrn2.evaluation import harness, harness_tasks
from hgrn2.evaluation.harness import HGRN2Harness, open_for_transformers
from hgrn2.evaluation.harness_tasks import open_tasks
from tests.refusals import refuses

ROOT = Path(__file__).resolve().parents[2]
TEXT = "A text — with é, 漢 and 🙂. " * 3
LONG = "".join(f"{i} and {i * i % 97}, " for i in range(700)).rstrip()

CHOICES = [
    {"query": "One and", "choices": ["two", "three and more", "4"], "gold": 0},
    {"query": LONG, "choices": ["two", "9"], "gold": 1},
    {"query": "", "choices": ["é", "a"], "gold": 1},
    {"query": "One and", "choices": ["two", "five"], "gold": 1},
]
TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}",
        "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "words": {
        "output_type": "loglikelihood", "doc_to_text": "{{query}}", "doc_to_target": " {{choices[gold]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    },
    "documents": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    },
    "writing": {
        "output_type": "generate_until", "doc_to_text": "{{query}}", "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["hgrn2"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # as on a machine without a network
    monkeypatch.setattr(harness_tasks, "hub_reachable", lambda: False)


def make_run(folder, variant, tokenizer, change=lambda lm: None):
    config = presets.variant(
        variant, vocab_size=tokenizer.vocab_size + 7, hidden_size=16, num_hidden_layers=2, expand_ratio=4,
        intermediate_size=24, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    settings = {"model": config.to_dict(), "train": {}, "data": {}}
    create_run(folder, settings, tokenizer)
    lm = HGRN2LM(config)
    change(lm)
    CheckpointStore(folder, 1).save(
        model=model_tensors(lm), optimizer={}, task={}, state={"step": 1}, config=settings, best_step=None
    )
    return folder


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def run(request, tmp_path_factory):
    tokenizer = ByteTokenizer() if request.param == "bytes" else train_bpe([TEXT, LONG], 300)
    return make_run(tmp_path_factory.mktemp(request.param) / "run", "fla", tokenizer)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("one") / "run", "fla", train_bpe([TEXT, LONG], 300))


def open_run(folder, dtype=torch.float64, batch_size: int | str = 3):
    own, tokenizer = load(folder, "latest", "cpu")
    lm = HGRN2Harness(*open_for_transformers(own.to(dtype), tokenizer, folder), batch_size)
    return own, tokenizer, lm


def requests(kind, *args):
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(args)]


def write_tasks(folder, rows=CHOICES, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
    for name, task in TASKS.items():
        settings = {"task": name} | data | task | {"metadata": {"version": 1.0}} | changes
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


@torch.no_grad()
def nats(own, ids, count):
    """log p of the last tokens."""
    log_p = own(torch.tensor([ids]))[0][0].double().log_softmax(-1)[-count - 1 : -1]
    return log_p.gather(1, torch.tensor(ids[-count:])[:, None]).sum().item()


# the model


def test_log_likelihoods_by_hand(run):
    own, tokenizer, lm = open_run(run)
    pairs = [("One and", " two"), (LONG, " 9"), ("", "é"), (LONG, " 7, 8"), (TEXT.strip(), " " + LONG)]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, rest), (log_p, _) in zip(pairs, found, strict=True):
        ids = [tokenizer.eot_id, *tokenizer.encode(context + rest)]
        assert log_p == pytest.approx(nats(own, ids, len(ids) - 1 - len(tokenizer.encode(context))), rel=1e-9)
    texts = [TEXT, LONG * 3, "", "é"]
    whole = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((x,) for x in texts)), disable_tqdm=True)
    for text, log_p in zip(texts, whole, strict=True):
        ids = [tokenizer.eot_id, *tokenizer.encode(text)]
        assert log_p == pytest.approx(nats(own, ids, len(ids) - 1) if text else 0.0, rel=1e-9)


def test_documents_are_scored_as_hgrn2_eval_scores_them(one_run, tmp_path):
    own, tokenizer, lm = open_run(one_run)
    (tmp_path / "long.txt").write_text(LONG * 2, encoding="utf-8")
    wanted = score(own, tokenizer, text_document("long", tmp_path / "long.txt"), 100).nats
    ids = [tokenizer.eot_id, *tokenizer.encode(LONG * 2), tokenizer.eot_id]
    # which predicts the end of the text as well
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG * 2,)), disable_tqdm=True)
    assert -found - nats(own, ids, 1) == pytest.approx(wanted, rel=1e-9)


def test_the_same_as_the_harness_s_own_class(one_run):
    """Where nothing is too long for that."""
    _, _, lm = open_run(one_run)
    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=2)
    short = [("One and", " two"), ("", "é"), ("One and", " three and more"), ("One and", " t"), (LONG[:300], " 9")]
    for method, args in [
        ("loglikelihood", short),
        ("generate_until", [(text, {"until": ["\n\n"], "max_gen_toks": 6}) for text, _ in short if text]),
    ]:
        wanted = getattr(theirs, method)(requests(method, *args), disable_tqdm=True)
        found = getattr(lm, method)(requests(method, *args), disable_tqdm=True)
        for a, b in zip(found, wanted, strict=True):
            assert a == (pytest.approx(b, rel=1e-9) if method == "loglikelihood" else b)


def test_writing_after_prompts_of_any_length(run, monkeypatch):
    own, tokenizer, lm = open_run(run)
    monkeypatch.setattr(harness, "PIECE_TOKENS", 300)
    read = []
    lm.model.model.register_forward_hook(lambda *x: read.append(x[-1].last_hidden_state.shape[1]))
    prompts = ["One and", LONG, TEXT]
    args = [(text, {"until": ["\n\n"], "max_gen_toks": 6}) for text in prompts]
    found = lm.generate_until(requests("generate_until", *args), disable_tqdm=True)
    assert max(read) <= 100
    assert found == ["".join(Writer(own, tokenizer, Sampling(temperature=0)).write(text, 6)) for text in prompts]
    # what the tokenizer does not know is never written
    unknown = range(tokenizer.vocab_size, own.config.vocab_size)
    assert lm.model.generation_config.suppress_tokens == list(unknown)


@pytest.mark.parametrize(
    ("layout", "variant"), [("hf", "fla"), ("fla", "fla"), ("native", "fla"), ("official", "official-lm")]
)
def test_every_layout(layout, variant, tmp_path):
    run = make_run(tmp_path / "run", variant, train_bpe([TEXT, LONG], 300))
    saved = open_folder(next((run / "checkpoints").iterdir()))
    convert(saved, tmp_path / layout, layout, tokenizer_dir=run)
    pairs = [("One and", " two"), ("", "é"), (LONG, " 7, 8")]
    lms = [open_run(folder, torch.float32)[2] for folder in (run, tmp_path / layout)]
    a, b = (lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for lm in lms)
    assert a == b
    a, b = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,)), disable_tqdm=True) for lm in lms)
    assert a == b


def test_models_from_elsewhere_begin_with_their_own_token(one_run, tmp_path):
    """A tokenizer whose settings for transformers say so."""
    saved = open_folder(next((one_run / "checkpoints").iterdir()))
    folder = convert(saved, tmp_path / "fla", "fla", tokenizer_dir=one_run).path
    own_tokenizer = load_tokenizer(folder)
    (begin,) = own_tokenizer.encode("A")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {"A": {"id": "A", "ids": [begin], "tokens": ["A"]}}
    for item in content["post_processor"]["single"] + content["post_processor"]["pair"]:
        if "SpecialToken" in item:
            item["SpecialToken"]["id"] = "A"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "A"}))
    own, tokenizer, lm = open_run(folder)
    (found,) = lm.loglikelihood(requests("loglikelihood", ("One and", " two")), disable_tqdm=True)
    ids = [begin, *tokenizer.encode("One and two")]
    assert found[0] == pytest.approx(nats(own, ids, len(tokenizer.encode(" two"))), rel=1e-9)
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)), disable_tqdm=True)
    ids = [begin, *tokenizer.encode(TEXT)]
    assert found == pytest.approx(nats(own, ids, len(ids) - 1), rel=1e-9)


def test_nothing_before_a_text(one_run, tmp_path, monkeypatch):
    """A tokenizer that adds nothing: what has no tokens is read as the token that texts begin with."""
    saved = open_folder(next((one_run / "checkpoints").iterdir()))
    folder = convert(saved, tmp_path / "fla", "fla", tokenizer_dir=one_run).path
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    # another one than rows are filled up with
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "A"}))
    own, tokenizer, lm = open_run(folder)
    (begin,) = tokenizer.encode("A")
    assert lm.tok_encode("One and") == tokenizer.encode("One and")
    assert lm.tok_encode("") == []
    contexts = {"\n": 0, " ": 0, "": 0, "One and": len(tokenizer.encode("One and"))}
    found = lm.loglikelihood(requests("loglikelihood", *((text, " two") for text in contexts)), disable_tqdm=True)
    for (text, length), (log_p, _) in zip(contexts.items(), found, strict=True):
        ids = [*([] if length else [begin]), *tokenizer.encode(text + " two")]
        count = len(tokenizer.encode(text + " two")) - length
        assert log_p == pytest.approx(nats(own, ids, count), rel=1e-9)
    settings = {"until": ["\n\n"], "max_gen_toks": 6}
    (wanted,) = lm.generate_until(requests("generate_until", ("A", settings)), disable_tqdm=True)
    assert wanted
    for prompts in ([""], ["", ""], ["", "One and"]):
        for size in (3, "auto"):
            _, _, lm = open_run(folder, batch_size=size)
            found = lm.generate_until(requests("generate_until", *((x, settings) for x in prompts)), disable_tqdm=True)
            assert found[0] == wanted
    # attention keeps something of every token, and nothing of none
    longest = []
    monkeypatch.setattr(harness, "affordable_rows", lambda model, tokens: longest.append(tokens) or 1)
    lm.generate_until(requests("generate_until", ("", settings)), disable_tqdm=True)
    assert longest == [1]


def test_every_end_of_a_text_stops_the_writing(one_run):
    own, tokenizer, lm = open_run(one_run)
    settings = {"until": ["never written"], "max_gen_toks": 6}
    (whole,) = lm.generate_until(requests("generate_until", ("One", settings)), disable_tqdm=True)
    first = tokenizer.encode("One" + whole)[len(tokenizer.encode("One"))]
    tokenizer.end_ids |= {first}
    model, theirs = open_for_transformers(own, tokenizer, one_run)
    lm = HGRN2Harness(model, theirs, 1)
    (found,) = lm.generate_until(requests("generate_until", ("One", settings)), disable_tqdm=True)
    assert found == tokenizer.decode([first])


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_no_requests(kind, one_run):
    assert getattr(open_run(one_run)[2], kind)([], disable_tqdm=True) == []


# the command


@pytest.mark.slow
def test_tasks_of_every_kind(one_run, tmp_path, capsys):
    folder = write_tasks(tmp_path / "tasks")
    names = ["choices,words", "documents", "writing"]
    args = ["eval", str(one_run), "--tasks", *names, "--tasks-dir", str(folder), "--json-out", "out.json"]
    assert cli.main([*args, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("|")
    assert all(f"|{name}" in shown for name in TASKS)
    found = json.loads(Path("out.json").read_text())
    own, tokenizer, _ = open_run(one_run, torch.float32)

    def log_p(context, rest):
        ids = [tokenizer.eot_id, *tokenizer.encode(context + rest)]
        return nats(own, ids, len(ids) - 1 - len(tokenizer.encode(context)))

    right = 0
    for row in CHOICES:
        by_choice = [log_p(row["query"], f" {choice}") for choice in row["choices"]]
        right += by_choice.index(max(by_choice)) == row["gold"]
    assert found["results"]["choices"]["acc,none"] == right / len(CHOICES)
    mean = sum(log_p(row["query"], f" {row['choices'][row['gold']]}") for row in CHOICES) / len(CHOICES)
    assert found["results"]["words"]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-4)
    bits = -sum(log_p("", row["query"]) for row in CHOICES if row["query"]) / math.log(2)
    num_bytes = sum(len(row["query"].encode()) for row in CHOICES)
    assert found["results"]["documents"]["bits_per_byte,none"] == pytest.approx(bits / num_bytes, rel=1e-4)
    assert 0 <= found["results"]["writing"]["exact_match,none"] <= 1
    assert found["n-samples"]["choices"] == {"original": 4, "effective": 4}
    assert found["config"]["model"] == str(next((one_run / "checkpoints").iterdir()))
    assert found["config"]["model_num_parameters"] == own.num_parameters()
    assert "samples" not in found


def test_batches_examples_and_limits(one_run, tmp_path, capsys):
    folder = write_tasks(tmp_path / "tasks", rows=CHOICES[:1] + CHOICES[3:])
    both = []
    for size in ("auto", "1"):
        args = ["--tasks", str(folder / "choices.yaml"), "--num-fewshot", "1", "--batch-size", size]
        assert cli.main(["eval", str(one_run), *args, "--limit", "1", "--json-out", "out.json", "--device", "cpu"]) == 0
        both.append(json.loads(Path("out.json").read_text()))
    assert both[0]["results"] == both[1]["results"]
    assert both[0]["n-shot"] == {"choices": 1}
    assert both[0]["n-samples"]["choices"] == {"original": 2, "effective": 1}
    assert both[0]["config"]["batch_sizes"] == [64]
    assert both[1]["config"]["batch_size"] == 1


OWN_FUNCTIONS = """
def by_words(row, results):
    (nats,) = results
    return {"word_perplexity": (nats, len(row["query"].split())), "byte_perplexity": (nats, len(row["query"].encode()))}


def by_choice(row, results):
    nats = [one for one, _ in results]
    right = nats.index(max(nats)) == row["gold"]
    return {"acc": float(right), "share_wrong": float(not right)}


def failing(row, results):
    raise RuntimeError("no table of synonyms")
"""


def write_own(folder, base, function, metric_list):
    task = yaml.safe_load((folder / f"{base}.yaml").read_text())
    task |= {"task": function, "metric_list": metric_list}
    (folder / "own.py").write_text(OWN_FUNCTIONS)
    (folder / f"{function}.yaml").write_text(f"{yaml.safe_dump(task)}process_results: !function own.{function}\n")


def test_tasks_that_compute_their_own_metrics(one_run, tmp_path, capsys):
    """As wikitext does, and as those do whose metrics have names that the harness does not know."""
    rows = [row for row in CHOICES if row["query"]]
    folder = write_tasks(tmp_path / "tasks", rows=rows)
    # without an aggregation they get the one that the harness has for the name
    write_own(folder, "documents", "by_words", [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}])
    share = {"metric": "share_wrong", "aggregation": "mean", "higher_is_better": False}
    write_own(folder, "choices", "by_choice", [*TASKS["choices"]["metric_list"], share])
    args = ["eval", str(one_run), "--tasks", "by_words,by_choice,choices", "--tasks-dir", str(folder)]
    assert cli.main([*args, "--json-out", "out.json", "--device", "cpu"]) == 0
    assert "word_perplexity" in capsys.readouterr().out
    found = json.loads(Path("out.json").read_text())["results"]
    own, tokenizer, _ = open_run(one_run, torch.float32)
    texts = [row["query"] for row in rows]
    ids = [tokenizer.encode(text) for text in texts]
    total = sum(nats(own, [tokenizer.eot_id, *x], len(x)) for x in ids)
    words, num_bytes = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    assert found["by_words"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert found["by_words"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-3)
    acc = found["choices"]["acc,none"]
    assert found["by_choice"]["acc,none"] == acc
    assert found["by_choice"]["share_wrong,none"] == pytest.approx(1 - acc)


def test_groups_of_local_tasks(one_run, tmp_path, monkeypatch, capsys):
    folder = write_tasks(tmp_path / "tasks")
    group = {"group": "both", "task": ["choices", "words"],
             "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}]}  # fmt: skip
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    # the thousands of tasks that come with the harness take many seconds to look through, and one test does
    manager = harness_tasks.TaskManager
    monkeypatch.setattr(harness_tasks, "TaskManager", lambda **x: manager(**(x | {"include_defaults": False})))
    found = open_tasks(["both", "documents"], folder)
    assert [getattr(x, "name", None) or x.task_name for x in found] == ["both", "documents"]
    results = harness.evaluate_tasks(open_run(one_run)[2], found, bootstrap_iters=0)
    assert results["groups"]["both"]["acc,none"] == results["results"]["choices"]["acc,none"]
    assert "|both" in harness.results_table(results)


def test_the_example_s_tasks_open(tmp_path, monkeypatch):
    """With a line or two of data, which lie where the program runs."""
    data = tmp_path / "data"
    (data / "blimp").mkdir(parents=True)
    choices = {"query": "One and", "choices": ["two", "three"], "gold": 0}
    schema = {"context_options": ["One and", "Two and"], "continuation": "three.", "gold": 1}
    lines = {
        "lambada_openai": {"context": "One and", "continuation": "two"}, "texts": {"text": TEXT},
        "winogrande": schema, "winograd_wsc": schema,
    }  # fmt: skip
    pair = {"UID": "a", "sentence_good": "One cat sees.", "sentence_bad": "One cat see."}
    (data / "blimp" / "a.jsonl").write_text(json.dumps(pair) + "\n")
    (data / "blimp" / "b.jsonl").write_text(json.dumps(pair | {"further": 1}) + "\n")
    (data / "hellaswag_val_full.txt").write_text("One and\n1\n" + "".join(f"end {i}\n" for i in range(4)))
    folder = ROOT / "examples" / "eval"
    names = [yaml.load(p.read_text(), _Loader)["task"] for p in sorted(folder.glob("*.yaml"))]
    assert len(names) == 14
    for name in names:
        key = name.removesuffix("_local").replace("lambada", "lambada_openai")
        if key not in ("blimp", "hellaswag"):
            (data / f"{key}.jsonl").write_text(json.dumps(lines.get(key, choices)) + "\n")
    tasks = {task.task_name: task for task in open_tasks(names, folder)}
    for task in tasks.values():
        task.set_config("num_fewshot", 0)
        task.build_all_requests(rank=0, world_size=1)
    assert list(tasks) == names
    wanted = {
        "winogrande_local": [("One and", " three."), ("Two and", " three.")],
        "hellaswag_local": [("One and", f" end {i}") for i in range(4)],
        "arc_easy_local": [("One and\nAnswer:", " two"), ("One and\nAnswer:", " three")],
        "lambada_local": [("One and", " two")],
        "texts_local": [(TEXT,)],
        "blimp_local": [("", "One cat sees."), ("", "One cat see.")] * 2,
    }
    for name, args in wanted.items():
        assert [instance.args for instance in tasks[name].instances] == args


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: node.value)


def test_commands_of_the_guide(one_run, tmp_path, capsys, monkeypatch):
    # two of the folders of tasks that come with the harness instead of all
    manager, own = harness_tasks.TaskManager, Path(lm_eval.tasks.__file__).parent
    some = {"include_defaults": False, "include_path": [own / "lambada", own / "piqa"]}
    monkeypatch.setattr(
        harness_tasks, "TaskManager", lambda **x: manager(**(x if "include_defaults" in x else x | some))
    )
    section = (ROOT / "docs/guide/evaluating.md").read_text(encoding="utf-8").split("## Tasks\n")[1].split("\n## ")[0]
    commands = [shlex.split(line) for line in re.findall(r"^hgrn2 (.+)$", section, re.MULTILINE)]
    (task,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert len(commands) == 3
    shutil.copytree(one_run, "runs/notes")
    Path("tasks").mkdir()
    Path("tasks/capitals.yaml").write_text(task)
    row = {"question": "The capital of France is", "answers": ["Paris", "Rome"], "right": 0}
    Path("tasks/capitals.jsonl").write_text(json.dumps(row) + "\n")
    for command in commands:
        # the one that needs a network is refused in one line
        published = "lambada_openai" in " ".join(command)
        assert cli.main(command) == (2 if published else 0)
        shown = capsys.readouterr()
        assert "connect, or name a task file" in shown.err if published else "|capitals|" in shown.out
    assert "capitals" in json.loads(Path("scores.json").read_text())["results"]


# what goes wrong


def refused(capsys, args, message):
    capsys.readouterr()
    assert cli.main(["eval", *map(str, args)]) == 2
    shown = capsys.readouterr()
    line = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1, shown.err
    assert message in line[0]
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", ","], "no task named"),
        (
            ["--tasks", "choices", "--batch-size", "0"],
            "--batch-size is 0; wanted a number from 1 to 999999999, or auto",
        ),
        (["--tasks", "choices", "--batch-size", "many"], "--batch-size is many"),
        (["--tasks", "choices", "--limit", "0"], "--limit is 0; wanted at least 1"),
        (["--tasks", "choices", "--num-fewshot", "-1"], "--num-fewshot is -1; wanted at least 0"),
        (["--tasks", "choices", "--json-out", "no/where.json"], "no/where.json: cannot be written"),
        (["--tasks", "choices", "--window", "8"], "--tasks: for tasks, --window: for texts; evaluate one of them"),
        (["rows.txt", "--tasks", "choices"], "--tasks: for tasks, files: for texts"),
        (["rows.txt", "--limit", "3"], "--limit: for tasks, files: for texts"),
        (["--limit", "3"], "no file to evaluate; name one or more after the run, or tasks with --tasks"),
        (["--tasks", "nothing.yaml"], "nothing.yaml: cannot be read (No such file or directory)"),
        (["--tasks", "bad.yaml"], "bad.yaml: not a task file"),
        (["--tasks", "list.yaml"], "list.yaml: not a task file"),
        (["--tasks", "includes.yaml"], "missing.inc: cannot be read (No such file or directory)"),
        (["--tasks", "choices", "--tasks-dir", "no"], "no: no such folder"),
        (["--tasks", "choices", "--tasks-dir", "broken"], "broken/bad.yaml: not a task file"),
        (["--tasks", "tasks/choices.yaml", "--tasks", "tasks/choices.yaml"], None),
        (["--tasks", "tasks/choices.yaml", "again/choices.yaml"], "task 'choices' is named twice"),
        (["--tasks", "no-file.yaml"], "task 'no-file.yaml' cannot be opened"),
        (["--tasks", "published.yaml"], "the Hugging Face Hub cannot be reached (offline); connect"),
        (["--tasks", "empty/choices.yaml"], "task 'empty/choices.yaml' cannot be opened: its data has no rows"),
        (["--tasks", "none-left.yaml"], "task 'none-left.yaml' cannot be opened: its data has no rows"),
        (["--tasks", "no-text.yaml"], "task 'no-text.yaml' cannot be opened"),
        (["--tasks", "bad-metric.yaml"], "task 'bad-metric.yaml': metric 'acccc' is neither the harness's"),
        (["--tasks", "function.yaml"], "task 'function.yaml' cannot be opened: ImportError"),
        (["--tasks", "tasks/function.yaml"], "task 'tasks/function.yaml' cannot be opened: ImportError"),
        (["--tasks", "no-name.yaml"], "no-name.yaml: names no task (a line task: NAME) and no group"),
        (["--tasks", "list-name.yaml"], "list-name.yaml: names no task"),
    ],
)
def test_refused_in_one_line(args, message, one_run, tmp_path, capsys):
    for name in ("tasks", "again"):
        write_tasks(tmp_path / name)
    write_tasks(tmp_path / "empty", rows=[])
    (tmp_path / "broken").mkdir()
    for name in ("bad.yaml", "broken/bad.yaml"):
        (tmp_path / name).write_text("task: [unclosed\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "rows.txt").write_text("text")
    good = yaml.safe_load((tmp_path / "tasks" / "choices.yaml").read_text())
    good["dataset_kwargs"] = {"data_files": {"test": "tasks/rows.jsonl"}}
    for name, changes in {
        "no-file": {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
        "published": {"dataset_path": "someone/something", "dataset_kwargs": {}},
        "includes": {"include": "missing.inc"},
        "no-text": {"doc_to_text": "{{ unclosed"},
        "bad-metric": {"metric_list": [{"metric": "acccc", "aggregation": "mean", "higher_is_better": True}]},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(good | changes))
    (tmp_path / "function.yaml").write_text(yaml.safe_dump(good) + "process_docs: !function nowhere.function\n")
    beside = (tmp_path / "tasks" / "choices.yaml").read_text()
    (tmp_path / "tasks" / "function.yaml").write_text(f"{beside}process_docs: !function nowhere.function\n")
    (tmp_path / "left.py").write_text("def none(rows):\n    return rows.select([])\n")
    (tmp_path / "none-left.yaml").write_text(yaml.safe_dump(good) + "process_docs: !function left.none\n")
    (tmp_path / "no-name.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "list-name.yaml").write_text("task: [one]\n")
    if message is None:
        # a name twice is the same task
        assert len(open_tasks([args[1], args[3]])) == 1
        return
    refused(capsys, [one_run, *args], message)


@pytest.mark.slow
def test_unknown_names(one_run, tmp_path, capsys):
    """Near ones are found among the tasks of the folder and the harness's own."""
    write_tasks(tmp_path / "tasks")
    args = [one_run, "--tasks", "hellaswga", "--tasks-dir", tmp_path / "tasks"]
    refused(capsys, args, "no task named 'hellaswga'; did you mean 'hellaswag'")


def test_a_field_that_the_data_lacks(one_run, tmp_path, capsys):
    rows = [*CHOICES, {"query": "One and", "choices": [], "gold": 3}]
    folder = write_tasks(tmp_path / "tasks", rows=rows)
    refused(capsys, [one_run, "--tasks", folder / "choices.yaml"], "tasks cannot be run: ")


def test_functions_of_a_task_that_fail(one_run, tmp_path, capsys, monkeypatch):
    folder = write_tasks(tmp_path / "tasks")
    write_own(folder, "choices", "failing", TASKS["choices"]["metric_list"])
    args = [one_run, "--tasks", "failing", "--tasks-dir", folder]
    refused(capsys, args, "tasks cannot be run: RuntimeError: no table of synonyms")
    # that there is no memory is nothing that a task says
    lm = open_run(one_run)[2]
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")):
        monkeypatch.setattr(lm, "loglikelihood", Mock(side_effect=error))
        with pytest.raises(RuntimeError, match=str(error)):
            harness.evaluate_tasks(lm, open_tasks(["choices"], folder))


@pytest.mark.filterwarnings("ignore:.*values that are not finite:UserWarning")
def test_outputs_that_are_not_finite(tmp_path, capsys):
    """Greedy, the first token would be the answer; a sample is an error of torch's."""

    @torch.no_grad()
    def spoil(lm):
        lm.model.norm.weight[0] = math.nan

    run = make_run(tmp_path / "run", "fla", ByteTokenizer(), spoil)
    folder = write_tasks(tmp_path / "tasks")
    message = "the model's outputs are not finite; use another checkpoint"
    for name in ("choices", "documents", "writing"):
        refused(capsys, [run, "--tasks", name, "--tasks-dir", folder, "--device", "cpu"], message)
    lm = open_run(run)[2]
    for more in ({}, {"do_sample": True, "temperature": 0.7}):
        settings = {"until": ["\n"], "max_gen_toks": 4} | more
        with refuses("not-finite"):
            lm.generate_until(requests("generate_until", ("One", settings)), disable_tqdm=True)


def test_continuations_without_a_token_of_their_own(tmp_path):
    """A token may reach over the end of the context."""
    lm = open_run(make_run(tmp_path / "run", "fla", train_bpe(["them them them"], 262)))[2]
    with refuses("invalid-value", "'m'", "'the'"):
        lm.loglikelihood(requests("loglikelihood", ("the", "m")), disable_tqdm=True)


def test_checkpoints_that_do_not_do(one_run, tmp_path, capsys):
    folder = write_tasks(tmp_path / "tasks")
    args = ["--tasks", folder / "choices.yaml"]
    refused(capsys, ["nothing", *args], "nothing: no model there")
    saved = open_folder(next((one_run / "checkpoints").iterdir()))
    bare = convert(saved, tmp_path / "bare", "hf", tokenizer_dir=one_run).path
    (bare / "tokenizer_config.json").write_text("{")
    refused(capsys, [bare, *args], "tokenizer_config.json: not JSON")
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": 5}')
    refused(capsys, [bare, *args], "transformers cannot open the tokenizer")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(capsys, [bare, *args], "the directory holds no tokenizer.json")


def test_without_the_harness(one_run, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "hgrn2.evaluation.harness")
    monkeypatch.delattr("hgrn2.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(capsys, [one_run, "--tasks", "x"], "--tasks needs lm_eval, which is not installed: pip install ")


def test_the_place_is_looked_at_before_the_work(one_run, capsys, monkeypatch):
    monkeypatch.setattr(cli.evaluate, "evaluate_tasks", None)
    refused(capsys, [one_run, "--tasks", "x", "--json-out", "."], ".: cannot be written")
