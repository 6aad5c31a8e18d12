"""What `fusebn bench --device cuda` does: the machine first, then verbs, then a training step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console

from fusebn.cli.bench import steps_report
from fusebn.cli.bench.cases import LAYOUTS, RESNET50, USUAL_DTYPES
from fusebn.cli.bench.device import chip, race, tables, training
from fusebn.cli.bench.device.clock import Clock, CudaClock
from fusebn.cli.bench.device.contestants import OURS, PEERS, Contestant, present
from fusebn.cli.bench.device.findings import DeviceResults
from fusebn.cli.bench.device.goals import goals
from fusebn.cli.bench.device.traffic import at_batch
from fusebn.cli.bench.inside import serves_gpus
from fusebn.cli.bench.machine import described
from fusebn.cli.bench.runner import Plan
from fusebn.cli.bench.steps import StepResults

PARTS = ("machine", "verbs", "resnet")
BATCHES = (32, 256)
VERBS = (
    "forward", "inference", "backward", "forward+residual+relu", "backward+residual+relu",
)  # fmt: skip
SHAPES = tuple(at_batch(shape, batch) for batch in BATCHES for shape in RESNET50)
QUICK_SHAPES = ("32x56x56x64", "32x56x56x256", "256x14x14x1024", "32x7x7x512")
QUICK_DTYPES, QUICK_LAYOUTS = ("bfloat16",), LAYOUTS[:1]


class Wish(NamedTuple):
    """What was asked for; empty where the defaults decide."""

    parts: tuple[str, ...]
    shapes: tuple[str, ...]
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    verbs: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    quick: bool
    deadline: float | None


class Ground(NamedTuple):
    """Where it happens: tests have another."""

    device: torch.device
    clock: Clock
    chip: chip.Chip
    large: int  # bytes of the arrays that tell the speed of memory
    rereads: Sequence[int]
    contestants: Sequence[Contestant]


def check(wish: Wish) -> None:
    """Raise click.UsageError unless a device can be measured here, as was asked."""
    _among("parts", PARTS, wish.parts)
    _among("peers", (*PEERS, "none"), wish.peers)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError(
            "--device cuda would measure Triton's interpreter: unset TRITON_INTERPRET"
        )
    if torch.version.cuda is None:
        raise click.UsageError(
            f"--device cuda needs a PyTorch built for CUDA; this is {torch.__version__}. "
            "pytorch.org/get-started/locally says how to install one"
        )
    if not torch.cuda.is_available():
        raise click.UsageError(
            f"--device cuda needs an NVIDIA GPU; PyTorch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda}, sees none. `nvidia-smi` must list one, and "
            "CUDA_VISIBLE_DEVICES, if it is set, must not hide it"
        )
    if not serves_gpus():
        raise click.UsageError("--device cuda: set FUSEBN_TRITON=1 before fusebn.torch is imported")


def _among(what: str, there: Sequence[str], asked: Sequence[str]) -> None:
    for one in asked:
        if one not in there:
            names = ", ".join(there)
            raise click.UsageError(f"the {what} of --device cuda are {names}; got {one}")


def ground(wish: Wish) -> Ground:
    """Return the current CUDA device, ready, and who is wanted there."""
    device = torch.device("cuda", torch.cuda.current_device())
    return Ground(
        device,
        CudaClock(device),
        chip.chip_of(device),
        chip.large_on(device),
        chip.REREAD,
        present(wish.peers),
    )


def run(wish: Wish, where: dict[str, Any], at: Ground, console: Console) -> DeviceResults:
    """Measure, and print what was found."""
    console.print(described(where))
    with console.status("the machine"):
        chip.measure(at.chip, at.clock, at.device, at.large, at.rereads)
    tables.show_machine(at.chip, console)
    results = DeviceResults(
        where,
        {who.name: _version(who) for who in at.contestants if who is not OURS},
        wish.rounds,
        titles={who.name: who.title for who in at.contestants},
        chip=asdict(at.chip),
    )
    parts = wish.parts or PARTS
    if "verbs" in parts:
        _verbs(wish, at, results, console)
    if "resnet" in parts:
        _training(wish, at, results, console)
    results.goals = goals(results)
    tables.show(results, console)
    return results


def _verbs(wish: Wish, at: Ground, results: DeviceResults, console: Console) -> None:
    plan = Plan(
        wish.shapes or (QUICK_SHAPES if wish.quick else SHAPES),
        wish.layouts or (QUICK_LAYOUTS if wish.quick else LAYOUTS),
        wish.dtypes or (QUICK_DTYPES if wish.quick else _bfloat16_first()),
        wish.verbs or VERBS,
        wish.rounds,
        wish.deadline,
    )
    dtype = None
    for record in race.measure(plan, at.contestants, at.chip, at.clock, at.device):
        if record is None:
            results.left_out += 1
            continue
        results.records.append(record)
        if record.dtype != dtype:
            dtype = record.dtype
            console.print(tables.heading(dtype))
        console.print(tables.line(record))


def _bfloat16_first() -> tuple[str, ...]:
    """Return the types, first the one that is trained in: a run may be cut short."""
    return tuple(sorted(USUAL_DTYPES, key=lambda dtype: dtype != "bfloat16"))


def _training(wish: Wish, at: Ground, results: DeviceResults, console: Console) -> None:
    suite = training.SUITE
    if wish.deadline is not None and perf_counter() > wish.deadline:
        console.print(f"\nNo time was left for {suite.title}: --part resnet")
        return
    found = StepResults(suite, results.machine, torch.__version__, wish.rounds)
    shapes = suite.quick_shapes if wish.quick else suite.shapes
    plan = Plan(shapes, suite.layouts, suite.dtypes, (), wish.rounds)
    console.print()
    console.print(steps_report.heading(suite))
    for record in training.measured(plan, at.clock, at.device):
        found.records.append(record)
        console.print(steps_report.line(suite, record))
    steps_report.show(found, console)
    results.training = found


def _version(who: Contestant) -> str:
    """Return what a plot's legend says beside the name."""
    return str(torch.__version__) if who.name == "eager" else ""
