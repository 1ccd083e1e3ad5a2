"""Write what is known of the trained networks in checkpoints/: sums, cards and curves, and the results in words.

    python -m tools.networks

Everything is made from the networks' files, their histories and their trials; nothing is filled in by hand.
"""

import hashlib
import re
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from bnn_utils import campaign, checkpoints, plotting
from bnn_utils.faults import STORAGES
from bnn_utils.packed import pack
from bnn_utils.recipe import Recipe
from bnn_utils.repair import stored_bits
from tools.notebooks import ROOT, Words, readmes, refresh, write

BESIDE_PUBLISHED = ("vgg_cifar10", "resnet_published")  # those whose figures are held against the published
LIMITS = """\
- It was trained once, from one seed: intervals in its tables are over bit errors, not over trainings.
- Its training images were 32x32 pixels of ten classes. It says one of these classes of any picture."""
JPEG_LIMIT = "- It was trained on JPEG copies of CIFAR-10's images, and is a little less accurate than on the original."
NARROW_LIMIT = """\
- It is narrow, {width:g} of the published width: less accurate than a network of the published size, and another share
  of its memory is not weights. No figure of it is one of the published networks."""


def facts_of(folder: Path) -> dict[str, Any]:
    """What a trained network's file says of it."""
    return checkpoints.load(folder / checkpoints.NETWORK_FILE)[1]


def folders(root: Path) -> list[Path]:
    """The folders of the trained networks."""
    return sorted(path.parent for path in (root / "checkpoints").glob(f"*/{checkpoints.NETWORK_FILE}"))


def sums(root: Path) -> str:
    """The SHA-256 of every trained network, as `sha256sum` writes and checks them."""
    files = [folder / checkpoints.NETWORK_FILE for folder in folders(root)]
    digests = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return "".join(f"{digest}  {file.parent.name}/{file.name}\n" for digest, file in zip(digests, files))


def overview(root: Path) -> str:
    """A table of the trained networks."""
    columns = ["network", "width", "trained on", "best epoch", "errors in training", "validation", "test", "bytes"]
    rows = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for folder in folders(root):
        facts = facts_of(folder)
        recipe = facts["recipe"]
        values = [
            f"[{folder.name}]({folder.name}/README.md)",
            f"{facts['config']['width']:g}",
            facts["dataset"],
            f"{facts['epoch']} of {recipe['epochs']}",
            f"p = {recipe['damage_rate']:g}" if recipe["damage_rate"] else "none",
            f"{facts['validation_accuracy']:.1%}",
            f"{facts['test_accuracy']:.1%}",
            f"{(folder / checkpoints.NETWORK_FILE).stat().st_size:,}",
        ]
        rows.append(f"| {' | '.join(values)} |")
    return "\n".join(rows)


FIRST = "results/{}_first"  # the folder of an earlier training that a network goes on from


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def command(facts: dict[str, Any], name: str) -> str:
    """The command that trains a network of these facts: every setting that is not the default."""
    words = ["python -m bnn_utils train", f"--model {facts['network']}", "--dataset cifar10", "--data-path data"]
    words.append(f"--width {facts['config']['width']:g}")
    if not facts["config"].get("shortcut", True):
        words.append("--shortcut none")
    if not facts["config"].get("binary", True):
        words.append("--float")
    for field in fields(Recipe):
        value = facts["recipe"].get(field.name, field.default)
        if value != field.default:
            option = "damage-train-rate" if field.name == "damage_rate" else field.name.replace("_", "-")
            words.append(f"--{option}" if value is True else f"--{option} {value}")
    start = ""
    if "start" in facts:  # the file of a run, or one that is here
        kept = "checkpoints" if facts["start"] == checkpoints.NETWORK_FILE else "results"
        start = f"{kept}/{re.split('[-_]errors', name)[0]}/{facts['start']}"
    if "before" in facts:  # an earlier training of its own, packed
        start = f"{FIRST.format(name)}/{checkpoints.NETWORK_FILE}"
    if "teacher" in facts:  # a network can be the teacher of what starts from it
        words.append(f"--teacher {start if facts['teacher'] == facts.get('start') else facts['teacher']}")
    if start:
        words.append(f"--start {start}")
    return " ".join([*words, f"--save {name}"])


