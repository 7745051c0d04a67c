"""`gguf`: one file for llama.cpp and what is built on it, its blocks written straight from the codes.

Two architectures of llama.cpp fit what `dqt` trains:

    llama     its rotary embedding turns neighbouring pairs, `transformers`' the two halves of a head: the
              rows of query and key weights are put in the other order, which changes only the layout
    bitnet    turns halves too, so nothing moves; it always multiplies with the embedding as the head

Low-bit weights become the block type of their format (`dqt.export.blocks`). Other matrices are written as
`float16`, vectors as `float32`, as llama.cpp's own converter does: a relative error of 2^-11 in what was
never low-bit. In its products llama.cpp quantizes activations per block of 32 or 256, `dqt` per token: the
numbers are not the same to the bit, and `--verify` says how near they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dqt.errors import ModelError
from dqt.export.blocks import BLOCK_TYPES, block_type, to_blocks
from dqt.export.gguf_vocab import read_vocabulary
from dqt.export.source import Source, as_float, exported_tensors
from dqt.extras import require
from dqt.tensor import QuantizedTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = ("llama", "bitnet")
FLOAT16_MAX = 65504.0

# Modules of transformers' models, and what llama.cpp calls their tensors.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}


def write_gguf(source: Source, path: Path, other_types: bool = False, description: str = "") -> list[str]:
    """Writes a GGUF file.

    Args:
        source: What to export.
        path: The file.
        other_types: Whether rows that do not fit their format's blocks may be written in another, larger type
            that loses nothing.
        description: One line for the file's metadata.

    Returns:
        What the user should know: rows in another type, scales that were rounded.

    Raises:
        ModelError: If llama.cpp has no place for this architecture, tokenizer or shape.
    """
    gguf = require("gguf", "gguf")
    _check_architecture(source)
    vocabulary = read_vocabulary(source.tokenizer, source.model.config.vocab_size)
    notes: list[str] = []
    tensors = [
        (name, *_encode(name, tensor, source, other_types, notes))
        for name, tensor in exported_tensors(source.model)
    ]
    writer = gguf.GGUFWriter(path, source.architecture)
    try:
        _add_metadata(writer, source, _file_type(gguf, [kind for *_, kind in tensors]), description)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        writer.add_token_merges(vocabulary.merges)
        _add_special_tokens(writer, source)
        for name, data, kind in tensors:
            writer.add_tensor(_name(name), data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return notes


def _check_architecture(source: Source) -> None:
    source.require_architecture(ARCHITECTURES, "gguf")
    config = source.model.config
    if config.hidden_act != "silu":
        raise ModelError(
            f"llama.cpp's {source.architecture} computes SiLU, this model {config.hidden_act!r}: use --to hf"
        )
    if source.architecture == "bitnet" and not config.tie_word_embeddings:
        raise ModelError(
            "llama.cpp's bitnet takes the embedding for the head, and this model has a head of its own\n"
            "use --to hf or --to hf-bitnet, or train with model.tie_word_embeddings=true"
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"gguf has no mapping for rope_type {rope['rope_type']!r}: use --to hf")


def _name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    module, _, kind = name.rpartition(".")
    prefix, layer = "", re.match(r"model\.layers\.(\d+)\.(.+)", module)
    if layer:
        prefix, module = f"blk.{layer[1]}.", layer[2]
    if module not in _NAMES:
        raise ModelError(f"gguf has no place for the tensor {name}: use --to hf")
    return f"{prefix}{_NAMES[module]}.{kind}"


# -- tensors -------------------------------------------------------------------------------------------------


def _encode(
    name: str, tensor: Tensor, source: Source, other_types: bool, notes: list[str]
) -> tuple[np.ndarray, str]:
    """A tensor's bytes or floats, and the name of their type."""
    order = _row_order(name, source, tensor.shape[0])
    if not isinstance(tensor, QuantizedTensor) or tensor.ndim < 2:
        values = as_float(tensor)
        values = values if order is None else values[order]
        return _encode_floats(values)
    integers, scale = tensor.product_codes()
    scale = scale.flatten().expand(tensor.shape[0])
    if order is not None:
        integers, scale = integers[order], scale[order]
    kind = block_type(tensor.format, tensor.shape[1], other_types)
    if kind is None and not other_types:
        _refuse_rows(name, tensor)
    own = block_type(tensor.format, 256)
    if kind is None:
        notes.append(f"{name}: rows of {tensor.shape[1]} fit no block, written as floats")
        return _encode_floats(integers.float() * scale[:, None], exact=True)
    if kind is not own:
        notes.append(f"{name}: rows of {tensor.shape[1]}, written as {kind.name}")
    half = scale.to(torch.float16)
    error = float(((half.float() - scale).abs() / scale).max())
    if not half.isfinite().all() or error > 2**-10:
        raise ModelError(f"{name} has a scale of {float(scale.max()):.3g}, beyond float16: use --to hf")
    if error:
        notes.append(f"{name}: scale rounded to float16, by {error:.1e} of itself")
    return to_blocks(kind, tensor.format, integers.numpy(), half.numpy()), kind.name


