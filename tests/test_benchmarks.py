"""The benchmarks' parts, at sizes that take no time: what is wrong is not timed, what is timed is reported."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from hgrn2.data import train_bpe

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("exact", "report", "rivals", "scan", "scan_cuda", "tables", "roofline", "prepare", "beside", "decode")


@pytest.fixture
def modules(monkeypatch):
    """The scripts as modules by name, forgotten afterwards: their names are nobody's own."""
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def test_what_is_wrong_is_not_timed(modules, tmp_path, capsys):
    exact, scan = modules["exact"], modules["scan"]
    inputs = exact.make_inputs(1, 64, 2, 8, 4, "cpu")
    dy = torch.randn_like(inputs.v)
    bench = scan.Bench()
    with torch.no_grad():
        wanted = exact.exact(inputs, None)
    limit = exact.LIMITS[torch.float32]
    assert bench.add("right", exact.without_gradients(exact.scan, inputs), wanted, limit)
    assert bench.add("gradients", exact.with_backward(exact.scan, inputs, dy), exact.exact(inputs, dy), limit)
    assert not bench.add("wrong", lambda: 1.01 * exact.scan(*inputs), wanted, limit)
    bench.add_rival("absent", lambda: importlib.import_module("a_package_nobody_has").scan, wanted)
    rows = {row.name: row for row in bench.rows(2, "cpu")}
    assert rows["right"].value > 0
    assert rows["wrong"].value is None
    assert "wrong: relative error" in rows["wrong"].note
    assert "does not run here: ModuleNotFoundError" in rows["absent"].note
    modules["report"].report("scan", {"B": 1}, list(rows.values()), "cpu", tmp_path / "result.json")
    record = json.loads((tmp_path / "result.json").read_text())
    assert [row["name"] for row in record["rows"]] == list(rows)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record


def worst(values):
    return max(values.values())


def test_a_part_of_a_large_result_is_checked(modules):
    exact, scan_cuda = modules["exact"], modules["scan_cuda"]
    shape = scan_cuda.Shape(2, 150, 3, 16)
    inputs = shape.make("cpu")
    checked = scan_cuda.Checked(inputs, torch.randn_like(inputs.v), tokens=70)
    limit = exact.LIMITS[torch.bfloat16]
    found = checked.errors(exact.scan, inputs)
    assert list(found) == ["y", "dq", "df", "dv", "dlower_bound"]
    assert 0 < worst(found) <= limit
    assert worst(checked.errors(exact.loop, inputs)) <= limit

    def other_gates(q, f, v, lower_bound):
        return exact.scan(q, f + 0.1, v, lower_bound)

    assert worst(checked.errors(other_gates, inputs)) > limit


def test_no_error_hides_behind_another(modules):
    one = torch.ones(3)
    assert modules["exact"].errors([1.5 * one, one], [one, one]) == [0.5, 0]
    assert math.isnan(modules["exact"].error([one, one * math.nan], [one, one]))
    case = modules["scan_cuda"].Case("here", None, {})
    assert "dq nan, allowed" in modules["scan_cuda"].fault(case, "hgrn2", {"y": 1e-3, "dq": math.nan})
    assert modules["scan_cuda"].fault(case, "hgrn2", {"y": 1e-3}) is None


def test_rows_of_errors(modules):
    scan_cuda, report = modules["scan_cuda"], modules["report"]
    case = scan_cuda.Case("B16 T2048", None, {})
    values = {
        scan_cuda.OURS: {"y": 1.23456e-3, "dq": 2.2e-3, "dv": math.nan},
        scan_cuda.FLA: {"y": 1.2e-3, "dq": 2e-3, "dv": 2e-3},
    }
    rows = {row.name: row for row in scan_cuda.error_rows(case, values)}
    y, dq, dv = (rows[f"B16 T2048: hgrn2, error of {key}"] for key in ("y", "dq", "dv"))
    assert y.note is None
    assert y.peer == "B16 T2048: fla chunk_gla with gates, error of y"
    assert dq.note == "worse than fla chunk_gla with gates by 10%"
    assert (dv.value, dv.note) == (None, "not finite")
    short = report._short(y)
    assert (short["value"], short["unit"]) == (1.235e-3, "relative RMS")
    assert report.cells(short)[1] == "0.00123 relative RMS"
    assert report.cells(report._short(report.Row("x", 3.456e-7, "relative RMS")))[1] == "3.46e-07 relative RMS"
    (absent,) = scan_cuda.error_rows(case, {scan_cuda.FLA: "does not run here: no"})
    assert (absent.value, absent.note) == (None, "does not run here: no")


