"""`save` and `load`: what goes in comes out, and a file is old or new, never in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import cases
import fusebn
from conftest import assert_same_bits, frozen
from fusebn import BatchNorm


def network() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    layers: dict[str, Any] = {
        "bn1": BatchNorm(4, decay=0.5, activation="relu"),
        "block.bn2": BatchNorm(4, axis=1, decay=None, center=False, epsilon=1e-5, correction=0),
        "bn3": BatchNorm(4, scale=False, zero_debias=True, dtype=np.float64, nonfinite="skip"),
        "dense": rng.standard_normal((4, 3)),
        "steps": np.array(17, np.int64),
        "empty": np.empty((0, 3), np.float32),
    }
    for layer in layers.values():
        if isinstance(layer, BatchNorm):
            layer(frozen(rng.normal(3, 2, (8, 4)), np.float32), training=True)
    layers["bn3"].freeze()
    return layers


def assert_same_network(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, BatchNorm):
            assert repr(actual[name]) == repr(value)
            state, wanted = actual[name].state_dict(), value.state_dict()
            assert state.keys() == wanted.keys()
            for key in wanted:
                assert_same_bits(state[key], wanted[key])
        else:
            assert_same_bits(actual[name], value)


@pytest.mark.parametrize("as_path", [str, Path])
def test_what_goes_in_comes_out(tmp_path: Path, as_path: Any) -> None:
    path, layers = as_path(tmp_path / "model.safetensors"), network()
    assert fusebn.save(path, layers) is None
    loaded = fusebn.load(path)
    assert_same_network(loaded, layers)
    x = frozen(np.random.default_rng(1).standard_normal((5, 4)), np.float32)
    for name in ("bn1", "block.bn2", "bn3"):
        for training in (False, True):
            actual = loaded[name](x, training=training)
            assert_same_bits(actual, layers[name](x, training=training))
    assert loaded["bn3"].frozen
    loaded["dense"][...] = 0  # What was loaded can be written to.


@pytest.mark.parametrize(
    "dtype", [*cases.DTYPES, np.int8, np.uint8, np.int32, np.int64, np.bool_], ids=str
)
def test_arrays_of_every_type(tmp_path: Path, dtype: Any) -> None:
    arrays = {
        "a": np.arange(12).reshape(3, 4).astype(dtype),
        "transposed": np.arange(12).reshape(3, 4).astype(dtype).T,
        "sliced": np.arange(12).astype(dtype)[::3],
        "zero": np.array(1).astype(dtype),
    }
    fusebn.save(tmp_path / "m", arrays)
    assert_same_network(fusebn.load(tmp_path / "m"), arrays)


def test_byte_order_does_not_reach_the_file(tmp_path: Path) -> None:
    swapped = np.arange(5.0).astype(">f4")
    fusebn.save(tmp_path / "m", {"a": swapped})
    assert fusebn.load(tmp_path / "m")["a"].tolist() == [0, 1, 2, 3, 4]


def test_nothing_is_a_model(tmp_path: Path) -> None:
    fusebn.save(tmp_path / "m", {})
    assert fusebn.load(tmp_path / "m") == {}


def test_any_reader_of_safetensors_understands_the_file(tmp_path: Path) -> None:
    layers = network()
    fusebn.save(tmp_path / "m", layers)
    tensors = safetensors.numpy.load_file(tmp_path / "m")
    assert_same_bits(tensors["bn1.moving_mean"], layers["bn1"].moving_mean)
    assert_same_bits(tensors["block.bn2.moving_variance"], layers["block.bn2"].moving_variance)
    assert_same_bits(tensors["dense"], layers["dense"])


def test_saving_changes_nothing(tmp_path: Path) -> None:
    layers, twins = network(), network()
    fusebn.save(tmp_path / "m", layers)
    assert_same_network(layers, twins)


def test_saving_replaces_the_file(tmp_path: Path) -> None:
    fusebn.save(tmp_path / "m", {"a": np.zeros(1000)})
    fusebn.save(tmp_path / "m", {"b": np.ones(3)})
    assert list(fusebn.load(tmp_path / "m")) == ["b"]
    assert os.listdir(tmp_path) == ["m"]


def test_a_new_process_predicts_the_same(tmp_path: Path) -> None:
    layers = network()
    fusebn.save(tmp_path / "m", layers)
    x = frozen(np.random.default_rng(1).standard_normal((5, 4)), np.float32)
    np.save(tmp_path / "x.npy", x)
    program = (
        "import sys, numpy, fusebn\n"
        "folder = sys.argv[1]\n"
        "y = fusebn.load(folder + '/m')['bn1'](numpy.load(folder + '/x.npy'), training=False)\n"
        "numpy.save(folder + '/y.npy', y)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    assert_same_bits(np.load(tmp_path / "y.npy"), layers["bn1"](x, training=False))


# --- a crash in the middle --------------------------------------------------------------------

SAVE_FOREVER = """
import sys, numpy, fusebn
path, k = sys.argv[1], 0
print("ready", flush=True)
while True:
    k += 1
    fusebn.save(path, {"a": numpy.full(1 << 20, float(k)), "k": numpy.array(k)})
