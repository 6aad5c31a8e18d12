"""`fusebn bench --jax`: what it checks, refuses and writes. Never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import fusebn.jax.linen as fbl
from fusebn.cli.bench import bench, command
from fusebn.cli.bench.answers import Truth, Wrong, sampled
from fusebn.cli.bench.cases import VERBS, Case, data_of
from fusebn.cli.bench.machine import file_stem, machine
from fusebn.cli.bench.peers.jax_layers import Layers
from fusebn.cli.bench.suites import JAX_INFERENCE, JAX_LAYERS


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench, ["--jax", *map(str, arguments)])


def test_a_part_is_measured_and_written(tmp_path: Path) -> None:
    options = ("--dtype", "float32", "--repeats", 1, "--layout", "channels-last")
    result = run("--part", "inference", "--shape", "4x5x3x6", *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if "wrote" not in line)
    stem = tmp_path / f"{file_stem(machine())}-jax-inference"
    [record] = json.loads(Path(f"{stem}.json").read_text())["records"]
    assert record["wrong"] is None
    assert record["refused"] == {}
    ways = {(run["step"], run["memory"]) for run in record["runs"]}
    suite = JAX_INFERENCE
    assert ways == {(step, memory) for step in suite.steps for memory in suite.memories}
    assert all(step.title in Path(f"{stem}.md").read_text() for step in suite.steps.values())


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ("8x4", "channels-last", "float32"),
        ("4x3x5x2", "channels-last", "bfloat16"),
        ("4x3x5x2", "channels-first", "float32"),
    ],
)
def test_every_step_gives_the_right_answer(shape: str, layout: str, dtype: str) -> None:
    peer, case = Layers(1), Case(shape, layout, dtype)
    data = data_of(case)
    truth = Truth(case, data)
    peer.load(case, data)
    for suite in (JAX_LAYERS, JAX_INFERENCE):
        for step in suite.steps.values():
            answer = sampled(peer.answer(step, peer.call(step)()), case)
            for verb in step.verbs:
                truth.check(VERBS[verb], answer, peer=not step.ours)
                with pytest.raises(Wrong):  # so what it checks is there
                    truth.check(VERBS[verb], {n: a + 1 for n, a in answer.items()}, peer=True)


def test_calls_are_those_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    right = fbl.BatchNorm.__call__

    def call(
        self: fbl.BatchNorm, x: object, use_running_average: object, **options: object
    ) -> object:
        kind = type(use_running_average).__name__
        called.append((self.activation, kind, "residual" in options))
        return right(self, x, use_running_average, **options)

    monkeypatch.setattr(fbl.BatchNorm, "__call__", call)
    peer, case = Layers(1), Case("8x4", "channels-last", "float32")
    peer.load(case, data_of(case))
    for name in ("fusebn", "flag", "fusebn-chain"):
        peer.call(JAX_LAYERS.steps[name])()
    plain, flag, chain = called
    assert plain == (None, "bool", False)
    assert flag[1].endswith("Tracer")
    assert chain == ("relu", "bool", True)


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "flax" else object())
    result = run()
    assert result.exit_code == 2
    assert "--jax needs jax and flax: pip install 'fusebn[cli,flax]'" in result.output


def test_a_part_of_another_framework_is_refused() -> None:
    result = run("--part", "resnet")
    assert result.exit_code == 2
    assert "the parts of --jax are layers, inference; got resnet" in result.output
