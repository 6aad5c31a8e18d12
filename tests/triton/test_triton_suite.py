"""PyTorch's suite with the kernels of a GPU behind it, interpreted: a part of it, for the time.

The whole is `pytest tests/torch --device interpreter`.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "torch"
# Each road into the kernels once or more: functions, modules, derivatives, compilers, transforms.
SELECTED = {
    "test_functional.py": "test_as_pytorch and float32 and contiguous",
    "test_modules.py": "test_frozen or test_functional_call or test_checkpoints_within",
    "test_ops.py": "test_compiled_functions or test_func_grad or test_what_a_mode_sees",
}


def test_a_part_of_pytorchs_suite():
    for name, expression in SELECTED.items():
        run = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                TESTS / name, "--device", "interpreter", "-k", expression,
            ],
            env={**os.environ, "PYTEST_ADDOPTS": ""},
            capture_output=True,
            text=True,
            timeout=280,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-4000:]
