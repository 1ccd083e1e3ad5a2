"""Drawings that take more than a short cell: diagrams, and the layout of bits. Each is made from a table alone."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bnn_utils import plotting


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
    words.set(title=f"all channels (light: +1, bit 1; dark: −1, bit 0{unused})", ylabel="tap")
    words.set_xlabel("bit of the word = input channel")
    for axis in (square, words):
        axis.grid(False)
        axis.spines[:].set_visible(False)
    figure.suptitle(f"{np.isfinite(signs).sum()} signs of a filter fit into {taps} words", fontsize=11)
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
    middle.set(xticks=[], yticks=[], title=f"bits of one filter: {len(flipped)} flipped", xlabel=f"{bits.size:,} bits")
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
