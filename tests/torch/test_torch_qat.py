"""Quantization-aware training: against its definition, frozen, converted, and in integers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import mlp, network
from tensors import array, tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusebn.torch as fbt
from devices import seeded
from fusebn.torch import qat
from fusebn.torch.qat import ConvBatchNorm2d

LAYERS = (qat.ConvBatchNorm1d, qat.ConvBatchNorm2d, qat.ConvBatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
THEIRS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OURS = (fbt.BatchNorm1d, fbt.BatchNorm2d, fbt.BatchNorm3d)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def same(weight: Tensor) -> Tensor:
    """Quantize to as many bits as there are."""
    return weight * 1


def smooth(weight: Tensor) -> Tensor:
    """Stand in for a quantizer, differentiably."""
    return weight + 0.1 * torch.tanh(3 * weight)


def pair(rank: int = 2, ours: bool = True, bias: bool = True, **conv: Any) -> tuple[Any, Any]:
    """Return a convolution and a batch norm in float64, away from where they start."""
    made = CONVOLUTIONS[rank - 1](4, 6, 3, padding=1, bias=bias, **conv).double()
    norm = (OURS if ours else THEIRS)[rank - 1](6).double()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.5, 2)
    return made, norm


def fused(conv: Any, norm: Any, **options: Any) -> Any:
    return LAYERS[len(conv.kernel_size) - 1].from_float(conv, norm, **options)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def gradients(
    call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, ...]:
    """Return what a call returns and the gradients of its input and of parameters."""
    x = x.clone().requires_grad_()
    y = call(x)
    dy = torch.randn(y.shape, generator=seeded(1), dtype=y.dtype)
    return y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)


def tensors(conv: Any, norm: Any) -> list[Tensor]:
    return [conv.weight, norm.weight, norm.bias, *([] if conv.bias is None else [conv.bias])]


# ---- the definition ----


@pytest.mark.parametrize("statistics", qat.STATISTICS)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("quantize", [None, same])
def test_without_quantization_it_is_a_batch_norm_of_a_convolution(statistics, rank, quantize):
    for options in ({}, {"bias": False}, {"groups": 2, "stride": 2, "padding_mode": "circular"}):
        conv, norm = pair(rank, **options)
        norm.activation = "silu"
        plain = copy.deepcopy((conv, norm))
        layer = fused(conv, norm, weight_quantize=quantize, statistics=statistics)
        x = torch.randn(3, 4, *[5] * rank).double()
        for training in (True, False, True):
            layer.train(training)
            plain[1].train(training)
            expected = gradients(lambda x: plain[1](plain[0](x)), x, tensors(*plain))  # noqa: B023
            actual = gradients(layer, x, tensors(conv, layer.bn))
            for got, want in zip(actual, expected, strict=True):
                assert_close(got, want, 1e-11)
            state = layer.bn.state_dict()
            for key, value in plain[1].state_dict().items():
                assert_close(state[key], value)


def defined(conv: Any, norm: Any, quantize: Any, x: Tensor) -> Tensor:
    """Return what the docstring says, by PyTorch's operations."""
    plain = F.conv2d(x, conv.weight, None, padding=1)
    mean, variance = plain.mean((0, 2, 3)), plain.var((0, 2, 3), correction=0)
    n = plain.numel() // plain.shape[1]
    with torch.no_grad():
        norm.running_mean.lerp_(mean + (0 if conv.bias is None else conv.bias), norm.momentum)
        norm.running_var.lerp_(variance * n / (n - 1), norm.momentum)
    running_std = (norm.running_var + norm.eps).sqrt()
    std = (variance + norm.eps).sqrt()
    factor = norm.weight / running_std
    y = F.conv2d(x, quantize(factor[:, None, None, None] * conv.weight), None, padding=1)
    y = (y - (mean * factor)[:, None, None]) * (running_std / std)[:, None, None]
    return y + norm.bias[:, None, None]


def defined_by_quantized(conv: Any, norm: Any, quantize: Any, x: Tensor) -> Tensor:
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    weight = quantize(factor * conv.weight) / factor
    return norm(F.conv2d(x, weight, conv.bias, padding=1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("statistics", "definition"), [("float", defined), ("quantized", defined_by_quantized)]
)
@pytest.mark.parametrize("how", [{"axis": 0}, {}, {"symmetric": True, "limits": (-0.5, 0.5)}])
def test_it_is_its_definition(bits, statistics, definition, how):
    quantize = fbt.FakeQuantize(bits, **how)
    conv, norm = pair()
    plain = copy.deepcopy((conv, norm))
    layer = fused(conv, norm, weight_quantize=quantize, statistics=statistics)
    x = torch.randn(3, 4, 5, 5).double()
    expected = gradients(lambda x: definition(*plain, quantize, x), x, tensors(*plain)[:3])
    actual = gradients(layer, x, tensors(conv, layer.bn)[:3])
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want, 1e-10)
    for name in ("running_mean", "running_var"):
        assert_close(getattr(layer.bn, name), getattr(plain[1], name))


