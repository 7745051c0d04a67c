"""What the documentation calls `dqt.NAME` is there after `import dqt`, and heavy packages only when used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dqt
from dqt import extras
from dqt.errors import ConfigError


@pytest.mark.parametrize("name", dqt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    code = f"import dqt; dqt.{name}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_import_is_light() -> None:
    code = "import dqt, sys; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_an_extra_that_lacks_a_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    with monkeypatch.context() as patch:
        patch.setattr("importlib.import_module", broken)
        with pytest.raises(ConfigError, match=r"named 'datasets'.*pip install datasets, or 'dqt\[eval\]'"):
            extras.require("lm_eval", "eval")
