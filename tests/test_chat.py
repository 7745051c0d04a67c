"""Conversations: which tokens are learnt, one sample each, bad lines by their number, runs that resume."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dqt.cli import main
from dqt.data.chat import BEGIN, DEFAULT_TEMPLATE, encode_conversations, read_conversations, segments
from dqt.data.prepare import Corpus, prepare_corpus
from dqt.data.sampler import IGNORED, ConversationSampler
from dqt.data.spec import DataSpec
from dqt.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from dqt.errors import ConfigError, DataError
from dqt.evaluate import evaluate
from dqt.models import build_config, build_model
from dqt.train.config import Config
from dqt.train.loop import TrainResult, train
from dqt.train.losses import language_model_loss
from dqt.train.savedmodel import load_model
from train_helpers import assert_same_tensors, metrics_of, without_times

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETS = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of user and assistant, in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def lines(count: int) -> list[str]:
    """As many conversations, of three lengths and both forms."""
    return [
        json.dumps({"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."})
        if i % 3
        else json.dumps({"messages": turns(f"Count {i} times.", "one " * (i % 7 + 1), "Again?", "No.")})
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    trained = train_tokenizer(["What is it? Count times. It is one two no again. " * 9], 300)
    trained.core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return TextTokenizer(trained.core, "<|im_end|>", chat_template=CHATML)


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(lines(40)) + "\n")
    return path


# -- what is learnt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, None])
def test_answers_alone_are_learnt(tokenizer: TextTokenizer, template: str | None) -> None:
    tokenizer = TextTokenizer(tokenizer.core, "<|im_end|>", chat_template=template)
    found = segments(turns("Hi", "Hello", "Bye", "Yes"), tokenizer)
    assert [text for text, learnt in found if learnt] == ["Hello<|im_end|>\n", "Yes<|im_end|>\n"]
    asked = "".join(text for text, learnt in found if not learnt)
    assert "Hi" in asked
    assert "Hello" not in asked
    assert found[0][0].endswith("assistant\n" if template else "<|assistant|>\n")


def test_a_template_that_forgets_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match="answers can't be told apart"):
        segments(turns("a", "b"), TextTokenizer(tokenizer.core, "<|im_end|>", chat_template=FORGETS))


def corpus_of(chat: Path, tokenizer: TextTokenizer, **spec: Any) -> Corpus:
    return prepare_corpus(DataSpec(chat=(str(chat),), **spec), chat.parent / "cache", tokenizer=tokenizer)


def test_the_mask_survives_the_shards(chat: Path, tokenizer: TextTokenizer) -> None:
    corpus = corpus_of(chat, tokenizer, val_fraction=0.2)
    assert corpus.train.marks is not None
    sampler = ConversationSampler(corpus.train.marks, 200, seed=0)
    core, texts = load_tokenizer(corpus.tokenizer_dir).core, set()
    for sample in range(sampler.windows):
        tokens, targets = sampler.batch(corpus.train, sample, 1)
        whole = core.decode(tokens[0].tolist(), skip_special_tokens=False)
        answers = core.decode(targets[targets != IGNORED].tolist(), skip_special_tokens=False)
        texts.add(whole)
        assert whole.startswith("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n")
        expected = [part.split("<|im_end|>")[0] for part in whole.split("<|im_start|>assistant\n")[1:]]
        assert answers == "".join(f"{answer}<|im_end|>\n" for answer in expected)
        assert torch.equal(targets[targets != IGNORED], tokens[:, 1:][targets != IGNORED])
    held_out = corpus.manifest["splits"]["val"]["documents"]
    assert len(texts) == sampler.windows == 40 - held_out
    assert 4 <= held_out <= 8


def test_an_empty_question_begins_a_conversation_too(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text('{"prompt": "", "completion": "It is."}\n' * 3)
    bare = TextTokenizer(
        tokenizer.core, "<|im_end|>", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    ((_, marks),) = encode_conversations(bare, read_conversations([path]).documents)
    assert np.count_nonzero(marks & BEGIN) == 3


def test_a_batch_is_as_long_as_its_longest(chat: Path, tokenizer: TextTokenizer) -> None:
    corpus = corpus_of(chat, tokenizer)
    assert corpus.train.marks is not None
    sampler = ConversationSampler(corpus.train.marks, 200, seed=1)
    together, targets = sampler.batch(corpus.train, 0, 4)
    alone = [sampler.batch(corpus.train, i, 1) for i in range(4)]
    assert together.shape[1] == max(tokens.shape[1] for tokens, _ in alone)
    for row, (tokens, wanted) in enumerate(alone):
        size = tokens.shape[1]
        assert torch.equal(together[row, :size], tokens[0])
        assert torch.equal(targets[row, : size - 1], wanted[0])
        assert (targets[row, size - 1 :] == IGNORED).all()
    epochs = [
        [sampler.window(epoch * sampler.windows + i) for i in range(sampler.windows)] for epoch in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(sampler.windows))
    assert epochs[0] != epochs[1]


def test_long_conversations_are_cut_and_hopeless_ones_left_out(chat: Path, tokenizer: TextTokenizer) -> None:
    marks = corpus_of(chat, tokenizer).train.marks
    assert marks is not None
    whole, short = (ConversationSampler(marks, seq_len, seed=0) for seq_len in (200, 45))
    assert max(short.ends - short.starts) <= 46
    assert (whole.cut, whole.left_out) == (0, 0)
    assert 0 < short.left_out == whole.windows - short.windows
    assert 0 < short.cut == sum(whole.ends - whole.starts > 46) - short.left_out
    with pytest.raises(DataError, match="no conversation has an answer within 5 tokens"):
        ConversationSampler(marks, 5, seed=0)


def test_the_loss_is_that_of_the_answers(chat: Path, tokenizer: TextTokenizer) -> None:
    corpus = corpus_of(chat, tokenizer)
    model = build_model(build_config("micro", vocab_size=tokenizer.vocab_size, seq_len=256), seed=0).eval()
    assert corpus.val.marks is not None
    sampler = ConversationSampler(corpus.val.marks, 200, seed=0)
    tokens, targets = sampler.rows(corpus.val, range(sampler.windows))
    logits = model(input_ids=tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
    torch.testing.assert_close(language_model_loss(model, tokens, targets), expected)
    measured = evaluate(model, corpus.val, 200, token_bytes=corpus.token_bytes, batch_size=2)
    assert measured.loss == pytest.approx(expected.item(), abs=1e-5)
    assert measured.tokens == int((targets != IGNORED).sum())
    answers = "".join(
        load_tokenizer(corpus.tokenizer_dir).core.decode_batch([r[r >= 0].tolist() for r in targets])
    )
    assert measured.bytes == len(answers.encode())


# -- runs ----------------------------------------------------------------------------------------------------


def run(chat: Path, out: Path, resume: str | None = None, stream: Any = None, **values: Any) -> TrainResult:
    settings = {
        "model.preset": "micro",
        "model.num_hidden_layers": 1,
        "data.chat": [str(chat)],
        "data.vocab_size": 300,
        "train.steps": 6,
        "train.seq_len": 96,
        "train.batch_size": 2,
        "train.accumulation": 2,
        "train.checkpoint_every": 3,
        "train.sample_tokens": 3,
        "train.threads": 1,
        "train.out": str(out),
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return train(Config().override(settings), resume=resume, cache_dir=out.parent / "cache", stream=stream)


def test_resume_gives_the_same_bits(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(chat, tmp_path / "whole")
    run(chat, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000006")
    parts = run(chat, tmp_path / "parts", resume="auto")
    assert_same_tensors(*(each.directory.path / "model/model.safetensors" for each in (whole, parts)))
    assert without_times(metrics_of(whole.directory.path)) == without_times(metrics_of(parts.directory.path))
    assert load_model(whole.directory.path)[1].chat_template == DEFAULT_TEMPLATE
    assert whole.prompt.endswith("<|assistant|>\n")
    assert main(["eval", str(whole.directory.path)]) == 0
    assert f"{whole.evaluation.loss:.4f} nats" in capsys.readouterr().out


def test_an_update_weighs_every_answer_token_the_same(chat: Path, tmp_path: Path) -> None:
    """Two passes of two conversations are one pass of four, whatever their lengths."""
    settings = {"quant__method": "fp32", "train__steps": 1, "train__sample_tokens": 0, "train__seq_len": 60}
    said = io.StringIO()
    first = run(chat, tmp_path / "a", stream=said, train__batch_size=2, train__accumulation=2, **settings)
    assert re.search(r"train.seq_len = 60 cuts \d+ conversations, and leaves out \d+ that", said.getvalue())
    second = run(chat, tmp_path / "b", train__batch_size=4, train__accumulation=1, **settings)
    losses = [
        next(line["loss"] for line in metrics_of(r.directory.path) if "loss" in line) for r in (first, second)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert first.evaluation.loss == pytest.approx(second.evaluation.loss, abs=1e-4)


# -- what it refuses -----------------------------------------------------------------------------------------

BAD = [
    ("{", "line 2 is no JSON"),
    ("[1]", "line 2 is no JSON object"),
    ('{"text": "a"}', "line 2 has 'text': it needs \"messages\""),
    ('{"prompt": "a"}', "line 2 has 'prompt'"),
    ('{"prompt": "a", "completion": 3}', "line 2: the content of a message of 'assistant' is no text"),
    ('{"prompt": "a", "completion": "half \\ud83d"}', "message of 'assistant' has half a character"),
    ('{"messages": "a"}', "line 2: messages is no list"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "line 2 has a message with the role 'bot'"),
    ('{"messages": [{"role": "user", "content": "a"}]}', 'line 2 needs a message of "user"'),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', 'line 2 needs a message of "user"'),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(f"{lines(2)[1]}\n{line}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl") as caught:
        read_conversations([tmp_path / "bad.jsonl"])
    assert message in str(caught.value)


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d"
    line = json.dumps({"prompt": text, "completion": text}, ensure_ascii=False)
    path = tmp_path / "talks.jsonl"
    path.write_bytes(f"{line}\r\n\r\n{line}\n".encode())
    found = read_conversations([path])
    assert [each.name for each in found.documents] == ["talks.jsonl:1", "talks.jsonl:3"]
    assert [json.loads(each.text) for each in found.documents] == [turns(text, text)] * 2


def test_other_refusals(tmp_path: Path, chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.jsonl").write_text(lines(1)[0])
    with pytest.raises(DataError, match="one conversation cannot be split"):
        prepare_corpus(DataSpec(chat=(str(tmp_path / "one.jsonl"),)), tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data.text and data.chat both say"):
        DataSpec(text=("a",), chat=("b",))
    assert main(["train", "--chat", str(chat), "--text", str(chat)]) == 2
    assert "--text and --chat both say what to train on" in capsys.readouterr().err
    assert main(["train", "--chat", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


def test_damaged_marks_are_noticed(chat: Path, tokenizer: TextTokenizer) -> None:
    corpus = corpus_of(chat, tokenizer)
    path = corpus.directory / "train-marks.bin"
    marks = np.fromfile(path, dtype=np.uint8)
    marks[20] ^= 1
    marks.tofile(path)
    with pytest.raises(DataError, match=r"train-marks\.bin was altered"):
        Corpus.open(corpus.directory)
