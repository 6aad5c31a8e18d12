"""What the kernels compile to, for GPUs that need not be there: no spills, wide loads, fences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit_and_load_16_bytes_at_once(capability):
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "compiled.py", str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) >= 4
    for kernel in found:
        told = f"{kernel}"
        resident = kernel["kernel"].startswith("resident")
        # What does not fit into registers goes through memory, which is all there is to spend. A
        # kernel that holds the batch may put a few scalars aside.
        assert kernel["stack"] <= (160 if resident else 0), told
        assert kernel["local"] == 0, told
        assert kernel["registers"] <= 255, told
        instructions = kernel["instructions"]
        wide = sum(n for name, n in instructions.items() if "LDG" in name and "128" in name)
        assert wide >= (32 if resident else 6 if kernel["element"] == "fp16" else 8), told
        assert not any("U16" in name for name in instructions), told
        if resident or kernel["kernel"] in ("normalize", "backward"):
            assert any("STG" in name and "128" in name for name in instructions), told
        if resident or kernel["kernel"] in ("moments", "backward_sums"):
            # One program sees what others have stored.
            assert kernel["acquires"], told
            assert kernel["releases"], told
            assert any(name.startswith("ATOM") for name in instructions), told
