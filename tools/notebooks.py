"""Run the course's notebooks, publish their outputs, and point their links at the repository.

    python tools/notebooks.py run     [--profile quick] [--jobs N] [--solve] [NOTEBOOK ...]
    python tools/notebooks.py publish [NOTEBOOK ...]
    python tools/notebooks.py readme
    python tools/notebooks.py badges  [--repository OWNER/NAME]

`run` writes executed copies and figures into ignored folders, several notebooks at a time; with --solve it also gives
every exercise its solution, and stops if its check refuses it. `publish` runs too, one notebook after another, in the
quick profile, then writes what it got into tracked files: outputs and measured minutes into notebooks/, figures into
figures/published/, and gallery and reading order into README.md and README.zh-CN.md (`readme` writes only these). A
NOTEBOOK is a number, a name or a path.
"""

import argparse
import copy
import csv
import hashlib
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent

PROFILES = ("full", "quick")  # those of notebooks/course/tutorial.py
SUFFIXES = (".png", ".svg", ".csv")
KERNEL_EXIT_SECONDS = 60  # killed earlier, a busy machine's kernel leaves temporary files, and complaints about them
LARGEST_NOTEBOOK = 1_000_000  # bytes

SETUP_CELL = """\
# Set-up, the same in every notebook: find the course (Colab fetches it), set profile, seed and figure style.
import importlib
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "{repository}"
root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "notebooks/course").is_dir()), None)
if root is None and "google.colab" in sys.modules:
    root = Path("bnn-tutorial").resolve()
    source = os.environ.get("BNN_REPOSITORY", REPOSITORY)
    if not root.exists():
        subprocess.run(["git", "clone", "--quiet", "--depth=1", source, root], check=True)
    # --no-deps: Colab's own torch and numpy stay as they are
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", root], check=True)
    importlib.invalidate_caches()
os.chdir(root or ".")  # Python looks for packages in the kernel's working directory,
sys.path.insert(0, os.path.abspath("notebooks"))  # and here for those of the notebooks alone

from course import tutorial

settings = tutorial.start()"""

