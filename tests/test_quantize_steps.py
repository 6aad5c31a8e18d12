"""`fusebn bench --quantize`: that every way is measured, and gives the answer of the others."""

import json

import pytest
from click.testing import CliRunner

from fusebn.cli.bench import bench
from fusebn.cli.bench.suites import QUANTIZE


@pytest.mark.parametrize("part", ["torch", "tensorflow", "jax", "keras-jax"])
def test_every_way_is_measured(part, tmp_path):
    path = tmp_path / "found.json"
    arguments = [
        "--quantize",
        "--part",
        part,
        "--shape",
        "2x4x5x16",
        "--repeats",
        1,
        "--json",
        path,
    ]
    result = CliRunner().invoke(bench, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    [suite] = (suite for suite in QUANTIZE if suite.part == part)
    [record] = json.loads(path.read_text())["records"]
    assert record["refused"] == {}
    assert record["wrong"] is None
    ways = {(run["step"], run["memory"]) for run in record["runs"]}
    assert ways == {(step, memory) for step in suite.steps for memory in suite.memories}
    for run in record["runs"]:
        assert run["over_ours"]["median"] > 0


def test_each_framework_has_a_part():
    assert [suite.part for suite in QUANTIZE] == [
        "torch", "tensorflow", "jax", "keras-tensorflow", "keras-torch", "keras-jax",
    ]  # fmt: skip
