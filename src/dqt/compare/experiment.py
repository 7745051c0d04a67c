"""A suite from arms to results: tune every arm's learning rate, then run it on every seed.

Everything that can be refused is refused before the first run: settings that make no config, sizes that make
no model, text that can't be read. Final runs go seed by seed through all arms, so that a suite that is
stopped early still has arms to compare. Warm-up is a tenth of a run at the most, so that a recipe made for
20,000 steps learns something in 1,500.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from dqt.baselines import ternarize_
from dqt.compare import pool as pools
from dqt.compare.runs import FAILED, MISSING, Outcome, Run, fingerprint, place, read_outcome
from dqt.compare.suites import QUICK, SUITES, Arm, Suite
from dqt.compare.tuning import MOST_RATES, best_rate, next_rates
from dqt.data.prepare import Corpus, prepare_corpus
from dqt.data.tokenizer import token_byte_lengths
from dqt.errors import ConfigError, DqtError, did_you_mean
from dqt.evaluate import evaluate
from dqt.models import build_config
from dqt.train import storage
from dqt.train.config import Config, required, resolve
from dqt.train.metrics import Console
from dqt.train.rundir import FINISHED
from dqt.train.savedmodel import load_model

TUNING_SHARE = 2
"""How many times shorter the runs are that find the learning rate; their warm-up is as long.

