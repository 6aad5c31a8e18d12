"""The demo with PyTorch: a residual network as it is, and after `fusebn.torch.fuse`."""

from __future__ import annotations

from pathlib import Path

import torch

from fusebn.cli.demo.findings import inference_leaves_no_trace
from fusebn.cli.demo.images import EPOCHS, RESIDUAL
from fusebn.cli.demo.quantized import quantization
from fusebn.cli.demo.torch.findings import (
    before_and_after,
    folded,
    frozen,
    loaded_without_fusebn,
)
from fusebn.cli.demo.torch.network import Network
from fusebn.cli.demo.torch.quantized import Quantizable
from fusebn.cli.demo.watch import Course, Study, watch

__all__ = ["EPOCHS", "FRAMEWORK", "MODEL", "NETWORK", "study"]

FRAMEWORK = f"PyTorch {torch.__version__}"
NETWORK = RESIDUAL
MODEL = ".pt"


def study(course: Course, model: Path) -> Study:
    """Train, save the model, and show what there is to see."""
    training, held_out, epochs, seed, _ = course
    # The tensors are small: threads would gain nothing, and wait long on a busy machine.
    torch.set_num_threads(1)
    plain, fused = Network(seed), Network(seed, fused=True)
    before = watch("as it is", plain, plain.train(training, epochs, seed), course)
    after = watch("fused", fused, fused.train(training, epochs, seed), course)
    exact = Network(seed, dtype=torch.float64).train(training, epochs, seed)
    return Study(
        fused,
        after,
        [
            before_and_after((plain, before), (fused, after), exact, training),
            folded(fused),
            inference_leaves_no_trace(
                fused, fused.logits, held_out, "The buffers and parameters of each batch norm."
            ),
            frozen(training),
            loaded_without_fusebn(fused, held_out, model),
        ],
        quantization(
            fused.first(),
            lambda: Quantizable(fused),
            course,
            "transforms_active is a tensor that all modules read at each call.",
            "fusebn.torch.fold folds a whole model; what else its batch norms did stays.",
        ),
    )