@pytest.mark.parametrize("statistics", qat.STATISTICS)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_derivatives(statistics, frozen):
    conv, norm = pair()
    norm.momentum = 0.0  # or each call would fold by other statistics
    layer = fused(conv, norm, weight_quantize=smooth, statistics=statistics)
    if frozen:
        layer.freeze()

    def call(x: Tensor, *values: Tensor) -> Tensor:
        names = ("weight", "bn.weight", "bn.bias", "bias")
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)
        return result

    x = torch.randn(2, 4, 3, 3).double().requires_grad_()
    torch.autograd.gradcheck(call, (x, *tensors(conv, layer.bn)))


@pytest.mark.parametrize("statistics", qat.STATISTICS)
def test_a_scale_of_zero(statistics):
    """Nothing is divided by it, and its own gradient is that of a batch norm."""
    conv, norm = pair()
    with torch.no_grad():
        norm.weight[1], norm.weight[2] = 0, 1e-40
    plain = copy.deepcopy((conv, norm))
    layer = fused(conv, norm, statistics=statistics)
    x = torch.randn(3, 4, 5, 5).double()
    y, dx, dweight, dscale, *_ = gradients(layer, x, tensors(conv, layer.bn))
    assert torch.equal(y[:, 1], norm.bias[1].expand_as(y[:, 1]).detach())
    assert dx.isfinite().all()
    assert not dweight[1].any()
    expected = gradients(lambda x: plain[1](plain[0](x)), x, tensors(*plain))
    for channel in (1, 2):
        assert_close(dscale[channel], expected[3][channel])
        assert_close(y[:, channel], expected[0][:, channel])
    layer.eval()
    assert_close(layer(x)[:, 1], norm.bias[1].expand_as(y[:, 1]))


def test_a_running_variance_of_zero():
    conv, norm = pair()
    norm.eps = 0.0
    norm.running_var[1] = 0
    layer = fused(conv, norm).eval()
    y = layer(torch.randn(2, 4, 5, 5).double())
    assert_close(y[:, 1], norm.bias[1].expand_as(y[:, 1]))
    assert y.isfinite().all()


# ---- freezing ----


def statistics_of(layer: Any) -> list[Tensor]:
    return [value.clone() for value in layer.bn.buffers()]


@pytest.mark.parametrize("statistics", qat.STATISTICS)
def test_frozen_it_is_what_it_converts_to(statistics):
    layer = fused(*pair(), statistics=statistics, freeze_delay=2, activation="relu")
    plain = nn.Sequential(*pair())
    for step in range(4):
        x = torch.randn(3, 4, 5, 5).double()
        assert layer.frozen == (step >= 2)
        before = statistics_of(layer)
        y = layer(x)
        after = statistics_of(layer)
        if step < 2:
            assert not torch.equal(after[0], before[0])
            assert int(layer.bn.num_batches_tracked) == step + 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            assert torch.equal(layer.eval()(x), y)
            assert torch.equal(layer.train().convert()(x), y)
    assert int(layer.steps) == 4
    layer.unfreeze()
    assert not layer.frozen
    assert layer.freeze_delay is None
    layer.freeze().train()
    assert layer.frozen
    assert type(layer.convert()[1]) is nn.ReLU
    assert plain.training


