"""The house rules that a parser can see: import direction, and who may import which library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("pz_envs", "pz_agents", "pz_bench")
ONLY_IN = {
    "trl": "pz_agents/training/",
    "ray": "pz_agents/runtime/ray.py",
    "vllm": "pz_agents/models/vllm.py",
}
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_sources_to_look_at():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_lower_floor_never_imports_a_higher_one(path):
    floor = FLOORS.index(relative(path).split("/")[0])
    assert not imported_modules(path) & set(FLOORS[floor + 1 :])


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_library_is_imported_only_in_its_room(path):
    name = relative(path)
    for library in imported_modules(path) & set(ONLY_IN):
        assert name.startswith(ONLY_IN[library]), f"{name} imports {library}"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if relative(path).startswith("pz_envs/")], ids=relative
)
def test_the_ground_floor_needs_no_torch(path):
    assert not imported_modules(path) & {"torch", "transformers", "pydantic"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_command_lines_print(path):
    if path.name == "cli.py":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    printed = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert printed == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_outgrows_600_lines(path):
    assert len(path.read_text().splitlines()) <= 600
