"""Tiles that compile without spills or other faults: ``select_config.py`` chooses among them.

They were found by ``python benchmarks/compile_report.py --search``; everything that was tried is
listed in ``benchmarks/results/compiled/``. A table's first key is the kind of operands: "half" or
"fp32", with "narrow" if rows do not all start on a 16-byte boundary. The second is the
architecture, "any" for every other one. The third, if there is one, is the largest rank that a band
of rows is for. Of equally good rows the first is used.
"""

from __future__ import annotations

Rows = tuple[tuple[int, ...], ...]

# Architectures on which lora_gemm is persistent and uses tensor descriptors, for "half".
PERSISTENT = ("sm_90", "sm_100")
# Of these, those where a tile is finished while the next one's copies are in flight. On sm_100 all
# tiles spill then.
OVERLAPPED = ("sm_90",)

# By largest rank: warps, stages, rows, columns, step of the inner dimension
_AMPERE = ((8, 4, 128, 128, 64), (4, 4, 64, 128, 32), (8, 4, 64, 64, 64))
_ADA = ((8, 3, 128, 128, 64), (4, 4, 64, 128, 32), (8, 4, 64, 64, 64))
_HOPPER = ((8, 4, 128, 128, 64), (4, 4, 64, 128, 64), (4, 4, 64, 64, 64))
_GEFORCE = ((8, 3, 128, 128, 64), (8, 4, 64, 128, 32), (8, 4, 64, 64, 64))  # sm_120
_BLACKWELL = ((4, 4, 128, 128, 64), (8, 4, 64, 64, 64))
_CDNA = ((8, 2, 128, 256, 64), (8, 2, 128, 128, 64), (4, 2, 64, 128, 64), (4, 2, 64, 64, 64))
_FP32_GEFORCE = ((8, 3, 64, 128, 16), (8, 3, 64, 64, 16), (8, 3, 32, 64, 16))
_FP32_ADA = ((8, 3, 64, 128, 16), (8, 4, 64, 64, 16), (4, 3, 32, 64, 16))
_FP32 = ((8, 3, 64, 128, 16), (4, 3, 64, 64, 16), (4, 3, 32, 64, 16))
GEMM: dict[str, dict[str, dict[int, Rows]]] = {
    "half": {
        "sm_80": {32: ((8, 4, 128, 256, 32), *_AMPERE), 256: _AMPERE},
        "sm_86": {32: ((8, 4, 128, 256, 32), *_ADA), 256: _ADA},
        "sm_89": {32: ((8, 4, 128, 256, 32), *_ADA), 256: _ADA},
        # Beyond rank 128, 64x128 spills with a mask.
        "sm_90": {
            64: ((8, 3, 128, 256, 64), *_HOPPER),
            128: _HOPPER,
            256: ((8, 4, 128, 128, 64), (8, 4, 128, 64, 64), (4, 4, 64, 64, 64)),
        },
        "sm_100": {
            128: ((8, 3, 128, 256, 64), (8, 4, 64, 128, 64), *_BLACKWELL),
            256: ((8, 3, 128, 256, 64), *_BLACKWELL),
        },
        "sm_120": {32: ((8, 4, 256, 128, 32), *_GEFORCE), 256: _GEFORCE},
        "gfx90a": {256: _CDNA},
        "gfx942": {256: _CDNA},
        "gfx950": {256: _CDNA},
        "interpreter": {256: ((4, 2, 64, 64, 64),)},
        "any": {256: ((4, 2, 64, 64, 32),)},
    },
    "half narrow": {
        "sm_100": {256: ((8, 1, 64, 128, 32), (4, 1, 64, 64, 32), (4, 1, 32, 64, 32))},
        "sm_120": {256: ((8, 2, 64, 128, 32), (8, 2, 64, 64, 32), (4, 2, 32, 64, 32))},
        "any": {256: ((8, 2, 64, 128, 32), (4, 2, 64, 64, 32), (4, 2, 32, 64, 32))},
    },
    "fp32": {
        # At rank 64, 64 rows with three stages spill under Triton 3.6.
        "sm_90": {
            32: ((8, 3, 128, 128, 16), *_FP32),
            64: ((8, 2, 64, 128, 16), (4, 4, 64, 64, 16), (4, 3, 32, 64, 16)),
            256: _FP32,
        },
        "sm_100": {
            32: ((8, 3, 128, 128, 16), (8, 2, 64, 128, 16), (4, 3, 64, 64, 16)),
            64: ((8, 2, 64, 128, 16), (4, 2, 64, 64, 16), (8, 3, 32, 64, 16)),
            256: _FP32,
        },
        "sm_120": {32: ((8, 3, 128, 128, 16), *_FP32_GEFORCE), 256: _FP32_GEFORCE},
        "sm_86": {32: ((8, 3, 128, 128, 16), *_FP32_ADA), 256: _FP32_ADA},
        "sm_89": {32: ((8, 3, 128, 128, 16), *_FP32_ADA), 256: _FP32_ADA},
        "interpreter": {256: ((4, 2, 64, 64, 64),)},
        "any": {32: ((8, 3, 128, 128, 16), *_FP32), 256: _FP32},
    },
    "fp32 narrow": {
        "sm_100": {256: ((8, 2, 128, 64, 16), (4, 2, 64, 64, 16), (8, 2, 32, 32, 32))},
        "sm_120": {256: ((8, 2, 64, 128, 16), (8, 2, 64, 64, 16), (4, 2, 32, 32, 32))},
        "any": {256: ((8, 2, 64, 128, 16), (4, 2, 64, 64, 16), (4, 2, 32, 32, 32))},
    },
}

