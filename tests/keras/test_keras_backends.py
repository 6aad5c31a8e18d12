"""Every backend of Keras in a process of its own: Keras reads KERAS_BACKEND when it is imported.

The tests are the files of the folder `backend`, which is not collected here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "torch", "jax")


def run(backend: str, *arguments: object, **variables: str) -> str:
    """Run Python with a backend; return what it printed, and fail with that if it fails."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE / "backend")]),
        **variables,
    }
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert not result.returncode, f"{result.stdout[-20_000:]}\n{result.stderr[-5000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where each backend leaves a trained model and what it predicts."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend(backend: str, files: Path) -> None:
    suites = sorted((HERE / "backend").glob("check_*.py"))
    # Keras converts tensors to NumPy in a way that NumPy deprecates.
    ignored = "ignore:__array__ implementation:DeprecationWarning"
    printed = run(
        backend, "-m", "pytest", "-q", "-x", "-W", ignored, *suites, FUSEBN_MODELS=str(files)
    )
    assert re.search(r"\d+ passed", printed)
    assert not re.search(r"\d+ (skipped|deselected|xfailed)", printed), printed


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_backend_predicts_the_same(backend: str, files: Path) -> None:
    printed = run(backend, HERE / "backend" / "predict.py", files)
    assert printed.split() == sorted(BACKENDS)


def test_replicas_of_tensorflow() -> None:
    assert "same as one" in run("tensorflow", HERE / "backend" / "replicas_tensorflow.py")


def test_processes_of_torch(tmp_path: Path) -> None:
    assert "same as one" in run("torch", HERE / "backend" / "replicas_torch.py", tmp_path)


def test_devices_of_jax() -> None:
    flags = "--xla_force_host_platform_device_count=8"
    printed = run("jax", HERE / "backend" / "replicas_jax.py", XLA_FLAGS=flags)
    assert "same as one" in printed


def test_without_keras() -> None:
    script = "import sys; sys.modules['keras'] = None; import fusebn.keras"
    with pytest.raises(AssertionError, match=r"pip install 'fusebn\[keras\]'"):
        run("tensorflow", "-c", script)
