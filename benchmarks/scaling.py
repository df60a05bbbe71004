"""Print on paper how training would scale: operations from `hgrn2.models.cost`, bytes sent, the rate of one GPU.

Nothing is timed here. A step takes the time of its operations at the rate of one GPU, and of the bytes that do
not hide behind the backward pass:

- data parallel: gradients once around, 4 bytes a parameter, behind the backward pass;
- shard: weights gathered in bfloat16 before both passes, gradients scattered in float32, each behind its pass;
- context parallel: for each layer, states and decays of all pieces, in both directions, which nothing hides; and the
  state of a piece is computed once more.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse

from hgrn2.models import HGRN2Config, presets
from hgrn2.models.cost import Cost, cost
from hgrn2.models.memory import memory_plans

SIZES = {
    "1.3b": presets.b1_3(),
    "2.7b": presets.b2_7(),
    "7b": presets.variant("fla", vocab_size=32000, hidden_size=4096, num_hidden_layers=32, intermediate_size=11008),
}
# of one direction of a GPU's links: NVLink within a machine of eight, the network beyond it
NVLINK_BYTES_S, NETWORK_BYTES_S = 400e9, 45e9
BACKWARD_SHARE = 2 / 3


def sent_once_around(num_bytes: float, num_gpus: int) -> float:
    """Return the seconds that a ring takes to gather, or to scatter, so many bytes."""
    rate = NVLINK_BYTES_S if num_gpus <= 8 else NETWORK_BYTES_S
    return num_bytes * (num_gpus - 1) / num_gpus / rate


def step_s(found: Cost, tokens: int, num_gpus: int, flops_s: float, is_sharded: bool) -> float:
    """Return the seconds of a step with some tokens on each GPU."""
    compute = tokens * found.flops_per_token_training / flops_s
    forward, backward = compute * (1 - BACKWARD_SHARE), compute * BACKWARD_SHARE
    if not is_sharded:
        return forward + max(backward, 2 * sent_once_around(4 * found.parameters, num_gpus))
    gathered, scattered = (sent_once_around(size * found.parameters, num_gpus) for size in (2, 4))
    return max(forward, gathered) + max(backward, gathered + scattered)


def join_s(config: HGRN2Config, num_gpus: int) -> float:
    """Return the seconds in which the pieces of a sequence exchange states, forward and backward."""
    state = 4 * config.hidden_size * (config.expand_ratio or 128)
    return 2 * config.num_hidden_layers * num_gpus * sent_once_around(state, num_gpus)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens-per-s", type=float, required=True, help="of one GPU with the 1.3b preset")
    rate = parser.parse_args().tokens_per_s
    flops_s = rate * cost(SIZES["1.3b"]).flops_per_token_training
    print(f"on paper: {flops_s / 1e12:.0f} TFLOP/s a GPU, from {rate:,.0f} tokens/s at 1.3B; 8 x 2,048 tokens a GPU\n")
    print("| model | GPUs | data parallel | `--shard` | GiB a GPU with `--shard` |\n| --- | --- | --- | --- | --- |")
    for name, config in SIZES.items():
        found = cost(config)
        for num_gpus in (2, 8, 64):
            tokens = 8 * 2048
            times = [step_s(found, tokens, num_gpus, flops_s, is_sharded) for is_sharded in (False, True)]
            plan = next(p for p in memory_plans(config, num_gpus, tokens * num_gpus, 2048) if p.settings == "--shard")
            shown = " | ".join(f"{tokens * num_gpus / seconds:,.0f} tokens/s" for seconds in times)
            print(f"| {name} | {num_gpus} | {shown} | {plan.total / 2**30:.0f} |")
    print("\none sequence of 1,048,576 tokens, activations recomputed, weights split")
    print("| model | GPUs | operations | exchange of states | GiB a GPU |\n| --- | --- | --- | --- | --- |")
    for name, config in SIZES.items():
        for num_gpus in (2, 8):
            compute = 2**20 / num_gpus * cost(config).flops_per_token_training / flops_s
            plan = memory_plans(config, num_gpus, 2**20, 2**20)[-1]
            joins = f"{1e3 * join_s(config, num_gpus):.1f} ms"
            print(f"| {name} | {num_gpus} | {compute:.1f} s | {joins} | {plan.total / 2**30:.0f} |")


if __name__ == "__main__":
    main()
