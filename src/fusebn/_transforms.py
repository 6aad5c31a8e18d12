"""What layers do to their variables before these normalize: the rules, for every framework.

A transform is any function from a vector to a vector of the same shape. A layer applies it where
its condition holds, which may be known only at run time: then both vectors are there, and `where`
chooses. Its kernels never see the difference.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fusebn import _spec
from fusebn._quantization import Ops, choose

Array = Any
VARIABLES = ("scale", "offset", "moving_mean", "moving_variance")
# What frameworks call them.
_ELSEWHERE = {
    **dict.fromkeys(("gamma", "weight"), "scale"),
    **dict.fromkeys(("beta", "bias"), "offset"),
    **dict.fromkeys(("mean", "running_mean"), "moving_mean"),
    **dict.fromkeys(("var", "variance", "running_var", "moving_var"), "moving_variance"),
}


class Transform:
    """The base class of transforms that have a state.

    A layer calls a transform as ``transform(vector)``, but one of this class as
    ``transform(vector, training=training)``, and in training even where its result is not used: so
    that it can observe what it is to transform later.
    """


Transforms = Mapping[str, Callable[..., Array]]


def checked(operation: str, transforms: Any) -> dict[str, Callable[..., Array]]:
    """Return what a layer is given as `transforms`, checked."""
    if transforms is None:
        return {}
    if not isinstance(transforms, Mapping):
        expected, got = "be a mapping of names to functions, or None", type(transforms).__name__
        _spec.fail(TypeError, operation, "transforms", expected, got)
    for name, transform in transforms.items():
        if name not in VARIABLES:
            expected = f"name {', '.join(VARIABLES)}"
            meant = _ELSEWHERE.get(str(name))
            fix = f"Here that is {meant!r}, in every framework." if meant else ""
            _spec.fail(ValueError, operation, "transforms", expected, repr(name), fix)
        if not callable(transform) or isinstance(transform, type):
            argument = f"transforms[{name!r}]"
            a_class = isinstance(transform, type)
            got = f"the class {transform.__name__}" if a_class else type(transform).__name__
            fix = f"Make one: {transform.__name__}(...)." if a_class else ""
            _spec.fail(TypeError, operation, argument, "be a function of a vector", got, fix)
    return dict(transforms)


def apply(
    ops: Ops,
    operation: str,
    transforms: Transforms,
    name: str,
    vector: Array,
    active: Any,
    training: Any,
) -> Array:
    """Return a variable as it is to normalize; None, if there is none, stays None.

    `active` and `training` are bools, or boolean scalars of the framework.
    """
    transform = transforms.get(name)
    if transform is None or vector is None:
        return vector
    observes = isinstance(transform, Transform)
    if active is False and (training is False or not observes):
        return vector
    given = vector
    if not isinstance(active, bool):
        # Where it does not apply, 0 flows back, even if that was times infinity.
        given = ops.where(active, vector, ops.stop_gradient(vector))
    new = transform(given, training=training) if observes else transform(given)
    if active is False:
        return vector
    argument = f"transforms[{name!r}]"
    expected = tuple(vector.shape)
    wanted = f"return the shape {expected} that it was given"
    if not hasattr(new, "shape"):
        _spec.fail(TypeError, operation, argument, wanted, type(new).__name__)
    shape = tuple(new.shape)
    if shape != expected:
        _spec.fail(ValueError, operation, argument, wanted, f"shape {shape}")
    new = ops.cast(new, ops.dtype(vector))
    # Where the transform does not apply, neither does its mistake.
    new = choose(ops, active, new, vector)
    message = f"{operation}: `{argument}` must return no NaN for what has none; got NaN."
    new = ops.refuse_nan(new, vector, message)
    if name == "moving_variance":
        new = choose(ops, active, ops.where(new <= 0, ops.scalar(0, new), new), new)
    return new
