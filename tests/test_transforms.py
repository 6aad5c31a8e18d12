"""The NumPy layer with transforms, against the formula in long double and finite differences."""

import numpy as np
import pytest

import fusebn
from fusebn import BatchNorm
from fusebn.quantize import FakeQuantize

NAMES = ("scale", "offset", "moving_mean", "moving_variance")


class Bend:
    """A smooth function of every element, with its derivative."""

    def __init__(self, a):
        self.a = a

    def __call__(self, vector):
        return vector + self.a * np.sin(vector)

    def gradient(self, vector, gradient):
        return gradient * (1 + self.a * np.cos(vector))


BENDS = {name: Bend(a) for name, a in zip(NAMES, (0.3, -0.7, 0.4, 0.2), strict=True)}


def batch(shape=(4, 5, 3), seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(1.0, 2.0, shape).astype(dtype)


def layer_of(channels=3, dtype="float32", **options):
    layer = BatchNorm(channels, decay=0.5, epsilon=1e-3, dtype=dtype, **options)
    rng = np.random.default_rng(5)
    layer.scale[...] = rng.uniform(0.5, 2, channels)
    layer.offset[...] = rng.normal(size=channels)
    layer.moving_mean[...] = rng.normal(size=channels)
    layer.moving_variance[...] = rng.uniform(0.5, 2, channels)
    return layer


def state_of(layer):
    return {key: value.tobytes() for key, value in layer.state_dict().items()}


def assert_same_bits(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("switch", ["layer", "array", "call"])
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"nonfinite": "skip"}])
def test_without_them_the_bits_are_those_of_a_plain_layer(own, switch, options):
    plain = layer_of(**options)
    flag = np.array(False) if switch == "array" else switch == "call"
    layer = layer_of(
        transforms=dict.fromkeys(NAMES, np.negative),
        transforms_active=flag,
        transform_batch_statistics=own,
        **options,
    )
    call = {"transforms_active": False} if switch == "call" else {}
    x, dy = batch(), batch(seed=1)
    for training in (True, False, True):
        assert_same_bits(plain(x, training=training), layer(x, training=training, **call))
        for one, other in zip(plain.backward(dy), layer.backward(dy), strict=True):
            assert_same_bits(one, other)
    assert state_of(plain) == state_of(layer)


def test_an_array_switches_while_the_layer_lives():
    flag = np.array(False)
    layer = layer_of(transforms={"offset": lambda v: v + 1}, transforms_active=flag)
    x = batch()
    plain = layer(x, training=False)
    flag[...] = True
    np.testing.assert_allclose(layer(x, training=False), plain + 1, rtol=1e-6)
    np.testing.assert_array_equal(layer(x, training=False, transforms_active=False), plain)


@pytest.mark.parametrize("training", [True, False])
def test_what_they_return_normalizes_in_the_place_of_the_variable(training):
    layer, plain = layer_of(transforms=BENDS), layer_of()
    for name in NAMES:
        if not training or name in ("scale", "offset"):
            getattr(plain, name)[...] = BENDS[name](getattr(plain, name))
    x = batch()
    before = {name: getattr(layer, name).copy() for name in NAMES}
    np.testing.assert_array_equal(layer(x, training=training), plain(x, training=training))
    np.testing.assert_array_equal(layer.scale, before["scale"])
    got, wanted = layer.backward(x), plain.backward(x)
    np.testing.assert_array_equal(got.dx, wanted.dx)
    for name in ("scale", "offset"):
        slope = BENDS[name].gradient(before[name], 1)
        np.testing.assert_allclose(
            getattr(got, f"d{name}"), getattr(wanted, f"d{name}") * slope, rtol=1e-6
        )


def test_the_averages_take_up_what_the_batch_is():
    plain = layer_of()
    layers = [layer_of(transforms=BENDS, transform_batch_statistics=own) for own in (False, True)]
    for seed in range(3):
        for layer in (plain, *layers):
            layer(batch(seed=seed), training=True)
    for layer in layers:
        assert state_of(layer) == state_of(plain)


