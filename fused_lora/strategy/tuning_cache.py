"""What :mod:`.tune` measured, in a file: strategies by GPU, versions and call.

The file is ``tuned.json`` in ``$FUSED_LORA_CACHE``, else ``$XDG_CACHE_HOME/fused_lora``, else
``~/.cache/fused_lora``. An environment (GPU, driver, torch, Triton) reads its own entries only. A
file that is damaged or of another format is as good as none, and said once.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..kernels.config import SINGLE_PASS_MAX_RANK, SINGLE_PASS_MAX_ROWS

FORMAT = 2
KERNEL_STRATEGIES = ("single_pass", "split", "addmm")
STRATEGIES = (*KERNEL_STRATEGIES, "torch")
_MOST_BYTES = 8 << 20  # some 50,000 entries
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Call:
    """One direction of a layer, as far as the choice of a strategy depends on it.

    Attributes:
        direction: "forward" or "backward".
        dtype: of ``x``.
        M, K, N, R: tokens, inputs, outputs, rank.
        dropped: whether an entry of ``x`` may be dropped.
        aligned: whether every row starts on 16 bytes.
    """

    direction: str
    dtype: torch.dtype
    M: int
    K: int
    N: int
    R: int
    dropped: bool
    aligned: bool = True

    @property
    def key(self) -> str:
        """The name of its entry: all of the above, and the next power of two for ``M``."""
        bucket = 1 << (self.M - 1).bit_length()
        flags = " dropout" * self.dropped + " unaligned" * (not self.aligned)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.direction} {dtype} M{bucket} K{self.K} N{self.N} R{self.R}{flags}"

    @property
    def masked(self) -> str | None:
        """What is dropped: the "operand" of the contraction, the low-rank "output", or None."""
        if not self.dropped:
            return None
        return "operand" if self.direction == "forward" else "output"

    @property
    def kernel_strategies(self) -> tuple[str, ...]:
        """The strategies of the kernels that can run it."""
        few = self.M <= SINGLE_PASS_MAX_ROWS and self.R <= SINGLE_PASS_MAX_RANK
        return KERNEL_STRATEGIES if few and self.masked != "operand" else KERNEL_STRATEGIES[1:]

    @property
    def strategies(self) -> tuple[str, ...]:
        """All that can run it, PyTorch's operators among them."""
        return (*self.kernel_strategies, "torch")


@dataclass(frozen=True)
class Entry:
    """A measured choice, and what it was made from.

    Attributes:
        strategy: the fastest.
        microseconds: of the device, the median for each strategy that was timed.
        host_microseconds: of the host to queue the same.
        graphs: whether it was made for replays of CUDA graphs, which the host does not delay.
    """

    strategy: str
    microseconds: Mapping[str, float]
    host_microseconds: Mapping[str, float]
    graphs: bool = False

    def best(self, allowed: Collection[str]) -> str | None:
        """The fastest of ``allowed``; None if none of them was timed."""
        if self.strategy in allowed:
            return self.strategy
        return min((n for n in self.microseconds if n in allowed), key=self.call_time, default=None)

    def call_time(self, strategy: str) -> float:
        """Microseconds of a call: in eager mode the host queues while the device works."""
        device, host = self.microseconds[strategy], self.host_microseconds[strategy]
        return device if self.graphs else max(device, host)

    def __str__(self) -> str:
        times = (
            f"{name} {time:.1f} µs (host {self.host_microseconds[name]:.1f})"
            for name, time in self.microseconds.items()
        )
        return f"{self.strategy} of {', '.join(times)}{' in CUDA graphs' if self.graphs else ''}"


def cache_path() -> Path:
    """Where entries are kept; the file need not exist."""
    if chosen := os.environ.get("FUSED_LORA_CACHE"):
        return Path(chosen) / "tuned.json"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fused_lora" / "tuned.json"


@lru_cache
def environment(device: torch.device) -> str:
    """What an entry holds for: GPU, driver, torch and Triton."""
    import triton

    if device.type == "cpu":
        gpu, driver = "interpreter", 0
    else:
        gpu, driver = torch.cuda.get_device_name(device), torch._C._cuda_getDriverVersion()
    return f"{gpu} | driver {driver} | torch {torch.__version__} | triton {triton.__version__}"


