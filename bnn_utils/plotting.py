"""The pictures, each drawn from a table alone, so that anyone can draw another one from the CSV beside it."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnn_utils.campaign import aggregate

# The same colour for the same thing in every notebook (Okabe and Ito's colour-blind safe palette).
COLORS = {
    "vgg_cifar10_binary": "#0072B2",
    "resnet_binary": "#E69F00",
    "without shortcuts": "#009E73",
    "none": "#0072B2",
    "clip": "#D55E00",
    "train": "#56B4E9",
    "validation": "#000000",
    "published": "#CC79A7",
}
LABELS = {
    "vgg_cifar10_binary": "VGG",
    "resnet_binary": "ResNet",
    "none": "damaged",
    "clip": "damaged, then clipped",
}


def label(name: str) -> str:
    """Return the words a legend uses for a name that tables use."""
    return LABELS.get(name, name)


def color(name: str, index: int = 0) -> str:
    """Return the colour of a thing by its name in the tables; `index` picks one for a name without its own."""
    return COLORS.get(name, f"C{index}")


def training_curves(history: pd.DataFrame) -> Figure:
    """Draw loss and accuracy per epoch, while training and on the validation part.

    Args:
        history: what `training.train` returns; with a column `network`, one pair of lines a network.
    """
    figure, axes = plt.subplots(1, 2)
    groups = history.groupby("network", sort=False) if "network" in history else [("", history)]
    for index, (name, group) in enumerate(groups):
        for part, style in (("train", "--"), ("validation", "-")):
            drawn = color(name, index) if name else color(part)
            text = f"{label(name)}, {part}" if name else part
            axes[0].plot(group["epoch"], group[f"{part}_loss"], style, color=drawn, label=text)
            axes[1].plot(group["epoch"], 100 * group[f"{part}_accuracy"], style, color=drawn, label=text)
    axes[0].set(xlabel="epoch", ylabel="cross-entropy loss (nats)")
    axes[1].set(xlabel="epoch", ylabel="accuracy (%)")
    axes[1].legend()
    return figure


def sign_flips(history: pd.DataFrame) -> Figure:
    """Draw the share of binarized weights whose sign changed in each epoch.

    Args:
        history: as for `training_curves`.
    """
    figure, axis = plt.subplots(figsize=(5.0, 3.0))
    groups = history.groupby("network", sort=False) if "network" in history else [("", history)]
    for index, (name, group) in enumerate(groups):
        axis.plot(group["epoch"], 100 * group["sign_flips"], "o-", color=color(name, index), label=label(name))
    axis.set(xlabel="epoch", ylabel="weights that changed sign (%)", yscale="log")
    if "network" in history:
        axis.legend()
    return figure


def confusion(table: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix with its counts.

    Args:
        table: columns true, predicted (class numbers) and images (how many).
        classes: names, index by class number.
    """
    counts = np.zeros((len(classes), len(classes)), int)
    counts[table["true"], table["predicted"]] = table["images"]
    figure, axis = plt.subplots(figsize=(4.8, 4.4))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = shares[row, column] < 0.5
        axis.text(column, row, counts[row, column], ha="center", va="center", color="w" if dark else "k", fontsize=8)
    turned = 90 if max(map(len, classes)) > 2 else 0
    axis.set_xticks(range(len(classes)), classes, rotation=turned)
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted", ylabel="true")
    axis.grid(False)
    return figure


def damage_curves(table: pd.DataFrame, value: str = "accuracy", clean: pd.DataFrame | None = None) -> Figure:
    """Draw a campaign: a panel a network, the mean over trials against bit error probability, a line a repair.

    Bands are 95% intervals of the mean, faint dots single trials. Losses, which may be infinite, get a logarithmic
    axis and the median instead of the mean, with the quartiles as band.

    Args:
        table: what `campaign.run` returns, of one or more networks.
        value: "accuracy" or "loss".
        clean: columns network and `value`, of the undamaged networks, drawn as a dotted line.
    """
    networks = list(table["network"].unique())
    figure, axes = plt.subplots(1, len(networks), figsize=(3.6 * len(networks) + 0.4, 3.4), sharey=True, squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        own = table[table["network"] == network]
        for repair in own["repair"].unique():
            _damage_line(axis, own[own["repair"] == repair], value, repair)
        if clean is not None:
            level = clean.loc[clean["network"] == network, value].item()
            axis.axhline(100 * level if value == "accuracy" else level, color="0.4", ls=":", lw=1.2, label="undamaged")
        axis.set(
            xscale="log",
            xlabel="bit error probability $p$",
            title=f"{label(network)}, {own['dataset'].iloc[0]}",
        )
    if value == "accuracy":
        axes[0, 0].set(ylabel="accuracy (%)", ylim=(0, 100))
    else:
        axes[0, 0].set(ylabel="cross-entropy loss (nats)", yscale="log")
    axes[0, 0].legend(loc="lower left" if value == "accuracy" else "upper left", fontsize=9)
    return figure


def _damage_line(axis: Axes, table: pd.DataFrame, value: str, repair: str) -> None:
    drawn = color(repair)
    finite = table[np.isfinite(table[value])]
    spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(finite))  # side by side, so that dots can be told apart
    scale = 100 if value == "accuracy" else 1
    axis.plot(finite["probability"] * 10**spread, scale * finite[value], ".", color=drawn, alpha=0.2, ms=4, mew=0)
    if value == "accuracy":
        means = aggregate(table)
        middle, low, high = (
            means[value],
            means[value] - means[f"{value}_half"],
            means[value] + means[f"{value}_half"],
        )
        p = means["probability"]
    else:
        quartiles = table.groupby("probability")[value].quantile([0.25, 0.5, 0.75]).unstack()
        low, middle, high = quartiles[0.25], quartiles[0.5], quartiles[0.75]
        p = quartiles.index
    axis.fill_between(p, scale * low, scale * high, color=drawn, alpha=0.2, lw=0)
    axis.plot(p, scale * middle, "o-", color=drawn, label=label(repair), ms=4)
