"""Pictures say what their tables say: what is drawn is read back from the axes and compared."""

import io
import math
import warnings
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from PIL import Image
from scipy import stats

from bnn_utils import plotting

matplotlib.use("Agg")
NETWORKS = ("vgg_cifar10_binary", "resnet_binary")


@pytest.fixture(autouse=True)
def quiet():
    """Use the notebooks' style, turn warnings into errors, and close what was drawn."""
    with plt.style.context(Path(plotting.__file__).with_name("tutorial.mplstyle")), warnings.catch_warnings():
        warnings.simplefilter("error")
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


def line(axis, label):
    """Return (x, y) of the line that the legend calls `label`."""
    (found,) = [drawn for drawn in axis.lines if drawn.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def bars(axis, label):
    """Return (x, y, low, high) of the points with error bars that the legend calls `label`."""
    (found,) = [drawn for drawn in axis.containers if drawn.get_label() == label]
    points, _, (segments, *_) = found.lines
    ends = np.array(segments.get_segments())
    return points.get_xdata(), points.get_ydata(), ends[:, 0, 1], ends[:, 1, 1]


def band(collection):
    """Return {x: (low, high)} of a band between two lines."""
    vertices = collection.get_paths()[0].vertices
    return {x: (vertices[vertices[:, 0] == x, 1].min(), vertices[vertices[:, 0] == x, 1].max()) for x in vertices[:, 0]}


def texts(axis):
    return [text.get_text() for text in axis.texts if text.get_text()]


def half(values):
    """Return the half-width of the 95% interval of a mean."""
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def close(seen, expected):
    np.testing.assert_allclose(np.asarray(seen, float), np.asarray(expected, float), rtol=1e-6)


def history(**columns):
    rng = np.random.default_rng(0)
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "sign_flips")
    return pd.DataFrame({"epoch": [1, 2, 3]} | {name: rng.uniform(0.1, 0.9, 3) for name in names}).assign(**columns)


def seeds(by, names, trials=4):
    rng = np.random.default_rng(1)
    parts = [history(**{by: name}).assign(seed=trial) for name, trial in product(names, range(trials))]
    for part in parts:
        part[["validation_accuracy", "sign_flips"]] = rng.uniform(0.4, 0.6, (3, 2))
    return pd.concat(parts, ignore_index=True)


def campaign(trials=5):
    rng = np.random.default_rng(2)
    rows = product(NETWORKS, ["none", "clip"], [1e-4, 1e-3, 1e-2], range(trials))
    table = pd.DataFrame(rows, columns=["network", "repair", "probability", "trial"])
    table = table.assign(dataset="digits", storage="float32", seed=table["trial"], flips=7)
    return table.assign(loss=rng.uniform(0.5, 5, len(table)), accuracy=rng.uniform(0.2, 0.8, len(table)))


# Words and colours


def test_names_have_words_and_colours():
    assert plotting.label("clip") == "damaged, then clipped"
    assert plotting.label("something else") == "something else"
    assert plotting.color("clip") == plotting.COLORS["clip"]
    assert plotting.color("something else", 2) == "C2"
    assert plotting.color("none") != plotting.color("clip")


# Training


def test_training_curves():
    table = history()
    loss, accuracy = finished(plotting.training_curves(table))
    for part in ("train", "validation"):
        close(line(loss, part), [table["epoch"], table[f"{part}_loss"]])
        close(line(accuracy, part), [table["epoch"], 100 * table[f"{part}_accuracy"]])


def test_training_curves_of_two_networks():
    table = pd.concat([history(network=name) for name in NETWORKS])
    table["validation_loss"] += np.arange(6)
    loss, _ = finished(plotting.training_curves(table))
    for name, text in zip(NETWORKS, ("VGG", "ResNet")):
        own = table[table["network"] == name]
        close(line(loss, f"{text}, validation"), [own["epoch"], own["validation_loss"]])
    assert len(loss.lines) == 4


def test_sign_flips():
    table = pd.concat([history(network=name) for name in NETWORKS])
    (axis,) = finished(plotting.sign_flips(table))
    close(line(axis, "ResNet"), [[1, 2, 3], 100 * table["sign_flips"][3:]])
    assert axis.get_yscale() == "log"
    plt.close("all")
    (axis,) = finished(plotting.sign_flips(history()))
    close(axis.lines[0].get_ydata(), 100 * history()["sign_flips"])


def test_seed_curves():
    table = seeds("network", ["resnet_binary", "without shortcuts"])
    axes = finished(plotting.seed_curves(table))
    for axis, value in zip(axes, ("validation_accuracy", "sign_flips")):
        for index, name in enumerate(["resnet_binary", "without shortcuts"]):
            groups = table[table["network"] == name].groupby("epoch")[value]
            close(line(axis, plotting.label(name)), [[1, 2, 3], 100 * groups.mean()])
            for epoch, values in groups:
                low, high = band(axis.collections[index])[epoch]
                mean = values.mean()
                assert low == pytest.approx(100 * max(mean - half(values), 0.1 * mean if value == "sign_flips" else 0))
                assert high == pytest.approx(100 * min(mean + half(values), 1))


