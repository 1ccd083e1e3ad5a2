"""The notebooks' set-up cell: it finds the course from any folder in it, and fetches it on Colab.

Colab is stood in for by an interpreter that has every package of the tests except bnn_utils, a stand-in
google.colab module and an empty working directory. Building bnn_utils there uses the setuptools that is
installed (PIP_NO_BUILD_ISOLATION), so the test needs no network; on Colab pip fetches setuptools itself.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy
import pytest
import torch

from tools import notebooks as tool

CELL = tool.setup_cell(tool.repository_of(tool.ROOT))
SITES = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}

# What a kernel adds around the cell: a first entry of the import path, and on Colab a module.
BEFORE = """\
import sys, types
sys.path[0] = {entry!r}
if {colab}:
    sys.modules["google"] = types.ModuleType("google")
    sys.modules["google.colab"] = types.ModuleType("google.colab")
"""
AFTER = """
import json
import bnn_utils, course, numpy, torch
print()
state = {"bnn_utils": bnn_utils.__file__, "course": course.__file__, "cwd": os.getcwd(), "profile": settings.profile}
state.update({package.__name__: [package.__version__, package.__file__] for package in (numpy, torch)})
print(json.dumps(state))
"""


def run_cell(folder, python=sys.executable, entry="", colab=False, cell=CELL, **environment):
    """Run the set-up cell in a folder as a kernel would; what it left, and what it printed."""
    code = BEFORE.format(entry=entry, colab=colab) + cell + AFTER
    keep = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "BNN_PROFILE")}
    line = [str(python), "-c", code]
    done = subprocess.run(line, cwd=folder, env=keep | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed, _, state = done.stdout.rstrip("\n").rpartition("\n")
    return json.loads(state), printed.strip()


def package_files():
    """The size and time of every installed file of torch and numpy, caches aside."""
    found = {}
    for site in SITES:
        for package in ("torch", "numpy"):
            for path in (site / package).rglob("*"):
                if path.suffix != ".pyc" and path.is_file():
                    stat = path.stat()
                    found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    assert len(found) > 1000
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A git repository that holds both packages as they are in this checkout."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for package in ("bnn_utils", "notebooks/course"):
        shutil.copytree(tool.ROOT / package, folder / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(tool.ROOT / name, folder)
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "The package"]):
        subprocess.run([*git, *words], check=True)
    return folder.as_uri()  # an address: a bare path would be cloned with its whole history


@pytest.fixture
def bare_python(tmp_path):
    """An interpreter with the installed packages, bnn_utils alone left out."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for site in SITES:
        for entry in site.iterdir():
            ours = entry.name.lower().startswith(("bnn_utils", "bnn-utils", "__editable__", "__pycache__"))
            if not ours and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    venv.create(tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "packages.pth").write_text(f"{packages}\n")
    python = tmp_path / "venv" / "bin" / "python"
    missing = subprocess.run([python, "-c", "import bnn_utils"], cwd=tmp_path, capture_output=True, check=False)
    assert missing.returncode == 1
    return python


def check_home(state, home):
    """Both packages come from this folder, and it is where the notebook works."""
    assert Path(state["bnn_utils"]) == home / "bnn_utils" / "__init__.py"
    assert Path(state["course"]) == home / "notebooks" / "course" / "__init__.py"
    assert Path(state["cwd"]) == home


@pytest.mark.parametrize("place", [".", "notebooks", "notebooks/course"])
def test_the_cell_finds_the_course(place):
    state, printed = run_cell(tool.ROOT / place)
    check_home(state, tool.ROOT)
    assert state["profile"] == "quick"
    assert len(printed.splitlines()) == 1 and "quick" in printed


@pytest.mark.posix
def test_the_cell_finds_the_course_where_it_is_not_installed(bare_python):
    state, _ = run_cell(tool.ROOT / "notebooks", bare_python)
    check_home(state, tool.ROOT)


@pytest.mark.posix
@pytest.mark.parametrize("path_starts_with", ["working directory", "content folder"])
def test_colab(path_starts_with, tmp_path, bare_python, source):
    content = tmp_path / "content"
    content.mkdir()
    entry = "" if path_starts_with == "working directory" else str(content)
    before = package_files()
    settings = {"BNN_REPOSITORY": source, "PIP_NO_BUILD_ISOLATION": "0"}
    state, printed = run_cell(content, bare_python, entry, colab=True, **settings)
    assert package_files() == before
    for package in (torch, numpy):
        seen, file = state[package.__name__]
        assert seen == package.__version__ and Path(file).samefile(package.__file__)
    clone = content / "bnn-tutorial"
    assert Path(state["cwd"]) == clone
    assert Path(state["course"]) == clone / "notebooks" / "course" / "__init__.py"
    installed = bare_python.parent.parent
    home = clone if entry == "" else installed
    assert Path(state["bnn_utils"]).is_relative_to(home)
    assert list(installed.rglob("bnn_utils-*.dist-info"))
    assert not list(installed.rglob("torch-*.dist-info"))
    depth = subprocess.run(
        ["git", "-C", clone, "rev-list", "--count", "HEAD"], capture_output=True, text=True, check=True
    )
    assert depth.stdout.strip() == "1"
    assert len(printed.splitlines()) == 1

    again, _ = run_cell(content, bare_python, entry, colab=True, **settings)  # a restarted kernel
    assert again == state


def test_elsewhere_the_missing_course_is_an_import_error(tmp_path):
    line = [sys.executable, "-c", CELL]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: No module named 'course'")
