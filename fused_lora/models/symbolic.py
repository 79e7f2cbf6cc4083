"""Proof that a module's forward is the gated MLP, ``down(act(gate(x)) * up(x))``.

The forward is called with a symbol in place of ``x``, on a stand-in for the module that offers its
submodules only. What it returns is the whole computation; anything else that it does, such as a
clamp, a norm or a setting that it reads, shows in the result or is refused. A comparison of numbers
would miss a clamp that no number reaches.

So that nothing else can happen, the code that runs is restricted: no branches, loops, ``with`` or
``try``, nothing that is assigned to an object or whose result is dropped, no Python function but
the forwards themselves and PyTorch's, and every symbol must be part of the result.
"""

from __future__ import annotations

import dis
import linecache
import os
import sys
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS = {F.silu: "silu", F.relu: "relu", torch.relu: "relu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_PRODUCTS = {
    torch.mul,
    torch.multiply,
    Tensor.mul,
    Tensor.multiply,
    Tensor.__mul__,
    Tensor.__rmul__,
}
_CONSTANTS = (str, bool, int, float, type(None))
# Of Python 3.10 to 3.14. Others are refused, which costs speed at most.
_STRAIGHT = {
    *("RESUME", "NOP", "CACHE", "PUSH_NULL", "PRECALL", "KW_NAMES", "COPY_FREE_VARS", "SWAP"),
    *("LOAD_FAST", "LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK"),
    *("LOAD_FAST_BORROW_LOAD_FAST_BORROW", "STORE_FAST", "STORE_FAST_LOAD_FAST"),
    *("STORE_FAST_STORE_FAST", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_DEREF"),
    *("LOAD_ATTR", "LOAD_METHOD", "CALL", "CALL_KW", "CALL_METHOD", "CALL_FUNCTION"),
    *("CALL_FUNCTION_KW", "BINARY_OP", "RETURN_VALUE"),
    # Python 3.10's BINARY_OP; a symbol records each of them.
    *(
        f"{kind}_{operation}"
        for kind in ("BINARY", "INPLACE")
        for operation in (
            *("ADD", "SUBTRACT", "MULTIPLY", "MATRIX_MULTIPLY", "TRUE_DIVIDE", "FLOOR_DIVIDE"),
            *("MODULO", "POWER", "LSHIFT", "RSHIFT", "AND", "XOR", "OR"),
        )
    ),
}
_TRIES = {"SETUP_FINALLY", "SETUP_WITH"}  # of Python 3.10; later versions have a table
_TORCH = os.path.dirname(torch.__file__) + os.sep


class GatedMLP(NamedTuple):
    """How a module computes the gated MLP.

    Attributes:
        gate, up, down: names of its linear layers.
        order: gate and up in the order of their calls.
        activation: a name of :data:`fused_lora.ops.activations.FORWARD`.
        function: name of the attribute that is the activation, or None if the forward calls a
            function of its own.
        settings: the attributes of the activation that its result depends on.
    """

    gate: str
    up: str
    down: str
    order: tuple[str, str]
    activation: str
    function: str | None
    settings: dict[str, object]


class NotGatedError(Exception):
    """Why a forward is no gated MLP; a phrase."""


class _Proof:
    """One run of a forward: the layers called, every symbol, and the first refusal."""

    def __init__(self, is_linear: Callable[[nn.Module], bool]):
        self.is_linear = is_linear
        self.layers: list[str] = []
        self.symbols: list[_Symbol] = []
        self.settings: dict[str, object] = {}
        self.allowed: set[CodeType] = set()
        self.refusal: str | None = None

    def refuse(self, reason: str) -> NotGatedError:
        """Keep the first reason: a forward may swallow the exception."""
        self.refusal = self.refusal or reason
        return NotGatedError(reason)

    def symbol(self, operation, *operands, **options) -> _Symbol:
        made = Tensor._make_subclass(_Symbol, torch.empty(0, device="meta"))
        vars(made).update(proof=self, operation=operation, operands=operands, options=options)
        self.symbols.append(made)
        return made

    def run(self, forward: Callable, stand_in, x: _Symbol):
        """``forward(stand_in, x)``, if its code is straight and calls no unknown function."""
        before = sys.getprofile()
        sys.setprofile(None)
        try:
            if reason := _not_straight(forward):
                raise self.refuse(reason)
            self.allowed.add(forward.__code__)
            sys.setprofile(self._watch)
            return forward(stand_in, x)
        finally:
            sys.setprofile(before)

    def _watch(self, frame, event, _) -> None:
        """A profile function: a call of a Python function that is not known is a refusal."""
        code = frame.f_code
        by_proof = frame.f_back is not None and frame.f_back.f_code.co_filename == __file__
        known = code in self.allowed or code.co_filename.startswith((_TORCH, __file__))
        if event == "call" and not (known or by_proof):
            self.refusal = self.refusal or f"its forward calls {code.co_name}"


class _Symbol(Tensor):
    """A tensor without values that records the operation that made it, and its operands."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        proof = next(vars(arg)["proof"] for arg in args if isinstance(arg, cls))
        if getattr(function, "__name__", None) == "__get__":
            name = function.__self__.__name__
            raise proof.refuse(f"its forward reads the {name} of a tensor")
        return proof.symbol(function, *args, **(kwargs or {}))


class _StandIn:
    """Offers the submodules of a module, and functions set on it, to a forward."""

    def __init__(self, module: nn.Module, proof: _Proof):
        object.__setattr__(self, "_known", (module, proof))

    def __getattribute__(self, name):
        module, proof = object.__getattribute__(self, "_known")
        child = module._modules.get(name)
        if child is None:
            child = vars(module).get(name)
            if _torch_function(child) is None:
                raise proof.refuse(f"its forward reads self.{name}")
        elif any(name in vars(cls) for cls in type(module).__mro__):
            raise proof.refuse(f"its class has another {name}")

        def call(*args, **kwargs):
            if len(args) != 1 or kwargs or not isinstance(args[0], _Symbol):
                raise proof.refuse(f"its forward calls self.{name} with more than a tensor")
            (given,) = args
            if not isinstance(child, nn.Module):
                return proof.symbol("attribute", name, child(given), given)
            if proof.is_linear(child):
                proof.layers.append(name)
                return proof.symbol("layer", name, given)
            if reason := _unusual(child):
                raise proof.refuse(f"{name} has {reason}")
            inner = proof.run(type(child).forward, _Activation(child, proof), given)
            return proof.symbol("attribute", name, inner, given)

        return call

    def __setattr__(self, name, value):
        raise object.__getattribute__(self, "_known")[1].refuse(f"its forward sets self.{name}")


class _Activation:
    """Offers an activation's constants and PyTorch's functions to its forward, and notes them."""

    def __init__(self, module: nn.Module, proof: _Proof):
        object.__setattr__(self, "_known", (module, proof))

    def __getattribute__(self, name):
        module, proof = object.__getattribute__(self, "_known")
        found = vars(module).get(name)
        is_constant = name in vars(module) and type(found) in _CONSTANTS
        if not is_constant and _torch_function(found) is None:
            raise proof.refuse(f"its activation reads self.{name}")
        proof.settings[name] = found
        return found

    def __setattr__(self, name, value):
        raise object.__getattribute__(self, "_known")[1].refuse(f"its activation sets self.{name}")


def prove(module: nn.Module, forward: Callable, is_linear: Callable[[nn.Module], bool]) -> GatedMLP:
    """How ``module`` computes the gated MLP.

    Args:
        forward: its forward, as a function of the module and one input.
        is_linear: whether a submodule is a linear layer; another one may be the activation.

    Raises:
        NotGatedError: it computes something else, or more.
    """
    if reason := _unusual(module):
        raise NotGatedError(f"it has {reason}")
    proof = _Proof(is_linear)
    x = proof.symbol("input")
    try:
        y = proof.run(forward, _StandIn(module, proof), x)
    except NotGatedError:
        raise
    except Exception as error:
        text = f"its forward cannot be followed ({type(error).__name__}: {error})"
        raise NotGatedError(proof.refusal or text) from error
    if proof.refusal is not None:
        raise NotGatedError(proof.refusal)
    down, product = _layer(y)
    if _operation(product) not in _PRODUCTS or len(product.operands) != 2 or product.options:
        raise NotGatedError(f"the input of {down} is {_described(product)}")
    first, second = product.operands
    if _is_layer(first):
        first, second = second, first
    up, up_input = _layer(second)
    activation, function, inner = _activation(first)
    gate, gate_input = _layer(inner)
    if gate_input is not x or up_input is not x:
        raise NotGatedError(f"{gate} and {up} do not read the input itself")
    if len({gate, up, down}) != 3 or sorted(proof.layers) != sorted((gate, up, down)):
        raise NotGatedError("it calls a layer more than once, or others besides")
    used = _ancestors(y)
    for symbol in proof.symbols:
        if id(symbol) not in used:
            raise NotGatedError(f"it drops {_described(symbol)}")
    order = tuple(name for name in proof.layers if name != down)
    return GatedMLP(gate, up, down, order, activation, function, proof.settings)


def _unusual(module: nn.Module) -> str | None:
    """What of a module's class is not nn.Module's own, so that a call may do more."""
    cls = type(module)
    for name in ("__call__", "__getattr__", "__getattribute__"):
        if getattr(cls, name) is not getattr(nn.Module, name):
            return f"a {name} of its own"
    return None


def _not_straight(function: object) -> str | None:
    """Why a function may do more than what one run of it shows; None if it may not."""
    if type(function) is not FunctionType:
        return f"its forward is a {type(function).__name__}"
    code = function.__code__
    instructions = list(dis.get_instructions(code))
    has_try = any(instruction.opname in _TRIES for instruction in instructions)
    if has_try or getattr(code, "co_exceptiontable", b""):
        return "its forward has a try or with statement"
    line = None
    for instruction in instructions:
        line = _line_of(instruction) or line
        if instruction.opname not in _STRAIGHT:
            source = linecache.getline(code.co_filename, line or 0).strip()
            what = f"`{source}`" if source else instruction.opname
            return f"its forward does more than return one expression: {what}"
    return None


def _line_of(instruction: dis.Instruction) -> int | None:
    """The line at which an instruction's statement starts, if the instruction is its first."""
    line = instruction.starts_line
    return instruction.line_number if line is True else line or None  # True: Python 3.13


def _torch_function(value: object) -> object | None:
    """The activation of PyTorch that a function is, maybe with constants; None for others."""
    function = value.func if type(value) is partial and not value.args else value
    try:
        return function if function in _ACTIVATIONS or function is F.gelu else None
    except TypeError:  # not hashable
        return None


def _operation(symbol):
    return vars(symbol)["operation"] if isinstance(symbol, _Symbol) else None


def _is_layer(symbol) -> bool:
    return _operation(symbol) == "layer"


def _layer(symbol) -> tuple[str, _Symbol]:
    """The layer that computed a symbol, and its input."""
    if not _is_layer(symbol):
        raise NotGatedError(f"it multiplies or returns {_described(symbol)}")
    return symbol.operands


def _activation(symbol) -> tuple[str, str | None, _Symbol]:
    """The activation that computed a symbol, the attribute that it is, and its input."""
    attribute, name = None, None
    if _operation(symbol) == "attribute":
        attribute, symbol, given = symbol.operands
        is_its_own = isinstance(symbol, _Symbol) and symbol.operands[0] is given
        if not is_its_own:
            raise NotGatedError(f"the activation {attribute} is {_described(symbol)}")
    if not isinstance(symbol, _Symbol):
        raise NotGatedError(f"it multiplies {_described(symbol)}")
    operation, options = _operation(symbol), dict(symbol.options)
    in_place = options.pop("inplace", False)
    if len(symbol.operands) == 1 and not in_place:
        if operation is F.gelu:
            name = _GELUS.get(options.pop("approximate", "none"))
        elif isinstance(operation, Callable):
            name = _ACTIVATIONS.get(operation)
    if name is None or options:
        what = "the activation" if attribute is None else f"the activation {attribute}"
        raise NotGatedError(f"{what} is {_described(symbol)}")
    return name, attribute, symbol.operands[0]


def _ancestors(symbol: _Symbol) -> set[int]:
    """The symbols that a symbol was computed from, and itself, by identity."""
    found, rest = set(), [symbol]
    while rest:
        one = rest.pop()
        if isinstance(one, _Symbol) and id(one) not in found:
            found.add(id(one))
            rest += [*one.operands, *one.options.values()]
    return found


def _described(symbol) -> str:
    if not isinstance(symbol, _Symbol):
        return f"an object of class {type(symbol).__name__}"
    operation = _operation(symbol)
    if operation == "layer":
        return f"the output of {symbol.operands[0]}"
    if operation == "input":
        return "the input"
    if operation == "attribute":
        return f"the result of {symbol.operands[0]}"
    return f"the result of {getattr(operation, '__name__', operation)}"
