"""The documents say what the code does: every key, every command, and examples that run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import transformers

import dqt
from dqt.cli import main
from dqt.flags import TRAIN_FLAGS
from dqt.models import build_config
from dqt.train.config import Config
from dqt.train.sections import SECTIONS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_documented_and_no_other(section: str) -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    table = text.partition(f"## [{section}]")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = [key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)]
    assert documented == [field.name for field in dataclasses.fields(SECTIONS[section])]


def test_the_example_config_is_valid(tmp_path: Path) -> None:
    example = re.search(
        r"```toml\n(.*?)```", (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert example
    (tmp_path / "config.toml").write_text(example[1])
    assert Config.from_toml(tmp_path / "config.toml").quant.bits == "4"


def test_the_library_example_runs() -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example
    before, after = example[1].split("...\n")
    names = {"config": build_config("micro", vocab_size=300)}
    exec(before, names)
    tokens = torch.arange(20)[None]
    model = names["model"]
    assert isinstance(model, transformers.LlamaForCausalLM)
    names["loss"] = model(input_ids=tokens, labels=tokens).loss
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, dqt.QuantizedTensor)
    exec(after, names)
    optimizer = names["optimizer"]
    assert isinstance(optimizer, dqt.optim.AdamW)
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for path, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", document.read_text(encoding="utf-8")):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not heading or heading in anchors(target), f"{path}#{heading}"


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings: lower case, hyphens for spaces, no other signs."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_commands_of_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -e . && dqt train  " in readme
    assert "pip install -e '.[dev]' && pytest  " in readme
    for command, options in re.findall(r"^ +dqt (\w+)([^#\n]*)", readme, re.MULTILINE):
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in re.findall(r"--[\w-]+", options))


def test_every_flag_sets_a_key_that_exists() -> None:
    for _, key, *_ in TRAIN_FLAGS:
        section, _, name = key.partition(".")
        assert name in [field.name for field in dataclasses.fields(SECTIONS[section])]