At a quarter of the run and of its warm-up, FP32 of `main` had 3.32 nats at 2.5e-3 and 2.92 at 1.25e-3; after
the whole run 2.046 and 2.060 (one seed): what the short runs saw was 61 steps of warm-up.
"""

TUNING_SEED = 1000
"""No final run has it."""

QUICK_SEEDS, QUICK_RATES = 2, 3

ALWAYS: Mapping[str, Any] = {"train.threads": 1, "train.sample_tokens": 0, "train.keep_checkpoints": 1}
"""What no comparison may set, nor these: `train.seed` and `train.out` are its own."""


@dataclass
class ArmResult:
    """What an arm came to.

    Attributes:
        arm: The arm.
        asked: What the suite and the user say of its config; the rest follows, from the learning rate too.
        config: Of its runs, but for seed, and for learning rate and what follows from it.
        rate: Its learning rate; None while it is not known.
        tuning: Learning rate to outcome of the runs that found it; empty if it was not tuned.
        runs: Seed to the final runs.
        outcomes: Seed to what came of them.
    """

    arm: Arm
    asked: Config
    config: Config
    rate: float | None = None
    tuning: dict[float, Run] = field(default_factory=dict)
    tuning_outcomes: dict[float, Outcome] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        """Seed to loss of the runs that have one."""
        return {seed: each.loss for seed, each in self.outcomes.items() if math.isfinite(each.loss)}

    @property
    def notes(self) -> list[str]:
        """What a reader of its row must know."""
        seeds: dict[str, list[str]] = {}
        for seed, outcome in self.outcomes.items():
            if outcome.state != FINISHED:
                seeds.setdefault(pools.describe(outcome), []).append(str(seed))
        found = [f"seed {', '.join(which)} {what}" for what, which in seeds.items()]
        if self.rate is None and self.tuning_outcomes:
            worst = self.tuning_outcomes[min(self.tuning_outcomes)]
            found.append(f"no learning rate works: {min(self.tuning_outcomes):.3g} {pools.describe(worst)}")
        elif len(self.tuning_outcomes) > 1 and self.rate in (
            min(self.tuning_outcomes),
            max(self.tuning_outcomes),
        ):
            found.append("the best rate is at an end of those tried")
        found += [
            f"lr {rate:.3g} is unknown: its run {pools.describe(outcome)}"
            for rate, outcome in sorted(self.tuning_outcomes.items())
            if outcome.state == FAILED
        ]
        return found


class Experiment:
    """A suite on its way to results.

    Args:
        suite: Which arms.
        folder: Where runs and results go.
        seeds: How many; None is the suite's number.
        tuned: Whether to tune learning rates; None is the suite's choice, and no for a quick run.
        quick: Run a minute to see that it works.
        jobs: Runs at a time.
        settings: "section.key" to value, over everything that the suite says.
        stream: Where to tell how it goes; None is silent.

    Raises:
        DqtError: A setting or text that can't be used.
    """

    def __init__(
        self,
        suite: Suite,
        folder: Path,
        *,
        seeds: int | None = None,
        tuned: bool | None = None,
        quick: bool = False,
        jobs: int = 1,
        settings: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.suite, self.folder, self.quick = suite, folder, quick
        self.seeds = range(seeds or (min(suite.seeds, QUICK_SEEDS) if quick else suite.seeds))
        self.tuned = suite.tuned and not quick if tuned is None else tuned
        self.settings = {**(QUICK if quick else {}), **(settings or {})}
        for key in {*ALWAYS, "train.seed", "train.out"} & self.settings.keys():
            raise ConfigError(
                f"{key} is what a comparison sets itself, the same for all arms: leave it out (--seeds says "
                "how many seeds, --jobs how many runs at a time, --out where)"
            )
        self.interrupted = False
        self.console = Console(stream)
        self.pool = pools.Pool(folder, jobs, self.console, live=stream is not None and stream.isatty())
        self.corpora: dict[Any, Corpus] = {}
        self.results = [self._result(arm) for arm in suite.arms]
        self._titles: dict[Path, str] = {}

    @property
    def name(self) -> str:
        """Of its results: the suite's, and a hash of its arms unless they are the suite's own.

        So that a part of a suite, or other settings, do not replace what the whole one came to.
        """
        name = f"{self.suite.name}-quick" if self.quick else self.suite.name
        if SUITES.get(self.suite.name) == self.suite and self.settings == (QUICK if self.quick else {}):
            return name
        arms = {each.arm.name: fingerprint(each.config) for each in self.results}
        return f"{name}-{hashlib.sha256(storage.to_json(arms).encode()).hexdigest()[:8]}"

    @property
    def trained(self) -> list[ArmResult]:
        """Those of the arms that train models of their own."""
        return [each for each in self.results if each.arm.ternary_inference_of is None]

    def run(self) -> None:
        """Runs everything that has not been run yet; `results` has what came of it, even when interrupted.

        Raises:
            DqtError: Text that can't be used.
        """
        self.prepare()
        try:
            if self.tuned:
                self._tune()
            self._train()
        except KeyboardInterrupt:
            self.interrupted = True
        try:
            for result in self.results:
                if result.arm.ternary_inference_of is not None:
                    self._evaluate(result)
        except KeyboardInterrupt:
            self.interrupted = True

    def prepare(self) -> None:
        """Reads the text of every arm, once, before any process needs it."""
        for result in self.trained:
            spec = result.config.data
            if spec not in self.corpora:
                self.corpora[spec] = prepare_corpus(spec, None, self.console.say)
            self.corpora[spec].require_length(required(result.config.train.seq_len))
        first = self.trained[0]
        for result in self.trained[1:]:
            if self.corpora[result.config.data].hash != self.corpora[first.config.data].hash:
                raise ConfigError(
                    f"arms {first.arm.name!r} and {result.arm.name!r} have other tokens, so their losses in "
                    "nats a token can't be compared: give all the same text and vocabulary (section [data])"
                )

    def expected_seconds(self) -> float:
        """About how long it takes on `jobs` cores of the machine of docs/results.md, from the start."""
        rates = (
            (QUICK_RATES if self.quick else 3.5) if self.tuned else 0
        )  # about every second grid is extended
        finals = {fingerprint(each.config): each.config for each in self.trained}
        shorter = [self._shortened(each) for each in self.trained]
        tuning = {fingerprint(config): config for config in shorter}
        total = len(self.seeds) * sum(map(pools.expected_seconds, finals.values()))
        return (total + rates * sum(map(pools.expected_seconds, tuning.values()))) / self.pool.jobs

    def final_seconds(self) -> float:
        """Expected of the final runs that have not come to an end, at the rates that are best so far."""
        seconds = 0.0
        for result in self.trained:
            rate = best_rate(_losses(result.tuning_outcomes)) or required(result.config.optim.lr)
            for run in self._final_runs(result, rate).values():
                if not read_outcome(run).settled:
                    seconds += pools.expected_seconds(run.config)
        return seconds

    # -- configs ---------------------------------------------------------------------------------------------

    def _result(self, arm: Arm) -> ArmResult:
        names = {each.name: each for each in self.suite.arms}
        asked = self._asked(names[arm.ternary_inference_of or arm.name])
        return ArmResult(arm, asked, resolved(asked))

    def _asked(self, arm: Arm) -> Config:
        """The arm's config before anything else is filled in."""
        values = {**self.suite.settings, **arm.settings, **self.settings, **ALWAYS}
        try:
            config = Config().override(values)
            if config.model.start_from is not None:
                raise ConfigError(
                    "comparisons train new models: leave model.start_from out, and compare runs of dqt train "
                    "--from by their reports"
                )
            model = resolve(config).model
            build_config(required(model.preset), required(model.arch), overrides=model.overrides)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from error
        return config

    def _shortened(self, result: ArmResult, rate: float | None = None) -> Config:
        """The config of the runs that find the learning rate; None is the recipe's."""
        config = result.config
        full, warmup = required(config.train.steps), required(config.optim.warmup_steps)
        steps = min(full, result.arm.tuning_steps or max(1, full // TUNING_SHARE))
        values = {
            "train.steps": steps,
            "train.eval_every": steps,
            "train.checkpoint_every": steps,
            "train.log_every": max(1, steps // 500),
            "train.seed": TUNING_SEED,
            "optim.lr": rate,
            "optim.warmup_steps": min(warmup, steps // 2),
        }
        return resolved(result.asked.override(values))

    def _place(self, config: Config, title: str) -> Run:
        run = place(config, self.folder / "runs", self.corpora[config.data].hash)
        self._titles.setdefault(run.directory.path, title)
        return run

    # -- phases ----------------------------------------------------------------------------------------------

    def _tune(self) -> None:
        """Rounds of runs until every arm's best rate is known."""
        most = QUICK_RATES if self.quick else MOST_RATES
        while True:
            for result in self.trained:
                for rate in self._wanted(result, most):
                    config = self._shortened(result, rate)
                    result.tuning[rate] = self._place(config, f"{result.arm.name}, lr {rate:.3g}, tuning")
            runs = [
                run
                for result in self.trained
                for rate, run in result.tuning.items()
                if rate not in result.tuning_outcomes
            ]
            if not runs:
                break
            self.pool.run(runs, self._titles, later=self.final_seconds())
            for result in self.trained:
                for rate, run in result.tuning.items():
                    result.tuning_outcomes[rate] = self.pool.outcomes[run.directory.path]
        for result in self.trained:
            result.rate = best_rate(_losses(result.tuning_outcomes))

    def _wanted(self, result: ArmResult, most: int) -> list[float]:
        center = result.config.optim.lr
        assert center is not None
        return next_rates(center, _losses(result.tuning_outcomes), most)

    def _train(self) -> None:
        """The final runs, seed by seed."""
        for result in self.trained:
            if not self.tuned:
                result.rate = result.config.optim.lr
            if result.rate is not None:
                result.runs = self._final_runs(result, result.rate)
        try:
            runs = [each.runs[seed] for seed in self.seeds for each in self.trained if seed in each.runs]
            self.pool.run(runs, self._titles)
        finally:
            for result in self.trained:
                for seed, run in result.runs.items():
                    result.outcomes[seed] = self.pool.outcomes.get(run.directory.path, Outcome(MISSING))

    def _final_runs(self, result: ArmResult, rate: float) -> dict[int, Run]:
        """Seed to the arm's final run at a learning rate."""
        runs = {}
        for seed in self.seeds:
            config = resolved(result.asked.override({"optim.lr": rate, "train.seed": seed}))
            runs[seed] = self._place(config, f"{result.arm.name}, lr {rate:.3g}, seed {seed}")
        return runs

    def _evaluate(self, result: ArmResult) -> None:
        """Measures the finished models of another arm with ternary weights."""
        of = next(each for each in self.results if each.arm.name == result.arm.ternary_inference_of)
        result.rate = of.rate
        for seed, run in of.runs.items():
            outcome = of.outcomes[seed]
            if outcome.state == FINISHED:
                try:
                    found = ternary_loss(run, self.corpora[run.config.data])
                    outcome = Outcome(FINISHED, outcome.step, summary={**outcome.summary, **found})
                except (DqtError, OSError) as error:
                    outcome = Outcome(FAILED, outcome.step, str(error).replace("\n", " "))
            result.runs[seed], result.outcomes[seed] = run, outcome


def resolved(asked: Config) -> Config:
    """A config with everything filled in, for a run of a comparison: one evaluation, a short warm-up."""
    config = resolve(asked)
    steps = required(config.train.steps)
    warmup = asked.optim.warmup_steps
    if warmup is None:
        warmup = min(required(config.optim.warmup_steps), steps // 10)
    every = asked.train.eval_every or steps
    return config.override({"optim.warmup_steps": warmup, "train.eval_every": every})


def ternary_loss(run: Run, corpus: Corpus) -> dict[str, float]:
    """`val_loss` and `val_bpb` of a finished model with its linear weights made ternary; measured once."""
    kept = run.directory.path / "ternary.json"
    manifest = hashlib.sha256((run.directory.model / storage.MANIFEST).read_bytes()).hexdigest()
    if (
        kept.is_file()
        and (content := storage.load_json(kept)).get("model") == manifest
        and "val_bpb" in content
    ):
        return {name: float(content[name]) for name in ("val_loss", "val_bpb")}
    model, tokenizer, _ = load_model(run.directory.path)
    ternarize_(model)
    train = run.config.train
    found = evaluate(
        model,
        corpus.val,
        required(train.seq_len),
        train.eval_windows,
        token_bytes=token_byte_lengths(tokenizer),
        batch_size=required(train.batch_size),
    )
    losses = {"val_loss": found.loss, "val_bpb": found.bits_per_byte}
    storage.write_text(kept, storage.to_json({"model": manifest, **losses}))
    return losses


def select(suite: Suite, patterns: list[str]) -> Suite:
    """The suite with those of its arms that a pattern names, and those whose models they measure.

    What they are measured against comes only if it is named too.

    Raises:
        ConfigError: If a pattern names none.
    """
    names = [arm.name for arm in suite.arms]
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ConfigError(f"no arm of {suite.name} is {pattern!r}; {did_you_mean(pattern, names)}")
        chosen.update(found)
    for arm in suite.arms:
        if arm.name in chosen and arm.ternary_inference_of is not None:
            chosen.add(arm.ternary_inference_of)
    return replace(suite, arms=tuple(arm for arm in suite.arms if arm.name in chosen))


def _losses(outcomes: Mapping[float, Outcome]) -> dict[float, float]:
    return {rate: outcome.loss for rate, outcome in outcomes.items()}
