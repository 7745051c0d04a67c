"""Guards bfloat16 products on CPUs that advertise AMX and do not have it.

Some virtual machines show AMX in the CPU's flags although the hypervisor does not let it run: oneDNN believes
the flags, and the first bfloat16 product kills the process with SIGILL. Keeping oneDNN to AVX512_CORE_BF16
helps, but only where it is said before oneDNN's first product of any type, because oneDNN reads the variable
once.

So the product is tried in a forked child, which has this very process's oneDNN in whatever state it is; a
child costs milliseconds, a new Python with torch seconds. Dead end: turning oneDNN off
(`torch.backends.mkldnn`) works at any time, but makes bfloat16 products 7 to 100 times slower, by layout, and
int8 products 250 times.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time

import torch

from dqt.errors import ConfigError

ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
SAFE_ISA = "AVX512_CORE_BF16"
_TIMEOUT_SECONDS = 20.0


def bf16_products_work(isa: str | None = None) -> bool:
    """Whether a bfloat16 matrix product on the CPU survives, from the present state of this process.

    Args:
        isa: A value of ONEDNN_MAX_CPU_ISA to try; None keeps the environment's.
    """
    if not hasattr(os, "fork"):  # Windows, where the fault was never seen
        return True
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _try_product(isa)
    return _wait(child) == 0


def ensure_bf16_products() -> None:
    """Makes bfloat16 products on the CPU safe, or refuses; call it before the process's first product.

    Raises:
        ConfigError: If they would kill this process, with what to set.
    """
    if bf16_products_work():
        return
    if bf16_products_work(SAFE_ISA):
        os.environ[ISA_VARIABLE] = SAFE_ISA
        return
    raise ConfigError(
        "a bfloat16 product kills the process on this machine (its CPU claims AMX, but cannot run it): "
        f"start Python with {ISA_VARIABLE}={SAFE_ISA} in the environment, or use --method fp32"
    )


def _try_product(isa: str | None) -> None:
    """In the child: leaves with status 0 if a product comes out right, quietly in any case."""
    status = 1
    try:
        faulthandler.disable()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if isa is not None:
            os.environ[ISA_VARIABLE] = isa
        torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here
        ones = torch.ones(64, 64, dtype=torch.bfloat16)
        status = 0 if bool((ones @ ones.T == 64).all()) else 1
    finally:
        os._exit(status)


def _wait(child: int) -> int:
    """The child's exit status; negative for a signal, or where it hung and was ended."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9
