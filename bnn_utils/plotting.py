"""What pictures share: style, words, colours, panels, intervals, the curves that several notebooks draw, and files.

Each picture is drawn from a table alone, so that anyone can draw another one from the CSV beside it.
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bnn_utils.statistics import mean_interval, median_interval
from bnn_utils.system import write_beside

STYLE = Path(__file__).with_name("plotting.mplstyle")  # for matplotlib's style.use or style.context
LARGEST_LOSS = 1e39  # beyond any 32-bit float

# The words for a name that tables use.
LABELS = {
    "vgg_cifar10_binary": "VGG",
    "resnet_binary": "published ResNet",
    "resnet_bireal": "modern ResNet",
    "none": "damaged",
    "clip": "damaged, then clipped",
    "range": "range check",
    "secded-floats": "SECDED, all but weights",
    "secded": "SECDED",
    "vote-floats": "vote of three, all but weights",
    "vote-range": "that vote, then range check",
    "vote5-range": "vote of five, then range check",
    "vote5-few-range": "that, smallest layers' weights too",
    "vote5-upper-range": "vote of five on few bits",
    "vote7-small-range": "vote of seven, small layers too, range check",
    "vote": "vote of three",
    "bn_scale": "BatchNorm scale",
    "bn_shift": "BatchNorm shift",
    "running_mean": "running mean",
    "running_var": "running variance",
    "adam": "Adam",
    "sgd": "SGD, momentum 0.9",
}
# The same colour for the same thing in every notebook (Okabe and Ito's colour-blind safe palette), by its word.
COLORS = {
    "VGG": "#0072B2",
    "published ResNet": "#E69F00",
    "modern ResNet": "#0B4D26",
    "damaged": "#0072B2",
    "damaged, then clipped": "#D55E00",
    "train": "#56B4E9",
    "validation": "#000000",
    "thresholds": "#009E73",
    "directions": "#000000",
    "floats": "#CC79A7",
    "float32 storage": "#0072B2",
    "packed storage": "#000000",
    "range check": "#009E73",
    "SECDED, all but weights": "#CC79A7",
    "SECDED": "#882255",
    "vote of three, all but weights": "#E69F00",
    "that vote, then range check": "#DDCC77",
    "vote of five, then range check": "#000000",
    "that, smallest layers' weights too": "#999933",
    "vote of five on few bits": "#332288",
    "vote of seven, small layers too, range check": "#AA4499",
    "vote of three": "#56B4E9",
}
MARKERS = "osD^vPX<>*p"  # one for each thing of a legend, so that it is told apart in grey too


def label(name: str) -> str:
    """Return the words for a name that tables use; itself where it has none."""
    return LABELS.get(name, name)


def color(name: str, index: int = 0) -> str:
    """Return the colour of a thing by its name or its word; `index` picks one for a thing without its own."""
    return COLORS.get(label(name), f"C{index % 7}")  # the style has seven


def palette(names: Iterable[str]) -> dict[str, str]:
    """Return the colour of each name, for seaborn's `palette`; names may come more than once."""
    return {name: color(name, index) for index, name in enumerate(dict.fromkeys(names))}


def worded(table: pd.DataFrame) -> pd.DataFrame:
    """Return a copy in which what has a word is called by it, as a picture shall show it; see LABELS."""
    columns = ("network", "repair", "optimizer", "kind", "what")
    return table.assign(**{name: table[name].map(label) for name in columns if name in table})


def interval(values: Any) -> tuple[float, float]:
    """Return (low, high), the 95% interval of the mean of trials, for seaborn's `errorbar`; see `mean_interval`."""
    mean, half = mean_interval(values)
    return mean - half, mean + half


def percent(*axes: Axis) -> None:
    """Write the shares (0..1) on these axes as percent; call it once a logarithmic scale is set."""

    def words(share: float, _: int | None) -> str:
        return f"{round(100 * share, 6):g}"

    def between(axis: Axis, share: float, _: int | None) -> str:
        low, high = axis.get_view_interval()
        return words(share, _) if high < 100 * low and f"{share:e}"[0] in "25" else ""  # few decades: 1, 2, 5, 10

    for axis in axes:
        axis.set_major_formatter(FuncFormatter(words))
        if axis.get_scale() == "log":
            axis.set_minor_formatter(FuncFormatter(partial(between, axis)))


