"""The report's sections. Each function returns HTML, or an empty string if there is nothing to show."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2.quantities import plural
from hgrn2.train.curves import Record, thin
from hgrn2.train.hints import compressor_caveat, generate_command, program, resume_command
from hgrn2.train.report.facts import RunFacts, figure
from hgrn2.train.report.figures import gate_figures, loss_figures, metric_figure, small_figures
from hgrn2.train.report.parts import code, details, pairs, section, table
from hgrn2.train.report.words import compact, duration, number, rich, size
from hgrn2.train.settings import FLAT_DEFAULTS

_MAX_SAMPLES, _MAX_SAMPLE_CHARACTERS = 8, 1500
_MOST_ROWS, _MAX_EVENTS = 60, 40


def summary(facts: RunFacts) -> str:
    """Return one sentence about the run and its key figures."""
    tiles = []
    if facts.measured:
        newest = facts.measured[-1]
        shown = [(found, value) for found in facts.task.figures if (value := figure(newest, found.key)) is not None]
        tiles += [(found.label, format(value, found.style), found.note) for found, value in shown]
        # without the most telling figure, the loss has to do
        if not facts.task.figures or figure(newest, facts.task.figures[0].key) is None:
            tiles.append(("validation loss", f"{newest['val_loss']:.4f}", "nats per target"))
    last = facts.last
    if last is not None:
        tiles.append(("read", compact(last["tokens"]), f"{facts.task.counted}, {plural(last['step'], 'step')}"))
        tiles.append(("time", duration(last["elapsed_s"]), _status(facts)))
    if (speed := facts.tokens_per_s) is not None:
        tiles.append(("speed", compact(speed), f"{facts.task.counted} per second"))
    cells = "".join(
        f"<div><dt>{rich(name)}</dt><dd><b>{rich(value)}</b> <span>{rich(note)}</span></dd></div>"
        for name, value, note in tiles
    )
    return f'<p class="lead">{_sentence(facts)}</p>\n' + (f'<dl class="tiles">{cells}</dl>\n' if cells else "")


def _sentence(facts: RunFacts) -> str:
    model = facts.section("model")
    words = [facts.task.model]
    if facts.num_parameters is not None:
        words.append(f"of {_in_words(facts.num_parameters)} parameters")
    layers, width = model.get("num_hidden_layers"), model.get("hidden_size")
    if isinstance(layers, int) and isinstance(width, int):
        words.append(f"({plural(layers, 'layer')} of width {width:,})")
    last = facts.last
    if last is None:
        return rich(" ".join(words)) + ". No training step is recorded yet."
    words.append(f"that has read {_in_words(last['tokens'])} {facts.task.counted}")
    names = facts.section("data").get("data")
    if isinstance(names, list) and names:
        words.append(
            "of " + ", ".join(Path(str(n)).name or str(n) for n in names[:3]) + (" and more" if len(names) > 3 else "")
        )
    words.append(f"in {duration(last['elapsed_s'])}")
    device = facts.starts[-1].get("device") if facts.starts else None
    if isinstance(device, str):
        words.append("on a CPU" if device == "cpu" else f"on {device}")
    return rich(" ".join(words)) + "."


def _in_words(count: float) -> str:
    for factor, noun in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= factor * 0.9995:
            return f"{count / factor:.3g} {noun}"
    return f"{count:,.0f}"


def _status(facts: RunFacts) -> str:
    progress = facts.progress
    if progress is None:
        return "so far"
    return "finished" if progress >= 1 else f"{progress:.0%} of the budget used"


def learning(facts: RunFacts) -> str:
    """Return the loss curves, an explanation and a table of validations."""
    if not facts.train:
        return section("loss", "Loss", "<p>No step with a finite loss is recorded.</p>") if facts.steps else ""
    each, data = facts.task.unit.removeprefix("nats per "), "text" if facts.reads_text else "data"
    answer = "token" if facts.reads_text else "answer"
    notes = [
        f"Loss is the mean of -log p over {each}s, where p is the probability that the model gave to the actual "
        f"{answer}; lower is better. The pale band shows every step, the line a moving average, and the dots the loss "
        f"on held-out {data}, which is never used for training."
    ]
    newest = facts.measured[-1] if facts.measured else {}
    tokens, num_bytes = figure(newest, "val_tokens"), figure(newest, "val_text_bytes")
    if figure(newest, "val_bits_per_byte") is not None and tokens and num_bytes:
        notes.append(
            "The right-hand scale shows the same loss in bits per byte of the held-out text "
            f"({plural(int(tokens), 'token')}, {size(num_bytes)}), which is comparable between tokenizers."
        )
    if facts.compressors:
        notes.append(_caveat(facts))
    figures = f'<div class="pair">{"".join([*metric_figure(facts), *loss_figures(facts)])}</div>'
    text = "".join(f"<p>{note}</p>" for note in notes)
    return section("loss", "Loss", f'{figures}\n<div class="note">{text}</div>\n{_validation_table(facts)}')


def _caveat(facts: RunFacts) -> str:
    rates = " and ".join(f"{rich(name)} {bits:.3f}" for name, bits in facts.compressors.items())
    caveat = compressor_caveat(facts.num_training_bytes, facts.num_parameters)
    return f"Bits per byte of compressors on the same held-out bytes: {rates}. {rich(caveat)}"


def _validation_table(facts: RunFacts) -> str:
    if not facts.validation:
        return ""
    chosen = [facts.validation[i] for i in thin(len(facts.validation), _MOST_ROWS)]
    figures = [found for found in reversed(facts.task.figures) if any(found.key in r for r in chosen)]
    head = ["step", facts.task.counted, "time", "loss (nats)", *(found.label for found in figures)]
    rows = []
    for r in chosen:
        cells = [f"{r['step']:,}", f"{r['tokens']:,}", duration(r["elapsed_s"]), number(r["val_loss"], ",.4f")]
        cells += [number(r.get(found.key), found.table_style) for found in figures]
        rows.append(cells)
    note = "" if len(chosen) == len(facts.validation) else f", {len(chosen)} of {len(facts.validation)}"
    return details(f"Validations as numbers{note}", table(head, rows))


def samples(facts: RunFacts) -> str:
    """Return text samples from the course of training."""
    if not facts.samples:
        return ""
    prompt = facts.section("train").get("sample_prompt")
    prompt = prompt if isinstance(prompt, str) else ""
    chosen = [facts.samples[i] for i in thin(len(facts.samples), _MAX_SAMPLES)]
    cards = []
    for record in chosen:
        text = record["text"]
        cut = len(text) > _MAX_SAMPLE_CHARACTERS
        text = text[:_MAX_SAMPLE_CHARACTERS]
        given = prompt if prompt and text.startswith(prompt) else ""
        body = (f"<mark>{rich(given)}</mark>" if given else "") + rich(text[len(given) :]) + ("…" if cut else "")
        tokens = record.get("tokens")
        when = f"step {record['step']:,}" + (f", {compact(tokens)} tokens" if isinstance(tokens, int) else "")
        cards.append(
            f'<figure class="sample"><figcaption>{when}</figcaption><pre tabindex="0" dir="ltr">{body}</pre></figure>'
        )
    note = "Text that the model generated during training, from the first to the last sample" + (
        f" ({len(chosen)} of {len(facts.samples)} samples)." if len(chosen) < len(facts.samples) else "."
    )
    note += " The highlighted start is the prompt." if prompt else ""
    return section("samples", "Samples", f'<p class="note">{note}</p>\n<div class="samples">{"".join(cards)}</div>')


def memory(facts: RunFacts) -> str:
    """Return figures and a table about the gates of each layer."""
    gates = facts.gates
    if gates is None:
        return ""
    note = (
        "Each layer multiplies its state by a forget gate at every token: near 1 it keeps the state, near 0 it erases "
        f"it. Measured on {plural(int(gates.num_tokens), 'token')} of held-out text. Every row is one layer. "
        "The dot is the median channel, the dark bar the middle half of the channels, the pale bar the middle "
        "90 %."
    )
    head = ["layer", "lower bound", "half-life (tokens)", "half-life, 5 to 95 % of channels", "norm of the state"]
    rows = []
    for index, layer in enumerate(gates.layer):
        low, middle, high = _quantiles(gates.half_life_tokens[index])
        bound = _quantiles(gates.lower_bound[index])[1]
        rows.append([str(int(layer)), f"{bound:.3f}", compact(middle), f"{compact(low)} to {compact(high)}",
                     f"{float(gates.state_norm[index]):.3g}"])  # fmt: skip
    body = f'<p class="note">{note}</p>\n<div class="pair">{"".join(gate_figures(gates))}</div>\n'
    return section("memory", "What the layers remember", body + details("Layers as numbers", table(head, rows)))


def _quantiles(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)


def running(facts: RunFacts) -> str:
    """Return speed, memory, learning rate and gradient norm."""
    if not facts.train:
        return ""
    found: list[tuple[str, str]] = []
    if (speed := facts.tokens_per_s) is not None:
        found.append(("speed while training", f"{speed:,.0f} {facts.task.counted} per second"))
    if peak := facts.memory_bytes:
        found.append(("peak memory", f"{peak / 2**30:.2f} GiB"))
    skipped = len(facts.steps) - len(facts.train)
    found.append(("skipped steps", f"{skipped:,}" + (" (loss or gradient not finite)" if skipped else "")))
    about = facts.starts[-1] if facts.starts else {}
    names = {"device": "device", "num_threads": "threads", "torch": "torch", "hgrn2": "hgrn2"}
    found += [(name, str(about[key])) for key, name in names.items() if key in about]
    figures = f'<div class="triple">{"".join(small_figures(facts))}</div>'
    return section("speed", "Speed and optimizer", f"{figures}\n{pairs(found)}")


def data(facts: RunFacts) -> str:
    """Return the size and sources of the data."""
    kept, sizes = facts.section("data"), facts.data
    rows = []
    for side, title in (("train", "training"), ("validation", "held out")):
        documents, num_bytes, tokens = (figure(sizes.get(side), k) for k in ("documents", "text_bytes", "tokens"))
        if documents is not None and num_bytes is not None and tokens:
            rows.append([title, f"{documents:,}", size(num_bytes), f"{tokens:,}", f"{num_bytes / tokens:.2f}"])
    body = table(["", "documents", "text", "tokens", "bytes per token"], rows) if rows else ""
    if facts.last is not None and (tokens := figure(sizes.get("train"), "tokens")):
        share = facts.last["tokens"] / tokens
        passes = f"{share:.0%} of the training text" if share < 1 else f"{share:.1f} times the training text"
        body += f'<p class="note">The run has read {passes}.</p>'
    found: list[tuple[str, Any]] = [("text", _names(kept.get("data")))]
    found.append(("held-out text", _names(kept.get("validation"))))
    found.append(("tokenizer", kept.get("tokenizer")))
    if (vocab_size := figure(sizes, "vocab_size")) is not None:
        found.append(("vocabulary", plural(int(vocab_size), "token")))
    found.append(("files skipped", _counts(sizes.get("skipped"))))
    found.append(("prepared tokens", kept.get("prepared")))
    body += pairs((name, value) for name, value in found if value)
    return section("data", "Data", body) if body else ""


def _names(found: Any) -> str:
    return ", ".join(map(str, found)) if isinstance(found, list) else ""


def _counts(found: Any) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in found.items()) if isinstance(found, dict) else ""


def settings(facts: RunFacts) -> str:
    """Return the configuration: changed settings first, then the defaults."""
    blocks = []
    defaults = FLAT_DEFAULTS
    train = facts.section("train")
    task = facts.section("task")
    chosen = {k: v for k, v in train.items() if k not in defaults or defaults[k] != v}
    rest = {k: v for k, v in train.items() if k not in chosen}
    if facts.section("model"):
        blocks.append(f"<h3>Model</h3>{pairs(facts.section('model').items())}")
    if task:
        options = task.get("options")
        shown = options.items() if isinstance(options, dict) else []
        blocks.append(f"<h3>Task</h3>{pairs([('name', task.get('name')), *shown])}")
    if chosen:
        blocks.append(f"<h3>Training, where it differs from the defaults</h3>{pairs(chosen.items())}")
    if rest:
        blocks.append(details("Training settings left at their defaults", pairs(rest.items())))
    return section("settings", "Settings", "\n".join(blocks)) if blocks else ""


def events(facts: RunFacts) -> str:
    """Return a list of events: starts, skipped steps, unfreezing, the best validation, the end."""
    events: list[tuple[int, str]] = []
    before: Record | None = None
    for record in facts.starts:
        what = "started" if record["step"] == 0 else "resumed"
        where = ", ".join(
            f"{k} {record[n]}" for k, n in (("device", "device"), ("threads", "num_threads")) if n in record
        )
        changed = [k for k in ("torch", "hgrn2") if before is not None and before.get(k) != record.get(k)]
        where += "".join(f", {k} now {record.get(k)}" for k in changed)
        events.append((record["step"], f"{what} ({where})" if where else what))
        before = record
    skipped = [r["step"] for r in facts.steps if r["loss"] is None]
    for first, last in _runs(skipped):
        how_many = "skipped" if first == last else f"to {last:,} skipped"
        events.append((first, f"{how_many}: loss or gradient not finite"))
    events += [(r["step"], "frozen weights unfrozen") for r in facts.records if r["kind"] == "unfreeze"]
    events += [(r["step"], "validation not finite") for r in facts.validation if r["val_loss"] is None]
    if facts.measured:
        metric, sign = facts.metric, -1 if facts.metric.higher_is_better else 1
        found = [r for r in facts.measured if figure(r, metric.name) is not None]
        if found:
            best = min(found, key=lambda r: sign * r[metric.name])
            unit = facts.task.unit if metric.name == "val_loss" else metric.name
            events.append((best["step"], f"best validation, {best[metric.name]:.4f} {unit}"))
    if facts.last is not None and facts.progress is not None and facts.progress >= 1:
        events.append((facts.last["step"], "budget used up"))
    events.sort(key=lambda event: event[0])
    note = ""
    if len(events) > _MAX_EVENTS:
        note = f'<p class="note">The first and last of {len(events):,} events.</p>'
        events = events[: _MAX_EVENTS // 2] + events[-(_MAX_EVENTS // 2) :]
    items = "".join(f"<li><b>step {step:,}</b> {rich(text)}</li>" for step, text in events)
    return section("events", "Events", f'{note}<ol class="events">{items}</ol>') if events else ""


def _runs(steps: list[int]) -> list[tuple[int, int]]:
    """Return the first and last step of each run of consecutive steps."""
    found: list[tuple[int, int]] = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step, step))
    return found


def next_steps(facts: RunFacts) -> str:
    """Return commands for the next steps, for copying."""
    run, prompt, is_finished = facts.run_dir, facts.prompt, facts.progress == 1.0
    word, place = program(), shlex.quote(str(run))
    going_on = "Continue training" if is_finished else "Finish the run"
    opening = facts.task.opening
    commands = [
        (going_on, resume_command(run, facts.section("train"), is_finished)),
        *([("Convert it for transformers", f"{word} convert {place} converted --to hf")] if opening is None else []),
        ("Regenerate this page", f"{word} plot {place}"),
    ]
    if opening is not None:
        python = opening.replace("{run}", str(run))
    elif facts.reads_text:
        commands.insert(0, ("Generate text", generate_command(run, prompt)))
        commands.insert(2, ("Evaluate on another text", f"{word} eval {place} book.txt"))
        python = (
            "import hgrn2\n\n"
            f"loaded = hgrn2.load({str(run)!r})\n"
            f"print(loaded.write({prompt!r}, 100, hgrn2.Sampling(temperature=0.7, seed=1)))"
        )
    else:
        commands.insert(0, ("Show the model's sizes", f"{word} info {place}"))
        python = f"from hgrn2 import HGRN2LM\n\nmodel = HGRN2LM.load({str(run)!r})"
    items = "".join(f"<dt>{title}</dt><dd>{code(text)}</dd>" for title, text in [*commands, ("From Python", python)])
    return section("next", "Next steps", f'<dl class="commands">{items}</dl>')
