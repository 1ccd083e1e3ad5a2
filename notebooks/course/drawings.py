"""Drawings that take more than a short cell: diagrams, and the layout of bits. Each is made from a table alone."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bnn_utils import plotting

# Two blocks of binarized ResNets for `diagram`: the published one above, the modern one below.
RESNET_BLOCKS = pd.DataFrame(
    [
        ("input", 0, 2, "input", "real", ""),
        ("sign1", 1, 2, "sign", "sign", "input"),
        ("conv1", 2, 2, "conv", "whole", "sign1"),
        ("norm1", 3, 2, "BatchNorm\nHardtanh", "real", "conv1"),
        ("sign2", 4, 2, "sign", "sign", "norm1"),
        ("conv2", 5, 2, "conv", "whole", "sign2"),
        ("sum", 6, 2, "+", "real", "conv2 around"),
        ("norm2", 7, 2, "BatchNorm\nHardtanh", "real", "sum"),
        ("around", 3, 2.8, "shortcut", "real", "input"),
        ("stream", 0, 0, "input", "real", ""),
        ("shift", 1, 0, "shift", "real", "stream"),
        ("sign", 2, 0, "sign", "sign", "shift"),
        ("conv", 3, 0, "conv", "whole", "sign"),
        ("norm", 4, 0, "BatchNorm", "real", "conv"),
        ("plus", 5.2, 0, "+", "real", "norm past"),
        ("act", 6.2, 0, "PReLU", "real", "plus"),
        ("past", 3, 0.8, "shortcut", "real", "stream"),
    ],
    columns=["name", "x", "y", "text", "values", "after"],
)


def diagram(table: pd.DataFrame) -> Figure:
    """Draw boxes joined by arrows, coloured by what they put out: real numbers, +1 and -1, or whole numbers.

    Args:
        table: columns name, x, y (a box's centre), text, values ("real", "sign" or "whole"), after (names of the boxes
            that lead to it, separated by blanks).
    """
    figure, axis = plt.subplots(figsize=(7.0, 1.2 + table["y"].max() - table["y"].min()))
    shades = {"real": "#F0C05A", "sign": "#6FB3DF", "whole": "w"}
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
        drawn: Any = dict(ha="center", va="center", color="k" if sign > 0 else "w", fontsize=11)
        square.text(tap % side, tap // side, "+1" if sign > 0 else "−1", **drawn)
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
    words.set(title=f"channels 0 to {bits - 1} (light: +1, bit 1; dark: −1, bit 0{unused})", ylabel="tap")
    words.set_xlabel("bit of the word = input channel")
    for axis in (square, words):
        axis.grid(False)
        axis.spines[:].set_visible(False)
    figure.suptitle(
        f"The first {bits} channels of a filter: {np.isfinite(signs).sum()} signs in {taps} words", fontsize=11
    )
    return figure


def thresholds(table: pd.DataFrame) -> Figure:
    """Draw what BatchNorm makes of a channel's integers, and on which side of its threshold the bit is 1.

    Args:
        table: a row an integer of a channel: columns panel (its title), integer, value (after BatchNorm), share (how
            often the integer is seen), threshold, inverted (whether the bit is 1 below the threshold).
    """
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.6))
    for axis, (title, own) in zip(axes.flat, table.groupby("panel", sort=False)):
        edge, inverted = own["threshold"].iloc[0] - 0.5, own["inverted"].iloc[0]
        left, right, height = own["integer"].min() - 1, own["integer"].max() + 1, own["value"].abs().max()
        shaded = (left, edge) if inverted else (edge, right)
        axis.axvspan(*shaded, facecolor="#F5D58A", alpha=0.6, lw=0, label="the bit is 1")
        seen = height * own["share"] / own["share"].max() - height
        axis.fill_between(own["integer"], -height, seen, step="mid", color="0.6", lw=0, label="how often seen")
        axis.plot(own["integer"], own["value"], color="C0", label="after BatchNorm")
        axis.axvline(edge, color="C1", ls="--", label="threshold")
        axis.axhline(0, color="k", lw=0.8)
        axis.set(title=title, xlim=(left, right))
        axis.grid(False)
    figure.supxlabel("integer that the layer gives", fontsize=10)
    figure.supylabel("after BatchNorm", fontsize=10)
    handles, words = axes[0, 0].get_legend_handles_labels()
    title = "Where the line is above zero, the bit is 1: one comparison for five floats"
    figure.legend(handles, words, loc="outside upper center", ncols=4, fontsize=9, title=title, title_fontsize=11)
    return figure


def reading(image: NDArray[Any], right: NDArray[Any], wrong: NDArray[Any], scores: pd.DataFrame, title: str) -> Figure:
    """Draw an image, some stored bits, those that flipped among them crossed, and the probabilities of the classes.

    Args:
        image: (height, width, 3), as `imshow` takes it.
        right, wrong: stored words of 64 bits, undamaged and damaged.
        scores: by class name, a column of probabilities undamaged and one damaged.
        title: the finding.
    """
    figure, (left, middle, far) = plt.subplots(1, 3, figsize=(8.0, 3.0), width_ratios=(1, 1.7, 1.4))
    left.imshow(image)
    left.set(xticks=[], yticks=[], title="a test image")
    bits, different = (words[:, None] >> np.arange(64, dtype=words.dtype) & 1 for words in (right, right ^ wrong))
    middle.imshow(bits[:, ::-1], cmap="cividis", alpha=0.35, aspect="auto", interpolation="none")
    flipped = np.argwhere(different)
    middle.plot(63 - flipped[:, 1], flipped[:, 0], "X", color="#D55E00", mec="k", mew=0.5, ms=7)
    middle.set(
        xticks=[], yticks=[], title=f"a part of one filter: {len(flipped)} flipped", xlabel=f"{bits.size:,} of its bits"
    )
    places = np.arange(len(scores))
    for shift, (name, style) in zip((-0.2, 0.2), (("undamaged", "0.75"), ("damaged", plotting.color("damaged")))):
        far.barh(places + shift, scores[name], height=0.4, color=style, edgecolor="0.3", lw=0.5, label=name)
    far.set_yticks(places, scores.index, fontsize=8)
    far.invert_yaxis()
    far.set(xlim=(0, 1), xlabel="probability (%)")
    plotting.percent(far.xaxis)
    far.grid(False)
    for axis in (left, middle):
        axis.grid(False)
    handles, words = far.get_legend_handles_labels()
    figure.legend(handles, words, loc="outside upper center", ncols=2, fontsize=9, title=title, title_fontsize=11)
    return figure


def atlas(table: pd.DataFrame) -> Figure:
    """Draw the accuracy after each single flip of a layer's floats: a panel a network, a row a number, a column a bit.

    Args:
        table: columns network (its word), kind (words), number (its index in the tensor), bit, accuracy.
    """
    parts = list(table.groupby("network", sort=False))
    figure, axes = plt.subplots(1, len(parts), figsize=(min(8.0, 1 + 3.4 * len(parts)), 3.8), squeeze=False)
    for axis, (name, own) in zip(axes.flat, parts):
        grid = own.pivot_table(index=["kind", "number"], columns="bit", values="accuracy", sort=False)
        kinds = grid.index.get_level_values("kind")
        looks: Any = dict(cmap="cividis", vmin=0, vmax=table["accuracy"].max(), aspect="auto", interpolation="none")
        drawn = axis.imshow(grid[sorted(grid, reverse=True)], **looks)
        starts = [index for index in range(len(kinds)) if index == 0 or kinds[index] != kinds[index - 1]]
        for start in starts[1:]:
            axis.axhline(start - 0.5, color="w", lw=2)
        middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(kinds)])]
        axis.set_yticks(middles, [kinds[start] for start in starts], rotation=90, va="center")
        for edge in (0.5, 8.5):  # sign | exponent | mantissa
            axis.axvline(edge, color="w", lw=1, ls=":")
        axis.set_xticks([1, 8, 16, 24, 31], [30, 23, 15, 7, 0])
        axis.tick_params(length=0)
        axis.set(title=name, xlabel="flipped bit")
        axis.grid(False)
    bar = figure.colorbar(drawn, ax=axes, label="accuracy after the flip (%)")
    plotting.percent(bar.ax.yaxis)
    return figure


def one_bit(before: float, after: float, bit: int, said: pd.Series, title: str) -> Figure:
    """Draw a stored float as 32 boxes with one bit flipped, and how often a network then says each class.

    Args:
        before, after: the number that was stored, and the one that is read.
        bit: the position that flipped.
        said: images by class name.
        title: the finding.
    """
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.4, 4.0), height_ratios=(1, 1.6))
    shades = {"sign": "#9CCBEA", "exponent": "#F5D58A", "mantissa": "0.9"}
    for row, number in enumerate((before, after)):
        digits = f"{np.float32(number).view(np.uint32):032b}"
        for place, digit in enumerate(digits):
            part = "sign" if place == 0 else "exponent" if place < 9 else "mantissa"
            hit = row == 1 and place == 31 - bit
            box: Any = dict(facecolor="#D55E00" if hit else shades[part], edgecolor="0.3", lw=0.6)
            top.add_patch(plt.Rectangle((place, -1.3 * row), 1, 1, **box))
            color, weight = ("w", "bold") if hit else ("k", "normal")
            top.text(
                place + 0.5, 0.5 - 1.3 * row, digit, ha="center", va="center", color=color, weight=weight, fontsize=9
            )
        top.text(32.4, 0.5 - 1.3 * row, f"= {number:.3g}", va="center", fontsize=9)
    for middle, part in ((0.5, "sign"), (5.0, "exponent"), (20.5, "mantissa")):
        top.text(middle, 1.2, part, ha="center", fontsize=9)
    for row, word in enumerate(("stored", "read")):
        top.text(-0.4, 0.5 - 1.3 * row, word, ha="right", va="center", fontsize=9)
    top.set(xlim=(-3, 37), ylim=(-1.5, 2))
    top.axis("off")
    bottom.bar(said.index, said, color=plotting.color("damaged"))
    bottom.set(ylabel="images classified so")
    bottom.tick_params(axis="x", labelsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def inside(table: pd.DataFrame) -> Figure:
    """Draw what an untrained network does with gradients and values, layer by layer, with BatchNorm and without.

    Args:
        table: columns layer, network, gradient and "within ±1" (a share).
    """
    figure, (left, right) = plt.subplots(1, 2)
    looks: Any = dict(x="layer", hue="network", style="network", markers=["o", "s"], dashes=False)
    sns.lineplot(table, y="gradient", ax=left, **looks)
    sns.lineplot(table, y="within ±1", legend=False, ax=right, **looks)
    left.set(yscale="log", ylabel="mean size of the gradient", title="Without BatchNorm, gradients explode …")
    right.set(ylim=(0, 1), ylabel="values within ±1 (%)", title="… although few values let them pass")
    left.legend(title="", loc="upper right", fontsize=9)
    plotting.percent(right.yaxis)
    return figure


def variants(ends: pd.DataFrame, mine: pd.DataFrame) -> Figure:
    """Draw how networks end that stand on other things than BatchNorm: a dot a training, their mean, its interval.

    Args:
        ends, mine: columns variant and validation_accuracy; `mine` are drawn as crosses. The first four variants change
            the last layer, the others all of them.
    """
    names = list(dict.fromkeys(ends["variant"]))
    hue = ends["variant"].map(lambda name: "last" if name in names[:4] else "every")
    figure, axis = plt.subplots(figsize=(7.0, 3.3))
    how: Any = dict(x="validation_accuracy", y="variant", hue=hue, ax=axis, legend=False)
    sns.stripplot(ends, size=3, alpha=0.5, jitter=0.15, **how)
    sns.pointplot(ends, errorbar=plotting.interval, linestyle="none", markersize=6, capsize=0.3, lw=1.3, **how)
    axis.plot(mine["validation_accuracy"], mine["variant"], "kx", ms=7, label="your trainings")
    axis.set(xlabel="validation accuracy after the last epoch (%)", ylabel="", xlim=(0, 1.02))
    axis.set_title("One learned number does what the last BatchNorm does")
    for row, words in ((1.5, "in the place of the\nlast BatchNorm"), (4.0, "in the place of\nevery BatchNorm")):
        axis.text(0.02, row, words, va="center", color="0.4")
    axis.axhline(3.5, color="0.7", lw=0.8)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    plotting.percent(axis.xaxis)
    return figure


def rate_and_decay(table: pd.DataFrame) -> Figure:
    """Draw the mean accuracy of trainings, with the half of its interval, as a map for each optimizer.

    Args:
        table: what `campaign.intervals` returns of validation_accuracy by optimizer, weight_decay and learning_rate.
    """
    figure, panels = plotting.panels(table, "optimizer", size=(3.7, 2.9), sharex=False)
    for axis, own in panels:
        cells = 100 * own.pivot(index="weight_decay", columns="learning_rate")
        mean, half = cells["validation_accuracy"], cells["validation_accuracy_half"]
        text = mean.map("{:.0f}".format) + " ± " + half.map("{:.0f}".format)
        sns.heatmap(mean, annot=text, fmt="", vmin=0, vmax=100, cmap="cividis", cbar=False, ax=axis)
        axis.set(xlabel="learning rate of the first step", ylabel="weight decay")
        axis.tick_params(rotation=0)
        axis.label_outer()
    figure.suptitle("The learning rate decides, weight decay changes little: accuracy in percent, ± 95%", fontsize=10)
    return figure


def points_against_bits(table: pd.DataFrame, mine: pd.DataFrame) -> Figure:
    """Draw what each repair leaves lost against what it stores, a panel a network; `mine` are drawn as crosses.

    Args:
        table, mine: a row a trial, columns network, dataset, repair, points (of accuracy lost) and bits (stored).
    """
    figure, panels = plotting.panels(table, size=(3.7, 3.6), sharex=False)
    for axis, own in panels:
        axis.set_yscale("symlog", linthresh=1, linscale=0.5)
        axis.set_xscale("log")
        bare = own["bits"].min()
        for index, (name, trials) in enumerate(own.groupby("repair", sort=False)):
            times, mean = trials["bits"].iloc[0] / bare, max(trials["points"].mean(), 0)
            low, high = plotting.interval(trials["points"])
            look: Any = dict(color=plotting.color(str(name)), fmt=plotting.MARKERS[index], ms=7, capsize=3)
            axis.errorbar(times, mean, yerr=[[mean - min(max(low, 0), mean)], [high - mean]], **look)
            place: Any = dict(xytext=(8, 0), ha="left") if times < 2 else dict(xytext=(6, 20), ha="right")
            words = plotting.label(str(name)) + (f" (+{times - 1:.0%})" if times > 1 else "")
            if name == "none":
                words, place = "no repair", dict(xytext=(-6, 22), ha="left")
            place |= dict(textcoords="offset points", va="center", fontsize=9)
            axis.annotate(words, (times, mean), **place)
        theirs = mine[mine["network"] == own["network"].iloc[0]]
        if len(theirs):
            axis.plot(theirs["bits"] / bare, theirs["points"].clip(lower=0), "kx", ms=5, label="your trials")
            axis.text(0.97, 0.95, "crosses: your trials", ha="right", transform=axis.transAxes, fontsize=9)
        axis.set(
            xlabel="stored bits, times those without repair",
            ylabel="accuracy lost at p = 0.01 (points)",
            ylim=(-0.2, 300),
        )
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
        axis.xaxis.set_minor_locator(plt.NullLocator())
        axis.label_outer()
    figure.suptitle("Five copies of the few bits that decide save nearly all, for little memory", fontsize=11)
    return figure


def trained_for_errors(table: pd.DataFrame) -> Figure:
    """Draw accuracy against the probability of wrong weights, a line a way to train, mean over seeds with intervals.

    Args:
        table: columns training, seed, probability and accuracy.
    """
    figure, axis = plt.subplots(figsize=(6.2, 3.4))
    how: Any = dict(markers=["o", "s", "D"], linestyles=["-", "--", ":"], errorbar=plotting.interval, capsize=0.06)
    sns.pointplot(
        table, x="probability", y="accuracy", hue="training", dodge=0.25, lw=1.3, markersize=5, ax=axis, **how
    )
    axis.set(xlabel="probability that a weight is wrong", ylabel="accuracy (%)")
    axis.set_title("Trained with many errors, a network stands many errors better")
    axis.legend(title="trained", loc="lower left")
    plotting.percent(axis.yaxis)
    return figure


def never_undone(table: pd.DataFrame) -> Figure:
    """Draw validation accuracy epoch by epoch of trainings whose flips are undone or stay, mean over seeds.

    Args:
        table: columns training, epoch and validation_accuracy.
    """
    figure, axis = plt.subplots(figsize=(6.2, 3.4))
    said = {
        "p = 0.04": "undone: 4 weights in 100 a step",
        "never undone, weights": "stay: 1 weight in 1,000 a step",
        "never undone, all but weights": "stay: 1 number in 1,000, BatchNorm and biases",
    }
    words = table["training"].replace(said)
    how: Any = dict(hue=words, style=words, errorbar=plotting.interval, markers=True, dashes=False, ms=5)
    sns.lineplot(table, x="epoch", y="validation_accuracy", ax=axis, **how)
    axis.set(ylabel="validation accuracy (%)", ylim=(0, 1), title="Flips that stay undo what was learned")
    axis.legend(title="", loc="lower right")
    plotting.percent(axis.yaxis)
    return figure


def coverage(table: pd.DataFrame) -> Figure:
    """Draw how often intervals hold the true mean where campaigns stop by them, and after how many trials.

    Args:
        table: columns interval, share (of trials that fail), coverage (a share) and trials.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2))
    looks: Any = dict(x="share", hue="interval", style="interval", markers=["o", "s"], dashes=False)
    sns.lineplot(table, y="coverage", ax=left, **looks)
    sns.lineplot(table, y="trials", legend=False, ax=right, **looks)
    left.axhline(0.95, color="0.4", ls=":", label="promised")
    left.set(xscale="log", xlabel="trials that fail (%)", ylabel="intervals that hold the mean (%)", ylim=(0, 1.04))
    left.set_title("Student's t misses rare failures …")
    right.set(xscale="log", xlabel="trials that fail (%)", ylabel="trials at the stop", yscale="log")
    right.set_title("… because it stops too early")
    plotting.percent(left.xaxis, left.yaxis, right.xaxis)
    left.legend(title="", loc="lower right", fontsize=9)
    return figure
