"""What a training step takes, foretold from sizes alone: the one formula that everything here uses.

Weights and optimizer state are exact to the byte. Activations are what autograd keeps for the backward pass,
module by module, as `_kept_by_layer` lists it; a test compares that with the bytes that autograd really
saves, so that a change of the model's code shows. Both need no model and no allocation: 7B parameters take a
millisecond.

The peak is the largest of a few moments of a step, because gradients grow while activations go:

    loss      all activations, a chunk of logits, the head's gradient
    backward  all activations at the last layer, all gradients at the first, and what one layer computes

What a module computes and frees at once is counted for the largest module. Fragmentation is not in it, nor
are the buffers of the math library; `benchmarks/plan.py` compares the whole with measured peaks.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from dqt.numerics.formats import Format, parse_bits
from dqt.recipes import Recipe
from dqt.sizes import CHUNK_LOGITS, FLOAT_BLOCK, SCALE_BLOCK, packed_size
from dqt.train.config import Config, required

CUDA_CONTEXT_BYTES = 500_000_000
"""A guess: no GPU was at hand."""

KEPT_FREE, KEPT_FREE_AGAIN, KEPT_RELEASING = 0.42, 1.15, 0.25
"""What the C library keeps of freed memory, as a share of activations and workspaces (see `dqt.allocator`);
where activations are computed again; and what gradient release adds. Fitted to `benchmarks/plan.py --preset
tiny --preset small`, whose rows differ by as much as 10 % from one run to the next."""

PROCESS_BYTES = 380_000_000
"""Python with torch and transformers imported, before a model is built (Linux, CPU build of torch 2.13)."""


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        names: Of the modules that hold it: two where the head is the embedding.
        kind: "linear", "embedding", "head" or "norm".
        shape: Its shape.
        format: What it is stored in; None is float32.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    format: Format | None

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of its matrix."""
        return math.prod(self.shape[:-1])

    @property
    def gradient(self) -> int:
        """Bytes of its gradient."""
        return 4 * self.count

    def stored(self, recipe: Recipe) -> int:
        """Bytes of the weight itself."""
        if self.format is None:
            return 4 * self.count
        scales = self.rows if recipe.per_row else 1
        return self.rows * packed_size(self.shape[-1], self.format.bits) + 4 * scales

    def state(self, recipe: Recipe) -> int:
        """Bytes of its optimizer state."""
        low_bit = self.format is not None
        main = low_bit or recipe.method == "paper" or (self.kind == "linear" and not recipe.quantized)
        first = recipe.first_moments[not main]
        second = recipe.second_moment if main else recipe.float_second_moment
        if len(self.shape) < 2:  # a vector keeps float32
            first, second = ("none" if kind == "none" else "fp32" for kind in (first, second))
        blocks = 4 * self.rows * -(-self.shape[-1] // SCALE_BLOCK)  # scales of codes
        bytes_of = {"none": 0, "fp32": 4 * self.count, "full": 4 * self.count, "bf16": 2 * self.count}
        bytes_of |= dict.fromkeys(("int8", "fp8"), self.count + blocks)
        bytes_of["factored"] = 4 * (self.rows + self.shape[-1])
        total = bytes_of[first] + bytes_of[second]
        if low_bit and recipe.scale_rule == "learned":
            total += 2 * 4 * (self.rows if recipe.per_row else 1)
        if low_bit and recipe.residual_bits >= 16:
            total += recipe.residual_bits // 8 * self.count
        elif low_bit and recipe.residual_bits:
            total += self.rows * packed_size(self.shape[-1], recipe.residual_bits)
        return total


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step.

    Attributes:
        weights: As stored.
        optimizer: The optimizer's state.
        gradients: Those that live at the same time.
        activations: What autograd keeps of a forward pass.
        logits: The loss, a chunk of tokens at a time.
        workspace: What the largest layer computes and frees at once.
        process: Python and its packages.
        peak: The most at any moment. Not all of it lives at the same time, but the C library keeps some of
            what was freed.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    workspace: int
    process: int
    peak: int


class Needs:
    """The sizes of a run, and what follows from them.

    Args:
        config: Resolved.
        vocab_size: Of the tokenizer in use; None takes the config's.
    """

    def __init__(self, config: Config, vocab_size: int | None = None) -> None:
        model, train = config.model, config.train
        self.recipe = config.recipe()
        self.rules = config.quant.rules_to_bits
        if self.recipe.method == "paper":
            self.rules = {"*": self.recipe.bits, **self.rules}
        self.arch, self.tied = model.arch, bool(model.tie_word_embeddings)
        self.hidden, self.inner = required(model.hidden_size), required(model.intermediate_size)
        self.layers, self.heads = required(model.num_hidden_layers), required(model.num_attention_heads)
        self.kv_width = self.hidden // self.heads * (model.num_key_value_heads or self.heads)
        self.words = vocab_size or config.data.vocab_size or 0
        self.seq_len = required(train.seq_len)
        self.tokens = required(train.batch_size) * self.seq_len
        self.accumulation = train.accumulation or 1
        self.checkpointing = bool(train.activation_checkpointing)
        self.fused = train.fused and self.recipe.fusible
        self.release, self.give_back = train.gradient_release, train.give_back_memory

    # -- parameters ------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> list[Weight]:
        """Every parameter, in the model's order."""
        return [
            Weight(names, kind, shape, self._format(names, kind)) for names, kind, shape in self._parameters()
        ]

    def _parameters(self) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
        hidden, inner = self.hidden, self.inner
        embedding = ("model.embed_tokens", "lm_head") if self.tied else ("model.embed_tokens",)
        yield embedding, "embedding", (self.words, hidden)
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            yield (f"{attention}.q_proj",), "linear", (hidden, hidden)
            yield (f"{attention}.k_proj",), "linear", (self.kv_width, hidden)
            yield (f"{attention}.v_proj",), "linear", (self.kv_width, hidden)
            yield (f"{attention}.o_proj",), "linear", (hidden, hidden)
            if self.arch == "bitnet":
                yield (f"{attention}.attn_sub_norm",), "norm", (hidden,)
            yield (f"{mlp}.gate_proj",), "linear", (inner, hidden)
            yield (f"{mlp}.up_proj",), "linear", (inner, hidden)
            yield (f"{mlp}.down_proj",), "linear", (hidden, inner)
            if self.arch == "bitnet":
                yield (f"{mlp}.ffn_sub_norm",), "norm", (inner,)
            yield (f"{layer}.input_layernorm",), "norm", (hidden,)
            yield (f"{layer}.post_attention_layernorm",), "norm", (hidden,)
        yield ("model.norm",), "norm", (hidden,)
        if not self.tied:
            yield ("lm_head",), "head", (self.words, hidden)

    def _format(self, names: tuple[str, ...], kind: str) -> Format | None:
        """As `dqt.quantize_` decides: the last rule that matches, else linear layers only."""
        if not self.recipe.quantized:
            return None
        matching = [p for p in self.rules if any(fnmatch.fnmatchcase(name, p) for name in names)]
        bits = self.rules[matching[-1]] if matching else self.recipe.bits if kind == "linear" else None
        return None if bits is None else parse_bits(bits)

    # -- activations -----------------------------------------------------------------------------------------

    @cached_property
    def kept_by_layer(self) -> list[int]:
        """Bytes that autograd keeps of each layer, without the layer's output."""
        formats = {weight.names[0]: weight for weight in self.weights}
        return [self._kept(f"model.layers.{number}", formats) for number in range(self.layers)]

    def _kept(self, layer: str, weights: Mapping[str, Weight]) -> int:
        hidden, inner, a = self.hidden, self.inner, 2 if self.recipe.autocasts else 4

        def linear(module: str, *names: str, input_kept: bool = False) -> int:
            """What linear layers keep of the input that they share."""
            used = [weights[f"{layer}.{module}.{name}_proj"] for name in names]
            width = used[0].shape[-1]
            if self.recipe.method in ("bf16", "bitnet"):  # a cast or rounded copy of input and weight each
                return sum(a * (self.tokens * width + weight.count) for weight in used)
            products = self.recipe.products
            in_bytes = (products.forward, products.grad_weight) != ("float", "float")
            packed = [weight for weight in used if weight.format is not None and in_bytes]
            floats = 0 if len(packed) == len(used) or (input_kept and a == 4) else a * self.tokens * width
            if a == 2:  # autocast's copies of float weights
                floats += sum(a * weight.count for weight in used if weight.format is None)
            return floats + (self.tokens * (width + 4) if packed else 0)  # one form for all

        statistics = 8 if self.fused else 4  # of a query in a head; torch's attention keeps one number
        attention = self.tokens * (a * (2 * hidden + 2 * self.kv_width) + statistics * self.heads)
        extra_norms = self.arch == "bitnet"
        gated = (2 if self.fused else 3) * a * self.tokens * inner  # gate, up, silu(gate)
        norm = self._norm
        total = norm(hidden) + linear("self_attn", "q", "k", "v") + attention
        total += norm(hidden, input_kept=True) if extra_norms else 0
        total += linear("self_attn", "o", input_kept=not extra_norms)
        total += norm(hidden) + linear("mlp", "gate", "up") + gated
        total += a * self.tokens * inner + norm(inner, input_kept=True) if extra_norms else 0
        if extra_norms and a == 2 and self.recipe.quantized:  # a float32 copy of what attention gives
            total += a * self.tokens * hidden
        return total + linear("mlp", "down")

    def _norm(self, width: int, input_kept: bool = False) -> int:
        """Input, reciprocal root, and the normalized input unless the norm is fused."""
        return self.tokens * (4 * width * ((not input_kept) + (not self.fused)) + 4)

    @cached_property
    def activations(self) -> int:
        """Bytes that autograd keeps of a forward pass, without the loss."""
        hidden, tokens = self.hidden, self.tokens
        rotary = 2 * 4 * self.seq_len * hidden // self.heads
        ends = 8 * tokens + rotary + self._norm(hidden)  # token numbers, and the last norm
        if self.checkpointing:
            return ends + self.layers * 4 * tokens * hidden + max(self.kept_by_layer)
        return ends + sum(self.kept_by_layer)

    # -- what is computed and freed at once ------------------------------------------------------------------

    @property
    def head(self) -> Weight:
        """The output head."""
        return self.weights[0 if self.tied else -1]

    @cached_property
    def logits(self) -> int:
        """Bytes of a chunk's logits, their logarithms and gradient, and of the gradient of hidden states."""
        rows = min(self.tokens, max(1, CHUNK_LOGITS // self.words))
        chunks = -(-self.tokens // rows)
        head = 4 * self.head.count if chunks > 1 else 0  # one chunk's gradient, beside the sum
        if self.head.format is not None:
            # A block of the head as floats, twice while it is being made, and its codes.
            head += 9 * min(self.head.count, FLOAT_BLOCK)
        return 3 * 4 * rows * self.words + head + 8 * self.tokens * self.hidden

    @cached_property
    def layer_workspace(self) -> int:
        """What a layer's backward pass holds beside gradients of weights and what was kept."""
        tokens, hidden, inner = self.tokens, self.hidden, self.inner
        widest = max((w for w in self.weights if w.kind == "linear"), key=lambda w: w.count)
        product = 2 * widest.count if widest.format else 0  # int8 codes, and as the kernel orders them
        flowing = 4 * tokens * (2 * hidden + 3 * inner)  # gradients of the residual stream and of the MLP
        return product + flowing

    # -- together --------------------------------------------------------------------------------------------

    def footprint(self, gpu: bool = False) -> Footprint:
        """Everything, and the peak, on the CPU or on a GPU."""
        process = CUDA_CONTEXT_BYTES if gpu else PROCESS_BYTES
        weights = sum(weight.stored(self.recipe) for weight in self.weights)
        optimizer = sum(weight.state(self.recipe) for weight in self.weights)
        every = sum(weight.gradient for weight in self.weights)
        largest = max(weight.gradient for weight in self.weights)
        gradients = largest if self.release else every
        before = 0 if self.accumulation == 1 or self.release else every  # of the passes before this one
        head = self.head.gradient
        first_layer = max(self.kept_by_layer)
        moments = {
            "loss": before + head + self.activations + self.logits,
            "last layer": max(before, head) + self.activations + self.layer_workspace,
            "first layer": gradients + first_layer + self.layer_workspace,
        }
        needed = process + weights + optimizer + max(moments.values())
        kept = KEPT_FREE_AGAIN if self.checkpointing else KEPT_FREE
        kept += KEPT_RELEASING if self.release else 0.0
        churned = self.activations + self.logits + self.layer_workspace
        return Footprint(
            weights=weights,
            optimizer=optimizer,
            gradients=gradients,
            activations=self.activations,
            logits=self.logits,
            workspace=self.layer_workspace,
            process=process,
            peak=needed + (0 if gpu or self.give_back else int(kept * churned)),
        )
