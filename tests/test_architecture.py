"""Which room may import what, the packages that are shipped, and what must stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pruneval.harness

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(pruneval.harness.__file__).parent.parent
ROOMS = ("harness", "methods", "tasks", "reports")
HEAVY = {"torch", "transformers", "lmms_eval", "datasets", "pandas", "numpy", "matplotlib", "huggingface_hub"}
ENGINE = {"session", "prefill", "sight", "stream", "layout", "attention", "tower", "tower_packed", "override"}


def modules() -> dict[str, Path]:
    return {
        ".".join(["pruneval", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__"): path
        for room in ROOMS
        for path in sorted((SOURCE / room).rglob("*.py"))
    }


MODULES = modules()


def imports(path: Path, whole: bool = True) -> set[str]:
    """Imported modules, without those for the type checker only; `whole` looks into functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.orelse:
                visit(child)
            return
        if not whole and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {name for name in found if not name.startswith("pruneval.") or name in MODULES}


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith("pruneval.")}


def room(prefix: str) -> list[str]:
    return [name for name in MODULES if name == prefix or name.startswith(prefix + ".")]


@pytest.mark.parametrize("name", room("pruneval.methods"))
def test_methods_know_torch_and_nothing_of_the_other_rooms(name):
    found = imports(MODULES[name])
    assert not {one for one in found if one.startswith("pruneval.") and not one.startswith("pruneval.methods")}
    outside = {one.split(".")[0] for one in found} - {"pruneval"} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy", "safetensors"}


@pytest.mark.parametrize("name", room("pruneval.reports"))
def test_reports_read_records_and_tasks_only(name):
    allowed = ("pruneval.harness.records", "pruneval.harness.errors", "pruneval.tasks", "pruneval.reports")
    assert not {one for one in ours(MODULES[name]) if not one.startswith(allowed) and one != "pruneval.harness"}


@pytest.mark.parametrize("name", room("pruneval.tasks"))
def test_tasks_know_nothing_of_the_harness_but_its_errors(name):
    found = {one for one in ours(MODULES[name]) if not one.startswith("pruneval.tasks")}
    assert found <= {"pruneval.harness", "pruneval.harness.errors"}


@pytest.mark.parametrize(
    "name", [*(f"pruneval.harness.{one}" for one in sorted(ENGINE)), *room("pruneval.harness.adapters")]
)
def test_the_engine_knows_torch_and_transformers_only(name):
    found = imports(MODULES[name])
    outside = {one.split(".")[0] for one in found} - {"pruneval"} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "transformers", "numpy"}
    assert not {one for one in found if one.startswith(("pruneval.tasks", "pruneval.reports"))}


def test_lmms_eval_is_known_in_four_places():
    found = {name for name, path in MODULES.items() if any(one.split(".")[0] == "lmms_eval" for one in imports(path))}
    assert found <= {f"pruneval.harness.{one}" for one in ("lmms_model", "lmms_task", "evaluate", "judge")}


@pytest.mark.parametrize("name", ["cli", "spec", "records", "environment", "models", "run", "progress", "errors"])
def test_nothing_heavy_is_imported_at_module_level(name):
    found = imports(MODULES[f"pruneval.harness.{name}"], whole=False)
    assert not {one.split(".")[0] for one in found} & HEAVY


def test_the_packages_listed_are_those_of_the_tree():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tree = {
        "pruneval." + ".".join(path.parent.relative_to(ROOT).parts)
        for one in ROOMS
        for path in (ROOT / one).rglob("__init__.py")
    }
    assert listed == tree


def test_every_file_of_a_room_is_shipped():
    if SOURCE == ROOT:
        pytest.skip("only the wheel can lack a file")
    files = [
        path for one in ROOMS for path in (ROOT / one).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    missing = [path for path in files if not (SOURCE / path.relative_to(ROOT)).exists()]
    assert missing == []


def test_what_is_tested_is_what_was_meant():
    inside = Path(sys.prefix) in SOURCE.parents
    assert inside == bool(os.environ.get("PRUNEVAL_WHEEL")), f"pruneval was imported from {SOURCE}"


def test_models_and_adapters_name_the_same_families():
    from pruneval.harness import models
    from pruneval.harness.adapters import ADAPTERS

    assert models.families() == list(ADAPTERS)


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["list", "methods", "--json"]])
def test_help_and_lists_answer_at_once(arguments):
    code = (
        "import sys; from pruneval.harness.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"assert not set(sys.modules) & {HEAVY!r}, set(sys.modules) & {HEAVY!r}"
    )
    start = os.times().children_user + os.times().children_system
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    spent = os.times().children_user + os.times().children_system - start
    assert spent < 1.0, f"{spent:.2f} s of processor time"
