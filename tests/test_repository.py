"""The files around the package agree: environment, badges, citation, README and Makefile."""

import csv
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import yaml

from bnn_utils import campaign, checkpoints, faults
from bnn_utils.packed import pack
from tools import networks
from tools import notebooks as tool

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along where Python has none

ROOT = tool.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch"}
REPOSITORY = tool.repository_of(ROOT)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_environment_says_the_same_as_pyproject():
    extras = PROJECT["optional-dependencies"]
    assert set(extras["cluster"]) <= set(extras["lab"]) & set(extras["test"])
    wanted = set()
    for line in PROJECT["dependencies"] + extras["lab"] + extras["test"]:
        name, bound = re.fullmatch(r"([a-z0-9_-]+)(>=[0-9.]+)", line).groups()
        wanted.add(CONDA_NAMES.get(name, name) + bound)
    wanted.add("python" + PROJECT["requires-python"])
    environment = yaml.safe_load(text_of("environment.yml"))
    assert environment["channels"] == ["conda-forge"]
    assert set(environment["dependencies"]) == wanted
    assert len(environment["dependencies"]) == len(wanted)


def test_environment_says_what_each_package_is_for():
    lines = text_of("environment.yml").split("dependencies:")[1].splitlines()
    for line in lines:
        if line.strip().startswith("- "):
            assert re.search(r" # \w+", line), line


def test_one_repository_address():
    assert PROJECT["urls"]["Repository"] == f"https://github.com/{REPOSITORY}"
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    for found in tool.COLAB.finditer(text_of("README.md") + text_of("README.zh-CN.md")):
        assert found["repository"] == REPOSITORY, found[0]


def test_badges_would_change_nothing():
    for path in tool.find_notebooks(ROOT):
        assert tool.retargeted_notebook(path, REPOSITORY, REPOSITORY) == path.read_text(encoding="utf-8"), path


def test_citation_and_licence_agree_with_pyproject():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert citation["authors"] == PROJECT["authors"]
    assert text_of("LICENSE").startswith("MIT License") and PROJECT["authors"][0]["name"] in text_of("LICENSE")


