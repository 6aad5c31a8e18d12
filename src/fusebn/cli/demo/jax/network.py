"""The network as a user of Flax would write it: modules, their variables, jitted functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import fusebn.jax.linen as fbl
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.images import NESTEROV, OVER_ADAM, SIDE, WIDTHS, patches
from fusebn.cli.demo.network import DECAY, EPSILON, Array, First
from fusebn.cli.demo.schedule import batches

Variables = dict[str, Any]

_KERNEL = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # He's; quick to compile


class Norm(nn.Module):
    """A batch norm and what follows it: in Flax's three steps, or in one of ours."""

    ours: bool
    dtype: Any
    relu: bool = True
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Any, training: Any, residual: Any = None) -> Any:
        """Return what the next convolution takes; the variables are the same either way."""
        options: dict[str, Any] = {
            "momentum": DECAY,
            "epsilon": EPSILON,
            "dtype": self.dtype,
            "param_dtype": self.dtype,
            "scale_init": nn.initializers.constant(self.scale),
            "name": "bn",
        }
        if self.ours:
            norm = fbl.BatchNorm(activation="relu" if self.relu else None, **options)
            return norm(x, jnp.logical_not(training), residual=residual)
        y = nn.BatchNorm(**options)(x, not training)
        y = y if residual is None else y + residual
        return nn.relu(y) if self.relu else y


class Model(nn.Module):
    """Images [N, 8, 8, 1] to logits [N, 10]."""

    ours: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Any, training: Any) -> Any:
        """Return the logits."""
        first, last = WIDTHS
        x = self._convolution(images, first, "conv")
        x = self._norm("norm")(x, training)
        x = self._block(x, first, "block0", training)
        x = self._block(x, last, "block1", training)
        dense = nn.Dense(10, kernel_init=_KERNEL, name="last", **self._kinds())
        return dense(x.mean((1, 2)))

    def _block(self, x: Any, out: int, name: str, training: Any) -> Any:
        """Return two convolutions of x, and a shortcut around them."""
        stride, shortcut = 1, x
        if x.shape[-1] != out:
            stride = 2
            shortcut = self._convolution(x, out, f"{name}.conv3", side=1, stride=2)
            shortcut = self._norm(f"{name}.norm3", relu=False)(shortcut, training)
        y = self._convolution(x, out, f"{name}.conv1", stride=stride)
        y = self._norm(f"{name}.norm1")(y, training)
        y = self._convolution(y, out, f"{name}.conv2")
        # With a scale of 0 a block begins as its shortcut: training starts calmly.
        return self._norm(f"{name}.norm2", scale=0.0)(y, training, shortcut)

    def _convolution(self, x: Any, out: int, name: str, side: int = 3, stride: int = 1) -> Any:
        options: dict[str, Any] = {"use_bias": False, "kernel_init": _KERNEL, "name": name}
        return nn.Conv(out, (side, side), stride, **options, **self._kinds())(x)

    def _kinds(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.dtype}

    def _norm(self, name: str, *, relu: bool = True, scale: float = 1.0) -> Norm:
        return Norm(self.ours, self.dtype, relu, scale, name=name)


class Network:
    """A model with Flax's batch norms or with ours, and its training."""

    def __init__(self, seed: int, *, ours: bool, dtype: Any = jnp.float32) -> None:
        self._model = Model(ours, dtype)
        self._dtype = dtype
        # Flax's flag is a Python bool, and each of its values a program of its own; ours is traced.
        self.apply = jax.jit(self._apply, static_argnames=() if ours else "training")
        self._step = jax.jit(self._stepped)
        self._optimizer = optax.trace(NESTEROV, nesterov=True)
        # Whatever the type, the same first weights.
        images = jnp.zeros((1, SIDE, SIDE, 1), jnp.float32)
        variables = Model(ours).init(jax.random.key(seed), images, False)
        self.variables: Variables = jax.tree.map(lambda value: value.astype(dtype), variables)
        self._velocity = self._optimizer.init(self.variables["params"])

    def train(self, digits: Digits, epochs: int, seed: int) -> Iterator[float]:
        """Train, and yield the loss of each step."""
        for batch, rate in batches(digits, epochs, seed):
            self.variables, self._velocity, loss = self.step(batch, rate * OVER_ADAM)
            yield float(loss)

    def step(self, digits: Digits, rate: float) -> tuple[Variables, Any, Any]:
        """Return what a step of training makes of the variables and the velocity, and its loss."""
        images = self.images(digits.images)
        step: tuple[Variables, Any, Any] = self._step(
            self.variables, self._velocity, images, digits.labels, rate
        )
        jax.block_until_ready(step)
        return step

    def images(self, rows: Array) -> Any:
        """Return rows of pixels as images."""
        return jnp.asarray(rows.reshape(-1, SIDE, SIDE, 1), self._dtype)

    def infer(self, images: Array) -> Array:
        """Return the logits in inference mode; keep the statistics that come with them."""
        logits, updated = self.apply(self.variables, self.images(images), training=False)
        self.variables = {**self.variables, **updated}
        return np.asarray(logits)

    def _apply(self, variables: Variables, images: Any, training: Any) -> tuple[Any, Variables]:
        logits, updated = self._model.apply(variables, images, training, mutable=["batch_stats"])
        return logits, dict(updated)

    def _stepped(
        self, variables: Variables, velocity: Any, images: Any, labels: Any, rate: Any
    ) -> tuple[Variables, Any, Any]:
        def loss_of(params: Any) -> tuple[Any, Variables]:
            logits, updated = self._apply({**variables, "params": params}, images, True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated

        (loss, updated), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, velocity = self._optimizer.update(gradients, velocity)
        params = jax.tree.map(lambda p, u: p - rate * u, variables["params"], updates)
        return {"params": params, **updated}, velocity, loss

    # What the report asks of a network.

    def first(self) -> First:
        """See :class:`fusebn.cli.demo.network.Network`."""
        weight = np.asarray(self.variables["params"]["conv"]["kernel"]).reshape(9, -1)
        moving = self.variables["batch_stats"]["norm"]["bn"]
        return First(weight, np.asarray(moving["mean"]), np.asarray(moving["var"]), patches)

    def logits(self, images: Array, *, training: bool = False) -> Array:
        """See :class:`fusebn.cli.demo.network.Network`."""
        return np.asarray(self.apply(self.variables, self.images(images), training=training)[0])

    def state(self) -> dict[str, bytes]:
        """See :class:`fusebn.cli.demo.network.Network`."""
        held = (self.variables["params"], self.variables["batch_stats"])
        return {
            name: b"".join(
                np.asarray(v).tobytes() for part in held for v in part[name]["bn"].values()
            )
            for name in held[1]
        }
