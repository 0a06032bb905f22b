"""The architecture: no module imports from above its floor, and no modules import each other.

Imports are read from the code, those for types and those inside functions too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"config", "options", "shapes", "hooks", "outputs"},
    {"network", "text", "presets"},
    {"weights_conversion"},
    {"accounting"},
    {"model"},
    {"interventions", "runs"},
    {"analysis", "harvest"},
    {"niah"},
    {"evaluation"},
    {"papers"},
    {"commands"},
    {"hooked_hybrid"},  # the face of the package
)
"""Rooms from the lowest floor up: folders and files of the two packages."""
LAZY_DOORS = {
    ("hooked_hybrid.config.model", "weights_conversion"),  # HybridConfig.from_pretrained
    ("weights_conversion.__main__", "hooked_hybrid.commands.convert"),  # python -m
}
"""Imports that run upward by intention; ARCHITECTURE.md says why."""
TOPS = ("hooked_hybrid", "weights_conversion")
ROOMS = 18
LINES = 400
"""Of a file, at most."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    paths = [
        p for top in ("hooked_hybrid", "weights_conversion") for p in (ROOT / top).rglob("*.py")
    ]
    return {name_of(path): path for path in paths}


@cache
def imports() -> dict[str, dict[str, int]]:
    """Return what each module imports of ours, and the line where it does first."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            targets = []
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [t if t in modules() else node.module for t in inner]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            for target in targets:
                if target in modules() and target != name:
                    found[name].setdefault(target, node.lineno)
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "hooked_hybrid" and len(parts) > 1 else parts[0]


def floor_of(module: str) -> int:
    room = room_of(module)
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"{module}: the room {room!r} has no floor; give it one in {__name__}.FLOORS"
    return floors[0]


def test_no_module_imports_from_above_its_floor():
    upward = [
        f"{name}:{line} imports {target}, {floor_of(target) - floor_of(name)} floors above: move "
        "what both need down, hand a value or a function in, or name a Protocol"
        for name, targets in imports().items()
        for target, line in targets.items()
        if floor_of(target) > floor_of(name) and (name, target) not in LAZY_DOORS
    ]
    assert not upward, "\n".join(upward)


def test_every_lazy_door_is_still_one():
    assert all(target in imports()[name] for name, target in LAZY_DOORS)
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    assert "`HybridConfig.from_pretrained`" in page and "`python -m weights_conversion`" in page


def test_no_modules_import_each_other():
    arrows = {
        name: {t for t in targets if (name, t) not in LAZY_DOORS}
        for name, targets in imports().items()
    }
    said = [" -> ".join([*circle, circle[0]]) for circle in circles(arrows)]
    assert not said, "these import each other; split off what they share:\n" + "\n".join(said)


def test_no_rooms_of_a_floor_import_each_other():
    arrows: dict[str, set[str]] = defaultdict(set)
    for name, targets in imports().items():
        doors = {t for t in targets if (name, t) not in LAZY_DOORS}
        arrows[room_of(name)] |= {room_of(t) for t in doors} - {room_of(name)}
    assert not circles(arrows)


def test_the_package_has_few_rooms_and_short_files():
    rooms = {room_of(name) for name in modules() if name.startswith("hooked_hybrid.")}
    assert len(rooms) <= ROOMS, sorted(rooms)
    long = [
        str(path.relative_to(ROOT))
        for path in modules().values()
        if len(path.read_text("utf-8").splitlines()) > LINES
    ]
    assert not long, f"more than {LINES} lines: {long}"


def test_no_module_uses_private_names_of_another():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {alias.name}: give it a public name"
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in TOPS
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not found, "\n".join(found)


def test_an_upward_arrow_and_a_circle_would_be_noticed():
    assert floor_of("hooked_hybrid.network.state") < floor_of("hooked_hybrid.niah.sweep")
    assert [set(c) for c in circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})] == [
        {"a", "b", "c"}
    ]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of names from each of which all others of the group are reached."""
    reached = {name: reach(name, arrows) for name in arrows}
    found: list[list[str]] = []
    for name in sorted(arrows):
        if name in reached[name] and not any(name in group for group in found):
            found.append([name, *sorted(t for t in reached[name] - {name} if name in reached[t])])
    return found


def reach(name: str, arrows: dict[str, set[str]]) -> set[str]:
    """Return all that can be reached from a name along arrows."""
    seen: set[str] = set()
    todo = list(arrows.get(name, ()))
    while todo:
        target = todo.pop()
        if target not in seen:
            seen.add(target)
            todo += arrows.get(target, ())
    return seen
