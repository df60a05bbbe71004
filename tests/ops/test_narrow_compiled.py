"""Where the compiler puts the lanes of the kernels for narrow heads; `hopper.py` compiles every case of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import test_triton

pytestmark = [*test_triton.pytestmark, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
# a process of its own: here Triton interprets
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hgrn2.ops.backends.narrow import kernels

OPTIONS = {"BT": 4, "FLOOR": 0.0, "FLOOR_LOST": 1.0, "Q_ACTIVATION": "silu", "V_ACTIVATION": "none", "REVERSE": False}
FLAGS = {
    "forward_kernel": {"HAS_BEFORE": True, "HAS_AFTER": True, "KEEPS": True},
    "backward_kernel": {"HAS_BEFORE": True, "HAS_AFTER": True},
    "summary_kernel": {"OF_QUERIES": False},
}
WORDS = (("shfl.sync", "bar.sync"), ("ld.global", "st.global"))
ABSENT = {"k_p", "dk_p"}, {"first_p", "sequence_p", "cu_p"}


def compiled(name, heads, k_width, v_width, tied, packed):
    kernel = getattr(kernels, name)
    sizes = {"BH": heads, "BK": k_width, "BV": v_width, "TIED": tied, "HAS_BOUND": tied, "PACKED": packed}
    constants = OPTIONS | FLAGS[name] | sizes
    if tied:
        constants |= dict.fromkeys(ABSENT[0])
    if not packed:
        constants |= dict.fromkeys(ABSENT[1])
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    opaque = {*kernels.OPAQUE, "dy_batch", "dy_row", "dy_head", "scale"}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        low = argument in ("q_p", "v_p", "k_p", "y_p", "dy_p", "dq_p", "dk_p", "dv_p")
        low |= tied and argument in ("f_p", "df_p")
        kind = "*bf16" if low else "*i32" if argument in ABSENT[1] else "*fp32"
        is_number = not argument.endswith("_p")
        signature[argument] = "fp32" if argument == "scale" else "i32" if is_number else kind
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument not in opaque:
            # all that the compiler may know, as of strides that are multiples of 16
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]


for name in FLAGS:
    ptx = compiled(name, 32, 1, 1, True, False)
    exchanges, accesses = (ptx.count(one) + ptx.count(two) for one, two in WORDS)
    print(name, exchanges, accesses, ".v2" in ptx or ".v4" in ptx)
"""


def test_lanes_stay_where_they_are(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    script = tmp_path / "compile.py"
    # Triton reads the source of a kernel from its file
    script.write_text(COMPILE, encoding="utf-8")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) == 3
    for name, exchanges, accesses, is_vector in found:
        assert int(accesses) > 0
        # at K = V = 1 every sum is inside a lane, and heads may be anywhere in memory, whatever the hints of contiguity
        # say
        assert (int(exchanges), is_vector) == (0, "False"), name