def formula(x, layer, residual, weights, transforms):
    """y by the formula, with the batch's statistics transformed."""
    x = x.astype(np.longdouble)
    weights = np.ones((*x.shape[:-1], 1)) if weights is None else weights[..., None]
    count = weights.sum()
    mean = (weights * x).sum((0, 1)) / count
    variance = (weights * (x - mean) ** 2).sum((0, 1)) / count
    scale, offset, mean, variance = (
        transforms.get(name, lambda v: v)(vector)
        for name, vector in zip(NAMES, (layer.scale, layer.offset, mean, variance), strict=True)
    )
    z = (x - mean) / np.sqrt(np.maximum(variance, 0) + layer.epsilon) * scale + offset
    z = z if residual is None else z + residual
    return z / (1 + np.exp(-z)) if layer.activation == "silu" else z


@pytest.mark.parametrize("names", [NAMES, NAMES[2:3], NAMES[3:], NAMES[:2]])
@pytest.mark.parametrize("fusions", [False, True])
def test_batch_statistics_transformed_and_the_way_back(names, fusions):
    transforms = {name: BENDS[name] for name in names}
    layer = layer_of(
        dtype="float64",
        transforms=transforms,
        transform_batch_statistics=True,
        activation="silu" if fusions else None,
    )
    x, dy = batch(dtype="float64"), batch(seed=1, dtype="float64")
    residual = batch(seed=2, dtype="float64") if fusions else None
    weights = np.random.default_rng(3).uniform(0, 2, (4, 5)) if fusions else None
    if fusions:
        weights[0, :2] = 0
    y = layer(x, training=True, residual=residual, weights=weights)
    wanted = formula(x, layer, residual, weights, transforms)
    np.testing.assert_allclose(y, wanted.astype(float), rtol=1e-12, atol=1e-12)
    dx, dscale, doffset, dresidual = layer.backward(dy)

    def loss(at, step, index):
        parts = {"x": x.copy(), "scale": layer.scale.copy(), "offset": layer.offset.copy()}
        parts["residual"] = None if residual is None else residual.copy()
        parts[at].flat[index] += step
        moved = layer_of(dtype="float64", activation=layer.activation)
        moved.scale[...], moved.offset[...] = parts["scale"], parts["offset"]
        return (formula(parts["x"], moved, parts["residual"], weights, transforms) * dy).sum()

    wanted = {"x": dx, "scale": dscale, "offset": doffset, "residual": dresidual}
    for at, gradient in wanted.items():
        if gradient is None:
            assert residual is None
            continue
        for index in range(0, gradient.size, 1 if gradient.size < 9 else 7):
            slope = (loss(at, 1e-5, index) - loss(at, -1e-5, index)) / 2e-5
            assert gradient.flat[index] == pytest.approx(float(slope), rel=1e-7, abs=1e-8), at


@pytest.mark.parametrize("own", [False, True])
def test_fake_quantize_is_straight_through(own):
    quantize = FakeQuantize(16, limits=(-16.0, 16.0))
    layer = layer_of(transforms=dict.fromkeys(NAMES, quantize), transform_batch_statistics=own)
    plain = layer_of()
    layer.scale[...] = plain.scale[...] = [1.0, 19.0, 0.5]  # one of them is clipped
    x, dy = batch(), batch(seed=1)
    layer(x, training=True)
    plain(x, training=True)
    got, wanted = layer.backward(dy), plain.backward(dy)
    assert got.dscale[1] == 0
    np.testing.assert_allclose(got.dscale[[0, 2]], wanted.dscale[[0, 2]], rtol=2e-3, atol=2e-2)
    np.testing.assert_allclose(got.doffset, wanted.doffset, rtol=1e-6)
    # Nothing but the quantized scale has a part in dx: the straight way through is the plain one.
    plain.scale[...] = quantize(plain.scale)
    plain(x, training=True)
    np.testing.assert_allclose(
        got.dx, plain.backward(dy).dx, rtol=1e-2 if own else 1e-6, atol=1e-3 if own else 1e-7
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_variance_is_never_less_than_zero(training):
    layer = layer_of(
        transforms={"moving_variance": lambda v: v - 100}, transform_batch_statistics=True
    )
    x = batch()
    y = layer(x, training=training)
    mean = x.mean((0, 1)) if training else layer.moving_mean
    wanted = (x - mean) / np.sqrt(np.float32(1e-3)) * layer.scale + layer.offset
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-3)
    dx = layer.backward(np.ones_like(x)).dx
    assert np.isfinite(dx).all()
    if training:  # only the mean has a gradient, and takes all there is
        assert np.abs(dx).max() < 1e-4