def test_bytes_that_must_move(modules):
    scan_cuda = modules["scan_cuda"]
    inputs = scan_cuda.Shape(2, 10, 3, 16).make("cpu")
    values, bound = 2 * 10 * 3 * 16, 4 * 3 * 16
    assert scan_cuda.moved_bytes(inputs) == {
        "forward": 8 * values + bound,
        "forward + backward": 22 * values + 3 * bound,
    }
    free = modules["exact"].free_inputs(inputs)
    assert scan_cuda.moved_bytes(free) == {"forward": 12 * values, "forward + backward": 34 * values}


def test_packed_sequences_are_uneven_and_one_ends_early(modules):
    starts = modules["scan_cuda"].packed_starts(32768, 16)
    assert starts.dtype == torch.int32
    assert len(starts) == 17
    lengths = starts.diff()
    assert (lengths > 0).all()
    assert lengths.sum() == 32768
    assert lengths.max() > 2 * lengths.float().mean()
    assert starts[1] < modules["scan_cuda"].CHECKED_TOKENS


def test_time_a_token_of_two_shapes(modules):
    scan_cuda, row = modules["scan_cuda"], modules["report"].Row
    near, far = scan_cuda.Shape(16, 2048), scan_cuda.Shape(1, 131_072)
    rows = [row("B16 T2048: hgrn2, forward", 1.0, "ms"), row("B1 T131072: hgrn2, forward", 5.0, "ms")]
    (found,) = scan_cuda.per_token(rows, far, near, ["hgrn2", "absent"])
    assert (found.name, found.unit) == ("B1 T131072 per token against B16 T2048: hgrn2, forward", "x")
    assert found.value == 1.25


