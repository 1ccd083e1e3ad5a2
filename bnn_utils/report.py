"""Results in words: an epoch, an evaluation, and a campaign's table in those of the published experiment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bnn_utils.campaign import saved
from bnn_utils.evaluation import Evaluation
from bnn_utils.statistics import aggregate, bounded_interval, median_interval

PICTURES = (".png", ".svg", ".pdf")
PUBLISHED_WORDS = {"none": "damaged", "clip": "clipped"}


def print_epoch(row: dict[str, Any]) -> None:
    """Print a row of a training's history."""
    parts = [
        f"epoch {row['epoch']:3d}",
        f"lr {row['lr']:.1e}",
        f"train loss {row['train_loss']:.3f} acc {row['train_accuracy']:.3f}",
        f"validation loss {row['validation_loss']:.3f} acc {row['validation_accuracy']:.3f}",
        f"sign flips {row['sign_flips']:.2%}",
        f"{row['seconds']:.0f} s",
    ]
    print("  ".join(parts), flush=True)


def described(result: Evaluation) -> str:
    """Return loss and accuracy in one line."""
    return f"loss {result.loss:.4f}, acc {result.accuracy:.4f}"


def stopping(table: pd.DataFrame, until: float) -> str:
    """Return in words where a campaign with `until` stopped, and what that saved."""
    settings = table.groupby(["probability", "repair"])["accuracy"]
    half = max(bounded_interval(accuracy)[1] for _, accuracy in settings)
    end = f"stopped at ± {until:g}" if half <= until else f"± {until:g} not reached, but ± {half:.2g}"
    spent, fixed, share = saved(table)
    return (
        f"{end}: {spent} trials, {share:.0%} fewer than {fixed}, as many everywhere (this interval allows for "
        "failures that no trial has shown; those above are Student's and do not)"
    )


def published_form(table: pd.DataFrame, original: Evaluation) -> str:
    """Return a campaign's table of one network in the words of the published experiment, with intervals.

    Every figure is the mean over the trials, ± the half-width of its 95% interval; rates are damaged over original.
    Where single trials make the mean loss meaningless, its median is given too.
    """
    means = aggregate(table)
    first = means.iloc[0]
    fewest, most = means["trials"].min(), means["trials"].max()
    trials = f"{most}" if fewest == most else f"{fewest} to {most}"
    lines = [
        f"{first['network']} on {first['dataset']}, {first['storage']} storage, {trials} trials a "
        "probability, mean ± half-width of the 95% interval",
        f"original model ==> loss:{{{original.loss:.3f}}}, acc:{{{original.accuracy:.3f}}}",
        "damaged model ==>",
    ]
    for probability in sorted(means["probability"].unique(), reverse=True):
        rows = means[means["probability"] == probability]
        lines.append(f"damage probability:  {probability:g}  ({rows['flips'].iloc[0]:.4g} flips a trial)")
        for row in rows.to_dict("records"):
            word = PUBLISHED_WORDS.get(row["repair"], row["repair"])
            parts = {
                f"{word} loss": (row["loss"], row["loss_half"]),
                f"{word} acc": (row["accuracy"], row["accuracy_half"]),
                "loss rate": (_rate(row["loss"], original.loss), _rate(row["loss_half"], original.loss)),
                "acc rate": (_rate(row["accuracy"], original.accuracy), _rate(row["accuracy_half"], original.accuracy)),
            }
            line = ", ".join(f"{name}:{{{_number(mean)} ± {_number(half)}}}" for name, (mean, half) in parts.items())
            if not row["loss"] < 100:  # no mean of such losses says what a usual trial is like
                own = table[(table["probability"] == probability) & (table["repair"] == row["repair"])]
                median, low, high = median_interval(own["loss"])
                line += f"  (median loss {_number(median)}, 95% interval {_number(low)} to {_number(high)}"
                line += f"; not finite in {row['not_finite']} of {row['trials']} trials)"
            lines.append(line)
    return "\n".join(lines)


def _rate(damaged: float, original: float) -> float:
    return damaged / original if original else float("nan")


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"


def check_picture(name: str, probabilities: Sequence[float], again: bool) -> None:
    """Raise ValueError or OSError, before anything is computed, where `draw` could not draw into file `name`.

    Args:
        again: a picture that is there already may be replaced.
    """
    path = Path(name)
    if path.suffix not in PICTURES:
        raise ValueError(f"--plot {path}: expected a name that ends in one of {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} in")
    if path.exists() and not again:
        raise FileExistsError(f"{path}: is there already; name another file")
    if not any(probabilities):
        raise ValueError("--plot: its axis is logarithmic, so a probability above 0 is needed")


def draw(table: pd.DataFrame, original: Evaluation, path: str) -> None:
    """Draw the accuracy of a campaign of one network into a file."""
    from matplotlib.pyplot import style  # only those who want a picture wait for what draws it

    from bnn_utils import plotting

    clean = pd.DataFrame({"network": table["network"].unique(), "accuracy": original.accuracy})
    with style.context(plotting.STYLE):
        plotting.save(plotting.damage_curves(table, clean=clean), path)