def test_variance_and_epsilon_zero():
    layer = BatchNorm(
        2, epsilon=0, transforms={"moving_variance": np.copy}, transform_batch_statistics=True
    )
    x = np.full((6, 2), 542.37, "float32")
    assert (layer(x, training=True) == 0).all()
    assert (layer.backward(x).dx == 0).all()


@pytest.mark.parametrize("own", [False, True])
def test_a_batch_of_nothing(own):
    layer = layer_of(transforms=BENDS, transform_batch_statistics=own)
    before = state_of(layer)
    assert layer(np.empty((0, 5, 3), "float32"), training=True).shape == (0, 5, 3)
    y = layer(batch(), training=True, weights=np.zeros((4, 5)))
    np.testing.assert_allclose(y, np.broadcast_to(BENDS["offset"](layer.offset), y.shape))
    assert state_of(layer) == before


def test_observers_see_training_once_whatever_is_active():
    limits = {"limits": "moving", "decay": 0.5}
    for own in (False, True):
        quantizers = {name: FakeQuantize(8, **limits) for name in NAMES}
        layer = layer_of(
            transforms=quantizers, transforms_active=False, transform_batch_statistics=own
        )
        x = batch()
        layer(x, training=True)
        layer(x, training=False)
        assert {quantize.steps for quantize in quantizers.values()} == {1}
        layer(x, training=True, transforms_active=True)
        assert {quantize.steps for quantize in quantizers.values()} == {2}
        assert quantizers["scale"].high == layer.scale.max()
        layer.freeze()
        layer(x, training=True)
        assert {quantize.steps for quantize in quantizers.values()} == {2}


def test_a_call_that_fails_leaves_the_observers_alone():
    layer = layer_of(transforms={"scale": FakeQuantize(8, limits="moving")})
    before = state_of(layer)
    with pytest.raises(ValueError, match="residual"):
        layer(batch(), training=True, residual=batch((1, 2, 3)))
    assert state_of(layer) == before


def test_effective_variables_are_what_normalizes():
    layer = layer_of(transforms=BENDS)
    x = batch()
    of = layer.effective_variables()
    z = (x - of["mean"]) / np.sqrt(of["variance"] + of["epsilon"]) * of["scale"] + of["offset"]
    np.testing.assert_allclose(layer(x, training=False), z, rtol=1e-5, atol=1e-5)
    layer.transforms_active = False
    np.testing.assert_array_equal(layer.effective_variables()["scale"], layer.scale)
    assert BatchNorm(2, scale=False, center=False).effective_variables()["scale"] is None


def test_saved_with_the_observers(tmp_path):
    quantizers = {
        "scale": FakeQuantize(4, limits="moving", decay=0.5),
        "moving_mean": FakeQuantize(8, limits=(-3.0, 3.0)),
        "offset": FakeQuantize(6, limits="moving", delay=100),
    }
    layer = layer_of(
        transforms=quantizers, transform_batch_statistics=True, transforms_active=np.array(True)
    )
    fusebn.save(tmp_path / "new.safetensors", {"bn": layer})
    assert fusebn.load(tmp_path / "new.safetensors")["bn"].transforms["scale"].low is None
    layer(batch(), training=True)
    fusebn.save(tmp_path / "bn.safetensors", {"bn": layer, "bn2": layer_of()})
    loaded = fusebn.load(tmp_path / "bn.safetensors")["bn"]
    assert loaded.transform_batch_statistics is True
    x = batch(seed=7)
    for training in (False, True):
        np.testing.assert_array_equal(loaded(x, training=training), layer(x, training=training))
    assert state_of(loaded) == state_of(layer)
    assert "FakeQuantize(4, limits='moving', decay=0.5)" in repr(loaded)


