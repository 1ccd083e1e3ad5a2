"""What a notebook's first cell needs: profile, seed, style, networks and their shipped trials, figures, sliders."""

import csv
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import nn

from bnn_utils import campaign, checkpoints, data, plotting
from bnn_utils.models import build
from bnn_utils.system import write_beside
from bnn_utils.training import Recipe, train

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Profile:
    """How large the course's experiments are.

    Attributes:
        dataset: on which notebooks 02 to 04 train, a name of `bnn_utils.data.DATASETS`.
        images: on which notebooks 05 to 09 test, likewise.
        vgg_width, resnet_width: of the networks that 02 and 03 train.
        recipe: how those are trained.
        small_width, small_recipe, seeds: of the many small networks of 03, 04 and 08.
        trials: draws of errors at each probability, of the reader's own.
        pretrained: take the networks of 05 to 09, and the tables of their damage, from checkpoints/.
        threads: of torch on the CPU; 0 leaves torch's own choice. One is as fast for small networks, gives the same
            numbers whatever the number of cores, and does not stall when another program wants a core.
    """

    dataset: str
    images: str
    vgg_width: float
    resnet_width: float
    recipe: Recipe
    small_width: float
    small_recipe: Recipe
    seeds: int
    trials: int
    pretrained: bool
    threads: int


PROFILES = {
    "quick": Profile(
        dataset="digits",
        images="cifar10-sample",
        vgg_width=0.125,
        resnet_width=0.25,
        recipe=Recipe(epochs=20, batch_size=64),
        small_width=1 / 24,
        small_recipe=Recipe(epochs=12, batch_size=64, lr=1e-2),
        seeds=3,
        trials=5,
        pretrained=True,
        threads=1,
    ),
    "full": Profile(
        dataset="cifar10",
        images="cifar10",
        vgg_width=1.0,
        resnet_width=1.0,
        recipe=Recipe(),
        small_width=0.25,
        small_recipe=Recipe(epochs=30),
        seeds=10,
        trials=50,
        pretrained=False,
        threads=0,
    ),
}


