"""The floors of the house: a file imports from its own folder or from lower floors; nothing in circles."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = "smart_grpo_jax"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
FLOORS = {
    "maths": 0, "core": 0, "worlds": 0,
    "models": 1, "policy": 1, "runtime": 1,
    "hub": 2, "rewards": 3, "data": 3, "jobs": 4, "flags": 4, "main": 5, "worker": 6,
}  # fmt: skip
# Outside libraries that a folder may use; folders that are not named may use any.
LIBRARIES = {
    "maths": {"jax", "numpy", "jaxtyping"},
    "core": {"jax", "numpy", "jaxtyping", "ml_collections"},
}
HEAVY = {"tensorflow", "torch", "transformers", "diffusers", "tensorflow_datasets"}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(ROOT.rglob("*.py"))}


def imports(name, path, top_level_only=False):
    """Every module that a file imports, as a full dotted name; submodules of ours resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = top_level(tree) if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            children = {f"{base}.{alias.name}" for alias in node.names}
            found.update(children & set(MODULES) or {base})
    return found


def top_level(tree):
    """The statements that run on import: not those inside functions."""
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            stack.extend(ast.iter_child_nodes(node))


def folder(module):
    """The first part below the package; "" for the package itself, whose __init__ may look anywhere."""
    return ([*module.split("."), ""])[1]


def ours(names):
    return {n for n in names if n.split(".")[0] == PACKAGE}


def test_every_folder_has_a_floor_and_the_parser_sees_the_imports():
    assert {folder(m) for m in MODULES} - {""} <= set(FLOORS)
    assert f"{PACKAGE}.maths.grpo" in imports(f"{PACKAGE}.maths.credit", MODULES[f"{PACKAGE}.maths.credit"])


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    here = folder(name)
    for target in ours(imports(name, MODULES[name])) if here else ():
        there = folder(target)
        assert there, f"{name} imports the package itself; import the module that is meant"
        assert there in FLOORS, f"{name} imports {target}, which is on no floor"
        assert allowed(here, there), f"{name} (floor {FLOORS[here]}) imports {target}"


def allowed(here, there):
    """Own folder, lower floors, and core: the vocabulary that all share but maths, which stands alone."""
    return there == here or FLOORS[there] < FLOORS[here] or (there == "core" and here != "maths")


def test_the_rule_itself():
    assert allowed("jobs", "maths") and allowed("hub", "hub") and allowed("worlds", "core")
    for here, there in (("maths", "core"), ("models", "policy"), ("core", "worlds"), ("policy", "hub")):
        assert not allowed(here, there)


@pytest.mark.parametrize("name", [m for m in MODULES if folder(m) in LIBRARIES])
def test_the_ground_floor_uses_few_libraries(name):
    outside = {n.split(".")[0] for n in imports(name, MODULES[name])} - {PACKAGE}
    known = LIBRARIES[folder(name)] | set(sys.stdlib_module_names)
    assert outside <= known, f"{name} imports {sorted(outside - known)}"


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_are_imported_where_they_are_used(name):
    top = {n.split(".")[0] for n in imports(name, MODULES[name], top_level_only=True)}
    assert not top & HEAVY, f"{name} imports {sorted(top & HEAVY)} at its top"


def find_cycle(graph):
    """A list of modules that import each other in a circle, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target):
                return cycle
        path.pop()
        done.add(node)
        return None

    return next((cycle for node in graph if (cycle := visit(node))), None)


def test_no_circles():
    graph = {name: ours(imports(name, path)) - {name} for name, path in MODULES.items()}
    assert find_cycle(graph) is None
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
