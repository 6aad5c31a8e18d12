"""`fusebn bench`: what it refuses, and what it writes. It never says here how fast anything is."""

import json
import math
import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

import fusebn
from fusebn.cli.bench import bench
from fusebn.cli.bench.answers import Truth, Wrong, sampled
from fusebn.cli.bench.cases import DTYPES, EPSILON, SHAPES, VERBS, Case, data_of, layouts_of
from fusebn.cli.bench.machine import file_stem, machine
from fusebn.cli.bench.ours import Ours
from fusebn.cli.bench.peers import PEERS
from fusebn.cli.bench.results import Record, Results, Run, Spread, summary
from fusebn.cli.bench.timing import LEAST_SECONDS, turn
from fusebn.cli.bench.worker import CAN_STOP, Unable, Worker

SMALL = ("6x5x3", "40x17")


def run(*arguments):
    return CliRunner().invoke(bench, ["--peers", "none", *map(str, arguments)])


def planted(monkeypatch, name, field):
    """Make a public function wrong in the last element of one result."""
    right = getattr(fusebn, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        value = getattr(result, field)
        if value is not None:
            value.reshape(-1)[-1] += 0.5
        return result

    monkeypatch.setattr(fusebn, name, wrong)


# ---- answers ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL)
def test_right_answers_pass(shape, dtype):
    for layout in layouts_of(shape):
        case = Case(shape, layout, dtype)
        data = data_of(case)
        ours, truth = Ours(case, data), Truth(case, data)
        for verb in VERBS.values():
            for answer in ours.answers(verb):
                truth.check(verb, sampled(answer, case))


@pytest.mark.parametrize("peer", [False, True], ids=["ours", "peer"])
@pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)
def test_each_array_of_an_answer_is_checked(verb, peer):
    case = Case("6x5x3", "channels-first", "float32")
    data = data_of(case)
    truth = Truth(case, data)
    answer = sampled(Ours(case, data).answers(verb)[0], case)
    names = {"y", "mean", "variance"} if not verb.backward else {"dx", "dscale", "doffset"}
    if not verb.training:
        names -= {"mean", "variance"}
    if verb.residual and verb.backward:
        names.add("dresidual")
    for name in names:
        for damage in (0.5, math.nan):
            bad = {key: array.copy() for key, array in answer.items()}
            bad[name].reshape(-1)[-1] += damage
            with pytest.raises(Wrong, match=f"{name} is "):
                truth.check(verb, bad, peer=peer)
    if not peer:
        with pytest.raises(Wrong, match="no "):
            truth.check(verb, {name: answer[name] for name in sorted(names)[1:]})


def test_either_side_of_a_kink_is_right_and_felt_by_the_channel():
    case, verb = Case("64x4", "channels-last", "float32"), VERBS["backward+relu"]
    data = data_of(case)
    x = data.x.astype(float)[:, 0]
    offset = data.offset.copy()
    offset[0] = -(x[0] - x.mean()) / math.sqrt(x.var() + EPSILON) * data.scale[0]
    truth = Truth(case, data._replace(offset=offset))
    found = []
    for nudge in (-1e-6, 1e-6, 0.5):
        moved = offset.copy()
        moved[0] += nudge
        answer = sampled(Ours(case, data._replace(offset=moved)).answers(verb)[0], case)
        found.append(answer["dx"].reshape(64, 4)[1:, 0])
        if nudge < 0.1:
            truth.check(verb, answer)
        else:  # others are on the wrong side, too
            with pytest.raises(Wrong):
                truth.check(verb, answer)
    assert abs(found[0] - found[1]).max() > 1e-3


def test_the_sample_holds_both_ends_of_a_large_tensor():
    case = Case("300x200", "channels-last", "float32")
    tensor = np.arange(60_000.0).reshape(case.dims)
    small = sampled({"y": tensor, "mean": np.zeros(200)}, case)
    assert small["y"].min() == 0
    assert small["y"].max() == 59_999
    assert small["mean"].shape == (200,)


@pytest.mark.parametrize(
    ("name", "field", "verb"),
    [
        ("fused_batch_norm", "y", "forward"),
        ("fused_batch_norm", "variance", "forward+relu"),
        ("fused_batch_norm", "y", "inference"),
        ("fused_batch_norm_grad", "dx", "backward"),
        ("fused_batch_norm_grad", "dresidual", "backward+residual+relu"),
    ],
)
def test_a_wrong_answer_is_refused_and_not_timed(monkeypatch, tmp_path, name, field, verb):
    planted(monkeypatch, name, field)
    path = tmp_path / "wrong.json"
    result = run("--shape", "6x5x3", "--verb", verb, "--dtype", "float32", "--json", path)
    assert result.exit_code == 1
    assert "WRONG" in result.output
    for record in json.loads(path.read_text())["records"]:
        assert record["wrong"].startswith(f"{field} is ")
        assert record["runs"] == []


# ---- what is written ----


