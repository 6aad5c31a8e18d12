"""`fusebn bench --device cuda`: everybody answers rightly, and is captured. Never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def found_by(path: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fusebn", "bench", "--device", "cuda", "--repeats", "2"]
    run = subprocess.run(
        [*command, *options, "--json", str(path)], capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_machine(tmp_path: Path) -> None:
    chip = found_by(tmp_path / "found.json", "--part", "machine")["chip"]
    assert chip["unable"] == {}
    assert all(1e9 < chip[speed] < 1e14 for speed in ("copy", "read", "write"))
    assert all(0 < seconds < 1e-3 for seconds in chip["launches"].values())
    assert len(chip["launches"]) == 4
    assert all(0 < seconds < 1e-3 for seconds in chip["barriers"].values())
    assert str(chip["processors"]) in chip["barriers"]


@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_verbs(dtype: str, layout: str, tmp_path: Path) -> None:
    options = ("--part", "verbs", "--shape", "8x14x14x128", "--dtype", dtype, "--layout", layout)
    records = found_by(tmp_path / "found.json", *options)["records"]
    assert len(records) == 5
    for record in records:
        assert record["wrong"] is None
        # Apex's, where it is installed, refuses what it does not take.
        assert record["refused"].keys() <= {"apex"}
        assert record["notes"] == {}
        runs = {run["who"]: run for run in record["runs"]}
        assert runs.keys() >= {"fusebn", "fusebn-2", "eager", "compile"}
        assert all(run["how"] == "graph" for run in runs.values())
