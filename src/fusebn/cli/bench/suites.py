"""Suites of steps: what a framework's users run, each way of it measured against ours.

A step is what they call: a forward and a backward pass of an op, a layer, a call so small that only
its overhead is left, a network. One peer runs all steps of a suite.
"""

from __future__ import annotations

from typing import NamedTuple

from fusebn.cli.bench.cases import LAYOUTS, QUICK_SHAPES, RESNET50, USUAL_DTYPES

BOTH = ("forward", "backward")
CHAIN = ("forward+residual+relu", "backward+residual+relu")
TINY_CALLS = 500  # so many take milliseconds, which a clock can tell apart


class Step(NamedTuple):
    """One of the ways there are."""

    name: str
    title: str
    against: str  # the step of ours that it is compared with
    verbs: tuple[str, ...] = BOTH  # what its answer is checked as
    calls: int = 1  # so many times in what is timed as one
    slow: bool = False  # left out of a quick run, and measured with fresh memory alone

    @property
    def ours(self) -> bool:
        """Whether it is this library's."""
        return self.title.startswith("fusebn")


class Suite(NamedTuple):
    """Steps that are measured together."""

    name: str  # also how the names of its files end
    title: str
    framework: str  # as tables call it
    peer: str  # the module under peers/
    steps: dict[str, Step]
    note: str  # what was measured, under the tables
    shapes: tuple[str, ...]
    quick_shapes: tuple[str, ...]
    layouts: tuple[str, ...] = LAYOUTS
    dtypes: tuple[str, ...] = USUAL_DTYPES[:2]
    memories: tuple[str, ...] = ("warm", "fresh")
    apart: bool = False  # every step in a process of its own, so that its memory is its own
    oracle: bool = True  # whether the oracle judges the answers; else the first of them does
    backend: str = ""  # of Keras: a process has one
    needs: tuple[str, ...] = ()  # packages, besides what its framework's option asks for

    @property
    def tiny(self) -> bool:
        """Whether its times are those of calls and not of memory."""
        return any(step.calls > 1 for step in self.steps.values())

    @property
    def environment(self) -> dict[str, str]:
        """What its processes must find."""
        return {"KERAS_BACKEND": self.backend} if self.backend else {}

    @property
    def part(self) -> str:
        """What the suite is called among those of its framework."""
        return self.name.partition("-")[2]


def _steps(*steps: Step) -> dict[str, Step]:
    return {step.name: step for step in steps}


def _pair(name: str, title: str, verbs: tuple[str, ...], calls: int = 1) -> tuple[Step, Step]:
    """Return the same done by both: PyTorch's step has the name alone."""
    ours = f"fusebn-{name}"
    return (
        Step(ours, f"fusebn, {title}", ours, verbs, calls),
        Step(name, f"PyTorch, {title}", ours, verbs, calls),
    )


MEMORY_NOTE = """\
fresh  as a user gets it, the outputs' memory fetched and given back
warm   memory that was used before, from an allocator that recycles
"""

TENSORFLOW = Suite(
    "tensorflow",
    "Training steps",
    "TensorFlow",
    "tensorflow_steps",
    _steps(
        Step("fusebn", "fusebn", "fusebn"),
        Step("flag", "fusebn, is_training a tensor", "fusebn"),
        Step("fused", "fused_batch_norm", "fusebn"),
        Step("moments", "moments + batch_normalization", "fusebn"),
        Step("cond", "fused_batch_norm, two in a cond", "flag"),
    ),
    """\
A step is forward and backward in a tf.compat.v1 session. A ratio is the time of
a step divided by that of fusebn with is_training=True; two ops in a cond are
divided by fusebn with a tensor, which does the same.
"""
    + MEMORY_NOTE,
    RESNET50,
    QUICK_SHAPES,
)

TORCH_CALLS = Suite(
    "torch-calls",
    "Calls on 8x4",
    "PyTorch",
    "torch_layers",
    _steps(
        *_pair("call", "function, training", ("forward",), TINY_CALLS),
        *_pair("eval", "function, inference", ("inference",), TINY_CALLS),
        *_pair("M.call", "module, training", ("forward",), TINY_CALLS),
        *_pair("M.eval", "module, inference", ("inference",), TINY_CALLS),
        *_pair("step", "module, forward and backward", BOTH, TINY_CALLS),
    ),
    """\
Microseconds of a call on a tensor so small that only the call is left. In
training autograd records it. A ratio is PyTorch's time divided by ours: below 1
our call costs more.
""",
    ("8x4",),
    ("8x4",),
    ("channels-last",),
    ("float32",),
    ("fresh",),
)

