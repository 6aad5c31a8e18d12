"""Where the tests of PyTorch's tensors run: `pytest tests/torch --device interpreter`.

    cpu          the default
    cuda         on a GPU, by the Triton kernels; tests/gpu is collected then, and only then
    interpreter  on tensors of the CPU, by the road and the kernels of a GPU's, interpreted

What is about the CPU's own kernels, their threads and memory, is marked `of_the_cpu` and left out
elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
DEVICES = ("cpu", "cuda", "interpreter")
_CHOICE = "FUSEBN_TEST_DEVICE"


def use(device: str) -> None:
    """Have the tests of this process run there, and those of the processes that it starts.

    Before anybody imports Triton, which decides then whether kernels are interpreted.
    """
    os.environ[_CHOICE] = device
    os.environ["TRITON_INTERPRET"] = "0" if device == "cuda" else "1"
    if device == "cpu":
        return
    os.environ["FUSEBN_TRITON"] = "1"
    import torch

    if device == "cuda":
        torch.set_default_device("cuda")
    else:
        sys.path.append(str(HERE / "triton"))
        import interpreted

        interpreted.serve_tensors_of_the_cpu()


def use_the_parents() -> None:
    """Do so in a process that a test has started."""
    use(os.environ.get(_CHOICE, "cpu"))


def on_gpus() -> bool:
    """Say whether the tests' tensors are on GPUs."""
    return os.environ.get(_CHOICE) == "cuda"


def seeded(seed: int) -> torch.Generator:
    """Return a generator of tensors where the tests' tensors are."""
    import torch

    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Have PyTorch fill what it allocates with NaN: what is read unwritten cannot pass."""
    import torch

    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


# ---- pytest ----


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=DEVICES, default="cpu", help="of PyTorch's tensors")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "of_the_cpu: about what tensors of the CPU alone have")
    device = config.getoption("--device")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: PyTorch sees no CUDA device here")
    use(device)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    on_a_gpu = config.getoption("--device") == "cuda"
    # A process that compiles kernels interprets none.
    left_out = HERE / ("triton" if on_a_gpu else "gpu")
    # Files, too: a folder that the command line names is not asked about.
    return True if left_out in (collection_path, *collection_path.parents) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    elsewhere = [item for item in items if item.get_closest_marker("of_the_cpu")]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]
