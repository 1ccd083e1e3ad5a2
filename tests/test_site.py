"""The site builds without a warning, and no link within it is broken; wants the extra "site"."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tools import notebooks as tool

for module in ("sphinx", "myst_nb", "furo", "latex2mathml"):
    pytest.importorskip(module, reason='the site wants pip install -e ".[site]"')

BUILD = ["-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-c", "docs"]


class Page(HTMLParser):
    """The links and anchors of a page, and what it asks other servers for."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.asked = set(), {""}, set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links |= {found[key] for key in ("href", "src") if found.get(key)}
        if tag in ("script", "img", "iframe") or found.get("rel") == "stylesheet":
            self.asked |= {url for key in ("href", "src") if re.match("(https?:)?//", url := found.get(key) or "")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, *BUILD, "-d", str(folder / "doctrees"), ".", str(folder / "site")]
    environment = os.environ | {"PYTHONPATH": str(tool.ROOT)}
    done = subprocess.run(command, cwd=tool.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_no_link_within_the_site_is_broken(site, pages):
    broken = set()
    for path, page in pages.items():
        for link in page.links:
            scheme, host, name, _, anchor = urlsplit(link)
            if scheme or host:
                continue
            target = Path(os.path.normpath(path.parent / unquote(name))) if name else path
            if not target.is_file() or (target in pages and unquote(anchor) not in pages[target].anchors):
                broken.add((str(path.relative_to(site)), link))
    assert not broken and len(pages) > 30


def test_every_notebook_has_its_page_with_pictures_and_colab(site, pages):
    assert (site / "index.html").read_text(encoding="utf-8") == (site / "README.html").read_text(encoding="utf-8")
    for path in tool.find_notebooks(tool.ROOT):
        page = pages[site / "notebooks" / f"{path.stem}.html"]
        assert tool.colab_link(tool.repository_of(tool.ROOT), path.name) in page.links
        assert any(link.endswith(".png") for link in page.links)
        assert f"notebooks/{path.stem}.html" in pages[site / "index.html"].links


def test_every_figure_opens_as_svg(site):
    for row in tool.read_manifest(tool.ROOT):
        page = site / "notebooks" / row["notebook"].replace(".ipynb", ".html")
        assert f'class="figure-{row["id"]}"' in page.read_text(encoding="utf-8")
        assert (site / "_static" / f"{row['id']}.svg").is_file()


def test_nothing_is_fetched_from_elsewhere_but_the_badge(pages):
    asked = set().union(*(page.asked for page in pages.values()))
    assert asked == {"https://colab.research.google.com/assets/colab-badge.svg"}


def test_the_reference_says_what_the_docstrings_say(site):
    text = (site / "docs/api/bnn_utils.layers.html").read_text(encoding="utf-8")
    assert 'id="bnn_utils.layers.binarize"' in text and "straight-through" in text