def test_evaluation_counts_and_changes_nothing():
    layer = fused(*pair(), freeze_delay=1).eval()
    before = statistics_of(layer)
    layer(torch.randn(2, 4, 5, 5).double())
    assert int(layer.steps) == 0
    assert all(torch.equal(a, b) for a, b in zip(statistics_of(layer), before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_is_repeated_for_backward(reentrant):
    """It folds by the same statistics, moves none, and freezes no earlier."""
    layers = [fused(*copy.deepcopy(p), freeze_delay=2) for p in [pair()] * 2]
    for step in range(4):
        x = torch.randn(3, 4, 5, 5).double()
        results = []
        for layer, repeated in zip(layers, (False, True), strict=True):
            call = layer
            if repeated:

                def call(x: Tensor, layer: Any = layer) -> Tensor:
                    result: Tensor = checkpoint(layer, x, use_reentrant=reentrant)
                    return result

            own = x.clone().requires_grad_()
            y = call(own)
            y.square().sum().backward()
            results.append([y, own.grad, *(p.grad for p in layer.parameters())])
            layer.zero_grad()
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), step
        for a, b in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
            assert torch.equal(a, b), step


# ---- what it becomes ----


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convert_keeps_every_argument(rank):
    options: dict[str, Any] = {"groups": 2, "stride": 2, "dilation": 2, "padding_mode": "circular"}
    layer = fused(*pair(rank, **options), activation="gelu").eval()
    plain = layer.convert()
    assert type(plain[0]) is CONVOLUTIONS[rank - 1]
    assert type(plain[1]) is nn.GELU
    x = torch.randn(2, 4, *[7] * rank).double()
    assert torch.equal(plain(x), layer(x))
    kept = {"weight_quantize": None, "activation": None}
    assert type(fused(*pair(rank), **kept).convert()) is CONVOLUTIONS[rank - 1]


def test_convert_observes_nothing_and_keeps_the_random_numbers():
    quantize = fbt.FakeQuantize(8, axis=0, limits="moving")
    layer = fused(*pair(), weight_quantize=quantize, output_quantize=fbt.FakeQuantize(4))
    layer(torch.randn(2, 4, 5, 5).double())
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    plain = layer.convert()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    x = torch.randn(2, 4, 5, 5).double()
    assert torch.equal(plain.eval()(x), layer.eval()(x))
    assert plain[1] is not layer.output_quantize
    rounding = fused(*pair(), output_quantize=lambda y: y.round()).eval()
    assert torch.equal(rounding.convert()(x), rounding(x))


@pytest.mark.parametrize("bits", [2, 3, 8, 9, 16])
@pytest.mark.parametrize("how", [{"axis": 0}, {"axis": 0, "limits": "moving"}, {}])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_weight_as_integers(bits, how, symmetric):
    quantize = fbt.FakeQuantize(bits, symmetric=symmetric, **how)
    layer = fused(*pair(), weight_quantize=quantize).float()
    layer(torch.randn(2, 4, 5, 5))
    codes, step, zero = layer.quantized_weight()
    narrow = {2: "8", 3: "8", 8: "8", 9: "16", 16: "16" if symmetric else "32"}[bits]
    assert str(codes.dtype).endswith(f"int{narrow}")
    wide = codes.long()
    least, largest = quantize.settings.least, quantize.settings.largest
    assert wide.min() >= least
    assert wide.max() <= largest
    assert len(wide.unique()) > min(2**bits, 100) // 2
    assert step.numel() == zero.numel() == (6 if "axis" in how else 1)
    assert zero.dtype is torch.int32
    assert zero.any() == (not symmetric)
    assert torch.equal((wide - zero).float() * step, layer.convert().weight)


def integers(x: Tensor, quantize: Any) -> tuple[np.ndarray, float, int]:
    """Return x as an 8-bit sensor or layer would hand it over: codes, step, zero."""
    low, high = quantize.settings.limits
    step = (high - low) / 255
    zero = round(-low / step)
    codes = (x / step).round() + zero
    assert ((codes >= 0) & (codes <= 255)).all()
    return array(codes).astype(np.uint8), step, zero


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Convolve integers, without padding, in 32 bits."""
    x, weight = x.astype(np.int32), weight.astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, weight)
    assert sums.dtype == np.int32
    return sums


def test_integers_give_the_same_to_rounding():
    """8 bits by 8 bits, summed in 32, and only then scaled: the same, and the same 8 bits again."""
    conv, norm = pair()
    conv.padding, conv._reversed_padding_repeated_twice = (0, 0), [0] * 4
    output = fbt.FakeQuantize(8, limits=(0.0, 6.0))
    layer = fused(conv, norm, activation="relu6", output_quantize=output)
    layer(torch.randn(5, 4, 8, 8).double())
    layer.eval()
    given = fbt.FakeQuantize(8, limits=(-2.0, 3.0))
    x = given(torch.randn(3, 4, 8, 8).double().clamp(-2, 2.99))
    codes, step, zero = integers(x, given)
    weight = layer.quantized_weight()
    assert weight.codes.dtype is torch.int8
    assert not weight.zero.any()
    bias = layer.convert()[0].bias.detach()
    sums = convolved(codes.astype(np.int32) - zero, array(weight.codes))
    scaled = tensor(sums) * (step * weight.step.double().reshape(-1, 1, 1))
    y = (scaled + bias[:, None, None]).clamp(0, 6)
    layer.output_quantize = None
    assert_close(y, layer(x), 1e-12)
    layer.output_quantize = output
    assert torch.equal(output(y), layer(x))


def test_integers_give_the_same_exactly_where_steps_are_powers_of_two():
    conv, norm = pair(bias=False)
    conv.padding, conv._reversed_padding_repeated_twice = (0, 0), [0] * 4
    quantize = fbt.FakeQuantize(8, symmetric=True, limits=(-127 / 64, 127 / 64))
    layer = fused(conv, norm, weight_quantize=quantize).float().eval()
    given = fbt.FakeQuantize(8, limits=(-128 / 32, 127 / 32))
    x = given(torch.randn(3, 4, 8, 8).clamp(-3, 3))
    codes, step, zero = integers(x, given)
    weight = layer.quantized_weight()
    assert (step, float(weight.step)) == (1 / 32, 1 / 64)
    sums = convolved(codes.astype(np.int32) - zero, array(weight.codes))
    plain = layer.convert()
    plain.bias.data.zero_()
    assert torch.equal(plain(x), tensor(sums).float() / 2048)


# ---- as a module ----


def test_state_copies_and_pickles():
    make = {
        "weight_quantize": fbt.FakeQuantize(4, axis=0, limits="moving"),
        "freeze_delay": 5,
    }
    layer = fused(*pair(), **copy.deepcopy(make))
    x = torch.randn(2, 4, 5, 5).double()
    layer(x)
    own = {"weight", "bias", "steps", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}
    own |= {"bn.num_batches_tracked", *(f"weight_quantize.{n}" for n in ("low", "high", "steps"))}
    assert layer.state_dict().keys() == own
    other = fused(*pair(), **make)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        original = copy.deepcopy(layer)
        assert repr(twin) == repr(layer)
        for _ in range(2):
            assert torch.equal(twin(x), original(x))
        assert int(twin.steps) == 3


def test_tensors_are_those_of_the_layers_it_is_made_of():
    conv, norm = pair(ours=False)
    norm.momentum = None
    state = torch.get_rng_state()
    layer = fused(conv, norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert layer.bn.weight is norm.weight
    assert all(a is b for a, b in zip(layer.bn.buffers(), norm.buffers(), strict=True))
    assert layer.bn.momentum is None
    ours = OURS[1](6, nonfinite="skip", correction=0, activation="relu").freeze().eval()
    taken = fused(conv, ours).bn
    shown = ("nonfinite", "correction", "activation", "frozen", "affine")
    assert [getattr(taken, n) for n in shown] == [getattr(ours, n) for n in shown]
    assert taken is not ours
    assert fused(conv, ours, activation=None).bn.activation is None
    assert ours.activation == "relu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("statistics", qat.STATISTICS)
def test_dtypes(dtype, statistics):
    conv, norm = pair()
    exact = fused(*copy.deepcopy((conv, norm)), statistics=statistics)
    layer = fused(conv, norm, statistics=statistics).to(dtype)
    x = torch.randn(3, 4, 5, 5).to(dtype)
    for training in (True, False):
        y = layer.train(training)(x)
        assert y.dtype is dtype
        assert_close(y.double(), exact.train(training)(x.double()), 32 * torch.finfo(dtype).eps)
    assert layer.bn.running_var.dtype is torch.float32
    y.sum().backward()
    assert layer.weight.grad.dtype is dtype
    assert layer.convert().weight.dtype is dtype


@pytest.mark.parametrize("statistics", qat.STATISTICS)
def test_compiled(statistics):
    layer = fused(*pair(), statistics=statistics, activation="relu").float()
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(3, 4, 5, 5)
        expected = gradients(plain, x, list(plain.parameters()))
        actual = gradients(compiled, x, list(layer.parameters()))
        for got, want in zip(actual, expected, strict=True):
            assert_close(got, want, 1e-5)
    for got, want in zip(layer.buffers(), plain.buffers(), strict=True):
        assert_close(got, want, 1e-6)
    torch._dynamo.reset()


def test_traced_it_is_one_node():
    layer = fused(*pair())
    graph = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU())).graph
    assert [node.op for node in graph.nodes] == [
        "placeholder",
        "call_module",
        "call_module",
        "output",
    ]


def test_batches_that_have_no_statistics():
    for statistics in qat.STATISTICS:
        layer = fused(*pair(), statistics=statistics)
        before = statistics_of(layer)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(torch.randn(1, 4, 1, 1).double())
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(torch.randn(4, 5, 5).double())
        assert layer(torch.randn(0, 4, 5, 5).double()).shape == (0, 6, 5, 5)
        after = statistics_of(layer)
        assert all(torch.equal(a, b) for a, b in zip(after[:2], before[:2], strict=True))


def test_what_is_not_finite_is_skipped_if_asked():
    layer = fused(pair()[0], OURS[1](6, nonfinite="skip").double())
    x = torch.randn(2, 4, 5, 5).double()
    x[0, 0, 0, 0] = torch.nan
    layer(x)
    assert layer.bn.running_var.isfinite().all()
    assert layer.bn.num_batches_tracked == 1


# ---- whole models ----


def resnet() -> tuple[nn.Module, Tensor]:
    model, x = network("resnet, basic")
    return model, x


@pytest.mark.parametrize("name", ["resnet, basic", "mobilenet", "u-net", "densenet", "dynamic"])
@pytest.mark.parametrize("statistics", qat.STATISTICS)
def test_a_prepared_network_without_quantization_computes_the_same(name, statistics):
    model, x = network(name)
    prepared = qat.prepare(model, weight_quantize=same, statistics=statistics)
    report = qat.explain(model)
    layers = [m for m in prepared.modules() if isinstance(m, LAYERS)]
    assert len(layers) == sum(row.layer is not None for row in report) > 0
    with torch.no_grad():
        for training in (True, False):
            y = model.train(training)(x)
            assert_close(prepared.train(training)(x), y, 1e-10)
        assert torch.equal(qat.convert(prepared)(x), prepared(x))
        assert_close(qat.convert(prepared)(x), fbt.fold(model)(x), 1e-10)


def test_a_fused_model_is_prepared_as_what_it_was():
    model, x = resnet()
    expected, prepared = qat.prepare(model), qat.prepare(fbt.fuse(copy.deepcopy(model)))
    assert [type(m) for m in prepared.modules()] == [type(m) for m in expected.modules()]
    assert torch.equal(prepared(x), expected(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in resnet()[0].modules()]


def test_activations_behind():
    model, _ = resnet()
    fusions = {name: m.bn.activation for name, m in _layers(qat.prepare(model)).items()}
    assert fusions["conv1"] == "relu"  # whose module is called once
    assert fusions["layer1.0.conv1"] is None  # whose module is called twice
    quantized = qat.prepare(model, output_quantize=fbt.FakeQuantize(8))
    fusions = {name: m.bn.activation for name, m in _layers(quantized).items()}
    assert fusions["layer1.0.conv1"] == "relu"  # it is before the rounding, and stays
    assert fusions["layer1.0.conv2"] is None  # behind which is a sum
    assert type(quantized.relu) is nn.Identity
    assert type(quantized.layer1[0].relu) is nn.ReLU
    every = list(_layers(quantized).values())
    assert len({id(m.output_quantize) for m in every}) == len(every)


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}


def test_what_is_not_prepared():
    with pytest.raises(ValueError, match=r"prepare: `model` must have a convolution with a batch"):
        qat.prepare(mlp())
    assert "Linear '0' is right before it" in str(qat.explain(mlp()))

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), fbt.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x), residual=x)

    assert qat.explain(Added())[0].reason == "it is called with more than its input"
    transformed = nn.Sequential(nn.Conv2d(3, 3, 1), fbt.BatchNorm2d(3, transforms={"scale": same}))
    assert qat.explain(transformed)[0].reason == "it has transforms"


def test_both_modes_must_agree():
    class Auxiliary(nn.Module):
        """It reads more of itself while it trains."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y if self.training else self.bn(y)

    model = Auxiliary()
    for training in (True, False):
        assert (
            qat.explain(model.train(training))[0].reason
            == "the output of 'conv' goes elsewhere too"
        )
    with pytest.raises(ValueError, match="bn: the output of 'conv' goes elsewhere too"):
        qat.prepare(model)
    assert fbt.explain_fold(model)[0].layer == "conv"


def test_training_in_few_bits_brings_back_what_rounding_lost():
    """In floats, then in 3 bits; what is converted answers as what was trained."""
    torch.manual_seed(2)
    x = torch.randn(256, 1, 6, 6)
    labels = ((x[:, 0, :3].sum((1, 2)) > 0) ^ (x[:, 0, 3:].sum((1, 2)) > 0)).long()
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 2)),
    )

    def accuracy(model: nn.Module) -> float:
        return (model.eval()(x).argmax(1) == labels).float().mean().item()

    def train(model: nn.Module, steps: int) -> float:
        optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
        return accuracy(model)

    assert train(model, 100) == 1
    quantize = fbt.FakeQuantize(3, symmetric=True, axis=0)
    rounded = accuracy(qat.prepare(model, weight_quantize=quantize))
    for statistics in qat.STATISTICS:
        prepared = qat.prepare(
            model, weight_quantize=quantize, freeze_delay=50, statistics=statistics
        )
        assert train(prepared, 80) > rounded + 0.05
        assert all(layer.frozen for layer in _layers(prepared).values())
        converted = qat.convert(prepared)
        assert not _layers(converted)
        assert torch.equal(converted(x), prepared(x))


