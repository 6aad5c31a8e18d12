"""What Flax's users gain: the same training in less time, one program, digits that stay."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, serialization

import fusebn.jax.linen as fbl
from fusebn.cli.demo import findings
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.findings import Finding, far_from_zero
from fusebn.cli.demo.jax.network import Network
from fusebn.cli.demo.network import Array
from fusebn.cli.demo.side_by_side import FIRST, LARGE, side_by_side
from fusebn.cli.demo.watch import Course, History

NAMES = ("Flax's", "ours")


def flaxs_and_ours(
    networks: tuple[Network, Network], histories: tuple[History, History], course: Course
) -> Finding:
    """Compare what the two networks learned, and what it cost."""
    training, _, epochs, seed, _ = course
    with jax.enable_x64(True):
        exact = Network(seed, ours=False, dtype=jnp.float64).train(training, epochs, seed)
        losses = list(islice(exact, FIRST))
    large = Digits(training.images[:LARGE], training.labels[:LARGE])
    return side_by_side(
        "Flax's batch norm and ours",
        "The same model, seed and batches, under jit, with flax.linen.BatchNorm, an addition and "
        "relu, and with fusebn.jax.linen.BatchNorm, which does all three.",
        dict(zip(NAMES, histories, strict=True)),
        {name: partial(net.step, large, 0.0) for name, net in zip(NAMES, networks, strict=True)},
        losses,
    )


def one_program(networks: tuple[Network, Network], digits: Digits) -> Finding:
    """Count what is compiled to run a network in both modes."""
    rows = []
    for name, network in zip(NAMES, networks, strict=True):
        run: Any = jax.jit(network.apply, static_argnames=() if name == "ours" else "training")
        images = network.images(digits.images)
        for training in (True, False):
            run(network.variables, images, training=training)
        traced = jax.make_jaxpr(
            partial(network.apply, network.variables), static_argnums=() if name == "ours" else 1
        )
        conds = str(traced(images, True)).count(" cond[")
        flag = "traced" if name == "ours" else "a Python bool, static"
        rows.append((name, flag, str(run._cache_size()), str(conds)))
    return Finding(
        "A training flag that is traced",
        "The kernel reads is_training when it runs: one compiled program trains and infers, "
        "without a cond. Flax's layer needs a Python bool, and a program for each.",
        ("network", "training is", "programs compiled", "cond"),
        rows,
    )


def bright_background(digits: Digits) -> Finding:
    """Normalize images whose mean is far from 0."""

    def normalized(layer: Any, images: Array) -> Array:
        x = jnp.asarray(images)
        y, _ = layer().init_with_output(jax.random.key(0), x, use_running_average=False)
        return np.asarray(y)

    layers = {"Flax's": linen.BatchNorm, "ours": fbl.BatchNorm}
    return far_from_zero(
        {name: partial(normalized, layer) for name, layer in layers.items()},
        digits,
        "Flax takes the mean's square from the mean of the squares, in float32: where the mean is "
        "large, few digits of the variance are left. (use_fast_variance=False takes longer.)",
    )


def loaded_without_fusebn(network: Network, digits: Digits, model: Path) -> Finding:
    """Save the variables of the network, and load them into the one with Flax's layers."""
    model.write_bytes(serialization.to_bytes(network.variables))
    plain = Network(0, ours=False)
    plain.variables = serialization.from_bytes(plain.variables, model.read_bytes())
    return findings.reloaded(
        "Saved, and loaded by who has no fusebn",
        "The names of the variables are Flax's: a model with its layers loads them, and predicts "
        "the same to rounding.",
        {"bytes in the file": f"{model.stat().st_size:,}"},
        network.logits(digits.images),
        plain.logits(digits.images),
    )
