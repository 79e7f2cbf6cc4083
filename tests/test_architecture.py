"""The subpackages ("rooms"): imports run down the chain only, and never in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import itself and those after it. ``doors`` are the modules directly in the package.
CHAIN = ("doors", "peft", "models", "layers", "ops", "strategy", "kernels", "distributed")
POLICY = {"select_config", "tile_tables", "strategies"}  # these select configurations and kernels


def imports(path: Path, package: tuple[str, ...]) -> set[str]:
    """Absolute names that a file imports, inside functions too: modules, and possible modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def package_modules() -> dict[str, Path]:
    """The package's modules by name, with ``kernels/`` at its installed place."""
    found = {}
    for folder, prefix in (("fused_lora", ()), ("kernels", ("fused_lora", "kernels"))):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder if prefix else ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join([*prefix, *parts])] = path
    return found


MODULES = package_modules()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in CHAIN else "doors"


def arrows(modules: dict[str, Path]) -> dict[str, set[str]]:
    """The modules that each module imports, ``TYPE_CHECKING`` and lazy imports included."""
    found = {}
    for name, path in modules.items():
        package = tuple(name.split("."))
        package = package if path.name == "__init__.py" else package[:-1]
        found[name] = (imports(path, package) & modules.keys()) - {name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circular import, or none."""
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except ValueError as error:  # CycleError
        return error.args[1]
    return []


GRAPH = arrows(MODULES)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that run up the chain."""
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if other != "fused_lora" and CHAIN.index(room(other)) < CHAIN.index(room(name))
    ]


def test_imports_run_down_the_chain():
    assert not upward(GRAPH)


@pytest.mark.parametrize(
    "line",
    [
        "from ..ops import dispatch",
        "from ..ops.dispatch import choose",
        "import fused_lora.ops.dispatch",
        "def f():\n    from .. import ops",
    ],
)
def test_an_import_up_the_chain_is_found(line, tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(line)
    graph = arrows(MODULES | {"fused_lora.strategy.planted": path})
    assert any("fused_lora.strategy.planted imports fused_lora.ops" in u for u in upward(graph))


def test_a_circular_import_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"a"}})) == {"a", "b"}


def test_nothing_below_the_doors_imports_the_package_itself():
    """Not even for its version: the package's ``__init__`` imports all of them."""
    assert [n for n, others in GRAPH.items() if "fused_lora" in others] == []


def test_the_package_has_no_circular_import():
    graph = dict(GRAPH)
    for room_name in CHAIN[1:]:
        graph.pop(f"fused_lora.{room_name}", None)  # the ``__init__`` of a room imports nothing
    assert circle(graph) == []


def test_kernels_know_nothing_of_the_package():
    """The kernels import nothing else of the package."""
    kernels = {name for name in MODULES if name.startswith("fused_lora.kernels")}
    for name in kernels:
        assert {other for other in GRAPH[name] if other not in kernels} == set(), name


def test_a_kernel_file_imports_no_policy():
    """A launcher gets an explicit configuration and selects none."""
    files = [p for p in (ROOT / "kernels").glob("*.py") if "@triton.jit" in p.read_text("utf-8")]
    assert len(files) == 10
    for path in files:
        imported = {name.rpartition(".")[2] for name in imports(path, ("fused_lora", "kernels"))}
        assert not imported & POLICY, path.name


def test_a_room_says_what_it_is_for():
    """Every subpackage has a docstring."""
    for room_name in CHAIN[1:]:
        tree = ast.parse(MODULES[f"fused_lora.{room_name}"].read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), room_name


def test_every_room_is_packaged():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (packages,) = re.findall(r"^packages = (\[.*?\])$", text, re.DOTALL | re.MULTILINE)
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(ast.literal_eval(packages)) == folders


def benchmark_modules() -> dict[str, Path]:
    root = ROOT / "benchmarks"
    paths = [p for p in root.rglob("*.py") if "results" not in p.relative_to(root).parts]
    return {
        ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p
        for p in paths
    }


def test_no_benchmark_imports_anothers_insides():
    """No module imports a command; what commands share is public and in a folder of its own."""
    modules = benchmark_modules()
    commands = {name for name, path in modules.items() if path.parent == ROOT / "benchmarks"}
    graph = {}
    for name, path in modules.items():
        imported = imports(path, ())
        assert not imported & commands, f"{name} imports a command"
        private = {n for n in imported if n.rpartition(".")[2].startswith("_")} - {"__future__"}
        own = {n for n in private if n.rpartition(".")[0] in modules}
        assert not own, f"{name} imports {own}"
        graph[name] = (imported & modules.keys()) - {name}
    assert circle(graph) == []


def layer_classes() -> list[type]:
    from fused_lora.layers.base import LoRALayer

    return [cls for cls in LoRALayer.__mro__ if cls.__module__.startswith("fused_lora.layers")]


@pytest.mark.parametrize("cls", layer_classes(), ids=lambda cls: cls.__name__)
def test_a_base_class_calls_only_what_it_has(cls):
    """``self.method()`` is defined by the class itself or by one that it derives from."""
    path = MODULES[cls.__module__]
    (node,) = [
        n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.ClassDef) and n.name == cls.__name__
    ]  # fmt: skip
    called = {
        call.func.attr
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in ("self", "cls", "layer")
    }
    missing = {name for name in called if not hasattr(cls, name)}
    assert not missing
