"""PyTorch's ops for CUDA tensors, interpreted on a CPU, whose own ops are the judge.

All roads to them, what the host does on the way, and what is refused.
"""

import copy
import runpy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreted import verbs
from torch.utils.checkpoint import checkpoint

import fusebn
import fusebn.torch as fbt
import fusebn.triton
from fusebn.torch import _batch_statistics, _gpu, _library, _merging, _ops, _synchronized, _verbs
from fusebn.torch._portable import Moments, Options
from fusebn.triton._tiles import tile_at

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
}


@pytest.fixture(autouse=True)
def one_tile_ahead(monkeypatch):
    """Interpreted, a tile that is loaded early and lies beside the data costs as any other."""
    monkeypatch.setattr(verbs, "_ahead", lambda *read: 1)


def options(training=True, activation="relu", axis=1):
    return {
        "training": training, "axis": axis, "epsilon": 1e-3, "correction": 1.0, "factor": 0.25,
        "activation": activation,
    }  # fmt: skip


def tensors(rng, lay_out, *, weights, residual):
    def of(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype("float32"))

    channels = 32
    x, dy, beside = (lay_out(of(3, channels, 4, 6)) for _ in range(3))
    return dy, [
        x, of(channels), of(channels), of(channels), of(channels).square() + 0.5,
        beside if residual else None,
        torch.from_numpy(rng.uniform(0.5, 2, (3, 1, *x.shape[2:])).astype("float32"))
        if weights else None,
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("training", "weights", "residual"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_batch_norm_and_backward(layout, training, weights, residual, rng):
    dy, given = tensors(rng, LAYOUTS[layout], weights=weights, residual=residual)
    x = given[0]
    wanted = torch.ops.fusebn.batch_norm(*given, **options(training))
    found = _gpu.batch_norm(*given, **options(training))
    assert found[0].stride() == torch.empty_like(x).stride()
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    flows = [None, None] if not training else torch.from_numpy(
        rng.standard_normal((2, 32)).astype("float32")
    )  # fmt: skip
    backward = dy, *flows, wanted[3], *given
    wanted = torch.ops.fusebn.batch_norm_backward(*backward, **options(training))
    found = _gpu.batch_norm_backward(*backward, **options(training))
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_moments(axis, rng):
    x = torch.from_numpy(rng.standard_normal((40, 24)))
    weights = torch.from_numpy(rng.integers(0, 3, (1, 24) if axis == 0 else (40, 1)) * 1.0)
    for given in (None, weights):
        wanted = torch.ops.fusebn.moments(x, given, axes=[1 - axis])
        found = _gpu.moments(x, axis, given)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_moments_of_nothing():
    count, mean, m2 = _gpu.moments(torch.empty(0, 3), 1, None)
    assert (float(count), mean.tolist(), m2.tolist()) == (0, [0] * 3, [0] * 3)


def test_no_channels():
    none = torch.empty(4, 0, 3)
    vector = torch.empty(0)
    given = none, vector, vector, None, None, None, None
    y, mean, _, batch, count = _gpu.batch_norm(*given, **(options() | {"factor": 1.0}))
    assert (y.shape, mean.shape, batch.shape, float(count)) == ((4, 0, 3), (0,), (2, 0), 0)
    gradients = _gpu.batch_norm_backward(none, None, None, batch, *given, **options())
    assert [of.numel() for of in gradients] == [0] * 6


# ---- every road ----


@contextmanager
def as_on_a_gpu():
    """Hand tensors of the CPU to the kernels wherever a CUDA device's would be; list the verbs."""
    launched = []

    def spy(name, verb):
        def called(*arguments, **options):
            launched.append(name)
            return verb(*arguments, **options)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in VERBS:
            verb = spy(name, getattr(verbs, name))
            for module in (verbs, fusebn.triton):
                if hasattr(module, name):
                    patch.setattr(module, name, verb)
        patch.setattr(_gpu, "serves", lambda x: True)
        patch.setattr(_ops, "short_way", lambda *_: None)
        patch.setattr(_batch_statistics, "_short_way", _batch_statistics._long_way)
        yield launched


VERBS = (
    "moments", "normalize", "backward_sums", "backward", "forward_resident", "gradient_resident",
)  # fmt: skip
APART = {"moments", "normalize", "backward_sums", "backward"}
HELD = {"forward_resident", "gradient_resident"}
GIVEN = APART - {"moments"}


IMAGES = 3, 8, 4, 5


def normal(*shape):
    return torch.randn(shape, requires_grad=True)


def channels_last(*shape):
    of = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.randn(shape).contiguous(memory_format=of).requires_grad_()


def trained(model, x, **call):
    """Return what a step of training makes of a model and its input."""
    torch.manual_seed(1)
    y = model(x, **call)
    y.sin().sum().backward()
    leaves = [x, *(v for v in call.values() if torch.is_tensor(v)), *model.parameters()]
    return [y, *(v.grad for v in leaves if v.requires_grad), *model.buffers()]


def layer(*arguments, **more):
    return fbt.BatchNorm2d(8, *arguments, **{"activation": "relu", **more})


def evaluated(made):
    return trained(made.eval(), normal(*IMAGES))


def checkpointed():
    module, x = layer(), normal(*IMAGES)
    checkpoint(module, x, use_reentrant=False).sin().sum().backward()
    return [x.grad, module.weight.grad, *module.buffers()]


def fused_model():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    )  # fmt: skip
    return trained(fbt.fuse(model), normal(3, 3, 4, 5))


def autocast():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), fbt.BatchNorm2d(8))
    with torch.autocast("cpu", torch.bfloat16):
        results = trained(model, normal(3, 3, 4, 5))
    assert results[0].dtype is torch.bfloat16
    return results[-3:]  # the averages: the interpreter truncates where it rounds to bfloat16


