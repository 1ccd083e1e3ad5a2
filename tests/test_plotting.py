"""Pictures say what their tables say: what is drawn is read back from the axes and compared."""

import io
import math
import pkgutil
import subprocess
import sys
import warnings
from itertools import product

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from PIL import Image
from scipy import stats

import bnn_utils
from bnn_utils import plotting

matplotlib.use("Agg")
NETWORKS = {"vgg_cifar10_binary": "VGG", "resnet_binary": "published ResNet"}


@pytest.fixture(autouse=True)
def quiet():
    """Use the course's style, turn warnings into errors, and close what was drawn."""
    with plt.style.context(plotting.STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib|pyparsing")  # of older ones
        yield
    plt.close("all")


def finished(figure):
    """Draw the figure to the end, see that it is not blank, and return its axes."""
    assert plt.get_fignums() == [figure.number]
    png = io.BytesIO()
    figure.savefig(png, format="png")
    with Image.open(png) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 5
    return figure.axes


def lines(axis, shade):
    """Return [(x, y)] of the lines of more than one point in a colour."""
    drawn = [line for line in axis.lines if to_hex(line.get_color()) == to_hex(shade) and len(line.get_xdata()) > 1]
    return [line.get_data() for line in drawn]


def band(collection):
    """Return {x: (low, high)} of a band between two lines."""
    ends: dict[float, list[float]] = {}
    for x, y in collection.get_paths()[0].vertices:
        ends.setdefault(float(f"{x:.9g}"), []).append(y)  # a logarithm there and back
    return {x: (min(ys), max(ys)) for x, ys in ends.items()}


def bands(axis, shade):
    """Return the bands of an axis in a colour."""
    fills = [drawn for drawn in axis.collections if drawn.get_paths() and drawn.get_offsets().tolist() == [[0, 0]]]
    return [band(fill) for fill in fills if to_hex(fill.get_facecolor()[0]) == to_hex(shade)]


def words(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def half(values):
    """Return the half-width of the 95% interval of a mean."""
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def close(seen, expected):
    np.testing.assert_allclose(np.asarray(seen, float), np.asarray(expected, float), rtol=1e-6)


def history(**columns):
    rng = np.random.default_rng(0)
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "sign_flips")
    return pd.DataFrame({"epoch": [1, 2, 3]} | {name: rng.uniform(0.1, 0.9, 3) for name in names}).assign(**columns)


def campaign(trials=5, repairs=("none", "clip")):
    rng = np.random.default_rng(2)
    rows = product(NETWORKS, repairs, [1e-4, 1e-3, 1e-2], range(trials))
    table = pd.DataFrame(rows, columns=["network", "repair", "probability", "trial"])
    table = table.assign(dataset="digits", storage="float32", seed=table["trial"], flips=7)
    return table.assign(loss=rng.uniform(0.5, 5, len(table)), accuracy=rng.uniform(0.2, 0.8, len(table)))


# Words, colours, intervals, panels


def test_names_have_words_and_colours():
    assert plotting.label("clip") == "damaged, then clipped"
    assert plotting.label("something else") == "something else"
    assert plotting.color("clip") == plotting.color("damaged, then clipped") == plotting.COLORS["damaged, then clipped"]
    assert plotting.color("something else", 2) == "C2"
    assert plotting.palette(["a", "clip", "a", "b"]) == {"a": "C0", "clip": plotting.color("clip"), "b": "C2"}
    shown = plotting.worded(campaign())
    assert [*shown["network"].unique(), shown["repair"].iloc[0]] == ["VGG", "published ResNet", "damaged"]


def test_intervals_are_the_librarys():
    values = [0.2, 0.5, 0.9]
    close(plotting.interval(values), [np.mean(values) - half(values), np.mean(values) + half(values)])


@pytest.mark.parametrize(
    ("scale", "limits", "written"),
    [
        ("linear", (0, 1), ["0", "20", "40", "60", "80", "100"]),
        ("log", (9e-4, 0.2), ["0.1", "1", "10"]),
        ("log", (9e-3, 0.2), ["1", "2", "5", "10", "20"]),
    ],
)
def test_shares_are_written_as_percent(scale, limits, written):
    figure, axis = plt.subplots()
    axis.set(xscale=scale, xlim=limits)
    plotting.percent(axis.xaxis)
    finished(figure)
    ticks = [tick for which in ("major", "minor") for tick in axis.get_xticklabels(which=which) if tick.get_text()]
    shown = {tick.get_position()[0]: tick.get_text() for tick in ticks}
    assert [shown[x] for x in sorted(shown) if limits[0] <= x <= limits[1]] == written


def test_panels():
    figure, drawn = plotting.panels(campaign(), columns=1)
    assert [axis.get_title() for axis, _ in drawn] == ["VGG, digits", "published ResNet, digits"]
    assert [set(own["network"]) for _, own in drawn] == [{name} for name in NETWORKS]
    assert len(figure.axes) == 2 and drawn[0][0].get_shared_x_axes().joined(*figure.axes)
    plt.close("all")
    figure, drawn = plotting.panels(campaign(), "probability", columns=2, sharey=False)
    assert [axis.get_title() for axis, _ in drawn] == ["0.0001", "0.001", "0.01"]
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]
    assert not drawn[0][0].get_shared_y_axes().joined(*figure.axes[:2])