def card(folder: Path) -> str:
    """The page of one trained network."""
    facts, history = facts_of(folder), pd.read_csv(folder / "history.csv")
    before = facts.get("before")  # the training from whose signs and floats this one started
    earlier = before["recipe"]["epochs"] if before else 0
    best = history.set_index("epoch").loc[earlier + facts["epoch"]]
    recipe, width = facts["recipe"], facts["config"]["width"]
    limits = [*([NARROW_LIMIT.format(width=width)] if width < 1 else []), LIMITS]
    if "JPEG" in facts["dataset"]:
        limits.append(JPEG_LIMIT)
    first = ""
    if before:
        reached = f"which reached {before['validation_accuracy']:.1%} on validation images in {earlier} epochs"
        made = FIRST.format(folder.name)
        packing = f"python -m bnn_utils pack -e {made}/best.safetensors -o {made}/{checkpoints.NETWORK_FILE}"
        first = f"\n\nThat goes on from the packed network of this one, {reached}:\n\n"
        first += f"    {command(before, Path(made).name)}\n    {packing}"
    trained = f"{recipe['epochs']} epochs in {facts['seconds']:,.0f} seconds on {facts['device'].upper()}"
    return f"""\
# {folder.name}

{_capital(plotting.label(facts["network"]))} of {width:g} of the published width, one bit a weight. This page is made by
`python -m tools.networks` from `{checkpoints.NETWORK_FILE}`, which holds these facts too, and `history.csv`.

| | |
| --- | --- |
| data | {facts["dataset"]}, 45,000 images for training, 5,000 for validation, 10,000 for testing |
| trained | {trained}, precision {recipe["precision"]}, seed {recipe["seed"]} |
| kept | epoch {facts["epoch"]}, the best on the validation part |
| accuracy on training images | {best["train_accuracy"]:.1%}, with crops and mirror images, while weights still moved |
| accuracy on validation images | {facts["validation_accuracy"]:.1%} |
| accuracy on test images | {facts["test_accuracy"]:.1%} |

![Loss and accuracy of training and validation, epoch by epoch](curves.png)

## The command

Where `data` holds `train/<class>/` and `test/<class>/` pictures, or torchvision's CIFAR-10 (downloaded if it is not
there); with `OMP_NUM_THREADS={facts.get("threads", 1)}` on a CPU, since sums depend on how they are split:

    {command(facts, folder.name)}{first}

## Known limits

{chr(10).join(limits)}
"""


def draw_curves(folder: Path) -> None:
    """Draw the history of a trained network into its folder."""
    with plt.style.context(plotting.STYLE):
        figure = plotting.training_curves(pd.read_csv(folder / "history.csv"))
        plotting.save(figure, folder / "curves.png")
        plt.close(figure)


def accuracy(mean: float, half: float) -> str:
    """An accuracy in percent, with the half-width of its interval."""
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def results(root: Path) -> str:
    """The tables of docs/results.md: the published figures beside ours, then packed storage and repairs."""
    published = pd.read_csv(root / "notebooks" / "published.csv")
    published = published.set_index(["network", "repair", "probability"]).sort_index()
    parts = []
    for name in BESIDE_PUBLISHED:
        folder = root / "checkpoints" / name
        facts = facts_of(folder)
        clean = facts["test_accuracy"]
        theirs = published.loc[facts["network"], "accuracy"]
        tables = [pd.read_csv(folder / f"damage-{storage}.csv") for storage in STORAGES]  # of all test images
        ours = campaign.aggregate(pd.concat(tables)).set_index(["storage", "repair", "probability"])
        parts += [
            f"**{_capital(plotting.label(facts['network']))}**: published at full width, "
            f"{theirs['none', 0]:.1%} undamaged; ours "
            f"[at {facts['config']['width']:g} of the width](../checkpoints/{name}/README.md), {clean:.1%} undamaged "
            f"on the {10_000:,} test images of {facts['dataset']}.",
            "",
            "| *p* | | published, one draw | rate | ours | rate | trials |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for probability in sorted({p for _, p in theirs.index if p}, reverse=True):
            for repair, word in (("none", "damaged"), ("clip", "clipped")):
                one, row = theirs[repair, probability], ours.loc["float32", repair, probability]
                parts.append(
                    f"| {probability:g} | {word} | {one:.1%} | {one / theirs['none', 0]:.3f} | "
                    f"{accuracy(row.accuracy, row.accuracy_half)}% | "
                    f"{row.accuracy / clean:.3f} ± {row.accuracy_half / clean:.3f} | {row.trials} |"
                )
        for repair, word in (("none", "packed"), ("vote5-few-range", "packed, repaired")):
            row = ours.loc["packed", repair, 1e-2]
            parts.append(
                f"| 0.01 | {word} | | | {accuracy(row.accuracy, row.accuracy_half)}% | "
                f"{row.accuracy / clean:.3f} ± {row.accuracy_half / clean:.3f} | {row.trials} |"
            )
        parts.append("")
    return "\n".join([*parts, guarded(root)])


def guarded(root: Path) -> str:
    """A table of every trained network, packed and repaired, on all test images."""
    repairs = ("vote5-upper-range", "vote5-few-range", "vote7-small-range")
    files = [folder / "damage-packed.csv" for folder in folders(root)]
    rows, tables = [], {file.parent: pd.read_csv(file) for file in files if file.is_file()}
    tables = {folder: table[table["repair"].isin(repairs)] for folder, table in tables.items()}
    probabilities = sorted({p for table in tables.values() for p in table["probability"]})
    for (folder, table), repair in product(tables.items(), repairs):
        if repair not in set(table["repair"]):
            continue
        network, facts = checkpoints.load(folder / checkpoints.NETWORK_FILE)
        means = campaign.aggregate(table).set_index(["repair", "probability"])
        cells = [f"[{folder.name}](../checkpoints/{folder.name}/README.md)", f"{facts['test_accuracy']:.1%}", repair]
        cells.append(f"{stored_bits(pack(network), repair) / 1e3:,.0f}")
        for p in probabilities:
            row = means.loc[repair, p] if (repair, p) in means.index else None
            cells.append("" if row is None else f"{accuracy(row.accuracy, row.accuracy_half)}% ({row.trials})")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            "**All networks, packed and repaired**, on the same images (trials in brackets); those named *errors* were "
            "trained on for them.",
            "",
            f"| network | undamaged | repair | kbit | {' | '.join(f'p = {p:g}' for p in probabilities)} |",
            f"| --- | --- | --- | --- |{' --- |' * len(probabilities)}",
            *rows,
        ]
    )


