"""Transforms of the variables of PyTorch's modules, against the textbook and against none."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusebn.torch as fbt
from fusebn.quantize import Transform
from fusebn.torch import _native, _ops, _portable
from fusebn.torch._portable import Moments

FLOAT64 = torch.float64
NAMES = ("scale", "offset", "moving_mean", "moving_variance")
SMOOTH = {
    "scale": torch.tanh,
    "offset": torch.exp,
    "moving_mean": lambda m: 0.7 * m + 0.1 * m.sin(),
    "moving_variance": lambda v: (v / 8).exp() * 0.5,
}
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
}


def quantizers(**options: Any) -> dict[str, fbt.FakeQuantize]:
    return {name: fbt.FakeQuantize(4, **options) for name in NAMES}


def layer(**options: Any) -> fbt.BatchNorm2d:
    made = fbt.BatchNorm2d(3, **{"dtype": FLOAT64, **options})
    torch.manual_seed(1)
    for vector in (made.weight, made.bias, made.running_mean):
        torch.nn.init.normal_(vector)
    torch.nn.init.uniform_(made.running_var)
    return made


def random(*shape: int, dtype: torch.dtype = FLOAT64) -> Tensor:
    return torch.randn(shape, dtype=FLOAT64).to(dtype)


def results(module: Any, x: Tensor, residual: Tensor | None, dy: Tensor, **call: Any) -> list[Any]:
    """y, all gradients, and the statistics afterwards."""
    tensors = [x] if residual is None else [x, residual]
    own = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = module(*own, **call)
    gradients = torch.autograd.grad(y, [*own, module.weight, module.bias], dy)
    return [y, *gradients, module.running_mean.clone(), module.running_var.clone()]


def textbook(
    module: fbt.BatchNorm2d,
    transforms: dict[str, Callable[..., Tensor]],
    x: Tensor,
    residual: Tensor | None,
    weights: Tensor | None,
    statistics: str,
) -> Tensor:
    """The layer by PyTorch's own operations, which differentiate themselves."""
    w = torch.ones_like(x[:, :1]) if weights is None else weights

    def spread(vector: Tensor) -> Tensor:
        return vector.reshape(-1, 1, 1)

    def kept(vector: Tensor) -> Tensor:
        return vector

    mean, variance = module.running_mean, module.running_var
    if statistics != "running":
        mean = (w * x).sum((0, 2, 3)) / w.sum()
        variance = (w * (x - spread(mean)).square()).sum((0, 2, 3)) / w.sum()
    if statistics == "batch":
        transforms = {**transforms, "moving_mean": kept, "moving_variance": kept}
    mean = transforms["moving_mean"](mean)
    variance = transforms["moving_variance"](variance).clamp(min=0)
    scale, offset = transforms["scale"](module.weight), transforms["offset"](module.bias)
    z = (x - spread(mean)) / (spread(variance) + module.eps).sqrt() * spread(scale)
    z = z + spread(offset) + (0 if residual is None else residual)
    return ACTIVATIONS[module.activation](z)


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- where they do not apply ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_inactive_they_change_no_bit(dtype: Any, of_batch: bool, momentum: Any) -> None:
    stat = FLOAT64 if dtype is FLOAT64 else torch.float32
    for activation, joined, memory_format in product(
        ("relu", "gelu"), (False, True), (torch.contiguous_format, torch.channels_last)
    ):
        shared = {"activation": activation, "momentum": momentum, "dtype": stat}
        plain = layer(**shared)
        transformed = layer(**shared, transforms=quantizers(), transform_batch_statistics=of_batch)
        x = (random(4, 3, 6, 7) + 100 * random(3, 1, 1)).to(dtype)
        x = x.contiguous(memory_format=memory_format)
        residual = random(4, 3, 6, 7, dtype=dtype) if joined else None
        dy = random(4, 3, 6, 7, dtype=dtype)
        for training in (True, False):
            plain.train(training)
            transformed.train(training)
            for active in (False, torch.tensor(False)):
                expected = results(plain, x, residual, dy)
                actual = results(transformed, x, residual, dy, transforms_active=active)
                assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))
            assert not transformed(x, residual).equal(plain(x, residual))
            transformed.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"nonfinite": "skip"}], ids=str)
