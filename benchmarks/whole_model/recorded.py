"""The committed results of model_step.py, read back for pages and pictures.

Nothing here imports a model library: a table or a picture needs the file alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from harness.timing import Quartiles
from report.records import FormatError

NAMES = {"gpt2": "GPT-2 124M", "smollm2-135m": "SmolLM2 135M"}
BASE = "peft"
SHOWN = (BASE, "peft-patched", "fused")


@dataclass(frozen=True)
class Step:
    """One provider's training step in one setting; ``ratio`` is to PEFT's on the same batch."""

    seconds: Quartiles
    ratio: Quartiles
    held_bytes: int
    step_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at once: weights, adapters, optimizer state and the step."""
        return self.held_bytes + self.step_bytes


@dataclass(frozen=True)
class Setting:
    """A model with one dropout, and every provider's step."""

    model: str
    dtype: str
    dropout: float
    steps: dict[str, Step]

    def memory_ratio(self, provider: str) -> float:
        """Peak memory as a multiple of PEFT's."""
        return self.steps[provider].peak_bytes / self.steps[BASE].peak_bytes

    @property
    def label(self) -> str:
        """The model's usual name, and the dropout."""
        dropout = f"dropout {self.dropout:g}" if self.dropout else "no dropout"
        return f"{NAMES.get(self.model, self.model)}, {dropout}"


def load(path: Path) -> tuple[dict, list[Setting]]:
    """The machine and the settings of a file that model_step.py has written.

    Raises:
        FormatError: not such a file, one of tiny models, or one that lacks a step of SHOWN.
        OSError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text())
        settings = [_setting(row) for row in data["rows"]]
        machine = data["machine"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise FormatError(
            f"{path}: expected the JSON of benchmarks/model_step.py ({problem})"
        ) from error
    if any(row["setting"].get("tiny") for row in data["rows"]):
        raise FormatError(f"{path}: expected steps of whole models, got those of --quick")
    if not settings or any(not setting.steps.keys() >= set(SHOWN) for setting in settings):
        raise FormatError(f"{path}: expected steps of {', '.join(SHOWN)} in every setting")
    return machine, settings


def _setting(row: dict) -> Setting:
    about = row["setting"]
    steps = {
        name: Step(
            Quartiles(**result["seconds"]),
            Quartiles(**result["ratio"]),
            result["held_bytes"],
            result["step_bytes"],
        )
        for name, result in row["results"].items()
    }
    return Setting(about["model"], about["dtype"], about["dropout"], steps)


def where(machine: dict) -> str:
    """The machine in a few words, as captions name it."""
    threads = f" (CPU, {machine['threads']} threads)" if machine["device"] == "cpu" else ""
    return f"{machine['device_name']}{threads}, torch {torch_version(machine)}"


def torch_version(machine: dict) -> str:
    """The version without its build: ``2.13.0`` for ``2.13.0+cpu``."""
    return machine["versions"]["torch"].partition("+")[0]