# The same for segments, whose blocks of rows may be low; without descriptors
_LOW = ((4, 4, 32, 128, 64), (4, 4, 16, 128, 64))
_LOW_CDNA = ((4, 2, 32, 128, 64), (4, 2, 16, 128, 64))
_LOW_FP32 = ((4, 3, 32, 64, 16), (4, 3, 16, 64, 16))
_LOW_NARROW = ((4, 2, 32, 64, 32), (4, 2, 16, 64, 32))
_LOW_FP32_NARROW = ((4, 2, 32, 32, 32), (4, 2, 16, 32, 32))
GEMM_OF_SEGMENTS: dict[str, dict[str, dict[int, Rows]]] = {
    "half": {
        "sm_80": {32: ((8, 4, 128, 256, 32), *_AMPERE, *_LOW), 256: (*_AMPERE, *_LOW)},
        "sm_86": {32: ((8, 4, 128, 256, 32), *_ADA, *_LOW), 256: (*_ADA, *_LOW)},
        "sm_89": {32: ((8, 4, 128, 256, 32), *_ADA, *_LOW), 256: (*_ADA, *_LOW)},
        "sm_90": {256: ((8, 3, 128, 256, 64), *_HOPPER, *_LOW)},
        # With four stages or four warps, 128 rows spill.
        "sm_100": {
            256: ((8, 3, 128, 128, 64), (4, 4, 64, 128, 64), (8, 4, 64, 64, 64), *_LOW),
        },
        "sm_120": {256: (*_GEFORCE, *_LOW)},
        "gfx90a": {256: (*_CDNA, *_LOW_CDNA)},
        "gfx942": {256: (*_CDNA, *_LOW_CDNA)},
        "gfx950": {256: (*_CDNA, *_LOW_CDNA)},
        "interpreter": {256: ((4, 2, 64, 64, 64), (4, 2, 32, 64, 64), (4, 2, 16, 64, 64))},
        "any": {256: ((4, 2, 64, 64, 32), (4, 2, 32, 64, 32), (4, 2, 16, 64, 32))},
    },
    "half narrow": {
        "any": {256: ((8, 2, 64, 128, 32), (4, 2, 64, 64, 32), *_LOW_NARROW)},
    },
    "fp32": {
        "interpreter": {256: ((4, 2, 64, 64, 64), (4, 2, 32, 64, 64), (4, 2, 16, 64, 64))},
        "sm_100": {256: ((8, 2, 64, 128, 16), (4, 3, 64, 64, 16), *_LOW_FP32)},
        # With four warps, 32 rows spill.
        "sm_86": {256: (*_FP32_ADA[:2], _FP32_GEFORCE[2], _LOW_FP32[1])},
        "sm_89": {256: (*_FP32_ADA[:2], _FP32_GEFORCE[2], _LOW_FP32[1])},
        "sm_120": {256: (*_FP32_GEFORCE, _LOW_FP32[1])},
        "any": {256: (*_FP32[:2], *_LOW_FP32)},
    },
    "fp32 narrow": {
        # Larger tiles spill at rank 64 where V is in PEFT's order.
        "sm_120": {256: ((8, 2, 64, 64, 16), (8, 2, 32, 64, 16), *_LOW_FP32_NARROW)},
        "any": {256: ((8, 2, 64, 32, 16), (8, 2, 32, 64, 16), *_LOW_FP32_NARROW)},
    },
}

