"""llama.cpp in a process of its own: next-token log-probabilities and token ids, from the real program.

`xllamacpp` is llama.cpp's server as a Python package. It answers only with the distribution after a prompt,
so a window of n tokens is n prompts, each one token longer than the last; the server keeps what it has read,
so every prompt costs one token. An answer costs by the tokens that it lists: all 4,096 of a vocabulary 26
times as much as one, so it lists the likeliest and the one asked about. The server may end the process on a
file that it can't digest, hence its own one.

    python -m dqt.export.llama_cpp MODEL.gguf JOB.json RESULT.npz
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dqt.errors import ModelError
from dqt.extras import require

TIMEOUT = 3600
LIKELIEST = 32
"""How many tokens an answer lists."""


def next_log_probs(
    path: Path, windows: Sequence[Sequence[int]], texts: Sequence[str], vocab_size: int
) -> tuple[list[np.ndarray], list[list[int]]]:
    """What llama.cpp makes of a GGUF file.

    Args:
        path: The file.
        windows: Token ids, each window with the token that follows it.
        texts: Texts to tokenize.
        vocab_size: Of the model.

    Returns:
        For each window the log-probabilities after each of its tokens but the last, `float32`
        [tokens, vocab_size]: those of the token that follows and of the `LIKELIEST`, -inf for the others; and
        the token ids of each text.

    Raises:
        ConfigError: If `xllamacpp` is not installed.
        ModelError: If llama.cpp does not load the file.
    """
    require("xllamacpp", "gguf")
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.npz"
        content = {"windows": [list(map(int, w)) for w in windows], "texts": list(texts), "vocab": vocab_size}
        job.write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-m", "dqt.export.llama_cpp", str(path), str(job), str(result)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ModelError(
                f"llama.cpp was not done with {path} in {TIMEOUT} s: verify on fewer tokens"
            ) from None
        if done.returncode or not result.is_file():
            raise ModelError(f"llama.cpp does not run {path}: {_reason(done)}")
        with np.load(result) as arrays:
            found = [arrays[f"window{i}"] for i in range(len(windows))]
            return found, [arrays[f"text{i}"].tolist() for i in range(len(texts))]


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The first line in which llama.cpp says what is wrong, else the last one."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return (errors or lines[::-1] or [f"exit status {done.returncode}"])[0][:300]


# -- in the process ------------------------------------------------------------------------------------------


def start(path: str, context: int, threads: int | None = None) -> Any:
    """llama.cpp's server for a file, one sequence of at most `context` tokens at a time."""
    import xllamacpp

    # Threads wait for each other spinning: with two on two busy cores 2,000 tokens took over 7 minutes, with
    # one 19 s.
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // 2))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = context
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.cache_ram_mib = 0
    parameters.n_threads_http = 1
    parameters.verbosity = 1  # errors
    return xllamacpp.Server(parameters)


def _log_probs(server: Any, window: Sequence[int], vocab_size: int) -> np.ndarray:
    """Log-probabilities after each token but the last, of the token that follows it and of the likeliest.

    The server lists the token that it draws, so it is made to draw the one that follows. That one comes
    without any if it is the end or half of a letter; then an "a" is drawn and all tokens are listed. The
    log-probabilities are those of the model, from before this bias.
    """
    found = np.full((len(window) - 1, vocab_size), -np.inf, dtype=np.float32)
    for i, following in enumerate(window[1:]):
        prompt = window[: i + 1]
        listed = _ask(server, prompt, following, min(LIKELIEST, vocab_size)) or _ask(
            server, prompt, "a", vocab_size
        )
        for token, log_prob in listed.items():
            found[i, token] = log_prob
        if not np.isfinite(found[i, following]):
            raise RuntimeError(f"error: no log-probability of token {following} after {i + 1} tokens")
    return found


def _ask(server: Any, prompt: Sequence[int], drawn: int | str, count: int) -> dict[int, float]:
    """Log-probabilities of the token drawn and of the likeliest, by id; none if the server has no letter."""
    request = {
        "prompt": list(prompt),
        "max_tokens": 1,
        "logprobs": count,
        "n_probs": count,
        "temperature": 0.0,
        "cache_prompt": True,
        "logit_bias": [[drawn, 1000.0]],
    }
    answer = server.handle_completions(request)
    if "choices" not in answer:
        raise RuntimeError(f"error: {answer}")
    listed = (answer["choices"][0]["logprobs"] or {}).get("content")
    if not listed:
        return {}
    return {entry["id"]: entry["logprob"] for entry in (listed[0], *listed[0]["top_logprobs"])}


def _tokenize(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return list(json.load(answer)["tokens"])


def main(path: str, job: str, result: str) -> None:
    """Does a job that `next_log_probs` wrote."""
    content = json.loads(Path(job).read_text(encoding="utf-8"))
    windows, texts = content["windows"], content["texts"]
    server = start(path, max(map(len, windows), default=0) + 8)
    arrays = {f"window{i}": _log_probs(server, window, content["vocab"]) for i, window in enumerate(windows)}
    arrays |= {f"text{i}": np.array(_tokenize(server, text), dtype=np.int64) for i, text in enumerate(texts)}
    with open(result, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
