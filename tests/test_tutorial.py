"""What a notebook's first cell gives: profile, paths, networks of the right size, figures whole or not at all."""

import hashlib
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


def test_dataset_and_trained(monkeypatch):
    settings = start()
    assert settings.dataset().name == "digits"
    recipe = Recipe(epochs=1, batch_size=512)
    settings = replace(settings, sizes=replace(settings.sizes, recipe=recipe, vgg_width=0.02))
    dataset = settings.dataset()
    trainings = []
    monkeypatch.setattr(tutorial, "train", lambda *given: (trainings.append(given), train(*given)))
    one, other = (settings.trained("vgg_cifar10_binary", dataset) for _ in range(2))
    assert not one.training and not other.training and len(trainings) == 1  # the second is the first, kept
    untrained = settings.network("vgg_cifar10_binary", dataset).state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert not torch.equal(one.state_dict()["features.3.weight"], untrained["features.3.weight"])
    for changed in (
        replace(settings, seed=1),
        replace(settings, sizes=replace(settings.sizes, recipe=replace(recipe, lr=1e-4))),
        replace(settings, sizes=replace(settings.sizes, vgg_width=0.03)),
    ):
        other = changed.trained("vgg_cifar10_binary", dataset)  # of another training, so nothing kept is of use
        assert not torch.equal(
            other.state_dict()["features.3.weight"].flatten()[:9], one.features[3].weight.flatten()[:9]
        )
    assert len(trainings) == 4
    (settings.networks / "vgg_cifar10_binary.safetensors").write_bytes(b"broken")
    again = settings.trained("vgg_cifar10_binary", dataset)
    assert torch.equal(again.features[3].weight, one.features[3].weight)


# Networks and trials that are there already


@pytest.mark.parametrize(("name", "width"), [("vgg_cifar10_binary", "vgg_width"), ("resnet_binary", "resnet_width")])
def test_the_cifar10_profile_is_of_the_shipped_networks(name, width):
    profile, (model, facts) = PROFILES["cifar10"], checkpoints.pretrained(tutorial.SHIPPED[name])
    assert model.name == name and model.config["width"] == getattr(profile, width)
    assert facts["dataset"].startswith("CIFAR-10") and facts["recipe"]["lr"] == profile.recipe.lr


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """Settings whose pretrained VGG and its trials lie in a folder of our own; the images are digits."""
    settings = start()
    sizes = replace(settings.sizes, pretrained=True, trials=3, vgg_width=0.02)
    settings, dataset = replace(settings, sizes=sizes), settings.dataset()
    network = settings.network("vgg_cifar10_binary", dataset).eval()
    folder = tmp_path / "checkpoints" / "vgg_cifar10"
    folder.mkdir(parents=True)
    checkpoints.save_packed(folder / "network.safetensors", network, mean=[0.25], std=[0.5])
    digest = hashlib.sha256((folder / "network.safetensors").read_bytes()).hexdigest()
    (folder.parent / "SHA256SUMS").write_text(f"{digest}  vgg_cifar10/network.safetensors\n")
    monkeypatch.setattr(checkpoints, "PRETRAINED", folder.parent)
    network, images = settings.trained("vgg_cifar10_binary", dataset), settings.dataset().test
    table = campaign.run(network, images, [1e-4, 1e-2, 1e-1], 4, repairs=["none", "clip"], seed=settings.seed)
    table.to_csv(folder / "damage-float32.csv", index=False)
    return settings, folder, table


def test_pretrained_networks_are_loaded_and_see_their_normalization(shipped, monkeypatch):
    settings, _, _ = shipped
    monkeypatch.setattr(tutorial, "train", None)
    dataset = settings.dataset()
    assert dataset.test.mean == dataset.train.mean == (0.25,) and dataset.test.std == (0.5,)
    network = settings.trained("vgg_cifar10_binary", dataset)
    assert not network.training and network.features[3].weight.abs().eq(1).all()
    assert settings.ablation_data().name == "digits"