# By largest rank: warps, stages, rows, step of the inner dimension, most columns of a program
_SHRINK = {
    32: ((8, 3, 64, 256, 32), (4, 3, 64, 128, 32), (8, 3, 32, 256, 32), (4, 4, 16, 128, 32)),
    64: ((8, 3, 128, 128, 64), (4, 3, 64, 128, 64), (4, 4, 32, 128, 64), (4, 4, 16, 128, 64)),
    128: ((8, 3, 64, 128, 128), (8, 2, 128, 128, 64), (4, 3, 32, 128, 128)),
    256: (
        (8, 2, 64, 128, 256),
        (8, 2, 128, 128, 64),
        (4, 3, 32, 128, 128),
        (4, 3, 16, 128, 128),
    ),
}
_SHRINK_ADA = {  # 99 KB of shared memory
    32: _SHRINK[32],
    64: _SHRINK[64],
    256: ((8, 2, 64, 128, 128), (8, 2, 32, 128, 128), (4, 2, 16, 128, 128)),
}
_CDNA_SHRINK = {
    # Two warps: with four, several threads would compute the same word of the mask.
    32: ((2, 2, 64, 128, 32), (2, 2, 32, 128, 32), (2, 2, 16, 128, 32)),
    64: ((4, 2, 64, 64, 64), (4, 2, 32, 64, 64), (4, 2, 16, 128, 64)),
    256: ((8, 2, 64, 32, 256), (8, 2, 32, 32, 256), (4, 2, 16, 32, 256)),
}
_SHRINK_NARROW = {
    64: ((4, 2, 64, 32, 64), (4, 2, 32, 32, 64), (4, 2, 16, 32, 64)),
    256: ((8, 2, 32, 32, 256), (8, 2, 64, 32, 128), (8, 2, 16, 32, 256)),
}
_LOW = _SHRINK_NARROW[256][0]
_SHRINK_FP32 = {
    64: ((4, 3, 64, 32, 64), (4, 3, 32, 64, 64), (4, 3, 16, 32, 64)),
    256: ((8, 3, 64, 32, 64), (8, 3, 32, 32, 128), (8, 3, 16, 32, 128)),
}
# With three stages 64 rows spill.
_SHRINK_FP32_ADA = {
    **_SHRINK_FP32,
    256: ((8, 2, 64, 32, 128), (8, 3, 32, 32, 128), (8, 3, 16, 32, 128)),
}
_SHRINK_FP32_NARROW = {
    64: ((4, 3, 64, 32, 64), (4, 3, 32, 32, 64), (4, 3, 16, 32, 64)),
    256: ((8, 3, 64, 32, 128), (8, 3, 32, 32, 128), (8, 2, 16, 32, 128)),
}
SHRINK: dict[str, dict[str, dict[int, Rows]]] = {
    "half": {
        "sm_90": {
            32: _SHRINK[32],
            64: ((8, 3, 64, 256, 64), *_SHRINK[64]),
            128: ((8, 2, 128, 128, 128), (8, 3, 64, 128, 128), (4, 3, 32, 128, 128)),
            256: ((8, 2, 128, 128, 256), (8, 2, 64, 128, 256), (4, 3, 32, 128, 128)),
        },
        "sm_100": {
            **_SHRINK,
            32: ((8, 3, 128, 128, 32), *_SHRINK[32][1:]),
        },
        "sm_86": _SHRINK_ADA,
        "sm_89": _SHRINK_ADA,
        "sm_120": {
            **_SHRINK_ADA,
            256: ((8, 2, 64, 128, 128), (8, 3, 32, 64, 128), (4, 2, 16, 128, 128)),
        },
        "gfx90a": _CDNA_SHRINK,
        "gfx942": _CDNA_SHRINK,
        "gfx950": {**_SHRINK, 32: ((8, 2, 64, 256, 32), *_SHRINK[32][1:])},
        # The tiles of high ranks need more shared memory than an unknown GPU may have.
        "any": {**_SHRINK, 128: (*_SHRINK[128], _LOW), 256: (*_SHRINK[256], _LOW)},
    },
    "half narrow": {
        # 32 rows of up to 256 ranks spill under Triton 3.9.
        "sm_90": {
            **_SHRINK_NARROW,
            256: ((8, 2, 32, 32, 128), *_SHRINK_NARROW[256][1:]),
        },
        "sm_100": {
            **_SHRINK_NARROW,
            256: ((8, 2, 32, 32, 256), (8, 1, 64, 32, 128), (8, 2, 16, 32, 256)),
        },
        "any": _SHRINK_NARROW,
    },
    "fp32": {
        # With four warps, 64 rows of several members spill.
        "sm_90": {**_SHRINK_FP32, 64: ((8, 3, 64, 32, 64), *_SHRINK_FP32[64][1:])},
        "sm_100": {
            **_SHRINK_FP32,
            64: ((8, 3, 64, 32, 64), (4, 3, 32, 32, 64), (4, 3, 16, 32, 64)),
            256: ((8, 3, 64, 32, 64), (8, 3, 32, 32, 64), (8, 2, 16, 32, 128)),
        },
        "sm_86": _SHRINK_FP32_ADA,
        "sm_89": _SHRINK_FP32_ADA,
        "sm_120": {
            64: ((8, 3, 64, 32, 32), (4, 3, 32, 32, 64), (4, 3, 16, 32, 64)),
            256: ((8, 3, 64, 32, 128), (8, 3, 32, 32, 64), (8, 3, 16, 32, 128)),
        },
        "any": _SHRINK_FP32,
    },
    "fp32 narrow": {
        # 64 rows spill with four warps under Triton 3.6, and with eight warps and three stages
        # under 3.7.
        "sm_90": {
            **_SHRINK_FP32_NARROW,
            64: ((8, 2, 64, 32, 64), (4, 3, 32, 32, 64), (4, 3, 16, 32, 64)),
        },
        "any": _SHRINK_FP32_NARROW,
    },
}
# Rows and step of a tile that spills 8 bytes with segments and a mask, by target and itemsize.
SHRINK_SPILLS = {("sm_90", 4): (32, 64)}
# The same of rank_grad: step of the rows and columns, where dB is in PEFT's order.
RANK_GRAD_SPILLS = {(arch, 4): (16, 64) for arch in ("sm_86", "sm_89", "sm_100")}