@dataclass
class Settings:
    """What every notebook works with; made by `start`.

    Attributes:
        profile: the profile's name, its sizes are in `sizes`.
        sizes: Profile.
        seed: of everything random in the notebook.
        device: where networks and images lie.
        figures: folder that `save_figure` writes to.
        networks: folder in which `trained` keeps networks.
        data_path: where data sets that do not ship with the course are, or are downloaded to.
        drawn_from: the data of the notebook, for the figures; empty before it is loaded.
    """

    profile: str
    sizes: Profile
    seed: int
    device: torch.device
    figures: Path
    networks: Path
    data_path: Path
    drawn_from: str = ""

    def dataset(self) -> data.Dataset:
        """Return the images that notebooks 02 to 04 train on, on the device."""
        loaded = data.load(self.sizes.dataset, self.data_path).to(self.device)
        self.drawn_from = loaded.name
        return loaded

    def images(self) -> data.Images:
        """Return the images that notebooks 05 to 09 test on, on the device, as the shipped networks want them."""
        facts = checkpoints.pretrained("vgg_cifar10")[1]
        images = data.load(self.sizes.images, self.data_path).test.as_trained(facts).to(self.device)
        self.drawn_from = f"{len(images):,} test images of {images.dataset}"
        return images

    def network(self, name: str, dataset: data.Dataset, width: float | None = None, **config: object) -> nn.Module:
        """Return an untrained network of the profile's size for `dataset`, initialized from the seed.

        Args:
            name: in `bnn_utils.models.MODELS`.
            dataset: its images give the input's size and the classes.
            width: instead of the profile's.
            config: further arguments of the network.
        """
        if width is None:
            width = self.sizes.vgg_width if name.startswith("vgg") else self.sizes.resnet_width
        _, in_channels, _, input_size = dataset.train.pixels.shape
        torch.manual_seed(self.seed)
        shape: dict[str, Any] = dict(num_classes=len(dataset.classes), in_channels=in_channels, input_size=input_size)
        return build(name, width=width, **shape, **config).to(self.device)

    def trained(self, name: str) -> nn.Module:
        """Return a network of checkpoints/, on the device, in evaluation mode.

        Without `sizes.pretrained` one of the same kind is trained instead, at the profile's size and by its recipe,
        with errors where the shipped one was; it is kept in `networks` for later calls and notebooks.

        Args:
            name: of its folder: "vgg_cifar10".
        """
        shipped, facts = checkpoints.pretrained(name)
        if self.sizes.pretrained:
            return shipped.to(self.device)
        dataset = data.load(self.sizes.images, self.data_path).as_trained(facts).to(self.device)
        told = facts["recipe"]
        recipe = Recipe(**asdict(self.sizes.recipe) | {key: told[key] for key in told if key.startswith("damage")})
        model = self.network(str(shipped.name), dataset)
        path = self.networks / f"{name}.safetensors"
        known = dict(dataset=dataset.name, recipe=asdict(recipe), config=model.config, torch=torch.__version__)
        with suppress(checkpoints.CheckpointError):
            kept, there = checkpoints.load(path)
            if all(there.get(key) == value for key, value in known.items()):
                return kept.to(self.device)
        train(model, dataset, recipe)
        self.networks.mkdir(parents=True, exist_ok=True)
        checkpoints.save(path, model, **dataset.train.facts, **{key: known[key] for key in known if key != "config"})
        return checkpoints.load(path)[0].to(self.device)

    def sweep(
        self,
        name: str,
        table: str,
        probabilities: Sequence[float],
        repairs: Sequence[str] = ("none",),
        storage: str = "packed",
    ) -> pd.DataFrame:
        """Return the trials of a long campaign, on all test images: those that ship with a network, read from its
        folder, or without `sizes.pretrained` those of the network that `trained` gives, run now.

        Args:
            name: of the network's folder in checkpoints/.
            table: of the file there, without its suffix: "damage-packed".
            probabilities, repairs, storage: as for `campaign.run`.

        Raises:
            ValueError: the file has no trials at one of these probabilities with one of these repairs.
        """
        if not self.sizes.pretrained:
            how: dict[str, Any] = dict(storage=storage, repairs=repairs, seed=self.seed)
            return campaign.run(self.trained(name), self.images(), probabilities, self.sizes.trials, **how)
        path = checkpoints.PRETRAINED / name / f"{table}.csv"
        trials = pd.read_csv(path).query("storage == @storage")
        wanted = trials[trials["probability"].isin(probabilities) & trials["repair"].isin(repairs)]
        if len(wanted[["probability", "repair"]].drop_duplicates()) < len(probabilities) * len(repairs):
            raise ValueError(f"{path}: has no trials at some of these probabilities with some of these repairs")
        return wanted.reset_index(drop=True)

    def save_figure(
        self, name: str, figure: Figure, table: pd.DataFrame | Mapping[str, pd.DataFrame], source: str = ""
    ) -> None:
        """Show a figure, and write it as PNG and SVG, and the table that it was drawn from as CSV, under one name.

        Below the figure it says what it was drawn from; what it shows, in words, is the caption in figures.csv.

        Args:
            name: two digits of the notebook, then words joined by hyphens: "06-accuracy-vs-probability".
            figure: what was drawn.
            table: what it was drawn from, not empty; of several tables, by whose they are ("shipped", "yours"), one is
                made that tells it in a column.
            source: in words, where the table comes from; empty is the notebook's data.

        Raises:
            ValueError: the name has another form, or the table is empty.
        """
        if not re.fullmatch(r"\d\d(-[a-z0-9]+)+", name):
            raise ValueError(f"figure name {name!r} is not two digits and words joined by hyphens")
        if not isinstance(table, pd.DataFrame):
            table = pd.concat(dict(table), names=["whose"]).reset_index("whose")
        if table.empty:
            raise ValueError(f"figure {name}: its table is empty")
        self.figures.mkdir(parents=True, exist_ok=True)
        figure.text(1, -0.01, source or self.drawn_from, ha="right", va="top", fontsize=7, color="0.4")
        for kind in ("png", "svg"):
            plotting.save(figure, self.figures / f"{name}.{kind}")
        write_beside(self.figures / f"{name}.csv", partial(table.to_csv, index=False))
        display(figure, metadata={"image/png": {"alt": _caption(name)}})
        plt.close(figure)  # or it would be shown twice


