"""`dqt plan`: what a run needs, beside the usual ways to train, and which settings make it fit.

Settings are tried in the order of what they cost, each on top of those before it, until the run fits; then
those that turn out not to be needed are taken back, the dearest first. The same answer refuses a run that
can't fit before it starts, and explains one that ran out of memory. Sizes of GPUs are those on the label, in
GiB; what a GPU's own context takes is a guess, as none was at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dqt.errors import ConfigError, DqtError, did_you_mean
from dqt.footprint import Footprint, Needs
from dqt.sizes import format_bytes
from dqt.train.config import Config, required, resolve
from dqt.train.guard import STOP
from dqt.train.sections import LEAVE_FLOAT, QuantConfig

GIB = 2**30
CPU = "cpu"
_GPUS = {
    8: ("rtx4060",),
    12: ("rtx3060", "rtx4070"),
    16: ("t4", "rtx4080", "rtx5080"),
    24: ("l4", "a10", "rtx3090", "rtx4090"),
    32: ("v100", "rtx5090"),
    40: ("a100-40",),
    48: ("l40s", "a6000"),
    80: ("a100-80", "h100"),
    141: ("h200",),
    192: ("b200",),
}
DEVICES = {name: size * GIB for size, names in _GPUS.items() for name in names}
"""Bytes of GPUs by name."""

BASELINES = {"fp32": "FP32 AdamW", "bf16": "BF16", "bitnet": "BitNet"}
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": GIB}


@dataclass(frozen=True)
class Change:
    """A setting that lowers the peak.

    Attributes:
        settings: Keys of the config and their values.
        cost: What it costs.
        peak: Bytes with it and with all changes before it.
    """

    settings: dict[str, Any]
    cost: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        config: Resolved.
        device: As asked for.
        budget: Bytes there are.
        needs: Of the run.
        released: Its peak with gradient release.
        baselines: The same model and batch in full precision, and so on, by the method's name.
        changes: What makes it fit, or all there is if nothing does; empty if it fits.
        fits: Whether it fits, with the changes.
    """

    config: Config
    device: str
    budget: int
    needs: Footprint
    released: int
    baselines: dict[str, Footprint]
    changes: tuple[Change, ...]
    fits: bool

    @property
    def settings(self) -> dict[str, Any]:
        """All changes together, by key of the config."""
        return {key: value for change in self.changes for key, value in change.settings.items()}

    def command(self) -> str:
        """The command that trains with the changes."""
        return " ".join(["dqt train", *_flags(self.config), *set_flags(self.settings)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "device": self.device,
            "budget": self.budget,
            "needs": asdict(self.needs),
            "peak_with_gradient_release": self.released,
            "baselines": {method: asdict(needs) for method, needs in self.baselines.items()},
            "fits": self.fits,
            "changes": [asdict(change) for change in self.changes],
            "command": self.command(),
        }

    def __str__(self) -> str:
        train, quant = self.config.train, self.config.quant
        name = " ".join(part for part in (self.config.model.name, quant.bits, quant.method) if part)
        columns = {"this run": self.needs} | {BASELINES[m]: n for m, n in self.baselines.items()}
        lines = [
            f"{name}, {train.batch_size} x {train.seq_len} tokens; {self.device} {format_bytes(self.budget)}",
            "",
            " " * 14 + "".join(f"{title:>12}" for title in columns),
        ]
        for each in fields(Footprint):
            cells = "".join(f"{format_bytes(getattr(needs, each.name)):>12}" for needs in columns.values())
            lines.append(f"{each.name:14}{cells}")
        lines += ["", f"peak with gradient release: {format_bytes(self.released)}", ""]
        if not self.changes:
            return "\n".join([*lines, "fits" if self.fits else "does not fit, and nothing here lowers it"])
        lines.append("does not fit; " + ("with" if self.fits else "not even with"))
        for change in self.changes:
            flags = " ".join(set_flags(change.settings))
            lines.append(f"  {flags}\n      {change.cost}; peak {format_bytes(change.peak)}")
        return "\n".join([*lines, *(["", self.command()] if self.fits else [])])


def plan(config: Config, device: str = CPU, budget: str | None = None, vocab_size: int | None = None) -> Plan:
    """What a run needs and what makes it fit; allocates nothing.

    Args:
        config: Resolved or not.
        device: "cpu" for the memory that is free now, a name in `DEVICES`, or a size.
        budget: A size that goes before the device's.
        vocab_size: Of the tokenizer in use; None takes the config's.

    Raises:
        ConfigError: An unknown device, or a size that is none.
    """
    # Threads are of no interest here, and asking torch for its number would take longer than the rest.
    config = resolve(config.override({"train.threads": config.train.threads or 1}))
    if not foretold(config):
        raise DqtError(f"the memory of the architecture {config.model.arch!r} can't be foretold: try it")
    size = parse_size(budget) if budget else device_memory(device)
    needs = Needs(config, vocab_size).footprint(gpu=device != CPU)

    def peak(of: Config) -> int:
        return Needs(of, vocab_size).footprint(gpu=device != CPU).peak

    fits = needs.peak <= size
    changes: tuple[Change, ...] = ()
    if not fits:
        chosen, fits = _choose(config, peak, size)
        changes = tuple(_with_peaks(config, chosen, peak))
    return Plan(
        config=config,
        device=device,
        budget=size,
        needs=needs,
        released=peak(_apply(config, _release(config))),
        baselines={method: _baseline(config, method, vocab_size, device != CPU) for method in BASELINES},
        changes=changes,
        fits=fits,
    )


def foretold(config: Config) -> bool:
    """Whether the sizes of a resolved config's model are known; some architectures have others."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return all(getattr(config.model, name) is not None for name in needed)


def refuse_what_does_not_fit(config: Config) -> None:
    """Raises `DqtError`, with settings that would fit, for a run that needs more than `train.memory_limit`.

    Without a limit it is what the system has available now.
    """
    limit = config.train.memory_limit
    if not foretold(config):
        return
    needed = plan(config, CPU, limit)
    if needed.needs.peak > needed.budget:
        there = f"train.memory_limit is {limit}" if limit else f"{format_bytes(needed.budget)} are free"
        raise DqtError(
            f"this run needs about {format_bytes(needed.needs.peak)}, and {there}: {advice(needed)}; "
            "train.memory_limit sets another limit"
        )


def advice(plan: Plan) -> str:
    """The settings that make a run fit, in a sentence."""
    flags = " ".join(set_flags(plan.settings))
    if plan.fits and flags:
        return f"add {flags}, which takes about {format_bytes(plan.changes[-1].peak)}"
    return "take a smaller preset or train.seq_len" + (f", beside {flags}" if flags else "")


# -- what lowers the peak ------------------------------------------------------------------------------------


def _candidates(config: Config) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings that lower the peak, in the order of what they cost."""
    recipe, train = config.recipe(), config.train
    can_factor = recipe.method != "paper" and recipe.optimizer != "sgd"
    if can_factor and recipe.second_moment != "factored":
        yield {"optim.second_moment": "factored"}, "no loss measured"
    if can_factor and recipe.float_second_moment != "factored":
        yield {"optim.float_second_moment": "factored"}, "of embedding and head: loss not measured"
    if not train.activation_checkpointing:
        yield {"train.activation_checkpointing": True}, "the same steps, a third more time"
    batch, accumulation = required(train.batch_size), required(train.accumulation)
    while batch > 1 and not train.gradient_release:
        smaller = batch // 2
        accumulation, batch = accumulation * batch // smaller, smaller
        settings = {"train.batch_size": batch, "train.accumulation": accumulation}
        yield settings, "as many tokens an update, in more passes"
    if not train.gradient_release:
        cost = "clips each update instead of the gradients' norm"
        if accumulation > 1:
            cost += f", and an update sees {batch * (train.seq_len or 0):,} tokens"
        yield _release(config), cost
    if not train.give_back_memory:
        yield (
            {"train.give_back_memory": True},
            "slower: 2.3 times the time of a step of tiny, less on large ones",
        )
    if recipe.quantized and recipe.method != "paper":
        if config.quant.embeddings == LEAVE_FLOAT:
            yield {"quant.embeddings": "8"}, "embedding and head in 8 bits: loss not measured"
        if recipe.residual_bits > 6:
            yield {"quant.residual_bits": 6}, "ternary: 0.05 nats in a short run"


def _release(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"train.gradient_release": True}
    return settings | ({"train.accumulation": 1} if (config.train.accumulation or 1) > 1 else {})


def _choose(config: Config, peak: Any, size: int) -> tuple[list[tuple[dict[str, Any], str]], bool]:
    chosen: list[tuple[dict[str, Any], str]] = []
    for candidate in _candidates(config):
        chosen.append(candidate)
        if peak(_apply(config, *(settings for settings, _ in chosen))) <= size:
            break
    else:
        return _last_of_each(chosen), False
    chosen = _last_of_each(chosen)
    for candidate in reversed(chosen[:-1]):
        rest = [each for each in chosen if each is not candidate]
        if peak(_apply(config, *(settings for settings, _ in rest))) <= size:
            chosen = rest
    return chosen, True


def _last_of_each(chosen: list[tuple[dict[str, Any], str]]) -> list[tuple[dict[str, Any], str]]:
    """Drops settings that later ones set again, as a smaller batch does."""
    return [
        (settings, cost)
        for number, (settings, cost) in enumerate(chosen)
        if not any(settings.keys() <= later.keys() for later, _ in chosen[number + 1 :])
    ]


def _with_peaks(config: Config, chosen: list[tuple[dict[str, Any], str]], peak: Any) -> Iterator[Change]:
    for number, (settings, cost) in enumerate(chosen):
        yield Change(settings, cost, peak(_apply(config, *(each for each, _ in chosen[: number + 1]))))


def _apply(config: Config, *settings: dict[str, Any]) -> Config:
    """A config with other settings; those that `resolve` derived from the old ones are derived anew."""
    values = {key: value for each in settings for key, value in each.items()}
    if values.get("train.gradient_release"):
        optim = replace(config.optim, grad_clip=None, clip_update=None)
        config = replace(config, optim=optim, train=replace(config.train, accumulation=1, on_nonfinite=STOP))
        values["train.accumulation"] = 1
    return resolve(config.override(values))


def _baseline(config: Config, method: str, vocab_size: int | None, gpu: bool) -> Footprint:
    """The same model and batch by another method, with all gradients, as it is trained elsewhere."""
    train = replace(config.train, gradient_release=False)
    other = Config(model=config.model, quant=QuantConfig(method=method), data=config.data, train=train)
    return Needs(resolve(other), vocab_size).footprint(gpu)


# -- sizes and command lines ---------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes of a size such as "16GB" or "24 GiB"; a bare number counts GB.

    Raises:
        ConfigError: If it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise ConfigError(f"{text!r} is no size: write one like 16GB, or 24GiB")
    return int(float(match[1]) * (_UNITS[match[2].upper()] if match[2] else 1e9))


def device_memory(device: str) -> int:
    """Bytes of a device; of the CPU, what is free now.

    Raises:
        ConfigError: If there is no such device.
    """
    if device == CPU:
        return available_memory()
    if device in DEVICES:
        return DEVICES[device]
    if device[:1].isdigit():
        return parse_size(device)
    raise ConfigError(
        f"unknown device {device!r}; {did_you_mean(device, [CPU, *DEVICES])}, or a size such as 24GB"
    )


def available_memory() -> int:
    """Bytes that the system can give without swapping, within a container's limit where there is one."""
    sizes = []
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        sizes += [int(found[1]) * 1024] if found else []
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        sizes += [int(limit) - int(used)]
    except (OSError, ValueError):
        pass
    if not sizes:  # not Linux
        import os

        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    return min(sizes)


def set_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as `--set` flags of the command line."""
    return [f"--set {key}={_toml(value)}" for key, value in settings.items()]


def _flags(config: Config) -> list[str]:
    """Flags that say which model, method and batch a config has."""
    quant = ["--bits", str(config.quant.bits)] if config.quant.bits else []
    return [
        *(
            ("--from", start)
            if (start := config.model.start_from)
            else ("--preset", str(config.model.preset))
        ),
        *("--method", str(config.quant.method), *quant),
        *("--batch-size", str(config.train.batch_size), "--seq-len", str(config.train.seq_len)),
    ]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f'"{key}" = "{text}"' for key, text in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
