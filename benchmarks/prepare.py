"""Preparing text beside the straightforward pipeline of the `datasets` and `tokenizers` libraries, in MB/s.

python benchmarks/prepare.py --text text/*.txt --sizes 38 100 200 --out benchmarks/results/prepare-cpu.json
python benchmarks/prepare.py --text text/*.txt --command --sizes 100

Both sides run in a fresh process each time, from the import of what they need to arrays of tokens on the disk, on the
same text and with the same tokenizer, in turn. The text is cut into documents at form feeds or after 20 kB; it is
given as .jsonl, one document a line, and as a folder of .txt files, one document each. "Speed against" is the median of
the rounds' ratios.

The pipeline of the libraries: `load_dataset` with an empty cache (of text with sample_by="document"), `map` in batches
with one process a core, whose function calls `encode_batch_fast` and hands on arrays of uint16, an end of text before
each document, then every batch's tokens are written to one file. Ours is `prepare`: besides, it holds documents out,
refuses what is not UTF-8, and writes checksums and where documents and bytes begin. A run counts only if both have
the same number of tokens.

With --command, the whole `hgrn2 train --data X.jsonl --tokenizer bpe:16384 --max-steps 5` is timed instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OURS, RIVAL = "hgrn2", "datasets + tokenizers"
DOCUMENT_CHARS = 20_000
ROOT = Path(__file__).resolve().parent.parent


def documents(paths: Sequence[Path]) -> Iterator[str]:
    """Cut texts into documents, at form feeds or failing that at line ends."""
    for path in paths:
        for part in path.read_text(encoding="utf-8").split("\f"):
            start = 0
            while start < len(part):
                stop = part.find("\n", start + DOCUMENT_CHARS) + 1 or len(part)
                if text := part[start:stop].strip():
                    yield text
                start = stop


def write_corpora(paths: Sequence[Path], num_bytes: int, folder: Path) -> dict[str, Path]:
    """Write the first num_bytes of text as .jsonl and as a folder of .txt files; return both places by name."""
    jsonl, texts = folder / "corpus.jsonl", folder / "corpus"
    texts.mkdir(parents=True)
    written = number = 0
    with jsonl.open("w", encoding="utf-8") as file:
        for number, text in enumerate(documents(paths)):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            inner = texts / f"{number // 1000:04d}"
            inner.mkdir(exist_ok=True)
            (inner / f"{number:07d}.txt").write_text(text, encoding="utf-8")
            written += len(text.encode("utf-8"))
            if written >= num_bytes:
                break
    if written < num_bytes:
        sys.exit(
            f"the text has {written / 1e6:.1f} MB; wanted {num_bytes / 1e6:.1f}: name more files, or smaller --sizes"
        )
    print(f"{number + 1:,} documents, {written / 1e6:.1f} MB", file=sys.stderr)
    return {"jsonl": jsonl, "txt": texts}


def prepare_ours(corpus: Path, tokenizer: Path, out: Path) -> int:
    """Prepare a corpus with this package; return the number of tokens."""
    from hgrn2.data import load_tokenizer, prepare

    prepared = prepare(corpus, load_tokenizer(tokenizer), out, progress=False)
    return prepared.train.num_tokens + prepared.validation.num_tokens


def prepare_rival(corpus: Path, tokenizer: Path, out: Path, num_proc: int) -> int:
    """Tokenise a corpus with the libraries alone; return the number of tokens."""
    # before any process is forked: each has one thread
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    import numpy as np
    import tokenizers

    datasets.disable_progress_bars()
    out.mkdir()
    given: dict[str, Any]
    if corpus.is_dir():
        kind, given = "text", {"data_files": str(corpus / "**/*.txt"), "sample_by": "document"}
    else:
        kind, given = "json", {"data_files": str(corpus)}
    data = datasets.load_dataset(kind, split="train", cache_dir=str(out / "cache"), **given)
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    eot = backend.token_to_id("<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
        encoded = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [np.array([eot, *encoding.ids], np.uint16) for encoding in encoded]}

    features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    data = data.map(encode, batched=True, remove_columns=data.column_names, num_proc=num_proc, features=features)
    num_tokens = 0
    with (out / "tokens.bin").open("wb") as file:
        for chunk in data.data.column("ids").chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            file.write(values.tobytes())
            num_tokens += len(values)
    return num_tokens


def run_candidate(name: str, corpus: Path, tokenizer: Path, num_proc: int, folder: Path) -> tuple[float, int]:
    """Run a candidate in a separate process; return seconds from start to end, and the number of tokens."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, __file__, "--candidate", name, str(corpus), str(tokenizer), str(out), str(num_proc)]
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return seconds, int(done.stdout.split()[-1])


