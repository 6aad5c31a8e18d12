"""`fusebn bench --tensorflow`: what it checks, refuses and writes. Never how fast anything is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner, Result

from fusebn.cli.bench import bench, command
from fusebn.cli.bench.answers import Answer, sampled
from fusebn.cli.bench.cases import RESNET50, VERBS, Case, data_of
from fusebn.cli.bench.machine import file_stem, machine
from fusebn.cli.bench.ours import Ours
from fusebn.cli.bench.runner import Plan
from fusebn.cli.bench.steps import Crew, StepRecord, StepResults, measure, summary
from fusebn.cli.bench.steps_report import markdown
from fusebn.cli.bench.suites import TENSORFLOW, Step
from fusebn.cli.bench.worker import Worker, memories

SHAPES = ("2x3x3x4", "3x5x6")
STEPS = TENSORFLOW.steps


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench, ["--tensorflow", *map(str, arguments)])


def test_every_way_is_measured_and_written(tmp_path: Path) -> None:
    shapes = [part for shape in SHAPES for part in ("--shape", shape)]
    result = run(*shapes, "--repeats", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if "wrote" not in line)
    stem = f"{file_stem(machine())}-tensorflow"
    found = json.loads((tmp_path / f"{stem}.json").read_text())
    assert len(found["records"]) == len(SHAPES) * 2 * 2  # layouts, types
    for record in found["records"]:
        assert record["wrong"] is None
        assert record["refused"] == {}
        runs = {(run["step"], run["memory"]): run for run in record["runs"]}
        assert runs.keys() == {(step, memory) for step in STEPS for memory in memories()}
        assert all(run["seconds"]["median"] > 0 for run in runs.values())
        assert runs["fusebn", "fresh"]["over_ours"]["median"] == 1
    assert len(found["summary"]) == 2 * 2 * len(memories())
    page = (tmp_path / f"{stem}.md").read_text()
    for part in (*SHAPES, "bfloat16", *(step.title for step in STEPS.values())):
        assert part in page


# ---- answers ----


class Planted:
    """A worker whose answers are right but for one array of one step."""

    memory = "fresh"

    def __init__(self, case: Case, step: str, array: str) -> None:
        self._ours = Ours(case, data_of(case))
        self._step, self._array = step, array

    def load(self, case: Case) -> None: ...

    def prepare(self, step: Step, *, keep: bool) -> Answer:
        forward, backward = (self._ours.answers(VERBS[verb])[0] for verb in ("forward", "backward"))
        answer = sampled(forward | backward, self._ours.case)
        if step.name == self._step:
            answer[self._array] = answer[self._array] + 0.5
        return answer

    def turn(self, step: Step, count: int) -> float:
        return 3.0 if step.name in ("flag", "moments") else 2.0


def measured(step: str, array: str) -> StepRecord:
    plan = Plan(SHAPES[:1], ("channels-last",), ("float32",), (), 2)
    worker = cast(Worker, Planted(plan.cases()[0], step, array))
    [record] = measure(TENSORFLOW, plan, [Crew(worker, tuple(STEPS.values()))])
    return record


@pytest.mark.parametrize("array", ["y", "mean", "variance", "dx", "dscale", "doffset"])
@pytest.mark.parametrize(
    "step", [step for step in STEPS.values() if step.ours], ids=lambda step: step.name
)
def test_a_wrong_answer_of_ours_ends_the_case(step: Step, array: str) -> None:
    record = measured(step.name, array)
    assert record.wrong is not None
    assert record.wrong.startswith(f"{step.title}: {array} is ")
    assert record.runs == []


def test_a_wrong_answer_of_theirs_is_not_timed() -> None:
    record = measured("moments", "dx")
    assert record.wrong is None
    assert record.refused.keys() == {"moments fresh"}
    assert record.refused["moments fresh"].startswith("dx is ")
    assert {run.step for run in record.runs} == STEPS.keys() - {"moments"}


def test_ratios_are_to_the_step_that_does_the_same() -> None:
    record = measured("nobody", "y")
    ratios = {run.step: run.over_ours and run.over_ours.median for run in record.runs}
    assert ratios == {"fusebn": 1, "flag": 1.5, "fused": 1, "moments": 1.5, "cond": 2 / 3}


def test_means_are_geometric_and_over_the_shapes() -> None:
    results = StepResults(
        TENSORFLOW, machine(), "2", 2, [measured("nobody", "y"), measured("fused", "y")]
    )
    [row] = summary(results)
    assert (row.shapes, row.memory) == (2, "fresh")
    assert row.over_ours == pytest.approx(
        {"fusebn": 1, "flag": 1.5, "fused": 1, "moments": 1.5, "cond": 2 / 3}
    )
    assert "Not measured, 1 times: fused_batch_norm: y is" in markdown(results, "--tensorflow")


# ---- arguments ----


@pytest.mark.parametrize(
    "option", [("--verb", "forward"), ("--peers", "torch"), ("--busy",), ("--plot", "x.png")]
)
def test_what_belongs_to_verbs_is_refused(option: tuple[str, ...]) -> None:
    result = run(*option)
    assert result.exit_code == 2
    assert f"{option[0]} does not go with --tensorflow" in result.output


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    result = run()
    assert result.exit_code == 2
    assert "pip install 'fusebn[cli,tensorflow]'" in result.output


def test_the_shapes_are_those_of_resnet_50() -> None:
    assert len(RESNET50) == 12
    elements = [math.prod(map(int, shape.split("x"))) for shape in RESNET50]
    assert min(elements) == 32 * 7 * 7 * 512
