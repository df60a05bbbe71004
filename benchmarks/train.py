"""Training speed beside Hugging Face's Llama of the same size: forward, backward and AdamW, in tokens a second.

python benchmarks/train.py --device cpu --out benchmarks/results/train-cpu.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import environment  # noqa: F401  (before torch)
import torch
from report import Row, arguments, compare, interleave, report, row
from torch import Tensor, nn

from hgrn2.models import HGRN2LM, HGRN2Config

# two models of one size: no more apart than this
SIZE_TOLERANCE = 0.03
HGRN2, LLAMA = "HGRN2", "Llama (transformers, sdpa)"
PRECISIONS = {"float32": None, "bf16 autocast": torch.bfloat16}


def make_hgrn2(vocab_size: int, hidden_size: int, num_layers: int, intermediate_size: int, **_: int) -> nn.Module:
    """HGRN2 in fla's variant."""
    config = HGRN2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        intermediate_size=intermediate_size,
        expand_ratio=min(128, hidden_size),
        tie_word_embeddings=True,
    )
    return HGRN2LM(config)


def make_llama(
    vocab_size: int, hidden_size: int, num_layers: int, intermediate_size: int, max_length: int
) -> nn.Module:
    """Llama with heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        intermediate_size=intermediate_size,
        num_attention_heads=max(1, hidden_size // 64),
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def hgrn2_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy of each token after the first."""
    return model.loss(tokens[:, :-1], tokens[:, 1:]).mean  # pyright: ignore[reportCallIssue]


def llama_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss of Llama, which shifts the labels itself, so the last token is given as a label only."""
    return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()).loss


def training_step(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], batch: int, length: int, vocab_size: int,
    dtype: torch.dtype | None, device: str,
) -> Callable[[], None]:  # fmt: skip
    """One step of training on fresh random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    kind = torch.device(device).type

    def step() -> None:
        tokens = torch.randint(vocab_size, (batch, length + 1), device=device)
        with torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None):
            value = loss(model, tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert value.isfinite(), "the loss is not finite"

    return step


def first_loss_is_plausible(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], vocab_size: int, device: str
) -> None:
    """An untrained model guesses: its loss is near ln(vocab), or the step measures something else."""
    with torch.no_grad():
        value = loss(model, torch.randint(vocab_size, (1, 257), device=device)).item()
    wanted = torch.tensor(float(vocab_size)).log().item()
    assert abs(value - wanted) < 0.1 * wanted, f"first loss is {value:.3f}, wanted about ln(vocab) = {wanted:.3f}"


def peak_memory(step: Callable[[], None], device: str) -> str | None:
    """Memory of a step at its peak, in words; None on a CPU, whose process has one peak for all candidates."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB at the peak"


def main() -> int:
    """Runs the benchmark."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(rounds=5)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = options.device
    size = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_layers": options.layers,
        "intermediate_size": options.intermediate_size,
        "max_length": max(options.lengths),
    }
    makers = {HGRN2: (make_hgrn2, hgrn2_loss), LLAMA: (make_llama, llama_loss)}
    models = {name: make(**size).to(device).train() for name, (make, _) in makers.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    apart = abs(counts[HGRN2] / counts[LLAMA] - 1)
    if apart > SIZE_TOLERANCE:
        parser.error(f"the models have {counts} parameters, {apart:.1%} apart; wanted at most {SIZE_TOLERANCE:.0%}")
    for name, model in models.items():
        first_loss_is_plausible(model, makers[name][1], options.vocab_size, device)
        if options.compile:
            model.compile()

    rows = [Row(f"{name}: parameters", count, "parameters") for name, count in counts.items()]
    for length in options.lengths:
        batch = max(1, options.tokens_per_step // length)
        for precision in options.precisions:
            steps, memory = {}, {}
            for name, model in models.items():
                full = f"{name}, T {length}, {precision}"
                dtype = PRECISIONS[precision]
                steps[full] = training_step(model, makers[name][1], batch, length, options.vocab_size, dtype, device)
                memory[full] = peak_memory(steps[full], device)
            for name, seconds in interleave(steps, options.rounds, device).items():
                rows.append(row(name, [batch * length / s for s in seconds], "tokens/s", memory[name]))
            compare(rows, f"{HGRN2}, T {length}, {precision}", f"{LLAMA}, T {length}, {precision}")
    settings = {
        "hidden": options.hidden_size,
        "layers": options.layers,
        "vocabulary": options.vocab_size,
        "tokens a step": options.tokens_per_step,
        "compiled": options.compile,
        "rounds": options.rounds,
    }
    report("train", settings, rows, device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
