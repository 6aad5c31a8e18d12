"""`fusebn demo --framework tensorflow`, as a person types it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tensorflow as tf

from fusebn.cli.demo.digits import split
from fusebn.cli.demo.network import WIDTHS
from fusebn.cli.demo.tensorflow.network import Network
from fusebn.cli.demo.tensorflow.quantized import Quantizable
from terminal import (
    Demo,
    Page,
    assert_last_act,
    printed_rows,
    share,
    type_in_demo,
    type_in_without_space,
)

EPOCHS = 2
OPTIONS = ("--framework", "tensorflow", "--seed", 5, "--epochs", EPOCHS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return type_in_demo(tmp_path_factory.mktemp("demo"), "ckpt", *OPTIONS)


def cells(demo: Demo, first: str) -> list[str]:
    """Return the row that begins so."""
    [row] = [row for row in printed_rows(demo.out) if row[0] == first]
    return row[1:]


def test_it_recognizes_97_percent(tmp_path: Path) -> None:
    demo = type_in_demo(tmp_path, "ckpt", "--framework", "tensorflow")
    assert share(demo.out, r"in place .*held out") >= 97
    found = re.search(r"(\d+\.\d) % of the held-out digits recognized", demo.out)
    assert found
    assert float(found[1]) >= 97


def test_it_leaves_a_report_and_a_checkpoint(demo: Demo) -> None:
    assert f"Report: {demo.report}\n" in demo.out
    assert f"Model:  {demo.model}\n" in demo.out
    names = ["report.ckpt.data-00000-of-00001", "report.ckpt.index", "report.html"]
    assert sorted(path.name for path in demo.report.parent.iterdir()) == names


def test_the_checkpoint_has_the_names_of_tf_contrib(demo: Demo) -> None:
    found = dict(tf.train.list_variables(str(demo.model)))
    for i, width in enumerate(WIDTHS[1:-1]):
        for name in ("beta", "gamma", "moving_mean", "moving_variance"):
            assert found[f"hidden{i}/BatchNorm/{name}"] == [width]


def test_each_layer_is_one_op_without_a_cond(demo: Demo) -> None:
    layers = str(len(WIDTHS) - 2)
    assert cells(demo, "batch norm") == [layers]
    assert cells(demo, "gradient of batch norm") == [layers]
    assert cells(demo, "batch norm of TensorFlow") == ["0"]
    assert cells(demo, "cond: Switch, Merge, If, Case") == ["0"]


def test_inference_changes_no_byte(demo: Demo) -> None:
    for i, width in enumerate(WIDTHS[1:-1]):
        for name in ("beta", "gamma", "moving_mean", "moving_variance"):
            assert cells(demo, f"hidden{i}/BatchNorm/{name}") == [f"{4 * width:,}", "0"]


def test_forgotten_update_ops_cost_accuracy(demo: Demo) -> None:
    right = share(demo.out, r"run at every step +inference")
    assert share(demo.out, r"forgotten +training") > right - 5
    assert share(demo.out, r"forgotten +inference") < right - 20
    assert share(demo.out, r"forgotten, then one pass +inference") > right - 2


def test_updates_in_place_train_the_same_network(demo: Demo) -> None:
    right = share(demo.out, r"run at every step +inference")
    assert share(demo.out, r"none: updated in place +inference") == right


def test_a_restored_graph_predicts_the_same(demo: Demo) -> None:
    before = demo.out.split("Quantized fine-tuning")[0]
    [row] = [row for row in printed_rows(before) if "360 of 360" in row]
    assert row[1:] == ["360 of 360", "0"]


def test_quantized_fine_tuning_and_folding(demo: Demo) -> None:
    assert_last_act(demo, 8, 4)


def test_one_graph_has_all_bits(tmp_path: Path) -> None:
    training, (images, _) = split(0)
    network, quantizable = Network(0), Quantizable(1)
    network.recalibrate(training)
    network.save(tmp_path / "model")
    quantizable.restore(tmp_path / "model")
    exact = network.logits(images)
    size = len(quantizable.graph.get_operations())
    for bits in (4, 0, 8, 0):
        quantizable.bits = bits
        logits = quantizable.logits(images)
        assert (logits.tobytes() == exact.tobytes()) == (bits == 0)
        assert bits == 0 or abs(quantizable.folded(images) - logits).max() < 1e-4
    assert len(quantizable.graph.get_operations()) == size


def test_the_same_seed_shows_the_same_numbers(demo: Demo, tmp_path: Path) -> None:
    again = type_in_demo(tmp_path, "ckpt", *OPTIONS)

    def numbers(text: str) -> list[str]:
        return re.findall(r"\d[\d.,]*", text.split("Moving statistics")[1].split("Done in")[0])

    assert numbers(again.out) == numbers(demo.out)


def test_lines_fit_80_columns(demo: Demo) -> None:
    lines = [line for line in demo.out.splitlines() if not line.startswith(("Report:", "Model:"))]
    assert max(map(len, lines)) <= 80


def test_the_report_is_whole_and_has_the_tables_of_the_terminal(demo: Demo) -> None:
    text = demo.report.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert f"TensorFlow {tf.__version__}" in text
    assert len([tag for tag, _ in page.attributes if tag == "svg"]) == 8
    rows, printed = [row for row in page.rows if row], printed_rows(demo.out)
    assert len(rows) == 4 + 4 + 8 + 5 + 6 + 1 + 2 + 2
    assert all(row in printed for row in rows)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    err = type_in_without_space(tmp_path / "report", "--framework", "tensorflow")
    assert f"Invalid value for '--out': cannot write {tmp_path}" in err
    assert "File too large" in err
    assert list(tmp_path.iterdir()) == []
