"""The ops: derivatives of any order, and what compilers, exporters and torch.func make of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

import fusebn
import fusebn.torch as fbt
from devices import seeded
from fusebn import _core, memory
from fusebn.torch import _kernels, _ops, _portable
from fusebn.torch._portable import NAMES, Options

ACTIVATIONS = tuple(_kernels.ACTIVATIONS)
EXTRAS = ("plain", "residual", "weights", "both")


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Return a generator seeded by the test's own name."""
    return seeded(sum(request.node.name.encode()))


def options_of(training: bool = True, **others: Any) -> Options:
    defaults = {
        "axis": 1, "epsilon": 0.1, "correction": 1.0, "factor": 0.25, "activation": "identity",
    }  # fmt: skip
    return Options(training, **{**defaults, **others})


def tensors_of(generator: torch.Generator, extras: str = "both") -> dict[str, Tensor | None]:
    """Return what the ops take, in float64, all of it to be differentiated."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made: dict[str, Tensor | None] = {
        "x": normal(5, 3, 2),
        "scale": normal(3),
        "offset": normal(3),
        "mean": normal(3),
        "variance": normal(3).abs() + 0.5,
        "residual": normal(5, 3, 2) if extras in ("residual", "both") else None,
        "weights": normal(5, 1, 2).abs() + 0.5 if extras in ("weights", "both") else None,
    }
    return {k: None if v is None else v.requires_grad_() for k, v in made.items()}


def bind(
    function: Callable[..., Any], tensors: dict[str, Tensor | None], options: Options
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Return a function of the tensors that are there, and these."""
    names = [name for name in NAMES if tensors[name] is not None]

    def bound(*values: Tensor) -> Any:
        given = {**dict.fromkeys(NAMES), **dict(zip(names, values, strict=True))}
        return tuple(function(*given.values(), options)[:3])

    return bound, tuple(value for value in tensors.values() if value is not None)


def assert_same(actual: Any, expected: Any, ulps: float = 1e3) -> None:
    """Assert equality to rounding, in float64, of tensors or trees of them."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=ulps * 2.2e-16, atol=ulps * 2.2e-16)
        return
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, ulps)


# ---- derivatives ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("extras", EXTRAS)
def test_first_order(
    generator: torch.Generator, training: bool, activation: str, extras: str
) -> None:
    """Of all three results, by every tensor, weights and given statistics included."""
    options = options_of(training, activation=activation)
    bound, inputs = bind(_ops.batch_norm, tensors_of(generator, extras), options)
    assert gradcheck(bound, inputs)
    composite, _ = bind(_portable.batch_norm, tensors_of(generator, extras), options)
    assert_same(bound(*inputs), composite(*inputs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_second_order(generator: torch.Generator, training: bool, activation: str) -> None:
    options = options_of(training, activation=activation)
    assert gradgradcheck(*bind(_ops.batch_norm, tensors_of(generator), options))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_order_of_the_short_way(
    generator: torch.Generator, training: bool, activation: str
) -> None:
    tensors = tensors_of(generator, "residual")
    mean, variance = (tensors.pop(name).detach() for name in ("mean", "variance"))  # type: ignore[union-attr]
    inputs = [tensors[name] for name in ("x", "scale", "offset", "residual")]
    options = options_of(training, activation=activation)

    def short(x: Any, scale: Any, offset: Any, residual: Any) -> Any:
        given = mean.clone(), variance.clone()
        y = _ops.short_way(x, scale, offset, *given, residual, options)
        assert y is not None
        return y

    assert gradcheck(short, inputs)
    assert gradgradcheck(short, inputs)


@pytest.mark.parametrize("training", [True, False])
def test_third_order(generator: torch.Generator, training: bool) -> None:
    """PyTorch's own is wrong here: the composite is the measure."""
    tensors = tensors_of(generator)

    def third(function: Callable[..., Any]) -> Tensor:
        bound, inputs = bind(function, tensors, options_of(training, activation="silu"))
        value = sum(result.sin().sum() for result in bound(*inputs))
        for _ in range(3):
            found = torch.autograd.grad(
                value, inputs, create_graph=True, allow_unused=True, materialize_grads=True
            )
            value = sum(gradient.sin().sum() for gradient in found)
        return value  # type: ignore[return-value]

    assert_same(third(_ops.batch_norm), third(_portable.batch_norm), 1e5)


