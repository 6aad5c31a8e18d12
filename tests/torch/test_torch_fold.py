"""`fold`: the same answers without the batch norms, and none folded where that would be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import NETWORKS, convolution, network
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fusebn.torch as fbt
from devices import seeded

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OURS = (fbt.BatchNorm1d, fbt.BatchNorm2d, fbt.BatchNorm3d)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomized(model: nn.Module) -> nn.Module:
    """Return a model in float64 and evaluation, its tensors away from where they start."""
    generator = seeded(0)
    with torch.no_grad():
        for key, value in model.double().state_dict().items():
            if value.is_floating_point():
                value.normal_(0, 0.5, generator=generator)
                if key.endswith("running_var"):
                    value.abs_().add_(0.1)
    return model.eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def assert_folds(model: nn.Module, *inputs: Tensor, layers: list[str | None], **how: Any) -> Any:
    """Assert which layers take over the batch norms, and that the answers stay; return the copy."""
    before = copy.deepcopy(model.state_dict())
    expected = model(*inputs)
    report = fbt.explain_fold(model, **how)
    assert [row.layer for row in report] == layers, str(report)
    assert all((row.layer is None) == bool(row.reason) for row in report)
    folded = fbt.fold(model, **how)
    assert_close(folded(*inputs), expected)
    norms = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == layers.count(None)
    assert_close(model(*inputs), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return folded


def why_not(model: nn.Module, **how: Any) -> str:
    (row,) = fbt.explain_fold(model.eval(), **how)
    assert row.layer is None
    norms = [m for m in fbt.fold(model, **how).modules() if isinstance(m, NORMS)]
    assert len(norms) == 1
    return row.reason


# ---- whole networks ----

# How many batch norms stay.
STAY = {"pre-activation": 2, "densenet": 6, "timm": 2, "dynamic": 1}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_computes_the_same(name):
    model, x = network(name)
    folded = fbt.fold(model.eval())
    norms = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == STAY.get(name, 0)
    assert_close(folded(x), model(x))


@pytest.mark.parametrize("name", ["resnet, basic", "densenet", "mobilenet", "flagged"])
def test_a_network_that_was_fused_is_folded_alike(name):
    model, x = network(name)
    report = fbt.explain_fold(model.eval())
    expected = fbt.fold(model)
    fused = fbt.fuse(model)
    folded = fbt.fold(fused)
    assert [row[2:] for row in fbt.explain_fold(fused)] == [row[2:] for row in report]
    assert [type(m) for m in folded.modules()] == [type(m) for m in expected.modules()]
    assert torch.equal(folded(x), expected(x))


def test_the_rest_of_the_state_and_of_the_classes_is_as_it_was():
    model, _ = network("resnet, basic")
    folded, report = fbt.fold(model.eval()), fbt.explain_fold(model)
    state = folded.state_dict()
    gone = [f"{row.name}." for row in report if row.layer is not None]
    layers = [row.layer for row in report]
    for key, value in model.state_dict().items():
        if key.startswith(tuple(gone)):
            assert key not in state
        elif key.rpartition(".")[0] not in layers:
            assert torch.equal(state[key], value)
    added = state.keys() - model.state_dict().keys()
    assert added == {f"{layer}.bias" for layer in layers}
    classes = [type(m) for m in model.modules() if not isinstance(m, NORMS)]
    assert [type(m) for m in folded.modules() if type(m) is not nn.Identity] == classes


# ---- every kind of layer ----


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_convolution(rank, groups, transposed, bias):
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[rank - 1]
    for stride, dilation, channels in ((1, 2, 4), (2, 1, 8), (2, 2, 4)):
        layer = kind(4, channels, 3, stride, padding=1, dilation=dilation, groups=groups, bias=bias)
        model = randomized(nn.Sequential(layer, NORMS[rank - 1](channels)))
        assert_folds(model, torch.randn(2, 4, *[7] * rank).double(), layers=["0"])


def test_a_linear_layer():
    model = randomized(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    assert_folds(model, torch.randn(3, 5).double(), layers=["0"])


@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_norm_without_parameters_and_one_at_zero(affine):
    model = randomized(nn.Sequential(convolution(3, 4), nn.BatchNorm2d(4, affine=affine)))
    if affine:
        model[1].weight.data[1] = 0
    model[1].running_var[2] = 0
    assert_folds(model, torch.randn(2, 3, 5, 5).double(), layers=["0"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_dtype_stays(dtype):
    model = randomized(nn.Sequential(convolution(3, 4), fbt.BatchNorm2d(4)))
    exact = fbt.fold(model)[0]
    folded = fbt.fold(model.to(dtype))[0]
    for name in ("weight", "bias"):
        got, want = getattr(folded, name), getattr(exact, name)
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_parameters_learn_or_not_as_before():
    model = randomized(nn.Sequential(convolution(3, 4), nn.BatchNorm2d(4)))
    model[0].weight.requires_grad_(False)
    assert [p.requires_grad for p in fbt.fold(model).parameters()] == [False, False]
    model[0].weight.requires_grad_(True)
    assert [p.requires_grad for p in fbt.fold(model).parameters()] == [True, True]


# ---- what ours does besides ----


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu", "gelu"])
def test_an_activation_stays(activation):
    model = randomized(nn.Sequential(convolution(3, 4), fbt.BatchNorm2d(4, activation=activation)))
    folded = assert_folds(model, torch.randn(2, 3, 5, 5).double() * 4, layers=["0"])
    assert type(folded[1]).__module__.startswith("torch.nn.")


class Residual(nn.Module):
    def __init__(self, **call: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = fbt.BatchNorm2d(4, activation="relu")
        self.call = tuple(call.items())

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x), x, **dict(self.call))


@pytest.mark.parametrize("call", [{}, {"activation": None}, {"activation": "silu"}])
def test_a_residual_stays(call):
    model = randomized(Residual(**call))
    folded = assert_folds(model, torch.randn(2, 4, 5, 5).double(), layers=["conv"])
    traced = torch.fx.symbolic_trace(folded)  # and what is there now can be traced
    x = torch.randn(1, 4, 5, 5).double()
    assert torch.equal(traced(x), folded(x))


def test_a_residual_that_is_the_output_itself_is_a_second_reader():
    class Twice(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y, residual=y)

    assert "output of 'conv' goes elsewhere" in why_not_ours(Twice())


def why_not_ours(model: nn.Module) -> str:
    (row,) = fbt.explain_fold(model.eval())
    assert row.layer is None
    return row.reason


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_channels_that_are_last(rank):
    norm = OURS[rank - 1](4, axis=-1)
    shape = (2, *[3] * rank, 5)
    model = randomized(nn.Sequential(nn.Linear(5, 4), norm))
    assert_folds(model, torch.randn(shape).double(), layers=["0"])
    conv = nn.Sequential(CONVOLUTIONS[rank - 1](3, 4, 3), norm)
    assert "its axis is -1" in why_not_ours(conv)
    assert "its axis is -2" in why_not_ours(nn.Sequential(nn.Linear(5, 4), OURS[1](4, axis=-2)))


def test_synchronized_batch_norms():
    for kind in (nn.SyncBatchNorm, fbt.SyncBatchNorm):
        model = randomized(nn.Sequential(convolution(3, 4), kind(4)))
        assert_folds(model, torch.randn(2, 3, 5, 5).double(), layers=["0"])


def test_transforms_are_folded_as_they_are_now():
    transforms = {"scale": fbt.FakeQuantize(4), "moving_variance": torch.square}
    norm = fbt.BatchNorm2d(4, transforms=transforms, activation="relu")
    model = randomized(nn.Sequential(convolution(3, 4), norm))
    x = torch.randn(2, 3, 5, 5).double()
    quantized = assert_folds(model, x, layers=["0"])
    norm.transforms_active = torch.tensor(False)
    plain = assert_folds(model, x, layers=["0"])
    assert not torch.allclose(plain[0].weight, quantized[0].weight)


def test_transforms_that_a_call_switches_are_not_folded():
    model = randomized(Residual(transforms_active=False))
    assert why_not_ours(model) == "whether its transforms are active is said in its call"


# ---- an axis that only the input tells ----


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(5, 4), (2, 4, 5)), (nn.Conv1d(3, 4, 3, padding=1), (3, 4))],
    ids=["linear", "unbatched"],
)
def test_an_input_whose_channels_lie_elsewhere_is_refused_when_it_comes(layer, x):
    """As many channels in the wrong place: a batch norm takes it, and no weights can do that."""
    model = randomized(nn.Sequential(copy.deepcopy(layer), nn.BatchNorm1d(4)))
    x = torch.randn(x).double()
    assert model(x).shape
    with pytest.raises(ValueError, match=r"fold: `input` must have rank \d, for which"):
        fbt.fold(model)(x)


# ---- backwards ----


def test_into_the_layer_after_it():
    model = randomized(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))
    x = torch.randn(2, 3, 6, 6).double()
    assert_folds(model, x, layers=["1"], before=True)
    assert_folds(model, x, layers=[None])
    model = randomized(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False)))
    assert_folds(model, torch.randn(2, 5).double(), layers=["1"], before=True)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_into_a_convolution_after_it(rank, groups):
    for options in (
        {},
        {"stride": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "valid"},
    ):
        conv = CONVOLUTIONS[rank - 1](3, 6, 3, groups=groups, **options)
        model = randomized(nn.Sequential(NORMS[rank - 1](3), conv))
        assert_folds(model, torch.randn(2, 3, *[5] * rank).double(), layers=["1"], before=True)


def test_a_layer_between_two_takes_both():
    model = randomized(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6).double()
    assert_folds(model, x, layers=["1", "1"], before=True)


def test_not_backwards_where_the_border_sees_it():
    padded = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    assert "pads with zeros" in why_not(padded, before=True)
    same = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding="same"))
    assert "pads with zeros" in why_not(same, before=True)
    transposed = nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3))
    assert "is transposed" in why_not(transposed, before=True)


def test_not_backwards_through_an_activation():
    ours = nn.Sequential(fbt.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 4, 3))
    (row,) = fbt.explain_fold(ours.eval(), before=True)
    assert row.reason == "no layer is right before it; it does more than normalize"
    theirs = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    assert "ReLU '1' is right after it" in why_not(theirs, before=True)


# ---- what else might see it ----


class Own(nn.Module):
    """Conv and batch norm, called by a function."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def read_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.bn(y) + y