# By largest rank: warps, stages, step of the rows, columns, most result rows of a program
_RANK_GRAD = {
    32: ((8, 4, 32, 128, 32), (4, 4, 32, 64, 32), (4, 4, 32, 32, 32)),
    64: ((8, 4, 32, 128, 64), (8, 4, 32, 64, 64), (8, 4, 32, 32, 64)),
    128: ((8, 2, 16, 128, 128), (8, 2, 16, 64, 128), (4, 2, 16, 32, 128)),
    256: ((8, 2, 16, 64, 256), (8, 2, 16, 64, 128), (4, 2, 16, 32, 128)),
}
# With eight warps a step of 32 rows is not loaded ahead.
_CDNA_RANK_GRAD = {
    **_RANK_GRAD,
    32: ((4, 4, 32, 128, 32), (4, 4, 32, 64, 32), (4, 4, 32, 32, 32)),
}
_RANK_GRAD_NARROW = {
    32: ((8, 2, 32, 128, 32), (4, 2, 32, 64, 32), (4, 2, 32, 32, 32)),
    64: ((8, 2, 32, 128, 64), (8, 2, 32, 64, 64), (8, 2, 32, 32, 64)),
    256: ((8, 2, 16, 64, 256), (8, 2, 32, 64, 64), (8, 2, 16, 32, 128)),
}
_RANK_GRAD_FP32 = {
    64: ((8, 2, 16, 128, 32), (8, 2, 16, 64, 32), (8, 2, 16, 32, 64)),
    256: ((8, 2, 16, 32, 128), (8, 2, 16, 64, 64), (8, 2, 16, 32, 64)),
}
_RANK_GRAD_FP32_GEFORCE = {
    32: ((8, 2, 16, 128, 32), (8, 2, 16, 64, 32), (8, 2, 16, 32, 64)),
    64: ((8, 2, 32, 64, 32), (8, 2, 16, 32, 64), (8, 2, 32, 32, 32)),
    256: ((8, 2, 16, 32, 128), (8, 2, 16, 64, 32), (8, 2, 16, 32, 64)),
}
RANK_GRAD: dict[str, dict[str, dict[int, Rows]]] = {
    "half": {
        # At rank 32, a step of 32 rows with 64 columns spills under Triton 3.6. From rank 64 on
        # there are two warps, too few for a warp group: a warp group's product would wait in every
        # step for the masked operand.
        "sm_90": {
            16: _RANK_GRAD[32],
            32: ((4, 4, 32, 128, 32), (4, 4, 16, 64, 32), (4, 4, 32, 32, 32)),
            64: ((2, 4, 16, 128, 64), (2, 4, 16, 64, 64), (2, 4, 16, 32, 64)),
            256: ((2, 4, 16, 64, 128), (2, 4, 16, 32, 128), (2, 4, 16, 64, 64)),
        },
        "sm_100": {
            **_RANK_GRAD,
            128: ((8, 2, 16, 128, 128), (8, 2, 16, 64, 64), (4, 2, 16, 32, 128)),
            256: ((8, 2, 16, 64, 256), (8, 2, 16, 64, 64), (4, 2, 16, 32, 128)),
        },
        "sm_120": {
            **_RANK_GRAD,
            64: ((4, 4, 32, 128, 32), (8, 4, 32, 64, 64), (8, 4, 32, 32, 64)),
            256: ((8, 2, 16, 64, 128), (8, 2, 32, 32, 256), (4, 2, 16, 32, 128)),
        },
        "gfx90a": _CDNA_RANK_GRAD,
        "gfx942": _CDNA_RANK_GRAD,
        "gfx950": _CDNA_RANK_GRAD,
        "any": _RANK_GRAD,
    },
    "half narrow": {
        # At rank 32, 128 columns with two stages spill under Triton 3.6.
        "sm_90": {
            **_RANK_GRAD_NARROW,
            32: ((8, 1, 32, 128, 32), (4, 2, 32, 64, 32), (4, 2, 32, 32, 32)),
        },
        "any": _RANK_GRAD_NARROW,
    },
    "fp32": {
        "sm_90": {
            **_RANK_GRAD_FP32,
            256: ((8, 2, 16, 64, 64), (8, 2, 16, 64, 32), (8, 2, 32, 32, 64)),
        },
        "sm_120": _RANK_GRAD_FP32_GEFORCE,
        "any": _RANK_GRAD_FP32,
    },
    "fp32 narrow": {"sm_120": _RANK_GRAD_FP32_GEFORCE, "any": _RANK_GRAD_FP32},
}