def run_command(corpus: Path, folder: Path, show: bool) -> dict[str, float]:
    """Time `hgrn2 train` of five steps from start to end; return seconds by part, as the run's records tell them."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--tokenizer", "bpe:16384", "--max-steps", "5", "--rebuild"]
    words = ["-m", "hgrn2", "train", "--data", str(corpus), "--out", str(out), *flags]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    began, start = time.time(), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, env=env, capture_output=not show, cwd=folder)
    seconds = {"whole command": time.perf_counter() - start}
    # the manifest is written last
    manifest = max(folder.rglob("train/manifest.json"), key=lambda path: path.stat().st_mtime)
    records = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, records) if record["kind"] == "train"]
    seconds["until the tokens are there"] = manifest.stat().st_mtime - began
    seconds["training, five steps"] = steps[-1]["elapsed_s"]
    return seconds


def main() -> int:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--candidate"]:
        name, corpus, tokenizer, out, num_proc = sys.argv[2:]
        places = Path(corpus), Path(tokenizer), Path(out)
        print(prepare_ours(*places) if name == OURS else prepare_rival(*places, int(num_proc)))
        return 0
    import environment  # noqa: F401  (before torch)
    from report import Row, arguments, report, row

    from hgrn2.data.encode import num_cores
    from hgrn2.data.find_tokenizer import train_bpe

    parser = arguments(str(__doc__).splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.set_defaults(rounds=3)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files, plain")
    parser.add_argument("--sizes", type=int, nargs="+", default=[38, 100, 200], help="MB of text")
    parser.add_argument("--kinds", nargs="+", choices=["jsonl", "txt"], default=["jsonl", "txt"])
    parser.add_argument("--num-proc", type=int, default=num_cores(), help="processes of the libraries' pipeline")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--command", action="store_true", help="time `hgrn2 train` from start to end instead")
    parser.add_argument("--show", action="store_true", help="show the command's own output")
    options = parser.parse_args()
    rows: list[Row] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            corpora = write_corpora(options.text, size * 1_000_000, folder)
            if options.command:
                runs = [run_command(corpora["jsonl"], folder, options.show) for _ in range(options.rounds)]
                rows += [row(f"{size} MB: {part}", [run[part] for run in runs], "s") for part in runs[0]]
                continue
            sample = (text[:4000] for text in documents(options.text[:1]))
            tokenizer = train_bpe(sample, options.vocab_size).save(folder)
            for kind in options.kinds:
                rates: dict[str, list[float]] = {OURS: [], RIVAL: []}
                counts = set()
                for i in range(options.rounds):
                    for candidate in (OURS, RIVAL)[:: 1 if i % 2 == 0 else -1]:
                        seconds, num_tokens = run_candidate(
                            candidate, corpora[kind], tokenizer, options.num_proc, folder
                        )
                        rates[candidate].append(size / seconds)
                        counts.add(num_tokens)
                        print(f"{size} MB {kind} {candidate}: {seconds:.1f} s, {num_tokens:,} tokens", file=sys.stderr)
                if len(counts) > 1:
                    parser.error(f"{size} MB of {kind}: the pipelines give {counts} tokens; wanted equal numbers")
                ratios = [a / b for a, b in zip(rates[OURS], rates[RIVAL], strict=True)]
                note = f"round by round {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
                names = {candidate: f"{size} MB {kind}: {candidate}" for candidate in rates}
                rows += [row(names[c], r, "MB/s", note if c == OURS else None) for c, r in rates.items()]
                # the two sides of a round ran under the same load
                ours = next(r for r in rows if r.name == names[OURS])
                ours.peer, ours.ratio = names[RIVAL], statistics.median(ratios)
    settings = {"processes": options.num_proc, "vocab_size": options.vocab_size, "rounds": options.rounds}
    report("prepare", settings, rows, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
