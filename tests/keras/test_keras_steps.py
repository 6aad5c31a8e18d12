"""`fusebn bench --keras`: what it checks, refuses and writes. Never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from click.testing import CliRunner, Result

import fusebn
import fusebn.keras as fbk
from fusebn.cli.bench import bench, comparison
from fusebn.cli.bench.answers import Agreement, Truth, Wrong, sampled
from fusebn.cli.bench.cases import VERBS, Case, data_of
from fusebn.cli.bench.machine import file_stem, machine
from fusebn.cli.bench.peers import keras_layers, keras_networks
from fusebn.cli.bench.suites import FRAMEWORKS, KERAS

# Keras makes arrays of TensorFlow's tensors in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LAYERS, FIT = KERAS[keras.backend.backend()]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench, ["--keras", *map(str, arguments)])


@pytest.fixture(autouse=True)
def threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer has a process of its own; in this one the backend's threads run already."""
    monkeypatch.setattr(keras_layers, "prepare", lambda threads: "")
    monkeypatch.setattr(keras_networks, "prepare", lambda threads: "")


def test_a_backend_is_measured_in_a_process_that_has_it(tmp_path: Path) -> None:
    result = run("--part", "torch", "--shape", "4x5x3x6", "--repeats", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if "wrote" not in line)
    stem = tmp_path / f"{file_stem(machine())}-keras-torch"
    found = json.loads(Path(f"{stem}.json").read_text())
    assert " on torch 2." in found["version"]
    [record] = found["records"]
    assert record["wrong"] is None
    assert record["refused"] == {}
    ways = {(run["step"], run["memory"]) for run in record["runs"]}
    suite = KERAS["torch"][0]
    assert ways == {(step, memory) for step in suite.steps for memory in suite.memories}
    assert all(step.title in Path(f"{stem}.md").read_text() for step in suite.steps.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_gives_the_right_answer(dtype: str) -> None:
    peer, case = keras_layers.Layers(1), Case("4x3x5x2", "channels-last", dtype)
    data = data_of(case)
    truth = Truth(case, data)
    peer.load(case, data)
    for step in LAYERS.steps.values():
        answer = sampled(peer.answer(step, peer.call(step)()), case)
        assert answer.keys() == {"y", "dx", "dscale", "doffset", "mean", "variance"}
        for verb in step.verbs:
            truth.check(VERBS[verb], answer, peer=not step.ours)
            with pytest.raises(Wrong):  # so what it checks is there
                truth.check(VERBS[verb], {n: a + 1 for n, a in answer.items()}, peer=True)


def test_a_network_learns_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras_networks, "BLOCKS", 1)
    monkeypatch.setattr(keras_networks, "RATE", 0.01)
    case = Case("8x8x8x3", "channels-last", "float32")
    agreement = Agreement(case)
    for step in FIT.steps.values():
        peer = keras_networks.Networks(1)
        peer.load(case, data_of(case))
        answer = peer.answer(step, peer.call(step)())
        assert 2**24 < answer.pop("peak")[0] < 2**36
        losses = answer["losses"]
        assert len(losses) == keras_networks.EPOCHS
        assert losses[-1] < losses[0]
        agreement.check(answer)
        with pytest.raises(Wrong, match="losses is"):
            agreement.check({"losses": losses + 0.1})


def test_the_network_is_resnet_20() -> None:
    model = keras_networks.resnet((32, 32, 3), "float32")
    found = [type(layer).__name__ for layer in model.layers]
    assert found.count("Conv2D") - 2 + found.count("Dense") == 20  # shortcuts are not counted
    weights = sum(np.prod(weight.shape) for weight in model.trainable_weights)
    # The paper's 0.27 million, and the two shortcuts of 1x1 with their batch norms.
    assert weights == 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)
    report = fbk.explain(fbk.fuse(model))
    assert sum(row.residual for row in report) == 9
    assert sum(row.activation == "relu" for row in report) == 19


def test_the_backend_and_we_use_so_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    told: list[int] = []
    torch = SimpleNamespace(set_num_threads=told.append, __version__="2")
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    monkeypatch.setattr(keras_layers.importlib, "import_module", lambda name: torch)
    assert keras_layers.prepare(3) == f"{keras.__version__} on torch 2"
    assert told == [3]
    assert fusebn.get_num_threads() == 3


# ---- arguments ----


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    def find_spec(name: str) -> Any:
        return None if name in packages else object()

    monkeypatch.setattr(comparison, "find_spec", find_spec)


def test_a_backend_that_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "jax", "tensorflow")
    monkeypatch.setattr(comparison, "perf_counter", lambda: 1e12)  # so nothing is started
    result = run("--quick")
    assert result.exit_code == 0, result.output
    told = [suite.part for suite in FRAMEWORKS["keras"] if f"--part {suite.part}" in result.output]
    assert told == ["torch", "torch-fit"]


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        (("jax",), ("--part", "jax-fit"), "--part jax-fit needs jax: pip install 'fusebn[jax]'"),
        (("jax", "torch", "tensorflow"), (), "none of jax, tensorflow, torch is installed"),
        ((), ("--part", "layers"), "the parts of --keras are tensorflow, tensorflow-fit, torch"),
        ((), ("--shape", "8x4"), "--shape needs one --part: tensorflow, tensorflow-fit, torch"),
    ],
)
def test_what_does_not_fit_is_refused(
    missing: tuple[str, ...],
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, *missing)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
