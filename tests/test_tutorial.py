"""What a notebook's first cell gives: profile, paths, networks of the right size, figures whole or not at all."""

import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from bnn_utils import campaign, checkpoints, data
from bnn_utils.training import Recipe, train
from course import tutorial
from course.tutorial import PROFILES, start


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Keep the style and the environment as they were; figures go to a temporary folder."""
    monkeypatch.delenv("BNN_PROFILE", raising=False)
    monkeypatch.delenv("BNN_DATA", raising=False)
    monkeypatch.setenv("BNN_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("BNN_NETWORKS", str(tmp_path / "networks"))
    with plt.rc_context():
        yield
    plt.close("all")


@pytest.fixture
def table():
    return pd.DataFrame({"x": [0, 1, 2], "y": [0.1, 0.30000000000000004, 1e-300]})


def drawn(table):
    figure, axis = plt.subplots()
    axis.plot(table["x"], table["y"])
    return figure


# start


def test_quick_is_the_default(tmp_path, capsys):
    settings = start()
    assert settings.profile == "quick"
    assert settings.sizes is PROFILES["quick"]
    assert settings.figures == tmp_path / "figures" / "quick"
    assert settings.data_path == Path(tutorial.__file__).parents[2] / "data"
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert "quick" in printed.out
    assert f"seed {settings.seed}" in printed.out
    assert printed.err == ""
    assert not (tmp_path / "figures").exists()  # nothing is made before there is a figure


def test_the_environment_chooses(monkeypatch, tmp_path):
    monkeypatch.setenv("BNN_PROFILE", "full")
    monkeypatch.setenv("BNN_DATA", str(tmp_path / "sets"))
    settings = start()
    assert settings.profile == "full"
    assert settings.sizes is PROFILES["full"]
    assert settings.figures == tmp_path / "figures" / "full"
    assert settings.data_path == tmp_path / "sets"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("BNN_DATA", "~/mine")
    assert start().data_path == tmp_path / "mine"
    monkeypatch.delenv("BNN_FIGURES")
    assert start().figures == Path(tutorial.__file__).parents[2] / "figures" / "full"


@pytest.mark.parametrize("profile", ["slow", "", "QUICK"])
def test_unknown_profile(monkeypatch, profile):
    monkeypatch.setenv("BNN_PROFILE", profile)
    with pytest.raises(ValueError, match=r"BNN_PROFILE.*quick"):
        start()


def test_start_seeds_and_sets_the_style():
    plt.rcParams["axes.grid"] = False
    settings = start()
    first = torch.rand(3)
    assert plt.rcParams["axes.grid"]
    start()
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(settings.seed)
    assert torch.equal(torch.rand(3), first)


# Networks


def test_networks_have_the_size_of_the_profile():
    settings, dataset = start(), data.digits()
    vgg, resnet = settings.network("vgg_cifar10_binary", dataset), settings.network("resnet_binary", dataset)
    assert vgg.features[0].weight.shape == (round(384 * settings.sizes.vgg_width), 1, 3, 3)
    assert resnet.conv1.weight.shape == (round(80 * settings.sizes.resnet_width), 1, 3, 3)
    for model in (vgg, resnet):
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_full_profile_is_the_published_size_and_recipe():
    full = PROFILES["full"]
    assert full.images == "cifar10" and not full.pretrained
    assert (full.dataset, full.vgg_width, full.resnet_width) == ("cifar10", 1.0, 1.0)
    assert full.recipe == Recipe(epochs=100, batch_size=256, lr=5e-3, weight_decay=0.0, optimizer="adam")


def test_networks_of_another_size_and_of_other_images():
    settings = start()
    dataset = data.digits()
    three = replace(dataset, test=replace(dataset.test, classes=("a", "b", "c")))
    model = settings.network("vgg_cifar10_binary", three, width=0.02)
    assert model.features[0].weight.shape == (8, 1, 3, 3)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert settings.network("resnet_binary", dataset, width=0.1, depth=8).config["depth"] == 8
    with pytest.raises(ValueError, match="width"):
        settings.network("resnet_binary", dataset, width=-1)


def test_networks_start_from_the_seed():
    settings = start()
    dataset = data.digits()
    one, other = (settings.network("resnet_binary", dataset, width=0.1).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    another = replace(settings, seed=1).network("resnet_binary", dataset, width=0.1).state_dict()
    assert not torch.equal(one["conv1.weight"], another["conv1.weight"])


# Networks and trials that ship


def test_images_are_those_that_the_shipped_networks_know():
    settings = start()
    assert settings.dataset().name == "digits" == settings.drawn_from
    images = settings.images()
    assert len(images) == 1000 and settings.drawn_from == "1,000 test images of CIFAR-10 (JPEG)"
    for folder in checkpoints.PRETRAINED.glob("*/"):
        images.check_trained(checkpoints.pretrained(folder.name)[1])


def test_shipped_networks_are_loaded():
    network = start().trained("vgg_cifar10")
    assert network.name == "vgg_cifar10_binary" and not network.training
    assert network.features[3].weight.abs().eq(1).all()


def test_shipped_trials_are_read():
    settings, path = start(), checkpoints.PRETRAINED / "vgg_cifar10" / "damage-packed.csv"
    table = settings.sweep("vgg_cifar10", "damage-packed", [1e-2], ["vote5-few-range"])
    every = pd.read_csv(path)
    wanted = every.query("repair == 'vote5-few-range' and probability == 0.01").reset_index(drop=True)
    assert len(wanted) == 50
    pd.testing.assert_frame_equal(table, wanted)
    for probabilities, repairs in (([1e-3], ["vote5-few-range"]), ([1e-2], ["vote5-few-range", "clip"])):
        with pytest.raises(ValueError, match="no trials"):
            settings.sweep("vgg_cifar10", "damage-packed", probabilities, repairs)
    with pytest.raises(ValueError, match="no trials"):
        settings.sweep("vgg_cifar10", "damage-packed", [1e-2], ["vote5-few-range"], storage="float32")


@pytest.fixture
def small(monkeypatch):
    """Settings that train, on digits, what they would otherwise take from checkpoints/."""
    settings, digits = start(), data.digits()
    facts = checkpoints.pretrained("vgg_cifar10_errors")[1]
    monkeypatch.setattr(data, "load", lambda *_: digits)
    shipped = checkpoints.pretrained("vgg_cifar10_errors")[0]
    facts = {"recipe": facts["recipe"]}  # digits fit no other fact
    monkeypatch.setattr(checkpoints, "pretrained", lambda name: (shipped, facts))
    recipe = Recipe(epochs=1, batch_size=512)
    sizes = replace(settings.sizes, pretrained=False, recipe=recipe, vgg_width=0.02, trials=2)
    return replace(settings, sizes=sizes)


def test_without_shipped_networks_they_are_trained_once_and_kept(small, monkeypatch):
    trainings = []
    monkeypatch.setattr(tutorial, "train", lambda *given: (trainings.append(given), train(*given)))
    one, other = (small.trained("vgg_cifar10_errors") for _ in range(2))
    assert not one.training and len(trainings) == 1
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert trainings[0][2].damage_rate == 0.03 and trainings[0][2].epochs == 1
    changed = replace(small, sizes=replace(small.sizes, recipe=replace(small.sizes.recipe, lr=1e-4)))
    changed.trained("vgg_cifar10_errors")
    assert len(trainings) == 2
    (small.networks / "vgg_cifar10_errors.safetensors").write_bytes(b"broken")
    small.trained("vgg_cifar10_errors")
    assert len(trainings) == 3


def test_without_shipped_networks_a_sweep_is_run(small):
    table = small.sweep("vgg_cifar10_errors", "no-file", [1e-2], ["range"])
    network = small.trained("vgg_cifar10_errors")
    how = dict(storage="packed", repairs=["range"], seed=small.seed)
    pd.testing.assert_frame_equal(table, campaign.run(network, small.images(), [1e-2], 2, **how))


# Sliders


def test_without_a_reader_only_the_first_picture_is_drawn(monkeypatch):
    monkeypatch.setenv("BNN_STATIC", "1")
    drawn = []
    tutorial.explore(drawn.append, "p", [1e-4, 1e-2], start=1)
    assert drawn == [1e-2]


def test_a_slider_draws_again_as_it_moves(monkeypatch):
    monkeypatch.delenv("BNN_STATIC", raising=False)
    shown, drawn = [], []
    monkeypatch.setattr(tutorial, "display", shown.append)
    tutorial.explore(lambda p: drawn.append(p), "p", [1e-4, 1e-2])
    (box,) = shown
    box.children[0].value = 1e-2
    assert drawn == [1e-4, 1e-2]


def test_a_click_on_a_bit_draws_again(monkeypatch):
    monkeypatch.delenv("BNN_STATIC", raising=False)
    shown, drawn = [], []
    monkeypatch.setattr(tutorial, "display", shown.append)
    tutorial.explore_bits(lambda bit: drawn.append(bit), start=30)
    (box,) = shown
    buttons = box.children[0]
    assert [position for _, position in buttons.options] == list(range(31, -1, -1))
    buttons.value = 0
    assert drawn == [30, 0]
    monkeypatch.setenv("BNN_STATIC", "1")
    tutorial.explore_bits(drawn.append, start=23)
    assert drawn == [30, 0, 23] and len(shown) == 1


# Figures


def test_a_figure_is_three_files(table):
    settings = start()
    settings.save_figure("05-accuracy-vs-probability", drawn(table), table)
    files = {path.name: path for path in settings.figures.iterdir()}
    assert set(files) == {f"05-accuracy-vs-probability.{kind}" for kind in ("png", "svg", "csv")}
    saved = pd.read_csv(files["05-accuracy-vs-probability.csv"], float_precision="round_trip")
    pd.testing.assert_frame_equal(saved, table, check_exact=True)
    with Image.open(files["05-accuracy-vs-probability.png"]) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 2  # not blank
    assert ElementTree.parse(files["05-accuracy-vs-probability.svg"]).getroot().tag.endswith("svg")


def test_a_figure_of_several_tables_tells_them_apart(table):
    settings = start()
    settings.save_figure("05-a", drawn(table), {"shipped": table, "yours": table.iloc[:1].assign(z=5)})
    written = pd.read_csv(settings.figures / "05-a.csv")
    assert list(written["whose"]) == ["shipped"] * 3 + ["yours"] and written["z"].dropna().tolist() == [5]


@pytest.mark.parametrize(("source", "says"), [("", "digits"), ("a benchmark", "a benchmark")])
def test_a_figure_says_what_it_was_drawn_from(table, source, says):
    settings = start()
    settings.dataset()
    figure = drawn(table)
    settings.save_figure("05-a", figure, table, source=source)
    assert [text.get_text() for text in figure.texts] == [says]


@pytest.mark.parametrize(
    "name",
    ["", "05", "accuracy", "5-accuracy", "05-Accuracy", "05_accuracy", "05-a/b", "../05-a", "05-a\n", "05-a.png"],
)
def test_names_of_another_form(table, tmp_path, name):
    with pytest.raises(ValueError, match="name"):
        start().save_figure(name, drawn(table), table)
    assert not (tmp_path / "figures").exists()


def test_a_figure_without_a_table(table, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        start().save_figure("05-a", drawn(table), table.iloc[:0])
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("failing", ["png", "svg", "csv"])
def test_failing_half_way_leaves_the_old_files_whole(table, monkeypatch, failing):
    settings = start()
    settings.save_figure("05-a", drawn(table), table)
    before = {path.name: path.read_bytes() for path in settings.figures.iterdir()}
    savefig = Figure.savefig

    def half(self, path, *, format, **arguments):
        if format != failing:
            return savefig(self, path, format=format, **arguments)
        whole = io.BytesIO()
        savefig(self, whole, format=format, **arguments)
        Path(path).write_bytes(whole.getvalue()[:100])
        raise OSError("disk full")

    def half_table(self, path, **arguments):
        Path(path).write_text("x,")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    if failing == "csv":
        monkeypatch.setattr(pd.DataFrame, "to_csv", half_table)
    changed = table.assign(y=table["y"] + 1)
    with pytest.raises(OSError, match="disk full"):
        settings.save_figure("05-a", drawn(changed), changed)
    after = {path.name: path.read_bytes() for path in settings.figures.iterdir()}
    assert after.keys() == before.keys()
    assert after[f"05-a.{failing}"] == before[f"05-a.{failing}"]