def test_flip_map():
    names = ["z.first", "a.second"]
    table = pd.DataFrame(product(names, [1, 2, 3]), columns=["layer", "epoch"])
    table["flipped"] = [0.1, 0.01, 0.0, 0.2, 0.002, 0.0002]
    axis, bar = finished(plotting.flip_map(table))
    shown = axis.images[0].get_array()
    assert [text.get_text() for text in axis.get_yticklabels()] == names  # in the table's order, from the input
    close(shown.filled(0), 100 * table["flipped"].to_numpy().reshape(2, 3))
    assert shown.mask.tolist() == [[False, False, True], [False, False, False]]
    assert "%" in bar.get_ylabel()


def test_weight_histograms():
    edges = np.array([-1, -0.5, 0.25, 1])
    rows = [
        dict(layer=layer, when=when, low=low, high=high, share=share / 10)
        for layer, when in product(["conv1", "conv2", "fc", "last"], ["initial", "trained"])
        for low, high, share in zip(edges[:-1], edges[1:], [1, 7, 2] if when == "initial" else [5, 1, 4])
    ]
    figure = plotting.weight_histograms(pd.DataFrame(rows))
    axes = finished(figure)
    assert [axis.get_title() for axis in axes if axis.get_visible()] == ["conv1", "conv2", "fc", "last"]
    for axis in axes[:4]:
        for patch, (when, values) in zip(axis.patches, [("initial", [10, 70, 20]), ("trained", [50, 10, 40])]):
            assert patch.get_label() == when
            close(patch.get_data().values, values)
            close(patch.get_data().edges, edges)


def test_confusion():
    table = pd.DataFrame({"true": [0, 0, 2, 1], "predicted": [0, 1, 2, 1], "images": [6, 2, 5, 7]})
    (axis,) = finished(plotting.confusion(table, ("cat", "dog", "ox")))
    close(axis.images[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 1]])
    seen = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in axis.texts}
    assert seen == {(0, 0): 6, (0, 1): 2, (2, 2): 5, (1, 1): 7}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["cat", "dog", "ox"]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures(channels):
    rng = np.random.default_rng(3)
    values = rng.integers(0, 256, (3, channels, 4, 5))
    rows = [
        dict(picture=picture, title=f"title {picture}", channel=channel, row=row, column=column, value=value)
        for (picture, channel, row, column), value in np.ndenumerate(values)
    ]
    axes = finished(plotting.pictures(pd.DataFrame(rows), columns=2))
    for picture in range(3):
        assert axes[picture].get_title() == f"title {picture}"
        shown = np.asarray(axes[picture].images[0].get_array()).reshape(4, 5, channels)
        close(shown, values[picture].transpose(1, 2, 0) / 255)
    assert not axes[3].images


# Damage


@pytest.mark.parametrize("trials", [5, 1])
def test_damage_curves_accuracy(trials):
    table = campaign(trials)
    clean = pd.DataFrame({"network": NETWORKS, "accuracy": [0.9, 0.8]})
    axes = finished(plotting.damage_curves(table, "accuracy", clean))
    for axis, network, level in zip(axes, NETWORKS, (90, 80)):
        assert network.split("_")[0] in axis.get_title().lower()
        assert "digits" in axis.get_title()
        for index, repair in enumerate(("none", "clip")):
            own = table[(table["network"] == network) & (table["repair"] == repair)]
            groups = own.groupby("probability")["accuracy"]
            x, y = line(axis, plotting.label(repair))
            close([x, y], [[1e-4, 1e-3, 1e-2], 100 * groups.mean()])
            dots = [drawn for drawn in axis.lines if drawn.get_marker() == "."][index]
            close(sorted(dots.get_ydata()), sorted(100 * own["accuracy"]))
            assert np.all(np.abs(np.log10(dots.get_xdata() / own["probability"])) < 0.2)  # near their probability
            if trials > 1:
                drawn = band(axis.collections[index])
                for p, values in groups:
                    close(drawn[p], [100 * (values.mean() - half(values)), 100 * (values.mean() + half(values))])
        close(line(axis, "undamaged")[1], [level, level])


def test_damage_curves_of_many_repairs_have_their_legend_outside():
    table = campaign(3)
    table = table[table["repair"] == "none"]
    table = pd.concat([table.assign(repair=repair) for repair in ("none", "clip", "range", "vote")])
    axes = finished(plotting.damage_curves(table, "accuracy"))
    (legend,) = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        plotting.label(repair) for repair in ("none", "clip", "range", "vote")
    ]
    assert all(axis.get_legend() is None for axis in axes)


def test_damage_curves_loss_with_trials_that_are_not_finite():
    table = campaign(9)
    first = (table["network"] == NETWORKS[0]) & (table["repair"] == "none") & (table["probability"] == 1e-2)
    table.loc[first, "loss"] = [1, 2, 3, 4, 5, 6, np.nan, np.inf, 7.5]
    clean = pd.DataFrame({"network": NETWORKS, "loss": [0.3, 0.4]})
    axes = finished(plotting.damage_curves(table, "loss", clean))
    assert axes[0].get_yscale() == "log"
    x, y = line(axes[0], plotting.label("none"))
    assert y[list(x).index(1e-2)] == 5  # the fifth best of nine, where NaN and infinity are the worst
    low, high = band(axes[0].collections[0])[1e-2]
    assert (low, high) == (2, plotting.LARGEST_LOSS)  # the second and the eighth of nine hold the median in 96.1%
    own = table[(table["network"] == NETWORKS[1]) & (table["repair"] == "clip")]
    close(line(axes[1], plotting.label("clip"))[1], own.groupby("probability")["loss"].median())


