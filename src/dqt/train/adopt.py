"""A trained model put into low-bit weights: the float model, what it loses by conversion, the converted one.

Every weight is rounded to nearest on the grid that the recipe for trained models says, or, with
`quant.calibrate`, so that the layers' outputs on some of the training text stay near (GPTQ, `dqt.calibrate`).
Weights of a run that are in the wanted format already keep their codes and scales, unless another scale rule,
one scale a tensor in place of one a row, or calibration is asked for. The loss before and after is measured
on the same held-out text; the loss before on the float layers, without int8 activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dqt.build import prepare_model_
from dqt.errors import ModelError
from dqt.nn import set_quantized_weight
from dqt.quantize import QuantizeReport, Rule
from dqt.recipe import Recipe
from dqt.recipes import recipe_for
from dqt.start import RUN, Start, one_line
from dqt.tensor import QuantizedTensor
from dqt.train.pretrained import load_float
from dqt.train.savedmodel import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adopt(
    start: Start,
    recipe: Recipe,
    rules: Mapping[str, Rule],
    sequences: Tensor | None,
    before: Callable[[PreTrainedModel], None],
) -> tuple[PreTrainedModel, QuantizeReport]:
    """Loads a model and converts it to what a recipe trains.

    Args:
        start: Where it lies.
        recipe: What its weights become.
        rules: See `dqt.quantize_`.
        sequences: `int64` [B, S] tokens to calibrate on; None rounds to nearest.
        before: Called with the float model.

    Raises:
        ModelError: If the model can't be loaded, computes what dqt does not, or has nothing to convert.
    """
    model = load_float(start)
    _require_plain_head(model, start)
    before(model)
    calibrate = None if sequences is None else {"input_ids": sequences, "use_cache": False}
    report = prepare_model_(model, recipe, rules, calibrate=calibrate, keep_remainder=True)
    if recipe.quantized and not report.converted:
        kinds = sorted({left.reason for left in report.left if len(left.shape) > 1})
        raise ModelError(
            f"--from {start.path}: {start.architecture} has no weights that dqt can train in low bits "
            f"({'; '.join(kinds)})"
        )
    if start.kind == RUN and recipe.quantized and sequences is None and _has_usual_grid(recipe):
        _keep_codes(model, start)
    return model, report


@torch.no_grad()
def _require_plain_head(model: PreTrainedModel, start: Start) -> None:
    """Refuses models that do more to their hidden states than multiply them with the head: `dqt` does not."""
    tokens = torch.arange(1, min(9, start.vocab_size))[None]
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        ours = model.get_output_embeddings()(hidden)
    except Exception as error:  # an encoder, a model of images, whatever else transformers calls a CausalLM
        raise ModelError(
            f"--from {start.path}: dqt can't run {start.architecture}: {one_line(error)}"
        ) from error
    if not torch.allclose(ours, logits, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"--from {start.path}: {start.architecture} changes its logits after the head, and dqt's loss "
            "does not: this architecture is not supported"
        )


def _has_usual_grid(recipe: Recipe) -> bool:
    """Whether nobody asked for a grid of another step; scales that are to be trained begin where they are."""
    usual = recipe_for(recipe.method, recipe.bits, trained=True)
    return recipe.headroom == usual.headroom and recipe.scale_rule in (usual.scale_rule, "learned")


def _keep_codes(model: PreTrainedModel, start: Start) -> None:
    """Puts a run's own codes and scales back wherever their format is the one that was asked for.

    Where the recipe has one scale a row, that of a whole tensor becomes the one of each of its rows, so that
    a checkpoint's tensors have the shapes that the config says.
    """
    old = dict(load_model(start.path)[0].named_parameters())
    for name, weight in list(model.named_parameters()):
        own = old[name]
        if not (isinstance(own, QuantizedTensor) and isinstance(weight, QuantizedTensor)):
            continue
        if own.format == weight.format and own.scale.ndim <= weight.scale.ndim:
            scale = own.scale.expand_as(weight.scale).contiguous()
            kept = QuantizedTensor(own.codes, scale, own.format, own.shape, own.dtype, weight.products)
            parameter = torch.nn.Parameter(kept)
            for module in model.modules():
                if getattr(module, "weight", None) is weight:
                    set_quantized_weight(module, parameter)