# By largest rank: warps, stages, step of the rows, columns; for aligned rows in half precision
_NO_PAIR = {256: ()}  # on AMD's GPUs a load whose result two products read is not pipelined
THIN_PAIR: dict[str, dict[int, Rows]] = {
    "gfx90a": _NO_PAIR,
    "gfx942": _NO_PAIR,
    "gfx950": _NO_PAIR,
    "any": {
        16: ((4, 4, 32, 512), (4, 4, 32, 256), (4, 4, 32, 128)),
        32: ((8, 4, 32, 512), (4, 4, 32, 256), (4, 4, 32, 128), (4, 4, 32, 64)),
    },
}

# warps, rows, columns, largest rank in one block; for aligned and "narrow" rows alike
_ADD_AMPERE = ((8, 128, 64, 64), (8, 32, 64, 64), (8, 64, 32, 64))
ADD: dict[str, dict[str, Rows]] = {
    "half": {
        "sm_80": _ADD_AMPERE,
        "sm_86": _ADD_AMPERE,
        "sm_89": _ADD_AMPERE,
        "sm_90": ((8, 64, 128, 64), (8, 64, 64, 64), (4, 32, 64, 64)),
        "sm_100": ((4, 64, 64, 64), (8, 32, 64, 64), (8, 64, 32, 64)),
        "sm_120": ((8, 64, 128, 64), (8, 32, 64, 64), (8, 64, 32, 64)),
        "any": ((8, 64, 128, 64), (8, 64, 64, 64), (8, 32, 64, 64)),
    },
    # Narrow rows of rank 64 in one block spill.
    "fp32": {"any": ((8, 32, 64, 32), (8, 64, 32, 32), (4, 32, 32, 32))},
}