# ---- errors ----


def test_errors():
    conv, norm = pair()
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            TypeError,
            "`conv` must be a torch.nn.Conv2d; got Linear",
            lambda: fused2(nn.Linear(3, 6), norm),
        ),
        (
            TypeError,
            "`bn` must be a BatchNorm2d of torch.nn or fusebn",
            lambda: fused2(conv, nn.BatchNorm1d(6)),
        ),
        (
            ValueError,
            "`bn` must have 6 channels, as many as conv",
            lambda: fused2(conv, nn.BatchNorm2d(5)),
        ),
        (
            ValueError,
            "`bn` must have running stat",
            lambda: fused2(conv, nn.BatchNorm2d(6, track_running_stats=False)),
        ),
        (
            ValueError,
            "`bn` must have its channels second",
            lambda: fused2(conv, fbt.BatchNorm2d(6, axis=-1)),
        ),
        (
            ValueError,
            "`bn` must have no transforms; got ['scale']",
            lambda: fused2(conv, fbt.BatchNorm2d(6, transforms={"scale": same})),
        ),
        (
            TypeError,
            "`weight_quantize` must be a function",
            lambda: fused2(conv, norm, weight_quantize=8),
        ),
        (
            TypeError,
            "`output_quantize` must be a function",
            lambda: fused2(conv, norm, output_quantize=8),
        ),
        (
            ValueError,
            "`freeze_delay` must not be negative",
            lambda: fused2(conv, norm, freeze_delay=-1),
        ),
        (TypeError, "`freeze_delay`", lambda: fused2(conv, norm, freeze_delay=1.5)),
        (ValueError, "`statistics` must be one of", lambda: fused2(conv, norm, statistics="batch")),
        (ValueError, "`activation` must be one of", lambda: fused2(conv, norm, activation="tanh")),
        (
            ValueError,
            "`activation` must be one of",
            lambda: ConvBatchNorm2d(3, 6, 3, activation="tanh"),
        ),
        (
            TypeError,
            "quantized_weight: `weight_quantize` must be a FakeQuantize",
            lambda: fused2(conv, norm, weight_quantize=same).quantized_weight(),
        ),
        (TypeError, "prepare: `model` must be a torch.nn.Module", lambda: qat.prepare(3)),
        (TypeError, "convert: `model` must be a torch.nn.Module", lambda: qat.convert(3)),
        (TypeError, "explain: `model` must be a torch.nn.Module", lambda: qat.explain(3)),
    ]
    for kind, text, call in cases:
        with pytest.raises(kind) as raised:
            call()
        assert text in str(raised.value)


def fused2(conv: Any, norm: Any, **options: Any) -> Any:
    return ConvBatchNorm2d.from_float(conv, norm, **options)


def test_a_constructor_of_its_own():
    layer = ConvBatchNorm2d(
        4, 6, 3, padding=1, dtype=torch.float64, eps=1e-3, momentum=0.2, affine=False
    )
    plain = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, bias=False, dtype=torch.float64),
        nn.BatchNorm2d(6, 1e-3, 0.2, affine=False, dtype=torch.float64),
    )
    layer.weight_quantize = None
    layer.load_state_dict(
        {"weight": plain[0].weight, **{f"bn.{k}": v for k, v in plain[1].state_dict().items()}},
        strict=False,
    )
    x = torch.randn(2, 4, 5, 5).double()
    for _ in range(2):
        assert_close(layer(x), plain(x))
    assert_close(layer.eval()(x), plain.eval()(x))
