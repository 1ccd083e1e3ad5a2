"""The pictures, each drawn from a table alone, so that anyone can draw another one from the CSV beside it."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnn_utils.campaign import aggregate, intervals, median_interval

# The same colour for the same thing in every notebook (Okabe and Ito's colour-blind safe palette).
COLORS = {
    "vgg_cifar10_binary": "#0072B2",
    "resnet_binary": "#E69F00",
    "resnet_bireal": "#009E73",
    "without shortcuts": "#009E73",
    "branch normalized": "#882255",
    "normalized, no shortcuts": "#56B4E9",
    "none": "#0072B2",
    "clip": "#D55E00",
    "train": "#56B4E9",
    "validation": "#000000",
    "published": "#CC79A7",
    "range": "#009E73",
    "secded-floats": "#CC79A7",
    "secded": "#882255",
    "vote-floats": "#E69F00",
    "vote-range": "#332288",
    "vote5-range": "#000000",
    "vote5-few-range": "#999933",
    "vote7-small-range": "#AA4499",
    "vote": "#56B4E9",
}
LARGEST_LOSS = 1e39  # beyond any 32-bit float
LABELS = {
    "vgg_cifar10_binary": "VGG",
    "resnet_binary": "ResNet",
    "resnet_bireal": "Bi-Real ResNet",
    "none": "damaged",
    "clip": "damaged, then clipped",
    "range": "range check",
    "secded-floats": "SECDED, all but weights",
    "secded": "SECDED",
    "vote-floats": "vote of three, all but weights",
    "vote-range": "that vote, then range check",
    "vote5-range": "vote of five, then range check",
    "vote5-few-range": "that, smallest layers' weights too",
    "vote7-small-range": "vote of seven, small layers too, range check",
    "vote": "vote of three",
    "adam": "Adam",
    "sgd": "SGD, momentum 0.9",
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


def _panels(table: pd.DataFrame) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with one panel for each network of `table`, by its name, with a logarithmic probability axis."""
    networks = list(table["network"].unique())
    size = (3.6 * len(networks) + 0.4, 3.4)
    figure, axes = plt.subplots(1, len(networks), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        own = table[table["network"] == network]
        data = f", {own['dataset'].iloc[0]}" if "dataset" in own else ""
        axis.set(xscale="log", xlabel="bit error probability $p$", title=f"{label(network)}{data}")
    return figure, dict(zip(networks, axes[0], strict=True))


def damage_curves(table: pd.DataFrame, value: str = "accuracy", clean: pd.DataFrame | None = None) -> Figure:
    """Draw a campaign: a panel a network, the mean over trials against bit error probability, a line a repair.

    Bands are 95% intervals, faint dots single trials. Losses, which may be infinite, get a logarithmic axis and the
    median instead of the mean; infinity is drawn at LARGEST_LOSS.

    Args:
        table: what `campaign.run` returns, of one or more networks.
        value: "accuracy" or "loss".
        clean: columns network and `value`, of the undamaged networks, drawn as a dotted line.
    """
    figure, axes = _panels(table)
    for network, axis in axes.items():
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
    first = next(iter(axes.values()))
    if value == "accuracy":
        first.set(ylabel="accuracy (%)", ylim=(0, 100))
    else:
        first.set(ylabel="cross-entropy loss (nats)", yscale="log")
    if table["repair"].nunique() > 3:  # no corner holds them all
        handles, texts = first.get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside right center", fontsize=9)
    else:
        first.legend(loc="lower left" if value == "accuracy" else "upper left", fontsize=9)
    return figure


def _damage_line(axis: Axes, table: pd.DataFrame, value: str, repair: str) -> None:
    drawn = color(repair)
    finite = table[np.isfinite(table[value])]
    spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(finite))  # side by side, so that dots can be told apart
    scale = 100 if value == "accuracy" else 1
    axis.plot(finite["probability"] * 10**spread, scale * finite[value], ".", color=drawn, alpha=0.3, ms=5, mew=0)
    if value == "accuracy":
        means = aggregate(table)
        middle, low, high = (
            means[value],
            means[value] - means[f"{value}_half"],
            means[value] + means[f"{value}_half"],
        )
        p = means["probability"]
    else:
        medians = table.groupby("probability")[value].apply(median_interval)
        middle, low, high = (np.clip(numbers, None, LARGEST_LOSS) for numbers in zip(*medians, strict=True))
        p = medians.index
    axis.fill_between(p, scale * np.asarray(low), scale * np.asarray(high), color=drawn, alpha=0.2, lw=0)
    axis.plot(p, scale * np.asarray(middle), "o-", color=drawn, label=label(repair), ms=4)


def sign_and_gradient(table: pd.DataFrame) -> Figure:
    """Draw sign and hardtanh beside the slopes that finite differences and the straight-through estimator give.

    Args:
        table: columns x, sign, hardtanh, "slope of sign, h = ..." (any number), straight-through gradient; sorted by x.
    """
    figure, axes = plt.subplots(1, 2)
    axes[0].plot(table["x"], table["sign"], color="C0", drawstyle="steps-mid", label="sign: computed forward")
    axes[0].plot(table["x"], table["hardtanh"], color="C1", label="hardtanh: followed backward")
    axes[0].set(xlabel="$x$", ylabel="function value", ylim=(-1.25, 1.95))
    for shade, name in zip((0.35, 0.65, 1.0), [name for name in table if name.startswith("slope")]):
        axes[1].plot(table["x"], table[name], color="C0", alpha=shade, drawstyle="steps-mid", label=name)
    straight = table["straight-through gradient"]
    axes[1].plot(table["x"], straight, "--", color="C1", drawstyle="steps-mid", label="straight-through gradient")
    axes[1].set(xlabel="$x$", ylabel="slope", ylim=(-0.5, 15))
    for axis in axes:
        axis.legend(loc="upper left", fontsize=9)
    return figure


