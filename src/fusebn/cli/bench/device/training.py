"""A training step of ResNet-50 on the device: the same suite and the same checks as on a CPU.

In one process, for a CUDA context of its own for each way would cost memory and prove nothing; and
called as users call it, from Python: a step that waits for its host is slow for them, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import Case, data_of
from fusebn.cli.bench.device.clock import Clock
from fusebn.cli.bench.peers import torch_networks as networks
from fusebn.cli.bench.runner import Plan
from fusebn.cli.bench.steps import Crew, StepRecord, measure
from fusebn.cli.bench.suites import TORCH_RESNET, Step
from fusebn.cli.bench.worker import Unable

SUITE = TORCH_RESNET._replace(
    name="cuda-resnet",
    note="""\
Forward, backward and the update of the weights by SGD; bfloat16 by autocast.
Before it is timed, each way trains on the same batches from the same start, and
its losses must be PyTorch's to rounding. Events of the device around steps that
Python calls. A ratio is the time of a step divided by that of the network after
fusebn.torch.fuse.
""",
    shapes=("128x224x224x3",),
    quick_shapes=("32x224x224x3",),
    dtypes=("bfloat16",),
    memories=("fresh",),
    apart=False,
)


class Resident:
    """What `steps` asks of a worker, in this process."""

    memory = "fresh"

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock, self._device = clock, device
        self._turns: dict[str, Any] = {}
        self._case: Case | None = None
        self._images: Any = None

    def load(self, case: Case) -> None:
        """Put the images on the device, channels last."""
        x = torch.from_numpy(data_of(case._replace(dtype="float32")).x)
        self._case, self._images = case, x.movedim(case.axis, 1).to(self._device)

    def prepare(self, step: Step, *, keep: bool = False) -> Answer:
        """Train for some steps, and return their losses; then steps can be timed."""
        assert self._case is not None
        try:
            with self._clock.on():
                network = networks.Training(step.name, self._case.dtype, self._images)
                losses = [network.step().item() for _ in range(networks.LOSSES)]
                self._turns[step.name] = self._clock.prepare([network.step], capture=False).turn
        except Exception as reason:  # whatever a framework raises is an answer: it cannot
            raise Unable(f"{type(reason).__name__}: {reason}") from None
        return {"losses": np.array(losses)}

    def turn(self, step: Step, count: int) -> float:
        """Return the seconds of a step."""
        with self._clock.on():
            seconds: float = self._turns[step.name]()
        return seconds


def measured(plan: Plan, clock: Clock, device: torch.device) -> Iterator[StepRecord]:
    """Yield a record for each case."""
    ways: Any = Resident(clock, device)
    yield from measure(SUITE, plan, [Crew(ways, tuple(SUITE.steps.values()))])
    clock.clear()
