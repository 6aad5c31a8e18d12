"""The handlers of csrc/bindings/xla.cpp as JAX primitives: loaded, called, batched, lowered.

Every array begins with an axis of problems (see xla.cpp), into which `vmap` folds its own. On a CPU
a call becomes the handler; elsewhere, in programs that XLA divides among devices (see `_meshes`),
and where the library is missing, the function of `_portable` of the same name. Inside
:func:`portable` it is that function from the start.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fusebn import _core, _spec
from fusebn.jax import _portable
from fusebn.jax._meshes import divides, in_one_piece, like, varying
from fusebn.jax._portable import Array, Arrays, Options

# In the order of the Items of xla.cpp, which a call's bits speak of.
ITEMS = (
    *("x", "dy", "residual", "scale", "offset", "mean", "variance", "weights", "training"),
    *("batch", "count", "sum_g", "sum_g_x", "dmean", "dvariance"),
    *("y", "dx", "dresidual", "dscale", "doffset"),
)
HANDLERS = ("forward", "gradient", "moments", "normalize", "backward_sums", "backward")


def _load() -> str:
    """Register the handlers; return "" or why there are none."""
    path = Path(_core.__file__).parent / "lib" / "libfusebn_xla.so"
    if not path.exists():
        return "fusebn was built where jaxlib's header was missing"
    try:
        library = ctypes.CDLL(str(path))
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, f"fusebn_{name}"))
            jax.ffi.register_ffi_target(f"fusebn_{name}", handler, platform="cpu")
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    return ""


why_not_loaded = _load()
# Part of the key of every cache of traced and compiled functions.
_asked = jax.make_user_context(default_value=False)


@contextmanager
def portable() -> Iterator[None]:
    """Make the functions and layers, as long as it lasts, of JAX's own operations.

    A program traced inside holds no call of fusebn: it can be exported (:mod:`jax.export`) and run
    where fusebn is not installed, and differentiated there. The results are the same to rounding;
    the speed is XLA's.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import fusebn
    >>> import fusebn.jax
    >>> def serve(x):
    ...     with fusebn.jax.portable():
    ...         return fusebn.fused_batch_norm(x, None, None, data_format="NC").y
    >>> "fusebn" in str(jax.make_jaxpr(serve)(jnp.ones([2, 3])))
    False
    """
    with _asked(True):
        yield


def asked_portable() -> bool:
    """Whether a `portable` surrounds the caller."""
    asked: bool = _asked.value
    return asked


def support() -> str:
    """Return what `fusebn.info` says of JAX."""
    if why_not_loaded:
        return f"composite of JAX's own operations: {why_not_loaded}"
    composite = "a composite of JAX's own operations on other devices, and across several"
    return f"native calls on the CPU; {composite}"


# ---- one call ----


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    known = {name: index for index, name in enumerate(ITEMS)}
    return tuple(sorted(names, key=lambda name: known.get(name, len(known))))


def _problems(shapes: Sequence[tuple[int, ...]]) -> int:
    return max(shape[0] for shape in shapes)


def _one_by_one(composite: Callable[[Arrays, Options], Arrays]) -> Callable[..., list[Array]]:
    """Return a function of one problem as one of several; a shared operand has length 1 there."""

    def solve(
        *values: Array, names: tuple[str, ...], results: tuple[str, ...], options: Options
    ) -> list[Array]:
        def one(*values: Array) -> list[Array]:
            found = composite(dict(zip(names, values, strict=True)), options)
            return [found[name] for name in results]

        problems = _problems([value.shape for value in values])
        if problems == 1:
            return [value[None] for value in one(*(value[0] for value in values))]
        shared = [value.shape[0] == 1 for value in values]
        axes = [None if same else 0 for same in shared]
        values = tuple(
            value[0] if same else value for value, same in zip(values, shared, strict=True)
        )
        return list(jax.vmap(one, in_axes=axes)(*values))

    return solve


def _alike_varying(values: Sequence[Array]) -> list[Array]:
    """Return the operands varying along the same axes of a `shard_map`: those of any of them."""
    everywhere = frozenset[str]().union(*map(varying, values))
    missing = [tuple(sorted(everywhere - varying(value))) for value in values]
    return [
        jax.lax.pcast(value, axes, to="varying") if axes else value
        for value, axes in zip(values, missing, strict=True)
    ]


class Call:
    """A function of named arrays that JAX can trace, batch, differentiate and compile."""

    def __init__(self, name: str, composite: Callable[[Arrays, Options], Arrays]) -> None:
        self.composite = _one_by_one(composite)
        self.primitive = primitive = Primitive(f"fusebn_{name}")
        primitive.multiple_results = True
        primitive.def_impl(self._run)
        primitive.def_abstract_eval(_types)
        batching.primitive_batchers[primitive] = self._batch
        portable = mlir.lower_fun(self.composite, multiple_results=True)
        mlir.register_lowering(primitive, portable)
        if name in HANDLERS and not why_not_loaded:
            lowering = partial(_lower, jax.ffi.ffi_lowering(f"fusebn_{name}"), portable)
            mlir.register_lowering(primitive, lowering, platform="cpu")

    def __call__(self, operands: Arrays, results: Sequence[str], options: Options) -> Arrays:
        """Return the results of those names."""
        names, results = _in_order(operands), _in_order(results)
        values = [in_one_piece(operands[name]) for name in names]
        if asked_portable():
            found = self.composite(*values, names=names, results=results, options=options)
        else:
            values = _alike_varying(values)
            found = self.primitive.bind(*values, names=names, results=results, options=options)
        return dict(zip(results, found, strict=True))

    def _run(self, *values: Array, **parameters: Any) -> list[Array]:
        with jax.disable_jit(False):  # a call is one operation, which is compiled like JAX's own
            found: list[Array] = _compiled(self.primitive, tuple(parameters.items()))(*values)
        return found

    def _batch(
        self, values: Sequence[Array], dims: Sequence[int | None], **parameters: Any
    ) -> tuple[list[Array], list[int]]:
        """Fold the mapped axis into that of the problems."""
        (size,) = {v.shape[d] for v, d in zip(values, dims, strict=True) if d is not None}
        fronted = [
            value[None] if dim is None else jnp.moveaxis(value, dim, 0)
            for value, dim in zip(values, dims, strict=True)
        ]
        problems = _problems([value.shape[1:] for value in fronted])

        def fold(value: Array) -> Array:
            if value.shape[:2] != (1, 1):
                value = jnp.broadcast_to(value, (size, problems, *value.shape[2:]))
            return value.reshape(-1, *value.shape[2:])

        found = self.primitive.bind(*map(fold, fronted), **parameters)
        unfolded = [value.reshape(size, problems, *value.shape[1:]) for value in found]
        return unfolded, [0] * len(unfolded)


@cache
def _compiled(primitive: Primitive, parameters: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(partial(primitive.bind, **dict(parameters)))


def _types(
    *operands: Any, names: tuple[str, ...], results: tuple[str, ...], options: Options
) -> list[Any]:
    """Return the types of the results: those of x or of its statistics."""
    x = operands[names.index("x")]
    problems = _problems([operand.shape for operand in operands])
    block, channels = (problems, *x.shape[1:]), x.shape[2]
    stat = np.dtype(_portable.stat_type(x))
    small = {"batch": (problems, 2, 2, channels), "count": (problems,)}

    def type_of(result: str) -> Any:
        like_x = result in ("y", "dx", "dresidual")
        shape = block if like_x else small.get(result, (problems, channels))
        spec = jax.sharding.PartitionSpec(*[None] * len(shape))
        return x.update(
            shape=shape,
            dtype=x.dtype if like_x else stat,
            weak_type=False,
            sharding=jax.sharding.NamedSharding(x.sharding.mesh, spec),
        )

    return [type_of(result) for result in results]


def _lower(
    lowering: Any,
    portable: Any,
    context: Any,
    *values: Any,
    names: tuple[str, ...],
    results: tuple[str, ...],
    options: Options,
) -> Any:
    if divides(context):
        return portable(context, *values, names=names, results=results, options=options)
    activation = None if options.activation == "identity" else options.activation
    return lowering(
        context,
        *values,
        operands=np.int64(sum(1 << ITEMS.index(name) for name in names)),
        results=np.int64(sum(1 << ITEMS.index(name) for name in results)),
        activation=np.int64(_spec.ACTIVATIONS[activation]),
        epsilon=np.float64(options.epsilon),
        correction=np.float64(options.correction),
        factor=np.float64(options.factor),
    )


# ---- from arrays to blocks and back ----


def unblocked(block: Array, x: Array) -> Array:
    """Return a block in the shape of x, and as x is sharded."""
    return like(x, block.reshape(x.shape))


def _cut(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Return how much lies before the channel axis and after it."""
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    # With one channel all is along one axis, and the core had best know it.
    return (1, outer * inner) if shape[axis] == 1 else (outer, inner)


def block_of(x: Array, axis: int) -> Array:
    """Return x as one problem: [1, outer, channels, inner]."""
    outer, inner = _cut(x.shape, axis)
    return in_one_piece(x).reshape(1, outer, x.shape[axis], inner)


def positions_of(weights: Array, x: Array, axis: int) -> Array:
    """Return weights, which broadcast to x and have length 1 for channels, as [1, outer, inner]."""
    shape = x.shape
    weights = jnp.broadcast_to(in_one_piece(weights), (*shape[:axis], 1, *shape[axis + 1 :]))
    return weights.reshape(1, *_cut(shape, axis))