def test_a_sweep_is_read_and_checked(shipped, capsys):
    settings, folder, table = shipped
    network, images = settings.trained("vgg_cifar10_binary", settings.dataset()), settings.dataset().test
    read = settings.sweep(network, images, [1e-4, 1e-2], ["none", "clip"])
    wanted = table[(table["probability"] < 0.1) & (table["trial"] < 3)].reset_index(drop=True)
    pd.testing.assert_frame_equal(read, wanted)
    assert capsys.readouterr().out == "12 trials read from checkpoints/vgg_cifar10, 4 computed anew: they agree\n"
    pd.testing.assert_frame_equal(settings.sweep(network, images, [1e-4, 1e-3, 1e-2], ["none", "clip"]), wanted)
    for probabilities, repairs in (([1e-3], ["none"]), ([1e-4], ["none", "range"])):
        with pytest.raises(ValueError, match="not all trials"):
            settings.sweep(network, images, probabilities, repairs)
    first = (table["trial"] == 0) & (table["probability"] == 1e-2)
    table.assign(accuracy=table["accuracy"].where(~first, table["accuracy"] + 1e-3)).to_csv(
        folder / "damage-float32.csv", index=False
    )
    with pytest.raises(ValueError, match="computed anew differ"):
        settings.sweep(network, images, [1e-4, 1e-2], ["none", "clip"])


def test_a_sweep_of_another_table_storage_and_number_of_trials(shipped, capsys):
    settings, folder, table = shipped
    network, images = settings.trained("vgg_cifar10_binary", settings.dataset()), settings.dataset().test
    how = dict(storage="packed", repairs=["none", "range"], seed=settings.seed)
    packed = campaign.run(network.cpu(), images, [1e-2], 4, **how)
    pd.concat([table, packed]).to_csv(folder / "damage-repairs.csv", index=False)
    chosen = dict(storage="packed", trials=2, shipped="damage-repairs")
    read = settings.sweep(network, images, [1e-2], ["none", "range"], **chosen)
    pd.testing.assert_frame_equal(read, packed[packed["trial"] < 2].reset_index(drop=True))
    assert capsys.readouterr().out == "4 trials read from checkpoints/vgg_cifar10, 2 computed anew: they agree\n"
    with pytest.raises(ValueError, match="not all trials"):
        settings.sweep(network, images, [1e-2], ["none", "range"], **chosen | dict(trials=5))


def test_rounding_may_move_an_image_but_no_flip(shipped):
    settings, folder, table = shipped
    network, images = settings.trained("vgg_cifar10_binary", settings.dataset()), settings.dataset().test
    for column, by, agrees in (("accuracy", 4e-4, True), ("accuracy", 6e-4, False), ("flips", 1, False)):
        table.assign(**{column: table[column] + by}).to_csv(folder / "damage-float32.csv", index=False)
        if agrees:
            assert len(settings.sweep(network, images, [1e-4], ["none"])) == 3
        else:
            with pytest.raises(ValueError, match="computed anew differ"):
                settings.sweep(network, images, [1e-4], ["none"])


def test_on_other_images_a_sweep_is_held_against_the_spread(shipped):
    settings, folder, table = shipped
    network, images = settings.trained("vgg_cifar10_binary", settings.dataset()), settings.dataset().test
    for off, agrees in ((0.04, True), (0.4, False)):
        moved = table.assign(dataset="others", accuracy=table["accuracy"] + off)
        moved.to_csv(folder / "damage-float32.csv", index=False)
        if agrees:
            assert len(settings.sweep(network, images, [1e-4], ["none"])) == 3
        else:
            with pytest.raises(ValueError, match="computed anew differ"):
                settings.sweep(network, images, [1e-4], ["none"])


def test_without_pretrained_networks_a_sweep_is_computed():
    settings = start()
    settings = replace(settings, sizes=replace(settings.sizes, trials=2))
    dataset = settings.dataset()
    network, images = settings.network("vgg_cifar10_binary", dataset, width=0.02), dataset.test.limit(50)
    table = settings.sweep(network, images, [1e-2], ["none"])
    pd.testing.assert_frame_equal(table, campaign.run(network, images, [1e-2], 2, repairs=["none"], seed=settings.seed))
    table = settings.sweep(network, images, [1e-2], ["range"], storage="packed", trials=3)
    how = dict(storage="packed", repairs=["range"], seed=settings.seed)
    pd.testing.assert_frame_equal(table, campaign.run(network, images, [1e-2], 3, **how))


# Figures


def test_a_figure_is_three_files(table):
    settings = start()
    settings.save_figure("05-accuracy-vs-probability", drawn(table), table)
    files = {path.name: path for path in settings.figures.iterdir()}
    assert set(files) == {f"05-accuracy-vs-probability.{kind}" for kind in ("png", "svg", "csv")}
    pd.testing.assert_frame_equal(pd.read_csv(files["05-accuracy-vs-probability.csv"]), table, check_exact=True)
    with Image.open(files["05-accuracy-vs-probability.png"]) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 2  # not blank
    assert ElementTree.parse(files["05-accuracy-vs-probability.svg"]).getroot().tag.endswith("svg")


@pytest.mark.parametrize(("source", "says"), [("", "digits, quick profile"), ("a benchmark", "a benchmark")])
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