def _caption(figure: str) -> str:
    with (ROOT / "notebooks" / "figures.csv").open(encoding="utf-8", newline="") as file:
        return next((row["caption"] for row in csv.DictReader(file) if row["id"] == figure), figure)


def explore(draw: Callable[[Any], object], name: str, values: Sequence[Any], start: int = 0) -> None:
    """Call `draw` with one of `values`, and again with others as a slider moves.

    Where no reader sits before the notebook (BNN_STATIC is set, as when the course is run by command), there is no
    slider, only the first picture.

    Args:
        draw: draws a figure and shows it.
        name: the words beside the slider.
        values: to choose from.
        start: the position of the first.
    """
    style = {"description_width": "initial"}
    _explore(draw, values[start], "SelectionSlider", options=list(values), description=name, style=style)


def explore_bits(draw: Callable[[Any], object], start: int = 30, bits: int = 32) -> None:
    """Call `draw` with a bit position, and again with others as they are clicked: a button a bit, the highest first.

    Where no reader sits before the notebook there are no buttons; see `explore`.

    Args:
        draw: draws a figure and shows it.
        start: the position at first.
        bits: of the number whose bits they are.
    """
    positions = [(str(bit), bit) for bit in reversed(range(bits))]
    _explore(draw, start, "ToggleButtons", options=positions, description="bit", style={"button_width": "2.6em"})


def _explore(draw: Callable[[Any], object], first: Any, widget: str, **options: Any) -> None:
    if os.environ.get("BNN_STATIC"):
        draw(first)
        return
    import ipywidgets

    chooser = getattr(ipywidgets, widget)(value=first, **options)
    argument = draw.__code__.co_varnames[0]
    display(ipywidgets.VBox([chooser, ipywidgets.interactive_output(draw, {argument: chooser})]))


def _folder(variable: str, default: Path) -> Path:
    return Path(os.path.expanduser(os.environ.get(variable, default)))


def start() -> Settings:
    """Read the profile from BNN_PROFILE (default quick), set the style and the seed, and say what was chosen.

    BNN_FIGURES names another folder than figures/ for figures, BNN_DATA another than data/ for data sets, BNN_NETWORKS
    another than executed/networks/ for networks that one notebook trains and others load.

    Raises:
        ValueError: there is no such profile.
    """
    profile = os.environ.get("BNN_PROFILE", "quick")
    if profile not in PROFILES:
        raise ValueError(f"BNN_PROFILE is {profile!r}, expected one of {', '.join(PROFILES)}")
    plt.style.use(plotting.STYLE)
    if PROFILES[profile].threads:
        torch.set_num_threads(PROFILES[profile].threads)
    seed = 0
    torch.manual_seed(seed)
    figures = _folder("BNN_FIGURES", ROOT / "figures") / profile
    networks = _folder("BNN_NETWORKS", ROOT / "executed" / "networks") / profile
    data_path = _folder("BNN_DATA", ROOT / "data")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    version, threads = torch.__version__.split("+")[0], torch.get_num_threads()
    print(f"profile {profile}, seed {seed}, torch {version}, device {device}, threads {threads}")
    return Settings(profile, PROFILES[profile], seed, device, figures, networks, data_path)