def test_single_draws():
    table = campaign()
    axes = finished(plotting.single_draws(table, draws=3))
    for axis, network in zip(axes, NETWORKS):
        own = table[(table["network"] == network) & (table["repair"] == "none")]
        grey = [drawn for drawn in axis.lines if drawn.get_color() == "0.6"]
        assert len(grey) == 3
        for trial, drawn in enumerate(grey):
            close(drawn.get_ydata(), 100 * own[own["trial"] == trial]["accuracy"])
        x, y, low, high = bars(axis, "mean of 5 trials")
        groups = own.groupby("probability")["accuracy"]
        close([x, y], [[1e-4, 1e-3, 1e-2], 100 * groups.mean()])
        close(high - low, [200 * half(values) for _, values in groups])


def test_against_published():
    rows = [
        dict(network=network, repair=repair, probability=p, source=source, rate=0.9 - 10 * p - 0.1 * len(source))
        | dict(half=np.nan if source == "published" else 0.02)
        for network, source, repair, p in product(NETWORKS, ["published", "ours"], ["none", "clip"], [1e-4, 1e-2])
    ]
    table = pd.DataFrame(rows)
    for axis in finished(plotting.against_published(table)):
        x, y, low, high = bars(axis, "ours, damaged")
        close([x, y], [[1e-4, 1e-2], [0.499, 0.4]])
        close(high - low, [0.04, 0.04])
        (found,) = [drawn for drawn in axis.containers if drawn.get_label() == "published, damaged, then clipped"]
        close(found.lines[0].get_ydata(), [-0.001, -0.1])
        assert found.lines[2] == ()  # one draw has no interval


def test_float_flips():
    rows = [
        dict(stored=1.0, bit=31, part="sign", value=-1.0),
        dict(stored=1.0, bit=30, part="exponent", value=math.inf),
        dict(stored=1.0, bit=23, part="exponent", value=0.5),
        dict(stored=1.0, bit=0, part="mantissa", value=1.0000001),
        dict(stored=0.1, bit=31, part="sign", value=-0.1),
        dict(stored=0.1, bit=30, part="exponent", value=3.4e37),
    ]
    one, tenth = finished(plotting.float_flips(pd.DataFrame(rows)))
    close(line(one, "sign"), [[31], [1]])
    close(line(one, "exponent"), [[23], [0.5]])
    close(line(one, "infinite or NaN")[0], [30])
    close(line(tenth, "exponent"), [[30], [3.4e37]])
    assert len(line(tenth, "infinite or NaN")[0]) == 0


# Binarization


def test_sign_and_gradient():
    x = np.linspace(-2, 2, 9)
    table = pd.DataFrame({"x": x, "sign": np.where(x >= 0, 1, -1), "hardtanh": x.clip(-1, 1)})
    table["slope of sign, h = 1"] = np.where(abs(x) < 1, 1, 0)
    table["slope of sign, h = 0.1"] = np.where(abs(x) < 0.1, 10, 0)
    table["straight-through gradient"] = np.where(abs(x) <= 1, 1, 0)
    functions, slopes = finished(plotting.sign_and_gradient(table))
    close([drawn.get_ydata() for drawn in functions.lines], [table["sign"], table["hardtanh"]])
    for name in table.columns[3:]:
        close(line(slopes, name), [x, table[name]])
    assert len(slopes.lines) == 3


def test_latent_weights_marks_every_sign_change():
    paths = {0: [0.1, 0.0, -0.1, -0.2, 0.3], 1: [-0.5, -0.4, -0.6, -0.5, -0.4]}
    rows = [
        dict(lr=lr, step=step, weight=weight, value=value)
        for lr, (weight, path) in product((0.1, 1.0), paths.items())
        for step, value in enumerate(path)
    ]
    for axis in finished(plotting.latent_weights(pd.DataFrame(rows))):
        whole = [drawn for drawn in axis.lines if len(drawn.get_xdata()) == 5]
        close([drawn.get_ydata() for drawn in whole], list(paths.values()))
        dots = [drawn for drawn in axis.lines if drawn.get_marker() == "o"]
        assert [list(drawn.get_xdata()) for drawn in dots] == [[2, 4], []]  # 0.0 counts as +1
        assert axis.get_title().endswith("sign flips: 2")


def test_bit_squares():
    bits = {"a": [[0, 1], [1, 1]], "b": [[1, 0], [0, 1]]}
    rows = [
        dict(panel=panel, row=row, column=column, bit=bit)
        for panel, square in bits.items()
        for (row, column), bit in np.ndenumerate(np.array(square))
    ]
    for axis, (panel, square) in zip(finished(plotting.bit_squares(pd.DataFrame(rows))), bits.items()):
        assert axis.get_title() == panel
        close(axis.images[0].get_array(), square)
        assert texts(axis) == [str(bit) for row in square for bit in row]


# The ResNet