TORCH_LAYERS = Suite(
    "torch-layers",
    "Layers",
    "PyTorch",
    "torch_layers",
    _steps(
        *_pair("forward", "forward", ("forward",)),
        *_pair("backward", "backward", ("backward",)),
        *_pair("chain", "batch norm + residual + ReLU, forward and backward", CHAIN),
    ),
    """\
Modules in training, called through autograd. A ratio is the time of PyTorch's
module divided by that of ours with the same kind of memory. The chain is what a
ResNet's blocks do: PyTorch's adds and applies ReLU in place.
"""
    + MEMORY_NOTE,
    RESNET50,
    ("32x56x56x64", "32x14x14x1024"),
)

TORCH_INFERENCE = Suite(
    "torch-inference",
    "Residual blocks in inference",
    "PyTorch",
    "torch_networks",
    _steps(
        Step("eager", "PyTorch", "fusebn"),
        Step("fusebn", "fusebn.torch.fuse", "fusebn"),
    ),
    """\
ResNet-50's bottleneck blocks, convolutions and all, in evaluation mode without
gradients; bfloat16 by autocast. A ratio is the time of the block divided by
that of the same block after fusebn.torch.fuse.
"""
    + MEMORY_NOTE,
    ("16x56x56x256", "16x28x28x512", "16x14x14x1024", "16x7x7x2048"),
    ("16x28x28x512",),
    ("channels-last",),
    oracle=False,
)

TORCH_RESNET = Suite(
    "torch-resnet",
    "ResNet-50, a training step",
    "PyTorch",
    "torch_networks",
    _steps(
        Step("eager", "PyTorch", "fusebn"),
        Step("compile", "PyTorch, torch.compile", "fusebn", slow=True),
        Step("fusebn", "fusebn.torch.fuse", "fusebn"),
        Step("both", "fusebn.torch.fuse, then torch.compile", "fusebn", slow=True),
    ),
    """\
Forward, backward and the update of the weights by SGD; bfloat16 by autocast.
Before it is timed, each way trains on the same batches from the same start, and
its losses must be PyTorch's to rounding. A ratio is the time of a step divided
by that of the network after fusebn.torch.fuse with the same kind of memory.
"""
    + MEMORY_NOTE,
    ("16x224x224x3",),
    ("4x64x64x3",),
    ("channels-last",),
    apart=True,
    oracle=False,
)

JAX_LAYERS = Suite(
    "jax-layers",
    "Layers in training",
    "JAX",
    "jax_layers",
    _steps(
        Step("fusebn", "fusebn", "fusebn"),
        Step("flag", "fusebn, a traced flag", "fusebn"),
        Step("flax", "Flax", "fusebn"),
        Step("fusebn-chain", "fusebn, with residual and ReLU", "fusebn-chain", CHAIN),
        Step("chain", "Flax, with residual and ReLU", "fusebn-chain", CHAIN),
    ),
    """\
Linen's layers in training, forward and backward in one jitted function, which
returns y, all gradients and the new running averages. A ratio is the time of
Flax's layer (with a residual and ReLU: of what XLA makes of the three) divided
by that of ours with the same kind of memory.
"""
    + MEMORY_NOTE,
    RESNET50,
    ("32x56x56x64", "32x14x14x1024"),
)

JAX_INFERENCE = Suite(
    "jax-inference",
    "Layers in inference",
    "JAX",
    "jax_layers",
    _steps(
        Step("fusebn", "fusebn", "fusebn", ("inference",)),
        Step("flax", "Flax, fused by XLA", "fusebn", ("inference",)),
    ),
    """\
Linen's layers in inference, jitted: XLA makes one loop of Flax's. A ratio is
its time divided by ours.
"""
    + MEMORY_NOTE,
    RESNET50,
    ("32x56x56x64", "32x14x14x1024"),
)