@pytest.fixture
def on_cpu(modules, monkeypatch):
    """The benchmark of a GPU at tiny sizes, with a clock that calls once and says a millisecond."""
    scan_cuda = modules["scan_cuda"]

    def event_times(calls, rounds):
        for call in calls:
            call()
        return [1e-3] * len(calls)

    def peak_bytes(call):
        call()
        return 1 << 20

    def rival():
        return lambda q, z, v, bound: modules["exact"].scan(q * 1.001, z, v, bound)

    fakes = {
        "SHAPES": ((2, 70, 3, 16), (1, 150, 3, 16)),
        "event_times": event_times,
        "peak_bytes": peak_bytes,
        "copy_bandwidth": lambda device, rounds: [4e12],
        "matmul_rate": lambda device, rounds: [8e14],
        "step_times": lambda batch, device, rounds: [1e-6],
        "first_call": lambda: modules["report"].Row("first call", 1.0, "s"),
        "fla_hgrn2": rival,
        "compile_ahead": lambda rival: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(scan_cuda, name, fake)
    return scan_cuda


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_from_end_to_end(modules, on_cpu, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert on_cpu.benchmark("cpu", 1, out) == 0
    record = json.loads(out.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert len(rows) == len(record["rows"])
    less_friendly = "B1 T70, bounds in [0, 0.9), gates' pre-activations x 4"
    alone = ("B1 T140, 2 sequences packed", "B2 T70, float32", "B2 T70, gated_scan", "B1 T150, bound 0.999")
    for name in ("B2 T70", "B1 T150", *alone):
        for kind in ("forward", "forward + backward"):
            assert rows[f"{name}: hgrn2, {kind}"]["value"] == 1
    for name in ("B2 T70", "B1 T150", less_friendly):
        for key in ("y", "dq", "df", "dv", "dlower_bound"):
            assert 0 < rows[f"{name}: hgrn2, error of {key}"]["value"] < 1e-2
            assert rows[f"{name}: fla chunk_gla with gates, error of {key}"]["unit"] == "relative RMS"
    assert rows["B2 T70, gated_scan: hgrn2, error of dlog_f"]["value"] < 1e-2
    assert rows["B2 T70, float32: hgrn2, error of df"]["value"] < 2e-6
    assert rows["B1 T150 per token against B2 T70: hgrn2, forward"]["value"] == pytest.approx(14 / 15, rel=1e-3)
    assert "relative RMS" in modules["tables"].table([record])
    assert modules["roofline"].main([str(out), str(tmp_path / "roofline.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "roofline.png"]
    assert "B2 T70: measured" in capsys.readouterr().err


def test_a_run_that_is_cut_off_is_not_lost(on_cpu, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(on_cpu, "step_times", interrupt)
    with pytest.raises(KeyboardInterrupt):
        on_cpu.benchmark("cpu", 1, tmp_path / "result.json")
    (kept,) = tmp_path.iterdir()
    assert kept.name == "result.json.unfinished"
    rows = {row["name"]: row["value"] for row in json.loads(kept.read_text())["rows"]}
    assert rows["B1 T150: hgrn2, forward"] == 1
    capsys.readouterr()


def test_a_wrong_operator_is_not_timed(on_cpu, tmp_path, monkeypatch, capsys):
    right = on_cpu.scan
    monkeypatch.setattr(on_cpu, "scan", lambda *inputs, **options: 1.1 * right(*inputs, **options))
    monkeypatch.setattr(on_cpu, "event_times", None)
    assert on_cpu.benchmark("cpu", 1, tmp_path / "result.json") == 1
    assert not (tmp_path / "result.json").exists()
    assert "B2 T70: wrong: relative error of y 1.0e-01" in capsys.readouterr().err


@pytest.mark.slow
def test_a_further_case_fails_alone(on_cpu, tmp_path, monkeypatch, capsys):
    right = on_cpu.free_scan
    monkeypatch.setattr(on_cpu, "free_scan", lambda *inputs: 1.1 * right(*inputs))

    monkeypatch.setattr(on_cpu, "packed_starts", lambda tokens, count: torch.tensor([0, tokens], dtype=torch.int64) + 1)
    assert on_cpu.benchmark("cpu", 1, tmp_path / "result.json") == 1
    rows = {row["name"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    assert "wrong: relative error of y" in rows["B2 T70, gated_scan: hgrn2"]["note"]
    assert rows["B2 T70, gated_scan: hgrn2"]["value"] is None
    assert "UserError" in rows["B1 T140, 2 sequences packed"]["note"]
    assert rows["B2 T70: hgrn2, forward"]["value"] == 1
    capsys.readouterr()


def test_operations_and_bytes_by_hand(modules):
    roofline = modules["roofline"]
    # K = V = 128, C = 64: two products of 32,768 with the state, two of 8,192 within the chunk
    assert roofline.scan_work(128, 128, backward=False) == (2 * 32768 + 2 * 8192, 1024)
    # ... 2.5 times that for the backward pass, and q f v dy dq df dv
    assert roofline.scan_work(128, 128, backward=True) == (81920 + 204800, 1024 + 1792)
    # K = 2, V = 3: 24 and 320; twice that, and 12 and 128 once more
    assert roofline.scan_work(2, 3, backward=False) == (344, 20)
    assert roofline.scan_work(2, 3, backward=True) == (344 + 688 + 140, 20 + 34)
    # T = 2048: 4 * 2048^2 / 2 * 128 operations for 2048 tokens, of which q k v y have 8 * 128 bytes each
    assert roofline.attention_work(2048, 128, backward=False) == (524288, 1024)
    assert roofline.attention_work(2048, 128, backward=True) == (524288 * 3.5, 3072)


def synthetic_result():
    def row(name, value, unit="ms"):
        return {"name": name, "value": value, "unit": unit, "peer": None, "ratio": None}

    return {
        "device": "a chip",
        "commit": "0123456789abcdef",
        "settings": {"H": 16, "K": 128, "V": 128},
        "rows": [
            row("copy bandwidth", 4.0, "TB/s"),
            row("bfloat16 product, 8192 cubed", 800.0, "TFLOP/s"),
            row("B16 T2048: hgrn2, forward", 0.5),
            row("B16 T2048: hgrn2, forward + backward", 2.0),
            row("B16 T2048: hgrn2, error of y", 1e-3, "relative RMS"),
            row("B16 T2048: hgrn2, forward + backward, extra memory", 800.0, "MiB"),
            row("B16 T2048: floor, forward", 0.1),
            row("B16 T2048, float32: hgrn2, forward", 3.0),
            row("B1 T131072: attention, cuDNN, forward", 110.0),
            row("B1 T131072: fla chunk_gla with gates", None),
        ],
    }


def test_points_of_the_roofline(modules, tmp_path):
    forward, both, attention = modules["roofline"].points(synthetic_result())
    assert (forward.name, forward.size, forward.kind) == ("hgrn2", "16 x 2,048", "forward")
    assert (forward.operations_per_byte, both.operations_per_byte) == (80, pytest.approx(101.818, rel=1e-5))
    assert forward.teraflops == pytest.approx(81920 * 32768 * 16 / 0.5e-3 / 1e12)
    assert (attention.name, attention.operations_per_byte) == ("attention, cuDNN", 131072 / 4)
    assert attention.teraflops == pytest.approx(4 * 131072**2 / 2 * 128 * 16 / 0.11 / 1e12)
    source = tmp_path / "result.json"
    source.write_text(json.dumps(synthetic_result()))
    assert modules["roofline"].main([str(source), str(tmp_path / "images" / "roofline.png")]) == 0
    assert (tmp_path / "images" / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["copy bandwidth", "bfloat16 product", "B"])
def test_a_roofline_needs_its_rows(modules, tmp_path, capsys, missing):
    result = synthetic_result()
    result["rows"] = [row for row in result["rows"] if not row["name"].startswith(missing)]
    source = tmp_path / "result.json"
    source.write_text(json.dumps(result))
    assert modules["roofline"].main([str(source), str(tmp_path / "roofline.png")]) == 2
    assert (missing if len(missing) > 1 else "no time of a kernel") in capsys.readouterr().err
    assert not (tmp_path / "roofline.png").exists()


def test_the_roofline_knows_the_names_of_the_benchmark(modules):
    scan_cuda, roofline = modules["scan_cuda"], modules["roofline"]
    assert list(roofline.SCANS) == [scan_cuda.OURS, scan_cuda.FLA]
    assert list(roofline.ATTENTION) == [scan_cuda.CUDNN, scan_cuda.FLASH]
    row = f"{scan_cuda.Shape(4, 8192)}: {scan_cuda.OURS}, {scan_cuda.BOTH}"
    assert roofline.TIMED.fullmatch(row)["kind"] == scan_cuda.BOTH


def test_why_a_rival_is_missing(modules, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fla.")]:
        monkeypatch.delitem(sys.modules, name)
    # importing it then fails as if it were not installed
    monkeypatch.setitem(sys.modules, "fla", None)
    functions, rows = modules["scan_cuda"].operators()
    assert list(functions) == [modules["scan_cuda"].OURS]
    assert "does not run here" in rows[0].note


@pytest.mark.slow
def test_both_ways_of_preparing_give_as_many_tokens(modules, tmp_path):
    pytest.importorskip("datasets")
    prepare = modules["prepare"]
    text = tmp_path / "text.txt"
    text.write_text(
        "\f".join(f"text number {i}\nand its second line: \u00e9\u4e2d\n" * (i + 1) for i in range(20)),
        encoding="utf-8",
    )
    corpora = prepare.write_corpora([text], 5000, tmp_path / "corpora")
    tokenizer = train_bpe(prepare.documents([text]), 280).save(tmp_path)
    counts = {
        prepare.run_candidate(candidate, corpora[kind], tokenizer, 1, tmp_path)[1]
        for kind, candidate in (("jsonl", prepare.OURS), ("txt", prepare.OURS), ("txt", prepare.RIVAL))
    }
    assert len(counts) == 1


def test_decoding_at_a_size_that_takes_no_time(modules, tmp_path, monkeypatch, capsys):
    decode = modules["decode"]
    out = tmp_path / "decode.json"
    words = ["decode.py", "--size", "nano", "--batches", "2", "--rounds", "1", "--seconds", "0.001", "--no-peers"]
    monkeypatch.setattr(
        sys, "argv", [*words, "--prefill", "64", "--deterministic", "--threads", "1", "--out", str(out)]
    )
    decode.main()
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert all(row["value"] > 0 for row in rows.values())
    assert rows["batch 2: engine, prompt 128"]["peer"] == "batch 2: HGRN2LM.step"
    assert "prefill of 64 tokens" in rows
    assert capsys.readouterr().out
