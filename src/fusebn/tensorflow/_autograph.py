"""Keeps AutoGraph out: it rewrites what a ``tf.function`` calls, which here is plain Python."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import tensorflow as tf

F = TypeVar("F", bound=Callable[..., Any])


def unconverted(function: F) -> F:
    """Return the function as it is written, inside a ``tf.function`` too."""
    return cast(F, tf.autograph.experimental.do_not_convert(function))
