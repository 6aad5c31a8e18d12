"""The kernels under compute-sanitizer: memory, races in shared memory, barriers in a program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from exercise import HERE, IN_TWO_LAUNCHES, SMALL

TOOL = shutil.which("compute-sanitizer")


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_nothing_to_report(tool: str) -> None:
    run = subprocess.run(
        [
            TOOL or "", "--tool", tool, "--error-exitcode", "9",
            sys.executable, HERE / "exercise.py", "2", *SMALL, *IN_TWO_LAUNCHES,
        ],
        # Every tensor in an allocation of its own: what lies beside it is not somebody's.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
