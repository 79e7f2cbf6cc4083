"""The file of measured strategies, by GPU, versions and call; :mod:`fused_lora.tune` writes it.

The file is ``tuned.json`` in ``$FUSED_LORA_CACHE``, else ``$XDG_CACHE_HOME/fused_lora``, else
``~/.cache/fused_lora``. Each environment (GPU, driver, torch, Triton) reads only its own entries. A
file that is damaged or has another format is ignored with one warning.
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

from ..kernels.config import single_pass_applies

FORMAT = 2
KERNEL_STRATEGIES = ("single_pass", "split", "seeded", "addmm")
STRATEGIES = (*KERNEL_STRATEGIES, "torch")
_MOST_BYTES = 8 << 20  # about 50,000 entries
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Call:
    """One direction of a layer, as far as the choice of a strategy depends on it.

    Attributes:
        direction: "forward" or "backward".
        dtype: dtype of ``x``.
        M, K, N, R: tokens, in_features, out_features, rank.
        dropped: whether dropout is active.
        aligned: whether every row starts on a 16-byte boundary.
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
        """Key of its entry in the file: all fields, with ``M`` rounded up to a power of two."""
        bucket = 1 << (self.M - 1).bit_length()
        flags = " dropout" * self.dropped + " unaligned" * (not self.aligned)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.direction} {dtype} M{bucket} K{self.K} N{self.N} R{self.R}{flags}"

    @property
    def masked(self) -> str | None:
        """What dropout applies to: "operand" of the contraction, low-rank "output", or None."""
        if not self.dropped:
            return None
        return "operand" if self.direction == "forward" else "output"

    @property
    def kernel_strategies(self) -> tuple[str, ...]:
        """The Triton strategies that can run this call."""
        unable = set()
        if not single_pass_applies(self.M, self.R, self.masked):
            unable.add("single_pass")
        if self.direction == "forward" and self.dtype == torch.float16:
            # The low-rank product plus the bias may overflow where the whole sum does not.
            unable.add("seeded")
        return tuple(name for name in KERNEL_STRATEGIES if name not in unable)

    @property
    def strategies(self) -> tuple[str, ...]:
        """All strategies that can run this call, including "torch"."""
        return (*self.kernel_strategies, "torch")


@dataclass(frozen=True)
class Entry:
    """A measured choice, and the times it was based on.

    Attributes:
        strategy: the chosen one: the modelled strategy, or one that was reliably faster.
        microseconds: median device time of each strategy that was timed.
        host_microseconds: median host time to queue each of them.
        graphs: whether it is for replays of CUDA graphs, so that host time does not count.
    """

    strategy: str
    microseconds: Mapping[str, float]
    host_microseconds: Mapping[str, float]
    graphs: bool = False

    def best(self, allowed: Collection[str]) -> str | None:
        """The chosen strategy if it is ``allowed``, else the fastest timed one that is, or None."""
        if self.strategy in allowed:
            return self.strategy
        return min((n for n in self.microseconds if n in allowed), key=self.call_time, default=None)

    def call_time(self, strategy: str) -> float:
        """Microseconds per call: in eager mode the longer one, since host and device overlap."""
        device, host = self.microseconds[strategy], self.host_microseconds[strategy]
        return device if self.graphs else max(device, host)

    def __str__(self) -> str:
        times = (
            f"{name} {time:.1f} µs (host {self.host_microseconds[name]:.1f})"
            for name, time in self.microseconds.items()
        )
        return (
            f"{self.strategy} chosen from {', '.join(times)}"
            f"{' in CUDA graphs' if self.graphs else ''}"
        )


def cache_path() -> Path:
    """Path of the file; it need not exist."""
    if chosen := os.environ.get("FUSED_LORA_CACHE"):
        return Path(chosen) / "tuned.json"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fused_lora" / "tuned.json"


@lru_cache
def environment(device: torch.device) -> str:
    """The environment in which entries are valid: GPU, driver, torch and Triton."""
    import triton

    if device.type == "cpu":
        gpu, driver = "interpreter", 0
    else:
        gpu, driver = torch.cuda.get_device_name(device), torch._C._cuda_getDriverVersion()
    return f"{gpu} | driver {driver} | torch {torch.__version__} | triton {triton.__version__}"


def lookup(call: Call, device: torch.device) -> Entry | None:
    """The entry for ``call`` on ``device``; None without one, or if its strategy cannot run it."""
    entries = _entries(environment(device))
    # A file edited by hand may name a strategy that cannot run this call.
    entry = entries.get(call.key)
    return entry if entry is not None and entry.strategy in call.strategies else None


def store(entries: Mapping[Call, Entry], device: torch.device) -> Path:
    """Add ``entries``, measured on ``device``, to the file; its other entries are kept.

    Under a lock, a temporary file is written and then moved into place: readers always see a
    complete file, and concurrent writers lose no entries.

    Returns:
        The file's path.

    Raises:
        OSError: the directory cannot be written.
        filelock.Timeout: another writer holds the lock.
    """
    import filelock  # needed for writing only

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
        except BaseException:  # an interrupt must not leave the temporary file either
            os.unlink(aside)
            raise
    forget()
    return path


def forget() -> None:
    """Drop what was read, so that the next :func:`lookup` reads the file again."""
    _entries.cache_clear()


@lru_cache
def _entries(name: str) -> dict[str, Entry]:
    """The entries of the environment ``name``; the file is read once per process."""
    environments = _read(cache_path())
    gpu = name.partition(" | ")[0]
    if name not in environments:
        others = [other for other in environments if other.partition(" | ")[0] == gpu]
        if others:
            _warn(
                f"the tuned entries for {gpu} are ignored: expected entries measured with {name},"
                f" got {others[-1]}; to measure again, run python -m fused_lora.tune"
            )
    return environments.get(name, {})


def _read(path: Path) -> dict[str, dict[str, Entry]]:
    """All entries by environment; none if the file is missing or, with a warning, damaged."""
    try:
        return _parsed(_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn(f"{path} is ignored: {error}; to write it again, run python -m fused_lora.tune")
        return {}


def _text(path: Path) -> str:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
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
            raise ValueError(f"expected a time in microseconds per strategy, got {name[:20]!r}")
    if device.keys() != host.keys():
        raise ValueError("expected device and host times of the same strategies")
    graphs = fields.get("graphs")
    if type(graphs) is not bool:
        raise ValueError(f"expected graphs to be true or false, got {str(graphs)[:20]!r}")
    return Entry(strategy, device, host, graphs)


def _object(value: object, name: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"expected {name} to be an object, got {type(value).__name__}")
    return value


@lru_cache  # each text once
def _warn(message: str) -> None:
    warnings.warn(f"fused_lora: {message}", stacklevel=5)