def test_running_statistics_are_those_without_transforms(of_batch: bool, options: Any) -> None:
    for dtype, active in product((torch.float32, FLOAT64), (True, torch.tensor(True))):
        plain = layer(dtype=dtype, **options)
        transformed = layer(
            dtype=dtype,
            transforms=quantizers(limits="moving"),
            transforms_active=active,
            transform_batch_statistics=of_batch,
            **options,
        )
        for _ in range(3):
            x = random(5, 3, 4, 4, dtype=dtype) * 3 + 1
            weights = torch.rand(5, 1, 4, 4).round()
            for given in (None, weights):
                plain(x, weights=given)
                transformed(x, weights=given)
        for name, value in plain.state_dict().items():
            assert transformed.state_dict()[name].equal(value), name


@pytest.mark.parametrize("of_batch", [False, True])
def test_inactive_even_their_infinities_do_not_show(of_batch: bool) -> None:
    infinite = {name: lambda vector: (1e3 + vector.square()).exp() for name in NAMES}
    module = layer(transforms=infinite, transform_batch_statistics=of_batch)
    x, dy = random(4, 3, 2, 2), random(4, 3, 2, 2)
    for training in (True, False):
        module.train(training)
        expected = results(module, x, None, dy, transforms_active=False)[:4]
        actual = results(module, x, None, dy, transforms_active=torch.tensor(False))[:4]
        assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


def test_an_average_that_takes_all_forgets_what_was_not_finite() -> None:
    for of_batch in (False, True):
        module = layer(momentum=1.0, transforms=SMOOTH, transform_batch_statistics=of_batch)
        module.running_mean.fill_(torch.inf)
        module(random(4, 3, 2, 2), transforms_active=torch.tensor(False))
        assert module.running_mean.isfinite().all()


# --- where they apply -------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["running", "batch", "transformed batch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_against_the_textbook(statistics: str, activation: Any, memory_format: Any) -> None:
    """Forward, all first derivatives, and second ones of x and the scale."""
    fakes = {name: fbt.FakeQuantize(3, limits=(-1.0, 1.5)) for name in NAMES}
    for transforms, joined, weighted in product((SMOOTH, fakes), (False, True), (False, True)):
        module = layer(
            activation=activation,
            transforms=transforms,
            transform_batch_statistics=statistics == "transformed batch",
        ).train(statistics != "running")
        x = (2 * random(4, 3, 2, 5) + 0.5).contiguous(memory_format=memory_format).requires_grad_()
        residual = random(4, 3, 2, 5).requires_grad_() if joined else None
        weights = torch.rand(4, 1, 2, 5, dtype=FLOAT64) if weighted else None
        dy, direction = random(4, 3, 2, 5), random(4, 3, 2, 5)
        inputs = [x, module.weight, module.bias, *([residual] if joined else [])]
        found = []
        expected = textbook(module, transforms, x, residual, weights, statistics)
        for y in (module(x, residual, weights=weights), expected):
            first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
            again = torch.autograd.grad(y, inputs, dy, create_graph=True)
            second = torch.autograd.grad(again[0], inputs[:2], direction, allow_unused=True)
            second = tuple(torch.zeros(()) if of is None else of for of in second)
            found.append((y, *first, *again, *second))
        for actual, wanted in zip(*found, strict=True):
            assert_near(actual, wanted.expand_as(actual).to(actual.dtype))


