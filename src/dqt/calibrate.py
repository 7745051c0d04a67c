"""Initial codes that keep a layer's outputs, for a model that starts from a float checkpoint.

Rounding each weight to nearest minimizes the error of the weights; what matters is the error of the outputs
on the inputs that a layer really sees. With X sample inputs [tokens, in] and H = Xᵀ X + λ I, the columns of W
are rounded one after another, and what a column's rounding changes in the output is made up for by the
columns that are still floats (GPTQ, arXiv 2210.17323, equations 2 and 3):

    q_i = nearest(w_i)
    w_j -= (w_i - q_i) / U_ii * U_ij   for j > i        U the upper Cholesky factor of H⁻¹

The columns with the largest inputs come first. All layers see the inputs of the float model, collected in one
pass; that the layers below are rounded too is not looked at. It costs [in, in] floats for each layer while it
runs, and in³ operations. Embeddings and norm gains are rounded to nearest, which is best there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqt.errors import ConfigError
from dqt.numerics.formats import Format

DAMPING = 0.01
"""λ as a share of the mean diagonal of Xᵀ X, so that inputs that never occur do no harm."""


def input_products(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> dict[int, Tensor]:
    """Xᵀ X of every linear layer that a batch reaches, `float32` [in, in], by the `id` of its weight.

    Args:
        model: A float model; it is run once, in evaluation mode, without gradients.
        batch: What the model is called with: a tensor, or keyword arguments.

    Raises:
        ConfigError: If the inputs of a layer hold NaN or Inf, or no linear layer is reached.
    """
    found: dict[int, Tensor] = {}
    names: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}

    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
        if not x.isfinite().all():
            raise ConfigError(f"calibrate: the inputs of {names[module]} hold NaN or Inf; look at the batch")
        weight = id(module.weight)
        found[weight] = found.get(weight, 0.0) + x.T @ x

    hooks = [module.register_forward_pre_hook(collect) for module in names]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    if not found:
        raise ConfigError("calibrate: the batch reaches no nn.Linear of this model; give another one")
    return found


def round_for_output(weight: Tensor, scale: Tensor, format: Format, products: Tensor) -> Tensor:
    """The values of a grid whose outputs are near those of a weight.

    Args:
        weight: Float tensor [out, in].
        scale: Positive `float32`, [] or [out, 1].
        format: The format of the codes.
        products: Xᵀ X, `float32` [in, in].

    Returns:
        `float32` [out, in], on the grid.
    """
    order = products.diagonal().argsort(descending=True, stable=True)
    rest = weight.detach().float()[:, order]
    h = products[order][:, order].double()
    h.diagonal().add_(h.diagonal().mean().clamp_min(1e-12) * DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    rounded = torch.empty_like(rest)
    for i in range(rest.shape[1]):
        column = rest[:, i : i + 1]
        codes = (column / scale + (format.offset + 0.5)).floor().clamp_(format.qmin, format.qmax)
        rounded[:, i : i + 1] = (codes - format.offset) * scale
        error = (column - rounded[:, i : i + 1]) / factor[i, i]
        rest[:, i + 1 :] -= error * factor[i, i + 1 :]
    return rounded[:, order.argsort()]
