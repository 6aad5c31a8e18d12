"""Whether kernels whose programs wait for each other come back. First here, by its name.

A kernel that hangs takes its process with it, which no time limit within it can end: so it is tried
in a process of its own, and nothing else runs if that has to be killed.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from exercise import HERE, RESIDENT

PATIENCE = 120  # seconds: most of them for the compiler


@pytest.mark.parametrize("name", RESIDENT)
def test_nobody_waits_for_ever(name: str) -> None:
    run = subprocess.Popen(
        [sys.executable, HERE / "exercise.py", "200", name],
        env={**os.environ, "FUSEBN_GPU_PERSISTENT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = run.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        run.kill()
        said, _ = run.communicate()
        pytest.exit(f"a kernel hangs, and would hang every test after this one:\n{said}", 1)
    assert run.returncode == 0, said[-4000:]
    assert said.count("done") == 3, said