@pytest.mark.parametrize("of_batch", [False, True])
def test_against_finite_differences(of_batch: bool) -> None:
    module = layer(
        activation="gelu",
        transforms=SMOOTH,
        transform_batch_statistics=of_batch,
        track_running_stats=True,
    )

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {"weight": weight, "bias": bias}
        y: Tensor = torch.func.functional_call(module, given, (x, residual))
        return y

    inputs = (random(3, 3, 2, 2), random(3, 3, 2, 2), module.weight, module.bias)
    inputs = tuple(value.detach().requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


class Learned(torch.nn.Module):
    """Rounds to multiples of a step that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.step = torch.nn.Parameter(torch.tensor(0.3, dtype=FLOAT64))

    def forward(self, vector: Tensor) -> Tensor:
        return self.step * torch.sinh(vector / (1 + self.step))


@pytest.mark.parametrize("statistics", ["running", "transformed batch"])
def test_what_a_transform_learns_has_gradients(statistics: str) -> None:
    transforms = {name: Learned() for name in NAMES}
    module = layer(transforms=transforms, transform_batch_statistics=True)
    module.train(statistics != "running")
    steps = [transforms[name].step for name in NAMES]
    assert {id(step) for step in steps} <= {id(parameter) for parameter in module.parameters()}
    x, dy = random(4, 3, 2, 5), random(4, 3, 2, 5)
    actual = torch.autograd.grad(module(x), steps, dy)
    expected = torch.autograd.grad(
        textbook(module, transforms, x, None, None, statistics), steps, dy
    )
    assert_near(actual, expected)
    assert all(gradient != 0 for gradient in actual)


def test_gradients_that_are_asked_for_one_by_one() -> None:
    """No gradient waits for another, and a graph that is kept gives the same twice."""
    module = layer(transforms=SMOOTH, transform_batch_statistics=True, activation="relu")
    x, residual, dy = (random(4, 3, 2, 5) for _ in range(3))
    inputs = [x.requires_grad_(), residual.requires_grad_(), module.weight, module.bias]
    y = module(x, residual)
    together = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    for _, (one, expected) in product(range(2), zip(inputs, together, strict=True)):
        (alone,) = torch.autograd.grad(y, one, dy, retain_graph=True)
        assert alone.equal(expected)
    many = torch.autograd.grad(y, inputs, torch.stack([dy, 2 * dy]), is_grads_batched=True)
    for batched, expected in zip(many, together, strict=True):
        assert_near(batched, torch.stack([expected, 2 * expected]))
    for wanted in range(4):  # what needs no gradient is nobody's concern
        own = [x.detach(), residual.detach()]
        module.requires_grad_(False)
        (*own, module.weight, module.bias)[wanted].requires_grad_()
        module(*own).backward(dy)
        mine = (*own, module.weight, module.bias)[wanted]
        assert mine.grad.equal(together[wanted])
        module.requires_grad_(True)


def test_a_gradient_that_nobody_fetches_keeps_nothing_alive() -> None:
    module = layer(transforms=SMOOTH, transform_batch_statistics=True, activation="relu")
    x = random(4, 3, 2, 5).requires_grad_()
    y = module(x)
    torch.autograd.grad(y, module.weight, torch.ones_like(y))  # and not x
    alive = weakref.ref(x)
    del x, y
    assert alive() is None


def test_in_functional_transforms() -> None:
    module = layer(transforms=SMOOTH, transform_batch_statistics=True, track_running_stats=True)
    module.running_mean = module.running_var = None  # which vmap could not update
    module.track_running_stats = False
    xs = random(2, 4, 3, 2, 2)

    def loss(x: Tensor) -> Tensor:
        return module(x).pow(3).sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(xs)
    for x, gradient in zip(xs, mapped, strict=True):
        (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
        assert_near(gradient, expected)


def test_on_other_devices() -> None:
    """By shapes and dtypes alone, and by the ops that they get, on the CPU."""
    for dtype in (torch.float16, torch.float32):
        module = layer(dtype=torch.float32, transforms=quantizers(limits="moving")).to("meta")
        for of_batch, training in product((False, True), (False, True)):
            module.transform_batch_statistics = of_batch
            x = torch.empty(4, 3, 2, 2, device="meta", dtype=dtype, requires_grad=True)
            y = module.train(training)(x)
            y.backward(torch.empty_like(y))
            assert (y.shape, y.dtype, x.grad.dtype) == (x.shape, dtype, dtype)
    module = layer(transforms=SMOOTH, transform_batch_statistics=True, activation="relu")
    x, residual, dy = (random(4, 3, 2, 2) for _ in range(3))
    expected = results(module, x, residual, dy)
    module = layer(transforms=SMOOTH, transform_batch_statistics=True, activation="relu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops, "is_plain", lambda _: False)
        patch.setattr(_ops, "moments", lambda x, axes, w: Moments(*_portable.moments(x, axes, w)))
        patch.setattr(_ops, "batch_norm", _native.batch_norm)
        assert_near(results(module, x, residual, dy), expected)


# --- statistics there are none of, or that are degenerate --------------------------------------


def test_a_variance_is_never_below_zero() -> None:
    negative = {"moving_variance": lambda v: v - 100}
    for training in (True, False):
        module = layer(eps=1e-2, transforms=negative, transform_batch_statistics=True)
        x = random(4, 3, 2, 2).requires_grad_()
        y = module.train(training)(x)
        mean = x.mean((0, 2, 3)) if training else module.running_mean
        slope = module.weight.reshape(3, 1, 1) / 0.1
        expected = (x - mean.reshape(3, 1, 1)) * slope + module.bias.reshape(3, 1, 1)
        assert_near(y, expected)
        dy = random(4, 3, 2, 2)
        assert_near(*(torch.autograd.grad(of, x, dy)[0] for of in (y, expected)))
    module.eps = 0.0
    assert_near(module(x), module.bias.reshape(3, 1, 1).expand_as(x))


@pytest.mark.parametrize("of_batch", [False, True])
def test_scales_of_zero_and_constant_channels(of_batch: bool) -> None:
    zeros = {name: lambda vector: 0 * vector for name in ("scale", "moving_variance")}
    module = layer(transforms=zeros, transform_batch_statistics=of_batch)
    x = random(4, 3, 2, 2).requires_grad_()
    y = module(x)
    assert y.equal(module.bias.detach().reshape(3, 1, 1).expand_as(y))
    y.sum().backward()
    for gradient in (x.grad, module.weight.grad, module.bias.grad):
        assert gradient.isfinite().all()
    assert not x.grad.any()
    constant = layer(transforms=quantizers(), transform_batch_statistics=of_batch)
    constant(torch.full((4, 3, 2, 2), 7.0, dtype=FLOAT64)).sum().backward()
    assert constant.weight.grad.isfinite().all()


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("plain_tensors", [True, False])
def test_batches_of_which_nothing_counts(
    of_batch: bool, plain_tensors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not plain_tensors:
        monkeypatch.setattr(_ops, "is_plain", lambda _: False)
    plain = layer(activation="relu")
    transforms = {name: lambda vector: vector + 5 for name in NAMES[2:]}
    module = layer(activation="relu", transforms=transforms, transform_batch_statistics=of_batch)
    before = copy.deepcopy(module.state_dict())
    x = torch.full((2, 3, 2, 2), torch.nan, dtype=FLOAT64)
    nothing = torch.zeros(2, 1, 2, 2)
    for arguments in ((x[:0], None), (x, nothing)):
        y, expected = (each(arguments[0], weights=arguments[1]) for each in (module, plain))
        assert y.equal(expected)
    for name in ("running_mean", "running_var"):
        assert getattr(module, name).equal(before[name])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x[:1, :, :1, :1])


# --- observers ----------------------------------------------------------------------------------


class Spy(Transform):
    """Writes down what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, bool]] = []

    def __call__(self, vector: Tensor, *, training: bool) -> Tensor:
        self.seen.append((vector.detach().clone(), training))
        return vector