def test_gradients_are_made_for_what_wants_them(generator: torch.Generator) -> None:
    tensors = tensors_of(generator, "residual")
    x, scale, offset, _, _, residual, _ = (
        None if v is None else v.detach() for v in tensors.values()
    )
    for i in range(4):
        sources = [
            v.clone().requires_grad_(i == j) for j, v in enumerate((x, scale, offset, residual))
        ]  # type: ignore[union-attr]
        for activation in (None, "relu"):
            y = fbt.batch_norm(
                sources[0], None, None, *sources[1:3], True, residual=sources[3],
                activation=activation,
            )  # fmt: skip
            y.sum().backward()
        assert [v.grad is not None for v in sources] == [i == j for j in range(4)]


# ---- what watches ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extras", ["plain", "both"])
def test_opcheck(generator: torch.Generator, training: bool, extras: str) -> None:
    options = options_of(training, activation="relu")
    tensors = tuple(tensors_of(generator, extras).values())
    torch.library.opcheck(torch.ops.fusebn.batch_norm, tensors, options._asdict())
    x = tensors[0]
    assert x is not None
    batch = torch.ones(2, 3, dtype=torch.float64)
    flowing = (torch.ones_like(x), torch.ones_like(batch[0]), None, batch)
    torch.library.opcheck(
        torch.ops.fusebn.batch_norm_backward, (*flowing, *tensors), options._asdict()
    )
    for axes in ([0], [0, 2], []):
        torch.library.opcheck(torch.ops.fusebn.moments, (x, None), {"axes": axes})


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[..., Any]]:
    """Compile without a compiler: what is ours is that the graph is whole and right."""
    torch._dynamo.reset()
    yield lambda function, **options: torch.compile(
        function, fullgraph=True, backend="aot_eager", **options
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled(
    generator: torch.Generator, compiled: Any, training: bool, layout: torch.memory_format
) -> None:
    """Forward, backward and the update, for one size and then for any."""

    def step(x: Any, mean: Any, var: Any, weight: Any, bias: Any, residual: Any) -> Any:
        y = fbt.batch_norm(
            x, mean, var, weight, bias, training, residual=residual, activation="relu"
        )
        return y * 2

    whole = compiled(step, dynamic=None)
    for n in (4, 6, 5):
        x, residual = (
            torch.randn(n, 3, 4, 4, generator=generator).to(memory_format=layout) for _ in "xr"
        )
        parameters = [torch.rand(3, generator=generator) + 0.5 for _ in range(2)]
        results = []
        for function in (step, whole):
            running = [torch.zeros(3), torch.ones(3)]
            leaves = [v.detach().clone().requires_grad_() for v in (x, *parameters, residual)]
            y = function(leaves[0], *running, *leaves[1:])
            y.square().sum().backward()
            results.append([y, *running, *(leaf.grad for leaf in leaves)])
            assert y.is_contiguous(memory_format=layout)
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def test_compiled_functions(generator: torch.Generator, compiled: Any) -> None:
    def step(x: Any) -> Any:
        y, mean, variance = fusebn.fused_batch_norm(x, None, None, axis=1, activation="gelu")
        return y + fusebn.moments(x, 0)[0], mean, variance

    x = torch.randn(5, 3, generator=generator)
    torch.testing.assert_close(compiled(step)(x), step(x))


def test_exported(generator: torch.Generator) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return fbt.batch_norm(x, mean, var, activation="relu6")

    x = torch.randn(4, 3, generator=generator)
    statistics = torch.zeros(3), torch.ones(3)
    for strict in (True, False):
        sizes = ({0: torch.export.Dim("n")}, None, None)
        program = torch.export.export(Net(), (x, *statistics), dynamic_shapes=sizes, strict=strict)
        assert any("fusebn.batch_norm" in str(node.target) for node in program.graph.nodes)
        longer = torch.cat([x, x])
        torch.testing.assert_close(
            program.module()(longer, *statistics), Net()(longer, *statistics)
        )


def test_what_a_mode_sees(generator: torch.Generator) -> None:
    """FLOP counters, profilers and fake tensors live on the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 3, generator=generator)
    with Watch():
        fbt.batch_norm(x, None, None, training=True)
    assert "fusebn.batch_norm.default" in seen
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        y = fbt.batch_norm(mode.from_tensor(x), None, None, training=True)
    assert y.shape == (4, 3)


# ---- torch.func ----


def ours(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    y, mean, variance = _ops.batch_norm(
        x, scale, offset, None, None, None, None,
        options_of(activation="silu", factor=1.0, epsilon=1e-3),
    )  # fmt: skip
    return y + (mean * variance)[:, None]


def theirs(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    y = F.silu(F.batch_norm(x, None, None, scale, offset, True, eps=1e-3))
    return y + (x.mean((0, 2)) * x.transpose(0, 1).flatten(1).var(1))[:, None]


@pytest.fixture
def three(generator: torch.Generator) -> list[Tensor]:
    """x, scale and offset."""
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(4, 3, 2), 3, 3]
    ]


def test_func_grad(three: list[Tensor]) -> None:
    every = (0, 1, 2)
    grads = [
        torch.func.grad(lambda *a, f=f: f(*a).sin().sum(), every)(*three) for f in (ours, theirs)
    ]
    assert_same(*grads)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_func_jacobian(three: list[Tensor], chunk_size: int | None) -> None:
    every = (0, 1, 2)
    assert_same(
        torch.func.jacrev(ours, every, chunk_size=chunk_size)(*three),
        torch.func.jacrev(theirs, every)(*three),
    )


def by_hand(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Do the same, written out: PyTorch's own batch norm is wrong in one block of second order."""
    mean = x.mean((0, 2), keepdim=True)
    variance = (x - mean).square().mean((0, 2), keepdim=True)
    z = (x - mean) / (variance + 1e-3).sqrt() * scale[:, None] + offset[:, None]
    return F.silu(z) + mean * variance * 8 / 7


# PyTorch's own rules for forward mode are scripted.
SCRIPTED = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"


@pytest.mark.filterwarnings(SCRIPTED)
@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_func_second_order(three: list[Tensor], outer: Any, inner: Any) -> None:
    second = [
        outer(inner(lambda *a, f=f: f(*a).square().sum(), (0, 1)), (0, 1)) for f in (ours, by_hand)
    ]
    assert_same(*(f(*three) for f in second), 1e4)


@pytest.mark.filterwarnings(SCRIPTED)
def test_forward_mode(three: list[Tensor], generator: torch.Generator) -> None:
    """By torch.func and by dual tensors, which the short way must not take."""
    tangents = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in three]
    found = [torch.func.jvp(f, tuple(three), tuple(tangents)) for f in (ours, theirs)]
    assert_same(*found)
    with forward_ad.dual_level(), torch.no_grad():
        x = forward_ad.make_dual(three[0], tangents[0])
        pairs = [
            forward_ad.unpack_dual(f(x, None, None, training=True))
            for f in (fbt.batch_norm, F.batch_norm)
        ]
    assert_same(*pairs)


