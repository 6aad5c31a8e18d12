"""`fusebn bench --torch`: what it checks, refuses and writes. Never how fast anything is."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import fusebn
import fusebn.torch as fbt
from fusebn.cli.bench import bench, comparison
from fusebn.cli.bench.answers import Agreement, Answer, Truth, Wrong, sampled
from fusebn.cli.bench.cases import VERBS, Case, data_of
from fusebn.cli.bench.machine import file_stem, machine
from fusebn.cli.bench.peers import torch_networks
from fusebn.cli.bench.peers.torch_layers import Layers
from fusebn.cli.bench.resnet import Bottleneck, ResNet50
from fusebn.cli.bench.runner import Plan
from fusebn.cli.bench.steps import Crew, StepRecord, StepResults, measure, summary
from fusebn.cli.bench.steps_report import markdown
from fusebn.cli.bench.suites import (
    FRAMEWORKS,
    TORCH_CALLS,
    TORCH_INFERENCE,
    TORCH_LAYERS,
    TORCH_RESNET,
    Step,
    Suite,
)
from fusebn.cli.bench.worker import Worker

pytestmark = pytest.mark.of_the_cpu

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peers set the number of threads. PyTorch's wait long for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(fusebn, "get_num_threads", lambda: 1)
    yield
    torch.set_num_threads(threads)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench, ["--torch", *map(str, arguments)])


def written(folder: Path, suite: Suite) -> tuple[dict[str, object], str]:
    stem = folder / f"{file_stem(machine())}-{suite.name}"
    page = Path(f"{stem}.md").read_text()
    return json.loads(Path(f"{stem}.json").read_text()), page


@pytest.mark.parametrize(
    ("suite", "shape"),
    [(TORCH_CALLS, "8x4"), (TORCH_LAYERS, "4x5x3x6"), (TORCH_INFERENCE, "2x5x5x16")],
    ids=lambda value: value.part if isinstance(value, Suite) else "",
)
def test_a_part_is_measured_and_written(suite: Suite, shape: str, tmp_path: Path) -> None:
    options = ("--dtype", "float32", "--repeats", 1, "--layout", "channels-last")
    result = run("--part", suite.part, "--shape", shape, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if "wrote" not in line)
    found, page = written(tmp_path, suite)
    [record] = cast(list[dict[str, object]], found["records"])
    assert record["wrong"] is None
    assert record["refused"] == {}
    runs = cast(list[dict[str, object]], record["runs"])
    ways = {(run["step"], run["memory"]) for run in runs}
    assert ways == {(step, memory) for step in suite.steps for memory in suite.memories}
    assert all(step.title in page for step in suite.steps.values())
    unit = "microseconds, fresh\n" if suite is TORCH_CALLS else "milliseconds, fresh (in brackets"
    assert f"## Each case: {unit}" in page


# ---- the peers ----


@pytest.mark.parametrize("shape", ["8x4", "6x5x3", "4x3x5x2", "3x2x3x2x4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_gives_the_right_answer(shape: str, dtype: str) -> None:
    peer = Layers(1)
    case = Case(shape, "channels-last", dtype)
    data = data_of(case)
    truth = Truth(case, data)
    peer.load(case, data)
    for suite in (TORCH_CALLS, TORCH_LAYERS):
        for step in suite.steps.values():
            answer = sampled(peer.answer(step, peer.call(step)()), case)
            for verb in step.verbs:
                truth.check(VERBS[verb], answer, peer=not step.ours)
                with pytest.raises(Wrong):  # so what it checks is there
                    truth.check(VERBS[verb], {n: a + 1 for n, a in answer.items()}, peer=True)


def test_calls_are_those_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    right = fbt.BatchNorm1d.forward

    def forward(self: object, *arguments: object, **options: object) -> object:
        called.append((len(arguments), options))
        return right(self, *arguments, **options)

    monkeypatch.setattr(fbt.BatchNorm1d, "forward", forward)
    peer, case = Layers(1), Case("8x4", "channels-last", "float32")
    peer.load(case, data_of(case))
    peer.call(TORCH_LAYERS.steps["fusebn-chain"])()
    assert called == [(2, {"activation": "relu"})]
    called.clear()
    step = TORCH_CALLS.steps["fusebn-M.call"]
    peer.call(step)()
    assert called == [(1, {})] * step.calls


def test_the_network_is_resnet_50() -> None:
    with torch.device("meta"):
        network = ResNet50()
    names = list(network.state_dict())
    assert sum(parameter.numel() for parameter in network.parameters()) == 25_557_032
    assert len(names) == 320  # torchvision's, by name
    assert "layer4.0.downsample.1.running_var" in names
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53
    assert network(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_fuse_folds_all_of_a_bottleneck() -> None:
    block = fbt.fuse(Bottleneck(8, 4))
    folded = {row.name: (row.residual, row.activation) for row in fbt.explain(block)}
    assert folded["bn1"] == folded["bn2"] == (False, "relu")
    assert folded["bn3"] == (True, "relu")


# ---- networks ----


class Small(nn.Sequential):
    """In place of ResNet-50."""

    def __init__(self, classes: int) -> None:
        pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes)
        super().__init__(nn.Conv2d(3, 16, 1), Bottleneck(16, 4), *pooled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_learns_the_same_either_way(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_networks, "ResNet50", Small)
    monkeypatch.setattr(torch_networks, "RATE", 0.01)
    case = Case("4x5x5x3", "channels-last", dtype)
    agreement = Agreement(case)
    for name in ("eager", "fusebn"):
        step = TORCH_RESNET.steps[name]
        peer = torch_networks.Networks(1)
        peer.load(case, data_of(case))
        answer = peer.answer(step, peer.call(step)())
        assert 2**24 < answer.pop("peak")[0] < 2**36
        losses = answer["losses"]
        assert len(losses) == torch_networks.LOSSES
        assert losses[-1] < losses[0] - 0.1
        agreement.check(answer)
        with pytest.raises(Wrong, match="losses is"):
            agreement.check({"losses": losses + 0.1})


# Whoever imports the compiler meets a deprecated decorator of PyTorch's own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ways_say_what_is_changed() -> None:
    def norm(way: str) -> object:
        model = torch_networks.changed(nn.Sequential(nn.BatchNorm2d(2)), way)
        return type(getattr(model, "_orig_mod", model)[0]), hasattr(model, "_orig_mod")

    theirs, ours = nn.BatchNorm2d, fbt.BatchNorm2d
    found = {way: norm(way) for way in TORCH_RESNET.steps}
    assert found == {
        "eager": (theirs, False),
        "compile": (theirs, True),
        "fusebn": (ours, False),
        "both": (ours, True),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_example_shows_the_same_losses_twice(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "resnet_cpu.py"))
    main = example["main"]
    monkeypatch.setitem(main.callback.__globals__, "ResNet50", Small)
    options = ["--batch", "2", "--size", "33", "--steps", "3", "--dtype", dtype]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    head, _, *steps, last = result.output.splitlines()
    assert head == f"2 images of 33x33, {dtype}, 1 threads"
    assert [line.split()[0] for line in steps] == ["1", "2", "3"]
    for line in steps:
        plain, fused = map(float, line.split()[1:3])
        assert fused == pytest.approx(plain, rel=1e-4 if dtype == "float32" else 0.02)
    assert last.endswith("times as fast")


# ---- answers that agree ----


class Planted:
    """A worker of one step, whose losses are a little off."""

    memory, version = "fresh", "2"

    def __init__(self, off: float) -> None:
        self._off = off

    def wait(self) -> None: ...

    def load(self, case: Case) -> None: ...

    def prepare(self, step: Step, *, keep: bool) -> Answer:
        return {"losses": np.array([7.0, 6.0 + self._off]), "peak": np.array([2.0**30])}

    def turn(self, step: Step, count: int) -> float:
        return 3.0 if step.name == "eager" else 2.0


def measured(**off: float) -> StepRecord:
    plan = Plan(("2x8x8x3",), ("channels-last",), ("float32",), (), 2)
    crews = [
        Crew(cast(Worker, Planted(value)), (TORCH_RESNET.steps[name],))
        for name, value in off.items()
    ]
    [record] = measure(TORCH_RESNET, plan, crews)
    return record


def test_losses_that_agree_to_rounding_pass() -> None:
    results = StepResults(TORCH_RESNET, machine(), "2", 2, [measured(eager=0, fusebn=1e-4)])
    [row] = summary(results)
    assert row.over_ours == {"eager": 1.5, "fusebn": 1}
    page = markdown(results, "--torch")
    assert "1.0e-04, fusebn.torch.fuse, fresh" in page
    assert "1.00 GiB, PyTorch, fresh" in page


def test_losses_of_ours_that_do_not_are_not_timed() -> None:
    record = measured(eager=0, fusebn=0.1)
    assert record.wrong == ("fusebn.torch.fuse: losses is 6.1 at 1 where the first way has 6")
    assert record.runs == []


def test_losses_of_theirs_that_do_not_are_left_out() -> None:
    record = measured(eager=0, compile=0.1, fusebn=0)
    assert record.refused.keys() == {"compile fresh"}
    assert {run.step for run in record.runs} == {"eager", "fusebn"}


def test_nan_agrees_with_nothing() -> None:
    agreement = Agreement(Case("8x4", "channels-last", "float32"))
    agreement.check({"y": np.ones(3)})
    with pytest.raises(Wrong, match="y is nan at 1"):
        agreement.check({"y": np.array([1, np.nan, 1])})


def test_every_way_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is its own then. PyTorch as a user gets it comes first: it is the yardstick."""
    asked = []

    @contextmanager
    def started(pairs: list[tuple[str, str]], environment: object) -> Iterator[list[Worker]]:
        asked.extend(pairs)
        workers = [Planted(0) for _ in pairs]
        for worker, (_, memory) in zip(workers, pairs, strict=True):
            worker.memory = memory
        yield cast(list[Worker], workers)

    monkeypatch.setattr(comparison, "started", started)
    result = run("--part", "resnet", "--dtype", "float32", "--repeats", 1, "--shape", "2x8x8x3")
    assert result.exit_code == 0, result.output
    assert asked == [("torch_networks", m) for m in ["fresh"] * 4 + ["warm"] * 2]
    asked.clear()
    run("--part", "resnet", "--quick", "--shape", "2x8x8x3")
    assert asked == [("torch_networks", "fresh")] * 2


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--verb", "forward"), "--verb does not go with --torch, which has no verbs"),
        (("--shape", "8x4"), "--shape needs one --part: calls, layers, inference, resnet"),
        (("--json", "x.json"), "--json needs one --part: calls, layers, inference, resnet"),
        (
            ("--part", "resnet", "--layout", "channels-first"),
            "--part resnet has --layout channels-last alone",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options: tuple[str, ...], message: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_part_needs_its_framework() -> None:
    result = CliRunner().invoke(bench, ["--part", "calls"])
    assert result.exit_code == 2
    assert "--part goes with --torch" in result.output


def test_without_time_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "perf_counter", lambda: 1e12)
    result = run("--quick")
    assert result.exit_code == 0
    for suite in FRAMEWORKS["torch"]:
        assert f"No time was left for {suite.title}: --part {suite.part}" in result.output
