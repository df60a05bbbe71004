"""fla as installed. It takes our model type and brings forty more, so it is not imported while tests are collected."""

import importlib.util
import platform
import sys
import warnings
from types import SimpleNamespace

import pytest


def import_fla():
    """Its configuration, its model and the module of its attention; "hgrn2" is ours again afterwards."""
    if importlib.util.find_spec("fla") is None:
        missing = "flash-linear-attention is not installed: pip install 'hgrn2[dev]'"
        # where the extra is installed but fla is missing, a skip could be taken for a pass
        has_extra = importlib.util.find_spec("importlinter") is not None
        if has_extra and (platform.system(), platform.machine()) == ("Linux", "x86_64"):
            pytest.fail(missing)
        pytest.skip(missing)
    with warnings.catch_warnings():
        # it says on import that it has no GPU
        warnings.simplefilter("ignore")
        from fla.layers import attn  # pyright: ignore[reportMissingImports]
        from fla.models import hgrn2 as model  # pyright: ignore[reportMissingImports]
    if "hgrn2.hf" in sys.modules:
        sys.modules["hgrn2.hf"].register()
    return SimpleNamespace(attn=attn, model=model, Config=model.HGRN2Config, ForCausalLM=model.HGRN2ForCausalLM)