def test_a_legend_outside():
    figure, (left, right) = plt.subplots(1, 2)
    for axis in (left, right):
        axis.plot([0, 1], [0, 1], label="one")
        axis.legend()
    plotting.legend_outside(figure, left, "lower center", title="many")
    assert left.get_legend() is right.get_legend() is None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one"] and legend.get_title().get_text() == "many"


# Training


def test_training_curves():
    table = history()
    loss, accuracy = finished(plotting.training_curves(table))
    for part in ("train", "validation"):
        close(lines(loss, plotting.color(part)), [[table["epoch"], table[f"{part}_loss"]]])
        close(lines(accuracy, plotting.color(part)), [[table["epoch"], table[f"{part}_accuracy"]]])
    assert words(accuracy) == ["train", "validation"]


def test_training_curves_of_two_networks():
    table = pd.concat([history(network=name) for name in NETWORKS])
    table["validation_loss"] += np.arange(6)
    loss, accuracy = finished(plotting.training_curves(table))
    for name in NETWORKS:
        own = table[table["network"] == name]
        seen = lines(loss, plotting.color(name))
        close(seen, [[own["epoch"], own["train_loss"]], [own["epoch"], own["validation_loss"]]])
    assert words(accuracy) == [f"{word}, {part}" for word in NETWORKS.values() for part in ("train", "validation")]


# Damage


@pytest.mark.parametrize("trials", [1, 5])
def test_damage_curves_of_accuracy(trials):
    table = campaign(trials)
    clean = pd.DataFrame({"network": list(NETWORKS), "accuracy": [0.9, 0.85], "loss": [0.1, 0.2]})
    never = table[table["trial"] == 0].assign(probability=0.0, accuracy=0.99)  # has no place on the axis
    axes = finished(plotting.damage_curves(pd.concat([table, never]), clean=clean))
    for (axis, name), repair in product(zip(axes, NETWORKS), ("none", "clip")):
        own = table[(table["network"] == name) & (table["repair"] == repair)]
        groups = own.groupby("probability")["accuracy"]
        close(lines(axis, plotting.color(repair)), [[sorted(set(own["probability"])), groups.mean()]])
        for p, values in groups if trials > 1 else []:
            (drawn,) = bands(axis, plotting.color(repair))
            close(drawn[p], [values.mean() - half(values), values.mean() + half(values)])
    dots = axes[0].collections[0].get_offsets()
    first = table[table["network"] == "vgg_cifar10_binary"]
    close(dots[:, 1], first["accuracy"])
    assert (abs(np.log10(dots[:, 0] / first["probability"].to_numpy())) < 0.13).all()
    assert axes[1].lines[-1].get_ydata()[0] == 0.85  # undamaged
    assert words(axes[0]) == ["damaged", "damaged, then clipped", "undamaged"]
    assert axes[0].get_ylim() == (0, 1) and axes[0].get_xscale() == "log"


def test_damage_curves_of_losses_that_are_not_finite():
    table = campaign(9, ["none"])
    worst = (table["probability"] == 1e-2) & (table["trial"] > 2)
    table.loc[worst, "loss"] = [math.inf, math.nan] * (worst.sum() // 2)
    axis = finished(plotting.damage_curves(table, "loss"))[0]
    own = table[table["network"] == "vgg_cifar10_binary"]
    ((_, middle),) = lines(axis, plotting.color("none"))
    close(middle[:2], own.groupby("probability")["loss"].median().iloc[:2])
    assert middle[2] == plotting.LARGEST_LOSS and axis.get_yscale() == "log"
    (drawn,) = bands(axis, plotting.color("none"))
    ordered = np.sort(own.loc[own["probability"] == 1e-3, "loss"])
    close(drawn[1e-3], [ordered[1], ordered[7]])  # of nine trials the second and the eighth bound the median
    assert np.isfinite(axis.collections[0].get_offsets()).all()


def test_damage_curves_of_many_repairs_have_their_legend_outside():
    figure = plotting.damage_curves(campaign(2, ["none", "clip", "range", "vote"]))
    axes = finished(figure)
    assert axes[0].get_legend() is None
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["damaged", "damaged, then clipped", "range check", "vote of three"]


# Files


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_saved_figures_are_the_same_bytes(form, tmp_path):
    written = [tmp_path / f"{word}.{form}" for word in ("a", "b")]
    for path in written:
        plotting.save(plotting.training_curves(history()), path)
    assert written[0].read_bytes() == written[1].read_bytes()
    with pytest.raises(ValueError, match="txt"):
        plotting.save(plt.gcf(), tmp_path / "c.txt")
    with pytest.raises(OSError, match="nowhere"):
        plotting.save(plt.gcf(), tmp_path / "nowhere" / f"c.{form}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{form}", f"b.{form}"]


def test_nothing_else_in_the_library_draws():
    names = {module.name for module in pkgutil.walk_packages(bnn_utils.__path__, "bnn_utils.")}
    imports = "\n".join(f"import {name}" for name in sorted(names - {"bnn_utils.plotting"}))
    code = f"{imports}\nimport sys\nassert not {{'matplotlib', 'seaborn'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
