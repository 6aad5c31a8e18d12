"""Two processes of ``torch.distributed`` against one: with a mask, and parts of uneven size.

Started with a folder alone it starts both; with a rank as well it is one of them.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

SHAPE, FIRST = (8, 5, 3), 3  # the first process has 3 of 8 examples


def step(layer: Any, x: Any, dy: Any, mask: Any) -> Any:
    x = torch.tensor(x).requires_grad_()
    y = layer(x, training=True, mask=mask)
    parameters = [variable.value for variable in layer.trainable_variables]
    return y.detach(), *torch.autograd.grad((y * torch.tensor(dy)).sum(), [x, *parameters])


def main(rank: int) -> None:
    from fusebn.keras import BatchNormalization

    rng = np.random.default_rng(0)
    x = rng.normal(100, 2, SHAPE).astype("float32")
    dy = rng.normal(size=SHAPE).astype("float32")
    of_one = np.zeros(SHAPE[:2], "bool")
    of_one[FIRST:] = rng.random((SHAPE[0] - FIRST, SHAPE[1])) < 0.5
    part = slice(0, FIRST) if rank == 0 else slice(FIRST, None)
    for options in ({}, {"renorm": True}, {"activation": "relu", "correction": 1}):
        for mask in (None, rng.random(SHAPE[:2]) < 0.4, of_one):
            layer, one = (
                BatchNormalization(synchronized=True, **options),
                BatchNormalization(**options),
            )
            for built in (layer, one):
                built.build(SHAPE)
            found = step(layer, x[part], dy[part], None if mask is None else mask[part])
            wanted = step(one, x, dy, mask)
            for i, (mine, other) in enumerate(zip(found, wanted, strict=True)):
                if i < 2:  # y and dx; the gradients of parameters are those of the part
                    other = other[part]
                else:
                    dist.all_reduce(mine)
                np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-3, atol=1e-3)
            for mine, other in zip(layer.weights, one.weights, strict=True):
                np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-5)


if len(sys.argv) == 2:
    both = [subprocess.Popen([sys.executable, *sys.argv, str(rank)]) for rank in range(2)]
    codes = [process.wait() for process in both]
    assert codes == [0, 0]
    print("same as one")
else:
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}/meeting", rank=int(sys.argv[2]), world_size=2
    )
    main(int(sys.argv[2]))
    dist.destroy_process_group()