def latent_weights(table: pd.DataFrame) -> Figure:
    """Draw the paths of latent weights, a panel a learning rate, with a dot at every step that changed a sign.

    Args:
        table: columns lr, step, weight (a number from 0), value; sorted by step.
    """
    rates = list(table["lr"].unique())
    figure, axes = plt.subplots(1, len(rates), sharey=True, squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        count = 0
        for number, path in table[table["lr"] == rate].groupby("weight"):
            step, value = path["step"].to_numpy(), path["value"].to_numpy()
            drawn = f"C{number}" if number < 7 else "0.5"  # the palette has seven colours
            axis.plot(step, value, color=drawn, lw=1.2)
            flipped = np.flatnonzero((value[1:] >= 0) != (value[:-1] >= 0)) + 1
            axis.plot(step[flipped], value[flipped], "o", color=drawn, ms=3.5)
            count += len(flipped)
        axis.axhline(0, color="k", lw=0.8)
        axis.set(xlabel="step", title=f"learning rate {rate:g}, sign flips: {count}")
    axes[0, 0].set(ylabel="latent weight")
    return figure


def bit_squares(table: pd.DataFrame) -> Figure:
    """Draw small matrices of bits side by side, 1 light and 0 dark.

    Args:
        table: columns panel (its title), row, column, bit (0 or 1).
    """
    panels = list(table["panel"].unique())
    figure, axes = plt.subplots(1, len(panels), figsize=(2.3 * len(panels), 2.4), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        bits = table[table["panel"] == panel].pivot(index="row", columns="column", values="bit").to_numpy()
        axis.imshow(bits, vmin=0, vmax=1)
        for (row, column), bit in np.ndenumerate(bits):
            axis.text(column, row, int(bit), ha="center", va="center", color="k" if bit else "w", fontsize=12)
        axis.set(title=panel, xticks=[], yticks=[])
        axis.grid(False)
        axis.hlines(np.arange(1, len(bits)) - 0.5, -0.5, bits.shape[1] - 0.5, color="w")
        axis.vlines(np.arange(1, bits.shape[1]) - 0.5, -0.5, len(bits) - 0.5, color="w")
        axis.spines[:].set_visible(False)
    return figure


def float_flips(table: pd.DataFrame) -> Figure:
    """Draw the magnitude that a stored number takes when one of its 32 bits flips, a panel a number.

    Args:
        table: columns stored (the number), bit (0 to 31), part (sign, exponent, mantissa) and value (after the flip;
            one that is not finite is drawn as a cross at the upper edge).
    """
    stored = list(table["stored"].unique())
    figure, axes = plt.subplots(1, len(stored), figsize=(3.6 * len(stored), 3.2), sharey=True, squeeze=False)
    parts = {"mantissa": "#56B4E9", "exponent": "#D55E00", "sign": "#000000"}
    for axis, number in zip(axes[0], stored, strict=True):
        own = table[table["stored"] == number]
        for part, drawn in parts.items():
            bits = own[(own["part"] == part) & np.isfinite(own["value"])]
            axis.plot(bits["bit"], bits["value"].abs(), "o", color=drawn, label=part)
        endless = own[~np.isfinite(own["value"])]
        axis.plot(endless["bit"], np.full(len(endless), 1e39), "x", color=parts["exponent"], label="infinite or NaN")
        axis.axhline(abs(number), color="0.4", ls=":", lw=1.2)
        axis.set(xlabel="flipped bit (31 is the sign)", title=f"stored {number:g}", yscale="log")
    axes[0, 0].set_ylabel("magnitude read back")
    axes[0, 0].legend(loc="upper left", fontsize=9)
    return figure


def single_draws(table: pd.DataFrame, draws: int) -> Figure:
    """Draw the curves that `draws` experiments with one trial a point would have shown, over the mean of all trials.

    Args:
        table: what `campaign.run` returns, of one or more networks; only unrepaired trials are drawn.
        draws: how many trials are drawn as curves of their own.
    """
    table = table[table["repair"] == "none"]
    figure, axes = _panels(table)
    for network, axis in axes.items():
        own = table[table["network"] == network]
        for trial, curve in own[own["trial"] < draws].groupby("trial"):
            text = "one draw a point" if trial == 0 else None
            axis.plot(curve["probability"], 100 * curve["accuracy"], color="0.6", lw=1, label=text)
        means = aggregate(own)
        axis.errorbar(
            means["probability"],
            100 * means["accuracy"],
            100 * means["accuracy_half"],
            fmt="o-",
            color=color("none"),
            label=f"mean of {own['trial'].nunique()} trials",
        )
    first = next(iter(axes.values()))
    first.set(ylabel="accuracy (%)", ylim=(0, 100))
    first.legend(loc="lower left", fontsize=9)
    return figure


def against_published(table: pd.DataFrame) -> Figure:
    """Draw accuracy over undamaged accuracy against bit error probability, published and ours, a panel a network.

    Args:
        table: columns network, repair, probability, source ("published" or "ours"), rate and half (half-width of its
            95% interval; NaN where there is none).
    """
    figure, axes = _panels(table)
    for network, axis in axes.items():
        for (source, repair), rows in table[table["network"] == network].groupby(["source", "repair"], sort=False):
            published = source == "published"
            axis.errorbar(
                rows["probability"],
                rows["rate"],
                None if published else rows["half"],
                fmt="x:" if published else "o-",
                color=color(repair),
                label=f"{source}, {label(repair)}",
            )
    first = next(iter(axes.values()))
    first.set(ylabel="accuracy / undamaged accuracy", ylim=(0, 1.05))
    first.legend(loc="lower left", fontsize=8)
    return figure


def flip_map(table: pd.DataFrame) -> Figure:
    """Draw the share of weights that changed sign, a row a layer, a column an epoch, colours on a logarithmic scale.

    Args:
        table: columns layer (in order from the input), epoch, flipped (0..1).
    """
    shares = 100 * table.pivot(index="layer", columns="epoch", values="flipped").loc[list(table["layer"].unique())]
    figure, axis = plt.subplots(figsize=(7.0, 0.27 * len(shares) + 1.2))
    colors = plt.get_cmap("cividis").with_extremes(bad="white")
    norm = LogNorm(0.01, 30, clip=True)
    edges = (shares.columns[0] - 0.5, shares.columns[-1] + 0.5, len(shares) - 0.5, -0.5)
    drawn = axis.imshow(
        np.ma.masked_equal(shares, 0), norm=norm, cmap=colors, extent=edges, aspect="auto", interpolation="none"
    )
    axis.set_yticks(range(len(shares)), shares.index)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch (white: no sign changed)")
    axis.grid(False)
    bar = figure.colorbar(drawn, ax=axis, ticks=[0.01, 0.1, 1, 10], label="weights that changed sign (%)")
    bar.ax.set_yticklabels(["≤ 0.01", "0.1", "1", "10"])
    return figure


def weight_histograms(table: pd.DataFrame, columns: int = 3) -> Figure:
    """Draw the distribution of each layer's latent weights before and after training, a panel a layer.

    Args:
        table: columns layer, when (such as "initial" and "trained"), low and high (a bin's edges), share (of the
            layer's weights in that bin, 0..1).
        columns: panels side by side.
    """
    layers = list(table["layer"].unique())
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(7.0, 1.6 * rows + 0.6), squeeze=False)
    for axis, layer in zip(axes.flat, layers):
        own = table[table["layer"] == layer]
        for shade, (when, bins) in zip(("0.6", "C0"), own.groupby("when", sort=False)):
            edges = [*bins["low"], bins["high"].iloc[-1]]
            axis.stairs(100 * bins["share"], edges, color=shade, fill=shade != "C0", lw=1.5, label=when)
        axis.set_title(layer, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    figure.supxlabel("latent weight", fontsize=10)
    figure.supylabel("share of the layer's weights (%)", fontsize=10)
    return figure


def pictures(table: pd.DataFrame, columns: int = 8) -> Figure:
    """Draw pictures in a grid, each under its title.

    Args:
        table: columns picture (a number), title, channel, row, column, value (0..255); one row a pixel and channel.
        columns: pictures side by side.
    """
    shown = list(table.groupby("picture", sort=False))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(7.0, 1.15 * rows + 0.1), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (_, pixels) in zip(axes.flat, shown):
        values = pixels.sort_values(["row", "column", "channel"])["value"].to_numpy()
        image = values.reshape(pixels["row"].max() + 1, pixels["column"].max() + 1, -1) / 255
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(pixels["title"].iloc[0], fontsize=8)
    return figure


def diagram(table: pd.DataFrame) -> Figure:
    """Draw boxes joined by arrows, coloured by what they put out: real numbers, +1 and -1, or whole numbers.

    Args:
        table: columns name, x, y (a box's centre), text, values ("real", "sign" or "whole"), after (names of the boxes
            that lead to it, separated by blanks).
    """
    figure, axis = plt.subplots(figsize=(7.0, 2.1))
    shades = {"real": "#F5D58A", "sign": "#9CCBEA", "whole": "0.88"}
    words = {"real": "real numbers", "sign": "+1 and −1", "whole": "whole numbers"}
    boxes, drawn = table.set_index("name"), {}
    axis.set(
        xlim=(boxes["x"].min() - 0.5, boxes["x"].max() + 0.6), ylim=(boxes["y"].min() - 0.9, boxes["y"].max() + 0.4)
    )
    for name, box in boxes.iterrows():
        style = dict(boxstyle="round,pad=0.35", facecolor=shades[box["values"]], edgecolor="0.3")
        drawn[name] = axis.text(box["x"], box["y"], box["text"], ha="center", va="center", fontsize=9, bbox=style)
    figure.canvas.draw()  # the arrows end at the boxes' edges, which are known only now
    for name, box in boxes.iterrows():
        for before in box["after"].split():
            start, end = (boxes.loc[before, "x"], boxes.loc[before, "y"]), (box["x"], box["y"])
            bend = "arc3" if start[1] == end[1] else "angle,angleA=0,angleB=90,rad=5"
            if start[1] < end[1]:
                bend = "angle,angleA=90,angleB=0,rad=5"
            ends = dict(
                patchA=drawn[before].get_bbox_patch(), patchB=drawn[name].get_bbox_patch(), shrinkA=0, shrinkB=0
            )
            arrow = dict(arrowstyle="-|>", color="0.3", connectionstyle=bend, **ends)
            axis.annotate("", end, start, arrowprops=arrow, zorder=4)
    for values, shade in shades.items():
        axis.plot([], [], "s", ms=9, color=shade, mec="0.3", label=words[values])
    axis.legend(loc="lower center", ncols=3, fontsize=9)
    axis.axis("off")
    return figure


def seed_curves(history: pd.DataFrame) -> Figure:
    """Draw validation accuracy and sign flips per epoch, mean over seeds with its 95% interval as a band.

    Args:
        history: histories of `training.train` with columns network and seed.
    """
    figure, axes = plt.subplots(1, 2)
    for index, (name, group) in enumerate(history.groupby("network", sort=False)):
        for axis, value in zip(axes, ("validation_accuracy", "sign_flips")):
            drawn = intervals(group, ["epoch"], value)
            mean, half = drawn[value], drawn[f"{value}_half"]
            low, high = mean - half, mean + half
            floor = 0.1 * mean if value == "sign_flips" else 0  # a logarithmic axis has no zero
            low, high = np.maximum(low, floor), np.minimum(high, 1)
            axis.fill_between(drawn["epoch"], 100 * low, 100 * high, color=color(name, index), alpha=0.2, lw=0)
            axis.plot(drawn["epoch"], 100 * mean, color=color(name, index), label=label(name))
    axes[0].set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100))
    axes[1].set(xlabel="epoch", ylabel="weights that changed sign (%)", yscale="log")
    axes[0].legend(loc="lower right", fontsize=8)
    return figure


