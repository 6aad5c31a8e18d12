"""`fusebn bench --device cuda` on a CPU: its whole path, with a clock that tells what it is told.

The kernels run in Triton's interpreter, and a device is made up. Nothing here is timed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import interpreted  # all programs at once
import pytest
import torch
import torch._functorch.config as settings
from click.testing import CliRunner
from torch import nn

import fusebn.torch as fbt
from fusebn.cli.bench import bench
from fusebn.cli.bench.cases import RESNET50, VERBS, Case, data_of
from fusebn.cli.bench.device import chip, clock, command, contestants, probes, race, training
from fusebn.cli.bench.device.clock import ROTATION, Timed, copies_for
from fusebn.cli.bench.device.contestants import (
    APEX,
    COMPILED,
    EAGER,
    OURS,
    TWO_LAUNCHES,
    Contestant,
    road_of,
)
from fusebn.cli.bench.device.findings import DeviceRecord, DeviceResults, DeviceRun, sums
from fusebn.cli.bench.device.goals import goals
from fusebn.cli.bench.device.tables import markdown
from fusebn.cli.bench.device.tensors import Tensors
from fusebn.cli.bench.device.traffic import COUNTS, at_batch, traffic
from fusebn.cli.bench.inside import is_held
from fusebn.cli.bench.machine import file_stem
from fusebn.cli.bench.peers import torch_networks
from fusebn.cli.bench.resnet import Bottleneck, ResNet50
from fusebn.cli.bench.results import Spread
from fusebn.cli.bench.runner import Plan
from fusebn.torch import _gpu

CPU = torch.device("cpu")
SHAPE = "4x3x3x64"


class Told:
    """A clock: it runs each call once, and says how long that took in its own way."""

    def __init__(self, *seconds, how="graph", why=None):
        self.seconds, self.how, self.why = cycle(seconds or (2e-6,)), how, why
        self.prepared = []

    def on(self):
        return nullcontext()

    def prepare(self, calls, *, capture=True):
        for call in calls:
            call()
        self.prepared.append(len(calls))
        how = self.how if capture else "calls"
        return Timed(how, lambda: next(self.seconds), self.why if capture else None)

    def clear(self):
        pass


class Interpreted(torch.autograd.Function):
    """Our batch norm as a CUDA tensor has it."""

    @staticmethod
    def forward(ctx, x, scale, offset, residual, mean, variance, options):
        y, new_mean, new_variance, batch, _ = _gpu.batch_norm(
            x, scale, offset, mean, variance, residual, None, **options
        )
        if options["training"]:
            mean.copy_(new_mean)
            variance.copy_(new_variance)
        ctx.save_for_backward(x, scale, offset, residual, batch)
        ctx.options = {**options, "factor": 1.0}
        return y

    @staticmethod
    def backward(ctx, dy):
        x, scale, offset, residual, batch = ctx.saved_tensors
        dx, dscale, doffset, _, _, dresidual = _gpu.batch_norm_backward(
            dy, None, None, batch, x, scale, offset, None, None, residual, None, **ctx.options
        )
        given = dresidual if residual is not None else None
        return dx, dscale, doffset, given, None, None, None


def batch_norm(
    x, mean, variance, scale, offset, training, momentum, eps, *, residual=None, activation=None
):
    options = {
        "training": training, "axis": 1, "epsilon": eps, "correction": 1.0, "factor": momentum,
        "activation": activation or "identity",
    }  # fmt: skip
    return Interpreted.apply(x, scale, offset, residual, mean, variance, options)


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch):
    monkeypatch.setattr(fbt, "batch_norm", batch_norm)
    monkeypatch.setattr(torch, "compile", lambda called, **_: called)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setenv("FUSEBN_TRITON", "1")
    with settings.patch(donated_buffer=True):  # put back afterwards
        yield


def a_chip(**facts):
    about = {"torch": "2", "triton": "3"}
    facts = {"copy": 4e12, "read": 4e12, "write": 4e12} | facts
    return chip.Chip("Made Up GPU", 4, 1 << 8, 1 << 30, "9.0", about, **facts)


def measured(*who, shape=SHAPE, dtype="float32", layout="channels-last", verbs=None, told=None):
    plan = Plan((shape,), (layout,), (dtype,), verbs or command.VERBS, 2)
    return list(race.measure(plan, who, a_chip(), told or Told(), CPU))


# ---- right and wrong answers ----


@pytest.mark.parametrize(
    ("dtype", "layout", "shape", "verbs"),
    [
        ("float32", "channels-last", SHAPE, command.VERBS),
        ("bfloat16", "channels-last", SHAPE, command.VERBS),
        ("float16", "channels-first", "3x3x5x4", ("forward", "backward+residual+relu")),
    ],
)
def test_everybody_answers_and_is_timed(dtype, layout, shape, verbs):
    who = OURS, TWO_LAUNCHES, EAGER, COMPILED
    for record in measured(*who, dtype=dtype, layout=layout, shape=shape, verbs=verbs):
        assert record.wrong is None
        assert record.refused == {}
        assert [run.who for run in record.runs] == [one.name for one in who]
        assert all(run.how == "graph" for run in record.runs)
        assert record.held is (record.verb != "inference" and layout == "channels-last")
        assert record.backend == "native"


def test_ours_goes_one_way_and_the_other(monkeypatch):
    launched = []
    for name in ("forward_resident", "moments"):
        right = getattr(interpreted.verbs, name)

        def called(*arguments, _name=name, _right=right, **options):
            launched.append(_name)
            return _right(*arguments, **options)

        monkeypatch.setattr(interpreted.verbs, name, called)
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", "0")  # as a user may have it
    measured(OURS, verbs=("forward",))
    assert set(launched) == {"forward_resident"}
    launched.clear()
    measured(TWO_LAUNCHES, verbs=("forward",))
    assert set(launched) == {"moments"}
    with road_of(EAGER):
        assert contestants.os.environ["FUSEBN_GPU_PERSISTENT"] == "0"


def damaged(contestant, name):
    """Return a contestant that is wrong in one element of y."""

    def make(case, verb, of):
        right = contestant.make(case, verb, of)

        def forward(x, residual):
            y = right(x, residual)
            there = torch.zeros_like(y)
            there[-1, -1] = 0.5
            return y + there

        return forward

    return Contestant(name, "wrong", make)


def test_a_wrong_answer_of_ours_is_not_timed():
    for ours in (OURS, TWO_LAUNCHES):
        told = Told()
        [record] = measured(EAGER, damaged(ours, ours.name), verbs=("forward",), told=told)
        assert record.wrong.startswith("wrong: y is ")
        assert record.runs == []
        assert len(told.prepared) == 1  # PyTorch's


def test_a_wrong_gradient_is_not_timed():
    def make(case, verb, of):
        right = OURS.make(case, verb, of)
        return lambda x, residual: right(x, residual) * 1.5

    records = measured(Contestant("fusebn", "ours", make), verbs=("backward",))
    assert re.match("ours: d(x|scale|offset) is ", records[0].wrong)


def test_a_wrong_answer_of_theirs_is_told_and_left_out():
    [record] = measured(OURS, damaged(EAGER, "eager"), verbs=("forward",))
    assert record.wrong is None
    assert record.refused["eager"].startswith("wrong answer: y is ")
    assert [run.who for run in record.runs] == ["fusebn"]


def test_whoever_raises_is_told_and_the_others_go_on():
    def make(case, verb, of):
        raise RuntimeError("no kernel for this\nat length")

    for failing, rest in ((EAGER, OURS), (OURS, EAGER)):
        [record] = measured(failing._replace(make=make), rest, verbs=("forward",))
        assert record.wrong is None
        assert record.refused == {failing.name: "RuntimeError: no kernel for this"}
        [run] = record.runs
        assert run.who == rest.name
        assert (run.over_ours is None) is (rest is EAGER)


def test_no_memory_is_told(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("of 1 GiB")

    monkeypatch.setattr(race, "Tensors", full)
    for record in measured(OURS, EAGER, verbs=("forward", "inference")):
        assert record.refused == dict.fromkeys(["fusebn", "eager"], "OutOfMemoryError: of 1 GiB")


def test_who_cannot_be_captured_is_marked():
    [record] = measured(OURS, EAGER, verbs=("forward",), told=Told(how="calls", why="it syncs"))
    assert record.notes == {"fusebn": "it syncs", "eager": "it syncs"}
    results = a_result([record])
    page = markdown(results, a_chip())
    assert "| 2.0* |" in page
    assert "Not captured, fusebn: it syncs (1 times)" in page


def test_ratios_are_taken_inside_a_round():
    told = Told(2e-6, 4e-6)  # whoever begins a round takes half as long as the other
    [record] = measured(OURS, EAGER, verbs=("inference",), told=told)
    ours, eager = record.runs
    moved = 2 * 4 * 9 * 64 * 4
    assert ours.over_floor.median == pytest.approx(ours.seconds.median / (moved / 4e12))
    assert eager.over_ours.low in (0.5, 2.0, 0.875)


def test_apex_gets_what_it_takes(monkeypatch):
    class Norm(nn.BatchNorm2d):
        def __init__(self, channels, fuse_relu=False):
            super().__init__(channels)
            self.fuse_relu = fuse_relu

        def forward(self, x, z=None):
            assert x.is_contiguous()
            y = super().forward(x.permute(0, 3, 1, 2))
            y = y if z is None else y + z.permute(0, 3, 1, 2)
            return (y.relu() if self.fuse_relu else y).permute(0, 2, 3, 1)

    for name in ("apex", "apex.contrib", "apex.contrib.groupbn"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    stand_in = types.ModuleType("apex.contrib.groupbn.batch_norm")
    stand_in.BatchNorm2d_NHWC = Norm
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    for record in measured(APEX, dtype="float16"):
        assert record.refused == {}
        assert [run.who for run in record.runs] == ["apex"]
    [record] = measured(APEX, dtype="bfloat16", verbs=("forward",))
    assert record.refused["apex"] == "ValueError: it takes float16 images, channels last"


# ---- the clock ----


class Driver:
    """What the clock asks of CUDA, on a device where a call takes `cost` seconds."""

    def __init__(self, cost):
        self.cost, self.now, self.recorded = cost, 0.0, None
        self.capturable = True
        self.calls = []

    def call(self, number):
        def run():
            self.calls.append(number)
            if self.recorded is None:
                self.now += self.cost
            elif self.capturable:
                self.recorded.count += 1
            else:
                raise RuntimeError("operation not permitted when stream is capturing\nhelp")
            return object()

        return run

    def into(self, monkeypatch):
        driver = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.at = driver.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            count = replayed = 0

            def replay(self):
                self.replayed += 1
                driver.now += self.count * driver.cost

        @contextmanager
        def capture(graph, stream):
            driver.recorded = graph
            try:
                yield
            finally:
                driver.recorded = None

        stream = types.SimpleNamespace(synchronize=lambda: None)
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": lambda _: stream,
            "synchronize": lambda _: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        return self


@pytest.mark.parametrize("copies", [1, 20])
def test_a_graph_goes_through_all_copies(copies, monkeypatch):
    driver = Driver(3e-6).into(monkeypatch)
    timed = clock.CudaClock(CPU).prepare([driver.call(i) for i in range(copies)])
    recorded = driver.calls[min(copies, clock.WARM) :]
    assert recorded == [i % copies for i in range(max(copies, clock.CALLS))]
    before = driver.now
    assert (timed.how, timed.why) == ("graph", None)
    assert timed.turn() == pytest.approx(3e-6)
    assert driver.now - before == pytest.approx(clock.TURN_SECONDS, rel=0.1)
    assert driver.calls[-len(recorded) :] == recorded  # nobody but the graph since


def test_what_is_not_captured_is_called(monkeypatch):
    driver = Driver(2e-3).into(monkeypatch)
    driver.capturable = False
    calls = [driver.call(i) for i in range(2)]
    timed = clock.CudaClock(CPU).prepare(calls)
    assert timed.how == "calls"
    assert timed.why == "operation not permitted when stream is capturing"
    assert timed.turn() == pytest.approx(2e-3)
    timed = clock.CudaClock(CPU).prepare(calls, capture=False)
    assert (timed.how, timed.why) == ("calls", None)


# ---- copies ----


def test_copies_are_more_than_the_cache_holds():
    l2 = 60 << 20
    for moved in (1 << 20, 25 << 20, 1 << 30):
        assert copies_for(moved, l2) * moved >= ROTATION * l2
    assert copies_for(ROTATION * l2, l2) == 1
    assert copies_for(1, l2) == clock.MOST_COPIES


def test_every_copy_has_a_call_of_its_own():
    told, about = Told(), a_chip()
    about.l2 = 1 << 14
    plan = Plan((SHAPE,), ("channels-last",), ("float32",), ("forward", "backward"), 1)
    assert len(list(race.measure(plan, [EAGER], about, told, CPU))) == 2
    assert told.prepared == [3, 3]  # of 2 * 9216 bytes, to three times as much as the cache
    case = Case(SHAPE, "channels-last", "bfloat16")
    tensors = Tensors(case, data_of(case), CPU, 3)
    assert len({x.data_ptr() for x in (*tensors.xs, *tensors.dys, *tensors.residuals)}) == 9
    for x in (*tensors.xs, *tensors.dys):
        assert x.shape == (4, 64, 3, 3)
        assert x.is_contiguous(memory_format=torch.channels_last)


# ---- floors ----


@pytest.mark.parametrize(
    ("dtype", "verb", "one", "two"),
    [  # of 10 * 4 elements: by hand
        ("float32", "forward", 320, 480),
        ("bfloat16", "forward", 160, 240),
        ("float16", "inference", 160, 160),
        ("bfloat16", "backward", 240, 400),
        ("float32", "backward", 480, 800),
        ("bfloat16", "forward+residual+relu", 240, 320),
        ("bfloat16", "backward+residual+relu", 320 + 5, 480 + 5),
        ("float32", "backward+residual+relu", 640 + 5, 960 + 5),
    ],
)
def test_bytes_that_must_be_moved(dtype, verb, one, two):
    assert traffic(Case("10x4", "channels-last", dtype), VERBS[verb]) == (one, two)


def test_floors_are_bytes_over_the_speed_of_a_copy():
    [record] = measured(EAGER, verbs=("backward",))
    tensor = 4 * 9 * 64 * 4
    assert record.one_sweep == pytest.approx(3 * tensor / 4e12)
    assert record.two_sweeps == pytest.approx(5 * tensor / 4e12)
    assert record.slab == 2 * 36 * 128


def test_counts_are_those_of_the_network():
    with torch.device("meta"):
        network = ResNet50()
        images = torch.empty(32, 3, 224, 224)
    seen = dict.fromkeys(RESNET50, 0)

    def count(_module, inputs, _output):
        batch, channels, height, width = inputs[0].shape
        seen[f"{batch}x{height}x{width}x{channels}"] += 1

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count)
    network(images)
    assert seen == COUNTS
    assert sum(seen.values()) == 53


def test_what_is_held_is_what_the_docs_say():
    text = " ".join((Path(__file__).parents[2] / "docs" / "gpu.md").read_text().split())
    for arrays, rows in ((1, 135_168), (2, 67_584)):
        assert f"{rows:,}" in text
        assert is_held((rows, 64, 1), rows * 128, 132, arrays)
        assert not is_held((rows + 1, 64, 1), (rows + 1) * 128, 132, arrays)


# ---- sums and goals ----


def a_record(shape, verb, seconds, dtype="bfloat16", layout="channels-last", **facts):
    """Return a record of who took how long; a copy is 4 TB/s."""
    case = Case(shape, layout, dtype)
    moved = traffic(case, VERBS[verb])
    record = DeviceRecord(
        shape, layout, dtype, verb, case.bytes, one_sweep=moved.one_sweep / 4e12,
        two_sweeps=moved.two_sweeps / 4e12, slab=case.block[0] * 128, **facts,
    )  # fmt: skip
    for who, value in seconds.items():
        of = [value, value / record.one_sweep, value / seconds["fusebn"]]
        record.runs.append(DeviceRun(who, "warm", *(Spread(v, v, v) for v in of)))
    return record


def a_result(records, rounds=2, **facts):
    where = {"device": "Made Up GPU", "cpu": "a CPU", "date": "2026-11-21T00:00:00"}
    titles = {who.name: who.title for who in contestants.CONTESTANTS}
    peers = {"fusebn-2": "", "eager": "2", "compile": ""}
    results = DeviceResults(where, peers, rounds, titles=titles, **facts)
    results.records = records
    return results


def test_a_sum_is_over_all_53():
    shapes = [at_batch(shape, 8) for shape in RESNET50]
    records = [a_record(shape, "forward", {"fusebn": 1.0, "eager": 3.0}) for shape in shapes]
    [row] = sums(a_result(records))
    assert (row.batch, row.seconds) == (8, {"fusebn": 53.0, "eager": 159.0})
    assert row.two_sweeps == pytest.approx(row.one_sweep * 1.5)
    assert list(sums(a_result(records[1:]))) == []
    page = markdown(a_result(records), a_chip())
    assert "## All 53 of ResNet-50, bfloat16: milliseconds" in page
    assert "| 53000.00 | 159000.00 |" in page
    records[0].runs.pop()  # who was not measured once has no sum
    [row] = sums(a_result(records))
    assert row.seconds == {"fusebn": 53.0}


def test_the_floor_of_the_network_is_known():
    shapes = [at_batch(shape, 256) for shape in RESNET50]
    records = [a_record(shape, "forward", {"fusebn": 1.0}) for shape in shapes]
    [row] = sums(a_result(records))
    assert row.one_sweep * 4 / 4.3 == pytest.approx(2.65e-3, rel=0.01)
    assert row.two_sweeps * 4 / 4.3 == pytest.approx(3.97e-3, rel=0.01)


def judged(records, name, **facts):
    [goal] = [goal for goal in goals(a_result(records, **facts)) if goal.name == name]
    return goal


def test_without_numbers_no_goal_is_met_or_missed():
    found = goals(a_result([]))
    assert len({goal.name for goal in found}) == len(found) > 20
    assert all(goal.measured is None and goal.met is None for goal in found)


@pytest.mark.parametrize(("share", "met"), [(0.83, True), (0.81, False)])
def test_a_goal_is_judged_by_its_worst_shape(share, met):
    name = "50 MB and more, slabs on the chip, forward"
    shapes = {"256x14x14x1024": 0.9, "256x14x14x512": share}
    records = []
    for shape, part in shapes.items():
        floor = a_record(shape, "forward", {"fusebn": 1.0}).one_sweep
        records.append(a_record(shape, "forward", {"fusebn": floor / part}, held=True))
    goal = judged(records, name)
    assert goal.target == "at least 82 % of one sweep"
    assert goal.measured == f"{100 * share:.0f} % of one sweep, 256x14x14x512"
    assert goal.met is met
    for record in records:
        record.held = False
    assert judged(records, name).measured is None


def test_times_and_regimes():
    small = a_record("32x7x7x512", "backward", {"fusebn": 9.5e-6, "eager": 30e-6})
    goal = judged([small], "up to 6.4 MB, backward")
    assert (goal.target, goal.measured) == ("at most 9.0 µs", "9.5 µs, 32x7x7x512")
    assert goal.met is False
    assert judged([small], "up to 6.4 MB, against PyTorch, backward").met is True
    large = a_record("256x112x112x64", "forward", {"fusebn": 320e-6})
    goal = judged([small, large], "larger, forward")
    assert (goal.measured, goal.met) == ("96 % of two sweeps, 256x112x112x64", True)


def test_cudnn_is_who_serves_float16():
    name = "on the chip, against cuDNN in float16, forward"
    ours = a_record("32x56x56x64", "forward", {"fusebn": 10e-6}, held=True)
    theirs = a_record("32x56x56x64", "forward", {"fusebn": 1.0, "eager": 14e-6}, "float16")
    assert judged([ours, theirs], name).measured is None
    theirs.backend = "cudnn"
    goal = judged([ours, theirs], name)
    assert (goal.measured, goal.met) == ("1.40 x, 32x56x56x64", True)


def test_totals_and_layouts():
    shapes = [at_batch(shape, 256) for shape in RESNET50]
    records = [a_record(shape, "backward", {"fusebn": 1e-4}) for shape in shapes]
    goal = judged(records, "all 53 of ResNet-50 at batch 256, backward")
    assert (goal.target, goal.measured, goal.met) == ("at most 5.6 ms", "5.30 ms", True)
    first = a_record(shapes[0], "backward", {"fusebn": 1.2e-4}, layout="channels-first")
    goal = judged([*records, first], "channels first over channels last, backward")
    assert (goal.measured, goal.met) == ("1.20 x, mean of 1", False)


# ---- the machine ----


def test_probes_do_what_they_say():
    x = torch.arange(10_000, dtype=torch.int32)
    y, found = torch.zeros_like(x), torch.zeros(3, dtype=torch.int32)
    chip._over(probes.copy_kernel, x, y, x.numel())
    assert torch.equal(x, y)
    chip._read(x, found)
    assert found.tolist() == [4095, 8191, 9999]
    chip._over(probes.write_kernel, y.zero_(), y.numel())
    assert torch.equal(x, y)


def test_every_byte_is_read_each_time():
    x, found = torch.arange(10_000, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with interpreted.traffic(x) as [counted]:
        chip._read(x, found, 3)
    assert (counted.loads == 3).all()
    assert found.tolist() == [9999] * 3  # each program all of it, part by part


def test_programs_wait_so_many_times():
    arrived = torch.zeros(1, dtype=torch.int32)
    together = interpreted.Together(probes.barrier_kernel)
    together[(4,)](arrived, 3, 4, num_warps=8, launch_cooperative_grid=True)
    assert arrived.item() == -(2**31)  # flipped three times


def test_probes_move_16_bytes_at_once():
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "compiled_probes.py"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = {one["kernel"]: one for one in map(json.loads, run.stdout.splitlines())}
    assert len(found) == 5

    def wide(kernel, what):
        instructions = found[kernel]["instructions"].items()
        return sum(n for name, n in instructions if what in name and "128" in name)

    for kernel, loads, stores in (("copy", 4, 4), ("read", 4, 0), ("write", 0, 4)):
        assert (wide(kernel, "LDG"), wide(kernel, "STG")) == (loads, stores), found[kernel]
        assert found[kernel]["stack"] == found[kernel]["local"] == 0
    assert found["barrier"]["acquires"]
    assert found["barrier"]["releases"]


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr(probes, "barrier_kernel", interpreted.Together(probes.barrier_kernel))
    about = a_chip(copy=0.0)
    chip.measure(about, Told(1e-6), CPU, 1 << 16, (1 << 14,))
    assert about.copy == pytest.approx(2 * (1 << 16) / 1e-6)
    assert about.read == about.write == pytest.approx((1 << 16) / 1e-6)
    assert about.rereads == {1 << 14: pytest.approx(chip.REREADS * (1 << 14) / 1e-6)}
    ways = [
        (kind, how) for kind in ("empty", "cooperative") for how in ("in a graph", "from Python")
    ]
    assert list(about.launches) == [f"{kind}, {how}" for kind, how in ways]
    assert about.barriers == {4: 0.0}
    assert about.unable == {}
    json.dumps(asdict(about), allow_nan=False)


def test_what_a_driver_refuses_is_told(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("too large for a cooperative launch")

    monkeypatch.setattr(probes, "barrier_kernel", {(4,): refuse})
    about = a_chip()
    chip.measure(about, Told(), CPU, 1 << 14, ())
    assert about.unable == {"barriers": "RuntimeError: too large for a cooperative launch"}


# ---- the command ----


class Small(nn.Sequential):
    """In place of ResNet-50."""

    def __init__(self, classes):
        pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes)
        super().__init__(nn.Conv2d(3, 16, 1), Bottleneck(16, 4), *pooled)


@pytest.fixture
def made_up(monkeypatch):
    """Let the command find a device."""
    everybody = OURS, TWO_LAUNCHES, EAGER, COMPILED
    ground = command.Ground(CPU, Told(), a_chip(), 1 << 14, (1 << 14,), everybody)
    monkeypatch.setattr(command, "check", lambda wish: None)
    monkeypatch.setattr(command, "ground", lambda wish: ground)
    monkeypatch.setattr(probes, "barrier_kernel", interpreted.Together(probes.barrier_kernel))
    monkeypatch.setattr(torch_networks, "ResNet50", Small)
    monkeypatch.setattr(torch_networks, "LOSSES", 3)
    monkeypatch.setattr(training, "SUITE", training.SUITE._replace(shapes=("4x5x5x3",)))
    return ground


def run(*arguments):
    return CliRunner().invoke(bench, ["--device", "cuda", *map(str, arguments)])


def test_a_run_writes_json_markdown_and_a_plot(made_up, tmp_path):
    result = run("--shape", SHAPE, "--dtype", "bfloat16", "--layout", "channels-last",
                 "--repeats", 1, "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if "wrote" not in line)
    [path] = tmp_path.glob("*.json")
    assert path.stem.endswith("made-up-gpu")
    found = json.loads(path.read_text())
    assert found["device"] is True
    assert found["chip"]["processors"] == 4
    assert found["sums"] == []  # of one shape
    assert [record["verb"] for record in found["records"]] == list(command.VERBS)
    for record in found["records"]:
        assert [run["who"] for run in record["runs"]] == ["fusebn", "fusebn-2", "eager", "compile"]
    assert {run["step"] for run in found["training"]["records"][0]["runs"]} == {
        "eager", "compile", "fusebn", "both",
    }  # fmt: skip
    by_name = {goal["name"]: goal for goal in found["goals"]}
    assert by_name["up to 6.4 MB, forward"]["measured"] is None  # the shape is not ResNet-50's
    assert by_name["a training step of ResNet-50, against PyTorch"]["met"] is False  # 1 x
    page = path.with_suffix(".md").read_text()
    for part in ("barrier of 4 programs", "## Goals", "not measured", SHAPE, "torch.compile"):
        assert part in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(path.with_suffix(".svg"))


def test_a_part_alone(made_up, tmp_path):
    path = tmp_path / "machine.json"
    result = run("--part", "machine", "--json", path)
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert (found["records"], found["training"]) == ([], None)
    result = run("--part", "resnet", "--repeats", 1, "--json", path)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["training"]["records"][0]["wrong"] is None


def test_a_wrong_answer_ends_with_status_1(made_up, monkeypatch):
    wrong = made_up._replace(contestants=(damaged(OURS, "fusebn"), EAGER))
    monkeypatch.setattr(command, "ground", lambda wish: wrong)
    result = run("--part", "verbs", "--shape", SHAPE, "--dtype", "float32",
                 "--layout", "channels-last", "--verb", "forward")  # fmt: skip
    assert result.exit_code == 1
    assert "WRONG: wrong: y is" in result.output
    assert "A wrong answer was refused" in result.output


def test_a_quick_run_says_what_it_left_out(made_up, monkeypatch):
    monkeypatch.setattr(race, "perf_counter", lambda: 1e12)
    monkeypatch.setattr(command, "perf_counter", lambda: 1e12)
    result = run("--quick")
    assert result.exit_code == 0, result.output
    assert "No time was left for 20 of 20 cases." in result.output
    assert "No time was left for ResNet-50, a training step: --part resnet" in result.output


def words(result):
    return " ".join(result.output.split())


def test_without_a_gpu_it_says_what_is_missing(monkeypatch):
    result = run()
    assert result.exit_code == 2
    assert "would measure Triton's interpreter: unset TRITON_INTERPRET" in words(result)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "cuda", None)
    result = run()
    assert result.exit_code == 2
    assert f"needs a PyTorch built for CUDA; this is {torch.__version__}" in words(result)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    assert result.exit_code == 2
    assert "needs an NVIDIA GPU; PyTorch" in words(result)
    assert "`nvidia-smi` must list one" in words(result)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_gpu, "WANTED", False)
    result = run()
    assert result.exit_code == 2
    assert "set FUSEBN_TRITON=1 before fusebn.torch is imported" in words(result)


def test_what_does_not_fit_is_refused(monkeypatch):
    for options in (("--busy",), ("--torch",)):
        result = run(*options)
        assert result.exit_code == 2
        assert f"{options[0]} does not go with --device cuda" in words(result)
    result = run("--part", "layers")
    assert "the parts of --device cuda are machine, verbs, resnet; got layers" in words(result)
    result = run("--peers", "jax")
    assert "the peers of --device cuda are torch, compile, apex, none; got jax" in words(result)
    result = CliRunner().invoke(bench, ["--peers", "compile"])
    assert result.exit_code == 2
    assert "--peers compile goes with --device cuda" in words(result)
    found = command.__name__
    from fusebn.cli.bench import command as cli

    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "triton" else found)
    assert "pip install 'fusebn[cli,triton]'" in words(run())


def test_peers_are_those_that_are_asked_for_and_there(monkeypatch):
    ours = (OURS, TWO_LAUNCHES)
    assert contestants.present(()) == (*ours, EAGER, COMPILED)  # Apex is not installed
    assert contestants.present(("none",)) == ours
    assert contestants.present(("compile",)) == (*ours, COMPILED)
    monkeypatch.setattr(contestants, "find_spec", lambda name: name == "apex")
    assert contestants.present(("torch", "apex")) == (*ours, EAGER, APEX)


def test_files_are_named_by_the_device():
    where = {"device": "NVIDIA H200", "date": "2026-11-21T10:00", "cpu": "x"}
    assert file_stem(where) == "2026-11-21-nvidia-h200"