def test_diagram():
    rows = [
        ("in", 0, 0, "input", "real", ""),
        ("conv", 1, 0, "3x3", "whole", "in"),
        ("sign", 2, 0, "sign", "sign", "conv"),
        ("short", 1, 1, "shortcut", "real", "in"),
        ("add", 3, 0, "+", "real", "sign short"),
    ]
    table = pd.DataFrame(rows, columns=["name", "x", "y", "text", "values", "after"])
    (axis,) = finished(plotting.diagram(table))
    assert sorted(texts(axis)) == sorted(table["text"])
    assert len(axis.texts) - len(texts(axis)) == 5  # arrows


def test_branch_sizes():
    sizes = {"convolution": [20.0, 10.0], "shortcut": [1.0, 2.0], "sqrt_n": [7.0, 8.0]}
    (axis,) = finished(plotting.branch_sizes(pd.DataFrame({"block": ["1.0", "1.1"], **sizes})))
    close(line(axis, "convolutions")[1], sizes["convolution"])
    close(line(axis, "shortcut")[1], sizes["shortcut"])
    close(line(axis, "$\\sqrt{n}$")[1], sizes["sqrt_n"])
    assert texts(axis) == ["5%", "20%"]


def test_gradient_sizes():
    rng = np.random.default_rng(4)
    rows = product(["resnet_binary", "without shortcuts"], range(4), ["1.0", "2.0"])
    table = pd.DataFrame(rows, columns=["network", "seed", "block"])
    table["gradient"] = rng.lognormal(size=len(table))
    (axis,) = finished(plotting.gradient_sizes(table))
    for name in ("resnet_binary", "without shortcuts"):
        _, y, low, high = bars(axis, plotting.label(name))
        for place, block in enumerate(["1.0", "2.0"]):
            logs = np.log(table[(table["network"] == name) & (table["block"] == block)]["gradient"])
            close(y[place], np.exp(logs.mean()))
            close([low[place], high[place]], np.exp([logs.mean() - half(logs), logs.mean() + half(logs)]))


# What makes BNNs train


def test_variants():
    table = seeds("variant", ["affine", "none"])
    final, way = finished(plotting.variants(table))
    assert [text.get_text() for text in final.get_yticklabels()] == ["affine", "none"]
    for index, name in enumerate(["affine", "none"]):
        groups = table[table["variant"] == name].groupby("epoch")["validation_accuracy"]
        last = 100 * groups.get_group(3)
        points, _, (segments, *_) = final.containers[index].lines
        close(points.get_xdata(), [last.mean()])
        close(segments.get_segments()[0][:, 0], [last.mean() - half(last), last.mean() + half(last)])
        dots = [drawn for drawn in final.lines if drawn.get_marker() == "."][index]
        close(dots.get_xdata(), last)
        close(way.lines[index].get_ydata(), 100 * groups.mean())
        for epoch, values in groups:
            close(band(way.collections[index])[epoch], 100 * (values.mean() + half(values) * np.array([-1, 1])))


def test_gains():
    rng = np.random.default_rng(3)
    table = pd.DataFrame(product(["published", "smoothed"], range(4)), columns=["variant", "seed"])
    table["validation_accuracy"] = rng.uniform(0.5, 1, 8)
    table["gain"] = [np.nan] * 4 + list(rng.uniform(-0.1, 0.1, 4))
    accuracy, gain = finished(plotting.gains(table))
    assert [text.get_text() for text in accuracy.get_yticklabels()] == ["published", "smoothed"]
    for axis, value, drawn in (
        (accuracy, "validation_accuracy", ["published", "smoothed"]),
        (gain, "gain", ["smoothed"]),
    ):
        assert len(axis.containers) == len(drawn)
        dots = [line for line in axis.lines if line.get_marker() == "."]
        for name, container, points in zip(drawn, axis.containers, dots, strict=True):
            values = 100 * table.loc[table["variant"] == name, value]
            middle, _, (segments, *_) = container.lines
            close(middle.get_xdata(), [values.mean()])
            close(middle.get_ydata(), [["published", "smoothed"].index(name)])
            close(segments.get_segments()[0][:, 0], [values.mean() - half(values), values.mean() + half(values)])
            close(points.get_xdata(), values)


def grid():
    rng = np.random.default_rng(5)
    rows = product(["adam", "sgd"], [0.0, 1e-4, 1e-5], [1e-2, 1e-3])
    table = pd.DataFrame(rows, columns=["optimizer", "weight_decay", "learning_rate"])
    for name in ("validation_accuracy", "sign_flips"):
        table[name] = rng.uniform(0.2, 0.9, len(table))
        table[f"{name}_half"] = rng.uniform(0.01, 0.1, len(table))
    return table


def test_rate_and_decay():
    table = grid()
    axes = finished(plotting.rate_and_decay(table))
    for axis, optimizer in zip(axes, ("adam", "sgd")):
        own = table[table["optimizer"] == optimizer].set_index(["weight_decay", "learning_rate"])
        expected = [[own.loc[(decay, rate)] for rate in (1e-3, 1e-2)] for decay in (0.0, 1e-5, 1e-4)]
        close(axis.images[0].get_array(), [[100 * cell["validation_accuracy"] for cell in row] for row in expected])
        assert [float(text.get_text()) for text in axis.get_xticklabels()] == [1e-3, 1e-2]
        assert [float(text.get_text()) for text in axis.get_yticklabels()] == [0, 1e-5, 1e-4]
        for text, cell in zip(texts(axis), [cell for row in expected for cell in row]):
            mean, width = map(float, text.split(" ± "))
            assert mean == pytest.approx(100 * cell["validation_accuracy"], abs=0.51)
            assert width == pytest.approx(100 * cell["validation_accuracy_half"], abs=0.51)


