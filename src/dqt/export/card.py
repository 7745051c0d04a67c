"""The model card: a README.md that says what the files are, how they were trained and checked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dqt import __version__
from dqt.errors import ConfigError
from dqt.export.source import Source
from dqt.export.verify import Agreement
from dqt.start import name_of
from dqt.tensor import QuantizedTensor
from dqt.train.savedmodel import config_beside

CARD = "README.md"
TRAIN_CONFIG = "train.toml"
PAPER = "arXiv 2412.04787"

_USE = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}", dtype="float32")
tokens = model.generate(**tokenizer("{prompt}", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(tokens[0]))
```""",
    "gguf": """```
llama-cli -m {path} -no-cnv -p "{prompt}"
```""",
}
_USE["hf-bitnet"] = _USE["hf"] + (
    "\n\n`transformers` wants the package `accelerate` for this, and a C++ compiler on the CPU "
    "(or `TORCH_COMPILE_DISABLE=1`)."
)
_WEIGHTS = {
    "hf": "`float32`, each weight the product of code and scale; nothing is lost",
    "hf-bitnet": "ternary codes in `transformers`' BitNet packing, 2 bits a weight",
    "gguf": "GGUF blocks written from the integer codes; matrices that were never low-bit as `float16`",
}


def write_card(
    source: Source,
    target: str,
    directory: Path,
    file: str | None = None,
    notes: list[str] | None = None,
    agreement: Agreement | None = None,
) -> None:
    """Writes the card, and the training config beside it if the run still has it.

    Args:
        source: The model.
        target: What it is exported to.
        directory: Where.
        file: The name of the file that holds the model, if it is one.
        notes: What the user should know.
        agreement: What `--verify` found.
    """
    config = _train_config(source)
    if config is not None:
        (directory / TRAIN_CONFIG).write_text(config, encoding="utf-8")
    tags = ["dqt", "low-bit", *sorted(f"{name}-bit" if name.isdigit() else name for name in _formats(source))]
    facts = _facts(source)
    facts["these files"] = _WEIGHTS[target]
    sections = [
        "---",
        f"library_name: {'gguf' if target == 'gguf' else 'transformers'}",
        "pipeline_tag: text-generation",
        *([f"base_model: {json.dumps(base)}"] if (base := _base(source)) else []),
        f"tags: [{', '.join(tags)}]",
        "---",
        f"# {source.name}\n",
        f"Trained with dqt {source.info.get('versions', {}).get('dqt', '?')} (Direct Quantized Training, "
        f"after {PAPER}), exported by dqt {__version__}.\n",
        "| | |\n|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "\n## Use\n",
        _USE[target].format(path=file or ".", prompt="def main("),
        "\n## Checked\n",
        f"```\n{agreement}\n```" if agreement else "Not run in another program (`dqt export --verify` does).",
    ]
    if notes:
        sections += ["\n## Notes\n", *(f"- {note}" for note in notes)]
    if config is not None:
        sections += [
            "\n## Training\n",
            f"`dqt train {TRAIN_CONFIG}` repeats it, bit for bit on the same software.",
        ]
    (directory / CARD).write_text("\n".join(sections) + "\n", encoding="utf-8")


def _formats(source: Source) -> Counter[str]:
    """How many weights each format holds."""
    found: Counter[str] = Counter()
    for parameter in source.model.parameters():
        if isinstance(parameter, QuantizedTensor):
            found[str(parameter.format)] += parameter.numel()
    return found


def describe(source: Source) -> str:
    """One line: bits and method."""
    formats = " and ".join(sorted(_formats(source))) or "float"
    method = source.info.get("method")
    return f"{formats} weights, trained by dqt" + (f" with the method {method}" if method else "")


def _facts(source: Source) -> dict[str, Any]:
    info, config = source.info, source.model.config
    summary = info.get("summary", {})
    total = sum(parameter.numel() for parameter in source.model.parameters())
    formats = _formats(source)
    bits = "; ".join(f"{count:,} {_bits(name)}" for name, count in formats.most_common())
    facts = {
        "architecture": f"{source.architecture}, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}",
        "parameters": f"{total:,}: {bits + '; the rest float' if bits else 'all float'}",
        "method": _method(info),
    }
    if base := _base(source):
        facts["base model"] = f"{base}, whose licence and data are this model's too"
    data = summary.get("data", {}).get("source", {})
    if data:
        facts["data"] = ", ".join(f"{key} {value}" for key, value in data.items())
    if "tokens" in summary:
        facts["trained on"] = f"{summary['tokens']:,} tokens in {summary.get('step', 0):,} steps"
    if "val_loss" in summary:
        facts["validation loss"] = (
            f"{summary['val_loss']:.4f} nats a token, {summary['val_bpb']:.4f} bits a byte "
            f"(unigram {summary['unigram_nats']:.4f} nats)"
        )
    return facts


def _base(source: Source) -> str | None:
    """What a model is called that this one was trained from; where it lay is nobody's business."""
    start = source.info.get("summary", {}).get("start")
    return name_of(start["path"]) if start else None


def _bits(name: str) -> str:
    return name if name == "ternary" else f"of {name} bit{'s' if name != '1' else ''}"


def _method(info: dict[str, Any]) -> str:
    method, residual = info.get("method"), info.get("recipe", {}).get("residual_bits", 0)
    return {
        "strict": "strict: the codes were all that a weight knew between two steps",
        "residual": f"residual: {residual} bits of remainder a weight during training, not exported",
        "paper": f"paper: as published in {PAPER}",
        "bitnet": "bitnet: float32 master weights (BitNet b1.58), of which the ternary weights are exported",
        "None": "not noted: the model was saved by transformers",
    }.get(str(method), str(method))


def _train_config(source: Source) -> str | None:
    """The run's config without the place where it was written, if it can still be read."""
    from dqt.train.config import Config

    path = config_beside(source.directory)
    if path is None:
        return None
    try:
        content = Config.from_toml(path).to_dict()
    except ConfigError:
        return None
    content["train"].pop("out", None)
    return Config.from_dict(content).to_toml()
