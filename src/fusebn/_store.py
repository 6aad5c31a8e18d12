"""`save` and `load`: layers and arrays in one safetensors file, written whole or not at all.

A layer named "bn" is stored as the tensors of its state, "bn.moving_mean" and so on, which any
reader of safetensors understands; its constructor's arguments stand in the file's metadata.
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from fusebn import _spec
from fusebn._layer import BatchNorm

_FORMAT = "fusebn/1"


def save(path: str | os.PathLike[str], layers: Any) -> None:
    """See :func:`fusebn.save`."""
    if not isinstance(layers, Mapping):
        fix = 'Give each a name: {"bn": layer}.'
        kind = type(layers).__name__
        _spec.fail(TypeError, "save", "layers", "be a mapping of names to layers", kind, fix)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    configs = {}
    for name, value in layers.items():
        if not isinstance(name, str):
            _spec.fail(TypeError, "save", "layers", "have names that are strings", repr(name))
        if isinstance(value, BatchNorm):
            configs[name] = value.config()
            found = {f"{name}.{key}": array for key, array in value.state_dict().items()}
        elif isinstance(value, np.ndarray) and (
            value.dtype.kind in "biuf" or value.dtype.name == "bfloat16"
        ):
            found = {name: np.asarray(value, order="C")}
        else:
            got = getattr(value, "dtype", type(value).__name__)
            expected = f"hold BatchNorm layers and numeric arrays, {name!r} too"
            _spec.fail(TypeError, "save", "layers", expected, f"{got}")
        taken = found.keys() & tensors.keys()
        if taken:
            got = f"two of {min(taken)!r}"
            _spec.fail(ValueError, "save", "layers", "give each tensor its own name", got)
        tensors |= found
    metadata = {"format": _FORMAT, "layers": json.dumps(configs)}
    _write(Path(path), safetensors.numpy.save(tensors, metadata))


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step: a crash at any time leaves the old one or the new one whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """See :func:`fusebn.load`."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        fix = f"It is damaged or of another format ({error})."
        _spec.fail(ValueError, "load", "path", "name a safetensors file", repr(str(path)), fix)
    if metadata.get("format") != _FORMAT:
        fix = "Read a file of another origin by safetensors.numpy.load_file."
        got = f"{str(path)!r} of format {metadata.get('format')!r}"
        _spec.fail(ValueError, "load", "path", "name a file written by fusebn.save", got, fix)
    try:
        layers: dict[str, Any] = {}
        for name, config in json.loads(metadata["layers"]).items():
            layer = BatchNorm.from_config(config)
            own, observed = f"{name}.", f"{name}.transforms."
            keys = {own + key for key in layer.state_dict()}
            keys |= {key for key in tensors if key.startswith(observed)}
            state = {key.removeprefix(own): tensors.pop(key) for key in keys}
            layer.load_state_dict(state)
            layers[name] = layer
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fix = f"Its metadata and its tensors disagree ({error})."
        _spec.fail(ValueError, "load", "path", "name a whole file", repr(str(path)), fix)
    return layers | tensors