def test_flips_against_rate():
    table = grid()
    for axis, optimizer in zip(finished(plotting.flips_against_rate(table)), ("adam", "sgd")):
        for decay in (0.0, 1e-5, 1e-4):
            own = table[(table["optimizer"] == optimizer) & (table["weight_decay"] == decay)]
            x, y, low, high = bars(axis, f"{decay:g}")
            close(y, 100 * own["sign_flips"])
            close(high - low, 200 * own["sign_flips_half"])
            assert np.all(np.abs(np.log(x.astype(float) / own["learning_rate"])) < 0.2)


def test_accuracy_against_flips():
    rng = np.random.default_rng(6)
    rows = product(["adam", "sgd"], [0.0, 1e-4], [1e-2, 1e-3], range(3))
    table = pd.DataFrame(rows, columns=["optimizer", "weight_decay", "learning_rate", "seed"])
    table = table.assign(flips=rng.uniform(1, 2, len(table)), validation_accuracy=rng.uniform(0.4, 0.6, len(table)))
    (axis,) = finished(plotting.accuracy_against_flips(table))
    for optimizer, index in [("adam", 0), ("sgd", 1)]:
        own = table[table["optimizer"] == optimizer]
        (found,) = [drawn for drawn in axis.containers if drawn.get_label() == plotting.label(optimizer)]
        points, _, (across, along) = found.lines
        groups = own.groupby(["weight_decay", "learning_rate"], sort=False)
        close(points.get_xdata(), groups["flips"].mean())
        close(points.get_ydata(), 100 * groups["validation_accuracy"].mean())
        for place, (_, group) in enumerate(groups):
            close(np.diff(across.get_segments()[place][:, 0]), [2 * half(group["flips"])])
            close(np.diff(along.get_segments()[place][:, 1]), [200 * half(group["validation_accuracy"])])
        dots = [drawn for drawn in axis.lines if drawn.get_marker() == "."][index]
        close(dots.get_xdata(), own["flips"])
        assert to_hex(dots.get_color()) == to_hex(f"C{index}")


# One bit per weight


def test_packed_filter():
    rng = np.random.default_rng(6)
    bits = rng.integers(0, 2, (9, 64))
    bits[:, 40:] = 0
    rows = [
        dict(tap=tap, bit=bit, sign=2 * value - 1 if bit < 40 else np.nan, word=f"word {tap}")
        for (tap, bit), value in np.ndenumerate(bits)
    ]
    square, words = finished(plotting.packed_filter(pd.DataFrame(rows)))
    close(square.images[0].get_array(), 2 * bits[:, 0].reshape(3, 3) - 1)
    assert texts(square) == ["+1" if bit else "-1" for bit in bits[:, 0]]
    shown = words.images[0].get_array()
    assert np.ma.getmaskarray(shown)[:, ::-1].sum(0).tolist() == [0] * 40 + [9] * 24
    close(shown[:, ::-1][:, :40], 2 * bits[:, :40] - 1)
    assert texts(words) == [f"word {tap}" for tap in range(9)]
    for place, tick in zip(words.get_xticks(), words.get_xticklabels(), strict=True):
        assert place == 63 - int(tick.get_text())  # the lowest bit is the rightmost
    assert "unused" in words.get_title()


def test_packed_filter_of_full_words():
    rows = [dict(tap=tap, bit=bit, sign=(-1) ** bit, word="") for tap, bit in product(range(9), range(64))]
    _, words = finished(plotting.packed_filter(pd.DataFrame(rows)))
    assert not np.ma.getmaskarray(words.images[0].get_array()).any()
    assert "unused" not in words.get_title()


def test_thresholds():
    rows = [
        dict(panel=panel, integer=integer, value=slope * (integer - 2.5), share=share, threshold=3, inverted=slope < 0)
        for panel, slope in (("rises", 0.5), ("falls", -0.25), ("again", 1.0))
        for integer, share in zip(range(-4, 9, 2), [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1])
    ]
    table = pd.DataFrame(rows)
    axes = finished(plotting.thresholds(table))
    assert [axis.get_visible() for axis in axes] == [True, True, True, False]
    for axis, (panel, own) in zip(axes, table.groupby("panel", sort=False)):
        assert axis.get_title() == panel
        close(line(axis, "after BatchNorm"), [own["integer"], own["value"]])
        close(line(axis, "threshold")[0], [2.5, 2.5])  # between the last integer on one side and the first on the other
        ones, *bars = axis.patches
        low, high = ones.get_x(), ones.get_x() + ones.get_width()
        tinted = (own["integer"] > low) & (own["integer"] < high)
        assert tinted.tolist() == (own["value"] >= 0).tolist()
        close([bar.get_height() / bars[3].get_height() for bar in bars], own["share"] / 0.4)