PAGES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "checkpoints/README.md", "benchmarks/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def anchors(path):
    """The anchors of a page's headings, as they are made where pages are read."""
    headings = re.findall(r"^#+ +(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(text, folder):
    """The local links of a text that lead nowhere, or to a heading that is not there."""
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|mailto:", t)]
    found = []
    for target in targets:
        name, _, anchor = target.partition("#")
        path = folder / name
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_of_pages_lead_somewhere(page):
    assert broken(text_of(page), (ROOT / page).parent) == []


@pytest.mark.parametrize("path", tool.find_notebooks(ROOT), ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(path):
    cells = tool.read_notebook(path).cells
    assert broken("\n".join(cell.source for cell in cells if cell.cell_type == "markdown"), path.parent) == []


def test_the_page_is_one_screen():
    readme = re.sub(r"!\[[^\]]*\]", "", text_of("README.md"))  # what stands for pictures is not on the screen
    assert len(re.sub(r"\]\([^)]*\)", "]", readme).split()) <= 900


def test_readme_names_every_make_command_as_it_is():
    targets = set(re.findall(r"^([a-z]+):(?!=)", text_of("Makefile"), re.MULTILINE))
    commands = set(re.findall(r"(?:^ *(?:\$ )?|`)make ([a-z]+)", text_of("README.md"), re.MULTILINE))
    assert {"notebooks", "test"} <= commands <= targets


def kept(page):
    """What a translation keeps: levels of headings, commands, what is in code, links, and the figures of all cells."""
    text = re.sub(r"\[[^]]+\]\(README[^)]*\)", "", text_of(page))
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    rows = [line.split(" | ") for line in prose.splitlines() if line.startswith("|")]
    links, code = r"\]\(([^)]+)\)", "`[^`]+`"
    return {
        "headings": re.findall(r"^#+(?= )", text, re.MULTILINE),
        "commands": [re.sub(r" *# .*", "", block) for block in blocks],
        "code": Counter(re.findall(code, prose)),
        "links": Counter(re.findall(links, prose)),
        "tables": [[re.findall(links, cell) + sorted(re.findall(r"[\d.]*\d%?", cell)) for cell in row] for row in rows],
        "figures": Counter(re.findall(r"[\d.,]*\d%?", re.sub(f"{links}|{code}", "", prose))),
    }


def test_the_chinese_page_is_the_english_one():
    english, chinese = kept("README.md"), kept("README.zh-CN.md")
    assert len(english["tables"]) > 15 and len(english["commands"]) == 2
    for part, found in english.items():
        assert chinese[part] == found, part
    assert "(README.zh-CN.md)" in text_of("README.md") and "(README.md)" in text_of("README.zh-CN.md")


def test_no_translation_is_left_over():
    used = []

    def said(text):
        used.append(text)
        return text

    for made in (tool.reading_order, tool.gallery, networks.headline, networks.glance):
        made(ROOT, said)
    with (ROOT / "notebooks" / "zh-CN.csv").open(encoding="utf-8", newline="") as file:
        assert {row["en"] for row in csv.DictReader(file)} == set(used)
    with pytest.raises(tool.Stop, match="does not translate 'no such words'"):
        tool.in_chinese(ROOT)("no such words")


@pytest.mark.parametrize(
    ("file", "section", "made"),
    [
        ("README.md", "reading-order", tool.reading_order),
        ("README.md", "gallery", tool.gallery),
        ("README.md", "headline", networks.headline),
        ("README.md", "results", networks.glance),
        ("README.zh-CN.md", "reading-order", tool.reading_order),
        ("README.zh-CN.md", "gallery", tool.gallery),
        ("README.zh-CN.md", "headline", networks.headline),
        ("README.zh-CN.md", "results", networks.glance),
        ("docs/results.md", "results", networks.results),
        ("checkpoints/README.md", "networks", networks.overview),
    ],
)
def test_readme_sections_are_up_to_date(file, section, made):
    readme = text_of(file)
    begin, end = f"<!-- begin:{section} -->", f"<!-- end:{section} -->"
    assert readme.count(begin) == readme.count(end) == 1
    said = [tool.in_chinese(ROOT)] if "zh-CN" in file else []
    assert readme.split(begin)[1].split(end)[0].strip() == made(ROOT, *said).strip(), "run: make publish"


def test_a_card_names_every_setting_that_is_not_the_default():
    recipe = dict(epochs=4, batch_size=256, lr=1e-3, compile=True, damage_rate=0.04)
    config = dict(width=0.5, shortcut=False)
    facts = dict(network="resnet_binary", config=config, recipe=recipe, start="best.safetensors")
    line = networks.command(facts, "resnet_cifar10_errors")
    for words in ("--width 0.5 --shortcut none --epochs 4 --lr 0.001", "--damage-train-rate 0.04", " --compile "):
        assert words in line
    assert line.endswith("--start results/resnet_cifar10/best.safetensors --save resnet_cifar10_errors")
    assert "--batch-size" not in line and "--seed" not in line
    assert "--shortcut none" in networks.command(facts | {"config": config | {"shortcut": False}}, "x")
    assert "--shortcut" not in networks.command(facts | {"config": config | {"shortcut": True}}, "x")
    assert "--float" not in line and "--teacher" not in line
    taught = networks.command(facts | {"recipe": recipe | {"teacher_share": 0.5}, "teacher": "float.safetensors"}, "x")
    assert "--teacher-share 0.5" in taught and "--teacher float.safetensors" in taught
    shipped = networks.command(facts | {"start": "network.safetensors"}, "resnet_cifar10_errors")
    assert " --start checkpoints/resnet_cifar10/network.safetensors " in shipped
    by_itself = networks.command(facts | {"teacher": facts["start"]}, "resnet_cifar10_errors")
    assert "--teacher results/resnet_cifar10/best.safetensors --start results/resnet_cifar10/" in by_itself
    assert " --float " in networks.command(facts | {"config": config | {"binary": False}}, "x")


def test_cards_and_sums_are_up_to_date():
    assert text_of("checkpoints/SHA256SUMS") == networks.sums(ROOT), "run: make publish"
    for folder in networks.folders(ROOT):
        assert (folder / "README.md").read_text(encoding="utf-8") == networks.card(folder), "run: make publish"
        assert (folder / "curves.png").stat().st_size > 5000


SHIPPED = sorted((ROOT / "checkpoints").glob("*/damage-*.csv"))


def test_every_trained_network_is_shipped_whole():
    for folder in {path.parent for path in (ROOT / "checkpoints").glob("*/*")}:
        _, facts = checkpoints.load(folder / "network.safetensors")
        history = pd.read_csv(folder / "history.csv")
        before = facts.get("before")  # a training that this one went on from
        earlier = before["recipe"]["epochs"] if before else 0
        assert len(history) == earlier + facts["recipe"]["epochs"]
        best = history.loc[history["epoch"] == earlier + facts["epoch"], "validation_accuracy"].item()
        assert best == facts["validation_accuracy"] and facts["packed"]
        assert (folder / "damage-packed.csv") in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}, {path.stem}")
def test_shipped_trials_are_of_the_shipped_network(path):
    table = pd.read_csv(path)
    assert list(table) == campaign.COLUMNS and np.isfinite(table["accuracy"]).all()
    network, facts = checkpoints.load(path.parent / "network.safetensors")
    assert set(table["dataset"]) == {facts["dataset"]} and set(table["network"]) == {facts["network"]}
    held = {"float32": network, "packed": pack(network)}
    for (storage, probability, _), own in table.groupby(["storage", "probability", "repair"]):
        assert sorted(own["trial"]) == list(range(len(own)))
        assert len(own) in ((10,) if path.stem == "damage-repairs" else (20, 50))
        for row in own[own["trial"].isin([0, len(own) - 1])].itertuples():
            seed = campaign.trial_seed(0, probability, row.trial)
            with faults.inject(held[storage], probability, seed=seed) as flips:
                assert (flips.total, row.seed) == (row.flips, seed)


@pytest.mark.posix
def test_continuous_integration_runs_the_test_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "\nmake test\n" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_workflows_run_the_documented_lines():
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    steps = {name: [step.get("run") for step in workflows["tests"]["jobs"][name]["steps"]] for name in ("make", "pip")}
    lines = text_of("CONTRIBUTING.md").split("Without make")[1].split("\n\n")[1].splitlines()
    assert steps["make"][-1] == "make test" and steps["pip"][-3:] == [line.strip() for line in lines]
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in workflows.values())


def test_the_issue_form_asks_for_a_notebook_that_is_there():
    form = yaml.safe_load(text_of(".github/ISSUE_TEMPLATE/problem.yml"))
    asked = {field["id"]: field["attributes"] for field in form["body"]}
    names = [f"{path.name[:2]} {tool.title(path)}" for path in tool.find_notebooks(ROOT)]
    assert asked["notebook"]["options"][:-1] == names and {"cell", "environment"} <= set(asked)
