"""How exact is a variance? fusebn and its peers on data that is hard, against NumPy's longdouble.

    python benchmarks/accuracy.py                 prints Markdown
    python benchmarks/accuracy.py --out FOLDER    and writes accuracy.json and accuracy.md there

A peer that is not installed is left out. Needs the extra `cli`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

# Before any of them is imported.
os.environ.update(
    KERAS_BACKEND="torch", TF_CPP_MIN_LOG_LEVEL="3", JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES=""
)

import ml_dtypes
import numpy as np

from fusebn.cli.bench.machine import described, machine

Array = Any
SHAPE = (16, 32, 32, 8)  # NHWC
AXES = (0, 1, 2)
N = math.prod(SHAPE[:3])
BIASED = (N - 1) / N  # from a variance that divides by n - 1 to one that divides by n
EPSILON = 1e-5
ONE, ZERO = np.ones(SHAPE[3], np.float32), np.zeros(SHAPE[3], np.float32)


class Hard(NamedTuple):
    """Data whose variance is easily lost."""

    name: str
    mean: float
    std: float
    dtype: Any

    def data(self) -> Array:
        """Return x."""
        values = np.random.default_rng(0).normal(self.mean, self.std, SHAPE)
        return values.astype(self.dtype)


DATA = (
    Hard("1000 ± 0.01", 1000, 0.01, np.float32),
    Hard("10000 ± 0.1", 10000, 0.1, np.float32),
    Hard("1e6 ± 1", 1e6, 1, np.float32),
    Hard("constant 542.37", 542.37, 0, np.float32),
    Hard("float16, 0 ± 300", 0, 300, np.float16),
    Hard("bfloat16, 100 ± 1", 100, 1, ml_dtypes.bfloat16),
)

# ---- the contenders: x -> the biased variance of each channel, and y with scale 1, offset 0 ----


def fusebn(x: Array) -> tuple[Array, Array]:
    """Ours."""
    import fusebn

    y, _, variance = fusebn.fused_batch_norm(x, ONE, ZERO, epsilon=EPSILON, correction=0)
    return variance, y


def numpy(x: Array) -> tuple[Array, Array]:
    """Textbook, in the type of x."""
    mean, variance = x.mean(AXES), x.var(AXES)
    return variance, (x - mean) / np.sqrt(variance + x.dtype.type(EPSILON))


def tensorflow_moments(x: Array) -> tuple[Array, Array]:
    """The composite functions."""
    import tensorflow as tf

    x = tf.constant(x)
    mean, variance = tf.nn.moments(x, AXES)
    return variance, tf.nn.batch_normalization(x, mean, variance, None, None, EPSILON)


def tensorflow_fused(x: Array, **options: Any) -> tuple[Array, Array]:
    """The fused operation, eagerly or compiled; its variance divides by n - 1."""
    import tensorflow as tf

    @tf.function(**options)
    def run(x: Array) -> Array:
        return tf.compat.v1.nn.fused_batch_norm(x, ONE, ZERO, epsilon=EPSILON)

    if not options:
        tf.config.run_functions_eagerly(True)
    try:
        y, _, variance = run(tf.constant(x))
    finally:
        tf.config.run_functions_eagerly(False)
    return variance * BIASED, y


def tensorflow_fused_jit(x: Array) -> tuple[Array, Array]:
    """The fused operation as XLA expands it."""
    return tensorflow_fused(x, jit_compile=True)


def jax_var(x: Array) -> tuple[Array, Array]:
    """Textbook, in the type of x."""
    import jax.numpy as jnp

    x = jnp.asarray(x)
    mean, variance = jnp.mean(x, AXES), jnp.var(x, AXES)
    return variance, (x - mean) / jnp.sqrt(variance + EPSILON)


def flax(x: Array) -> tuple[Array, Array]:
    """The layer, whose default is E[x^2] - E[x]^2."""
    import jax
    import jax.numpy as jnp
    from flax import linen

    layer = linen.BatchNorm(use_running_average=False, momentum=0, epsilon=EPSILON)
    variables = layer.init(jax.random.key(0), jnp.asarray(x))
    y, updated = layer.apply(variables, jnp.asarray(x), mutable=["batch_stats"])
    return updated["batch_stats"]["var"], y.astype(x.dtype)


def keras(x: Array) -> tuple[Array, Array]:
    """The layer, whose moving variance takes the batch at momentum 0."""
    import keras

    policy = f"mixed_{x.dtype.name}" if x.dtype.itemsize == 2 else x.dtype.name
    layer = keras.layers.BatchNormalization(momentum=0.0, epsilon=EPSILON, dtype=policy)
    y = layer(_torch_tensor(x), training=True)
    return layer.moving_variance.numpy(), _numpy_array(y, x)


def torch(x: Array) -> tuple[Array, Array]:
    """The function, whose moving variance takes the batch at momentum 1 and divides by n - 1."""
    import torch

    mean, variance = torch.zeros(SHAPE[3]), torch.ones(SHAPE[3])
    tensor = _torch_tensor(x).movedim(3, 1)
    y = torch.nn.functional.batch_norm(
        tensor, mean, variance, training=True, momentum=1.0, eps=EPSILON
    )
    return variance.numpy() * BIASED, _numpy_array(y.movedim(1, 3), x)


def _torch_tensor(x: Array) -> Array:
    import torch

    return torch.tensor(x.view(f"i{x.itemsize}")).view(getattr(torch, x.dtype.name))


def _numpy_array(tensor: Array, like: Array) -> Array:
    return tensor.detach().double().numpy().astype(like.dtype)


# Name -> what it needs, and itself.
CONTENDERS: dict[str, tuple[str, Callable[[Array], tuple[Array, Array]]]] = {
    "fusebn": ("fusebn", fusebn),
    "NumPy `np.var`": ("numpy", numpy),
    "PyTorch `F.batch_norm`": ("torch", torch),
    "TensorFlow `tf.nn.moments`": ("tensorflow", tensorflow_moments),
    "TensorFlow `fused_batch_norm`": ("tensorflow", tensorflow_fused),
    "the same, `jit_compile=True`": ("tensorflow", tensorflow_fused_jit),
    "JAX `jnp.var`": ("jax", jax_var),
    "Flax `BatchNorm`": ("flax", flax),
    "Keras 3 on PyTorch": ("keras", keras),
}

# ---- the judgement ----


def judge(x: Array, contender: Callable[[Array], tuple[Array, Array]]) -> dict[str, Any]:
    """Return the worst errors of the variance, relative, and of y, against longdouble."""
    wide = x.astype(np.longdouble)
    mean, variance = wide.mean(AXES), wide.var(AXES)
    if (wide == wide[0, 0, 0]).all():
        mean, variance = wide[0, 0, 0], np.zeros_like(variance)
    want = (wide - mean) / np.sqrt(variance + np.longdouble(EPSILON))
    with np.errstate(all="ignore"):  # overflow is among the answers
        got, y = (np.asarray(value).astype(np.longdouble) for value in contender(x))
    with np.errstate(all="ignore"):
        error = np.abs(got - variance)
        relative = np.where(variance == 0, error, error / np.where(variance == 0, 1, variance))
        y_error = np.abs(y - want)
    return {
        "variance": _finite(relative.max()),
        "y": _finite(y_error.max()),
        "nan": bool(np.isnan(got).any() or np.isnan(y).any()),
        "infinite": bool(np.isinf(got).any()),
        "negative": bool((got < 0).any()),
    }


def _finite(value: Any) -> float | None:
    """JSON knows no NaN."""
    return float(value) if np.isfinite(value) else None


def run() -> dict[str, Any]:
    """Judge everybody."""
    results: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for name, (package, contender) in CONTENDERS.items():
        try:
            results[name] = {hard.name: judge(hard.data(), contender) for hard in DATA}
        except ImportError:
            continue
        versions[package] = _version(package)
    return {
        "machine": machine(),
        "shape": SHAPE,
        "epsilon": EPSILON,
        "versions": versions,
        "results": results,
    }


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "?"


# ---- the tables ----


def markdown(found: dict[str, Any]) -> str:
    """Return two tables: of the variance, and of y."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    page = [
        "# Accuracy on hard data",
        "",
        f"{N} values a channel, epsilon {EPSILON:g}, against NumPy's longdouble.",
        f"{described(found['machine'])}; {versions}.",
    ]
    for key, title in (
        ("variance", "Worst relative error of the variance (of a constant: the variance itself)"),
        ("y", "Worst absolute error of y, which has variance 1"),
    ):
        page += ["", f"## {title}", "", "| | " + " | ".join(h.name for h in DATA) + " |"]
        page += ["|---|" + "---:|" * len(DATA)]
        for name, judged in found["results"].items():
            cells = [_cell(judged[hard.name], key) for hard in DATA]
            page.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(page) + "\n"


def _cell(judged: dict[str, Any], key: str) -> str:
    value = judged[key]
    if value is None:
        return "**NaN**" if judged["nan"] else "**infinite**"
    text = "0" if value == 0 else f"{value:.1e}"
    return f"**{text}, negative**" if judged["negative"] and key == "variance" else text


def main() -> None:
    """Print, and write if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a folder for accuracy.json and accuracy.md")
    out = parser.parse_args().out
    found = run()
    print(markdown(found))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "accuracy.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        (out / "accuracy.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