def test_thresholds_of_many_integers():
    integers = np.arange(-200, 201, 2)
    table = pd.DataFrame(dict(integer=integers, value=integers / 9, share=1 / len(integers)))
    (axis, *_) = finished(plotting.thresholds(table.assign(panel="wide", threshold=3, inverted=False)))
    _, *bars = axis.patches
    close([bar.get_x() + bar.get_width() for bar in bars[:-1]], [bar.get_x() for bar in bars[1:]])  # no gaps


def test_memory():
    sizes = {"first": [4000, 1000, 300], "second": [2e6, 5e5, 7e4]}
    rows = [
        dict(layer=layer, storage=storage, bytes=size)
        for layer, own in sizes.items()
        for storage, size in zip(["float32", "int8", "packed"], own)
    ]
    (axis,) = finished(plotting.memory(pd.DataFrame(rows)))
    assert [text.get_text() for text in axis.get_yticklabels()] == list(sizes)
    for index, name in enumerate(["float32: 2.0 MB", "int8: 0.5 MB", "packed: 0.1 MB"]):
        close(line(axis, name), [[own[index] for own in sizes.values()], [0, 1]])
    assert axis.yaxis_inverted() and axis.get_xscale() == "log"


def test_damaged_storage():
    rng = np.random.default_rng(7)
    rows = product(NETWORKS, ["float32", "packed"], [1e-3, 1e-2], range(4))
    table = pd.DataFrame(rows, columns=["network", "memory", "probability", "trial"]).assign(dataset="digits")
    table["flips"] = rng.integers(1000, 9000, len(table))
    table["accuracy"] = rng.uniform(0.3, 0.9, len(table))
    axes = finished(plotting.damaged_storage(table))
    for column, network in enumerate(NETWORKS):
        for memory in ("float32", "packed"):
            groups = table[(table["network"] == network) & (table["memory"] == memory)].groupby("probability")
            for axis, x in zip((axes[column], axes[column + 2]), ([1e-3, 1e-2], groups["flips"].mean())):
                seen, y, low, high = bars(axis, memory)
                close([seen, y], [x, 100 * groups["accuracy"].mean()])
                close(high - low, [200 * half(values) for _, values in groups["accuracy"]])


def test_error_models():
    rng = np.random.default_rng(8)
    rows = product(["equal p", "equal flips"], NETWORKS, ["flip", "burst"], range(4))
    table = pd.DataFrame(rows, columns=["equal", "network", "error", "trial"])
    table["accuracy"] = rng.uniform(0.3, 0.9, len(table))
    axes = finished(plotting.error_models(table))
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["flip", "burst"]
    for axis, panel in zip(axes, ["equal p", "equal flips"]):
        assert axis.get_title() == panel
        for network in NETWORKS:
            groups = table[(table["equal"] == panel) & (table["network"] == network)].groupby("error", sort=False)
            (found,) = [drawn for drawn in axis.containers if drawn.get_label() == plotting.label(network)]
            points, _, (segments,) = found.lines
            assert [round(y) for y in points.get_ydata()] == [0, 1]
            close(points.get_xdata(), 100 * groups["accuracy"].mean())
            widths = [end[0] - start[0] for start, end in segments.get_segments()]
            close(widths, [200 * half(values) for _, values in groups["accuracy"]])


def test_ranked():
    rng = np.random.default_rng(20)
    table = pd.DataFrame(product(NETWORKS, ["a", "b", "c"], range(5)), columns=["network", "what", "trial"])
    table["lost"] = rng.uniform(0, 0.1, len(table)) + 0.2 * (table["what"] == "b")
    axes = finished(plotting.ranked(table))
    for axis, network in zip(axes, NETWORKS):
        assert axis.get_title() == plotting.label(network)
        groups = table[table["network"] == network].groupby("what")["lost"]
        order = groups.mean().sort_values()
        assert [text.get_text() for text in axis.get_yticklabels()] == list(order.index)
        assert order.index[-1] == "b"  # the dearest on top
        close([patch.get_width() for patch in axis.patches], 100 * order)
        (drawn,) = [held for held in axis.containers if hasattr(held, "lines")]
        widths = [end[0] - start[0] for start, end in drawn.lines[2][0].get_segments()]
        close(widths, [200 * half(groups.get_group(what)) for what in order.index])


def test_ranked_of_single_rows_has_no_intervals():
    table = pd.DataFrame(dict(network=NETWORKS[0], what=["a", "b"], lost=[0.1, -0.02]))
    (axis,) = finished(plotting.ranked(table))
    close([patch.get_width() for patch in axis.patches], [-2, 10])


def test_layers_and_kinds():
    rows = [
        dict(network=network, layer=f"{layer} of {network}", kind=kind, lost=0.01 * (layer + 1) * trial)
        for network, layers in zip(NETWORKS, (3, 2))
        for layer, kind, trial in product(range(layers), ("weights", "biases"), (1, 2, 6))
        if (layer, kind) != (1, "biases")
    ]
    axes = finished(plotting.layers_and_kinds(pd.DataFrame(rows)))
    for axis, network, layers in zip(axes, NETWORKS, (3, 2)):
        shown = np.ma.filled(axis.images[0].get_array(), np.nan)
        expected = np.array([[3.0 * (layer + 1)] * 2 for layer in range(layers)])
        expected[1, 1] = np.nan
        close(shown, expected)
        assert [text.get_text() for text in axis.get_yticklabels()] == [f"{i} of {network}" for i in range(layers)]
        assert [text.get_text() for text in axis.get_xticklabels()] == ["weights", "biases"]
        assert texts(axis) == [f"{value:.1f}" for value in expected.ravel() if np.isfinite(value)]


