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


@every_notebook
def test_cells_are_short(path):
    lengths = [len(cell.source.splitlines()) for _, cell in tool.code_cells(tool.read_notebook(path))]
    assert median(lengths) <= 10
    assert max(lengths) <= 40


@every_notebook
def test_prose_stands_before_each_code_cell(path):
    cells = tool.read_notebook(path).cells
    code = [before.cell_type == after.cell_type == "code" for before, after in pairwise(cells)]
    solution = ["solution" in cell.metadata.get("tags", []) for cell in cells]
    bare = [cells[i + 1].source for i in range(len(code)) if code[i] and not solution[i + 1]]
    assert bare == [] and cells[0].cell_type == "markdown"


@every_notebook
def test_opening(path):
    notebook = tool.read_notebook(path)
    text = "\n\n".join(cell.source for cell in tool.opening(notebook))
    assert text.startswith("# ")
    assert tool.colab_link(tool.repository_of(ROOT), path.name) in text
    for words in ("What you will know at the end", "Prerequisites"):
        assert words in text
    assert tool.minutes(text), "no measured minutes; run: make publish"
    assert tool.first_sentence(text)
    assert tool.code_cells(notebook)[0][1].source == tool.setup_cell(tool.repository_of(ROOT))


@every_notebook
def test_ending(path):
    cells = tool.read_notebook(path).cells
    start = max(i for i, cell in enumerate(cells) if re.match(r"## .*Exercises", cell.source))
    ending = cells[start:]
    prose = "\n\n".join(cell.source for cell in ending if cell.cell_type == "markdown")
    assert re.findall(r"^(\d)\. ", prose, re.MULTILINE) == ["1", "2", "3"]
    solutions = [cell for cell in ending if cell.cell_type == "code"]
    assert solutions
    for cell in solutions:
        assert "solution" in cell.metadata.get("tags", [])
        assert cell.metadata.get("jupyter") == {"source_hidden": True, "outputs_hidden": True}
    assert ending[-1].cell_type == "markdown"
    following = [later.name for later in NOTEBOOKS if later > path][:1]
    assert all(f"]({name})" in ending[-1].source for name in following)


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


def test_each_figure_is_published_once():
    found = [path for profile in tool.PROFILES for path in (ROOT / "figures/published" / profile).glob("*")]
    assert sorted(path.name for path in found) == sorted(
        row["id"] + suffix for row in MANIFEST for suffix in tool.SUFFIXES
    )
    pairs = {(path.name[:2], path.parent.name) for path in found}
    assert len(pairs) == len(NOTEBOOKS), "a notebook's figures are of one profile"


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
        "--profile",
        "quick",
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


@pytest.mark.notebooks
@every_notebook
def test_executed_copy(path, course):
    executed = tool.read_notebook(course / "executed" / "quick" / path.name)
    check_outputs(executed)
    sources = [cell.source for cell in tool.read_notebook(path).cells]
    assert [cell.source for cell in executed.cells] == sources


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
