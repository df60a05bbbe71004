"""Report the result of `make demo`: bits per byte of its model on the held-out text, and of compressors.

make demo && python benchmarks/demo.py runs/demo --out benchmarks/results/demo-cpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from report import Row, arguments, report

from hgrn2.data.prepared import PreparedData
from hgrn2.train.compressors import compressed_bits
from hgrn2.train.places import from_saved_path


def main() -> int:
    """Reads a finished run; nothing is trained here."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    options = parser.parse_args()
    config = json.loads((options.run / "config.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(record for record in records if record["kind"] == "start")
    last = [record for record in records if record["kind"] == "validation"][-1]
    data = PreparedData.open(from_saved_path(options.run, config["data"]["prepared"], config["data"].get("run_was_at")))
    bits, num_bytes = compressed_bits(data.validation, data.tokenizer)
    if last["val_text_bytes"] != num_bytes:
        parser.error(f"the run was validated on {last['val_text_bytes']:,} of {num_bytes:,} held-out bytes")
    read, size = data.train.num_text_bytes / 1e6, 4 * first["parameters"] / 1e6
    before = f"trained on {read:.1f} MB of text of the same kind; its own {size:.1f} MB are not counted"
    rows = [
        Row("the demo's model", last["val_bits_per_byte"], "bits/byte", note=before),
        *(Row(name, rate, "bits/byte", note="starts from nothing") for name, rate in bits.items()),
        Row("training", last["elapsed_s"], "s", note=f"{last['step']} steps, {last['tokens']:,} tokens"),
    ]
    settings = {"held-out bytes": num_bytes, "held-out files": data.validation.num_documents}
    report("demo", settings, rows, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
