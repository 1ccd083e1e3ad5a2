"""tools/notebooks.py on a small course of its own: run, publish, badges, and what stops them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools import notebooks as tool

TOOL = Path(tool.__file__)
FIGURE = """\
import os
from pathlib import Path
folder = Path(os.environ["BNN_FIGURES"], os.environ["BNN_PROFILE"])
folder.mkdir(parents=True, exist_ok=True)
for suffix in (".png", ".svg", ".csv"):
    (folder / f"01-line{suffix}").write_text("p,accuracy")
print(os.environ["TQDM_DISABLE"], Path.cwd().name)"""
OPENING = """\
# 01 A line

[![Colab](https://colab.research.google.com/github/OWNER/bnn-tutorial/blob/main/notebooks/01_line.ipynb)](x)

A line is drawn | here. It is short.

**The course:** not drawn.

**Time:** not measured."""


def save(root: Path, name: str, *cells: str, opening: str = OPENING) -> Path:
    """Write a notebook of an opening and code cells."""
    path = root / "notebooks" / name
    path.parent.mkdir(exist_ok=True)
    notebook = new_notebook(cells=[new_markdown_cell(opening), *map(new_code_cell, cells)])
    notebook.metadata["language_info"] = {"name": "python", "version": "0"}
    nbformat.write(notebook, path)
    return path


def command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The tool's answer to a command line."""
    line = [sys.executable, str(TOOL), "--root", str(root), *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture
def course(tmp_path):
    """A course of one notebook, with the files that publish and badges touch."""
    setup = "# set-up\n# settings = tutorial.start()"
    save(tmp_path, "01_line.ipynb", setup, FIGURE, "", "1 + 1")
    manifest = "id,notebook,caption,gallery\n01-line,01_line.ipynb,A line,1\n01-other,01_line.ipynb,Not made,1\n"
    (tmp_path / "notebooks" / "figures.csv").write_text(manifest)
    sections = "".join(f"<!-- begin:{n} -->\nold\n<!-- end:{n} -->\n" for n in ("reading-order", "gallery"))
    link = "git clone https://github.com/OWNER/bnn-tutorial\nhttps://github.com/OWNER/bnn-tutorial-two\n"
    (tmp_path / "README.md").write_text(link + sections + "the end\n")
    (tmp_path / "README.zh-CN.md").write_text(link + sections)
    english = ("Notebook", "What it is about", "Minutes", "A line", "A line is drawn | here.", "notebook", "numbers")
    words = "".join(f"{text},{text.upper()}\n" for text in english)
    (tmp_path / "notebooks" / "zh-CN.csv").write_text(f"en,zh-CN\n{words}")
    for name in ("pyproject.toml", "CITATION.cff"):
        (tmp_path / name).write_text((tool.ROOT / name).read_text())
    return tmp_path


def files(root: Path) -> dict[str, bytes]:
    """What every file of a folder holds."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_run_and_publish(course):
    before = files(course)
    done = command(course, "run")
    assert done.returncode == 0, done.stderr
    assert "01_line.ipynb" in done.stdout and "total" in done.stdout
    after = files(course)
    assert {name: after[name] for name in before} == before
    executed = nbformat.read(course / "executed/quick/01_line.ipynb", as_version=4)
    counts = [cell.execution_count for cell in executed.cells if cell.cell_type == "code"]
    assert counts == [1, 2, None, 3]
    assert executed.cells[2].outputs[0].text == "1 notebooks\n"
    row = (course / "executed/quick/run.csv").read_text().splitlines()[1].split(",")
    assert (row[0], row[3], row[4]) == ("01_line.ipynb", "3", "1")

    stale = course / "figures/published/01-old.png"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    other = stale.with_name("02-other.png")
    other.write_text("")
    done = command(course, "publish", "01")
    assert done.returncode == 0, done.stderr
    published = {path.name for path in stale.parent.iterdir()}
    assert published == {"01-line.png", "01-line.svg", "01-line.csv", "02-other.png"}
    notebook = json.loads((course / "notebooks/01_line.ipynb").read_text())
    opening = "".join(notebook["cells"][0]["source"])
    assert "**Time:** under a minute on " in opening and "**The course:** **01 A line (you are here)**" in opening
    assert notebook["cells"][2]["outputs"] and notebook["cells"][2]["metadata"] == {}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    readme = (course / "README.md").read_text()
    assert "| 01 | [A line](notebooks/01_line.ipynb) | A line is drawn \\| here. | < 1 | [Colab](" in readme
    assert "![A line](figures/published/01-line.png)" in readme and "Not made" not in readme
    assert "old" not in readme and readme.endswith("the end\n")
    translated = (course / "README.zh-CN.md").read_text()
    assert "| 01 | [A LINE](notebooks/01_line.ipynb) | A LINE IS DRAWN \\| HERE. | < 1 | [Colab](" in translated
    assert "![A LINE](figures/published/01-line.png)" in translated
    once = files(course)
    assert command(course, "readme").returncode == 0
    assert files(course) == once


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\n1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys\nprint('careful', file=sys.stderr)", "it wrote to stderr: careful"),
        ("import ipywidgets\nipywidgets.IntSlider()", "it made a widget"),
        ("import os\nos._exit(1)", "the kernel died"),
    ],
)
def test_a_bad_cell_stops_the_run(tmp_path, source, said):
    save(tmp_path, "01_good.ipynb", "1")
    path = save(tmp_path, "02_bad.ipynb", "1", source, "2")
    save(tmp_path, "03_after.ipynb", "1")
    before = path.read_bytes()
    for words in (("run", "--jobs", "1"), ("publish",)):
        done = command(tmp_path, *words, "02", "03")
        assert done.returncode == 1
        assert done.stderr.startswith(f"02_bad.ipynb stopped at cell 3: {source.splitlines()[0]}\n")
        assert said in done.stderr and len(done.stderr.splitlines()) == 2
        assert not (tmp_path / "executed/quick/03_after.ipynb").exists()
    assert path.read_bytes() == before and not (tmp_path / "figures/published").exists()


MEET = """\
import time
from pathlib import Path
Path("{own}").touch()
deadline = time.monotonic() + 60
while not Path("{other}").exists():
    assert time.monotonic() < deadline, "{other} never came"
    time.sleep(0.05)"""


def test_notebooks_run_together(tmp_path):
    save(tmp_path, "01_first.ipynb", MEET.format(own="one", other="two"))
    save(tmp_path, "02_second.ipynb", MEET.format(own="two", other="one"))
    done = command(tmp_path, "run", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "2 at a time" in done.stdout
    table = (tmp_path / "executed/quick/run.csv").read_text().splitlines()
    assert table[0] == "notebook,began,seconds,cells,figures"
    assert [row.split(",")[0] for row in table[1:]] == ["01_first.ipynb", "02_second.ipynb"]


@pytest.mark.parametrize(
    ("jobs", "given", "expected"), [("1", None, None), ("2", None, max(1, (os.cpu_count() or 1) // 2)), ("2", "7", 7)]
)
def test_notebooks_that_run_together_share_the_cores(tmp_path, monkeypatch, jobs, given, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    told = "import os\nprint(os.environ.get('OMP_NUM_THREADS'))"
    for name in ("01_first.ipynb", "02_second.ipynb"):
        save(tmp_path, name, told)
    done = command(tmp_path, "run", "--jobs", jobs)
    assert done.returncode == 0, done.stderr
    for name in ("01_first.ipynb", "02_second.ipynb"):
        ((_, cell),) = tool.code_cells(tool.read_notebook(tmp_path / "executed/quick" / name))
        assert cell.outputs[0].text.strip() == str(expected)


def test_a_bad_cell_stops_the_others_too(tmp_path):
    save(tmp_path, "01_long.ipynb", MEET.format(own="one", other="two"), *["import time\ntime.sleep(1)"] * 60)
    save(tmp_path, "02_bad.ipynb", MEET.format(own="two", other="one"), "1 / 0")
    save(tmp_path, "03_after.ipynb", "from pathlib import Path\nPath('ran').touch()")
    done = command(tmp_path, "run", "--jobs", "2")
    assert done.returncode == 1
    assert done.stderr.startswith("02_bad.ipynb stopped at cell 3: 1 / 0\n") and len(done.stderr.splitlines()) == 2
    assert not list(tmp_path.glob("executed/quick/*.ipynb")) and not (tmp_path / "notebooks/ran").exists()


EXERCISE = """\
How much is 1 + 1?

<details><summary>Solution</summary>

```python
answer = {answer}
```

</details>"""
CHECK = """\
from IPython.display import Markdown
check = lambda answer: Markdown("open" if answer is ... else "**Right.**" if answer == 2 else "**Not yet.**")
answer = ...
check(answer)"""


@pytest.mark.parametrize(("answer", "status"), [(2, 0), (3, 1)])
def test_solutions_are_held_against_their_checks(tmp_path, answer, status):
    path = save(tmp_path, "01_exercise.ipynb", CHECK, opening=EXERCISE.format(answer=answer))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].metadata["tags"] = ["exercise"]
    nbformat.write(notebook, path)
    assert command(tmp_path, "run").returncode == 0  # a reader's run leaves the exercises open
    done = command(tmp_path, "run", "--solve")
    assert done.returncode == status
    assert ("refuses its solution" in done.stderr) == bool(status)
    cells = nbformat.read(tmp_path / "executed/quick/01_exercise.ipynb", as_version=4).cells
    assert cells[1].source == CHECK and cells[1].execution_count == 1 and "Not yet" not in str(cells[1].outputs)


def test_the_course_map_leads_to_the_other_notebooks(tmp_path):
    paths = [save(tmp_path, f"0{i}_n.ipynb", "1", opening=f"# 0{i}. Title {i}") for i in (1, 2, 3)]
    links = "[01 Title 1](01_n.ipynb) → **02 Title 2 (you are here)** → [03 Title 3](03_n.ipynb)"
    assert tool.course_map(tmp_path, paths[1]) == f"**The course:** {links}"


def test_publish_refuses_a_large_notebook(tmp_path):
    path = save(tmp_path, "01_large.ipynb", "print('x' * 1_000_000)")
    before = path.read_bytes()
    done = command(tmp_path, "publish")
    assert done.returncode == 1 and "the limit is 1 MB" in done.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ["run", "07"],
        ["run", "--profile", "fast"],
        ["run", "--jobs", "0"],
        ["publish", "nothing.ipynb"],
        ["badges", "--repository", "x"],
    ],
)
def test_wrong_input_is_one_line_and_status_2(course, words):
    before = files(course)
    done = command(course, *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert files(course) == before


@pytest.mark.parametrize("name", ["", "a", "a/b/c", "a b/c", "a/b.git", "a/..", "https://github.com/a/b", '"/x'])
def test_a_repository_is_owner_and_name(course, name, monkeypatch):
    monkeypatch.setattr(tool, "origin_of", lambda root: name)
    with pytest.raises(tool.Stop) as stop:
        tool.badges(course, name or "-")
    assert stop.value.status == 2 and "owner/name" in str(stop.value)


def test_badges_write_one_address_everywhere(course):
    assert command(course, "badges", "--repository", "ada/bits.and-bytes").returncode == 0
    assert tool.repository_of(course) == "ada/bits.and-bytes"
    assert 'repository-code: "https://github.com/ada/bits.and-bytes"' in (course / "CITATION.cff").read_text()
    readme = (course / "README.md").read_text()
    assert readme.startswith("git clone https://github.com/ada/bits.and-bytes\n")
    assert "https://github.com/OWNER/bnn-tutorial-two" in readme
    assert (course / "README.zh-CN.md").read_text().startswith("git clone https://github.com/ada/bits.and-bytes\n")
    notebook = nbformat.read(course / "notebooks/01_line.ipynb", as_version=4)
    assert tool.colab_link("ada/bits.and-bytes", "01_line.ipynb") in notebook.cells[0].source
    assert notebook.cells[1].source == tool.setup_cell("ada/bits.and-bytes")
    once = files(course)
    assert command(course, "badges").returncode == 0  # no origin: what is set stays
    assert files(course) == once


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://github.com/ada/bits.git", "ada/bits"),
        ("https://token@github.com/ada/bits", "ada/bits"),
        ("git@github.com:ada/bits.git", "ada/bits"),
        ("ssh://git@github.com/ada/bits", "ada/bits"),
        ("https://example.org/ada/bits", None),
        ("/srv/git/bits", None),
    ],
)
def test_origin(tmp_path, url, found):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", url], check=True)
    assert tool.origin_of(tmp_path) == found


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "under a minute"), (45, "about 1 minute"), (75, "about 1 minute"), (76, "about 2 minutes")],
)
def test_time_line(seconds, words, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert tool.time_line(seconds) == f"**Time:** {words} on 2 CPU cores."


def test_the_board_tells_what_runs_and_what_ended(tmp_path, capsys):
    path = save(tmp_path, "01_n.ipynb", "1", opening="# 01. N\n\n**Time:** about 2 minutes on 2 CPU cores.")
    with tool.Board(seconds=0.05) as board:
        line = board.line("[1/1] 01_n.ipynb", path)
        line.cells = "3/9 cells"
        time.sleep(0.3)
        line.end("9/9 cells")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[1/1\] 01_n.ipynb 3/9 cells +0 s \(about 2 minutes expected\)", lines[0])
    assert lines[-1] == "[1/1] 01_n.ipynb 9/9 cells"


def test_in_a_terminal_lines_are_drawn_over(tmp_path, capsys, monkeypatch):
    path = save(tmp_path, "01_n.ipynb", "1", opening="# 01. N")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    board = tool.Board()
    one, two = board.line("one", path), board.line("two", path)
    board.draw()
    one.end("done")
    two.end("done")
    out = capsys.readouterr().out
    assert "\x1b[2A\r\x1b[Jone done\ntwo " in out and out.endswith("\x1b[1A\r\x1b[Jtwo done\n")