def test_what_observers_see() -> None:
    for of_batch in (False, True):
        spies = {name: Spy() for name in NAMES}
        module = layer(transforms=spies, transform_batch_statistics=of_batch)
        mean, variance = module.running_mean.clone(), module.running_var.clone()
        x = random(4, 3, 2, 2)
        if of_batch:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        module(x)
        shown = module.weight, module.bias, mean, variance
        for spy, expected in zip(spies.values(), shown, strict=True):
            ((vector, training),) = spy.seen
            assert training
            assert_near(vector, expected.detach())
        module(x, transforms_active=False)  # they still observe
        module.freeze()(x)
        module.unfreeze().eval()(x)
        for name, spy in spies.items():
            flags = [training for _, training in spy.seen]
            assert flags == [True, True, False, False], name


def test_functions_are_called_where_they_are_used_only() -> None:
    calls = []

    def watched(name: str) -> Callable[[Tensor], Tensor]:
        return lambda vector: calls.append(name) or vector

    module = layer(transforms={name: watched(name) for name in NAMES})
    x = random(4, 3, 2, 2)
    for training, active, expected in (
        (True, True, NAMES[:2]),
        (False, True, NAMES),
        (True, False, ()),
        (False, False, ()),
    ):
        calls.clear()
        module.train(training)(x, transforms_active=active)
        assert calls == list(expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("of_batch", [False, True])
def test_what_checkpointing_repeats_is_observed_once(reentrant: bool, of_batch: bool) -> None:
    module = layer(
        transforms=quantizers(limits="moving", decay=0.5),
        transform_batch_statistics=of_batch,
        activation="relu",
    )
    plain = copy.deepcopy(module)
    for _ in range(3):
        values, gradients = random(4, 3, 2, 2), []
        for each, call in ((module, checkpoint), (plain, lambda f, x, **_: f(x))):
            x = values.clone().requires_grad_()
            call(each, x, use_reentrant=reentrant).square().sum().backward()
            gradients += [x.grad]
        assert gradients[0].equal(gradients[1])
    for name, value in plain.state_dict().items():
        assert module.state_dict()[name].equal(value), name
    assert module.state_dict()["transforms.scale.steps"] == 3
    spies = {name: Spy() for name in NAMES}
    module = layer(transforms=spies, transform_batch_statistics=of_batch)
    checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert all(sum(training for _, training in spy.seen) == 1 for spy in spies.values())


# --- the switch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("of_batch", [False, True])
def test_switching_compiles_nothing_again(of_batch: bool) -> None:
    torch._dynamo.reset()
    active = torch.tensor(True)
    module = layer(
        dtype=torch.float32,
        transforms=quantizers(limits="moving"),
        transforms_active=active,
        transform_batch_statistics=of_batch,
        activation="gelu",
    )
    eager, plain = copy.deepcopy(module), layer(dtype=torch.float32, activation="gelu")
    eager.transforms_active = active
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    dy = random(4, 3, 2, 2, dtype=torch.float32)
    for now in (True, False, True, False, False):
        active.fill_(now)
        x = random(4, 3, 2, 2, dtype=torch.float32)
        residual = random(4, 3, 2, 2, dtype=torch.float32)
        y, dx, *rest = results(lambda_of(compiled, module), x, residual, dy)
        expected, plainly = (results(each, x, residual, dy) for each in (eager, plain))
        assert_near([y, dx, *rest], expected, 1e-5)
        assert y.equal(plainly[0]) == dx.equal(plainly[1]) == (not now)
        for name, value in eager.state_dict().items():
            assert module.state_dict()[name].equal(value), name
    assert counter.frame_count == 1
    torch._dynamo.reset()


def lambda_of(call: Any, module: Any) -> Any:
    """A compiled module that shows what the original has."""

    class Shown:
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return call(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

    return Shown()


def test_what_they_return_may_have_another_dtype() -> None:
    x = random(4, 3, 2, 2)
    made = [torch.zeros(3, dtype=of) for of in (FLOAT64, torch.float32, torch.int64, torch.bool)]
    results = [layer(transforms={"offset": lambda _, zeros=zeros: zeros})(x) for zeros in made]
    assert all(y.equal(results[0]) and y.dtype is FLOAT64 for y in results)


def test_the_call_overrides_the_module() -> None:
    x = random(4, 3, 2, 2)
    module = layer(transforms={"offset": torch.zeros_like}).eval()
    on, off = module(x), module(x, transforms_active=False)
    assert not on.equal(off)
    module.transforms_active = False
    assert module(x).equal(off)
    assert module(x, transforms_active=torch.tensor(True)).equal(on)
    assert layer().eval()(x, transforms_active=True).equal(off)


def test_a_whole_model_is_switched_at_once() -> None:
    model = torch.nn.Sequential(layer(transforms={"offset": torch.zeros_like}), layer()).eval()
    x, active = random(4, 3, 2, 2), torch.tensor(False)
    on = model(x)
    assert fbt.set_transforms_active(model, active) is model
    assert not model(x).equal(on)
    active.fill_(True)
    assert model(x).equal(on)
    copied = copy.deepcopy(model)
    assert copied[0].transforms_active is copied[1].transforms_active
    with pytest.raises(TypeError, match=r"set_transforms_active: `active` must be a bool"):
        fbt.set_transforms_active(model, torch.tensor(1))


# --- the module ---------------------------------------------------------------------------------


def test_the_state_is_saved_with_the_module() -> None:
    module, other = (
        layer(transforms={"scale": fbt.FakeQuantize(4, limits="moving"), "offset": abs})
        for _ in range(2)
    )
    x = random(4, 3, 2, 2)
    module(x)
    keys = list(layer().state_dict())
    assert list(module.state_dict()) == keys + [
        f"transforms.scale.{name}" for name in ("low", "high", "steps")
    ]
    other.load_state_dict(module.state_dict())
    for each in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert each.eval()(x).equal(module.eval()(x))
    assert list(layer(transforms=quantizers()).state_dict()) == keys
    assert list(layer(transforms={"scale": torch.tanh}).state_dict()) == keys
    assert module.half().transforms["scale"].low.dtype == torch.float32
    module.load_state_dict(torch.nn.BatchNorm2d(3).state_dict(), strict=False)


def test_they_may_be_set_at_any_time() -> None:
    module, x = layer().eval(), random(4, 3, 2, 2)
    plain = module(x)
    assert module.transforms is None
    module.transforms = quantizers()
    assert list(module.transforms) == list(NAMES)
    assert len(module.transforms) == 4
    assert not module(x).equal(plain)
    module.transforms = {"offset": torch.clone}
    assert dict(module.transforms) == {"offset": torch.clone}
    with pytest.raises(KeyError, match="scale"):
        module.transforms["scale"]
    assert module(x).equal(plain)
    other = layer(transforms=module.transforms)
    assert other.transforms["offset"] is torch.clone
    module.transforms = {}
    assert module.transforms is None
    assert [name for name, _ in module.named_children()] == []


def test_it_says_what_it_has() -> None:
    module = layer(
        transforms={"scale": fbt.FakeQuantize(4), "offset": abs},
        transforms_active=False,
        transform_batch_statistics=True,
    )
    text = repr(module)
    assert "transforms_active=False, transform_batch_statistics=True" in text
    assert "(scale): FakeQuantize(4)" in text
    assert "(offset): <built-in function abs>" in text
    assert "transforms" not in repr(layer())


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm3d", "LazyBatchNorm2d", "SyncBatchNorm"])
def test_every_module_takes_them(kind: str) -> None:
    sizes = () if "Lazy" in kind else (3,)
    rank = 2 if kind == "SyncBatchNorm" else int(kind[-2])
    module = getattr(fbt, kind)(
        *sizes, transforms={"offset": torch.ones_like}, transforms_active=False
    )
    x = torch.randn(4, 3, *(2,) * rank)
    plain = module(x)
    module.transforms_active = True
    assert_near(module(x), plain + 1, 1e-5)
    assert module.effective_variables()["offset"].equal(torch.ones(3))


def test_fuse_and_conversions_keep_them() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU()).double()
    x = random(4, 3, 2, 2)
    fbt.fuse(model)
    model[0].transforms = {"scale": fbt.FakeQuantize(2), "offset": torch.ones_like}
    model[0].transforms_active = torch.tensor(True)
    expected = model(x)
    assert fbt.fuse(model)(x).equal(expected)
    assert type(fbt.unfuse(model)[0]) is fbt.BatchNorm2d  # PyTorch's could not have them
    assert model(x).equal(expected)
    converted = fbt.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(converted[0]) is fbt.SyncBatchNorm
    assert converted(x).equal(expected)
    assert converted[0].transforms_active.item() is True


def test_fx_keeps_what_the_call_says() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer(transforms={"offset": torch.zeros_like})

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, transforms_active=False) - self.norm(x)

    net, x = Net().eval(), random(4, 3, 2, 2)
    for other in (torch.fx.symbolic_trace(net), fbt.fuse(copy.deepcopy(net))):
        assert other(x).equal(net(x))
    assert net(x).any()


