"""Makes a bare checkout importable: ``import harness.checkout`` before ``import fused_lora``.

An installed package contains the folder ``kernels`` as ``fused_lora.kernels``. In a checkout that
was not installed, the folder lies beside the package: an import hook finds it there, and the
checkout is added to ``sys.path``.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "fused_lora.kernels"


class _KernelsBesideThePackage(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != KERNELS:
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if importlib.util.find_spec("fused_lora") is None:
    sys.path.insert(0, str(ROOT))
if not any(isinstance(finder, _KernelsBesideThePackage) for finder in sys.meta_path):
    sys.meta_path.append(_KernelsBesideThePackage())  # last: an installed package is found first