"""


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    fusebn.save(path, {"a": np.zeros(1 << 20), "k": np.array(0)})
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.005, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        loaded = fusebn.load(path)
        k = loaded["k"].item()
        assert (loaded["a"] == k).all()
        seen.add(k)
    assert len(seen) > 1, "the process was always killed before it wrote anything"


SAVE_ON_A_FULL_DISK = """
import resource, signal, sys, numpy, fusebn
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    fusebn.save(sys.argv[1], {"a": numpy.ones(1 << 20)})
except OSError as error:
    print("OSError", error.errno)
"""


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "m"
    fusebn.save(path, {"a": np.zeros(3)})
    old = path.read_bytes()
    result = subprocess.run(
        [sys.executable, "-c", SAVE_ON_A_FULL_DISK, str(path)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert result.stdout.startswith("OSError")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: type[BaseException]
) -> None:
    path = tmp_path / "m"
    fusebn.save(path, {"a": np.zeros(3)})
    old = path.read_bytes()

    def fail(*arguments: Any, **options: Any) -> None:
        raise error("planted")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(error, match="planted"):
        fusebn.save(path, {"a": np.ones(3)})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m"]


def test_a_bad_value_is_found_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "m"
    fusebn.save(path, {"a": np.zeros(3)})
    old = path.read_bytes()
    with pytest.raises(TypeError, match="save: `layers`"):
        fusebn.save(path, {"a": np.ones(3), "b": "not an array"})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m"]


# --- files that are not ours ------------------------------------------------------------------


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    whole, cut = tmp_path / "m", tmp_path / "cut"
    fusebn.save(whole, network())
    data = whole.read_bytes()
    header = int.from_bytes(data[:8], "little")
    for length in {0, 1, 7, 8, 9, header // 2, header + 7, header + 8, header + 9, len(data) - 1}:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^load: `path` must .*cut"):
            fusebn.load(cut)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"\xff" * 100, b'{"a": 1}', b"PK\x03\x04" + b"\0" * 60, b"\x93NUMPY" * 9],
    ids=["empty", "zeros", "ones", "json", "zip", "npy"],
)
def test_foreign_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^load: `path` must .*foreign"):
        fusebn.load(path)


def test_a_safetensors_file_of_another_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    for metadata in (None, {"format": "pt"}, {"format": "fusebn/999"}):
        safetensors.numpy.save_file({"weight": np.ones(3)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"^load: `path` must .*fusebn"):
            fusebn.load(path)


def rewritten(path: Path, change: Any) -> None:
    """Write a file of ours again after a change to its tensors and metadata."""
    with safetensors.safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.numpy.load_file(path)
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


def drop(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors["bn1.moving_mean"]


def shorten(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["bn1.moving_variance"] = np.ones(3, np.float32)


def negate(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["bn1.moving_variance"] = -np.ones(4, np.float32)


def scramble(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    key = next(key for key, text in metadata.items() if "bn1" in text)
    metadata[key] = metadata[key][:-5]


def misconfigure(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    key = next(key for key, text in metadata.items() if "bn1" in text)
    layers = json.loads(metadata[key])
    layers["bn1"]["channels"] = -4
    metadata[key] = json.dumps(layers)


def of_another_kind(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    key = next(key for key, text in metadata.items() if "bn1" in text)
    metadata[key] = "[1, 2]"


@pytest.mark.parametrize("change", [drop, shorten, negate, scramble, misconfigure, of_another_kind])
def test_a_damaged_file_of_ours_is_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "damaged"
    fusebn.save(path, network())
    rewritten(path, lambda tensors, metadata: None)
    assert_same_network(fusebn.load(path), network())
    rewritten(path, change)
    with pytest.raises(ValueError, match=r"^load: `path` must .*damaged"):
        fusebn.load(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fusebn.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        fusebn.save(tmp_path / "no folder" / "m", {"a": np.ones(1)})
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the system
        fusebn.load(tmp_path)
    with pytest.raises(OSError):  # noqa: PT011
        fusebn.save(tmp_path, {"a": np.ones(1)})
    assert os.listdir(tmp_path) == []
