"""The command line, as a person types it: every test starts a process of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

import fusebn
from fusebn.cli.demo.numpy.findings import recalibrate
from fusebn.cli.demo.numpy.network import Network
from fusebn.cli.demo.numpy.quantized import Quantizable
from terminal import (
    Demo,
    Page,
    assert_last_act,
    printed_rows,
    share,
    type_in,
    type_in_demo,
    type_in_without_space,
)

EPOCHS = 2


# ---- the demo ----


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo") / "not" / "yet"
    return type_in_demo(folder, "safetensors", "--seed", 5, "--epochs", EPOCHS)


def test_the_demo_recognizes_97_percent(tmp_path: Path) -> None:
    code, out, _ = type_in("demo", "--out", tmp_path)
    assert code == 0
    found = re.search(r"(\d+\.\d) % of the held-out digits recognized", out)
    assert found
    assert float(found[1]) >= 97
    assert "seed 0" in out


def test_it_says_where_the_files_are_and_leaves_no_other(demo: Demo) -> None:
    assert f"Report: {demo.report}\n" in demo.out
    assert f"Model:  {demo.model}\n" in demo.out
    assert sorted(demo.report.parent.iterdir()) == [demo.report, demo.model]


def test_inference_changes_no_byte(demo: Demo) -> None:
    section = demo.out.split("Inference changes nothing")[1].split("A forgotten update")[0]
    assert re.findall(r"^ +norm\d +[\d,]+ +(\d+) *$", section, re.MULTILINE) == ["0", "0"]


def test_a_forgotten_update_costs_accuracy_and_moments_repair_it(demo: Demo) -> None:
    right = share(demo.out, r"updated at every step +\d+ +inference")
    wrong = share(demo.out, r"update forgotten +0 +inference")
    assert wrong < right - 20
    assert share(demo.out, r"update forgotten +0 +training") > right - 5
    assert share(demo.out, r"repaired by Moments +0 +inference") > right - 2


def test_repaired_statistics_are_those_of_all_images_as_one_batch() -> None:
    rng = np.random.default_rng(0)
    network, images = Network.new(rng), rng.random((2345, 64), dtype=np.float32)
    one_batch = network(images, training=True, update=False)
    recalibrate(network, images)
    # The moving variance is m2 / (n - 1), the batch is normalized by m2 / n.
    np.testing.assert_allclose(network(images, training=False), one_batch, atol=2e-3)


def test_training_mode_fails_at_batch_size_one(demo: Demo) -> None:
    rows = re.findall(r"^ +(\d+) +(\d+\.\d) % +(\d+\.\d) % *$", demo.out, re.MULTILINE)
    assert [int(size) for size, _, _ in rows] == [1, 2, 4, 16, 64, 360]
    assert float(rows[0][1]) < 15
    assert len({inference for _, _, inference in rows}) == 1


def test_a_new_process_predicts_the_same(demo: Demo) -> None:
    assert "360 of 360" in demo.out


def test_quantized_fine_tuning_and_folding(demo: Demo) -> None:
    assert_last_act(demo, 8, 4, 3)


def test_quantizers_switch_at_run_time() -> None:
    rng = np.random.default_rng(0)
    network, images = Network.new(rng), rng.random((9, 64), dtype=np.float32)
    network(images, training=True)
    quantizable = Quantizable(network)
    exact = network.logits(images)
    for bits in (4, 0, 8, 0):
        quantizable.bits = bits
        logits = quantizable.logits(images)
        assert np.array_equal(logits, exact) == (bits == 0)
        np.testing.assert_allclose(quantizable.folded(images), logits, atol=1e-5)


def test_the_model_holds_the_trained_layers(demo: Demo) -> None:
    layers = fusebn.load(demo.model)
    assert sorted(layers) == ["dense0", "dense1", "last", "norm0", "norm1"]
    assert layers["norm0"].num_updates == EPOCHS * 112
    assert layers["norm0"].decay == 0.9


def test_lines_fit_80_columns(demo: Demo) -> None:
    lines = [line for line in demo.out.splitlines() if not line.startswith(("Report:", "Model:"))]
    assert max(map(len, lines)) <= 80


def test_a_plain_terminal_shows_the_same_numbers_for_the_same_seed(
    demo: Demo, tmp_path: Path
) -> None:
    options = ("--seed", 5, "--epochs", EPOCHS, "--out", tmp_path)
    plain = {"NO_COLOR": "1", "FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    code, out, _ = type_in("demo", *options, **plain)
    assert code == 0
    assert out.isascii()
    assert "\x1b" in out
    assert not re.search(r"\x1b\[[\d;]*[34]\dm", out)

    def numbers(text: str) -> list[str]:
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
        return re.findall(r"-?\d[\d.,]*", text.split("Moving statistics")[1].split("Done in")[0])

    assert numbers(out) == numbers(demo.out)


# ---- the report ----


def test_the_report_is_whole_and_needs_nothing_else(demo: Demo) -> None:
    text = demo.report.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?:|@import|src=|\$[a-z{]", text)
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for _, attributes in page.attributes if "href" in attributes]
    used = {link.removeprefix("#") for link in links} | set(re.findall(r"url\(#?(.*?)\)", text))
    assert used <= set(ids)


def test_every_figure_has_words_for_those_who_cannot_see_it(demo: Demo) -> None:
    page = Page(demo.report.read_text("utf-8"))
    figures = [attributes for tag, attributes in page.attributes if tag == "svg"]
    assert len(figures) == 8
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)


def test_light_and_dark_share_the_figures(demo: Demo) -> None:
    text = demo.report.read_text("utf-8")
    assert "prefers-color-scheme: dark" in text
    figures = text[text.index("<body") :]
    assert "var(--series-1)" in figures
    assert not re.search(r"(fill|stroke): *#", figures)


def test_the_report_has_the_tables_of_the_terminal(demo: Demo) -> None:
    rows = [row for row in Page(demo.report.read_text("utf-8")).rows if row]
    assert len(rows) == 4 + 2 + 4 + 6 + 1 + 3 + 3
    printed = printed_rows(demo.out)
    assert all(row in printed for row in rows)


# ---- what may go wrong ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "Invalid value for '--epochs': 0 is not in the range"),
        (["--epochs", "-3"], "Invalid value for '--epochs': -3 is not in the range"),
        (["--epochs", "many"], "Invalid value for '--epochs': 'many' is not a valid integer"),
        (["--seed", "-1"], "Invalid value for '--seed': -1 is not in the range"),
        (["--framework", "caffe"], "Invalid value for '--framework': 'caffe' is not one of"),
        (["--sed", "1"], "No such option"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    code, out, err = type_in("demo", *options)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("obstacle", ["file for a folder", "folder for the file", "forbidden"])
def test_an_unwritable_place_is_refused_before_training(tmp_path: Path, obstacle: str) -> None:
    out = tmp_path / "report"
    if obstacle == "file for a folder":
        out.touch()
        out /= "deeper"
    elif obstacle == "folder for the file":
        (out / "report.html").mkdir(parents=True)
    else:
        out = Path("/proc/self/fusebn")  # even root makes no folder there
    before = sorted(tmp_path.rglob("*"))
    code, printed, err = type_in("demo", "--out", out)
    assert (code, printed) == (2, "")
    assert f"Invalid value for '--out': cannot write {out}" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    err = type_in_without_space(tmp_path / "report")
    assert f"Invalid value for '--out': cannot write {tmp_path}" in err
    assert "File too large" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [True, False])
def test_ctrl_c_leaves_things_as_they_were(tmp_path: Path, old: bool) -> None:
    report = tmp_path / "folder" / "report.html"
    if old:
        report.parent.mkdir()
        report.write_text("an older report")
    # A shell that runs this suite in the background makes its children deaf to SIGINT.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = [sys.executable, "-c", f"{heard}; from fusebn.cli import main; main()"]
    with subprocess.Popen(
        [*start, "demo", "--epochs", "100000", "--out", str(report)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # printed just before training
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "fusebn: interrupted; no unfinished file is left.\n"
    if old:
        assert report.read_text() == "an older report"
        assert list(report.parent.iterdir()) == [report]
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "args", "extra"),
    [
        ("click", ["info"], "cli"),
        ("rich", ["info"], "cli"),
        ("click", ["demo"], "demo"),
        ("sklearn", ["demo"], "demo"),
        ("threadpoolctl", ["demo"], "demo"),
        ("matplotlib", ["demo"], "demo"),
        ("tensorflow", ["demo", "--framework", "tensorflow"], "demo,tensorflow"),
    ],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, missing: str, args: list[str], extra: str
) -> None:
    without = f"import sys; sys.modules[{missing!r}] = None; from fusebn.cli import main; main()"
    if args[0] == "demo":
        args = [*args, "--out", str(tmp_path / "report")]
    code, out, err = type_in(*args, command=[sys.executable, "-c", without])
    assert (code, out) == (2, "")
    assert missing in err
    assert f"pip install 'fusebn[{extra}]'" in err
    assert list(tmp_path.iterdir()) == []


# ---- the other commands ----


def test_info() -> None:
    code, out, err = type_in("info")
    facts = fusebn.info()
    assert (code, err) == (0, "")
    for expected in (facts["version"], facts["instruction_set"], *facts["frameworks"]):
        assert expected in out
    assert max(map(len, out.splitlines())) <= 80


def test_info_json(monkeypatch: pytest.MonkeyPatch) -> None:
    # An adapter that is loaded here, as it is not there, would tell more of itself.
    for adapter in ("tensorflow", "torch", "jax"):
        monkeypatch.delitem(sys.modules, f"fusebn.{adapter}._ops", raising=False)
    code, out, err = type_in("info", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(fusebn.info()))


def test_the_script_that_installs_with_the_package() -> None:
    script = Path(sysconfig.get_path("scripts")) / "fusebn"
    assert type_in("--version", command=[str(script)]) == (0, f"fusebn {fusebn.__version__}\n", "")


def test_no_command_shows_the_commands() -> None:
    code, _, err = type_in()
    assert code == 2
    assert re.search(r"demo +Train on handwritten digits", err)
    assert re.search(r"info +Show what runs", err)
