"""What PyTorch's users gain: the same training in less time, and fewer surprises."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fusebn.torch as fbt
from fusebn.cli.demo import findings
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.findings import Finding, folded_into
from fusebn.cli.demo.side_by_side import LARGE, side_by_side
from fusebn.cli.demo.torch.network import Network, tensor_of
from fusebn.cli.demo.watch import History


def before_and_after(
    plain: tuple[Network, History],
    fused: tuple[Network, History],
    exact: Iterator[float],
    training: Digits,
) -> Finding:
    """Compare the network with the same one after `fuse`: what it learned, and what it cost."""
    images = tensor_of(training.images[:LARGE])
    labels = torch.from_numpy(training.labels[:LARGE])
    trained = {"as it is": plain, "after fuse": fused}
    return side_by_side(
        "Before and after fusebn.torch.fuse",
        "The same model, seed and batches, without and with one line: model = fuse(model). One "
        "thread.",
        {name: history for name, (_, history) in trained.items()},
        {
            name: partial(deepcopy(network).step, images, labels)
            for name, (network, _) in trained.items()
        },
        exact,
    )


def folded(network: Network) -> Finding:
    """Show what became one call with each batch norm."""
    report = fbt.explain(network.model)
    return Finding(
        "One call for each batch norm and what surrounds it",
        "fuse traces the model and folds the ReLU that follows, and the addition between them, "
        "into the batch norm: one pass over memory instead of three. explain says what was "
        "folded, and what was not, and why.",
        ("batch norm", "folded into it"),
        [(row.name, folded_into(row.residual, row.activation)) for row in report],
    )


def frozen(digits: Digits) -> Finding:
    """Show that `freeze` survives train(), which eval() does not."""
    images = tensor_of(digits.images[:LARGE])

    def changed(stop: str) -> str:
        """Return how many bytes of the statistics a step of fine-tuning changes."""
        torch.manual_seed(0)
        ours = stop == "freeze()"
        module: nn.BatchNorm2d = (fbt.BatchNorm2d if ours else nn.BatchNorm2d)(1)
        before = [value.clone() for value in module.buffers()]
        getattr(module, stop.removesuffix("()"))()
        nn.Sequential(module).train()(images)
        pairs = zip(before, module.buffers(), strict=True)
        return str(sum(int((old != new).sum()) * old.element_size() for old, new in pairs))

    return Finding(
        "Frozen stays frozen",
        "Whoever fine-tunes wants the statistics to stay. The parent's train(), at the start of "
        "each epoch, undoes eval(); it does not undo freeze().",
        ("before train()", "module", "bytes of the statistics changed"),
        [
            ("eval()", "torch.nn.BatchNorm2d", changed("eval()")),
            ("freeze()", "fusebn.torch.BatchNorm2d", changed("freeze()")),
        ],
    )


def loaded_without_fusebn(network: Network, digits: Digits, model: Path) -> Finding:
    """Save the state_dict of the fused network, and load it into PyTorch's own modules."""
    torch.save(network.model.state_dict(), model)
    plain = Network(seed=0)
    plain.model.load_state_dict(torch.load(model, weights_only=True))
    return findings.reloaded(
        "Saved, and loaded by who has no fusebn",
        "The keys of the state_dict are PyTorch's: the model as it was before fuse loads them, "
        "strictly, and predicts the same to rounding.",
        {"bytes in the file": f"{model.stat().st_size:,}"},
        network.logits(digits.images),
        plain.logits(digits.images),
    )
