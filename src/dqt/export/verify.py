"""`--verify`: the exported files in the program that they are for, against `dqt`'s own model.

Both read the same windows of real text. At every token the log-probabilities that they give to the one that
follows in the text are compared, and which token they find likeliest. A wrong layout, scale or order of rows
makes differences of whole nats; what is left when all is right is how the two round: nothing for floats,
other blocks of int8 activations for llama.cpp.

    target      compared with                               bound on |log p - log p|
    hf          the same weights, activations not rounded   1e-4 nats, the same likeliest token everywhere
    hf-bitnet   the model as trained                        0.05 nats
    gguf        the model as trained                        0.1 nats

A right file can be beyond the bound at a single token: of 2,032 one differed by 0.21 nats in a strict 2-bit
model, where `dqt` with int8 activations is up to 0.7 nats from itself without; the mean was 0.003. It fails
all the same, with the number of such tokens: a wrong file is beyond the bound nearly everywhere.

Where the likeliest tokens differ, `dqt`'s own two likeliest must be within 0.1 nats of each other. The
largest difference of any token is shown, for llama.cpp of its 32 likeliest, and has no bound but for `hf`: at
a window's first token a token of probability e^-8 differed by 0.23 nats from llama.cpp in a ternary model.
There `dqt`'s own int8 activations are 0.23 nats from float, and llama.cpp's 0.06.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dqt.choices import FLOAT_PRODUCTS
from dqt.data.sampler import fixed_windows
from dqt.data.sources import read_paths, read_stdlib
from dqt.errors import ConfigError, ModelError
from dqt.export.source import Source, without_masters
from dqt.extras import require
from dqt.tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOUNDS = {"hf": 1e-4, "hf-bitnet": 0.05, "gguf": 0.1}
MARGIN = 0.1


@dataclass(frozen=True)
class Sample:
    """Text for both programs.

    Attributes:
        windows: Token ids, each window with the token that follows it.
        texts: Texts whose tokens are compared.
    """

    windows: list[list[int]]
    texts: list[str]


@dataclass(frozen=True)
class Agreement:
    """How near two programs are on the same text.

    Attributes:
        target: What was exported.
        runtime: The program and its version.
        tokens: How many distributions were compared.
        bound: The largest difference allowed, in nats.
        largest: The largest difference of the log-probability of the text's next token.
        beyond: How many of these differences are beyond the bound.
        mean: Their mean.
        anywhere: The largest over the whole vocabulary, or for "gguf" over llama.cpp's likeliest tokens.
        disagreements: How often the likeliest tokens differ.
        margin: The most by which `dqt`'s own two likeliest tokens were apart where they did, in nats.
        gap: For `hf`, the largest difference to the model as trained, with int8 activations.
    """

    target: str
    runtime: str
    tokens: int
    bound: float
    largest: float
    beyond: int
    mean: float
    anywhere: float
    disagreements: int
    margin: float
    gap: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is near enough."""
        if self.target == "hf":
            return self.anywhere <= self.bound and not self.disagreements
        return not self.beyond and self.margin <= MARGIN

    @property
    def _any(self) -> str:
        return "any likely token" if self.target == "gguf" else "any token"

    @property
    def brief(self) -> str:
        """One line: by how much they differ."""
        return (
            f"in {self.runtime} the next token's log-probability differs by up to {self.largest:.2g} nats, "
            f"by more than {self.bound:g} at {self.beyond} of {self.tokens} tokens, {self._any}'s by "
            f"{self.anywhere:.2g}; likeliest tokens differ at {self.disagreements}, dqt's own two by up to "
            f"{self.margin:.2g} nats there"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"holds": self.holds}

    def __str__(self) -> str:
        same = self.tokens - self.disagreements
        lines = [
            f"in {self.runtime}, on {self.tokens:,} tokens:",
            f"  log-probability of the next token    differs by at most {self.largest:.2g} nats "
            f"(bound {self.bound:g}), {self.mean:.2g} in the mean",
            *([f"  beyond the bound                     {self.beyond} times"] if self.beyond else []),
            f"  of {self._any:<34}at most {self.anywhere:.2g} nats",
            f"  likeliest token                      the same {same:,} times of {self.tokens:,}"
            + (f", else dqt's own two within {self.margin:.2g} nats" if self.disagreements else ""),
        ]
        if self.gap is not None:
            lines.append(f"  to int8 activations, as in training  at most {self.gap:.2g} nats")
        return "\n".join(lines)


def verify(source: Source, target: str, path: Path, sample: Sample) -> Agreement:
    """Runs what was exported, and compares.

    Args:
        source: The model that was exported.
        target: "hf", "hf-bitnet" or "gguf".
        path: The directory or file.
        sample: What both read.

    Raises:
        ModelError: If the program does not load it, or splits text into other tokens.
        ConfigError: If the program is not installed.
    """
    windows = sample.windows
    run = _in_llama_cpp if target == "gguf" else _in_transformers
    runtime, found, ids = run(source, path, sample)
    for excerpt, theirs in zip(sample.texts, ids, strict=True):
        if theirs != source.tokenizer.core.encode(excerpt, add_special_tokens=False).ids:
            raise ModelError(f"{runtime} splits text into other tokens than dqt, as in {excerpt[:60]!r}")
    own = without_int8_activations(source) if target == "hf" else source.model
    bound = BOUNDS[target]
    likeliest = target == "gguf"
    same = _compare(windows, _log_probs(own, windows), found(), bound, likeliest)
    gap = _compare(windows, _log_probs(source.model, windows), found(), bound)[0] if target == "hf" else None
    compared = sum(len(window) - 1 for window in windows)
    return Agreement(target, runtime, compared, bound, *same, gap)