def norm_twice(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv2(self.bn(self.conv(x))))


def conv_twice(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(self.conv(x)))


def activated(self: Any, x: Tensor) -> Tensor:
    return self.bn(torch.relu(self.conv(x)))


def weight_read(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) * self.conv.weight.mean()


def statistics_read(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) * self.bn.running_mean.mean()


def both_together(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(self.bn(self.conv(x))))


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (read_twice, "the output of 'conv' goes elsewhere too"),
        (norm_twice, "what is before it differs from call to call"),
        (conv_twice, "the output of 'conv' goes elsewhere too"),
        (activated, "no layer is right before it"),
        (weight_read, "a forward reads the parameters of 'conv'"),
        (statistics_read, "a forward reads its parameters or statistics"),
    ],
)
def test_seen_by_somebody_else(run, reason):
    model = randomized(Own(run))
    assert why_not(model) == reason
    x = torch.randn(1, 3, 5, 5).double()
    assert torch.equal(fbt.fold(model)(x), model(x))


def test_what_is_done_to_a_list_counts_too():
    class Either(Own):
        def forward(self, x: Tensor | list[Tensor]) -> Tensor:
            if isinstance(x, Tensor):
                return self.bn(self.conv(x))
            y = self.conv(x[0])
            return self.bn(y) + y

    assert why_not(Either(read_twice)) == "the output of 'conv' goes elsewhere too"


