"""The C++ core: see csrc/bindings/python.cpp.

Arrays are dense and checked, or the address of what is; None is null. `lent`: on the threads that
were lent, not on our own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_In = NDArray[np.generic] | int | None
_Out = NDArray[np.generic] | int | None

def moments(
    type: int,
    outer: int,
    channels: int,
    inner: int,
    x: _In,
    weights: _In,
    mean: _Out,
    m2: _Out,
    lent: bool = ...,
) -> float: ...
def forward(
    type: int,
    outer: int,
    channels: int,
    inner: int,
    x: _In,
    training: bool,
    mean: _In,
    variance: _In,
    weights: _In,
    scale: _In,
    offset: _In,
    residual: _In,
    activation: int,
    epsilon: float,
    correction: float,
    factor: float,
    y: _Out,
    mean_out: _Out,
    variance_out: _Out,
    batch: _Out,
    lent: bool = ...,
) -> float: ...
def forward_of_tensors(
    exchange_api: object,
    x: object,
    y: object,
    axis: int,
    training: bool,
    mean: object,
    variance: object,
    scale: object,
    offset: object,
    residual: object,
    activation: int,
    epsilon: float,
    correction: float,
    factor: float,
    batch: _Out,
) -> float | None: ...
def know_numpy(
    ndarray: type,
    dtypes: tuple[np.dtype[Any], ...],
    formats: Mapping[str, tuple[int, int]],
    activations: tuple[str | None, ...],
    forward_result: type,
    gradient_result: type,
    least_recycled: int,
    probe: object,
    address: int,
) -> bool: ...

# None: something is unusual, and nothing has been done.
def forward_of_arrays(
    x: object,
    scale: object,
    offset: object,
    mean: object,
    variance: object,
    epsilon: object,
    data_format: object,
    training: object,
    factor: object,
    axis: object,
    activation: object,
    residual: object,
    weights: object,
    correction: object,
    out: object,
    of_layer: bool,
) -> Any: ...
def gradient_of_arrays(
    dy: object,
    x: object,
    scale: object,
    offset: object,
    mean: object,
    variance: object,
    epsilon: object,
    data_format: object,
    training: object,
    axis: object,
    activation: object,
    residual: object,
    weights: object,
    dmean: object,
    dvariance: object,
) -> Any: ...
def gradient(
    type: int,
    outer: int,
    channels: int,
    inner: int,
    dy: _In,
    x: _In,
    training: bool,
    mean: _In,
    variance: _In,
    weights: _In,
    scale: _In,
    offset: _In,
    residual: _In,
    activation: int,
    epsilon: float,
    dmean: _In,
    dvariance: _In,
    correction: float,
    factor: float,
    dx: _Out,
    dresidual: _Out,
    dscale: _Out,
    doffset: _Out,
    dgiven_mean: _Out,
    dgiven_variance: _Out,
    lent: bool = ...,
) -> None: ...
def normalize(
    type: int,
    outer: int,
    channels: int,
    inner: int,
    x: _In,
    mean: _In,
    rstd: _In,
    scale: _In,
    offset: _In,
    residual: _In,
    activation: int,
    y: _Out,
    lent: bool = ...,
) -> None: ...
def backward_sums(
    type: int,
    outer: int,
    channels: int,
    inner: int,
    dy: _In,
    x: _In,
    mean: _In,
    rstd: _In,
    scale: _In,
    offset: _In,
    residual: _In,
    activation: int,
    sum_g: _Out,
    sum_g_x: _Out,
    lent: bool = ...,
) -> None: ...
def backward(
    type: int,
    outer: int,
    channels: int,
    inner: int,
    dy: _In,
    x: _In,
    mean: _In,
    rstd: _In,
    weights: _In,
    scale: _In,
    offset: _In,
    residual: _In,
    activation: int,
    count: float,
    sum_g: _In,
    sum_g_x: _In,
    dmean: _In,
    dvariance: _In,
    dx: _Out,
    dresidual: _Out,
    lent: bool = ...,
) -> None: ...
def floor(kind: int, a: _In, b: _In, out: _Out, n: int, ahead: int) -> None: ...
def streaming_bytes() -> int: ...
def set_streaming_bytes(bytes: int) -> None: ...
def empty(bytes: int) -> NDArray[np.uint8]: ...
def pool_statistics() -> dict[str, int]: ...
def pool_limit() -> int: ...
def set_pool_limit(bytes: int) -> None: ...
def empty_pool() -> None: ...
def lend_threads(parallel: int) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> bool: ...