def test_bit_positions():
    rng = np.random.default_rng(21)
    table = pd.DataFrame(product(NETWORKS, ["31", "30", "29 to 0"], range(4)), columns=["network", "bits", "trial"])
    table["lost"] = rng.uniform(0, 0.5, len(table))
    (axis,) = finished(plotting.bit_positions(table))
    assert [text.get_text() for text in axis.get_xticklabels()] == ["31", "30", "29 to 0"]
    for network in NETWORKS:
        x, y, low, high = bars(axis, plotting.label(network))
        groups = [own for _, own in table[table["network"] == network].groupby("bits", sort=False)["lost"]]
        assert [round(place) for place in x] == [0, 1, 2]
        close(y, [100 * own.mean() for own in groups])
        close(high - low, [200 * half(own) for own in groups])


def test_outputs():
    rows = [
        dict(panel=panel, image=image, output=output, value=factor * (image - output))
        for (panel, factor), image, output in product([("before", 1.0), ("after", 1e38)], range(6), range(3))
    ]
    table = pd.DataFrame(rows)
    table.loc[0, "value"] = np.nan
    axes = finished(plotting.outputs(table))
    for axis, panel in zip(axes, ("before", "after")):
        assert axis.get_title() == panel
        own = table[table["panel"] == panel].pivot(index="output", columns="image", values="value")
        close(np.ma.filled(axis.images[0].get_array(), np.nan), own)
        assert axis.images[0].get_clim() == (-4, 4)


def test_wrong_signs():
    rows = [
        dict(network=network, layer=layer, probability=p, share=p * (i + 1), share_half=p / 4, predicted=p * (i + 2))
        for network, p, (i, layer) in product(NETWORKS, (1e-3, 1e-2), enumerate(["one", "two", "three"]))
    ]
    axes = finished(plotting.wrong_signs(pd.DataFrame(rows)))
    for axis, network in zip(axes, NETWORKS):
        assert axis.get_title() == plotting.label(network) and axis.get_yscale() == "log"
        assert [text.get_text() for text in axis.get_xticklabels()] == ["one", "two", "three"]
        for index, p in enumerate((1e-3, 1e-2)):
            _, y, low, high = bars(axis, f"$p$ = {p:g}")
            close(y, 100 * p * np.array([1, 2, 3]))
            close(high - low, 3 * [50 * p])
            dashed = [drawn for drawn in axis.lines if drawn.get_linestyle() == "--" and len(drawn.get_xdata())]
            close(dashed[index].get_ydata(), 100 * p * np.array([2, 3, 4]))


def test_clipping():
    rng = np.random.default_rng(22)
    numbers = pd.DataFrame(product(NETWORKS, ["bn_scale", "bn_shift"], range(50)), columns=["network", "kind", "value"])
    numbers["value"] = rng.normal(1, 0.3, len(numbers))
    parts = pd.DataFrame(product(NETWORKS, ["all", "only shifts"]), columns=["network", "what"])
    parts["lost"] = [0.2, 0.05, 0.3, -0.01]
    costs = pd.DataFrame(product(NETWORKS, (0.5, 1.0, 2.0)), columns=["network", "bound"])
    costs["lost"] = 0.1 / costs["bound"] + 0.01 * (costs["network"] == NETWORKS[1])
    values, part, cost = finished(plotting.clipping(numbers, parts, costs))
    assert [text.get_text() for text in part.get_yticklabels()] == ["all", "only shifts"]
    assert [float(text) for text in texts(part)] == [20, 5, 30, -1]
    for network in NETWORKS:
        own = costs[costs["network"] == network]
        x, y = line(cost, plotting.label(network))
        close(x, own["bound"])
        close(y, 100 * own["lost"])
        (drawn,) = [held for held in part.containers if held.get_label() == plotting.label(network)]
        close([bar.get_width() for bar in drawn], 100 * parts.loc[parts["network"] == network, "lost"])
        assert [round(bar.get_y() + bar.get_height() / 2) for bar in drawn] == [0, 1]
        for kind in ("bn_scale", "bn_shift"):
            (outline,) = [x for x in values.patches if x.get_label() == f"{plotting.label(network)}, {kind}"]
            edges = np.linspace(numbers["value"].min(), numbers["value"].max(), 41)
            own = numbers.loc[(numbers["network"] == network) & (numbers["kind"] == kind), "value"]
            heights, _ = np.histogram(own, edges, density=True)
            close(outline.get_xy()[:, 1].max(), heights.max())


