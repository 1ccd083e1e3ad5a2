"""The house stands as CONTRIBUTING.md draws it: imports point downwards, and none go in a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bnn_utils"
LINE = re.compile(r"^    ([1-5])  (\S+(?: \S+)*)  ", re.MULTILINE)
FLOORS = {
    name: int(floor)
    for floor, names in LINE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for name in names.split()
}


def module_of(path):
    """Return a file's module, by its name below bnn_utils: "bits", "campaign.trial", "campaign"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")


MODULES = {module: path for path in sorted(PACKAGE.rglob("*.py")) if (module := module_of(path))}


def imports(path):
    """Return the modules of bnn_utils that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("bnn_utils.") for name in found} & set(MODULES)


def test_every_module_has_a_floor_and_every_floor_its_modules():
    assert set(FLOORS) == {module for module in MODULES if "." not in module}


def test_no_import_points_upwards():
    floor = {module: FLOORS[module.partition(".")[0]] for module in MODULES}
    upwards = {
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imports(path)
        if floor[other] > floor[module]
    }
    assert not upwards


def test_no_imports_go_in_a_circle():
    graph = {module: imports(path) for module, path in MODULES.items()}
    assert graph["training"] >= {"losses", "evaluation"} and graph["campaign"] >= {"campaign.trial", "bits"}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle
