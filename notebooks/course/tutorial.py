"""What a notebook's first cell needs: profile, seed, style, paths, and `save_figure`."""

import copy
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from bnn_utils import campaign, checkpoints, data, plotting
from bnn_utils.models import build
from bnn_utils.system import write_beside
from bnn_utils.training import Recipe, train


@dataclass(frozen=True)
class Profile:
    """How large the course's experiments are.

    Attributes:
        dataset: a name of `bnn_utils.data.DATASETS`.
        vgg_width, resnet_width: of the networks of notebooks 02, 03 and 05.
        recipe: how those are trained.
        ablation_dataset, ablation_width, ablation_recipe: of the many small networks of notebooks 04 and 08.
        ablation_seeds: networks trained at each of its settings.
        trials: draws of errors at each probability.
        pretrained: take the two networks from checkpoints/ instead of training them.
        threads: of torch on the CPU; 0 leaves torch's own choice. One is as fast for small networks, gives the same
            numbers whatever the number of cores, and does not stall when another program wants a core.
    """

    dataset: str
    vgg_width: float
    resnet_width: float
    recipe: Recipe
    ablation_dataset: str
    ablation_width: float
    ablation_recipe: Recipe
    ablation_seeds: int
    trials: int
    threads: int
    pretrained: bool = False


