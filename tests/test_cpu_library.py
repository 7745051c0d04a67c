"""The kernels' library: which one is taken, and what is said of one that is damaged or does not fit."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest

from dqt.errors import ConfigError
from dqt.ops import cpu


@pytest.mark.parametrize(
    ("name", "message"), [("avx1024", "unknown DQT_ISA='avx1024'"), ("AVX2", "did you mean 'avx2'")]
)
def test_a_wrong_instruction_set_is_refused(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQT_ISA", name)
    with pytest.raises(ConfigError, match=message):
        cpu.library.__wrapped__()


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQT_ISA", "reference")
    assert cpu.library.__wrapped__() is None


ELF = (
    b"\x7fELF\x02\x01\x01"
    + bytes(33)
    + (10**6).to_bytes(8, "little")
    + bytes(10)
    + b"\x40\0\x1d\0"
    + bytes(2)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a library", r"libdqt_cpu\.so can't be used .* install dqt again"),
        (b"", r"can't be used .* install dqt again"),
        (ELF[:40], "is not whole: install dqt again"),
        (ELF + bytes(1000), "is not whole: install dqt again"),
    ],
)
def test_a_damaged_library_is_named(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "libdqt_cpu.so"
    broken.write_bytes(content)
    monkeypatch.delenv("DQT_ISA", raising=False)
    monkeypatch.setattr(cpu, "library_path", lambda: broken)
    with pytest.raises(ConfigError, match=message):
        cpu.library.__wrapped__()


@pytest.mark.skipif(
    cpu.library() is None, reason="dqt was installed without a compiler: no library to damage"
)
def test_a_library_that_was_cut_off_does_not_kill_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = cpu.library_path()
    assert whole is not None
    for share in (0.0001, 0.1, 0.5, 0.99):
        cut = tmp_path / f"libdqt_cpu-{share}.so"
        cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
        monkeypatch.setattr(cpu, "library_path", lambda path=cut: path)
        with pytest.raises(ConfigError, match="install dqt again"):
            cpu.library.__wrapped__()


@pytest.mark.parametrize(
    ("version", "has", "forced", "message"),
    [
        (cpu.INTERFACE_VERSION + 1, cpu.ISAS, "", "has interface .*, dqt wants .*: install dqt again"),
        (cpu.INTERFACE_VERSION, ("avx2", "portable"), "avx512", "DQT_ISA=avx512: this CPU does not have"),
        (None, (), "avx2", "DQT_ISA=avx2, but dqt was installed without its CPU kernels"),
    ],
)
def test_a_library_that_does_not_fit_is_refused(
    version: int | None, has: tuple[str, ...], forced: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`version` None: there is no library. The stand-in has the instruction sets `has`."""
    stand_in = SimpleNamespace(
        dqt_interface_version=lambda: version, dqt_select=lambda isa: int(isa.decode() not in has)
    )
    monkeypatch.setenv("DQT_ISA", forced)
    monkeypatch.setattr(cpu, "library_path", lambda: None if version is None else Path(__file__))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: stand_in)
    with pytest.raises(ConfigError, match=message):
        cpu.library.__wrapped__()
