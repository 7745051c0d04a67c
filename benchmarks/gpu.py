"""The quantized linear layer, the optimizer and a whole step against FP32 and BF16, on a CUDA GPU.

Nobody has run this: the project was written without a GPU. It is here for those who have one:

    python benchmarks/gpu.py                 # one table of ratios; above 1 is faster than FP32

Arms take turns in one process, each between two events on the stream; the ratio is the median over rounds.
The Triton kernels are used where Triton is installed; `int8` products are `torch._int_mm`'s. The optimizer's
update has no Triton kernel, and runs on the reference, a pass an operation: expect it to be slow.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch import nn

import dqt
from dqt.models import build_config
from dqt.ops import gpu

ARMS = ("fp32", "bf16", "ternary", "8")


def model_of(arm: str, width: int) -> nn.Module:
    """LLaMA of two layers."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(build_config("small", "llama", 4096, 512, sizes))
    return prepared(model, arm)


def prepared(model: nn.Module, arm: str) -> nn.Module:
    """The model as an arm has it, on the GPU."""
    if arm not in ("fp32", "bf16"):
        dqt.quantize_(model, arm)
    return model.to("cuda", torch.bfloat16 if arm == "bf16" else torch.float32)


def linear(arm: str, width: int) -> Callable[[], None]:
    """All three products of a linear layer, 4,096 tokens."""
    layer = prepared(nn.Sequential(nn.Linear(width, width, bias=False)), arm)
    dtype = torch.bfloat16 if arm == "bf16" else torch.float32
    x = torch.randn(4096, width, device="cuda", dtype=dtype, requires_grad=True)
    return lambda: layer(x).sum().backward()


def optimizer_of(model: nn.Module, arm: str) -> torch.optim.Optimizer:
    """torch's fused AdamW, or ours with a residual and a factored second moment."""
    if arm in ("fp32", "bf16"):
        return torch.optim.AdamW(model.parameters(), fused=True)
    return dqt.optim.AdamW(model.named_parameters(), residual_bits=8, second_moment="factored")


def update(arm: str, width: int) -> Callable[[], None]:
    """An optimizer step of one weight."""
    layer = prepared(nn.Sequential(nn.Linear(width, width, bias=False)), arm)
    for parameter in layer.parameters():
        parameter.grad = torch.randn(parameter.shape, device="cuda", dtype=parameter.dtype)
    return optimizer_of(layer, arm).step


def step(arm: str, width: int) -> Callable[[], None]:
    """Forward, backward and optimizer step of a model of two layers, 4 x 512 tokens."""
    model = model_of(arm, width)
    optimizer = optimizer_of(model, arm)
    tokens = torch.randint(0, 4096, (4, 512), device="cuda")

    def once() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


def milliseconds(once: Callable[[], None], repeat: int) -> float:
    """Time of one call, on the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeat):
        once()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU, and torch sees none; benchmarks/step.py is for the CPU")
    kernels = "Triton" if gpu.module("triton_kernels") else "the reference"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, kernels: {kernels}")
    print("| what | " + " | ".join(f"{arm}, times FP32's speed" for arm in ARMS) + " |")
    print("|---|" + "---|" * len(ARMS))
    for case in (linear, update, step):
        calls = {arm: case(arm, arguments.width) for arm in ARMS}
        for once in calls.values():
            milliseconds(once, 2)
        rounds = [
            {arm: milliseconds(once, arguments.repeat) for arm, once in calls.items()}
            for _ in range(arguments.rounds)
        ]
        ratios = [statistics.median(times["fp32"] / times[arm] for times in rounds) for arm in ARMS]
        print(f"| {case.__name__} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