def lookup(call: Call, device: torch.device) -> Entry | None:
    """The entry for ``call`` on ``device``, if there is one that can run it."""
    entries = _entries(environment(device))
    entry = entries.get(call.key)
    return entry if entry is not None and entry.strategy in call.strategies else None


def store(entries: Mapping[Call, Entry], device: torch.device) -> Path:
    """Add to the file what was measured on ``device``, and keep all else in it.

    Written aside and moved into place under a lock, so that a reader sees a whole file and two
    writers lose nothing.

    Raises:
        OSError: the folder cannot be written.
        filelock.Timeout: another writer holds the lock.
    """
    import filelock  # which reading does without

    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
        environments = _read(path)
        kept = environments.setdefault(environment(device), {})
        kept |= {call.key: entry for call, entry in entries.items()}
        made = {
            name: {
                key: {
                    "strategy": e.strategy,
                    "microseconds": dict(e.microseconds),
                    "host_microseconds": dict(e.host_microseconds),
                    "graphs": e.graphs,
                }
                for key, e in sorted(found.items())
            }
            for name, found in sorted(environments.items())
        }
        text = json.dumps({"format": FORMAT, "environments": made}, indent=1)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix="tuned-", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    forget()
    return path


def forget() -> None:
    """Read the file again at the next look-up."""
    _entries.cache_clear()


@lru_cache
def _entries(name: str) -> dict[str, Entry]:
    """Those of one environment, read once."""
    environments = _read(cache_path())
    gpu = name.partition(" | ")[0]
    if name not in environments:
        others = [other for other in environments if other.partition(" | ")[0] == gpu]
        if others:
            _warn(
                f"the tuned entries of {gpu} are ignored: expected some measured with {name}, got"
                f" {others[-1]}; python -m fused_lora.tune measures anew"
            )
    return environments.get(name, {})


def _read(path: Path) -> dict[str, dict[str, Entry]]:
    """Everything in the file; nothing, and a warning, if it is not what :func:`store` writes."""
    try:
        return _parsed(_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn(f"{path} is ignored: {error}; python -m fused_lora.tune writes it anew")
        return {}


def _text(path: Path) -> str:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("expected a regular file")
    if status.st_size > _MOST_BYTES:
        raise ValueError(f"expected at most {_MOST_BYTES} bytes, got {status.st_size}")
    return path.read_text(encoding="utf-8")


def _parsed(text: str) -> dict[str, dict[str, Entry]]:
    content = _object(json.loads(text), "the file")
    if content.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {str(content.get('format'))[:20]}")
    environments = _object(content.get("environments"), "environments")
    return {
        name: {key: _entry(value) for key, value in _object(entries, "an environment").items()}
        for name, entries in environments.items()
    }


def _entry(value: object) -> Entry:
    fields = _object(value, "an entry")
    strategy = fields.get("strategy")
    if strategy not in STRATEGIES:
        raise ValueError(f"expected one of {', '.join(STRATEGIES)}, got {str(strategy)[:20]!r}")
    device, host = (_object(fields.get(k), k) for k in ("microseconds", "host_microseconds"))
    for name, time in (*device.items(), *host.items()):
        if name not in STRATEGIES or type(time) is not float or not math.isfinite(time):
            raise ValueError(f"expected microseconds by strategy, got {name[:20]!r}")
    if device.keys() != host.keys():
        raise ValueError("expected the host's microseconds of the same strategies")
    graphs = fields.get("graphs")
    if type(graphs) is not bool:
        raise ValueError(f"expected graphs to be true or false, got {str(graphs)[:20]!r}")
    return Entry(strategy, device, host, graphs)


def _object(value: object, name: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"expected {name} to be an object, got {type(value).__name__}")
    return value


@lru_cache
def _warn(message: str) -> None:
    warnings.warn(f"fused_lora: {message}", stacklevel=5)
