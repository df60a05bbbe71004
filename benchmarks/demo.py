"""What `make demo` reached: bits a byte of its model on the held-out text, beside compressors on the same bytes.

make demo && python benchmarks/demo.py runs/demo --out benchmarks/results/demo-cpu.json
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from pathlib import Path

import environment  # noqa: F401  (before torch)
from report import Row, arguments, report

from hgrn2.data.prepare import PreparedData


def main() -> int:
    """Reads a finished run; nothing is trained here."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    options = parser.parse_args()
    config = json.loads((options.run / "config.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [record for record in records if record["kind"] == "validation"][-1]
    held_out = (data := PreparedData.open(config["data"]["prepared"])).validation
    text = data.tokenizer.decode(held_out.tokens(0, held_out.num_tokens)).encode("utf-8")
    if last["val_text_bytes"] != len(text):
        parser.error(f"the run was validated on {last['val_text_bytes']:,} of {len(text):,} held-out bytes")
    rows = [
        Row("the demo's model", last["val_bits_per_byte"], "bits/byte"),
        Row("gzip -9", 8 * len(gzip.compress(text, 9)) / len(text), "bits/byte"),
        Row("xz -9", 8 * len(lzma.compress(text, preset=9)) / len(text), "bits/byte"),
        Row("training", last["elapsed_s"], "s", note=f"{last['step']} steps, {last['tokens']:,} tokens"),
    ]
    report("demo", {"held-out bytes": len(text)}, rows, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
