"""The environment that the command makes for itself before torch is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hgrn2

# at the end OpenMP's library is there for sure
RUN = "import sys, hgrn2_command; sys.argv = ['hgrn2', 'info', 'tiny']; hgrn2_command.main(); import torch"


def run_in_child(code, **chosen):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    env |= {"PYTHONPATH": str(Path(hgrn2.__file__).parents[1]), "OMP_DISPLAY_ENV": "verbose"} | chosen
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done


def turns(code, **chosen):
    """How many turns a thread waits before it sleeps, as GNU's OpenMP says when it is loaded."""
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run_in_child(code, **chosen).stderr)
    if found is None:
        pytest.skip("torch comes with another OpenMP here, which does not say how long threads wait")
    return int(found[1])


@pytest.mark.slow
def test_waiting_threads_sleep_so_that_two_runs_share_the_cores():
    assert turns(RUN) == 0
    assert turns("import torch") > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "200"}]
)
def test_the_users_own_choice_stays(chosen):
    assert turns(RUN, **chosen) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hgrn2", "hgrn2.data.encode"])
def test_torch_is_imported_by_what_needs_it(name):
    # it takes seconds, in each of as many processes that tokenise as there are cores
    run_in_child(f"import sys, {name}; sys.exit('torch' in sys.modules)")


def test_benchmarks_and_tests_run_as_the_command_does():
    for path in (Path(__file__).resolve().parent.parent / "benchmarks").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import torch" not in text or 0 < text.find("\nimport environment") < text.index("import torch"), path
    assert os.environ.get("OMP_WAIT_POLICY")