def test_a_run_writes_json_markdown_and_a_plot(tmp_path):
    result = run(
        "--quick", "--repeats", 2, "--shape", SMALL[0], "--shape", SMALL[1], "--dtype", "float32",
        "--dtype", "bfloat16", "--layout", "channels-last", "--layout", "channels-first",
        "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if "wrote" not in line)
    stem = tmp_path / file_stem(machine())
    found = json.loads(stem.with_name(stem.name + ".json").read_text())
    assert found["schema"] == 1
    assert found["machine"].keys() >= {"cpu", "caches", "threads", "date", "versions"}
    assert found["left_out"] == 0
    assert len(found["records"]) == 2 * (2 + 1) * len(VERBS)
    for record in found["records"]:
        assert record["wrong"] is None
        assert record["floor"].startswith(("copy", "stream"))
        runs = {(run["who"], run["memory"]): run for run in record["runs"]}
        assert runs.keys() == {("floor", "warm"), ("fusebn", "warm"), ("fusebn", "fresh")}
        assert all(run["seconds"]["median"] > 0 for run in runs.values())
        assert runs["floor", "warm"]["over_floor"]["median"] == 1
    assert [row["verb"] for row in found["summary"][::2]] == [*VERBS, *VERBS]
    assert all(seconds > 0 for seconds in found["overhead"].values())
    assert stem.with_name(stem.name + ".png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(stem.with_name(stem.name + ".svg"))
    page = stem.with_name(stem.name + ".md").read_text()
    for part in (*SMALL, *VERBS, "bfloat16"):
        assert part in page


def test_a_beside_run_is_reported(monkeypatch, tmp_path):
    from fusebn.cli.bench import asides

    monkeypatch.setattr(asides.busy, "__defaults__", ("6x5x3", 4, 2))
    path = tmp_path / "busy.json"
    result = run("--shape", "40x17", "--verb", "forward", "--busy", "--json", path)
    assert result.exit_code == 0, result.output
    assert "worst step" in result.output
    found = json.loads(path.read_text())["busy"]
    assert found["worst_beside"] >= found["beside"] > 0


def test_wrong_arguments_are_named():
    assert "a shape is" in run("--shape", "6x0x3").output
    assert "a shape is" in run("--shape", "many").output
    assert run("--dtype", "int8").exit_code == 2


def test_geometric_means_over_shapes():
    def record(shape, layout, ours, peer):
        def spread(value):
            return Spread(value, value, value)

        runs = [
            Run("floor", "warm", spread(1.0), spread(1.0), spread(1 / ours)),
            Run("fusebn", "warm", spread(ours), spread(ours), spread(1.0)),
            Run("torch", "warm", spread(peer), spread(peer), spread(peer / ours)),
        ]
        return Record(shape, layout, "float32", "forward", 4, None, "copy", runs)

    results = Results({}, {"torch": "1"}, 1)
    results.records = [
        record("a", "channels-last", 1.0, 2.0),
        record("b", "channels-last", 4.0, 32.0),
        record("b", "channels-first", 6.0, 6.0),
    ]
    last, first = summary(results)
    assert (last.shapes, last.worst, last.first_over_last) == (2, 4.0, None)
    assert last.over_floor == pytest.approx({"fusebn": 2, "torch": 8})
    assert last.over_ours["torch"] == pytest.approx(4)
    assert last.over_ours_fresh == {}
    assert first.first_over_last == pytest.approx(1.5)


def test_the_median_has_its_quartiles():
    assert Spread.of([5.0]) == Spread(5, 5, 5)
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3, 2, 4)


def test_the_shapes_are_those_that_were_promised():
    blocks = [Case(shape, "channels-first", "float32").block for shape in SHAPES]
    assert (32, 64, 112 * 112) in blocks
    assert (2, 32, 64**3) in blocks
    assert sum(channels % 16 != 0 for _, channels, _ in blocks) == 3


# ---- peers ----


def test_a_peer_that_is_missing_is_a_reason_not_a_crash():
    worker = Worker("nobody", "fresh", 1)
    try:
        with pytest.raises(Unable, match="ModuleNotFoundError"):
            worker.wait()
        with pytest.raises(Unable, match="has ended"):
            worker.load(Case("40x17", "channels-last", "float32"))
    finally:
        worker.close()


def test_a_peer_stands_still_between_its_turns():
    worker = Worker("torch", "fresh", 1)
    try:
        worker.wait()
        assert worker.version
        for case in ("40x17", "6x5x3"):
            worker.load(Case(case, "channels-last", "float32"))
            if CAN_STOP:  # if it did not stop, this would wait for ever
                _, status = os.waitpid(worker._process.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status)
    finally:
        worker.close()


def test_a_turn_outlasts_its_first_calls(monkeypatch):
    now = 0.0

    def call():
        nonlocal now
        now += 0.001

    monkeypatch.setattr("fusebn.cli.bench.timing.perf_counter", lambda: now)
    assert turn(call, 3) == pytest.approx(0.001)
    assert LEAST_SECONDS <= now < LEAST_SECONDS + 0.002


def test_every_peer_has_a_file_of_its_name():
    from importlib.util import find_spec

    assert all(find_spec(f"fusebn.cli.bench.peers.{name}") for name in PEERS)
