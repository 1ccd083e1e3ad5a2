"""JupyterLab in a real browser: a reader runs a notebook, moves its slider, answers an exercise, runs it again.

Needs Playwright (the extra `e2e`) and a Chromium, which BNN_CHROMIUM names if it is not on the path: `make e2e`.
Screenshots are kept in executed/e2e/.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

from tools import notebooks as tool

pytestmark = pytest.mark.e2e
api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make e2e installs it")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("BNN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SETTINGS = {  # no news, and every cell in the page, also those out of view
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
NOTEBOOK = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook"
WAITING = f"[...document.querySelectorAll('{NOTEBOOK} .jp-InputPrompt')].filter(x => x.innerText.includes('*')).length"
IDLE = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
PICTURE = "img[src^='data:image']"
SCREENSHOTS = tool.ROOT / "executed" / "e2e"
PATIENCE = 30 * 60 * 1000  # milliseconds: a machine may be slow, or busy
# The first line of an exercise's cell, a wrong answer, a part of what is said to it, a right answer.
ANSWERS = {
    "01_binarization": ("share = ...", "share = 0.5", "before the ReLU", "share = 0"),
    "06_damage": ("count = ...", "count = 14", "the sign counts too", "count = 15"),
    "08_surviving_damage": ("answer = ...  # the name", "answer = 'vote'", "far fewer", "answer = 'vote5-upper-range'"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of JupyterLab on a copy of the course, and the folder of its notebooks."""
    home = tmp_path_factory.mktemp("home")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=tool.ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (home / "course" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tool.ROOT / name, home / "course" / name)
    for name, settings in SETTINGS.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    ours = ("BNN_STATIC", "BNN_PROFILE", "BNN_FIGURES", "TQDM_DISABLE", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {f"JUPYTERLAB_{kind}_DIR": str(home / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    line += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "notebooks"]
    log = home / "server.log"
    with open(log, "wb") as told:
        server = subprocess.Popen(line, cwd=home / "course", env=environment, stdout=told, stderr=told)
    try:
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/api").close()
                break
            except URLError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", home / "course" / "notebooks"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: install one, or name it in BNN_CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Reader:
    """Somebody before a notebook that is open in JupyterLab."""

    def __init__(self, page, address, path):
        self.page, self.path = page, path
        page.goto(f"{address}/lab/workspaces/{path.stem}/tree/{path.name}?reset")
        page.locator(IDLE).wait_for(timeout=PATIENCE)
        while "idle" not in self.kernel(address):
            time.sleep(0.5)

    def kernel(self, address):
        """The states of the notebook's kernels, as the server tells them."""
        with urlopen(f"{address}/api/sessions") as answer:
            sessions = json.load(answer)
        return [session["kernel"]["execution_state"] for session in sessions if session["name"] == self.path.name]

    def settled(self):
        """Wait until no cell runs or waits to run; return the notebook as it is saved then."""
        self.page.wait_for_function(f"{WAITING} === 0", timeout=PATIENCE)
        self.page.locator(IDLE).wait_for()
        self.page.keyboard.press("Control+s")
        self.page.locator(".lm-TabBar-tab.jp-mod-dirty").wait_for(state="detached")
        return nbformat.read(self.path, as_version=4)

    def run_all(self):
        self.page.locator(".lm-MenuBar-item").get_by_text("Run", exact=True).click()
        self.page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
        self.page.wait_for_function(f"{WAITING} > 0")
        return self.settled()

    def run(self, cell, line):
        """Write another first line into a cell and run it; return the words that it shows."""
        prompt = cell.locator(".jp-InputPrompt")
        before = prompt.inner_text()
        cell.locator(".cm-line").first.click()
        for key in ("Home", "Shift+End"):
            self.page.keyboard.press(key)
        self.page.keyboard.type(line)
        self.page.keyboard.press("Control+Enter")
        api.expect(prompt).not_to_have_text(before)
        self.settled()
        return " ".join(cell.locator(".jp-OutputArea-output").all_inner_texts())


@pytest.fixture(params=ANSWERS)
def reader(request, lab, browser):
    address, folder = lab
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(300_000)
    api.expect.set_options(timeout=300_000)
    reader = Reader(page, address, folder / f"{request.param}.ipynb")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    yield reader
    page.screenshot(path=SCREENSHOTS / f"{request.param}-end.png")
    page.close()


def stumbles(notebook):
    """What a reader would stumble over: cells that did not run in order, errors, warnings."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    found = [] if counts == list(range(counts[0], counts[0] + len(cells))) else [f"executed as {counts}"]
    outputs = [output for cell in cells for output in cell.outputs]
    found += [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
    return found + [output.text for output in outputs if output.get("name") == "stderr"]


def pictures(place):
    """The pictures in it, each of which the browser has drawn."""
    found = place.locator(PICTURE).evaluate_all("all => all.map(x => [x.src, x.naturalWidth])")
    assert all(width > 100 for _, width in found)
    return [source for source, _ in found]


def test_a_reader_goes_through_a_notebook(reader):
    page, name = reader.page, reader.path.stem
    cells = page.locator(f"{NOTEBOOK} .jp-CodeCell")
    published = len(pictures(cells))
    assert stumbles(reader.run_all()) == []
    assert len(pictures(cells)) == published > 2

    handle = page.locator(f"{NOTEBOOK} .noUi-handle")
    assert handle.count() == (0 if name.startswith("08") else 1)
    if handle.count():
        cell = cells.filter(has=page.locator(".noUi-handle"))
        (before,) = pictures(cell)
        handle.focus()
        page.keyboard.press("ArrowRight")
        (picture,) = cell.locator(PICTURE).all()
        api.expect(picture).not_to_have_attribute("src", before, timeout=PATIENCE)
        cell.screenshot(path=SCREENSHOTS / f"{name}-slider.png")

    line, wrong, remark, right = ANSWERS[name]
    at = cells.filter(has_text=line).get_attribute("data-windowed-list-index")
    exercise = page.locator(f"{NOTEBOOK} .jp-CodeCell[data-windowed-list-index='{at}']")
    assert remark in reader.run(exercise, wrong)
    exercise.screenshot(path=SCREENSHOTS / f"{name}-wrong.png")
    assert "Right." in reader.run(exercise, right)

    assert stumbles(reader.run_all()) == []  # once more, without a restart