GITHUB = r"(?P<repository>[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}?)"
COLAB = re.compile(rf"(https://colab\.research\.google\.com/github/){GITHUB}(/blob/main/notebooks/)([^)\s\"]*)")
SETTING = re.compile(rf'^(Repository = "https://github\.com/){GITHUB}(")', re.MULTILINE)
CITED = re.compile(rf'^(repository-code: "https://github\.com/){GITHUB}(")', re.MULTILINE)
TIME = re.compile(r"^\*\*Time:\*\*.*$", re.MULTILINE)
COURSE = re.compile(r"^\*\*The course:\*\*.*$", re.MULTILINE)
SOLUTION = re.compile(r"<summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)


Words = Callable[[str], str]  # what gives English text in a page's language


class Cancelled(Exception):
    """The end of a notebook's run because another one failed."""


class Stop(Exception):
    """The end of a command: one short message, and the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Run:
    """One executed notebook: where it came from, when it began (`time.monotonic`), what it took and what it made."""

    source: Path
    notebook: Any
    began: float
    seconds: float
    cells: int
    figures: int


# ---------------------------------------------------------------- notebooks


def find_notebooks(root: Path, wanted: list[str] | None = None) -> list[Path]:
    """The course's notebooks in order; with `wanted`, only those of these numbers, names or paths."""
    every = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise Stop(f"{root / 'notebooks'} has no notebooks named NN_name.ipynb", 2)
    chosen = set()
    for word in wanted or []:
        name = Path(word).name
        found = [path for path in every if name in (path.name, path.stem, path.name[:2])]
        if not found:
            raise Stop(f"no notebook {word!r}; there are {', '.join(path.stem for path in every)}", 2)
        chosen.update(found)
    return [path for path in every if not wanted or path in chosen]


def read_notebook(path: Path) -> Any:
    """A notebook as nbformat 4 holds it."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds; each means the same to the caller
        raise Stop(f"{path.name} is not a notebook: {first_line(str(error))}") from None


def notebook_text(notebook: Any) -> str:
    """A notebook as it is committed: stable cell ids, no metadata that differs from run to run."""
    notebook = nbformat.from_dict(notebook)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    taken: set[str] = set()
    for index, cell in enumerate(notebook.cells):
        if cell.get("id") is None or cell["id"] in taken:
            cell["id"] = hashlib.sha256(f"{index}\n{cell.source}".encode()).hexdigest()[:8]
        taken.add(cell["id"])
        kept = ("cellView", "jupyter", "tags")
        cell.metadata = {key: cell.metadata[key] for key in kept if key in cell.metadata}
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT, indent=1).rstrip("\n") + "\n"


def write(path: Path, content: str) -> None:
    """Write a file beside its place, then move it there: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(content, encoding="utf-8")
    os.replace(beside, path)


def code_cells(notebook: Any) -> list[tuple[int, Any]]:
    """The cells that run, each with its index in the notebook."""
    cells = enumerate(notebook.cells)
    return [(index, cell) for index, cell in cells if cell.cell_type == "code" and cell.source.strip()]


def opening(notebook: Any) -> list[Any]:
    """The markdown cells before the first code cell."""
    first = next((i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), len(notebook.cells))
    return [cell for cell in notebook.cells[:first] if cell.cell_type == "markdown"]


def first_line(text: str) -> str:
    """The first line that says something, cut to a readable length."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 160 else line[:157] + "..."


# ---------------------------------------------------------------- run


def run_all(root: Path, profile: str, wanted: list[str], output: Path, jobs: int = 1, solve: bool = False) -> list[Run]:
    """Execute notebooks, `jobs` at a time, write their executed copies, print a table; a failing cell stops it all."""
    shutil.rmtree(networks_folder(output, profile), ignore_errors=True)  # what this run loads, this run has trained
    paths = find_notebooks(root, wanted)
    together = "" if min(jobs, len(paths)) == 1 else f", {jobs} at a time"
    print(f"Running {count(len(paths), 'notebook')}, profile {profile}{together}", flush=True)
    started, stopped = time.monotonic(), threading.Event()

    def one(number: int, path: Path) -> Run:
        try:
            line = board.line(f"[{number}/{len(paths)}] {path.name:<36}", path)
            run = execute(path, profile, output, line, stopped, min(jobs, len(paths)), solve)
            write(output / "executed" / profile / path.name, notebook_text(run.notebook))
            return run
        except BaseException:
            stopped.set()
            raise

    with Board() as board, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, number, path) for number, path in enumerate(paths, start=1)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # Ctrl-C too: what runs ends after its cell
            stopped.set()
            pool.shutdown(cancel_futures=True)
    failures = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for failure in sorted(failures, key=lambda error: isinstance(error, Cancelled)):
        raise failure  # the first that did not stop because another did
    runs = [future.result() for future in futures]
    report(runs, output, profile, started)
    return runs


def execute(
    path: Path, profile: str, output: Path, line: "Line", stopped: threading.Event, jobs: int = 1, solve: bool = False
) -> Run:
    """Execute one notebook, of `jobs` at a time, in a fresh kernel, whatever outputs the file holds.

    Once `stopped` is set it gives up. With `solve`, the solutions of its exercises are held against their checks.
    """
    notebook = read_notebook(path)
    cells = code_cells(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    forget_figures(output, profile, path)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,  # a slow or busy machine is no failure
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # no notices of the kernel in the terminal
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.km = client.create_kernel_manager()
    client.km.shutdown_wait_time = KERNEL_EXIT_SECONDS
    start = time.monotonic()
    try:
        # What cells write to stderr comes as output; the process's own is what worker pools say as they end.
        with client.setup_kernel(env=kernel_environment(profile, output, jobs), stderr=subprocess.DEVNULL):
            for done, (index, cell) in enumerate(cells):
                if stopped.is_set():
                    raise Cancelled
                line.cells = f"{done:>3}/{len(cells)} cells"
                run_cell(client, index, cell, path.name)
            kept = copy.deepcopy(notebook.cells)  # the client puts what it executes into the notebook
            for index, source in solutions(notebook) if solve else []:
                cell = nbformat.v4.new_code_cell(source)
                run_cell(client, index, cell, path.name)
                if "**Right.**" not in str(cell.outputs):
                    raise Stop(f"{path.name}: the check of cell {index + 1} refuses its solution:\n    {cell.outputs}")
            notebook.cells = kept
    except BaseException:
        line.end("stopped")
        raise
    seconds = time.monotonic() - start
    line.end(f"{len(cells):>3}/{len(cells)} cells {seconds:7.1f} s")
    if [cell.execution_count for _, cell in cells] != list(range(1, len(cells) + 1)):
        raise Stop(f"{path.name}: some cells were skipped, so the execution counts do not run 1..{len(cells)}")
    return Run(path, notebook, start, seconds, len(cells), len(figures_of(output, profile, path)))


def run_cell(client: NotebookClient, index: int, cell: Any, name: str) -> None:
    """Execute one cell; an error, stderr output or widget state stops the run."""
    problem = None
    try:
        client.execute_cell(cell, index)
    except CellExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        problem = "the kernel died (out of memory?)"
    problem = problem or noise(cell) or ("it made widget state" if client.widget_state else None)
    if problem:
        raise Stop(f"{name} stopped at cell {index + 1}: {first_line(cell.source)}\n    {first_line(problem)}")


def solutions(notebook: Any) -> list[tuple[int, str]]:
    """The exercises, each by the index of its cell, with the source of that cell as its solution writes it.

    The solution is the Python code in the folded part of the text before the cell.
    """
    found = []
    for index, cell in code_cells(notebook):
        if "exercise" in cell.metadata.get("tags", []):
            folded = re.search(
                r"<summary>Solution</summary>.*?```python\n(.*?)```", notebook.cells[index - 1].source, re.S
            )
            if not folded:
                raise Stop(f"the exercise in cell {index + 1} has no solution before it")
            check = next(line for line in cell.source.splitlines() if line.startswith("check("))
            found.append((index, f"{folded[1]}\n{check}"))
    return found


def noise(cell: Any) -> str | None:
    """What a cell's outputs hold that a committed notebook must not, in words; None if nothing."""
    for output in cell.outputs:
        if output.output_type == "error":
            return f"{output.ename}: {output.evalue}"
        if output.output_type == "stream" and output.name == "stderr":
            return f"it wrote to stderr: {output.text.strip()}"
        if any("widget" in kind for kind in output.get("data", {})):
            return "it made a widget"
    return None


def kernel_environment(profile: str, output: Path, jobs: int = 1) -> dict[str, str]:
    """The environment of the kernel of one of `jobs` notebooks, which share the cores; without matplotlib's backend."""
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    folders = {"BNN_FIGURES": str(output / "figures"), "BNN_NETWORKS": str(networks_folder(output, profile).parent)}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    return threads | environment | folders | {"BNN_PROFILE": profile, "BNN_STATIC": "1", "TQDM_DISABLE": "1"}


def networks_folder(output: Path, profile: str) -> Path:
    """Where a notebook leaves the networks that it trained to those after it."""
    return output / "executed" / "networks" / profile


def figures_of(output: Path, profile: str, notebook: Path) -> list[str]:
    """The ids of the figures that a notebook has made."""
    found = (output / "figures" / profile).glob(f"{notebook.name[:2]}-*")
    return sorted({path.stem for path in found if path.suffix in SUFFIXES})


def forget_figures(output: Path, profile: str, notebook: Path) -> None:
    """Remove the figures of a notebook's earlier run, so that what is there was made by this one."""
    for figure in figures_of(output, profile, notebook):
        for suffix in SUFFIXES:
            (output / "figures" / profile / f"{figure}{suffix}").unlink(missing_ok=True)


class Line:
    """What the terminal says of one notebook that runs."""

    def __init__(self, label: str, expected: str, board: "Board") -> None:
        self.label, self.expected, self.board = label, expected, board
        self.cells, self.began = "starting", time.monotonic()

    def __str__(self) -> str:
        return f"{self.label} {self.cells} {time.monotonic() - self.began:5.0f} s{self.expected}"

    def end(self, words: str) -> None:
        """Print the last line of this notebook."""
        self.board.end(self, f"{self.label} {words}")


class Board:
    """Tells of the notebooks that run: a live line for each in a terminal, elsewhere now and then a line for each."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.live, self.lock, self.drawn = list[Line](), threading.Lock(), 0
        self.done, self.terminal = threading.Event(), sys.stdout.isatty()
        self.seconds = 1.0 if self.terminal else seconds

    def __enter__(self) -> "Board":
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        """Draw the lines again and again, until the run ends."""
        while not self.done.wait(self.seconds):
            with self.lock:
                self.draw()

    def draw(self, *last: str) -> None:
        """Print what has ended for good, and what runs so that it can be drawn over."""
        back = f"\x1b[{self.drawn}A" if self.drawn else ""
        start, rest = (back + "\r\x1b[J", [str(line) for line in self.live]) if self.terminal else ("", [])
        if not last and not self.terminal:
            rest = [str(line) for line in self.live]
        if lines := [*last, *rest]:
            print(start + "\n".join(lines), flush=True)
        self.drawn = len(rest) if self.terminal else 0

    def line(self, label: str, path: Path) -> Line:
        """Return the line of a notebook that begins."""
        time_line = TIME.search("\n".join(cell.source for cell in opening(read_notebook(path))))
        expected = re.search(r"\*\* (.*?) on ", time_line[0]) if time_line else None
        with self.lock:
            self.live.append(line := Line(label, f" ({expected[1]} expected)" if expected else "", self))
        return line

    def end(self, line: Line, words: str) -> None:
        """Print the last line of a notebook."""
        with self.lock:
            self.live.remove(line)
            self.draw(words)


def report(runs: list[Run], output: Path, profile: str, started: float) -> None:
    """Print what was run, and write the same as executed/<profile>/run.csv; times are those since `started`."""
    print(f"\n{'notebook':<36} {'began':>8} {'seconds':>8} {'cells':>6} {'figures':>8}")
    rows = ["notebook,began,seconds,cells,figures\n"]
    for run in runs:
        began = run.began - started
        print(f"{run.source.name:<36} {began:8.1f} {run.seconds:8.1f} {run.cells:6d} {run.figures:8d}")
        rows.append(f"{run.source.name},{began:.1f},{run.seconds:.1f},{run.cells},{run.figures}\n")
    elapsed = max(run.began + run.seconds for run in runs) - started
    cells, figures = sum(run.cells for run in runs), sum(run.figures for run in runs)
    print(f"{'total':<45} {elapsed:8.1f} {cells:6d} {figures:8d}")
    write(output / "executed" / profile / "run.csv", "".join(rows))
    print(f"\nExecuted copies: {output / 'executed' / profile}\nFigures:         {output / 'figures' / profile}")


def count(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ---------------------------------------------------------------- publish


def publish(root: Path, wanted: list[str]) -> None:
    """Run notebooks, then write their outputs, minutes and figures into tracked files."""
    for path in find_notebooks(root, wanted):
        for start in (TIME, COURSE):
            if not any(start.search(cell.source) for cell in opening(read_notebook(path))):
                words = start.pattern.strip("^.$").replace("\\", "")
                raise Stop(f"{path.name} has no line that starts with {words} before its first code cell")
    runs = run_all(root, "quick", wanted, root)
    texts = {run.source: published_text(root, run) for run in runs}
    for run in runs:
        publish_figures(root, run.source)
        write(run.source, texts[run.source])
    print(f"Published {count(len(runs), 'notebook')} and {count(sum(r.figures for r in runs), 'figure')}")
    refresh_readme(root)


def published_text(root: Path, run: Run) -> str:
    """An executed notebook as it goes into notebooks/; refused if it is too large or was edited meanwhile."""
    now = [cell.source for cell in read_notebook(run.source).cells]
    if now != [cell.source for cell in run.notebook.cells]:
        raise Stop(f"{run.source.name} was edited while it ran; nothing is published, run it again")
    for cell in opening(run.notebook):
        cell.source = TIME.sub(time_line(run.seconds), cell.source)
        cell.source = COURSE.sub(course_map(root, run.source), cell.source)
    text = notebook_text(run.notebook)
    size = len(text.encode())
    if size >= LARGEST_NOTEBOOK:
        raise Stop(f"{run.source.name} would be {size / 1e6:.2f} MB; nothing is published, the limit is 1 MB")
    return text


def time_line(seconds: float) -> str:
    """The opening's line on the measured time: minutes, understated by at most 15 seconds."""
    minutes = math.ceil((seconds - 15) / 60)
    words = "under a minute" if seconds < 45 else f"about {count(max(minutes, 1), 'minute')}"
    return f"**Time:** {words} on {count(os.cpu_count() or 1, 'CPU core')}."


def course_map(root: Path, here: Path) -> str:
    """The opening's line of all notebooks, with links to the others."""
    words = []
    for path in find_notebooks(root):
        name = f"{path.name[:2]} {title(path)}"
        words.append(f"**{name} (you are here)**" if path.name == here.name else f"[{name}]({path.name})")
    return f"**The course:** {' → '.join(words)}"


def title(path: Path) -> str:
    """A notebook's title, without its number."""
    text = "\n\n".join(cell.source for cell in opening(read_notebook(path)))
    found = re.search(r"^# +(?:\d+[.:]? +)?(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else path.stem


def publish_figures(root: Path, notebook: Path) -> None:
    """Copy a notebook's figures to figures/published/; all others of it go."""
    made, published = root / "figures" / "quick", root / "figures" / "published"
    published.mkdir(parents=True, exist_ok=True)
    fresh = {f"{figure}{suffix}" for figure in figures_of(root, "quick", notebook) for suffix in SUFFIXES}
    for old in published.glob(f"{notebook.name[:2]}-*"):
        if old.name not in fresh:
            old.unlink()
    for name in sorted(fresh):
        if not (made / name).exists():
            raise Stop(f"{notebook.name} made no {name}, though it made others of that figure")
        shutil.copyfile(made / name, published / name)


# ---------------------------------------------------------------- README


def refresh_readme(root: Path) -> None:
    """Rewrite gallery and reading order of both READMEs, between <!-- begin:NAME --> and <!-- end:NAME --> markers."""
    for path, said in readmes(root):
        refresh(path, {"reading-order": reading_order(root, said), "gallery": gallery(root, said)})


def readmes(root: Path) -> list[tuple[Path, Words]]:
    """README.md, and README.zh-CN.md where there is one, each with what gives English text in its language."""
    pages: list[tuple[Path, Words]] = [(root / "README.md", str)]
    if (root / "README.zh-CN.md").exists():
        pages.append((root / "README.zh-CN.md", in_chinese(root)))
    return pages


def in_chinese(root: Path) -> Words:
    """Return a function that translates what READMEs are made of, by notebooks/zh-CN.csv."""
    with (root / "notebooks" / "zh-CN.csv").open(encoding="utf-8", newline="") as file:
        words = {row["en"]: row["zh-CN"] for row in csv.DictReader(file)}

    def said(text: str) -> str:
        if text not in words:
            raise Stop(f"notebooks/zh-CN.csv does not translate {text!r}")
        return words[text]

    return said


def refresh(path: Path, sections: dict[str, str]) -> None:
    """Rewrite the sections of a file, by the names in their markers."""
    if not path.exists():
        print(f"{path.name} is absent, so no tables were refreshed")
        return
    before = text = path.read_text(encoding="utf-8")
    for name, body in sections.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        if begin not in text or end not in text.split(begin)[1]:
            print(f"{path.name} has no section {begin} ... {end}, so it was not refreshed")
            continue
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"
    if text != before:
        write(path, text)
        print(f"{path.parent.name}/{path.name} refreshed")


def reading_order(root: Path, said: Words = str) -> str:
    """The table of notebooks: number, linked title, what it is about, minutes, Colab."""
    repository = repository_of(root)
    columns = " | ".join(map(said, ("Notebook", "What it is about", "Minutes")))
    rows = [f"| | {columns} | |", "| --- | --- | --- | --- | --- |"]
    for path in find_notebooks(root):
        text = "\n\n".join(cell.source for cell in opening(read_notebook(path)))
        link = f"[{said(title(path))}](notebooks/{path.name})"
        colab = f"[Colab]({colab_link(repository, path.name)})"
        about = cell_text(said(first_sentence(text)))
        rows.append(f"| {path.name[:2]} | {link} | {about} | {minutes(text)} | {colab} |")
    return "\n".join(rows)


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph that is prose: no heading, badge, list or time."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.strip().splitlines() if not line.startswith("#")]
        paragraph = " ".join(line.strip() for line in lines)
        if paragraph and not re.match(r"\[?!\[|<|[-*+>|] |\*\*", paragraph):
            sentence = re.match(r".+?[.!?](?=\s+[A-Z]|$)", paragraph)
            return sentence[0] if sentence else paragraph
    return ""


def minutes(text: str) -> str:
    """The minutes that an opening's time line says, for a table."""
    line = TIME.search(text)
    if line and "under a minute" in line[0]:
        return "< 1"
    number = re.search(r"\d+", line[0]) if line else None
    return number[0] if number else ""


def cell_text(text: str) -> str:
    """Text that may stand in a cell of a markdown table."""
    return text.replace("|", "\\|")


def read_manifest(root: Path) -> list[dict[str, str]]:
    """The rows of notebooks/figures.csv: id, notebook, caption, gallery (0 or 1)."""
    path = root / "notebooks" / "figures.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def gallery(root: Path, said: Words = str) -> str:
    """A two-column table of figures."""
    tiles = []
    for row in read_manifest(root):
        file = f"figures/published/{row['id']}"
        if row["gallery"] == "1" and (root / f"{file}.png").exists():
            caption = cell_text(said(row["caption"].rstrip(".")))
            notebook = f"[{said('notebook')} {row['id'][:2]}](notebooks/{row['notebook']})"
            links = f"{notebook}, [{said('numbers')}]({file}.csv)"
            tiles.append(f"![{caption}]({file}.png)<br>{links}")
    if not tiles:
        return "No figure is published yet."
    rows = ["| | |", "| --- | --- |"]
    for left in range(0, len(tiles), 2):
        rows.append(f"| {' | '.join([*tiles[left : left + 2], ''][:2])} |")
    return "\n".join(rows)


# ---------------------------------------------------------------- badges


def repository_of(root: Path) -> str:
    """The owner/name that pyproject.toml's [project.urls] Repository says."""
    found = SETTING.search((root / "pyproject.toml").read_text(encoding="utf-8"))
    if not found:
        raise Stop('pyproject.toml has no line Repository = "https://github.com/OWNER/NAME"', 2)
    return found["repository"]


def origin_of(root: Path) -> str | None:
    """The owner/name of git's origin, if that is on GitHub."""
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    try:
        url = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return None
    found = re.fullmatch(rf"(?:https://(?:[^@/]+@)?|ssh://git@|git@)github\.com[:/]{GITHUB}(?:\.git)?/?", url)
    return found["repository"] if found else None


def setup_cell(repository: str) -> str:
    """The set-up cell of every notebook, for a repository owner/name."""
    return SETUP_CELL.replace("{repository}", f"https://github.com/{repository}")


def colab_link(repository: str, name: str) -> str:
    """The address that opens a notebook in Colab."""
    return f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"


def badges(root: Path, repository: str) -> None:
    """Write one repository owner/name into every badge, link and set-up cell of the course."""
    old = repository_of(root)
    new = repository or origin_of(root) or old
    if not re.fullmatch(GITHUB, new) or new.endswith((".git", "/.", "/..")):
        raise Stop(f"REPOSITORY must be owner/name, such as ada/bnn-tutorial; it is {new!r}", 2)
    edits = {path: retargeted_notebook(path, old, new) for path in find_notebooks(root)}
    for name, line in (("pyproject.toml", SETTING), ("CITATION.cff", CITED)):
        text = (root / name).read_text(encoding="utf-8")
        edits[root / name] = line.sub(lambda found: found[1] + new + found[3], text)
    for page in root.glob("README*.md"):
        edits[page] = retarget(page.read_text(encoding="utf-8"), old, new)
    changed = [path for path, text in edits.items() if text != path.read_text(encoding="utf-8")]
    for path in changed:
        write(path, edits[path])
    print(f"Repository https://github.com/{new}: {count(len(changed), 'file')} changed")


def retarget(text: str, old: str, new: str) -> str:
    """Markdown with its links to the old repository, and all its Colab links, led to the new one."""
    text = re.sub(rf"(https://github\.com/){re.escape(old)}(?![\w-])", lambda found: found[1] + new, text)
    return COLAB.sub(lambda found: found[1] + new + found[3] + found[4], text)


def retargeted_notebook(path: Path, old: str, new: str) -> str:
    """A notebook with the badge, links and set-up cell of a repository; its outputs stay."""
    notebook = read_notebook(path)
    cells = code_cells(notebook)
    if not cells or "tutorial.start(" not in cells[0][1].source:
        raise Stop(f"{path.name}: its first code cell is not the set-up cell")
    cells[0][1].source = setup_cell(new)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = retarget(cell.source, old, new)
    for cell in opening(notebook):
        cell.source = COLAB.sub(colab_link(new, path.name), cell.source)
    return notebook_text(notebook)


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}\n")


def positive(word: str) -> int:
    """A number from 1 on."""
    number = int(word)
    if number < 1:
        raise ValueError
    return number


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = Parser(description="Run and publish the course's notebooks.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute notebooks; tracked files stay as they are")
    run.add_argument("--output", type=Path, help="where executed/ and figures/ go (default: the repository)")
    run.add_argument("--jobs", type=positive, help="notebooks at a time (default: 2; 1 in the full profile)")
    run.add_argument("--profile", choices=PROFILES, default="quick")
    run.add_argument("--solve", action="store_true", help="hold the exercises' solutions against their checks")
    for command in (run, commands.add_parser("publish", help="execute notebooks and write their outputs back")):
        command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="such as 05 (default: all)")
    commands.add_parser("readme", help="refresh the READMEs' tables from what is published")
    links = commands.add_parser("badges", help="write the repository's address everywhere")
    links.add_argument("--repository", default="", help="owner/name (default: git's origin, else unchanged)")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Do one command; the exit status is 0, 1 for a failed run, 2 for wrong input, 130 for Ctrl-C."""
    given = arguments(words)
    root = given.root.resolve()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Ctrl-C leaves tasks behind; that is no news
    try:
        if given.command == "run":
            jobs = given.jobs or (1 if given.profile == "full" else min(2, os.cpu_count() or 1))
            output = (given.output or root).resolve()
            run_all(root, given.profile, given.notebooks, output, jobs, given.solve)
        elif given.command == "publish":
            publish(root, given.notebooks)
        elif given.command == "readme":
            refresh_readme(root)
        else:
            badges(root, given.repository)
    except Stop as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
