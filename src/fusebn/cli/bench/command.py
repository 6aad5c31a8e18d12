"""The command line of `fusebn bench`."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import click
from rich.console import Console

from fusebn.cli.bench import asides, comparison, plot, report, steps_report
from fusebn.cli.bench.cases import (
    DTYPES,
    LAYOUTS,
    QUICK_SHAPES,
    SHAPES,
    USUAL_DTYPES,
    VERBS,
    parse,
)
from fusebn.cli.bench.machine import described, file_stem, machine
from fusebn.cli.bench.peers import PEERS, installed
from fusebn.cli.bench.results import Results
from fusebn.cli.bench.runner import Plan, measure
from fusebn.cli.bench.suites import EXTRAS, FRAMEWORKS
from fusebn.cli.bench.worker import Unable, Worker, memories, started

if TYPE_CHECKING:
    from fusebn.cli.bench.device.command import Wish

QUICK_SECONDS = 42  # from the start of the command; the rest of the minute is for the last case
QUICK_PEERS = ("torch",)
ON_DEVICES = ("compile", "apex")  # peers that a CPU has not
QUICK_LAYOUTS = LAYOUTS[:1]
QUICK_DTYPES = ("float32",)


def _shape(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> object:
    for value in values:
        try:
            parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return values


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option("--quick", is_flag=True, help="A few shapes, within a minute.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)))
@click.option("--shape", "shapes", multiple=True, callback=_shape, help="Such as 32x56x56x256.")
@click.option("--layout", "layouts", multiple=True, type=click.Choice(LAYOUTS))
@click.option("--verb", "verbs", multiple=True, type=click.Choice(list(VERBS)))
@click.option(
    "--peers",
    multiple=True,
    type=click.Choice([*PEERS, *ON_DEVICES, "none"]),
    help="Whom to compare with; by default everybody installed (with --quick, PyTorch). With "
    f"--device cuda: torch, {', '.join(ON_DEVICES)}.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: on an NVIDIA GPU, PyTorch's tensors, with PyTorch and torch.compile as peers.",
)
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds in which everybody has a turn.")
@click.option(
    "--tensorflow",
    "framework",
    flag_value="tensorflow",
    help="Instead: training steps in TensorFlow, ours against its own, at ResNet-50's shapes.",
)
@click.option(
    "--torch",
    "framework",
    flag_value="torch",
    help="Instead: calls, layers, residual blocks and ResNet-50 in PyTorch, ours against its own.",
)
@click.option(
    "--jax",
    "framework",
    flag_value="jax",
    help="Instead: layers in training and in inference under jit, ours against Flax's.",
)
@click.option(
    "--keras",
    "framework",
    flag_value="keras",
    help="Instead: layers and a small ResNet on each backend of Keras, ours against its own.",
)
@click.option(
    "--quantize",
    "framework",
    flag_value="quantize",
    help="Instead: what transforms of the variables cost, in each framework.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(
        [
            *dict.fromkeys(s.part for suites in FRAMEWORKS.values() for s in suites if s.part),
            *("machine", "verbs"),
        ]
    ),
    help="With --torch, --jax, --keras or --quantize: this alone, which has files of its own. "
    "With --device cuda: machine, verbs or resnet.",
)
@click.option("--busy", is_flag=True, help="Also: beside a process that holds one core.")
@click.option("--json", "json_path", type=_FILE, help="Write the results here.")
@click.option("--plot", "plot_path", type=_FILE, help="Draw them here, as PNG and SVG.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write JSON, Markdown and plot into this folder, named by date and machine.",
)
def bench(
    quick: bool,
    dtypes: tuple[str, ...],
    shapes: tuple[str, ...],
    layouts: tuple[str, ...],
    verbs: tuple[str, ...],
    peers: tuple[str, ...],
    device: str,
    repeats: int | None,
    framework: str | None,
    parts: tuple[str, ...],
    busy: bool,
    json_path: Path | None,
    plot_path: Path | None,
    out: Path | None,
) -> None:
    """Measure speed against the floor that memory sets, and against other libraries.

    Every answer is checked against the oracle before it is timed; a wrong one is not timed, and
    the command ends with status 1.
    """
    start = perf_counter()
    rounds = repeats or (5 if quick else 7)
    deadline = start + QUICK_SECONDS if quick else None
    if device != "cpu":
        _no_such({"--busy": busy, f"--{framework}": framework})
        os.environ["FUSEBN_TRITON"] = "1"  # before the next line: it is read there, once
        # Here, not above: PyTorch takes seconds, which all else does without.
        from fusebn.cli.bench.device.command import Wish

        asked = Wish(parts, shapes, layouts, dtypes, verbs, peers, rounds, quick, deadline)
    elif elsewhere := set(peers) & set(ON_DEVICES):
        raise click.UsageError(f"--peers {', '.join(sorted(elsewhere))} goes with --device cuda")
    if framework:
        _no_verbs(
            framework, {"--verb": verbs, "--peers": peers, "--busy": busy, "--plot": plot_path}
        )
    elif (plot_path or out) and not find_spec("matplotlib"):
        raise click.UsageError("a plot needs matplotlib: pip install 'fusebn[demo]'")
    if parts and framework in (None, "tensorflow") and device == "cpu":
        raise click.UsageError("--part goes with --torch, --jax, --keras or --quantize")
    console = Console(highlight=False)
    where = machine()
    if device != "cpu":
        _on_device(asked, where, json_path, plot_path, out, console)
        return
    if framework:
        wish = comparison.Wish(
            framework, parts, shapes, layouts, dtypes, rounds, quick, deadline, json_path is None
        )
        plans = comparison.plans(wish)
    console.print(described(where))
    if warning := report.busy_machine(where):
        console.print(f"[yellow]{warning}[/]")
    if framework:
        wrong = False
        for found in comparison.run(plans, quick, where, console):
            page = steps_report.markdown(found, f"--{framework}")
            ending = f"-{found.suite.name}"
            _write(found.as_json(), page, where, ending, json_path, out, console)
            wrong = wrong or any(record.wrong for record in found.records)
        _end(wrong, console)
        return
    plan = Plan(
        shapes or (QUICK_SHAPES if quick else SHAPES),
        layouts or (QUICK_LAYOUTS if quick else LAYOUTS),
        dtypes or (QUICK_DTYPES if quick else USUAL_DTYPES),
        verbs or tuple(VERBS),
        rounds,
        deadline,
    )
    here = installed()
    wanted = [p for p in peers or (QUICK_PEERS if quick else here) if p != "none"]
    for peer in wanted:
        if peer in peers and peer not in here:
            raise click.UsageError(
                f"{PEERS[peer][0]} is not installed: {', '.join(PEERS[peer][1])}"
            )
    pairs = [(peer, memory) for peer in wanted if peer in here for memory in memories()]
    with started(pairs) as workers:
        results = _results(plan, workers, where, console)
    results.overhead = asides.overhead()
    if busy:
        results.busy = asides.busy()
    report.show(results, console)
    _write(results.as_json(), report.markdown(results), where, "", json_path, out, console)
    _plot(results, where, plot_path, out, console)
    _end(any(record.wrong for record in results.records), console)


def _no_such(options: dict[str, object]) -> None:
    for option, given in options.items():
        if given:
            raise click.UsageError(f"{option} does not go with --device cuda")
    if not all(map(find_spec, ("torch", "triton"))):
        raise click.UsageError(
            "--device cuda needs torch and triton: pip install 'fusebn[cli,triton]'"
        )


def _on_device(
    wish: Wish,
    where: dict[str, object],
    json_path: Path | None,
    plot_path: Path | None,
    out: Path | None,
    console: Console,
) -> None:
    from fusebn.cli.bench.device import command as on_device
    from fusebn.cli.bench.device.tables import markdown

    on_device.check(wish)
    ground = on_device.ground(wish)
    where["device"] = ground.chip.name  # whose numbers they are, in tables and in names of files
    results = on_device.run(wish, where, ground, console)
    page = markdown(results, ground.chip)
    _write(results.as_json(), page, where, "", json_path, out, console)
    if any(record.runs for record in results.records):
        _plot(results, where, plot_path, out, console)
    steps = results.training.records if results.training else []
    wrong = any(record.wrong for record in results.records)
    _end(wrong or any(record.wrong for record in steps), console)


def _plot(
    results: Results,
    where: dict[str, object],
    plot_path: Path | None,
    out: Path | None,
    console: Console,
) -> None:
    for path in filter(None, [plot_path, out and _stem(out, where, ".png")]):
        path.parent.mkdir(parents=True, exist_ok=True)
        for written in plot.plot(results, path):
            console.print(f"wrote {written}")


def _no_verbs(framework: str, options: dict[str, object]) -> None:
    for option, given in options.items():
        if given:
            raise click.UsageError(f"{option} does not go with --{framework}, which has no verbs")
    extra, packages = EXTRAS[framework]
    if not all(map(find_spec, packages)):
        raise click.UsageError(
            f"--{framework} needs {' and '.join(packages)}: pip install 'fusebn[cli,{extra}]'"
        )


def _results(
    plan: Plan, workers: list[Worker], where: dict[str, object], console: Console
) -> Results:
    ready: list[Worker] = []
    if workers:
        names = dict.fromkeys(PEERS[worker.peer][0] for worker in workers)
        with console.status(f"importing {', '.join(names)}"):
            for worker in workers:
                try:
                    worker.wait()
                    ready.append(worker)
                except Unable as reason:
                    console.print(f"{PEERS[worker.peer][0]} cannot be measured: {reason}")
    results = Results(where, {worker.peer: worker.version for worker in ready}, plan.rounds)
    dtype = None
    with console.status("") as status:
        for number, record in enumerate(measure(plan, ready), 1):
            status.update(f"{number} of {math.prod((len(plan.cases()), len(plan.verbs)))}")
            if record is None:
                results.left_out += 1
                continue
            results.records.append(record)
            if record.dtype != dtype:
                dtype = record.dtype
                console.print(report.heading(dtype))
            console.print(report.line(record))
    return results


def _write(
    found: dict[str, object],
    page: str,
    where: dict[str, object],
    suffix: str,
    json_path: Path | None,
    out: Path | None,
    console: Console,
) -> None:
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    files = {json_path: text} if json_path else {}
    if out:
        files |= {
            _stem(out, where, f"{suffix}.json"): text,
            _stem(out, where, f"{suffix}.md"): page,
        }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        console.print(f"wrote {path}")


def _stem(out: Path, where: dict[str, object], ending: str) -> Path:
    return out / f"{file_stem(where)}{ending}"


def _end(wrong: bool, console: Console) -> None:
    if wrong:
        console.print("[bold red]A wrong answer was refused.[/]")
        sys.exit(1)