def test_trial_spread():
    rng = np.random.default_rng(23)
    table = pd.DataFrame(dict(network=np.repeat(NETWORKS, 40), accuracy=rng.uniform(0.1, 0.9, 80)))
    coverage = pd.DataFrame(product(NETWORKS, (3, 10, 30)), columns=["network", "trials"])
    coverage["coverage"] = 0.95 - 1 / coverage["trials"]
    spread, held = finished(plotting.trial_spread(table, coverage))
    assert [patch.get_label() for patch in spread.patches] == [plotting.label(network) for network in NETWORKS]
    for patch, network in zip(spread.patches, NETWORKS):
        counts, _ = np.histogram(100 * table.loc[table["network"] == network, "accuracy"], np.linspace(0, 100, 41))
        assert patch.get_xy()[:, 1].max() == counts.max()
        x, y = line(held, plotting.label(network))
        close(x, [3, 10, 30])
        close(y, 95 - 100 / np.array([3, 10, 30]))


def test_stopping():
    rows = [(1e-2, 30, 0.05), (1e-2, 60, 0.02), (1e-4, 30, 0.015)]
    reached, spent = finished(plotting.stopping(pd.DataFrame(rows, columns=["probability", "trials", "half"]), 0.02))
    x, y = line(reached, "p = 0.01")
    close(x, [30, 60])
    close(y, [5, 2])
    close(reached.lines[-1].get_ydata(), [2, 2])
    assert [bar.get_height() for bar in spent.patches] == [60, 30]
    assert [text.get_text() for text in spent.get_xticklabels()] == ["0.01", "0.0001"]


def test_coverage():
    table = pd.DataFrame(product(["t", "bounded"], [0.003, 0.03]), columns=["interval", "share"])
    table["coverage"], table["trials"] = [0.1, 0.6, 0.99, 0.95], [30, 60, 240, 400]
    held, spent = finished(plotting.coverage(table))
    for name, own in table.groupby("interval"):
        for axis, values in ((held, 100 * own["coverage"]), (spent, own["trials"])):
            x, y = line(axis, name)
            close(x, [0.3, 3])
            close(y, values)


def test_throughput():
    table = pd.DataFrame(dict(way=["one process", "two processes"], trials_per_second=[20.0, 38.0]))
    (axis,) = finished(plotting.throughput(table))
    assert [bar.get_width() for bar in axis.patches] == [20, 38]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["one process", "two processes"]


def test_accuracy_against_bits():
    rng = np.random.default_rng(30)
    rows = product(NETWORKS, [("packed", 10), ("float32", 320)], [("none", 1), ("vote", 3)], range(4))
    table = pd.DataFrame(
        [
            dict(network=network, storage=storage, bits=bits * factor, repair=repair, trial=trial)
            for network, (storage, bits), (repair, factor), trial in rows
        ]
    )
    table["accuracy"] = rng.uniform(0.2, 0.9, len(table))
    axes = finished(plotting.accuracy_against_bits(table))
    for axis, network in zip(axes, NETWORKS):
        assert axis.get_title() == plotting.label(network) and axis.get_xscale() == "log"
        assert texts(axis) == ["packed", "float32"]
        for repair, factor in (("none", 1), ("vote", 3)):
            x, y, low, high = bars(axis, plotting.label(repair))
            own = table[(table["network"] == network) & (table["repair"] == repair)]
            groups = [group for _, group in own.groupby("bits")["accuracy"]]
            close(x, [10 * factor, 320 * factor])
            close(y, [100 * group.mean() for group in groups])
            close(high - low, [200 * half(group) for group in groups])


def test_trained_for_errors():
    rng = np.random.default_rng(31)
    rows = product(["plain", "errors"], (0.0, 0.01, 0.1), range(3))
    table = pd.DataFrame(rows, columns=["training", "probability", "seed"])
    table["accuracy"] = rng.uniform(0.2, 0.9, len(table))
    (axis,) = finished(plotting.trained_for_errors(table))
    assert [text.get_text() for text in axis.get_xticklabels()] == ["none", "0.01", "0.1"]
    for training in ("plain", "errors"):
        x, y, low, high = bars(axis, training)
        groups = [group for _, group in table[table["training"] == training].groupby("probability")["accuracy"]]
        assert [round(place) for place in x] == [0, 1, 2]
        close(y, [100 * group.mean() for group in groups])
        close(high - low, [200 * half(group) for group in groups])


def test_speed():
    rows = [
        dict(network=network, width=1.0, batch=batch, runtime=runtime, images_per_second=median)
        | dict(best_images_per_second=1.2 * median, machine="Some CPU, 4 CPUs; python 3", threads=3)
        for network, (batch, factor), (runtime, median) in product(
            NETWORKS, [(1, 1), (64, 4)], [("packed", 50.0), ("other", 20.0)]
        )
        for median in [median * factor]
    ]
    figure = plotting.speed(pd.DataFrame(rows[:-1]))  # of the last network, a runtime is missing at the last batch
    axes = finished(figure)
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["packed", "other"]
    for axis, last in zip(axes, (2, 1)):
        for batch, factor, count in ((1, 1, 2), (64, 4, last)):
            (found,) = [drawn for drawn in axis.containers if drawn.get_label() == f"batch {batch}"]
            points, _, (segments,) = found.lines
            close(points.get_xdata(), np.array([50, 20])[:count] * factor)
            assert [round(y) for y in points.get_ydata()] == [0, 1][:count]
            ends = [tuple(segment[:, 0]) for segment in segments.get_segments()]
            close(ends, np.outer([50, 20], [factor, 1.2 * factor])[:count])
    title = figure.get_suptitle()
    assert "Some CPU" in title and "python" not in title and "threads: 3" in title