def panels(
    table: pd.DataFrame, by: str = "network", size: tuple[float, float] = (3.8, 3.4), columns: int = 0, **share: Any
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Return a figure and, for each value of a column, a panel titled with it and the rows that belong there.

    Args:
        table: of one or more values of `by`, drawn in order of appearance.
        by: the column; where it is the network, the title tells the data set too.
        size: of a panel, in inches.
        columns: panels side by side; 0 is all of them.
        share: sharex and sharey of `plt.subplots`, both true unless given.
    """
    parts = list(table.groupby(by, sort=False))
    columns = columns or len(parts)
    rows = -(-len(parts) // columns)
    share = dict(sharex=True, sharey=True) | share
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, **share)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    for axis, (name, own) in zip(axes.flat, parts):
        data = f", {own['dataset'].iloc[0]}" if by == "network" and "dataset" in own else ""
        axis.set_title(f"{label(str(name))}{data}")
    return figure, [(axis, own) for axis, (_, own) in zip(axes.flat, parts)]


def legend_outside(figure: Figure, axis: Axes, where: str = "upper center", **arguments: Any) -> None:
    """Move the legend of one panel out of it, to a side of the whole figure; those of the others go."""
    handles: list[Any]
    handles, words = axis.get_legend_handles_labels()
    if inside := axis.get_legend():  # seaborn's histograms have no labels but those in their legend
        handles, words = list(inside.legend_handles), [text.get_text() for text in inside.get_texts()]
    for panel in figure.axes:
        if drawn := panel.get_legend():
            drawn.remove()
    style: dict[str, Any] = dict(loc=f"outside {where}", fontsize=9)
    figure.legend(handles, words, **style | arguments)


def training_curves(history: pd.DataFrame) -> Figure:
    """Draw loss and accuracy per epoch, while training and on the validation part.

    Args:
        history: what `training.train` returns; with a column `network`, one pair of lines a network.
    """
    figure, axes = plt.subplots(1, 2)
    groups = history.groupby("network", sort=False) if "network" in history else [("", history)]
    for index, (name, group) in enumerate(groups):
        for part, style in (("train", "--"), ("validation", "-")):
            line: Any = dict(ls=style, color=color(name, index) if name else color(part))
            line["label"] = f"{label(name)}, {part}" if name else part
            axes[0].plot(group["epoch"], group[f"{part}_loss"], **line)
            axes[1].plot(group["epoch"], group[f"{part}_accuracy"], **line)
    axes[0].set(xlabel="epoch", ylabel="cross-entropy loss (nats)")
    axes[1].set(xlabel="epoch", ylabel="accuracy (%)")
    percent(axes[1].yaxis)
    axes[1].legend()
    return figure


def damage_curves(table: pd.DataFrame, value: str = "accuracy", clean: pd.DataFrame | None = None) -> Figure:
    """Draw a campaign: a panel a network, the mean over trials against bit error probability, a line a repair.

    Bands are 95% intervals, faint dots single trials. Losses, which may be infinite, get a logarithmic axis and the
    median instead of the mean; infinity, and NaN, is drawn at LARGEST_LOSS.

    Args:
        table: what `campaign.run` returns, of one or more networks; rows at probability 0 have no place on the axis.
        value: "accuracy" or "loss".
        clean: columns network and `value`, of the undamaged networks, drawn as a dotted line.
    """
    table = worded(table[table["probability"] > 0])
    how: Any = dict(estimator="mean", errorbar=interval)
    if value == "loss":
        how = dict(estimator="median", errorbar=lambda losses: median_interval(losses)[1:])
    how |= dict(x="probability", y=value, hue="repair", palette=palette(table["repair"]), style="repair")
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(table["repair"].unique())}
    how |= dict(markers=markers, mec="none", ms=5)
    figure, drawn = panels(table)
    for axis, own in drawn:
        axis.set_xscale("log")
        _trials(axis, own[np.isfinite(own[value])], value)
        own = own.assign(**{value: own[value].fillna(np.inf).clip(upper=LARGEST_LOSS)})
        sns.lineplot(own, ax=axis, **how)
        if clean is not None:
            level = clean.loc[clean["network"].map(label) == own["network"].iloc[0], value].item()
            axis.axhline(level, color="0.4", ls=":", lw=1.2, label="undamaged")
        axis.set(xlabel="bit error probability $p$", ylabel="cross-entropy loss (nats)")
        if value == "accuracy":
            axis.set(ylabel="accuracy (%)", ylim=(0, 1))
            percent(axis.yaxis)
        else:
            axis.set_yscale("log")
        axis.label_outer()
        axis.legend().remove()
    first = drawn[0][0]
    if table["repair"].nunique() > 3:  # no corner holds them all
        legend_outside(figure, first, "right center")
    else:
        first.legend(loc="lower left" if value == "accuracy" else "upper left", fontsize=9)
    return figure


def _trials(axis: Axes, table: pd.DataFrame, value: str) -> None:
    """Draw a faint dot a trial, side by side, so that dots can be told apart on a logarithmic axis."""
    spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(table))
    colors = [color(name) for name in table["repair"]]
    axis.scatter(table["probability"] * 10**spread, table[value], s=6, c=colors, alpha=0.3, lw=0)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all, in the form that the path's suffix names; equal figures give equal bytes.

    Args:
        figure: what was drawn.
        path: ends in .png, .svg or another suffix that matplotlib writes.

    Raises:
        ValueError: matplotlib writes no such form.
        OSError: the folder is not there, or cannot be written to.
    """
    form = Path(path).suffix.lstrip(".")
    silence = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}  # no version, no time
    write_beside(path, partial(figure.savefig, format=form, bbox_inches="tight", metadata=silence.get(form)))