@pytest.mark.parametrize("active", [True, False, torch.tensor(True)], ids=str)
def test_effective_variables_are_those_that_normalize(active: Any) -> None:
    module = layer(transforms=SMOOTH, transforms_active=active).eval()
    found = module.effective_variables()
    x = random(4, 3, 2, 2)
    y = torch.nn.functional.batch_norm(
        x, found["mean"], found["variance"], found["scale"], found["offset"], eps=found["epsilon"]
    )
    assert_near(module(x), y)
    bare = fbt.BatchNorm2d(3, affine=False, track_running_stats=False, transforms=SMOOTH)
    assert set(bare.effective_variables().values()) == {None, 1e-5}


# --- bad input ----------------------------------------------------------------------------------


def test_errors_name_the_variable() -> None:
    x = random(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"BatchNorm2d: `transforms` must name scale, offset.*'we"):
        layer(transforms={"weight": torch.tanh})
    with pytest.raises(TypeError, match=r"BatchNorm2d: `transforms\['scale'\]` must be a function"):
        layer(transforms={"scale": 3})
    with pytest.raises(TypeError, match=r"BatchNorm2d: `transforms` must be a mapping.*got list"):
        layer(transforms=[torch.tanh])
    with pytest.raises(TypeError, match=r"`transforms_active` must be a bool, or.*; got tensor\(1"):
        layer(transforms_active=torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"`transform_batch_statistics` must be a bool"):
        layer(transform_batch_statistics="yes")
    with pytest.raises(TypeError, match=r"`transforms_active` must be a bool"):
        layer(transforms=SMOOTH)(x, transforms_active=1)
    for name, of_batch in product(NAMES, (False, True)):
        module = layer(transforms={name: lambda v: v[:2]}, transform_batch_statistics=of_batch)
        module.train(of_batch)
        shape = rf"BatchNorm2d: `transforms\['{name}'\]` must return the shape \(3,\).*\(2,\)"
        with pytest.raises(ValueError, match=shape):
            module(x)
        module.transforms = {name: lambda v: v / 0 * 0}
        with pytest.raises(ValueError, match=rf"`transforms\['{name}'\]` must return no NaN"):
            module(x)
        module(x, transforms_active=False)
        module(x, transforms_active=torch.tensor(False))


