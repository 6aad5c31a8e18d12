"""`fusebn demo --framework jax`, as a person types it."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax import serialization

from fusebn.cli.demo.digits import split
from fusebn.cli.demo.jax.network import Network
from terminal import Demo, Page, printed_rows, type_in_demo

OPTIONS = ("--framework", "jax", "--seed", 5, "--epochs", 2)
NORMS = ("norm", "block0.norm1", "block0.norm2", "block1.norm1", "block1.norm2", "block1.norm3")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return type_in_demo(tmp_path_factory.mktemp("demo"), "msgpack", *OPTIONS)


def cells(demo: Demo, first: str, width: int) -> list[str]:
    """Return the row of so many cells that begins so."""
    [row] = [row for row in printed_rows(demo.out) if row[0] == first and len(row) == width]
    return row[1:]


def held_out(demo: Demo, network: str) -> float:
    return float(cells(demo, network, 6)[0].removesuffix(" %"))


def test_both_networks_recognize_the_digits(demo: Demo) -> None:
    assert held_out(demo, "Flax's") >= 96
    assert held_out(demo, "ours") >= 96
    assert abs(held_out(demo, "Flax's") - held_out(demo, "ours")) < 1
    found = re.search(r"(\d+\.\d) % of the held-out digits recognized", demo.out)
    assert found
    assert float(found[1]) == held_out(demo, "ours")


def test_ours_follows_float64(demo: Demo) -> None:
    assert float(cells(demo, "ours", 6)[2]) < 1e-5


def test_times_and_memory_stand_side_by_side(demo: Demo) -> None:
    for network in ("Flax's", "ours"):
        seconds, memory = cells(demo, network, 6)[3:]
        assert re.fullmatch(r"\d+\.\d ms", seconds)
        assert re.fullmatch(r"\d+ MiB", memory)
        assert int(memory.split()[0]) > 0


def test_one_program_serves_both_modes(demo: Demo) -> None:
    assert cells(demo, "Flax's", 4) == ["a Python bool, static", "2", "0"]
    assert cells(demo, "ours", 4) == ["traced", "1", "0"]


def test_inference_changes_no_byte(demo: Demo) -> None:
    for name in NORMS:
        width, changed = cells(demo, name, 3)
        assert int(width) % 64 == 0  # four vectors of float32, of 16 channels or 32
        assert changed == "0"


def test_a_bright_background_changes_nothing(demo: Demo) -> None:
    rows = [cells(demo, added, 3) for added in ("0", "100", "1,000", "10,000")]
    assert [ours for _, ours in rows] == ["1.0000"] * 4
    assert float(rows[-1][0]) > 2


def test_the_model_loads_without_us(demo: Demo) -> None:
    size, same, difference = printed_rows(demo.out.split("largest difference of a logit")[1])[2]
    assert int(size.replace(",", "")) == demo.model.stat().st_size
    assert same == "360 of 360"
    assert float(difference) < 1e-3
    plain, digits = Network(0, ours=False), split(5)[1]
    plain.variables = serialization.from_bytes(plain.variables, demo.model.read_bytes())
    right = plain.logits(digits.images).argmax(1) == digits.labels
    assert f"{100 * right.mean():.1f}" == f"{held_out(demo, 'ours'):.1f}"


def test_the_report_is_whole_and_has_the_tables_of_the_terminal(demo: Demo) -> None:
    text = demo.report.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert f"JAX {jax.__version__}" in text
    assert len([tag for tag, _ in page.attributes if tag == "svg"]) == 6
    rows, printed = [row for row in page.rows if row], printed_rows(demo.out)
    assert len(rows) == 4 + 2 + 2 + 6 + 4 + 6 + 1
    assert all(row in printed for row in rows)


def test_lines_fit_80_columns(demo: Demo) -> None:
    lines = [line for line in demo.out.splitlines() if not line.startswith(("Report:", "Model:"))]
    assert max(map(len, lines)) <= 80


def test_both_networks_begin_with_the_same_weights() -> None:
    flaxs, ours = Network(3, ours=False), Network(3, ours=True)
    jax.tree.map(np.testing.assert_array_equal, flaxs.variables, ours.variables)
    images = split(0)[1].images[:7]
    for training in (True, False):
        logits = flaxs.logits(images, training=training)
        assert np.abs(logits).max() > 0.1
        np.testing.assert_allclose(ours.logits(images, training=training), logits, atol=1e-5)


def test_patches_are_what_the_first_convolution_sees() -> None:
    network, images = Network(0, ours=True), split(0)[1].images[:3]
    first = network.first()
    kernel = network.variables["params"]["conv"]["kernel"]
    x = images.reshape(-1, 8, 8, 1)
    layout = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    np.testing.assert_allclose(first.out(images), out.reshape(-1, 16), atol=1e-5)
