"""`fusebn demo --framework torch`, as a person types it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fusebn.torch as fbt
from fusebn.cli.demo.digits import split
from fusebn.cli.demo.images import patches
from fusebn.cli.demo.torch.network import Model, Network, tensor_of
from fusebn.cli.demo.torch.quantized import Quantizable
from terminal import Demo, Page, assert_last_act, printed_rows, type_in_demo, type_in_without_space

pytestmark = pytest.mark.of_the_cpu

OPTIONS = ("--framework", "torch", "--seed", 5, "--epochs", 2)
NORMS = {
    "bn": "relu",
    "blocks.0.bn1": "relu",
    "blocks.0.bn2": "addition, relu",
    "blocks.1.bn1": "relu",
    "blocks.1.bn2": "addition, relu",
    "blocks.1.shortcut.1": "nothing",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return type_in_demo(tmp_path_factory.mktemp("demo"), "pt", *OPTIONS)


def cells(demo: Demo, first: str, width: int) -> list[str]:
    """Return the row of so many cells that begins so."""
    rows = printed_rows(demo.out)
    [row] = [row for row in rows if row[0] == first and len(row) == width]
    return row[1:]


def held_out(demo: Demo, network: str) -> float:
    return float(cells(demo, network, 6)[0].removesuffix(" %"))


def test_both_networks_recognize_97_percent(demo: Demo) -> None:
    assert held_out(demo, "as it is") >= 97
    assert held_out(demo, "after fuse") >= 97
    assert abs(held_out(demo, "as it is") - held_out(demo, "after fuse")) < 1
    found = re.search(r"(\d+\.\d) % of the held-out digits recognized", demo.out)
    assert found
    assert float(found[1]) == held_out(demo, "after fuse")


def test_the_fused_network_follows_float64(demo: Demo) -> None:
    assert float(cells(demo, "after fuse", 6)[2]) < 1e-5


def test_times_and_memory_stand_side_by_side(demo: Demo) -> None:
    for network in ("as it is", "after fuse"):
        seconds, memory = cells(demo, network, 6)[3:]
        assert re.fullmatch(r"\d+\.\d ms", seconds)
        assert re.fullmatch(r"\d+ MiB", memory)
        assert int(memory.split()[0]) > 0


def test_every_batch_norm_is_one_call(demo: Demo) -> None:
    assert {name: cells(demo, name, 2) for name in NORMS} == {n: [f] for n, f in NORMS.items()}


def test_inference_changes_no_byte(demo: Demo) -> None:
    for name in NORMS:
        width, changed = cells(demo, name, 3)
        assert (int(width) - 8) % 16 == 0  # a counter, and four vectors of float32
        assert changed == "0"


def test_frozen_survives_train(demo: Demo) -> None:
    assert cells(demo, "eval()", 3)[1] != "0"
    assert cells(demo, "freeze()", 3)[1] == "0"


def test_the_model_loads_without_us(demo: Demo) -> None:
    size, same, difference = printed_rows(demo.out.split("largest difference of a logit")[1])[2]
    assert int(size.replace(",", "")) == demo.model.stat().st_size
    assert same == "360 of 360"
    assert float(difference) < 1e-4
    model = Model()
    assert not any(isinstance(module, fbt.BatchNorm2d) for module in model.modules())
    model.load_state_dict(torch.load(demo.model, weights_only=True))
    model.eval()
    digits = split(5)[1]
    right = model(tensor_of(digits.images)).argmax(1).numpy() == digits.labels
    assert f"{100 * right.mean():.1f}" == f"{held_out(demo, 'after fuse'):.1f}"


def test_quantized_fine_tuning_and_folding(demo: Demo) -> None:
    assert_last_act(demo, 8, 4)


def test_quantizers_switch_at_run_time() -> None:
    network, images = Network(0, fused=True), split(0)[1].images[:9]
    network.step(tensor_of(images), torch.arange(9))
    quantizable = Quantizable(network)
    exact = network.logits(images)
    for bits in (4, 0, 8, 0):
        quantizable.bits = bits
        logits = quantizable.logits(images)
        assert np.array_equal(logits, exact) == (bits == 0)
        np.testing.assert_allclose(quantizable.folded(images), logits, atol=1e-5)


def test_the_report_is_whole_and_has_the_tables_of_the_terminal(demo: Demo) -> None:
    text = demo.report.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert f"PyTorch {torch.__version__}" in text
    assert len([tag for tag, _ in page.attributes if tag == "svg"]) == 8
    rows, printed = [row for row in page.rows if row], printed_rows(demo.out)
    assert len(rows) == 4 + 2 + 6 + 6 + 2 + 1 + 2 + 2
    assert all(row in printed for row in rows)


def test_lines_fit_80_columns(demo: Demo) -> None:
    lines = [line for line in demo.out.splitlines() if not line.startswith(("Report:", "Model:"))]
    assert max(map(len, lines)) <= 80


def test_patches_are_what_the_first_convolution_sees() -> None:
    network, images = Network(0), split(0)[1].images[:3]
    first = network.first()
    out = network.model.conv(tensor_of(images)).detach().permute(0, 2, 3, 1).reshape(-1, 16)
    np.testing.assert_allclose(first.out(images), out.numpy(), atol=1e-5)
    assert patches(images).shape == (3 * 64, 9)


def test_logits_in_training_mode_leave_no_trace() -> None:
    network, images = Network(0, fused=True), split(0)[1].images[:16]
    before = network.state()
    trained, inferred = (network.logits(images, training=mode) for mode in (True, False))
    assert np.abs(trained - inferred).max() > 1e-3
    assert network.state() == before


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    err = type_in_without_space(tmp_path / "report", "--framework", "torch")
    assert f"Invalid value for '--out': cannot write {tmp_path}" in err
    assert list(tmp_path.iterdir()) == []
