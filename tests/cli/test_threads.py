"""Torch's threads spin little beside other work: the console sets it before torch is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from llmsqueeze.cli.threads import spin_little

# a verb that does nothing but import torch
CONSOLE = """
import sys
from llmsqueeze.cli import app
assert "torch" not in sys.modules
app.app = lambda: __import__("torch")
app.main()
"""


def seen_by_openmp(**given: str) -> str:
    """The spin count that the runtime shows when it is loaded, under these settings of the user."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | given
    done = subprocess.run(
        [sys.executable, "-c", CONSOLE], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    shown = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    return shown[1] if shown else pytest.skip("torch comes with another OpenMP runtime than GNU's")


@pytest.mark.thorough
def test_the_console_tells_openmp_before_torch_loads_it() -> None:
    assert seen_by_openmp() == "1000"


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_has_set_stays(given: dict[str, str]) -> None:
    environment = dict(given)
    spin_little(environment)
    assert environment == given


def test_the_library_leaves_the_environment_alone() -> None:
    code = (
        "import os; before = dict(os.environ); import llmsqueeze, llmsqueeze.cli.app; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
