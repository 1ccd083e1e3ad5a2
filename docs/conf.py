"""The site: README, docs/, the notebooks as they are committed and the library's reference; `make site`.

Its source is the repository's root, so that links between files lead the same way here as on GitHub.
"""

import json
import re
import shutil

from docutils import nodes
from latex2mathml.converter import convert

from tools.notebooks import ROOT, find_notebooks, read_manifest, repository_of

CONTENTS = {
    "The course": [f"notebooks/{path.stem}" for path in find_notebooks(ROOT)],
    "Using it": ["docs/command-line", "docs/data", "docs/library", "docs/api", "docs/campaigns"],
    "What came out": ["docs/results", "checkpoints/README", "benchmarks/README"],
    "More": ["docs/glossary", "docs/references", "CONTRIBUTING", "README.zh-CN"],
}
CAPTIONS = {row["id"]: row["caption"] for row in read_manifest(ROOT)}
DEEPER = {
    "checkpoints/README": sorted(f"{path.parent.name}/README" for path in (ROOT / "checkpoints").glob("*/README.md")),
    "benchmarks/README": ["gpu-log"],
}

project = "Binarized neural networks"
author = "The BNN tutorial authors"
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/*", "docs/api/*", "notebooks/*.ipynb", "benchmarks/*.md"]
include_patterns += ["checkpoints/README.md", "checkpoints/*/README.md"]
templates_path = [str(ROOT / "docs/_templates")]  # of which autosummary looks for its own below the source

nb_execution_mode = "off"
nb_code_prompt_hide = "Hide"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_ivar = True

html_theme = "furo"
html_title = project
html_static_path = ["_static", "../figures/published"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "source_repository": f"https://github.com/{repository_of(ROOT)}",
    "source_branch": "main",
    "source_directory": "",
}


def as_read(app, name, source):
    """Fold what the notebooks fold; say where each page stands in the contents."""
    if name.startswith("notebooks/"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            code = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            if folded := re.match(r"# (?:@title )?(The claims.*|Set-up)", code):
                cell["metadata"].setdefault("tags", []).append("hide-input")
                cell["metadata"]["mystnb"] = {"code_prompt_show": folded[1]}
            if figure := re.search(r'save_figure\(\s*"([^"]+)"', code):
                image = {"alt": CAPTIONS[figure[1]], "classes": f"figure-{figure[1]}"}
                cell["metadata"]["mystnb"] = {"image": image}
        source[0] = json.dumps(notebook)
    source[0] = re.sub(r"(\d) ± (\d)", "\\1\u00a0±\u00a0\\2", source[0])
    parts = CONTENTS if name == root_doc else {None: DEEPER[name]} if name in DEEPER else {}
    for caption, pages in parts.items():
        head = f":caption: {caption}\n" if caption else ""
        source[0] += f"\n```{{toctree}}\n:hidden:\n{head}\n" + "\n".join(pages) + "\n```\n"


def mathml(display):
    """Make a visitor that writes a formula as MathML, which browsers draw without a script or a font of ours."""

    def visit(self, node):
        formula = convert(node.astext(), display=display)
        self.body.append(re.sub(r"(<mo[^>]*>[\[(]</mo>)<mo>(?=&#x02212;)", r'\1<mo form="prefix">', formula))
        raise nodes.SkipNode

    return visit


def is_field(member):
    """Of a named tuple: its text says what it is, and the class's own has said it."""
    return type(member).__name__ == "_tuplegetter"


def front(app, error):
    """Give the first page the name that servers look for."""
    if not error:
        shutil.copyfile(app.outdir / "README.html", app.outdir / "index.html")


def setup(app):
    app.add_html_math_renderer("mathml", (mathml("inline"), None), (mathml("block"), None))
    app.connect("source-read", as_read)
    app.connect("autodoc-skip-member", lambda app, kind, name, member, skip, options: is_field(member) or None)
    app.connect("build-finished", front)
