"""Redraws tables in Markdown files from committed benchmark results.

A table stands between two comments and is redrawn from the result files whose names start with its name:

    <!-- table:scan -->
    ... anything here is replaced by benchmarks/results/scan*.json ...
    <!-- /table:scan -->

A few rows against their peers stand between <!-- headline --> and <!-- /headline -->; `headline.toml` names them.

    python benchmarks/tables.py README.md            redraw
    python benchmarks/tables.py --check README.md    exit 1 if that would change anything
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

from report import HEADER, RATE_UNITS, cells

ROOT = Path(__file__).resolve().parent.parent
TABLE_VERSIONS = ("torch", "triton", "fla-core", "onnxruntime", "transformers")
MARKERS = re.compile(
    r"(?P<open><!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<close><!-- /table:(?P=name) -->)", re.DOTALL
)
HEADLINE_FILE = Path(__file__).resolve().parent / "headline.toml"
HEADLINE_MARKERS = re.compile(r"(?P<open><!-- headline -->\n)(?P<body>.*?)(?P<close><!-- /headline -->)", re.DOTALL)


def table(results: list[dict]) -> str:
    """One Markdown table for each result, under a line that says where and when it was measured."""
    parts = []
    for result in results:
        lines = [cells(row) for row in result["rows"]]
        columns = [i for i in range(len(HEADER)) if any(line[i] for line in lines)]
        versions = result["versions"]
        known = ", ".join(f"{name} {versions[name]}" for name in TABLE_VERSIONS if name in versions)
        settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
        parts.append(
            f"{result['device']}; {known}; commit {result['commit'][:10]}, {result['date'][:10]}; {settings}.\n\n"
            + "\n".join(
                "| " + " | ".join(line[i].replace("|", "\\|") for i in columns) + " |"
                for line in [HEADER, ["---", "---:", "---:", "---", "---"], *lines]
            )
        )
    return "\n\n".join(parts) + "\n"


def headline(results_dir: Path) -> str:
    """A Markdown table of the rows that headline.toml names, each beside its peer in the same result.

    Args:
        results_dir: holds the JSON files; the newest whose name starts with a row's `result` is read.

    Raises:
        FileNotFoundError: there is no such result.
        KeyError: a result has no row of a name.
    """
    lines = ["| measured | hgrn2 | peer | ratio |", "| --- | ---: | ---: | ---: |"]
    for entry in tomllib.loads(HEADLINE_FILE.read_text(encoding="utf-8"))["row"]:
        files = sorted(results_dir.glob(f"{entry['result']}*.json"))
        if not files:
            raise FileNotFoundError(f"no {entry['result']}*.json in {results_dir} for {HEADLINE_FILE.name}")
        rows = {row["name"]: row for row in json.loads(files[-1].read_text(encoding="utf-8"))["rows"]}
        ours, peer = rows[entry["ours"]], rows[entry["peer"]]
        ratio = ours["value"] / peer["value"] if ours["unit"] in RATE_UNITS else peer["value"] / ours["value"]
        lines.append(f"| {entry['what']} | {cells(ours)[1]} | {entry['peer_name']}: {cells(peer)[1]} | {ratio:.2f}x |")
    return "\n".join(lines) + "\n"


def redraw(text: str, results_dir: Path) -> str:
    """The text with every marked table drawn anew.

    Args:
        text: of a Markdown file.
        results_dir: holds the JSON files.

    Raises:
        FileNotFoundError: a marked table has no results.
    """

    def draw(match: re.Match[str]) -> str:
        files = sorted(results_dir.glob(f"{match['name']}*.json"))
        if not files:
            raise FileNotFoundError(f"no {match['name']}*.json in {results_dir} for the table {match['name']!r}")
        results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return f"{match['open']}\n{table(results)}\n{match['close']}"

    text = MARKERS.sub(draw, text)
    return HEADLINE_MARKERS.sub(lambda match: f"{match['open']}\n{headline(results_dir)}\n{match['close']}", text)


def main() -> int:
    """Redraws, or checks, the tables of the given files."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "README.md"])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is not up to date")
    options = parser.parse_args()
    stale = []
    for file in options.files:
        try:
            old = file.read_text(encoding="utf-8")
            new = redraw(old, options.results)
        except (OSError, json.JSONDecodeError, KeyError) as error:
            print(f"error: {file}: {error}", file=sys.stderr)
            return 2
        if new != old:
            stale.append(file)
            if not options.check:
                partial = file.with_name(file.name + ".partial")
                partial.write_text(new, encoding="utf-8")
                partial.replace(file)
    for file in stale:
        print(f"{file}: {'out of date' if options.check else 'redrawn'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
