"""The doctor's findings, and the guard against bfloat16 products that kill the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dqt import doctor
from dqt.errors import ConfigError
from dqt.ops import bf16_guard

TOPICS = (
    "dqt",
    "python",
    "torch",
    "threads",
    "processor",
    "int8 products",
    "bf16 products",
    "kernels",
    "GPU",
    "cache",
)


def finding(topic: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine() if finding.topic == topic)


def test_every_topic_is_examined_and_shown() -> None:
    findings = doctor.examine()
    assert set(TOPICS) <= {finding.topic for finding in findings}
    text = doctor.to_text(findings)
    assert all(finding.text in text and finding.advice in text for finding in findings)
    assert all(finding.advice for finding in findings if finding.state == doctor.MISSING)
    assert torch.__version__ in text


def test_slow_int8_products_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_fast_int8", lambda: False)
    assert "AVX512-VNNI" in finding("int8 products").text
    assert finding("int8 products").state == doctor.NOTE


@pytest.mark.parametrize(
    ("working", "state", "fragment"),
    [
        ({None, bf16_guard.SAFE_ISA}, doctor.OK, "work"),
        ({bf16_guard.SAFE_ISA}, doctor.NOTE, "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"),
        (set(), doctor.MISSING, "another method"),
    ],
)
def test_bf16_products(
    working: set[str | None], state: str, fragment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "bf16_products_work", lambda isa=None: isa in working)
    found = finding("bf16 products")
    assert found.state == state
    assert fragment in found.text + found.advice


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert finding("package datasets").advice == "pip install 'dqt[datasets]'"
    assert finding("package bible").advice == "pip install 'dqt[bible]'"


def test_unwritable_cache_is_something_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DQT_CACHE", str(tmp_path / "a" / "b"))
    assert str(tmp_path) in finding("cache").text
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert finding("cache").state == doctor.MISSING
    assert "DQT_CACHE" in finding("cache").advice


def test_threads_beyond_the_cores_are_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 10_000)
    assert finding("threads").state == doctor.MISSING


# -- the guard -----------------------------------------------------------------------------------------------


def test_guard_makes_products_safe_in_a_fresh_process() -> None:
    """The real thing: whatever this CPU claims, a product right after the guard does not kill the process."""
    code = (
        "import torch\n"
        "from dqt.ops.bf16_guard import ensure_bf16_products\n"
        "ensure_bf16_products()\n"
        "ones = torch.ones(64, 64, dtype=torch.bfloat16)\n"
        "print(float((ones @ ones)[0, 0]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != bf16_guard.ISA_VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "64.0")


@pytest.mark.parametrize(
    ("working", "expected"),
    [({None}, None), ({bf16_guard.SAFE_ISA}, bf16_guard.SAFE_ISA), (set(), ConfigError)],
)
def test_guard_decides(
    working: set[str | None], expected: str | type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(bf16_guard.ISA_VARIABLE, "before")
    monkeypatch.setattr(bf16_guard, "bf16_products_work", lambda isa=None: isa in working)
    if expected is ConfigError:
        with pytest.raises(ConfigError, match="ONEDNN_MAX_CPU_ISA"):
            bf16_guard.ensure_bf16_products()
    else:
        bf16_guard.ensure_bf16_products()
    changed = expected == bf16_guard.SAFE_ISA
    assert os.environ[bf16_guard.ISA_VARIABLE] == (bf16_guard.SAFE_ISA if changed else "before")


def kill_itself(isa: str | None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(isa: str | None) -> None:
    signal.pause()


def wrong_result(isa: str | None) -> None:
    os._exit(1)


@pytest.mark.parametrize("child", [kill_itself, hang, wrong_result])
def test_a_child_that_fails_in_any_way_is_a_no(
    child: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bf16_guard, "_try_product", child)
    monkeypatch.setattr(bf16_guard, "_TIMEOUT_SECONDS", 0.1)
    assert not bf16_guard.bf16_products_work()
