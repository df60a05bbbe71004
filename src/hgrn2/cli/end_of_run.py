"""Print the result of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_end(run: Any) -> None:
    """Print the result of a run and the paths of its pictures and report; the last line is the report's path."""
    from hgrn2.train.hints import generate_command
    from hgrn2.train.report.facts import RunFacts

    result = run.result
    # a run that had already ended has shown a note
    if result.stopped_by is None and (run.pictures or not result.had_ended):
        facts = RunFacts.read(result.run_dir)
        record = result.last_validation
        if record:
            print(_describe_validation(record, result.metric))
        if facts.compressors:
            _show_compressors(facts, record)
        for path in run.pictures:
            print(f"picture  {path}")
        if facts.reads_text:
            print(f"write with it:  {generate_command(result.run_dir, facts.prompt)}")
    if run.report is not None:
        print(f"report   {run.report}")


def _describe_validation(record: Mapping[str, Any], metric: str) -> str:
    if "val_perplexity" not in record:
        other = "" if metric == "val_loss" else f", {metric} {record[metric]:.4f}"
        return f"held-out data: loss {record['val_loss']:.4f}{other}"
    bits, unit = _bits(record), "bits per byte"
    bits = f"{unit} {bits}" if record["val_bits_per_byte"] is None else f"{bits} {unit}"
    perplexity = record["val_perplexity"]
    shown = "infinite" if perplexity is None else f"{perplexity:.2f} per token"
    return f"held-out text: {bits}, perplexity {shown}"


def _bits(record: Mapping[str, Any]) -> str:
    bits = record["val_bits_per_byte"]
    return "n/a (the tokenizer does not keep the whole text)" if bits is None else f"{bits:.3f}"


def _show_compressors(facts: Any, record: dict[str, Any] | None) -> None:
    from hgrn2.train.hints import compressor_caveat

    held_out = facts.compressed_bytes
    print(f"bits per byte on the same {held_out:,} held-out bytes:")
    if record:
        part = record["val_text_bytes"]
        note = "" if part == held_out else f"   (on {part:,} of them; raise --validation-tokens for all)"
        print(f"  this model  {_bits(record)}{note}")
    for name, bits in facts.compressors.items():
        print(f"  {name:<10}  {bits:.3f}")
    print(f"  {compressor_caveat(facts.num_training_bytes, facts.num_parameters)}")
