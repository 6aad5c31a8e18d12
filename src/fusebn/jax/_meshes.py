"""Arrays that are divided among devices, and not by ``shard_map``: by how they are sharded.

XLA divides a program by the shardings of its arrays. It knows how to divide JAX's own operations,
sums included; of a custom call it knows nothing, and gathers all of an array everywhere. So in a
program for several devices a call is made of JAX's operations.

Along *explicit* axes of a mesh an array's type says how it is sharded, and every operation has to
say what becomes of that. Here these axes are made automatic ones for the time of a function.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Array = Any


def divides(context: Any) -> bool:
    """Whether XLA divides the program that is being lowered."""
    axes = context.module_context.axis_context
    manual = getattr(axes, "manual_axes", None)
    if manual is None:
        return getattr(axes, "num_devices", 1) > 1
    return any(size > 1 for name, size in axes.mesh.shape.items() if name not in manual)


def varying(value: Array) -> frozenset[str]:
    """Return the axes of a `shard_map` along which a value varies; none where it does not say."""
    axes: frozenset[str] = jax.typeof(value).manual_axis_type.varying
    return axes


def is_explicit(x: Array) -> bool:
    """Whether the type of x says that it is sharded."""
    return any(part is not None for part in jax.typeof(x).sharding.spec)


def in_one_piece(x: Array) -> Array:
    """Gather what is sharded over the explicit axes of a mesh."""
    if not is_explicit(x):
        return x
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*[None] * x.ndim)))


def along(x: Array, *axes: int) -> NamedSharding:
    """Return the sharding of what has these axes of an explicitly sharded x."""
    of_x = jax.typeof(x).sharding
    return NamedSharding(of_x.mesh, PartitionSpec(*(of_x.spec[axis] for axis in axes)))


def like(x: Array, y: Array) -> Array:
    """Return y, of the shape of x, sharded as x is."""
    return jax.sharding.reshard(y, jax.typeof(x).sharding) if is_explicit(x) else y


def automatic(
    function: Callable[..., Any], x: Array, shardings: Callable[[], Any]
) -> Callable[..., Any]:
    """Return a function of arrays which XLA is to divide as x is; its results are sharded so."""
    if not is_explicit(x):
        return function
    axes = jax.typeof(x).sharding.mesh.explicit_axes
    divided: Callable[..., Any]
    divided = jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings())
    return divided
