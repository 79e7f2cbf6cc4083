"""Layers whose weight another module reads instead of calling them: an adapter has no effect there.

``self.dt_proj.weight @ x`` and ``F.multi_head_attention_forward(..., self.q_proj.weight, ...)`` use
a weight without its layer's forward. Such code is found in the bytecode of the methods that
``forward`` reaches: that needs no source and runs nothing.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType

from torch import nn

from ..layers.replacing import class_name
from ..ops.validation import listed
from .modules_to_save import CONTAINERS
from .warn import warn

# Mamba's kin call these, if at all, only with quantised weights or without their fused kernels.
# PEFT refuses "out_proj" too.
_STATE_SPACE = ("dt_proj", "out_proj")
_FAST_PATH = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
# ``self.proj.weight.dtype`` and ``isinstance(self.proj.weight, Tensor)`` read no values.
_METADATA = {
    *("device", "dtype", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "grad"),
    *("size", "stride", "dim", "numel", "nelement", "element_size", "data_ptr", "get_device"),
    *("is_floating_point", "is_quantized", "is_sparse", "requires_grad_", "__class__"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
}
_SAME_METADATA = {"data", "detach"}  # ``self.proj.weight.data.dtype``
_INSPECTORS = {"isinstance", "hasattr", "getattr", "setattr", "id", "type", "is_tensor", "len"}
# Of a whole argument: ``x.to(self.proj.weight)``.
_LIKE = {
    *("to", "type_as", "view_as", "expand_as", "reshape_as"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
}
# What follows these on a module may be any child: ``self._modules[name](x)``.
_CHILDREN = {
    *("_modules", "children", "named_children", "modules", "named_modules", "get_submodule"),
    *("values", "items", "__getattr__"),
}
_NO_OPERATION = {"CACHE", "PUSH_NULL", "EXTENDED_ARG", "PRECALL", "NOP", "NOT_TAKEN"}
_LOOP = {"FOR_ITER", "LOAD_FAST_AND_CLEAR", "SWAP", "BUILD_LIST", "BUILD_SET", "BUILD_MAP"}
_ANY = "*"  # in a path: every child

Path = tuple[str, ...]


@dataclass(frozen=True)
class Bypass:
    """A weight that is read without a call of its layer.

    Attributes:
        reader: the name of the class that reads it.
        called: whether some code calls the layer as well, perhaps on another path.
        refused: whether the layer can be expected not to be called: no adapter may be added.
    """

    reader: str
    called: bool
    refused: bool

    @property
    def reason(self) -> str:
        if not self.called:
            return f"{self.reader} reads its weight without calling it"
        return f"{self.reader} reads its weight, in some cases without calling it"


def bypassed(model: nn.Module, weight: str = "weight") -> dict[int, Bypass]:
    """The layers of ``model`` whose weight a module reads, by ``id``.

    Args:
        weight: the name of the Parameter.

    ``nn.TransformerEncoder`` does not count: adapting makes it leave the path that reads.
    """
    readers: dict[int, tuple[str, str]] = {}
    called: set[int] = set()
    for module in model.modules():
        reads, uses = _paths(type(module), weight)
        called |= {id(part) for path in uses for part in _used(module, path)}
        for path in reads:
            for part in _parts(module, path):
                readers[id(part)] = class_name(type(module)), path[-1]
    return {
        key: Bypass(reader, key in called, key not in called or name in _STATE_SPACE)
        for key, (reader, name) in readers.items()
    }


def warn_of_readers(found: Mapping[str, nn.Module], readers: Mapping[int, Bypass]) -> None:
    """Warn of the layers in ``found`` whose weight is read; ``readers`` is of :func:`bypassed`."""
    names: dict[str, list[str]] = {}
    for name, module in found.items():
        if id(module) in readers:
            names.setdefault(readers[id(module)].reason, []).append(name)
    for reason, places in names.items():
        warn(
            f"{listed(places)}: {reason}, and then the adapter has no effect until it"
            " is merged; check_adapters names the layers that never ran",
        )


def _used(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """The modules that code which uses ``path`` may call."""
    end = next((at for at, name in enumerate(path) if name in _CHILDREN), len(path))
    for part in _parts(module, path[:end]):
        yield part
        # A container is not called: code that uses it calls what it holds.
        if end < len(path) or isinstance(part, CONTAINERS):
            yield from part.children()


def _parts(module: nn.Module, path: Path) -> list[nn.Module]:
    """The modules at ``path``."""
    found = [module]
    for name in path:
        found = [
            child
            for parent in found
            for key, child in parent._modules.items()
            if child is not None and name in (key, _ANY)
        ]
    return found


@functools.lru_cache(maxsize=1 << 12)
def _paths(cls: type[nn.Module], weight: str) -> tuple[set[Path], set[Path]]:
    """Attribute paths from ``self``: to modules whose weight is read, to what is used otherwise."""
    reads: set[Path] = set()
    uses: set[Path] = set()
    if issubclass(cls, _FAST_PATH):
        return reads, uses
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _definitions(cls, name):
            wrapper = hasattr(function, "__wrapped__")
            for path in _loads(function, weight):
                if wrapper and _ANY in path:  # a decorator inspects children, and calls none
                    continue
                waiting.append(path[0])  # a method or property of the class, or a module
                if weight not in path[1:]:
                    uses.add(path)
                    continue
                at = path.index(weight, 1)
                then = [name for name in path[at + 1 :] if name not in _SAME_METADATA]
                if not _METADATA & set(then[:1]):
                    reads.add(path[:at])
    return reads, uses


def _definitions(cls: type, name: str) -> Iterator[FunctionType]:
    """The functions behind ``self.name``: its definition, and those that ``super()`` continues."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        if name not in vars(base):
            continue
        functions = list(_functions(vars(base)[name]))
        yield from functions
        if not any("super" in function.__code__.co_names for function in functions):
            return