def branch_sizes(table: pd.DataFrame) -> Figure:
    """Draw how large the two signals are that each block adds up, and the second as a share of the first.

    Args:
        table: columns block, convolution and shortcut (root mean square of each), sqrt_n (what a sum of n independent
            signs would have).
    """
    figure, axis = plt.subplots(figsize=(6.0, 3.0))
    places = np.arange(len(table))
    axis.plot(places, table["convolution"], "s", ms=8, color="0.35", label="convolutions")
    axis.plot(places, table["sqrt_n"], "_", ms=16, mew=2, color="0.6", label="$\\sqrt{n}$")
    axis.plot(places, table["shortcut"], "o", ms=8, color=color("resnet_binary"), label="shortcut")
    for place, (shortcut, whole) in enumerate(zip(table["shortcut"], table["convolution"])):
        axis.text(place, 1.3 * shortcut, f"{shortcut / whole:.0%}", ha="center", va="bottom", fontsize=9)
    axis.set_xticks(places, table["block"])
    axis.set(yscale="log", ylim=(0.3, 6 * table["convolution"].max()), ylabel="root mean square", xlabel="block")
    axis.legend(ncols=3, loc="upper center", fontsize=9)
    return figure


def gradient_sizes(table: pd.DataFrame) -> Figure:
    """Draw the norm of the loss gradient at each block's input, geometric mean over seeds with its 95% interval.

    Args:
        table: columns network, seed, block, gradient (norm).
    """
    figure, axis = plt.subplots(figsize=(6.0, 3.0))
    blocks = list(table["block"].unique())
    for index, (name, group) in enumerate(table.groupby("network", sort=False)):
        drawn = intervals(group.assign(log=np.log(group["gradient"])), ["block"], "log")
        middle = np.exp(drawn["log"])
        error = [middle - np.exp(drawn["log"] - drawn["log_half"]), np.exp(drawn["log"] + drawn["log_half"]) - middle]
        places = np.arange(len(blocks)) + 0.06 * (index - 1)
        axis.errorbar(places, middle, error, fmt="o-", capsize=3, color=color(name, index), label=label(name))
    axis.set_xticks(range(len(blocks)), blocks)
    axis.set(yscale="log", xlabel="block (the loss is to the right)", ylabel="gradient norm at its input")
    axis.legend(fontsize=9)
    return figure


