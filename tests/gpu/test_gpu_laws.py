"""What holds on a GPU whatever the numbers are: the same bits, streams, graphs, no waiting."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_batches import Batch, Step, assert_same_bits, batch_of, channels_last, step

import fusebn.torch as fbt

# Of both kinds: one launch for all, and two.
SHAPES = [(4096, 64), (64, 512, 14, 14), (700, 30), (16, 48, 30, 30)]


@pytest.fixture(params=["1", "0"], ids=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", request.param)


def batches(dtype: torch.dtype = torch.bfloat16) -> list[Batch]:
    return [
        batch_of(
            shape,
            dtype,
            channels_last if len(shape) == 4 else torch.contiguous_format,
            residual=True,
            seed=seed,
        )
        for seed, shape in enumerate(SHAPES)
    ]


@pytest.mark.usefixtures("launches")
def test_the_same_bits_every_time() -> None:
    for batch in batches():
        expected = step(batch)
        for _ in range(20):
            assert_same_bits(step(batch), expected)


@pytest.mark.usefixtures("launches")
def test_two_streams_at_once_have_the_bits_of_one() -> None:
    given = batches()
    expected = [step(batch) for batch in given]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        found: list[Step] = []
        for i, batch in enumerate(given):
            with torch.cuda.stream(streams[i % 2]):
                found.append(step(batch))
        torch.cuda.synchronize()
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


def test_one_launch_and_two_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in batches(torch.float32):
        found = []
        for asked in ("1", "0"):
            monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", asked)
            found.append(step(batch))
        for name, one, other in zip(Step._fields, *found, strict=True):
            # Sums of up to 12544 terms, joined in another order.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.usefixtures("launches")
def test_nothing_waits_for_the_device() -> None:
    given = batches()
    for batch in given:  # what is compiled and found out once
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in given:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("launches")
def test_a_captured_step_advances_once_for_each_replay() -> None:
    layer = fbt.BatchNorm2d(64, activation="relu")
    twin = copy.deepcopy(layer)
    given = [batch_of((16, 64, 14, 14), order=channels_last, seed=seed) for seed in range(4)]
    x, dy = given[0].x.clone().requires_grad_(), given[0].dy

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x).backward(dy)
    torch.cuda.current_stream().wait_stream(side)
    layer.load_state_dict(twin.state_dict())
    layer.zero_grad()
    x.grad = None

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(dy)
    for batch in given[1:]:
        with torch.no_grad():
            x.copy_(batch.x)
        graph.replay()
        other = batch.x.clone().requires_grad_()
        twin.zero_grad()
        expected = twin(other)
        expected.backward(dy)
        assert torch.equal(y, expected)
        assert torch.equal(x.grad, other.grad)
        for mine, of_twin in zip(layer.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, of_twin.grad)
        for mine, of_twin in zip(layer.buffers(), twin.buffers(), strict=True):
            assert torch.equal(mine, of_twin)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The layer takes what the convolution gives, with parameters and statistics of float32."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), fbt.BatchNorm2d(64)).cuda()
    alone = copy.deepcopy(network[1])
    x = torch.randn(8, 3, 16, 16)
    with torch.autocast("cuda", dtype):
        between = network[0](x)
        y = network(x)
    assert y.dtype is between.dtype is dtype
    assert torch.equal(y, alone(between))
    assert torch.equal(network[1].running_var, alone.running_var)
    y.float().square().sum().backward()
    assert network[1].weight.grad.dtype is torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_compiled_into_one_graph(training: bool) -> None:
    torch._dynamo.reset()
    layer = fbt.BatchNorm2d(64, activation="relu").train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(lambda x: layer(x * 2) + 1, fullgraph=True)
    for batch in (batch_of((n, 64, 9, 9), torch.float32) for n in (4, 6, 5)):
        one, other = (batch.x.clone().requires_grad_() for _ in range(2))
        y, expected = compiled(one), twin(other * 2) + 1
        for of in (y, expected):
            of.backward(batch.dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(layer.running_var, twin.running_var)
    torch._dynamo.reset()


def test_by_fuse() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU()
    ).cuda()
    twin = fbt.fuse(copy.deepcopy(network))
    x = torch.randn(8, 3, 16, 16)
    for _ in range(2):
        torch.testing.assert_close(twin(x), network(x), rtol=1e-4, atol=1e-4)
    for mine, other in zip(twin.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_another_device_than_the_current_one() -> None:
    for batch in batches():
        expected = step(batch)
        elsewhere = Batch(*(None if v is None else v.to("cuda:1") for v in batch))
        assert torch.cuda.current_device() == 0
        found = step(elsewhere)
        back = Step(*(None if v is None else v.to("cuda:0") for v in found))
        assert_same_bits(back, expected)
