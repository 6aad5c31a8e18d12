"""What TensorFlow's users came for: a flag that is a tensor, UPDATE_OPS, checkpoints."""

from __future__ import annotations

from pathlib import Path

from fusebn.cli.demo import findings
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.findings import Finding, percent
from fusebn.cli.demo.network import WIDTHS, accuracy
from fusebn.cli.demo.tensorflow.network import Network

# What a cond is made of, in graphs old and new.
_COND = ("Switch", "RefSwitch", "Merge", "RefMerge", "If", "StatelessIf", "Case", "StatelessCase")


def one_op_a_layer(network: Network) -> Finding:
    """Count the ops of the graph that trains and infers."""
    ops, depth = network.ops(), len(WIDTHS) - 2
    counted = {
        "batch norm": ops["FusebnBatchNorm"],
        "gradient of batch norm": ops["FusebnBatchNormGrad"],
        "batch norm of TensorFlow": ops["FusedBatchNormV3"],
        "cond: " + ", ".join(_COND[::2]): sum(ops[kind] for kind in _COND),
    }
    return Finding(
        "A training flag that is a tensor",
        f"is_training is a placeholder, read by the op when it runs: one graph of "
        f"{sum(ops.values())} ops trains and infers, with one batch norm for each of the {depth} "
        f"layers.",
        ("ops in the graph", "number"),
        [(kind, str(number)) for kind, number in counted.items()],
    )


def forgotten_updates(
    network: Network, forgetful: Network, in_place: Network, training: Digits, held_out: Digits
) -> Finding:
    """Show what a network loses that never ran UPDATE_OPS, the cure, and how not to forget."""
    right, wrong = accuracy(network, *held_out), accuracy(forgetful, *held_out)
    in_training = accuracy(forgetful, *held_out, training=True)
    forgetful.recalibrate(training)
    cured, spared = accuracy(forgetful, *held_out), accuracy(in_place, *held_out)
    return Finding(
        "Forgotten UPDATE_OPS",
        f"The same training from the same seed. Who does not run UPDATE_OPS keeps moving averages "
        f"of 0 and 1: measured as it trains, the network looks healthy; in inference mode it loses "
        f"{100 * (right - wrong):.1f} points. One pass of UPDATE_OPS alone over the training "
        f"images repairs it. With updates_collections=None, in place, there is nothing to run.",
        ("UPDATE_OPS", "mode", "accuracy"),
        [
            ("run at every step", "inference", percent(right)),
            ("forgotten", "training", percent(in_training)),
            ("forgotten", "inference", percent(wrong)),
            ("forgotten, then one pass", "inference", percent(cured)),
            ("none: updated in place", "inference", percent(spared)),
        ],
    )


def restored(network: Network, fresh: Network, digits: Digits, model: Path) -> Finding:
    """Save a checkpoint, restore it into a fresh graph, and compare the predictions."""
    network.save(model)
    fresh.restore(model)
    files = list(model.parent.glob(f"{model.name}.*"))
    return findings.reloaded(
        "Saved, and restored into a fresh graph",
        f"tf.compat.v1.train.Saver writes the variables under the names that tf.contrib.layers "
        f"gave them ({', '.join(name for name in network.state() if 'hidden0' in name)}).",
        {"bytes in the files": f"{sum(file.stat().st_size for file in files):,}"},
        network.logits(digits.images),
        fresh.logits(digits.images),
    )