def _rows_of_trials(axis: Axes, table: pd.DataFrame, names: Sequence[str], by: str, value: str) -> None:
    """Draw a row for each name: its trials as small dots, their mean with its 95% interval, in percent."""
    means = intervals(table, [by], value).set_index(by)
    for index, name in enumerate(names):
        if name not in means.index:
            continue
        mean, half = 100 * means.loc[name, [value, f"{value}_half"]].astype(float)
        trials = 100 * table.loc[table[by] == name, value]
        axis.errorbar(mean, index, xerr=half, fmt="o", color=f"C{index}", capsize=4, ms=7)
        axis.plot(trials, [index + 0.22] * len(trials), ".", color=f"C{index}", alpha=0.6)


def variants(history: pd.DataFrame, by: str = "variant") -> Figure:
    """Draw variants of a network side by side: accuracy after the last epoch, and the way there.

    Dots are trials, bars and bands 95% intervals of the mean.

    Args:
        history: what `training.train_many` returns, several trials of each variant.
        by: the column that tells variants apart.
    """
    last = history[history["epoch"] == history["epoch"].max()]
    names = list(last[by].unique())
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.4), width_ratios=(1.15, 1))
    _rows_of_trials(axes[0], last, names, by, "validation_accuracy")
    for index, name in enumerate(names):
        way = intervals(history[history[by] == name], ["epoch"], "validation_accuracy")
        middle, band = 100 * way["validation_accuracy"], 100 * way["validation_accuracy_half"]
        axes[1].plot(way["epoch"], middle, color=f"C{index}")
        axes[1].fill_between(way["epoch"], middle - band, middle + band, color=f"C{index}", alpha=0.15, lw=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="validation accuracy, last epoch (%)", xlim=(0, 102))
    axes[1].set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 102))
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def gains(table: pd.DataFrame) -> Figure:
    """Draw variants side by side: the accuracy of each, and what it gains on its reference.

    Dots are trials, bars 95% intervals of the mean.

    Args:
        table: a row a trial, columns variant, validation_accuracy and gain (0..1; NaN where there is no reference).
    """
    names = list(table["variant"].unique())
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 0.4 * len(names) + 1.2), sharey=True)
    _rows_of_trials(axes[0], table, names, "variant", "validation_accuracy")
    _rows_of_trials(axes[1], table.dropna(subset="gain"), names, "variant", "gain")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="validation accuracy, last epoch (%)", xlim=(0, 102))
    axes[1].axvline(0, color="0.3", lw=0.8)
    axes[1].set(xlabel="gain, same seed (points)")
    return figure


def rate_and_decay(table: pd.DataFrame) -> Figure:
    """Draw accuracy over learning rate and weight decay as a coloured grid, a panel an optimizer.

    Args:
        table: columns optimizer, weight_decay, learning_rate, validation_accuracy and validation_accuracy_half, all
            rates and decays of an optimizer combined.
    """
    optimizers = list(table["optimizer"].unique())
    figure, axes = plt.subplots(1, len(optimizers), figsize=(4.3 * len(optimizers), 3.5), squeeze=False)
    for axis, optimizer in zip(axes[0], optimizers, strict=True):
        own = table[table["optimizer"] == optimizer]
        grid = own.pivot(index="weight_decay", columns="learning_rate", values="validation_accuracy")
        half = own.pivot(index="weight_decay", columns="learning_rate", values="validation_accuracy_half")
        image = axis.imshow(100 * grid, vmin=0, vmax=100, aspect="auto")
        for row, column in np.ndindex(grid.shape):
            mean = grid.iloc[row, column]
            text = f"{100 * mean:.0f} ± {100 * half.iloc[row, column]:.0f}"
            axis.text(column, row, text, ha="center", va="center", color="k" if mean > 0.5 else "w", fontsize=9)
        axis.set_xticks(range(grid.shape[1]), [f"{rate:g}" for rate in grid.columns])
        axis.set_yticks(range(grid.shape[0]), [f"{decay:g}" for decay in grid.index])
        axis.set(xlabel="learning rate of the first step", title=label(optimizer))
        axis.grid(False)
    axes[0, 0].set(ylabel="weight decay")
    figure.colorbar(image, ax=axes[0], label="validation accuracy (%)")
    return figure


def flips_against_rate(table: pd.DataFrame) -> Figure:
    """Draw sign flips per epoch against the learning rate, a panel an optimizer, a line a weight decay.

    Args:
        table: columns optimizer, weight_decay, learning_rate, sign_flips and sign_flips_half (shares of all weights).
    """
    optimizers = list(table["optimizer"].unique())
    figure, axes = plt.subplots(1, len(optimizers), figsize=(3.7 * len(optimizers), 3.3), sharey=True, squeeze=False)
    for axis, optimizer in zip(axes[0], optimizers, strict=True):
        own = table[table["optimizer"] == optimizer]
        for index, decay in enumerate(own["weight_decay"].unique()):
            line = own[own["weight_decay"] == decay]
            shifted = line["learning_rate"] * 1.06 ** (index - 1.5)  # side by side, so that bars can be told apart
            axis.errorbar(
                shifted,
                100 * line["sign_flips"],
                yerr=100 * line["sign_flips_half"],
                fmt="o-",
                color=f"C{index}",
                ms=4,
                capsize=2,
                lw=1.2,
                label=f"{decay:g}",
            )
        axis.set(xscale="log", xlabel="learning rate of the first step", title=label(optimizer))
    axes[0, 0].set(ylabel="signs flipped per epoch (%)", ylim=(0, None))
    axes[0, 0].legend(title="weight decay", loc="upper left")
    return figure