GLANCE = ("vgg_cifar10", "resnet_cifar10", "resnet_published")  # of these README tells
GUARD = "vote5-upper-range"  # the repair that notebook 08 recommends
AT = 1e-2


def at_a_glance(folder: Path) -> dict[str, Any]:
    """What README tells of a network: accuracy undamaged, at one wrong bit in a hundred, and repaired; more bits."""
    network, facts = checkpoints.load(folder / checkpoints.NETWORK_FILE)
    table = pd.read_csv(folder / "damage-packed.csv").query("probability == @AT")
    means = campaign.aggregate(table).set_index("repair")
    packed = pack(network)
    return dict(
        name=folder.name,
        word=plotting.label(facts["network"]),
        clean=facts["test_accuracy"],
        damaged=means.loc["none"],
        repaired=means.loc[GUARD],
        more=stored_bits(packed, GUARD) / stored_bits(packed) - 1,
    )


HEADLINE = (
    "**The result in one line:** at one wrong bit in a hundred the packed {word}, one bit a weight, falls "
    "from {clean:.1%} accuracy on CIFAR-10 to {damaged:.1%}, and is back at {repaired:.1%} with {more:.0%} more bits, "
    "spent on the few that decide."
)
BELOW = (
    "Packed storage, repaired by a {repair} (`{guard}`), the 10,000 test images of CIFAR-10 (JPEG "
    "copies), means over trials with 95% intervals."
)


def headline(root: Path, said: Words = str) -> str:
    """The result of the course in a sentence."""
    told = at_a_glance(root / "checkpoints" / GLANCE[0])
    means = {key: told[key].accuracy for key in ("damaged", "repaired")}
    return said(HEADLINE).format(**told | means)


def glance(root: Path, said: Words = str) -> str:
    """README's results: a row a network."""
    columns = map(said, ("network", "undamaged", "1 bit in 100 wrong", "repaired", "more bits"))
    rows = [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- | --- |"]
    for name in GLANCE:
        if (root / "checkpoints" / name / "damage-packed.csv").is_file():
            told = at_a_glance(root / "checkpoints" / name)
            damaged, repaired = (
                accuracy(told[key].accuracy, told[key].accuracy_half) for key in ("damaged", "repaired")
            )
            link = f"[{said(told['word'])}](checkpoints/{name}/README.md)"
            rows.append(f"| {link} | {told['clean']:.1%} | {damaged}% | {repaired}% | {told['more']:.1%} |")
    return "\n".join([*rows, "", said(BELOW).format(repair=said(plotting.label(GUARD)), guard=GUARD)])


def main(root: Path = ROOT) -> None:
    """Write all of it."""
    write(root / "checkpoints" / checkpoints.SUMS, sums(root))
    for folder in folders(root):
        write(folder / "README.md", card(folder))
        draw_curves(folder)
    refresh(root / "checkpoints" / "README.md", {"networks": overview(root)})
    refresh(root / "docs" / "results.md", {"results": results(root)})
    for page, said in readmes(root):
        refresh(page, {"headline": headline(root, said), "results": glance(root, said)})


if __name__ == "__main__":
    main()
