"""The course's notebooks: what is committed keeps the course's form, and a run makes what it should."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tools import notebooks as tool

ROOT = tool.ROOT
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
MANIFEST = tool.read_manifest(ROOT)
SAVED = re.compile(r"save_figure\(\s*[\"']([^\"']+)[\"']")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_figure = pytest.mark.parametrize("row", MANIFEST, ids=lambda row: row["id"])


def check_outputs(notebook):
    """Executed 1..n, with outputs, and nothing among them that a reader should not see."""
    cells = [cell for _, cell in tool.code_cells(notebook)]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [tool.noise(cell) for cell in cells if tool.noise(cell)] == []
    assert cells[0].outputs and sum(bool(cell.outputs) for cell in cells) > 1
    assert "widgets" not in notebook.metadata


# ---------------------------------------------------------------- what is committed


def test_there_are_notebooks_and_figures():
    assert NOTEBOOKS and MANIFEST  # without them the tests of each would pass by having nothing to do


@every_notebook
def test_committed_outputs(path):
    notebook = tool.read_notebook(path)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert path.stat().st_size < tool.LARGEST_NOTEBOOK
    assert tool.notebook_text(notebook) == path.read_text(encoding="utf-8"), "run: make publish"


def tags(cell):
    return cell.metadata.get("tags", [])


@every_notebook
def test_cells_are_short(path):
    cells = [cell for _, cell in tool.code_cells(tool.read_notebook(path)) if "claims" not in tags(cell)]
    lengths = [len(cell.source.splitlines()) for cell in cells]
    assert median(lengths) <= 8
    assert max(lengths) <= 25


@every_notebook
def test_prose_stands_before_each_code_cell(path):
    cells = [cell for cell in tool.read_notebook(path).cells if "claims" not in tags(cell)]
    bare = [after.source for before, after in pairwise(cells) if before.cell_type == after.cell_type == "code"]
    assert bare == [] and cells[0].cell_type == "markdown"


def words(path):
    """The words of a notebook's text; what is folded counts, links' addresses do not."""
    text = "\n".join(cell.source for cell in tool.read_notebook(path).cells if cell.cell_type == "markdown")
    return len(re.sub(r"\]\([^)]*\)", "]", text).split())


@every_notebook
def test_notebook_is_short(path):
    assert words(path) <= 1700


def test_course_is_short():
    assert sum(map(words, NOTEBOOKS)) <= 12_500


@every_notebook
def test_assertions_stay_out_of_the_way(path):
    """What holds the text's claims is in cells of its own, which JupyterLab and Colab fold."""
    for _, cell in tool.code_cells(tool.read_notebook(path)):
        if "claims" in tags(cell):
            assert cell.source.startswith("# @title ")
            assert cell.metadata.get("jupyter") == {"source_hidden": True} and cell.metadata.get("cellView") == "form"
        else:
            assert not re.search(r"^\s*assert\b", cell.source, re.MULTILINE), cell.source


@every_notebook
def test_opening(path):
    notebook = tool.read_notebook(path)
    text = "\n\n".join(cell.source for cell in tool.opening(notebook))
    assert text.startswith("# ")
    assert tool.colab_link(tool.repository_of(ROOT), path.name) in text
    for words in ("What you will know at the end", "Prerequisites"):
        assert words in text
    assert tool.course_map(ROOT, path) in text, "run: make publish"
    assert tool.minutes(text), "no measured minutes; run: make publish"
    assert tool.first_sentence(text)
    assert tool.code_cells(notebook)[0][1].source == tool.setup_cell(tool.repository_of(ROOT))


@every_notebook
def test_ending(path):
    """A recap, three exercises with hint, folded solution and a check, and the way to the next notebook."""
    cells = tool.read_notebook(path).cells
    headings = [(i, cell.source) for i, cell in enumerate(cells) if cell.source.startswith("## ")]
    recap, exercises, following = (i for i, _ in headings[-3:])
    assert re.match(r"## Recap", cells[recap].source) and re.match(r"## Exercises", cells[exercises].source)
    assert 3 <= len(re.findall(r"^- ", cells[recap].source, re.MULTILINE)) <= 5
    asked = [(cells[i - 1], cell) for i, cell in enumerate(cells) if "exercise" in tags(cell)]
    assert len(asked) == 3
    for number, (question, cell) in enumerate(asked, start=1):
        assert f"**Exercise {number}.**" in question.source
        for folded in ("<summary>Hint</summary>", "<summary>Solution</summary>"):
            assert question.source.count(folded) == 1
        assert re.search(rf'^check\("{path.name[:2]}-{number}", \w+\)$', cell.source, re.MULTILINE)
        assert re.search(r"^\w+ = \.\.\.", cell.source, re.MULTILINE)
    assert len(tool.solutions(tool.read_notebook(path))) == 3
    assert following == len(cells) - 1
    later = [other.name for other in NOTEBOOKS if other > path][:1]
    assert all(f"]({name})" in cells[-1].source for name in later)