def accuracy_against_flips(table: pd.DataFrame) -> Figure:
    """Draw accuracy against the signs flipped in the whole training: small dots trials, large ones means.

    Args:
        table: a row a trial, columns optimizer, weight_decay, learning_rate, flips (per weight, summed over epochs)
            and validation_accuracy.
    """
    keys = ["optimizer", "weight_decay", "learning_rate"]
    figure, axis = plt.subplots(figsize=(5.6, 3.6))
    for index, optimizer in enumerate(table["optimizer"].unique()):
        own = table[table["optimizer"] == optimizer]
        axis.plot(own["flips"], 100 * own["validation_accuracy"], ".", color=f"C{index}", alpha=0.35, ms=4, mew=0)
        x, y = intervals(own, keys, "flips"), intervals(own, keys, "validation_accuracy")
        axis.errorbar(
            x["flips"],
            100 * y["validation_accuracy"],
            xerr=x["flips_half"],
            yerr=100 * y["validation_accuracy_half"],
            fmt="o",
            color=f"C{index}",
            ms=5,
            lw=0.8,
            alpha=0.8,
            label=label(optimizer),
        )
    axis.set(
        xscale="log",
        xlabel="sign flips per weight in the whole training",
        ylabel="validation accuracy (%)",
        ylim=(0, 102),
    )
    axis.legend()
    return figure


def packed_filter(table: pd.DataFrame) -> Figure:
    """Draw a filter twice: the signs of its first input channel, and every channel's signs as the bits of words.

    Args:
        table: columns tap (from 0, row by row of a square kernel), bit (0 to 63, the input channel), sign (+1 or -1;
            NaN where the word has a bit to spare) and word (the tap's 64 bits, in hexadecimal).
    """
    signs = table.pivot(index="tap", columns="bit", values="sign").to_numpy()
    taps, bits = signs.shape
    side = round(taps**0.5)
    colors = plt.get_cmap("cividis").with_extremes(bad="0.85")
    figure, (square, words) = plt.subplots(1, 2, figsize=(8.2, 2.5), width_ratios=(1, 4))
    square.imshow(signs[:, 0].reshape(side, side), vmin=-1, vmax=1, cmap=colors)
    for tap, sign in enumerate(signs[:, 0]):
        drawn = dict(ha="center", va="center", color="k" if sign > 0 else "w", fontsize=11)
        square.text(tap % side, tap // side, f"{sign:+.0f}", **drawn)
    square.set(title="channel 0", xticks=[], yticks=[])
    words.imshow(signs[:, ::-1], vmin=-1, vmax=1, cmap=colors, aspect="auto", interpolation="none")
    words.hlines(np.arange(1, taps) - 0.5, -0.5, bits - 0.5, color="w", lw=1.5)
    words.vlines(np.arange(4, bits, 4) - 0.5, -0.5, taps - 0.5, color="w", lw=1)
    for tap, word in table.groupby("tap")["word"].first().items():
        words.text(bits + 0.5, tap, word, va="center", family="monospace", fontsize=8)
    shown = np.array([0, *range(7, bits, 8)])
    words.set_xticks(bits - 1 - shown, shown)
    words.set_yticks(range(taps), range(taps))
    unused = "; grey: unused" if np.isnan(signs).any() else ""
    words.set(title=f"light: +1, bit 1; dark: -1, bit 0{unused}", xlabel="bit of the word = input channel")
    words.set_ylabel("tap")
    for axis in (square, words):
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure


def thresholds(table: pd.DataFrame) -> Figure:
    """Draw what BatchNorm makes of a layer's integers, and the threshold that replaces it, a panel a channel.

    Args:
        table: columns panel (its title), integer, value (BatchNorm's output), share (of the integers seen that are
            this one, 0..1), threshold (of the panel) and inverted (whether +1 lies below the threshold).
    """
    panels = list(table["panel"].unique())
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(7.0, 2.2 * rows + 0.3), squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        own = table[table["panel"] == panel]
        threshold, inverted = own["threshold"].iloc[0], own["inverted"].iloc[0]
        low, high = own["integer"].min() - 1, own["integer"].max() + 1
        ones = (low, threshold - 0.5) if inverted else (threshold - 0.5, high)
        axis.axvspan(*ones, color="C4", alpha=0.25, lw=0, label="bit is 1")
        height = own["value"].abs().max()
        seen = height * own["share"] / own["share"].max()
        many = len(own) > 150  # gaps between so many bars would show as stripes
        style = dict(width=2 if many else 1.6, antialiased=not many, color="0.75", label="how often seen")
        axis.bar(own["integer"], seen, bottom=-height, **style)
        axis.plot(own["integer"], own["value"], color="C0", label="after BatchNorm")
        axis.axhline(0, color="k", lw=0.8)
        axis.axvline(threshold - 0.5, color="C1", ls="--", label="threshold")
        axis.set(xlim=(low, high), ylim=(-1.05 * height, 1.05 * height), title=panel)
        axis.grid(False)
    for axis in axes[-1]:
        axis.set(xlabel="integer $d$ of the layer")
    for axis in axes[:, 0]:
        axis.set(ylabel="after BatchNorm")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    return figure


def memory(table: pd.DataFrame) -> Figure:
    """Draw the bytes of each layer in several forms of storage, on a logarithmic axis, with the totals in the legend.

    Args:
        table: columns layer (in order from the input), storage and bytes.
    """
    layers = list(table["layer"].unique())
    figure, axis = plt.subplots(figsize=(6.4, 0.3 * len(layers) + 1.1))
    for index, (storage, own) in enumerate(table.groupby("storage", sort=False)):
        total = own["bytes"].sum() / 1e6
        places = [layers.index(layer) for layer in own["layer"]]
        drawn = ("#000000", "#E69F00", "#0072B2")[index % 3]
        axis.plot(own["bytes"], places, "osD"[index % 3], color=drawn, ms=6, label=f"{storage}: {total:.1f} MB")
    axis.set_yticks(range(len(layers)), layers)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="bytes of the layer and its BatchNorm")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


_STORED = {
    "float32": ("#0072B2", "o-"),
    "float32 and statistics": ("#56B4E9", "o--"),
    "packed": ("#D55E00", "s-"),
    "packed, weights alone": ("#000000", "D:"),
}