def require_runtime(target: str) -> None:
    """Raises ConfigError if the program that a target is for is not installed."""
    if target == "gguf":
        require("xllamacpp", "gguf")
    if target == "hf-bitnet":
        require("accelerate", "hf")


def sample(source: Source, tokens: int, text: Sequence[str] | None = None) -> Sample:
    """Chooses what both programs read.

    Args:
        source: The model.
        tokens: How many distributions to compare, at least.
        text: Files and folders; None takes Python's standard library, which is on every machine.

    Raises:
        ConfigError: If there is too little text.
    """
    source.tokenizer.core.encode_special_tokens = True  # text is text here, as it was in training
    documents = [document.text for document in (read_paths(text) if text else read_stdlib()).documents]
    encode = source.tokenizer.core.encode
    # llama.cpp wants room for the token after a window.
    length = min(source.model.config.max_position_embeddings - 1, tokens)
    count = -(-tokens // length)
    needed = count * length + 1
    # Beginnings of evenly spaced documents; more and longer ones until there are enough.
    share, size = 4 * count, 4096
    while True:
        share = min(share, len(documents))
        excerpts = [documents[i * len(documents) // share][:size] for i in range(share)]
        ids = [token for text in excerpts for token in encode(text, add_special_tokens=False).ids]
        if len(ids) >= needed:
            break
        if share == len(documents) and size >= max(map(len, documents)):
            raise ConfigError(
                f"the text has {len(ids)} tokens, too few to verify {tokens} in windows of {length}: "
                "give more with --text"
            )
        share, size = 4 * share, 4 * size
    starts = fixed_windows(len(ids), length, count)
    return Sample([ids[start : start + length + 1] for start in starts], excerpts)


@torch.no_grad()
def _log_probs(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Log-probabilities after each token of each window but its last, `float32` [tokens, vocabulary]."""
    for window in windows:
        yield torch.log_softmax(model(input_ids=torch.tensor([window[:-1]])).logits[0].float(), dim=-1)


def _compare(
    windows: Sequence[Sequence[int]],
    ours: Iterator[Tensor],
    theirs: Iterator[Tensor],
    bound: float,
    likeliest: bool = False,
) -> tuple[float, int, float, float, int, float]:
    """What `Agreement` says of them, from `largest` to `margin`.

    With `likeliest`, a token of log-probability -inf among theirs is one that they do not tell of.
    """
    following, anywhere = [], []
    disagreements, margin = 0, 0.0
    for window, own, other in zip(windows, ours, theirs, strict=True):
        if other.shape != own.shape:
            raise ModelError(f"the export has {other.shape[-1]} tokens, the model {own.shape[-1]}")
        difference = (own - other).abs().nan_to_num(nan=float("inf"))
        if likeliest:
            difference = difference.masked_fill(other == -torch.inf, 0.0)
        following.append(difference.gather(1, torch.tensor(window[1:])[:, None]))
        anywhere.append(float(difference.max()))
        differ = own.argmax(-1) != other.argmax(-1)
        disagreements += int(differ.sum())
        if differ.any():
            best = own[differ].topk(2).values
            margin = max(margin, float((best[:, 0] - best[:, 1]).max()))
    found = torch.cat(following)
    beyond = int((found > bound).sum())
    return float(found.max()), beyond, float(found.mean()), max(anywhere), disagreements, margin


def without_int8_activations(source: Source) -> PreTrainedModel:
    """A copy of a model whose linear layers multiply the activations as they are."""
    plain = copy.deepcopy(without_masters(source).model)
    for parameter in plain.parameters():
        if isinstance(parameter, QuantizedTensor):
            parameter.products = FLOAT_PRODUCTS
    return plain


# -- runtimes ------------------------------------------------------------------------------------------------

Found = tuple[str, Callable[[], Iterator[Tensor]], list[list[int]]]


def _in_transformers(source: Source, path: Path, sample: Sample) -> Found:
    import transformers

    try:
        # The layers of transformers' BitNet ask for torch.compile, for which nothing here is long enough.
        with torch.compiler.set_stance("force_eager"):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            _require_no_meta(model)
            found = list(_log_probs(model.eval(), sample.windows))
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"transformers does not run {path}: {' '.join(str(error).split())[:300]}") from error
    ids = [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in sample.texts
    ]
    return f"transformers {transformers.__version__}", lambda: iter(found), ids


def _require_no_meta(model: nn.Module) -> None:
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing[:3])}")


def _in_llama_cpp(source: Source, path: Path, sample: Sample) -> Found:
    from importlib.metadata import version

    from dqt.export.llama_cpp import next_log_probs

    found, ids = next_log_probs(path, sample.windows, sample.texts, source.model.config.vocab_size)
    runtime = f"llama.cpp (xllamacpp {version('xllamacpp')})"
    return runtime, lambda: map(torch.from_numpy, found), ids