def compiled():
    torch._dynamo.reset()
    return trained(torch.compile(layer(), backend="aot_eager", fullgraph=True), normal(*IMAGES))


def quantized():
    model = fbt.qat.ConvBatchNorm2d(3, 8, 1)
    return trained(model, normal(3, 3, 4, 5))


def transformed(**more):
    transforms = {"scale": fbt.FakeQuantize(6), "moving_variance": torch.sqrt}
    return trained(layer(transforms=transforms, **more), normal(*IMAGES))


def twice():
    x, module = normal(*IMAGES), layer(activation="silu")
    (first,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    return [first, *torch.autograd.grad(first.square().sum(), x)]


def strided_averages():
    averages = [torch.full((8, 2), of)[:, 0] for of in (0.5, 2.0)]
    return [fbt.batch_norm(normal(3, 8, 4), *averages, training=True), *averages]


def function(x):
    return fbt.batch_norm(x, None, None, training=True, activation="silu").sin().sum()


def public(name, *arguments, **more):
    """Return the results of a function, and the gradient of x: its first argument, or second."""

    def road():
        x = normal(3, 4, 5, 8)
        values = [x if of is ... else of for of in arguments]
        found = getattr(fusebn, name)(*values, **more)
        tensors = [found] if torch.is_tensor(found) else [of for of in found if of is not None]
        flows = [of for of in tensors if of.requires_grad]
        if not flows:
            return tensors
        return [*tensors, *torch.autograd.grad(sum(of.sin().sum() for of in flows), x)]

    return road


ONE = torch.linspace(0.5, 2, 8)
HALF = torch.full((3, 4, 5), 0.5)
ROADS = {
    "a layer": (lambda: trained(layer(), normal(*IMAGES)), APART),
    "channels_last": (lambda: trained(fbt.BatchNorm2d(32), channels_last(3, 32, 4, 5)), HELD),
    "channels_last_3d": (lambda: trained(fbt.BatchNorm3d(32), channels_last(2, 32, 2, 2, 3)), HELD),
    "1d": (lambda: trained(fbt.BatchNorm1d(32), normal(20, 32)), HELD),
    "axis": (lambda: trained(layer(axis=-1), normal(3, 4, 5, 8)), APART),
    "a residual": (lambda: trained(layer(), normal(*IMAGES), residual=normal(*IMAGES)), APART),
    "weights": (lambda: trained(layer(), normal(*IMAGES), weights=HALF), APART),
    "evaluation": (lambda: evaluated(layer()), GIVEN),
    "frozen": (lambda: trained(layer().freeze(), normal(*IMAGES)), GIVEN),
    "no averages": (lambda: trained(layer(track_running_stats=False), normal(*IMAGES)), APART),
    "strided averages": (strided_averages, APART - GIVEN | {"normalize"}),
    "momentum None": (lambda: trained(layer(momentum=None), normal(*IMAGES)), APART),
    "momentum 1": (lambda: trained(layer(momentum=1.0), normal(*IMAGES)), APART),
    "skip": (lambda: trained(layer(nonfinite="skip"), normal(*IMAGES)), APART),
    "lazy": (lambda: trained(fbt.LazyBatchNorm2d(), normal(*IMAGES)), APART),
    "checkpointed": (checkpointed, APART),
    "fused": (fused_model, APART),
    "autocast": (autocast, APART),
    "compiled": (compiled, APART),
    "quantized": (quantized, APART),
    "transforms": (transformed, APART),
    "transformed statistics": (lambda: transformed(transform_batch_statistics=True), APART),
    "twice": (twice, APART - {"backward_sums", "backward"}),
    "func.grad": (lambda: [torch.func.grad(function)(torch.randn(3, 8, 4))], APART),
    "func.vmap": (lambda: [torch.func.vmap(function)(torch.randn(2, 3, 8, 4))], APART - GIVEN),
    "fused_batch_norm": (public("fused_batch_norm", ..., ONE, ONE), APART),
    "fused_batch_norm, given": (
        public("fused_batch_norm", ..., ONE, ONE, ONE, ONE, is_training=False),
        GIVEN,
    ),
    "fused_batch_norm_grad": (
        lambda: fusebn.fused_batch_norm_grad(*torch.randn(2, 3, 5, 5, 8), ONE, ONE, ONE, ONE)[:3],
        {"backward_sums", "backward"},
    ),
    "batch_normalization": (public("batch_normalization", ..., ONE, ONE, ONE, None, 0.1), GIVEN),
    "batch_norm_with_global_normalization": (
        public("batch_norm_with_global_normalization", ..., ONE, ONE, ONE, ONE, 0.1, True),
        GIVEN,
    ),
    "moments": (public("moments", ..., (0, 1, 2)), {"moments", "normalize"}),
    "moments of images": (public("moments", ..., (1, 2)), {"moments", "normalize"}),
    "weighted_moments": (
        public("weighted_moments", ..., (0, 1, 2), HALF.unsqueeze(-1)),
        {"moments", "normalize"},
    ),
    "sufficient_statistics": (
        public("sufficient_statistics", ..., (0, 1, 2)),
        {"moments", "normalize"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROADS)
def test_every_road_leads_to_the_kernels(name):
    road, expected = ROADS[name]
    torch.manual_seed(0)
    wanted = road()
    torch.manual_seed(0)
    with as_on_a_gpu() as launched:
        found = road()
    assert expected <= set(launched) <= expected | APART
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


class OfItsOwn(torch.Tensor):
    """What may have no memory that an address could tell of."""


def test_what_is_no_plain_tensor_goes_through_the_dispatcher(monkeypatch):
    x, scale = normal(*IMAGES), torch.rand(8).as_subclass(OfItsOwn)
    mean, var = torch.zeros(8), torch.ones(8)
    wanted = fbt.batch_norm(x, mean, var, scale, training=True)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(_ops, "_short_way_of_a_gpu", never)
    with as_on_a_gpu():
        found = fbt.batch_norm(x, mean, var, scale, training=True)
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
        fbt.batch_norm(x[:0], mean, var, training=True)
        fbt.batch_norm(x, mean, var.requires_grad_())
        with pytest.raises(AssertionError):
            fbt.batch_norm(x, mean, var.detach())


def test_a_batch_in_parts_takes_them():
    assert _synchronized._verbs_for(torch.ones(1)) is _verbs
    with as_on_a_gpu():
        assert _synchronized._verbs_for(torch.ones(1)) is _gpu
    assert _synchronized._verbs_for(torch.ones(1, device="meta")) is None


# ---- what the host does ----


class Nothing:
    """A kernel that is launched and computes nothing."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.fixture
def valueless(monkeypatch):
    """Return what makes tensors of another device, which have no values: to read one raises."""
    for name in vars(verbs):
        if name.endswith("_kernel"):
            monkeypatch.setattr(verbs, name, Nothing())
    monkeypatch.setattr(verbs, "_processors", lambda device: 132)
    monkeypatch.setattr(_gpu, "_check", lambda device: None)
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", "0")  # which asks where tensors begin

    def like(of):
        if of is not None:
            return torch.empty_strided(of.shape, of.stride(), dtype=of.dtype, device="meta")

    return like


def told(tensors):
    return [(of.shape, of.stride(), of.dtype, of.device) for of in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("training", "weights", "residual"),
    [(True, False, True), (True, True, False), (False, False, True)],
)
def test_compilers_are_told_the_truth(layout, training, weights, residual, rng, valueless):
    """And nothing waits for a value: shapes, strides and types are those that were announced."""
    dy, given = tensors(rng, LAYOUTS[layout], weights=weights, residual=residual)
    dy, *given = map(valueless, (dy, *given))
    how = options(training)
    if not training:  # as transforms of a batch's statistics have them
        given[3], given[4] = given[3].double(), given[4].double()
    wanted = torch.ops.fusebn.batch_norm(*given, **how)
    assert told(_gpu.batch_norm(*given, **how)) == told(wanted)
    backward = dy, None, None, wanted[3], *given
    wanted = torch.ops.fusebn.batch_norm_backward(*backward, **how)
    assert told(_gpu.batch_norm_backward(*backward, **how)) == told(wanted)
    x, w = given[0], given[6]
    wanted = torch.ops.fusebn.moments(x, w, axes=[0, 2, 3])
    assert told(_gpu.moments(x, 1, w)) == told(wanted)


def test_nothing_waits_for_a_batch_in_parts(rng, valueless):
    dy, given = tensors(rng, LAYOUTS["channels_last"], weights=True, residual=True)
    dy, *given = map(valueless, (dy, *given))
    x, scale, offset, mean, variance, residual, weights = given
    o = Options(**options())
    count, _, _ = _gpu.moments(x, 1, weights)
    batch = torch.stack([mean, variance]).double()
    y = _gpu.normalize(x, batch, count, scale, offset, residual, o)
    joined = []
    found = _gpu.gradient(
        dy, x, batch, count, scale, offset, residual, weights, o, (True,) * 4, joined.append
    )
    assert told([y, *found]) == told([x, x, scale, offset, residual])
    assert told(joined) == told([batch])


def test_a_default_device_does_not_matter():
    with torch.device("meta"):
        assert verbs._pair(0.1)[0] == np.float32(0.1)


# ---- a launch that fails ----


class Failing:
    def __init__(self, message):
        self.message = message

    def __getitem__(self, grid):
        raise RuntimeError(self.message)


@pytest.mark.parametrize("kernel", ["moments_kernel", "normalize_kernel", "forward_kernel"])
def test_a_launch_that_fails_leaves_no_average_half_updated(kernel, monkeypatch):
    monkeypatch.setattr(verbs, kernel, Failing("out of memory"))
    observer = fbt.FakeQuantize(8, limits="moving")
    module = fbt.BatchNorm2d(32, transforms={"scale": observer})
    before = copy.deepcopy(module.state_dict())
    x = channels_last(3, 32, 4, 5) if kernel == "forward_kernel" else normal(3, 32, 4, 5)
    with as_on_a_gpu(), pytest.raises(RuntimeError, match="out of memory"):
        module(x)
    assert module.state_dict().keys() == before.keys()
    for name, value in module.state_dict().items():
        assert value.equal(before[name]), name


def test_both_averages_or_none():
    """The variance's update fails; the mean's has not been made."""
    mean, three = torch.zeros(3), torch.ones(3, dtype=torch.float64)
    moments = Moments(three[0], three, three)
    with pytest.raises(RuntimeError, match="must match the size"):
        _merging.mix(mean, torch.ones(2), moments, 0.5, 1.0)
    assert mean.equal(torch.zeros(3))


def test_a_device_without_room_for_all_programs_takes_two_launches(monkeypatch):
    def road():
        torch.manual_seed(0)
        return trained(fbt.BatchNorm2d(32, activation="relu"), channels_last(3, 32, 4, 5))

    wanted = road()
    for kernel in ("forward_kernel", "gradient_kernel"):
        refusal = "Triton Error [CUDA]: too many blocks in cooperative launch"
        monkeypatch.setattr(verbs, kernel, Failing(refusal))
    with as_on_a_gpu() as launched:
        found = road()
    assert set(launched) == HELD | APART
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


# ---- planes of more elements than 32 bits can count ----


@triton.jit
def _tile_of_a_plane(FOUND, number, group, width, chunks):
    base, _, data, _, column = tile_at(
        number, group, 1, 0, width, width, chunks, chunks, 0, 1, 1024
    )
    tl.store(FOUND, base)
    tl.store(FOUND + 1, tl.max(column, 0).to(tl.int64))
    tl.store(FOUND + 2, tl.sum(tl.sum(data.to(tl.int64), 0), 0))


def test_planes_past_what_32_bits_can_count():
    found, width = torch.zeros(3, dtype=torch.int64), 2**33 - 24
    _tile_of_a_plane[(1,)](found, 2**23 - 1, 0, width, 2**23)
    assert found.tolist() == [2**33 - 1024, 2**33 - 1, 1000]


# ---- where, and where not ----


def test_they_are_registered_and_wanted_on_request_alone(monkeypatch):
    for name in ("batch_norm", "batch_norm_backward", "moments"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusebn::{name}", "CUDA")
    assert _library is not None

    class OnADevice:
        is_cuda = True

    for asked, serves in ((None, False), ("0", False), ("1", True)):
        monkeypatch.delenv("FUSEBN_TRITON", raising=False)
        if asked is not None:
            monkeypatch.setenv("FUSEBN_TRITON", asked)
        copied = runpy.run_path(_gpu.__file__)
        assert copied["serves"](OnADevice()) is serves
        assert not copied["serves"](torch.zeros(1))


@pytest.fixture
def unchecked():
    _gpu._check.cache_clear()
    yield
    _gpu._check.cache_clear()


@pytest.mark.usefixtures("unchecked")
def test_triton_is_missing(monkeypatch):
    monkeypatch.setattr(_gpu, "find_spec", lambda name: None)
    module = layer()
    wanted = "FUSEBN_TRITON=1 needs triton, which is not installed.*pip install 'fusebn.triton.'"
    with as_on_a_gpu(), pytest.raises(ImportError, match=wanted):
        module(normal(*IMAGES))
    assert module.num_batches_tracked == 0
    assert module.running_var.equal(torch.ones(8))


@pytest.mark.usefixtures("unchecked")
def test_devices_that_triton_does_not_serve(monkeypatch):
    device = torch.device("cuda", 1)
    wanted = "`x` must be on an NVIDIA GPU of compute capability 8.0 or higher"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=wanted + ".*; got one of 7.5, cuda:1. Without FUSEBN"):
        _gpu._check(device)
    for enough in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, it=enough: it)
        _gpu._check(device)
        _gpu._check.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match=wanted + ".*; got one on an AMD GPU"):
        _gpu._check(device)


X, V = torch.ones(3, 4), torch.ones(4)
ELSEWHERE, VECTOR_ELSEWHERE = torch.ones(3, 4, device="meta"), torch.ones(4, device="meta")
MIXED = {
    "fused_batch_norm scale": lambda: fusebn.fused_batch_norm(X, VECTOR_ELSEWHERE, V, axis=1),
    "fused_batch_norm mean": lambda: fusebn.fused_batch_norm(
        X, V, V, VECTOR_ELSEWHERE, V, axis=1, is_training=False
    ),
    "fused_batch_norm residual": lambda: fusebn.fused_batch_norm(
        X, V, V, axis=1, residual=ELSEWHERE
    ),
    "fused_batch_norm weights": lambda: fusebn.fused_batch_norm(
        X, V, V, axis=1, weights=ELSEWHERE[:, 0]
    ),
    "fused_batch_norm out": lambda: fusebn.fused_batch_norm(X, V, V, axis=1, out=ELSEWHERE),
    "fused_batch_norm_grad dy": lambda: fusebn.fused_batch_norm_grad(
        ELSEWHERE, X, V, V, V, V, axis=1
    ),
    "fused_batch_norm_grad variance": lambda: fusebn.fused_batch_norm_grad(
        X, X, V, V, V, VECTOR_ELSEWHERE, axis=1
    ),
    "moments weights": lambda: fusebn.moments(X, 0, weights=ELSEWHERE[:, 0]),
    "weighted_moments frequency_weights": lambda: fusebn.weighted_moments(X, 0, ELSEWHERE),
    "sufficient_statistics shift": lambda: fusebn.sufficient_statistics(X, 0, VECTOR_ELSEWHERE),
    "normalize_moments variance_ss": lambda: fusebn.normalize_moments(
        3, V, VECTOR_ELSEWHERE, None
    ),
    "batch_normalization offset": lambda: fusebn.batch_normalization(
        X, V, V, VECTOR_ELSEWHERE, None, 0.1
    ),
    "batch_norm residual": lambda: fbt.batch_norm(
        X, None, None, training=True, residual=ELSEWHERE
    ),
    "batch_norm weights": lambda: fbt.batch_norm(
        X, None, None, training=True, weights=ELSEWHERE[:, 0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_tensors_on_several_devices(name):
    operation, argument = name.split()
    wanted = f"{operation}: `{argument}` must be on cpu, where the others are; got one on meta"
    with pytest.raises(ValueError, match=wanted):
        MIXED[name]()


def test_a_module_on_several_devices():
    """PyTorch's own words, for what is PyTorch's."""
    module = layer()
    module.running_var = torch.ones(8, device="meta")
    with pytest.raises(RuntimeError, match="not on the expected device cpu"):
        module(normal(*IMAGES))
    assert module.running_mean.equal(torch.zeros(8))


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_backward"])
def test_opcheck(name, rng):
    dy, given = tensors(rng, LAYOUTS["channels_last"], weights=False, residual=True)
    given = [of.requires_grad_() if i in (0, 1, 2, 5) else of for i, of in enumerate(given[:6])]
    if name == "batch_norm_backward":
        batch = torch.stack([given[3], given[4]]).double()
        given = [dy, None, None, batch, *(of.detach() for of in given)]
    with as_on_a_gpu() as launched:
        torch.library.opcheck(getattr(torch.ops.fusebn, name).default, (*given, None), options())
    assert launched
