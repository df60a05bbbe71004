"""Decoding: the engine beside the plain `step` loop and peers, with random weights.

python benchmarks/decode.py --size 11m --out benchmarks/results/decode-cpu.json
python benchmarks/decode.py --device cuda --size 1.3b --batches 1,64,256 --out benchmarks/results/decode-h200.json

A round is several steps of every candidate, one after another. "position 100,000" starts from a random state, as no
other part of the work depends on the position. Greedy; every step includes the choice of the tokens and their way to
the host. Peers decode with a cache of keys and values of the position named.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import environment  # noqa: F401  (before torch)
import torch
from report import Row, arguments, compare, report, row

from hgrn2.models import HGRN2LM, HGRN2Config, ModelState
from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling, Session

# vocabulary, width, layers, width of the channel mixer, width of a head
SIZES = {
    "nano": (101, 64, 2, 176, 32),
    "11m": (4096, 384, 6, 1024, 128),
    "150m": (50272, 768, 16, 2048, 128),
    "1.3b": (32000, 2048, 24, 5632, 128),
}
GREEDY = RequestSampling(temperature=0)


def make_model(size: str, device: str, dtype: torch.dtype) -> HGRN2LM:
    """HGRN2 with random weights."""
    vocab_size, width, layers, intermediate, head = SIZES[size]
    config = HGRN2Config(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, intermediate_size=intermediate,
        expand_ratio=head,
    )  # fmt: skip
    with torch.device(device):
        return HGRN2LM(config).to(dtype).eval()


def random_session(model: HGRN2LM, engine: Engine) -> Session:
    """A session whose state is random, as after a long text."""
    layers = []
    for specs in model.state_spec():
        shapes = {name: (1, *spec.shape) for name, spec in specs.items()}
        layers.append({name: torch.randn(shape) for name, shape in shapes.items()})
    return Session((1, 2), 1, ModelState(tuple(layers)), engine.fingerprint)


def engine_steps(engine: Engine, batch: int, prompt: int | None, model: HGRN2LM) -> Callable[[], None]:
    """Start a batch in the engine and return a function that decodes one token of each."""
    for number in list(range(batch)):
        if prompt is None:
            engine.submit(Request((), 10**6, GREEDY), random_session(model, engine))
        else:
            tokens = [(7 * number + i) % model.config.vocab_size for i in range(prompt)]
            engine.submit(Request(tokens, 10**6, GREEDY))
    while engine.num_waiting:
        engine.step()

    def step() -> None:
        engine.step()

    return step


def plain_steps(model: HGRN2LM, batch: int, device: str) -> Callable[[], None]:
    """The loop over `HGRN2LM.step` that anybody would write."""
    ids = torch.zeros(batch, dtype=torch.long, device=device)
    kept = [ids, model.init_state(batch)]

    @torch.no_grad()
    def step() -> None:
        logits, kept[1] = model.step(kept[0], kept[1])
        kept[0] = logits.argmax(-1)
        kept[0].tolist()

    return step


def peer_steps(name: str, size: str, batch: int, position: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Decode one token of each row with a peer, after a prompt of `position` tokens."""
    model = make_peer(name, size, position, device, dtype)
    ids = torch.randint(100, (batch, position), device=device)
    key = "cache_params" if name == "Mamba" else "past_key_values"
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
    kept = [out.logits[:, -1:].argmax(-1), out[key], position]

    @torch.no_grad()
    def step() -> None:
        more = {"cache_position": torch.tensor([kept[2]], device=device)} if name == "Mamba" else {}
        out = model(input_ids=kept[0], use_cache=True, **{key: kept[1]}, **more)
        kept[0], kept[1], kept[2] = out.logits[:, -1:].argmax(-1), out[key], kept[2] + 1
        kept[0].tolist()

    return step