def test_a_layer_after_it_that_is_called_without_it():
    def run(self: Any, x: Tensor) -> Tensor:
        return self.conv(self.bn(x)) + self.conv(x)

    model = Own(run)
    model.conv = nn.Conv2d(3, 3, 1)
    reason = "no layer is right before it; 'conv' has another input too"
    assert why_not(model, before=True) == reason


def test_a_pair_that_is_always_called_together_is_folded():
    assert_folds(randomized(Own(both_together)), torch.randn(1, 3, 5, 5).double(), layers=["conv"])


def test_a_batch_norm_with_two_names():
    model = Own(activated_after)
    model.alias = model.bn
    folded = assert_folds(randomized(model), torch.randn(1, 3, 5, 5).double(), layers=["conv"])
    assert folded.alias is folded.bn


def activated_after(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.alias(self.conv(x)))


def test_called_from_two_forwards():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner[0](x)

    assert "output of 'inner.0' goes elsewhere" in why_not(randomized(Outer()))


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))


def test_weights_that_are_tied():
    model = pair()
    model[2].weight = model[0].weight
    assert why_not(model) == "the weight of '0' is that of '2' too"
    model = pair()
    model[2].bias = model[0].bias
    assert why_not(model) == "the bias of '0' is that of '2' too"


def test_hooks_and_parametrizations():
    model = pair()
    model[0].register_forward_hook(lambda *_: None)
    assert why_not(model) == "'0' has hooks, or a forward of its own"
    model = pair()
    model[1].register_forward_pre_hook(lambda *_: None)
    assert why_not(model) == "it has hooks, or a forward of its own"
    model = pair()
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert why_not(model) == "ParametrizedConv2d '0' is right before it"


def test_what_is_no_batch_norm_or_layer_of_pytorch():
    class Mine(nn.Conv2d):
        pass

    model = nn.Sequential(Mine(3, 3, 1), nn.BatchNorm2d(3))
    assert why_not(model) == "Mine '0' is right before it"
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    assert "no running statistics" in why_not(model)
    model = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d())
    assert "call the model once" in fbt.explain_fold(model.eval())[0].reason


def test_what_only_calls_what_cannot_be_traced_is_folded_inside():
    model, x = network("dynamic")
    inside, own = fbt.explain_fold(model.eval())
    assert inside.layer == "stem.0"
    assert "cannot be traced: in evaluation, its control flow depends" in own.reason
    assert_folds(model, x, layers=["stem.0", None])


# ---- errors ----


def test_errors():
    with pytest.raises(TypeError, match=r"fold: `model` must be a torch\.nn\.Module; got int\."):
        fbt.fold(3)
    with pytest.raises(TypeError, match=r"explain_fold: `model` must be a torch\.nn\.Module"):
        fbt.explain_fold(3)
    model = pair().eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"evaluation mode; got training mode in '1'. Call model"):
        fbt.fold(model)
    with pytest.raises(ValueError, match="got training mode"):
        fbt.explain_fold(pair())
    with pytest.raises(TypeError, match="fold: `before` must"):
        fbt.fold(model.eval(), before="yes")
    model[1].running_var[1] = -1
    with pytest.raises(ValueError, match=r"not be negative; got .* It is batch norm '1'\."):
        fbt.fold(model)