@every_notebook
def test_links_between_notebooks(path):
    text = "\n".join(cell.source for cell in tool.read_notebook(path).cells if cell.cell_type == "markdown")
    local = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in local if link and not (path.parent / link).exists()] == []
    assert not re.search(r"!\[[^\]]*\]\(https?://(?!colab\.research\.google\.com/assets/)", text)


# ---------------------------------------------------------------- the list of figures


def test_manifest_lists_the_figures_that_notebooks_save():
    saved = Counter()
    for path in NOTEBOOKS:
        for _, cell in tool.code_cells(tool.read_notebook(path)):
            saved.update((figure, path.name) for figure in SAVED.findall(cell.source))
    listed = Counter((row["id"], row["notebook"]) for row in MANIFEST)
    assert saved == listed
    assert saved and set(saved.values()) == {1}


@every_figure
def test_manifest_row(row):
    assert re.fullmatch(r"[0-9]{2}(-[a-z0-9]+)+", row["id"])
    assert row["notebook"].startswith(row["id"][:2])
    assert row["caption"].strip() and row["gallery"] in ("0", "1")


def test_each_figure_is_published():
    found = sorted(path.name for path in (ROOT / "figures/published").iterdir())
    assert found == sorted(row["id"] + suffix for row in MANIFEST for suffix in tool.SUFFIXES)


# ---------------------------------------------------------------- a run


def tracked_files():
    """What every tracked file holds; without git, every file that a run could be tempted to change."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False)
    names = [name for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else []
    paths = [ROOT / name for name in names] or [*(ROOT / "notebooks").glob("*"), *ROOT.glob("*.*")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    """The folder into which the whole course was run, in the quick profile."""
    output = tmp_path_factory.mktemp("course")
    before = tracked_files()
    command = [
        sys.executable,
        ROOT / "tools" / "notebooks.py",
        "run",
        "--solve",
        "--output",
        output,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert done.stderr == ""
    assert tracked_files() == before, "the run changed tracked files"
    return output


@pytest.mark.notebooks
def test_course_runs_whole_and_tells_its_times(course):
    times = pd.read_csv(course / "executed" / "quick" / "run.csv")
    assert list(times.notebook) == [path.name for path in NOTEBOOKS]
    assert (times.seconds > 0).all()


def texts(cell):
    """What a cell put out, but for pictures, whose bytes differ from one matplotlib to another."""
    return [output.get("text") or output.get("data", {}).get("text/plain") for output in cell.outputs]


@pytest.mark.notebooks
@every_notebook
def test_executed_copy(path, course):
    executed = tool.read_notebook(course / "executed" / "quick" / path.name)
    check_outputs(executed)
    committed = tool.read_notebook(path)
    assert [cell.source for cell in executed.cells] == [cell.source for cell in committed.cells]
    if path.name[:2] in ("05", "06", "07", "08", "09"):  # their arithmetic is the same on every processor
        for (_, here), (_, there) in zip(tool.code_cells(executed), tool.code_cells(committed), strict=True):
            if "timing" not in tags(here) and "tutorial.start()" not in here.source:
                assert texts(here) == texts(there), here.source


@pytest.mark.notebooks
def test_course_makes_the_listed_figures(course):
    made = {path.name for path in (course / "figures" / "quick").iterdir()}
    assert made == {row["id"] + suffix for row in MANIFEST for suffix in tool.SUFFIXES}


@pytest.mark.notebooks
@every_figure
def test_figure(row, course):
    base = course / "figures" / "quick" / row["id"]
    with Image.open(f"{base}.png") as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert min(pixels.shape) >= 100 and pixels.std() > 1, "a blank picture"
    assert "<svg" in Path(f"{base}.svg").read_text(encoding="utf-8")
    assert len(pd.read_csv(f"{base}.csv")) > 0