def make_peer(name: str, size: str, position: int, device: str, dtype: torch.dtype) -> Any:
    """A peer of about the same size with random weights."""
    vocab_size, width, layers, intermediate, head = SIZES[size]
    common: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": width}
    if name == "Llama":
        from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

        heads = max(1, width // (128 if width >= 2048 else 64))
        more: dict[str, Any] = {"attn_implementation": "sdpa", "max_position_embeddings": position + 4096}
        config: Any = LlamaConfig(
            **common, **more, num_hidden_layers=layers, intermediate_size=intermediate, num_attention_heads=heads
        )
        kind: Any = LlamaForCausalLM
    elif name == "Mamba":
        from transformers import MambaConfig, MambaForCausalLM  # pyright: ignore[reportMissingImports]

        # two layers of Mamba have the parameters of one with a channel mixer
        config, kind = MambaConfig(**common, num_hidden_layers=2 * layers), MambaForCausalLM
    else:
        from fla.models import HGRN2Config as FlaConfig  # pyright: ignore[reportMissingImports]
        from fla.models import HGRN2ForCausalLM  # pyright: ignore[reportMissingImports]

        config = FlaConfig(**common, num_hidden_layers=layers, intermediate_size=intermediate, expand_ratio=head)
        kind = HGRN2ForCausalLM
    with torch.device(device):
        return kind(config).to(dtype).eval()


def measure(
    candidates: dict[str, Callable[[], None]], rounds: int, seconds: float, device: str
) -> dict[str, list[float]]:
    """Seconds of one step of each candidate, a mean over some steps in each round."""

    def timed(step: Callable[[], None], steps: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _wait(device)
        return (time.perf_counter() - start) / steps

    counts = {}
    for name, step in candidates.items():
        timed(step, 3)
        counts[name] = max(3, round(seconds / timed(step, 3)))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        order = list(candidates) if i % 2 == 0 else list(candidates)[::-1]
        for name in order:
            found[name].append(timed(candidates[name], counts[name]))
    return found


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize(device)


def profile_step(step: Callable[[], None], title: str, steps: int = 10) -> None:
    """Print the kernels of a decode step on a GPU, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in found.events() or []:
        if event.device_type.name == "CUDA":
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    total = sum(map(sum, times.values())) / steps / 1e3
    print(f"{title}: {total:.3f} ms of kernels a step, {sum(map(len, times.values())) / steps:.0f} kernels")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:24]:
        share, count = sum(each) / steps / 1e3, len(each) / steps
        print(f"{share:9.3f} ms {count:7.1f} x {share / count * 1e3:8.2f} us  {name[:110]}")


def prefill_rows(model: HGRN2LM, length: int, device: str, rounds: int) -> list[Row]:
    """Tokens a second of the engine's prefill and of the forward pass as training calls it."""
    budget = min(length, 8192)
    engine = Engine(model, EngineOptions(1, 1, prefill_tokens=budget, cuda_graphs=False))
    tokens = torch.randint(model.config.vocab_size, (length,)).tolist()
    ids = torch.tensor([tokens], device=device)

    def prefill() -> None:
        engine.generate([Request(tokens, 1, GREEDY)])

    @torch.no_grad()
    def forward() -> None:
        model.hidden_states(ids, keep_state=False)

    found = {"prefill": [], "forward pass": []}
    for i in range(rounds + 1):
        for name, call in (("prefill", prefill), ("forward pass", forward)):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if i:
                found[name].append(length / (time.perf_counter() - start))
    rows = [row(f"{name} of {length:,} tokens", values, "tokens/s") for name, values in found.items()]
    compare(rows, rows[0].name, rows[1].name)
    return rows


def batch_rows(args: Any, batch: int, dtype: torch.dtype) -> list[Row]:
    """All candidates at one batch size."""
    model = make_model(args.size, args.device, dtype)
    options = EngineOptions(batch, min(batch, 64))
    candidates: dict[str, Callable[[], None]] = {}
    notes = {}
    candidates["engine, prompt 128"] = engine_steps(Engine(model, options), batch, 128, model)
    if args.profile:
        step = candidates["engine, prompt 128"]
        for _ in range(5):
            step()
        profile_step(step, f"batch {batch}")
    candidates["engine, position 100,000"] = engine_steps(Engine(model, options), batch, None, model)
    if args.device == "cpu" and args.bfloat16:
        own = EngineOptions(batch, min(batch, 64), weights="bfloat16")
        candidates["engine, bf16 weights"] = engine_steps(Engine(model, own), batch, 128, model)
    if args.device == "cpu" and args.deterministic:
        own = EngineOptions(batch, min(batch, 64), deterministic=True)
        candidates["engine, deterministic"] = engine_steps(Engine(model, own), batch, 128, model)
    candidates["HGRN2LM.step"] = plain_steps(model, batch, args.device)
    for name in [] if args.no_peers else (["Llama", "fla"] if args.device != "cpu" else ["Llama", "Mamba"]):
        try:
            steps = peer_steps(name, args.size, batch, args.peer_position, args.device, dtype)
            steps()
        except Exception as error:
            notes[name] = f"does not run here: {type(error).__name__}: {str(error)[:100]}"
            continue
        candidates[f"{name}, position {args.peer_position:,}"] = steps
    found = measure(candidates, args.rounds, args.seconds, args.device)
    rows = [row(f"batch {batch}: {name}", [1000 * s for s in values], "ms") for name, values in found.items()]
    for one in rows:
        one.note = f"{1000 * batch / one.value:,.0f} tokens/s" if one.value else None
    llama = f"batch {batch}: Llama, position {args.peer_position:,}"
    for one in rows:
        compare(rows, one.name, llama if any(r.name == llama for r in rows) else f"batch {batch}: HGRN2LM.step")
    return rows + [Row(f"batch {batch}: {name}", None, "ms", note=note) for name, note in notes.items()]


def main() -> None:
    """Measure what the arguments ask for."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--size", choices=SIZES, default="11m")
    parser.add_argument("--batches", default="1", help="batch sizes, with commas")
    parser.add_argument("--peer-position", type=int, default=1000, help="tokens that a peer has read")
    parser.add_argument("--seconds", type=float, default=0.5, help="time of one candidate in one round")
    parser.add_argument(
        "--prefill", type=int, default=2048, help="tokens of the prompt whose reading is timed; 0: none"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step, on a GPU")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--bfloat16", action="store_true", help="on a CPU: the engine with bf16 weights as well")
    parser.add_argument("--deterministic", action="store_true", help="on a CPU: the deterministic engine as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    rows: list[Row] = []
    for batch in map(int, args.batches.split(",")):
        rows += batch_rows(args, batch, dtype)
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()
    if args.prefill:
        rows += prefill_rows(make_model(args.size, args.device, dtype), args.prefill, args.device, 3)
    settings = {"size": args.size, "dtype": str(dtype).removeprefix("torch.")}
    report("decode", settings, rows, args.device, args.out)


if __name__ == "__main__":
    main()
