import os
import subprocess
import sys
import textwrap
from pathlib import Path

import hgrn2


def test_import_needs_torch_alone():
    code = textwrap.dedent("""
        import sys

        BLOCKED = {
            "numpy", "safetensors", "tokenizers", "rich", "tyro", "matplotlib", "transformers", "triton", "datasets",
            "pyarrow", "zstandard", "huggingface_hub", "tensorboard",
        }

        # importing such a name then fails as if it were not installed
        sys.modules |= dict.fromkeys(BLOCKED)
        import warnings
        warnings.simplefilter("ignore")
        import torch
        import hgrn2
        model = hgrn2.HGRN2LM(hgrn2.presets.tiny(vocab_size=17, hidden_size=64, num_hidden_layers=1))
        loss, count, state = model.loss(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long))
        loss.backward()
        logits, state = model.step(torch.tensor([3]), state)
        print(hgrn2.__version__, tuple(logits.shape))
    """)
    env = os.environ | {"PYTHONPATH": str(Path(hgrn2.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == [hgrn2.__version__, "(1, 17)\n"]


def test_public_names_exist():
    assert all(hasattr(hgrn2, name) for name in hgrn2.__all__)


def test_a_test_that_hangs_is_ended(request):
    assert float(request.config.getini("timeout")) > 0
