"""Row 20: the kernels' C interface under AddressSanitizer and UndefinedBehaviorSanitizer, with random input.

All kernels but the AMX product, which not every CPU has; test_products.py compares it with the reference.
Rounding and packing have exact tests of their own (test_rounding.py, test_formats_packing.py).

`DQT_FUZZ_ROUNDS=5000 DQT_FUZZ_SEED=1 pytest -m slow tests/faults/test_fuzz.py` runs longer, on other numbers.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src" / "dqt" / "ops" / "csrc"
DRIVER = Path(__file__).with_name("fuzz_kernels.cpp")
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off", "-fno-math-errno", f"-I{SOURCES}"),
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
]
# Instruction set flags as in CMakeLists.txt.
UNITS: dict[Path, list[str]] = {SOURCES / f"{name}.cpp": [] for name in ("interface", "isa_portable", "gemm")}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-DDQT_X86")
    UNITS[SOURCES / "isa_avx2.cpp"] = ["-mavx2", "-mfma"]
    UNITS[SOURCES / "isa_avx512.cpp"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


def compiler(folder: Path) -> str:
    """A C++ compiler with both sanitizers; skips the test where there is none."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    for name in ("g++", "clang++"):
        path = shutil.which(name)
        if path and not subprocess.run([path, *FLAGS, probe, "-o", folder / "probe"], check=False).returncode:
            return path
    pytest.skip("no g++ or clang++ with -fsanitize=address,undefined: install one with its sanitizers")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """The compiler, and the kernels compiled with sanitizers."""
    folder = tmp_path_factory.mktemp("objects")
    cxx = compiler(folder)

    def build(unit: Path) -> Path:
        target = folder / f"{unit.stem}.o"
        subprocess.run([cxx, *FLAGS, *UNITS[unit], "-c", unit, "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        return cxx, list(pool.map(build, UNITS))


def room_for_the_last_element(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("DQT_FUZZ_DEFINE", "DQT_FUZZ_SHORT")


@pytest.mark.slow
@pytest.mark.row(20, room_for_the_last_element)
def test_kernels_under_sanitizers(objects: tuple[str, list[Path]], tmp_path: Path) -> None:
    cxx, kernels = objects
    program, define = tmp_path / "fuzz", os.environ.get("DQT_FUZZ_DEFINE", "DQT_FUZZ")
    subprocess.run([cxx, *FLAGS, f"-D{define}", DRIVER, *kernels, "-o", program], check=True)
    rounds, seed = os.environ.get("DQT_FUZZ_ROUNDS", "40"), os.environ.get("DQT_FUZZ_SEED", "0")
    done = subprocess.run([program, rounds, seed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith(f"{rounds} rounds on ")
