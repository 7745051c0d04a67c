"""The Triton kernels, run by Triton's interpreter on the CPU, equal the reference bit for bit."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dqt import ops
from dqt.ops import gpu, registry
from test_cpu_kernels import assert_same, matrix

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton (a 0.3 GB package) is not installed: pip install 'dqt[gpu]'",
)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Asserts that a call gives the same on Triton's kernels and on the reference."""

    def on_triton(name: str, device: torch.device) -> Callable[..., None]:
        launch: Callable[..., None] = getattr(gpu.module("triton_kernels"), name)
        return launch

    def check(call: Callable[[], Any]) -> None:
        results = []
        for kernel_for in (on_triton, lambda name, device: None):
            with monkeypatch.context() as patch:
                patch.setattr(registry, "kernel_for", kernel_for)
                results.append(call())
        assert_same(*results)

    return check


SHAPES = [(0, 5), (3, 0), (1, 1), (17, 33), (9, 1030), (40, 65)]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, on NaN and Inf
@pytest.mark.parametrize("shape", SHAPES)
def test_quantization_and_scaling(shape: tuple[int, int], both: Callable[[Callable[[], Any]], None]) -> None:
    rows, columns = shape
    x, factor = matrix(rows, columns), torch.rand(rows)
    product = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
    scale = torch.arange(columns) * 0.01
    both(lambda: ops.quantize_rows(x))
    both(lambda: ops.quantize_columns(x))
    both(lambda: ops.quantize_columns(x.bfloat16().T.contiguous().T, factor))
    both(lambda: ops.scale_product(product, factor))
    both(lambda: ops.scale_product(product, factor, scale, scale.half()))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits: int, both: Callable[[Callable[[], Any]], None]) -> None:
    for shape in ((3, 5), (2, 1100)):
        values = torch.randint(0, 2**bits, shape).to(torch.int16)
        both(functools.partial(ops.pack, values, bits))
        packed = ops.pack(values, bits)
        for signed in (True, False):
            both(lambda: torch.ops.dqt.unpack(packed, bits, shape[1], signed).clone())  # noqa: B023


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dqt.ops import triton_kernels as k
x, q, p, i = "*fp32", "*i8", "*u8", "i32"
for kernel, types, constants in [
    (k._quantize_rows, (x, q, x, i), (1024,)),
    (k._quantize_columns, (x, x, q, x, i, i), (True, 32, 64)),
    (k._scale_product, ("*i32", x, x, x, x, i), (True, True, 1024)),
    (k._unpack, (p, q, i, i), (2, True, 128)),
    (k._pack, (q, p, i, i), (3, 128)),
]:
    names = kernel.arg_names
    signature = dict(zip(names, (*types, *["constexpr"] * len(constants))))
    source = ASTSource(kernel, signature, constexprs=dict(zip(names[len(types):], constants)))
    ampere = GPUTarget("cuda", 80, 32)
    ptx = triton.compile(source, target=ampere, options={"enable_fp_fusion": False}).asm["ptx"]
    print(kernel.__name__, *set(re.findall(r"fma[.a-z0-9]*|(?:div|sqrt)[.a-z0-9]*f32", ptx)))
"""


def test_kernels_compile_for_a_gpu_without_fused_or_approximate_arithmetic(tmp_path: Path) -> None:
    """For Ampere; the compiler needs no GPU. ptxas gets --fmad=false with `enable_fp_fusion`."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile.py"  # Triton reads a kernel's source from its file
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 5
    assert {operation for line in lines for operation in line[1:]} == {"div.rn.f32"}