def _functions(value, depth: int = 4) -> Iterator[FunctionType]:
    """The functions in a class's attribute: a method's or a property's, and decorated ones."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    if not isinstance(value, FunctionType):
        return
    yield value
    for cell in value.__closure__ or ():
        try:
            inner = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if depth:
            yield from _functions(inner, depth - 1)


def _loads(function: FunctionType, weight: str) -> Iterator[Path]:
    """The attribute paths that a method loads from its first argument."""
    code = function.__code__
    if code.co_argcount:
        yield from _loads_of(code, {code.co_varnames[0]: ()}, weight)


def _loads_of(code: CodeType, aliases: dict[str, Path], weight: str) -> Iterator[Path]:
    """As :func:`_loads`; ``aliases`` are the local variables that hold a path.

    One pass over the instructions, in order: what a branch or a loop does to a variable is ignored.
    """
    path = indexed = iterated = None  # complete so far; before an index; under iteration
    before = inspector = newest = None
    iterators: dict[CodeType, Path] = {}
    steps = [s for s in dis.get_instructions(code) if s.opname not in _NO_OPERATION]
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        operation, value = step.opname, step.argval
        stores = operation.startswith("STORE_FAST")
        loads = operation.startswith(("LOAD_FAST", "LOAD_DEREF")) or operation.endswith("LOAD_FAST")
        # Some instructions use two variables; STORE_FAST_LOAD_FAST stores the first.
        variables = (value if isinstance(value, tuple) else (value,)) if stores or loads else ()
        if indexed is not None:
            if operation == "BINARY_SUBSCR" or step.argrepr == "[]":
                path, indexed = (*indexed, _ANY), None
                continue
            yield indexed
            indexed = None
        if iterated is not None:
            if operation in _LOOP:
                continue
            if stores:
                aliases[variables[0]] = (*iterated, _ANY)
            elif newest is not None:
                iterators[newest] = iterated
            iterated = None
        elif path is not None:
            if operation in ("LOAD_ATTR", "LOAD_METHOD"):
                path = (*path, value)
                continue
            if path[-1:] == ("detach",) and operation.startswith("CALL"):
                continue
            ended, path = path, None
            is_module = weight not in ended
            # ``weight is None`` reads no values.
            compared = "NONE" in operation or (operation == "LOAD_CONST" and value is None)
            is_inspected = inspector in _INSPECTORS or (
                not is_module and inspector in _LIKE and _is_whole(operation, after)
            )
            if is_module and inspector == "getattr":  # getattr(self, f"layer{k}")(x)
                # A constant is all of the name if the call or a constant default follows.
                whole = operation == "LOAD_CONST" and after.opname.startswith(
                    ("CALL", "LOAD_CONST")
                )
                yield (*ended, value if whole else _ANY)
            elif is_module and stores:
                aliases[variables[0]] = ended
            elif is_module and operation in ("GET_ITER", "FOR_ITER"):
                iterated = ended
                continue
            elif not ended or compared or is_inspected:
                pass
            elif is_module and (
                operation in ("LOAD_CONST", "LOAD_SMALL_INT")
                or (loads and len(variables) == 1 and value not in aliases)
            ):
                indexed = ended  # or the argument of a call
                continue
            else:
                yield ended
        elif stores:
            aliases.pop(variables[0], None)
        if len(variables) == 2 and loads and before == "getattr" and variables[0] in aliases:
            yield (*aliases[variables[0]], _ANY)
        elif loads and variables[-1] in aliases:
            path, inspector = aliases[variables[-1]], before
        before = value if operation in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD") else None
        if isinstance(value, CodeType):
            newest = value
    for constant in code.co_consts:  # lambdas, inner functions and comprehensions
        if isinstance(constant, CodeType):
            iterator = {".0": iterators[constant]} if constant in iterators else {}
            yield from _loads_of(constant, aliases | iterator, weight)


def _is_whole(operation: str, after: dis.Instruction | None) -> bool:
    """Whether what was loaded before ``operation`` is a whole argument of a call."""
    if operation == "LOAD_CONST" and after is not None:  # the next argument, or an operand
        return after.opname.startswith(("CALL", "KW_NAMES", "LOAD_CONST"))
    return operation.startswith("CALL")