SHIPPED = {"vgg_cifar10_binary": "vgg_cifar10", "resnet_binary": "resnet_published"}  # their names in checkpoints/
QUICK = Profile(
    dataset="digits",
    vgg_width=0.125,
    resnet_width=0.25,
    recipe=Recipe(epochs=20, batch_size=64),
    ablation_dataset="digits",
    ablation_width=1 / 24,
    ablation_recipe=Recipe(epochs=12, batch_size=64, lr=1e-2),
    ablation_seeds=3,
    trials=30,
    threads=1,
)
PROFILES = {
    "quick": QUICK,
    "cifar10": replace(  # its many small networks are the quick profile's
        QUICK,
        dataset="cifar10",
        vgg_width=0.25,
        resnet_width=0.5,
        recipe=Recipe(epochs=30, precision="bfloat16"),
        trials=20,
        threads=0,
        pretrained=True,
    ),
    "full": Profile(
        dataset="cifar10",
        vgg_width=1.0,
        resnet_width=1.0,
        recipe=Recipe(),
        ablation_dataset="cifar10",
        ablation_width=0.25,
        ablation_recipe=Recipe(epochs=30),
        ablation_seeds=3,
        trials=100,
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
        data_name: of the images that `dataset` returned, for the figures; empty before.
    """

    profile: str
    sizes: Profile
    seed: int
    device: torch.device
    figures: Path
    networks: Path
    data_path: Path
    data_name: str = ""

    def dataset(self) -> data.Dataset:
        """Return the profile's images, on the device; for pretrained networks normalized as in their training."""
        loaded = data.load(self.sizes.dataset, self.data_path).to(self.device)
        if self.sizes.pretrained:
            loaded = loaded.as_trained(checkpoints.pretrained(SHIPPED["vgg_cifar10_binary"])[1])
        self.data_name = loaded.name
        return loaded

    def ablation_data(self) -> data.Dataset:
        """Return the images of the many small networks, on the device."""
        return data.load(self.sizes.ablation_dataset, self.data_path).to(self.device)

    def network(self, name: str, dataset: data.Dataset, width: float | None = None, **config: object) -> nn.Module:
        """Return an untrained network of the profile's size for `dataset`, initialized from the seed.

        Args:
            name: in `bnn_utils.models.MODELS`.
            dataset: its images give the input's size and the classes.
            width: instead of the profile's.
            config: further arguments of the network.
        """
        widths = {"vgg_cifar10_binary": self.sizes.vgg_width, "resnet_binary": self.sizes.resnet_width}
        _, in_channels, _, input_size = dataset.train.pixels.shape
        torch.manual_seed(self.seed)
        model = build(
            name,
            num_classes=len(dataset.classes),
            width=widths[name] if width is None else width,
            in_channels=in_channels,
            input_size=input_size,
            **config,
        )
        return model.to(self.device)

    def trained(self, name: str, dataset: data.Dataset) -> nn.Module:
        """Return the network of notebook 02 or 03, trained as there, in evaluation mode.

        It is trained once and kept in `networks`; later calls, of other notebooks too, load what was trained with the
        same recipe, seed, data and torch. With `sizes.pretrained` it comes from checkpoints/, one bit a weight.
        """
        if self.sizes.pretrained:
            return checkpoints.pretrained(SHIPPED[name])[0].to(self.device)
        model = self.network(name, dataset)
        path = self.networks / f"{name}.safetensors"
        facts = dict(dataset=dataset.name, recipe=asdict(self.sizes.recipe), seed=self.seed, torch=torch.__version__)
        with suppress(checkpoints.CheckpointError):
            kept, known = checkpoints.load(path)
            if all(known.get(key) == value for key, value in (facts | {"config": model.config}).items()):
                return kept.to(self.device)
        train(model, dataset, self.sizes.recipe)
        self.networks.mkdir(parents=True, exist_ok=True)
        checkpoints.save(path, model, **facts, **dataset.train.facts)
        return model

    def sweep(
        self,
        network: nn.Module,
        images: data.Images,
        probabilities: Sequence[float],
        repairs: Sequence[str],
        *,
        storage: str = "float32",
        trials: int | None = None,
        shipped: str = "damage-float32",
    ) -> pd.DataFrame:
        """Return a campaign's table.

        With `sizes.pretrained` it is read from checkpoints/, at those of the probabilities that are there; and one
        trial at 1e-4 and one at 1e-2, as far as they are there, are computed anew and held against it: where the images
        are those of the table, flips are the same and accuracies no more than 5 of 10,000 images apart, since
        processors round differently; on others (the original instead of JPEG copies) accuracies lie within 5 points of
        the range of the table's trials. This is computed on the CPU, as the table was.

        Args:
            network: a network of this profile.
            images: the test images, or as many of them as the table was made with.
            probabilities, repairs, storage: as for `campaign.run`.
            trials: at each point; None is `sizes.trials`.
            shipped: the table's name in the folder of the pretrained network.

        Raises:
            ValueError: the table lacks trials or a repair, or what was computed anew differs from it.
        """
        trials = self.sizes.trials if trials is None else trials
        how: dict[str, Any] = dict(storage=storage, repairs=repairs, seed=self.seed)
        if not self.sizes.pretrained:
            return campaign.run(network, images, probabilities, trials, **how)
        path = checkpoints.PRETRAINED / SHIPPED[str(network.name)] / f"{shipped}.csv"
        table = pd.read_csv(path)
        wanted = table["probability"].isin(probabilities) & table["repair"].isin(repairs)
        wanted &= (table["storage"] == storage) & (table["trial"] < trials)
        table = table[wanted].reset_index(drop=True)
        there = table["probability"].unique()
        if not len(table) or len(table) != len(there) * len(repairs) * trials:
            raise ValueError(f"{path}: has not all trials at these probabilities with these repairs")
        keys = ["probability", "repair", "trial"]
        some = [p for p in there if p in (1e-4, 1e-2)]
        again = campaign.run(copy.deepcopy(network).cpu(), images.to("cpu"), some, 1, **how)
        both = again.merge(table, on=keys, suffixes=("", "_read"))
        if images.dataset == table["dataset"].iloc[0]:
            near = (both["accuracy"] - both["accuracy_read"]).abs() <= 5e-4 + 1e-9
            agree = near & both["flips"].eq(both["flips_read"])
        else:
            spread = table.groupby(["probability", "repair"])["accuracy"].agg(["min", "max"]).reset_index()
            both = both.merge(spread, on=["probability", "repair"])
            agree = both["accuracy"].between(both["min"] - 0.05, both["max"] + 0.05)
        if not agree.all():
            raise ValueError(f"{path}: trials computed anew differ from it:\n{both[~agree].to_string()}")
        print(f"{len(table)} trials read from checkpoints/{path.parent.name}, {len(both)} computed anew: they agree")
        return table

    def save_figure(self, name: str, figure: Figure, table: pd.DataFrame, source: str = "") -> None:
        """Write a figure as PNG and SVG, and the table that it was drawn from as CSV, under one name.

        Below the figure it says what it was drawn from.

        Args:
            name: two digits of the notebook, then words joined by hyphens: "05-accuracy-vs-probability".
            figure: what was drawn.
            table: what it was drawn from, not empty.
            source: in words, where the table comes from; empty is the profile's data.

        Raises:
            ValueError: the name has another form, or the table is empty.
        """
        if not re.fullmatch(r"\d\d(-[a-z0-9]+)+", name):
            raise ValueError(f"figure name {name!r} is not two digits and words joined by hyphens")
        if table.empty:
            raise ValueError(f"figure {name}: its table is empty")
        self.figures.mkdir(parents=True, exist_ok=True)
        source = source or ", ".join(filter(None, (self.data_name, f"{self.profile} profile")))
        figure.text(1, -0.01, source, ha="right", va="top", fontsize=7, color="0.4")
        for kind in ("png", "svg"):
            plotting.save(figure, self.figures / f"{name}.{kind}")
        write_beside(self.figures / f"{name}.csv", partial(table.to_csv, index=False))


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
    root = Path(__file__).resolve().parents[2]
    figures = _folder("BNN_FIGURES", root / "figures") / profile
    networks = _folder("BNN_NETWORKS", root / "executed" / "networks") / profile
    data_path = _folder("BNN_DATA", root / "data")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    version, threads = torch.__version__.split("+")[0], torch.get_num_threads()
    print(f"profile {profile}, seed {seed}, torch {version}, device {device}, threads {threads}")
    return Settings(profile, PROFILES[profile], seed, device, figures, networks, data_path)
