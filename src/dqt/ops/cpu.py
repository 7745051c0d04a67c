"""The CPU kernels: a small C++ library called through `ctypes`, bit for bit equal to `dqt.ops.reference`.

The library is built by `pip install` where there is a C++ compiler (see CMakeLists.txt); without it
everything runs on the reference, five to fifty times slower in these operations. It holds the same kernels
for AVX512, AVX2 and portable C++ and takes the best one that the CPU has; the environment variable DQT_ISA
forces one (amx, avx512, avx2, portable, or reference for none; amx is avx512 with another matrix product).
ctypes costs 1 µs a call, and keeps the library free of torch's ABI.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqt.errors import ConfigError, did_you_mean

INTERFACE_VERSION = 9
ISAS = ("amx", "avx512", "avx2", "portable")
STATUS = {1: "they do not fit together, or overflow", 2: "no instruction set was chosen", 3: "no memory"}


class Update(ctypes.Structure):
    """`DqtUpdate` of csrc/dqt_cpu.h: the same fields in the same order."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "weight", "scale", "paper_scale", "residual", "grad")
        ),
        *((name, ctypes.c_void_p) for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")),
        *((name, ctypes.c_void_p) for name in ("row_inverse", "column_inverse")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "columns", "code_bytes", "residual_bytes", "scale_blocks")
        ),
        ("stats", ctypes.c_int64 * 4),
        ("stream", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("seed", "purpose", "moment_purpose", "step")),
        *((name, ctypes.c_int32) for name in ("first", "second", "normalize_first", "rounded_moments")),
        *((name, ctypes.c_int32) for name in ("scale_per_row", "bits", "qmin", "levels", "residual_bits")),
        *((name, ctypes.c_int32) for name in ("threshold", "short_positions", "rounding", "count")),
        *((name, ctypes.c_float) for name in ("bottom", "lr_unit", "decay", "keep", "beta1", "weight1")),
        *((name, ctypes.c_float) for name in ("beta2", "weight2", "root_factor", "eps", "least")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library with an instruction set chosen, or None if there is none or DQT_ISA=reference.

    Raises:
        ConfigError: If DQT_ISA names none that this CPU has, or the library is damaged or of another version.
    """
    forced = os.environ.get("DQT_ISA", "")
    if forced and forced not in (*ISAS, "reference"):
        raise ConfigError(f"unknown DQT_ISA={forced!r}; {did_you_mean(forced, (*ISAS, 'reference'))}")
    path = library_path()
    if forced == "reference" or path is None:
        if forced in ISAS:
            raise ConfigError(
                f"DQT_ISA={forced}, but dqt was installed without its CPU kernels; see `dqt doctor`"
            )
        return None
    if _is_cut_off(path):
        raise ConfigError(f"{path} is not whole: install dqt again")
    try:
        lib = ctypes.CDLL(str(path))
        version = lib.dqt_interface_version()
    except (OSError, AttributeError) as error:
        raise ConfigError(f"{path} can't be used ({error}): install dqt again") from None
    if version != INTERFACE_VERSION:
        raise ConfigError(f"{path} has interface {version}, dqt wants {INTERFACE_VERSION}: install dqt again")
    if not any(lib.dqt_select(isa.encode()) == 0 for isa in ((forced,) if forced else ISAS)):
        raise ConfigError(f"DQT_ISA={forced}: this CPU does not have these instructions; leave DQT_ISA unset")
    _share_threads_with_torch(lib)
    return lib


def library_path() -> Path | None:
    """Where the library is: beside this file, or where an editable install has put it."""
    import dqt.ops

    for folder in dqt.ops.__path__:
        for name in ("libdqt_cpu.so", "libdqt_cpu.dylib", "dqt_cpu.dll"):
            if (path := Path(folder, name)).is_file():
                return path
    return None


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before its section headers, its last part; loading it kills the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02"):
        return header.startswith(b"\x7fELF") and len(header) < 64
    (start,) = struct.unpack_from("=Q", header, 40)
    size, count = struct.unpack_from("=HH", header, 58)
    return path.stat().st_size < start + size * count


def active_isa() -> str:
    """The instruction set in use: one of `ISAS`, or "reference" without the library."""
    lib = library()
    return lib.dqt_active().decode() if lib else "reference"


def gemm_library(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, if it can multiply these `int8` tensors."""
    lib = usable(*tensors)
    return lib if lib is not None and lib.dqt_has_gemm() else None


def _share_threads_with_torch(lib: ctypes.CDLL) -> None:
    lib.dqt_active.restype = ctypes.c_char_p
    process = ctypes.CDLL(None)
    try:
        entry = (process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads)
    except AttributeError:  # torch with another OpenMP runtime: the library starts threads of its own
        return
    lib.dqt_use_openmp(*(ctypes.cast(function, ctypes.c_void_p) for function in entry))


def usable(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The library if it can take these tensors (all on the CPU), else None; sets its threads to torch's."""
    lib = library()
    if lib is None:
        return None
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return None
    lib.dqt_set_threads(torch.get_num_threads())
    return lib


def call(lib: ctypes.CDLL, name: str, *arguments: Tensor | int | float | None) -> None:
    """Calls the kernel dqt_<name>: tensors as pointers, integers as int64, floats as double.

    Raises:
        ConfigError: If the kernel refuses the sizes, which no operation lets happen.
    """
    function = getattr(lib, f"dqt_{name}")
    if function.argtypes is None:  # once a kernel: ctypes would pass a plain int as 32 bits
        function.argtypes = [_c_type(argument) for argument in arguments]
    status = function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])
    if status:
        sizes = [a for a in arguments if isinstance(a, int)]
        raise ConfigError(f"the kernel {name} refuses the sizes {sizes} ({STATUS.get(status, status)})")


def _c_type(argument: Tensor | int | float | None) -> Any:
    if isinstance(argument, int):
        return ctypes.c_int64
    return ctypes.c_double if isinstance(argument, float) else ctypes.c_void_p


def pointer(tensor: Tensor | None, dtype: torch.dtype, elements: int | None = None) -> int | None:
    """Address of a contiguous CPU tensor of the dtype, with as many elements as said.

    Raises:
        ConfigError: If the tensor is none of these; a kernel must not see it.
    """
    if tensor is None:
        return None
    if elements is not None and tensor.numel() != elements:
        raise ConfigError(f"a kernel needs a tensor of {elements} elements, not {list(tensor.shape)}")
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ConfigError(
            f"a kernel needs a contiguous {dtype} CPU tensor, not {tensor.dtype} on {tensor.device} "
            f"with strides {tensor.stride()}: call .contiguous() or convert it"
        )
    return tensor.data_ptr()