def damaged_storage(table: pd.DataFrame) -> Figure:
    """Draw accuracy against bit error probability above, against the mean number of flips below, a column a network.

    Points are means over trials with 95% intervals, a line a form of storage.

    Args:
        table: what `campaign.run` returns, of one or more networks, with a column memory that names the line.
    """
    networks = list(table["network"].unique())
    size = (3.6 * len(networks) + 0.4, 6.0)
    figure, axes = plt.subplots(2, len(networks), figsize=size, sharey=True, sharex="row", squeeze=False)
    for column, network in zip(axes.T, networks):
        for index, (name, own) in enumerate(table[table["network"] == network].groupby("memory", sort=False)):
            means = intervals(own, ["probability"], "accuracy")
            means["flips"] = intervals(own, ["probability"], "flips")["flips"]
            drawn, style = _STORED.get(str(name), (f"C{index}", "o-"))
            for axis, x in zip(column, ("probability", "flips")):
                y, half = 100 * means["accuracy"], 100 * means["accuracy_half"]
                axis.errorbar(means[x], y, half, fmt=style, color=drawn, capsize=3, ms=4, label=name)
        column[0].set(title=f"{label(network)}, {table['dataset'].iloc[0]}", xlabel="bit error probability $p$")
        column[1].set(xlabel="flipped bits, mean of the trials")
        for axis in column:
            axis.set(xscale="log", ylim=(0, 100))
    for axis in axes[:, 0]:
        axis.set(ylabel="accuracy (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    return figure


def error_models(table: pd.DataFrame) -> Figure:
    """Draw accuracy under several error models, means over trials with 95% intervals, a panel a way to compare.

    Args:
        table: what `campaign.run` returns, with columns error (the model) and equal (what is held equal, the panel).
    """
    panels, errors = list(table["equal"].unique()), list(table["error"].unique())
    figure, axes = plt.subplots(1, len(panels), figsize=(7.4, 0.36 * len(errors) + 1.5), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        networks = table.loc[table["equal"] == panel, "network"].unique()
        for index, network in enumerate(networks):
            own = table[(table["equal"] == panel) & (table["network"] == network)]
            means = intervals(own, ["error"], "accuracy")
            places = [errors.index(error) + 0.16 * (2 * index + 1 - len(networks)) for error in means["error"]]
            axis.errorbar(
                100 * means["accuracy"],
                places,
                xerr=100 * means["accuracy_half"],
                fmt="os"[index % 2],
                color=color(network, index),
                capsize=3,
                label=label(network),
            )
        axis.set(title=panel, xlabel="accuracy (%)", xlim=(0, 100))
    axes[0, 0].set_yticks(range(len(errors)), errors)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    return figure


def ranked(table: pd.DataFrame) -> Figure:
    """Draw the accuracy that things cost, the dearest on top: means with 95% intervals, a panel a network.

    Args:
        table: a row a trial, columns network, what (a bar each) and lost (accuracy, 0..1).
    """
    networks = list(table["network"].unique())
    size = (3.6 * len(networks) + 1.2, 0.34 * table["what"].nunique() + 1.2)
    figure, axes = plt.subplots(1, len(networks), figsize=size, sharex=True, squeeze=False)
    for axis, network in zip(axes[0], networks):
        own = intervals(table[table["network"] == network], ["what"], "lost").sort_values("lost")
        axis.barh(own["what"], 100 * own["lost"], xerr=100 * own["lost_half"], color=color(network), capsize=3)
        axis.axvline(0, color="0.3", lw=0.8)
        axis.grid(axis="y", visible=False)
        axis.set(title=label(network), xlabel="accuracy lost (points)")
    return figure


def layers_and_kinds(table: pd.DataFrame) -> Figure:
    """Draw the mean accuracy lost to errors in one tensor, layer by layer down, kind by kind across, a panel a network.

    Args:
        table: a row a trial, columns network, layer, kind and lost (accuracy, 0..1).
    """
    networks = list(table["network"].unique())
    rows = max(group["layer"].nunique() for _, group in table.groupby("network"))
    figure, axes = plt.subplots(1, len(networks), figsize=(3.6 * len(networks) + 1.6, 0.3 * rows + 1.4), squeeze=False)
    means = intervals(table, ["network", "layer", "kind"], "lost")
    most = 100 * means["lost"].max()
    scale = PowerNorm(
        0.5, vmin=0, vmax=most, clip=True
    )  # a root, so that one large loss leaves the others their shades
    for axis, network in zip(axes[0], networks):
        own = means[means["network"] == network]
        layers, kinds = list(own["layer"].unique()), list(means["kind"].unique())
        lost = 100 * own.pivot(index="layer", columns="kind", values="lost").reindex(index=layers, columns=kinds)
        image = axis.imshow(lost, norm=scale, aspect="auto")
        for (row, column), value in np.ndenumerate(lost.to_numpy()):
            if np.isfinite(value):
                shade = "w" if value < most / 4 else "k"
                axis.text(column, row, f"{round(value, 1) + 0:.1f}", ha="center", va="center", fontsize=7, color=shade)
        axis.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        axis.set(title=label(network))
        axis.grid(False)
    figure.colorbar(image, ax=axes, label="accuracy lost (points)", shrink=0.8)
    return figure


def bit_positions(table: pd.DataFrame) -> Figure:
    """Draw the accuracy lost to errors in one bit position of every float: means with 95% intervals, a line a network.

    Args:
        table: a row a trial, columns network, bits (the position or positions, in order) and lost (accuracy, 0..1).
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    places = list(table["bits"].unique())
    networks = list(table["network"].unique())
    for index, network in enumerate(networks):
        own = intervals(table[table["network"] == network], ["bits"], "lost")
        x = [places.index(bits) + 0.12 * (2 * index + 1 - len(networks)) for bits in own["bits"]]
        style: Any = dict(fmt="os"[index % 2], color=color(network, index), capsize=3, label=label(network))
        axis.errorbar(x, 100 * own["lost"], yerr=100 * own["lost_half"], **style)
    axis.axhline(0, color="0.3", lw=0.8)
    axis.set_xticks(range(len(places)), places)
    axis.set(xlabel="bit that errs (31: sign, 30 to 23: exponent, 22 to 0: mantissa)", ylabel="accuracy lost (points)")
    axis.legend()
    return figure


def outputs(table: pd.DataFrame) -> Figure:
    """Draw a network's outputs, a column an image, a row a class, before and after each of some bits flipped.

    Args:
        table: columns panel (its title), image (its place), output (class) and value; values beyond ±4 look alike,
            NaN is red.
    """
    panels = list(table["panel"].unique())
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.0, 1.25 * len(panels) + 0.4), sharex=True, squeeze=False)
    colors = plt.get_cmap("cividis").with_extremes(bad="#D55E00")
    for axis, panel in zip(axes[:, 0], panels):
        values = table[table["panel"] == panel].pivot(index="output", columns="image", values="value")
        image = axis.imshow(values, vmin=-4, vmax=4, aspect="auto", interpolation="none", cmap=colors)
        axis.set_title(panel, fontsize=9)
        axis.set(ylabel="output")
        axis.grid(False)
    axes[-1, 0].set(xlabel="test images, sorted by class")
    figure.colorbar(image, ax=axes, label="value", extend="both")
    return figure


def wrong_signs(table: pd.DataFrame) -> Figure:
    """Draw the share of wrong signs that each layer reads: dots measured, with 95% intervals, lines predicted.

    Args:
        table: columns network, layer (in order), probability, share, share_half and predicted, a row for each.
    """
    networks = list(table["network"].unique())
    figure, axes = plt.subplots(1, len(networks), figsize=(4.0 * len(networks) + 0.4, 3.8), sharey=True, squeeze=False)
    for axis, network in zip(axes[0], networks):
        own = table[table["network"] == network]
        layers = list(own["layer"].unique())
        for index, (probability, line) in enumerate(own.groupby("probability", sort=False)):
            style: Any = dict(color=f"C{index}", capsize=3)
            text = f"$p$ = {probability:g}"
            axis.errorbar(line["layer"], 100 * line["share"], 100 * line["share_half"], fmt="o", label=text, **style)
            axis.plot(line["layer"], 100 * line["predicted"], "--", color=f"C{index}", lw=1.2)
        axis.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
        axis.set(yscale="log", title=label(network))
    axes[0, 0].set(ylabel="wrong signs (%)")
    axes[0, 0].plot([], [], "--", color="0.3", lw=1.2, label="independent flips")
    axes[0, 0].legend(fontsize=9)
    return figure


def clipping(numbers: pd.DataFrame, parts: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """Draw trained BatchNorm numbers beside the clamp, and what it costs an undamaged network by part and by bound.

    Args:
        numbers: columns network, kind and value, a row a number; a line style a kind.
        parts: columns network, what (a group of bars each, in order) and lost (accuracy, 0..1).
        costs: columns network, bound and lost (accuracy, 0..1).
    """
    figure, (values, part, cost) = plt.subplots(1, 3, figsize=(11.0, 3.4), width_ratios=(1, 0.8, 1))
    networks, groups = list(numbers["network"].unique()), list(parts["what"].unique())
    edges = np.linspace(numbers["value"].min(), numbers["value"].max(), 41)
    for index, network in enumerate(networks):
        style: Any = dict(color=color(network, index), label=label(network))
        own = numbers[numbers["network"] == network]
        for line, (kind, held) in zip(("-", "--", ":"), own.groupby("kind", sort=False)):
            looks: Any = style | dict(label=f"{label(network)}, {kind}", ls=line)
            values.hist(held["value"], bins=edges, density=True, histtype="step", lw=1.5, **looks)
        own = parts[parts["network"] == network].set_index("what").reindex(groups)
        places = np.arange(len(groups)) + 0.36 * (index - (len(networks) - 1) / 2)
        part.barh(places, 100 * own["lost"], height=0.34, **style)
        for place, lost in zip(places, 100 * own["lost"]):
            part.text(max(lost, 0), place, f" {round(lost, 1) + 0:.1f}", va="center", fontsize=8)
        own = costs[costs["network"] == network]
        cost.plot(own["bound"], 100 * own["lost"], "o-", **style)
    values.axvspan(-1, 1, color="0.9", zorder=0)
    cost.axvline(1, color="0.5", ls=":")
    part.axvline(0, color="0.3", lw=0.8)
    part.set_yticks(range(len(groups)), groups)
    part.invert_yaxis()
    part.grid(axis="y", visible=False)
    part.margins(x=0.18)
    values.set(xlabel="trained number (grey: what the clamp leaves)", ylabel="density")
    part.set(xlabel="accuracy lost (points)", title="clamped to ±1, nothing damaged")
    cost.set(xlabel="bound of the clamp of all, ±", ylabel="accuracy lost (points)")
    values.set_ylim(0, 1.4 * values.get_ylim()[1])  # room for the legend
    values.legend(loc="upper center", ncols=2, fontsize=7)
    cost.legend()
    return figure


def trial_spread(table: pd.DataFrame, coverage: pd.DataFrame) -> Figure:
    """Draw how accuracy spreads over trials, and how often intervals of few trials hold the mean of all.

    Args:
        table: a row a trial, columns network and accuracy.
        coverage: columns network, trials and coverage (0..1).
    """
    figure, (spread, held) = plt.subplots(1, 2, figsize=(7.6, 3.2))
    bins = np.linspace(0, 100, 41)
    for index, (network, own) in enumerate(table.groupby("network", sort=False)):
        style: Any = dict(color=color(str(network), index), label=label(str(network)))
        spread.hist(100 * own["accuracy"], bins=bins, histtype="step", lw=1.8, **style)
        line = coverage[coverage["network"] == network]
        held.plot(line["trials"], 100 * line["coverage"], "o-", **style)
    held.axhline(95, color="0.4", ls=":", label="promised")
    spread.set(xlabel="accuracy of a trial (%)", ylabel="trials")
    held.set(xlabel="trials behind an interval", ylabel="intervals that hold the mean (%)", xscale="log")
    held.legend(fontsize=9)
    return figure


def accuracy_against_bits(table: pd.DataFrame) -> Figure:
    """Draw accuracy against the bits that memory holds: a point a repair and storage, with 95% intervals over trials.

    Args:
        table: a row a trial, columns network, storage, repair, bits and accuracy.
    """
    networks, repairs = list(table["network"].unique()), list(table["repair"].unique())
    size = (3.7 * len(networks) + 0.4, 4.0)
    figure, axes = plt.subplots(1, len(networks), figsize=size, sharey=True, squeeze=False)
    for axis, network in zip(axes[0], networks):
        for index, repair in enumerate(repairs):
            own = table[(table["network"] == network) & (table["repair"] == repair)]
            means = intervals(own, ["storage", "bits"], "accuracy")
            style: Any = dict(fmt="osD^vPX<>*p"[index % 11], color=color(repair, index), capsize=3, label=label(repair))
            axis.errorbar(means["bits"], 100 * means["accuracy"], 100 * means["accuracy_half"], **style)
        for storage, own in table[table["network"] == network].groupby("storage", sort=False):
            middle = np.exp(np.log(own["bits"].unique()).mean())
            axis.text(middle, 1.01, str(storage), transform=axis.get_xaxis_transform(), ha="center", fontsize=8)
        axis.set(xscale="log", xlabel="stored bits", title=label(network), ylim=(0, 100))
        axis.title.set_position((0.5, 1.08))
    axes[0, 0].set(ylabel="accuracy (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def trained_for_errors(table: pd.DataFrame) -> Figure:
    """Draw accuracy against bit error probability by training: means over networks with 95% intervals, and clean ones.

    Args:
        table: a row a network and probability, columns training, seed, probability (0 is undamaged) and accuracy.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    places = sorted(table["probability"].unique())
    trainings = list(table["training"].unique())
    for index, training in enumerate(trainings):
        means = intervals(table[table["training"] == training], ["probability"], "accuracy")
        x = [places.index(p) + 0.08 * (index - (len(trainings) - 1) / 2) for p in means["probability"]]
        style: Any = dict(fmt="osD^v"[index % 5] + "-", color=f"C{index}", capsize=3, lw=1.0, label=training)
        axis.errorbar(x, 100 * means["accuracy"], 100 * means["accuracy_half"], **style)
    axis.set_xticks(range(len(places)), [f"{p:g}" if p else "none" for p in places])
    axis.set(xlabel="bit error probability of the weights", ylabel="accuracy (%)")
    axis.legend(fontsize=9)
    return figure


def stopping(table: pd.DataFrame, until: float) -> Figure:
    """Draw the interval that a campaign has reached against its trials, and how many trials each probability took.

    Args:
        table: a row a probability and number of trials so far: columns probability, trials and half (half-width of
            the 95% interval of accuracy, 0..1).
        until: the half-width at which the campaign stops.
    """
    figure, (reached, spent) = plt.subplots(1, 2, figsize=(7.6, 3.2), width_ratios=(1.4, 1))
    probabilities = sorted(table["probability"].unique(), reverse=True)
    for index, probability in enumerate(probabilities):
        own = table[table["probability"] == probability].sort_values("trials")
        style: Any = dict(color=f"C{index}", label=f"p = {probability:g}")
        reached.plot(own["trials"], 100 * own["half"], **style)
        spent.bar(index, own["trials"].iloc[-1], **style)
    reached.axhline(100 * until, color="0.4", ls=":")
    most = table["trials"].max()
    spent.axhline(most, color="0.4", ls=":")
    spent.text(len(probabilities) - 0.5, most, "a fixed number", ha="right", va="bottom", fontsize=9)
    spent.set_ylim(0, 1.15 * most)
    spent.set_xticks(range(len(probabilities)), [f"{p:g}" for p in probabilities])
    spent.set(xlabel="bit error probability", ylabel="trials")
    reached.set(xlabel="trials", ylabel="half-width of the interval (points)", xscale="log", yscale="log")
    reached.legend(fontsize=9)
    return figure


def coverage(table: pd.DataFrame) -> Figure:
    """Draw how often intervals hold the true mean when a campaign stops by them, against the share of rare failures.

    Args:
        table: columns interval (its name), share (of trials that fail, above 0), coverage (0..1) and trials (mean).
    """
    figure, (held, spent) = plt.subplots(1, 2, figsize=(7.6, 3.2))
    for index, (interval, own) in enumerate(table.groupby("interval", sort=False)):
        style: Any = dict(marker="os"[index % 2], color=f"C{index}", label=str(interval))
        held.plot(100 * own["share"], 100 * own["coverage"], **style)
        spent.plot(100 * own["share"], own["trials"], **style)
    held.axhline(95, color="0.4", ls=":", label="promised")
    for axis in (held, spent):
        axis.set(xscale="log", xlabel="trials that fail (%)")
    held.set(ylabel="intervals that hold the mean (%)", ylim=(0, 104))
    spent.set(ylabel="trials at the stop", yscale="log")
    held.legend(fontsize=9)
    return figure


def throughput(table: pd.DataFrame) -> Figure:
    """Draw trials a second of ways to run a campaign, one bar a way.

    Args:
        table: columns way and trials_per_second.
    """
    figure, axis = plt.subplots(figsize=(6.4, 0.42 * len(table) + 0.9))
    axis.barh(range(len(table)), table["trials_per_second"], color=[f"C{index}" for index in range(len(table))])
    axis.set_yticks(range(len(table)), table["way"])
    axis.invert_yaxis()
    axis.set(xlabel="trials a second")
    return figure


def speed(table: pd.DataFrame) -> Figure:
    """Draw images per second of runtimes, a panel a network; lines lead from the median to the best turn.

    Args:
        table: what `benchmarks.inference` writes: columns machine, threads, network, width, batch, runtime,
            images_per_second and best_images_per_second.
    """
    networks = list(dict.fromkeys(zip(table["network"], table["width"], strict=True)))
    runtimes, batches = list(table["runtime"].unique()), list(table["batch"].unique())
    size = (2.7 * len(networks) + 1.8, 0.32 * len(runtimes) + 1.6)
    figure, axes = plt.subplots(1, len(networks), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, (network, width) in zip(axes[0], networks):
        for index, batch in enumerate(batches):
            own = table[(table["network"] == network) & (table["width"] == width) & (table["batch"] == batch)]
            median, best = own["images_per_second"], own["best_images_per_second"]
            places = [runtimes.index(name) + 0.15 * (2 * index + 1 - len(batches)) for name in own["runtime"]]
            axis.errorbar(
                median,
                places,
                xerr=[0 * median, best - median],
                fmt="os"[index % 2],
                color=("#0072B2", "#D55E00")[index % 2],
                label=f"batch {batch}",
            )
        axis.set(xscale="log", title=f"{label(network)}, width {width:g}", xlabel="images per second")
    axes[0, 0].set_yticks(range(len(runtimes)), runtimes)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9)
    threads = table["threads"].iloc[0]
    figure.suptitle(f"{table['machine'].iloc[0].split(';')[0]}; threads: {threads}", fontsize=9, x=0.01, ha="left")
    return figure