@pytest.mark.parametrize("many", [False, True])
def test_compiled_transforms(three: list[Tensor], compiled: Any, many: bool) -> None:
    x = three[0]

    def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        of = torch.func.grad(lambda x: function(x, None, None, training=True).sin().sum())
        return torch.func.vmap(of) if many else of

    x = torch.stack([x, x + 1]) if many else x
    assert_same(compiled(gradient(fbt.batch_norm))(x), gradient(F.batch_norm)(x))


MAPPED = [(0, None, None), (1, None, None), (-1, 0, None), (0, 0, 0), (None, 0, None), (0, 1, 0)]


@pytest.mark.parametrize("in_dims", MAPPED, ids=str)
def test_func_vmap(three: list[Tensor], generator: torch.Generator, in_dims: Any) -> None:
    """As one call an element, and so are gradients."""
    many = []
    for value, dim in zip(three, in_dims, strict=True):
        copies = [torch.randn(value.shape, generator=generator).double() for _ in range(5)]
        many.append(value if dim is None else torch.stack(copies, dim))

    def one_by_one(function: Callable[..., Any]) -> Any:
        results = [
            function(
                *(v if d is None else v.select(d, i) for v, d in zip(many, in_dims, strict=True))
            )
            for i in range(5)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return tuple(torch.stack(values) for values in zip(*results, strict=True))

    assert_same(torch.func.vmap(ours, in_dims)(*many), one_by_one(theirs))
    gradients = [
        torch.func.grad(lambda *a, f=f: f(*a).sin().sum(), (0, 1, 2)) for f in (ours, theirs)
    ]
    assert_same(torch.func.vmap(gradients[0], in_dims)(*many), one_by_one(gradients[1]))
    twice = torch.func.vmap(torch.func.vmap(ours, in_dims), (0, 0, 0))
    assert_same(
        twice(*(torch.stack([v, v + 1]) for v in many))[1],
        torch.func.vmap(ours, in_dims)(*(v + 1 for v in many)),
    )


def test_func_vmap_of_weights(three: list[Tensor], generator: torch.Generator) -> None:
    """No channel can have weights of its own, so it is one call an element."""
    x = three[0]
    many = torch.rand(5, 4, 1, 2, generator=generator, dtype=torch.float64)

    def weighted(weights: Tensor) -> Tensor:
        options = options_of(factor=1.0)
        y, _, variance = _ops.batch_norm(x, None, None, None, None, None, weights, options)
        return y + variance[:, None] + _ops.moments(x, (0, 2), weights).m2[:, None]

    for function in (weighted, torch.func.grad(lambda w: weighted(w).sin().sum())):
        assert_same(torch.func.vmap(function)(many), torch.stack([function(w) for w in many]))


@pytest.mark.parametrize("axes", [(0,), (0, 2), ()], ids=str)
def test_func_of_moments(three: list[Tensor], axes: tuple[int, ...]) -> None:
    def own(x: Tensor) -> Tensor:
        count, mean, m2 = _ops.moments(x, axes, None)
        return mean * m2 * count

    def composite(x: Tensor) -> Tensor:
        count, mean, m2 = _portable.moments(x, list(axes), None)
        return mean * m2 * count

    assert_same(torch.func.jacrev(own)(three[0]), torch.func.jacrev(composite)(three[0]), 1e4)
    many = torch.stack([three[0], three[0] + 1], 2)
    assert_same(
        torch.func.vmap(torch.func.jacrev(own), 2)(many),
        torch.func.vmap(torch.func.jacrev(composite), 2)(many),
        1e4,
    )


def test_batched_gradients(three: list[Tensor]) -> None:
    """vmap over a backward that the short way has prepared."""
    x = three[0].requires_grad_()
    y = fbt.batch_norm(x, None, None, training=True)
    expected = F.batch_norm(x, None, None, training=True)
    many = torch.randn(3, *y.shape, dtype=torch.float64)
    grads = [torch.autograd.grad(v, x, many, is_grads_batched=True) for v in (y, expected)]
    assert_same(*grads)


def test_functional_call_and_an_update(three: list[Tensor]) -> None:
    """Running statistics that are arguments of a transform are written to."""
    x = three[0]

    def loss(scale: Tensor, mean: Tensor, var: Tensor) -> Any:
        y = fbt.batch_norm(x, mean, var, scale, None, True)
        return y.sin().sum(), (mean, var)

    statistics = torch.zeros(3).double(), torch.ones(3).double()
    gradient, updated = torch.func.grad(loss, has_aux=True)(three[1], *statistics)
    wanted = torch.zeros(3).double(), torch.ones(3).double()
    scale = three[1].requires_grad_()
    F.batch_norm(x, *wanted, scale, None, True).sin().sum().backward()
    assert_same(gradient, scale.grad)
    assert_same(updated, wanted)


# ---- memory and threads ----


@pytest.fixture
def pool() -> Iterator[None]:
    """Begin and end with an empty pool."""
    memory.empty_cache()
    yield
    memory.empty_cache()


def large(value: float = 0.0) -> Tensor:
    return torch.full((_kernels.POOLED // 4 // 8, 8), value)


def normalized(x: Tensor) -> Tensor:
    with torch.no_grad():
        return fbt.batch_norm(x, torch.zeros(8), torch.ones(8), eps=0.0)


@pytest.mark.of_the_cpu
@pytest.mark.usefixtures("pool")
def test_memory_comes_back_when_the_last_view_dies() -> None:
    y = normalized(large(1.0))
    address = y.data_ptr()
    for view in (y[3:], y.detach(), y.numpy(), y.view(-1), torch.utils.dlpack.from_dlpack(y)):
        other = normalized(large(2.0))
        assert other.data_ptr() != address
        assert float(view.ravel()[-1]) == 1
        del other
    kept = y[-1, -1:].detach()
    del y, view
    assert normalized(large(3.0)).data_ptr() != address
    assert kept.item() == 1
    del kept
    assert normalized(large(3.0)).data_ptr() == address


@pytest.mark.of_the_cpu
@pytest.mark.usefixtures("pool")
def test_a_shared_tensor_leaves_the_pool() -> None:
    y = normalized(large(1.0)).share_memory_()
    assert y.is_shared()
    normalized(large(2.0))
    assert bool((y == 1).all())


@pytest.mark.of_the_cpu
@pytest.mark.usefixtures("pool")
def test_what_autograd_keeps_is_not_reused() -> None:
    x = torch.randn(_kernels.POOLED // 4 // 8, 8, requires_grad=True)
    deep = fbt.batch_norm(fbt.batch_norm(x, None, None, training=True), None, None, training=True)
    for value in range(5):
        normalized(large(float(value)))
    expected = F.batch_norm(F.batch_norm(x, None, None, training=True), None, None, training=True)
    grads = [torch.autograd.grad(v.sin().sum(), x)[0] for v in (deep, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.of_the_cpu
@pytest.mark.usefixtures("pool")
def test_a_forked_child_computes() -> None:
    """As a DataLoader's worker does, after the parent has used its threads."""
    x = large(1.0)
    normalized(x)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # rather dead than waiting for a thread that was not forked
        torch.set_num_threads(1)  # so does a worker: PyTorch's own threads do not survive
        same = bool((normalized(x).numpy() == 1).all())
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.of_the_cpu  # the interpreter is of one thread
def test_several_threads_at_once(generator: torch.Generator) -> None:
    x = torch.randn(500, 64, generator=generator)
    expected = normalized_of(x)
    wrong = []

    def work() -> None:
        for _ in range(50):
            if not torch.equal(normalized_of(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def normalized_of(x: Tensor) -> Tensor:
    return fbt.batch_norm(x, None, None, training=True)


@pytest.mark.of_the_cpu
def test_threads_follow_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(_kernels, "_follows_torch", True)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            normalized(torch.ones(2, 8))
            assert _core.get_num_threads() == count
        monkeypatch.setattr(_kernels, "_follows_torch", False)
        torch.set_num_threads(1)
        normalized(torch.ones(2, 8))
        assert _core.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