def _keras(backend: str) -> tuple[Suite, Suite]:
    """Return what is measured on a backend of Keras."""
    verbs = ("forward+relu", "backward+relu")
    layers = Suite(
        f"keras-{backend}",
        "Batch norm and ReLU, a training step",
        "Keras",
        "keras_layers",
        _steps(
            Step("fusebn", "fusebn, activation='relu'", "fusebn", verbs),
            Step("keras", "Keras, two layers", "fusebn", verbs),
        ),
        """\
Forward, backward and the update of the moving statistics, as `fit` runs them: in
a tf.function, jitted by JAX, or eagerly in PyTorch. A ratio is the time of
Keras's BatchNormalization and ReLU divided by that of our one layer.
"""
        + MEMORY_NOTE,
        RESNET50,
        ("32x56x56x64", "32x14x14x1024"),
        ("channels-last",),
        USUAL_DTYPES[:1],
        backend=backend,
        needs=(backend,),
    )
    fit = Suite(
        f"keras-{backend}-fit",
        "ResNet-20, an epoch of fit",
        "Keras",
        "keras_networks",
        _steps(
            Step("keras", "Keras", "fusebn"),
            Step("fusebn", "fusebn.keras.fuse", "fusebn"),
        ),
        """\
The ResNet of 20 layers for small images, in batches of 64. Before it is timed,
each way trains on the same images from the same start, and its losses must be
Keras's to rounding. A ratio is the time of an epoch divided by that of the
model after fusebn.keras.fuse.
"""
        + MEMORY_NOTE,
        ("256x32x32x3",),
        ("64x32x32x3",),
        ("channels-last",),
        USUAL_DTYPES[:1],
        apart=True,
        oracle=False,
        backend=backend,
        needs=(backend,),
    )
    return layers, fit


KERAS = {backend: _keras(backend) for backend in ("tensorflow", "torch", "jax")}


def _quantized(
    framework: str, part: str, needs: tuple[str, ...], *more: Step, backend: str = ""
) -> Suite:
    """Return what transforms cost in a framework."""
    return Suite(
        f"quantize-{part}",
        f"Convolution, batch norm and ReLU with transforms, {framework}",
        framework,
        f"quantized_{part.partition('-')[0]}",
        _steps(
            Step("fusebn", "fusebn", "fusebn"),
            Step("transforms", "fusebn, four transforms", "fusebn"),
            Step("statistics", "fusebn, batch statistics too", "fusebn"),
            *more,
        ),
        """\
A training step of a block: a 3x3 convolution, batch norm and ReLU, with fake
quantization of the four variables switched on at run time; "batch statistics
too" with transform_batch_statistics=True. A ratio is the time of a step divided
by that of the same block without transforms; by hand is divided by ours with
batch statistics too, each with the convolution or without.
"""
        + MEMORY_NOTE,
        ("16x56x56x64", "16x28x28x128", "16x14x14x256"),
        ("16x28x28x128",),
        ("channels-last",),
        USUAL_DTYPES[:1],
        oracle=False,
        backend=backend,
        needs=needs,
    )


QUANTIZE = (
    _quantized("PyTorch", "torch", ("torch",)),
    _quantized(
        "TensorFlow",
        "tensorflow",
        ("tensorflow",),
        Step("hand", "moments and cond, by hand", "statistics"),
        Step("alone", "fusebn, batch statistics too, no convolution", "alone"),
        Step("hand-alone", "moments and cond, by hand, no convolution", "alone"),
    ),
    _quantized("JAX", "jax", ("jax", "flax")),
    *(
        _quantized("Keras", f"keras-{backend}", ("keras", backend), backend=backend)
        for backend in KERAS
    ),
)

# What an option of `fusebn bench` stands for.
FRAMEWORKS = {
    "tensorflow": (TENSORFLOW,),
    "torch": (TORCH_CALLS, TORCH_LAYERS, TORCH_INFERENCE, TORCH_RESNET),
    "jax": (JAX_LAYERS, JAX_INFERENCE),
    "keras": tuple(suite for suites in KERAS.values() for suite in suites),
    "quantize": QUANTIZE,
}
# The extra that brings what an option needs, and the packages that tell whether it is there.
EXTRAS = {
    "tensorflow": ("tensorflow", ("tensorflow",)),
    "torch": ("torch", ("torch",)),
    "jax": ("flax", ("jax", "flax")),
    "keras": ("keras", ("keras",)),
    "quantize": ("cli", ()),  # each suite has needs of its own
}
