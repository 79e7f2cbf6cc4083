"""Warnings at the caller's line."""

from __future__ import annotations

import sys
import warnings

_LIBRARIES = {  # through which a call may pass
    "accelerate",
    "contextlib",
    "fused_lora",
    "peft",
    "safetensors",
    "torch",
    "transformers",
}


def warn(message: str) -> None:
    """Warn at the line of the nearest caller outside the libraries above.

    Python shows a warning once per line: in a library's line it would be one per process.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(f"fused_lora: {message}", stacklevel=level)


def _package(scope: dict) -> str:
    return scope.get("__name__", "").partition(".")[0]
