"""`fusebn demo --framework keras`, as a person types it: a process of its own for each backend."""

from __future__ import annotations

import math
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import fusebn.keras as fbk
from fusebn.cli.demo.digits import split
from terminal import Demo, Page, printed_rows, type_in, type_in_demo

EPOCHS = 2
OPTIONS = ("--framework", "keras", "--seed", 0, "--epochs", EPOCHS)
NORMS = {
    "norm": "relu",
    "block0_norm1": "relu",
    "block0_norm2": "addition, relu",
    "block1_norm1": "relu",
    "block1_norm2": "addition, relu",
    "block1_norm3": "nothing",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return type_in_demo(tmp_path_factory.mktemp("demo"), "keras", *OPTIONS)


def cells(out: str, first: str, width: int) -> list[str]:
    """Return the row of so many cells that begins so."""
    [row] = [row for row in printed_rows(out) if row[0] == first and len(row) == width]
    return row[1:]


def held_out(demo: Demo, network: str) -> float:
    return float(cells(demo.out, network, 6)[0].removesuffix(" %"))


def test_both_networks_recognize_the_digits(demo: Demo) -> None:
    assert held_out(demo, "as it is") >= 96
    assert abs(held_out(demo, "as it is") - held_out(demo, "after fuse")) < 1
    found = re.search(r"(\d+\.\d) % of the held-out digits recognized", demo.out)
    assert found
    assert float(found[1]) == held_out(demo, "after fuse")


def test_the_fused_network_follows_float64(demo: Demo) -> None:
    assert float(cells(demo.out, "after fuse", 6)[2]) < 1e-5


def test_times_stand_side_by_side(demo: Demo) -> None:
    for network in ("as it is", "after fuse"):
        seconds, memory = cells(demo.out, network, 6)[3:]
        assert re.fullmatch(r"\d+\.\d ms", seconds)
        assert memory == "-"  # TensorFlow keeps it: nothing can be seen


def test_every_batch_norm_is_one_layer(demo: Demo) -> None:
    assert {name: cells(demo.out, name, 2) for name in NORMS} == {n: [f] for n, f in NORMS.items()}


def test_inference_changes_no_byte(demo: Demo) -> None:
    for name in NORMS:
        width, changed = cells(demo.out, name, 3)
        assert int(width) % 64 == 0  # four vectors of float32, of 16 channels or 32
        assert changed == "0"


def test_padding_leaves_the_statistics_alone(demo: Demo) -> None:
    before, after = map(float, cells(demo.out, "ours", 3))
    assert before == after > 0.1
    before, after = map(float, cells(demo.out, "Keras's", 3))
    assert after < before / 5


def test_the_model_loads_elsewhere(demo: Demo) -> None:
    size, same, difference = printed_rows(demo.out.split("largest difference of a logit")[1])[2]
    assert int(size.replace(",", "")) == demo.model.stat().st_size
    assert same == "360 of 360"
    assert float(difference) < 1e-3
    model, digits = keras.models.load_model(demo.model), split(0)[1]
    assert isinstance(model.get_layer("norm"), fbk.BatchNormalization)
    logits = model.predict_on_batch(digits.images.reshape(-1, 8, 8, 1))
    right = np.mean(np.argmax(logits, 1) == digits.labels)
    assert f"{100 * right:.1f}" == f"{held_out(demo, 'after fuse'):.1f}"


def test_the_report_is_whole_and_has_the_tables_of_the_terminal(demo: Demo) -> None:
    text = demo.report.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert f"Keras {keras.__version__} on {keras.backend.backend()}" in text
    assert len([tag for tag, _ in page.attributes if tag == "svg"]) == 6
    rows, printed = [row for row in page.rows if row], printed_rows(demo.out)
    assert len(rows) == 4 + 2 + 6 + 6 + 4 + 2 + 1
    assert all(row in printed for row in rows)


def test_lines_fit_80_columns(demo: Demo) -> None:
    lines = [line for line in demo.out.splitlines() if not line.startswith(("Report:", "Model:"))]
    assert max(map(len, lines)) <= 80


def test_the_backend_is_that_of_the_environment(tmp_path: Path) -> None:
    """On PyTorch Keras's layer loses the variance of a bright background, and ours does not."""
    options = ("--framework", "keras", "--epochs", 1, "--out", tmp_path)
    code, out, err = type_in("demo", *options, KERAS_BACKEND="torch")
    assert (code, err) == (0, "")
    assert "on torch 2." in out
    theirs, ours = map(float, cells(out, "10,000", 3))
    assert math.isnan(theirs)
    assert ours == pytest.approx(0.9965, abs=1e-4)
    for network in ("as it is", "after fuse"):
        assert re.fullmatch(r"[1-9]\d* MiB", cells(out, network, 6)[-1])