def test_a_nan_that_was_there_is_no_transforms_fault() -> None:
    module = layer(transforms=SMOOTH, transform_batch_statistics=True)
    x = random(4, 3, 2, 2)
    x[0, 1] = torch.nan
    assert module(x)[:, [0, 2]].isfinite().all()
    assert module.running_mean[1].isnan()


def test_compiled_a_nan_is_an_error_too() -> None:
    torch._dynamo.reset()
    module = layer(transforms={"scale": lambda v: v.log()}).eval()
    torch.nn.init.ones_(module.weight)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(random(4, 3, 2, 2))
    torch.nn.init.constant_(module.weight, -1)
    with pytest.raises(RuntimeError, match=r"`transforms\['scale'\]` must return no NaN"):
        compiled(random(4, 3, 2, 2))
    torch._dynamo.reset()


def test_after_an_error_all_is_as_it_was() -> None:
    bad = random(4, 3, 2, 2)
    bad[0, 0] = torch.inf
    for break_it, x in (
        (lambda m: None, random(4, 5, 2, 2)),
        (lambda m: setattr(m, "nonfinite", "raise"), bad),
        (lambda m: m.transforms.add_module("moving_variance", torch.nn.Flatten(0, 1)), bad),
    ):
        for of_batch in (False, True):
            module = layer(
                transforms={name: fbt.FakeQuantize(axis=0, limits="moving") for name in NAMES[:3]},
                transform_batch_statistics=of_batch,
            )
            break_it(module)
            before = copy.deepcopy(module.state_dict())
            if of_batch or "moving_variance" not in module.transforms:
                with pytest.raises((ValueError, RuntimeError, IndexError)):
                    module(x)
                for name, value in module.state_dict().items():
                    assert value.equal(before[name]), name
