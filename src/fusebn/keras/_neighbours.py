"""Which layer beside a batch norm can take it over in inference, and why none can.

That is the layer whose output it normalizes, or, where asked for, the one that reads its result.
Either way nobody else sees what passes between the two, and each is called once. Nothing is
changed here.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from fusebn.keras._folding import followed, is_norm, is_open

Layer = Any
Model = Any

# Class -> (kind of weight, its attribute), as `fusebn.fold` wants them.
_KINDS: dict[type[Any], tuple[str, str]] = {
    keras.layers.Dense: ("dense", "kernel"),
    keras.layers.Conv1D: ("conv", "kernel"),
    keras.layers.Conv2D: ("conv", "kernel"),
    keras.layers.Conv3D: ("conv", "kernel"),
    keras.layers.DepthwiseConv1D: ("depthwise_conv", "kernel"),
    keras.layers.DepthwiseConv2D: ("depthwise_conv", "kernel"),
    keras.layers.SeparableConv1D: ("conv", "pointwise_kernel"),
    keras.layers.SeparableConv2D: ("conv", "pointwise_kernel"),
    keras.layers.Conv1DTranspose: ("conv_transpose", "kernel"),
    keras.layers.Conv2DTranspose: ("conv_transpose", "kernel"),
    keras.layers.Conv3DTranspose: ("conv_transpose", "kernel"),
}


class Neighbour(NamedTuple):
    """A batch norm, and the layer that can take it over."""

    norm: Layer
    layer: Layer | None = None
    before: bool = False  # whether the batch norm comes before the layer
    reason: str = ""  # why there is none

    @property
    def kind(self) -> str:
        """What the layer's weight is to `fusebn.fold`."""
        return _KINDS[type(self.layer)][0]

    @property
    def weight(self) -> str:
        """The name of the layer's weight."""
        return _KINDS[type(self.layer)][1]

    @property
    def groups(self) -> int:
        """Of the layer's weight: those of a separable convolution are not the pointwise one's."""
        plain = self.kind != "depthwise_conv" and self.weight == "kernel"
        return getattr(self.layer, "groups", 1) if plain else 1


def neighbours(model: Model, before: bool, shared: set[int]) -> list[Neighbour]:
    """Return what can take over each batch norm of a Functional or Sequential model.

    Layers whose ids are in `shared` stand in several models.
    """
    follow = followed(model)
    norms = [operation for operation in follow.operations if is_norm(operation)]
    return [_neighbour(follow, norm, before, shared) for norm in norms]


def shared_layers(model: Model) -> set[int]:
    """Return the ids of layers that stand in several of the models inside of a model."""

    def layers(model: Model) -> Iterator[int]:
        for layer in model.layers:
            yield id(layer)
            if isinstance(layer, keras.Model) and is_open(layer) and id(layer) not in seen:
                seen.add(id(layer))
                yield from layers(layer)

    seen: set[int] = set()
    return {key for key, count in Counter(layers(model)).items() if count > 1}


def _neighbour(follow: Any, norm: Layer, before: bool, shared: set[int]) -> Neighbour:
    if id(norm) in shared:
        return Neighbour(norm, reason="it is in several models")
    source = follow.source_of(norm)
    if source is None:
        return Neighbour(norm, reason="it comes first, or is called more than once")
    reason = _why_not(source, norm, shared)
    if not reason and source.activation is not keras.activations.linear:
        reason = f"{_named(source)} has an activation"
    if not reason:
        _, reason = follow.reader_of(source)
    if not reason:
        return Neighbour(norm, source)
    return _after(follow, norm, shared, reason) if before else Neighbour(norm, reason=reason)


def _after(follow: Any, norm: Layer, shared: set[int], reason: str) -> Neighbour:
    """Return the layer after a batch norm, if it can take that over exactly."""
    if getattr(norm, "activation", None) is not None or has_residual(norm):
        return Neighbour(norm, reason=f"{reason}; and it does more than normalize")
    reader, why = follow.reader_of(norm)
    if reader is None:
        return Neighbour(norm, reason=f"{reason}; {why or 'nothing follows'}")
    why = _why_not(reader, norm, shared)
    found = Neighbour(norm, reader, before=True)
    if not why and (found.kind == "conv_transpose" or found.weight != "kernel"):
        why = f"{_named(reader)} cannot take over what comes before it"
    if not why and found.kind != "dense" and _pads(reader):
        why = f"{_named(reader)} pads zeros"
    return Neighbour(norm, reason=f"{reason}; {why}") if why else found


def _why_not(layer: Layer, norm: Layer, shared: set[int]) -> str:
    """Return why a layer beside a batch norm cannot take it over, whatever else there is."""
    if type(layer) not in _KINDS:
        return f"{_named(layer)} is beside it"
    if id(layer) in shared:
        return f"{_named(layer)} is in several models"
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return f"{_named(layer)} is quantized, or has LoRA"
    if layer.compute_dtype != norm.compute_dtype:
        return f"{_named(layer)} has another dtype"
    rank = norm.input_spec.ndim
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    axes = norm.axis if isinstance(norm.axis, list | tuple) else [norm.axis]
    if [axis % rank for axis in axes] != [rank - 1 if last else 1]:
        return "its axis is not that of the channels"
    return ""


def _pads(layer: Layer) -> bool:
    return layer.padding != "valid" and any(size != 1 for size in layer.kernel_size)


def has_residual(norm: Layer) -> bool:
    """Say whether a batch norm is called with something to add."""
    return any("residual" in node.arguments.kwargs for node in norm._inbound_nodes)


def _named(layer: Layer) -> str:
    return f"{type(layer).__name__} {layer.name!r}"