# The same for the sum of several members' products
ADD_OF_MEMBERS: dict[str, dict[str, Rows]] = {
    "half": {
        "sm_86": ((8, 64, 64, 64), (8, 32, 64, 64), (8, 64, 32, 64)),
        "sm_89": ((8, 64, 64, 64), (8, 32, 64, 64), (8, 64, 32, 64)),
        "sm_120": ((8, 32, 64, 64), (8, 64, 32, 64), (4, 32, 32, 64)),
        "any": ((8, 64, 64, 32), (4, 32, 64, 64), (8, 64, 32, 64)),
    },
    "fp32": {
        "sm_80": ((8, 32, 32, 32), (8, 16, 64, 32), (8, 64, 32, 32)),
        "any": ((8, 32, 32, 32), (8, 16, 64, 32), (4, 16, 32, 32)),
    },
}

# warps, rows, columns, largest rank in one block
GATED: dict[str, dict[str, Rows]] = {
    "half": {
        "sm_86": ((8, 32, 64, 32), (8, 64, 32, 32), (4, 32, 32, 32)),
        "sm_89": ((8, 32, 64, 32), (8, 64, 32, 32), (4, 32, 32, 32)),
        "any": ((8, 64, 64, 32), (4, 32, 64, 32), (4, 32, 32, 32)),
    },
    "half narrow": {"any": ((8, 32, 64, 32), (4, 32, 32, 32), (4, 16, 32, 32))},
    "fp32": {"any": ((8, 32, 64, 32), (4, 32, 32, 32), (4, 16, 32, 32))},
    # Eight values per thread spill.
    "fp32 narrow": {"any": ((8, 32, 32, 32), (8, 16, 64, 32), (4, 16, 32, 32))},
}

# warps, stages, rows, columns, step of the inner dimension
SINGLE_PASS: dict[str, dict[str, Rows]] = {
    "half": {"any": ((4, 4, 64, 64, 64), (4, 4, 32, 64, 64), (4, 4, 16, 64, 64))},
    "half narrow": {
        "sm_100": ((8, 2, 64, 64, 32), (8, 2, 32, 64, 32), (4, 2, 16, 64, 32)),
        "any": ((8, 2, 64, 64, 32), (4, 2, 32, 64, 32), (4, 2, 16, 64, 32)),
    },
    "fp32": {
        "sm_100": ((8, 2, 32, 32, 32), (8, 2, 16, 64, 32), (4, 2, 16, 32, 32)),
        "sm_120": ((8, 2, 32, 64, 32), (8, 2, 32, 32, 32), (8, 2, 16, 64, 32)),
        "any": ((8, 2, 32, 64, 32), (8, 2, 32, 32, 32), (4, 2, 16, 32, 32)),
    },
    "fp32 narrow": {"any": ((8, 2, 32, 32, 32), (4, 2, 16, 64, 32), (4, 2, 16, 32, 32))},
}


def kind(itemsize: int, aligned: bool) -> str:
    """The key of a table's first level."""
    return ("half" if itemsize == 2 else "fp32") + ("" if aligned else " narrow")


def look_up(table: dict, arch: str, itemsize: int, aligned: bool):
    """The entry of ``table`` for one architecture and kind of operands."""
    by_arch = table[kind(itemsize, aligned)]
    return by_arch.get(arch, by_arch["any"])


def band(bands: dict[int, Rows], rank: int) -> Rows:
    """The rows of the first band that includes ``rank``; of the last band for larger ranks."""
    return next((rows for most, rows in bands.items() if rank <= most), list(bands.values())[-1])