def test_another_function_cannot_be_written_down(tmp_path):
    layer = layer_of(transforms={"scale": np.negative})
    with pytest.raises(TypeError, match=r"transforms\['scale'\]` must be a FakeQuantize"):
        fusebn.save(tmp_path / "bn.safetensors", {"bn": layer})
    assert not list(tmp_path.iterdir())
    assert "negative" in repr(layer)


def test_a_state_for_other_transforms_changes_nothing():
    layer = layer_of(
        transforms={name: FakeQuantize(8, limits="moving") for name in ("scale", "offset")}
    )
    layer(batch(), training=True)
    before, state = state_of(layer), layer.state_dict()
    for key, value in (
        ("transforms.moving_mean.steps", np.array(3)),
        ("transforms.offset.steps", np.array(-1)),
        ("transforms.scale.other", np.array(3)),
    ):
        with pytest.raises(ValueError, match="load_state_dict"):
            layer.load_state_dict(state | {"transforms.scale.steps": np.array(9), key: value})
        assert state_of(layer) == before


@pytest.mark.parametrize(
    ("transforms", "kind", "text"),
    [
        (3, TypeError, "`transforms` must be a mapping"),
        ({"gamma": np.negative}, ValueError, "name scale, offset, moving_mean, moving_variance"),
        ({"running_var": np.negative}, ValueError, "Here that is 'moving_variance'"),
        ({"scale": FakeQuantize}, TypeError, "got the class FakeQuantize. Make one: FakeQuantize("),
        ({"scale": 3}, TypeError, "`transforms['scale']` must be a function"),
    ],
)
def test_errors_of_the_constructor(transforms, kind, text):
    with pytest.raises(kind) as caught:
        BatchNorm(3, transforms=transforms)
    assert text in str(caught.value)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_errors_of_what_they_return_name_the_variable(name, own):
    observed = "offset" if name == "scale" else "scale"
    for wrong, text in (
        (lambda v: v[:2], "must return the shape (3,) that it was given; got shape (2,)"),
        (lambda v: v[0], "must return the shape (3,) that it was given; got shape ()"),
        (lambda v: None, "must return the shape (3,) that it was given; got NoneType"),
        (lambda v: v * np.nan, "must return no NaN for what has none"),
    ):
        layer = layer_of(
            transforms={name: wrong, observed: FakeQuantize(limits="moving")},
            transform_batch_statistics=own,
        )
        before = state_of(layer)
        training = own or name in ("scale", "offset")
        with pytest.raises((ValueError, TypeError), match="BatchNorm") as caught:
            layer(batch(), training=training)
        assert f"`transforms['{name}']`" in str(caught.value)
        assert text in str(caught.value)
        assert state_of(layer) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("own", [False, True])
def test_a_channel_that_is_not_finite_is_lost_alone(bad, own):
    layer = layer_of(
        transforms=dict.fromkeys(NAMES, FakeQuantize(8)),
        transform_batch_statistics=own,
        nonfinite="skip",
    )
    x = batch()
    wanted = layer(x, training=True)
    x[1, 2, 1] = bad
    y = layer(x, training=True)
    assert np.isnan(y[..., 1]).any()
    if not own:  # else the limits are those of two channels, not of three
        np.testing.assert_array_equal(y[..., [0, 2]], wanted[..., [0, 2]])
    assert np.isfinite(y[..., [0, 2]]).all()
    assert np.isfinite(layer(batch(), training=False)).all()


def test_what_was_nan_before_may_stay_so():
    layer = layer_of(transforms={"moving_mean": np.negative})
    layer.moving_mean[1] = np.nan
    y = layer(batch(), training=False)
    assert np.isnan(y[..., 1]).all()
    assert np.isfinite(y[..., [0, 2]]).all()
