"""`fusebn bench --tensorflow`, `--torch`, ... `--quantize`: which suites, cases, processes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

import click
from rich.console import Console

from fusebn.cli.bench import steps_report
from fusebn.cli.bench.runner import Plan
from fusebn.cli.bench.steps import Crew, StepResults, measure
from fusebn.cli.bench.suites import FRAMEWORKS, Step, Suite
from fusebn.cli.bench.worker import Unable, memories, started


class Wish(NamedTuple):
    """What was asked for; empty where the suites decide."""

    framework: str
    parts: tuple[str, ...]
    shapes: tuple[str, ...]
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    rounds: int
    quick: bool
    deadline: float | None
    may_be_several: bool  # no single file is to hold the results


def plans(wish: Wish) -> list[tuple[Suite, Plan]]:
    """Return the suites, and what to measure of each."""
    suites = _suites(wish)
    if len(suites) > 1 and (wish.shapes or not wish.may_be_several):
        option = "--shape" if wish.shapes else "--json"
        names = ", ".join(suite.part for suite in suites)
        raise click.UsageError(f"{option} needs one --part: {names}")
    return [(suite, _plan(suite, wish)) for suite in suites]


def _suites(wish: Wish) -> list[Suite]:
    all_of_them = FRAMEWORKS[wish.framework]
    here = [suite for suite in all_of_them if all(map(find_spec, suite.needs))]
    for part in wish.parts:
        if part not in (suite.part for suite in all_of_them):
            names = ", ".join(suite.part for suite in all_of_them)
            raise click.UsageError(f"the parts of --{wish.framework} are {names}; got {part}")
        if part not in (suite.part for suite in here):
            [suite] = (suite for suite in all_of_them if suite.part == part)
            packages = ", ".join(suite.needs)
            raise click.UsageError(
                f"--part {part} needs {packages}: pip install 'fusebn[{packages}]'"
            )
    if not here:
        needs = sorted({package for suite in all_of_them for package in suite.needs})
        raise click.UsageError(
            f"none of {', '.join(needs)} is installed: pip install 'fusebn[jax]'"
        )
    return [suite for suite in here if suite.part in (wish.parts or (suite.part,))]


def _plan(suite: Suite, wish: Wish) -> Plan:
    layouts = [layout for layout in wish.layouts or suite.layouts if layout in suite.layouts]
    if not layouts:
        raise click.UsageError(f"--part {suite.part} has --layout {suite.layouts[0]} alone")
    dtypes = suite.dtypes
    if wish.quick:
        layouts, dtypes = layouts[:1], dtypes[:1]
    shapes = suite.quick_shapes if wish.quick else suite.shapes
    return Plan(
        wish.shapes or shapes,
        tuple(layouts),
        wish.dtypes or dtypes,
        (),
        wish.rounds,
        wish.deadline,
    )


def run(
    plans: list[tuple[Suite, Plan]], quick: bool, where: dict[str, Any], console: Console
) -> Iterator[StepResults]:
    """Yield what was found about each suite."""
    for suite, plan in plans:
        if plan.deadline is not None and perf_counter() > plan.deadline:
            console.print(f"\nNo time was left for {suite.title}: --part {suite.part}")
            continue
        crews = _crews(suite, quick)
        pairs = [(suite.peer, memory) for memory, _ in crews]
        with started(pairs, suite.environment) as workers:
            with console.status(f"importing {suite.framework}"):
                for worker in workers:
                    try:
                        worker.wait()
                    except Unable as reason:
                        raise click.ClickException(
                            f"{suite.framework} cannot be measured: {reason}"
                        ) from None
            results = StepResults(suite, where, workers[0].version, plan.rounds)
            console.print(steps_report.heading(suite))
            ready = [Crew(w, steps) for w, (_, steps) in zip(workers, crews, strict=True)]
            for record in measure(suite, plan, ready):
                results.records.append(record)
                console.print(steps_report.line(suite, record))
        steps_report.show(results, console)
        yield results


def _crews(suite: Suite, quick: bool) -> list[tuple[str, tuple[Step, ...]]]:
    """Return the kind of memory and the steps of each process."""
    steps = [step for step in suite.steps.values() if not (quick and step.slow)]
    crews: list[tuple[str, tuple[Step, ...]]] = []
    for memory in reversed(memories()):  # fresh ones first: who comes first is the yardstick
        if memory not in suite.memories or (quick and suite.apart and memory != "fresh"):
            continue
        mine = tuple(step for step in steps if memory == "fresh" or not step.slow)
        crews += [(memory, (step,)) for step in mine] if suite.apart else [(memory, mine)]
    return crews
