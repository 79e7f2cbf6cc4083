"""A digest of the code that a row of the report depends on, for each kernel.

It covers the definitions that compiling a case reaches by name, starting from the function that
makes a row: the parsing code, the case's own call, its launcher, the kernel, and the functions,
classes and constants that these use. Of a module that several kernels share only the reached
definitions count, and comments and docstrings do not.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import triton

import fused_lora.kernels as kernels

FOLDERS = {"fused_lora.kernels": Path(kernels.__file__).parent, __package__: Path(__file__).parent}
ROOT = f"{__package__}.run", "compile_case"

Place = tuple[str, str]  # a module and a name in it; "" is the whole module


@lru_cache
def digest(kernel: str) -> str:
    """Changes if a row of ``kernel`` may change: by its code, by Triton, by how it is read."""
    texts: dict[Place, str] = {}
    waiting: list[Place] = [ROOT]
    while waiting:
        place = waiting.pop()
        if place in texts:
            continue
        nodes = [_reduced(node, place[0], kernel) for node in _definitions(place)]
        texts[place] = "\n".join(ast.unparse(node) for node in nodes)
        waiting += [reached for node in nodes for reached in _reached(place[0], node)]
    made = hashlib.sha256(triton.__version__.encode())
    for place in sorted(texts):
        made.update(f"{place}\n{texts[place]}\n".encode())
    return made.hexdigest()[:16]


class _Module:
    """The top-level statements of one module, by the names that they bind."""

    def __init__(self, name: str):
        package, _, stem = name.rpartition(".")
        self.package = package
        self.body = ast.parse((FOLDERS[package] / f"{stem}.py").read_text()).body
        self.bound: dict[str, list[ast.stmt]] = {}
        self.imported: dict[str, Place] = {}
        for node in self.body:
            if isinstance(node, ast.ImportFrom):
                self._import(node)
            else:
                for bound in _binds(node):
                    self.bound.setdefault(bound, []).append(node)

    def _import(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            source = f"{self.package}.{source}".rstrip(".")
        for alias in node.names:
            if source in FOLDERS:
                self.imported[alias.asname or alias.name] = f"{source}.{alias.name}", ""
            elif source.rpartition(".")[0] in FOLDERS:
                self.imported[alias.asname or alias.name] = source, alias.name


_module = lru_cache(_Module)


def _binds(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.comprehension):  # its names are not the module's
        return set()
    names = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return names.union(*map(_binds, ast.iter_child_nodes(node)))


def _definitions(place: Place) -> list[ast.stmt]:
    module, name = place
    if name:
        return _module(module).bound.get(name, [])
    return [node for node in _module(module).body if not isinstance(node, ast.ImportFrom)]


def _reached(name: str, node: ast.AST) -> Iterator[Place]:
    """The definitions that ``node`` of module ``name`` mentions."""
    module = _module(name)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        source, whole = module.imported.get(node.value.id, ("", "not a module"))
        if not whole:
            yield source, node.attr
            return
    if isinstance(node, ast.Name):
        if node.id in module.imported:
            yield module.imported[node.id]
        elif node.id in module.bound:
            yield name, node.id
    for child in ast.iter_child_nodes(node):
        yield from _reached(name, child)


def _reduced(node: ast.AST, module: str, kernel: str) -> ast.AST:
    """A copy without docstrings, and without the calls of other kernels in :mod:`.cases`."""
    copied = ast.parse(ast.unparse(node))
    for inner in ast.walk(copied):
        if isinstance(inner, ast.Match) and module == f"{__package__}.cases":
            inner.cases = [arm for arm in inner.cases if kernel in (_kernels(arm) or {kernel})]
        elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner):
            inner.body = inner.body[1:] or [ast.Pass()]
    return copied


def _kernels(arm: ast.match_case) -> set[str]:
    """The kernels that the first part of an arm's pattern names."""
    first = arm.pattern.patterns[0] if isinstance(arm.pattern, ast.MatchSequence) else arm.pattern
    return {n.value for n in ast.walk(first) if isinstance(n, ast.Constant)}