def _refuse_rows(name: str, weight: QuantizedTensor) -> None:
    own = block_type(weight.format, 256)
    assert own is not None
    raise ModelError(
        f"{name} has rows of {weight.shape[1]}, and {weight.format} bits go into blocks of {own.block} "
        f"({own.name})\nadd --lossless to write such rows in a larger type that loses nothing, or use --to hf"
    )


def _encode_floats(values: Tensor, exact: bool = False) -> tuple[np.ndarray, str]:
    """`float16` for matrices that it can hold, `float32` for vectors."""
    half = values.to(torch.float16)
    fits = torch.equal(half.float(), values) if exact else float(values.abs().max()) <= FLOAT16_MAX
    return (half.numpy(), "F16") if values.ndim > 1 and fits else (values.numpy(), "F32")


def _row_order(name: str, source: Source, rows: int) -> Tensor | None:
    """Where llama.cpp's rotary embedding wants the rows of query and key weights, if not where they are."""
    if source.architecture != "llama" or not (".q_proj." in name or ".k_proj." in name):
        return None
    config = source.model.config
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


# -- metadata ------------------------------------------------------------------------------------------------


def _file_type(gguf: Any, kinds: list[str]) -> int:
    """llama.cpp's name for the mixture, after the type that most matrices have."""
    blocks = [kind for kind in kinds if kind in {type.name for type in BLOCK_TYPES}]
    if not blocks:
        return int(gguf.LlamaFileType.MOSTLY_F16)
    return int(gguf.LlamaFileType[f"MOSTLY_{max(set(blocks), key=blocks.count)}"])


def _add_metadata(writer: GGUFWriter, source: Source, file_type: int, description: str) -> None:
    config = source.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(source.name)
    if description:
        writer.add_description(description)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_sampling(writer, source)


def _add_sampling(writer: GGUFWriter, source: Source) -> None:
    """What the generation config asks for, if it draws."""
    generation = source.model.generation_config
    if generation is None or not generation.do_sample:
        return
    for value, add in (
        (generation.temperature, writer.add_sampling_temp),
        (generation.top_k, writer.add_sampling_top_k),
        (generation.top_p, writer.add_sampling_top_p),
    ):
        if value is not None:
            add(value)


def _add_special_tokens(writer: GGUFWriter, source: Source) -> None:
    config = source.model.config
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(source.tokenizer.end_id)
    begins = source.tokenizer.core.encode("a").ids[:1] == [config.bos_token_id]
    writer.add_add_bos_token(begins)  # as the tokenizer itself does
    if source.tokenizer.chat_template is not None:
        writer.add_chat_template(source.tokenizer.chat_template)
