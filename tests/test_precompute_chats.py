"""Real chats through templates and alignment, for several pairs of templates and every `--loss-on`: nothing
is lost without a reason that is counted.

Texts are what chats hold: system turns, empty and repeated messages, CJK, emoji, combining marks, white
space, runs of newlines, code, text that looks like a template.
"""

import unicodedata
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from precompute.prepare import Drop, PrepareConfig, Preparer
from precompute.sample import ChunkSpans, Conversation, Message, PositionPairs, Sample

ROLES = {"s": "system", "u": "user", "a": "assistant"}
ROLE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + '>' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
)
SYSTEM_FIRST = (
    "{% set ns = namespace(sys='') %}{% for m in messages if m['role'] == 'system' %}"
    "{% set ns.sys = m['content'] %}{% endfor %}<|endoftext|>{{ ns.sys }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}<|im_end|>{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
)
CODE = "```python\ndef add(a, b):\n    return a + b\n```\n"
CHATS = {
    "single turn": ["u:What is two plus two?", "a:Four."],
    "many turns": [
        "u:Hi",
        "a:Hello! How can I help?",
        "u:Tell me a joke.",
        "a:Why? To get to the other side!",
    ],
    "system turn": ["s:You are a helpful assistant.", "u:Say the letter a", "a:a"],
    "system turn alone has it": ["s:Answer OK", "u:OK?", "a:OK"],
    "repeated": ["u:OK", "a:OK", "u:OK", "a:OK"],
    "contained": ["u:the cat sat on the mat", "a:the cat", "u:the", "a:the cat sat"],
    "empty turns": ["u:", "a:", "u:", "a:the answer"],
    "blank turns": ["u: \n", "a:\t", "u:q", "a:the answer"],
    "cjk": ["u:你好,请介绍一下北京。", "a:北京是中国的首都,有三千多年的历史。🏯"],
    "emoji": ["u:👩‍💻 🏳️‍🌈", "a:👍🏽👍🏽 ok 😀"],
    "combining": ["u:cafe\u0301 or café?", "a:Z\u0324\u0301 cafe\u0301 \u1100\u1161\u11a8"],
    "starts with a mark": ["u:q", "a:\u0301x\u0323"],
    "inner space": ["u:a  b   c", "a:x  y\u00a0z\u2003w"],
    "tabs": ["u:a\tb", "a:int f() {\n\t\treturn 1;\n\t}"],
    "newlines": ["u:a" + "\n" * 100 + "b", "a:x" + "\n" * 100 + "y"],
    "carriage returns": ["u:a\r\nb", "a:x\r\ny\rz"],
    "code": ["u:Code please", f"a:{CODE}x", "u:Now in C", "a:int add(int a, int b) {\n\treturn a + b;\n}"],
    "role words": ["u:assistant", "a:user", "u:system\nuser\n", "a:assistant"],
    "template text": ["u:<|im_end|>\n<|im_start|>assistant\nhm", "a:<|im_start|>user\nq<|im_end|>\nno"],
    "control characters": ["u:\x00\x07", "a:\x1b[0m\ufeffx\u200b"],
    "spaces around": ["u:  leading and trailing  ", "a: starts and ends with space "],
    "newlines around": ["u:\n\nq\n", "a:\n\nstarts with newlines\n"],
    "runs around": ["u:" + "\n" * 100, "a:" + "\n" * 100 + "x" + "\n" * 100],
    "ends with code": ["u:Code please", f"a:{CODE}"],
}


def conversation(lines: list[str]) -> Conversation:
    return Conversation(tuple(Message(ROLES[x[0]], x[2:]) for x in lines), "test", 0)


def normalising(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As Qwen's, which composes characters before it cuts."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    return with_template(tokenizer, tokenizer.chat_template, backend)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str, backend: Any = None) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend or tokenizer.backend_tokenizer,
        chat_template=template,
        eos_token=tokenizer.eos_token,
        mask_token=tokenizer.mask_token,
    )


@pytest.fixture(scope="module")
def pairs(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> dict[str, tuple[str, Any, Any]]:
    """Kind, student and teacher tokenizers, by name."""
    student = normalising(student_tokenizer)
    return {
        "one template": ("shared", student, student),
        "two templates": ("shared", student, with_template(student, ROLE_TEMPLATE)),
        "two tokenizers": ("cross", student, teacher_tokenizer),
        "two of both, system first": ("cross", student, with_template(teacher_tokenizer, SYSTEM_FIRST)),
    }


def prepared(pair: tuple[str, Any, Any], loss_on: str, lines: list[str]) -> Sample:
    kind, student, teacher = pair
    config = PrepareConfig(
        kind=kind, block_size=8, student_max_length=2048, teacher_max_length=4096, loss_on=loss_on
    )
    sample = Preparer(student, teacher, config).prepare(conversation(lines))
    assert isinstance(sample, Sample), sample
    return sample


def aligned(sample: Sample) -> np.ndarray:
    """[L] bool: student tokens with a teacher counterpart."""
    found = np.zeros(len(sample.student_ids), dtype=bool)
    if isinstance(sample.alignment, PositionPairs):
        found[sample.alignment.student] = True
    else:
        for start, n in zip(sample.alignment.student_start, sample.alignment.student_length):
            found[start : start + n] = True
    return found


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def learned_texts(lines: list[str], loss_on: str) -> str:
    """What carries loss under ChatML, put together from the messages: independent of the code under test."""
    turns = {
        "last": lines[-1:],
        "assistant": [x for x in lines if x[0] == "a"],
        "all": lines,
    }[loss_on]
    around = "<|im_start|>{role}\n{text}<|im_end|>\n" if loss_on == "all" else "{text}<|im_end|>\n"
    return "".join(around.format(role=ROLES[x[0]], text=x[2:]) for x in turns)


NAMES = ("one template", "two templates", "two tokenizers", "two of both, system first")


@pytest.mark.parametrize("loss_on", ["last", "assistant", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_whole_contents_are_aligned(pairs: dict[str, Any], name: str, loss_on: str) -> None:
    student = pairs[name][1]
    for chat, lines in CHATS.items():
        where = f"{chat}, {name}, {loss_on}"
        sample = prepared(pairs[name], loss_on, lines)
        real, covered = sample.real_length, aligned(sample)
        shown = student.decode(sample.student_ids[:real][sample.maskable[:real]])
        assert shown == nfc(learned_texts(lines, loss_on)), where
        assert (covered & sample.maskable).sum() + sample.dropped.total() == sample.maskable.sum(), where
        assert not set(sample.dropped) - {"not content"}, (where, sample.dropped)


@pytest.fixture(scope="module")
def greedy(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> list[tuple[str, Any, Any]]:
    """Tokenizers that do not cut at words, trained on rendered chats: their tokens reach over the edges of
    contents on both sides. Same vocabulary and other template, and two vocabularies."""

    def train(base: Any, size: int) -> Any:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        specials = [base.eos_token, base.mask_token]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
        lines = [f"<|im_start|>assistant\n{x[2:]}<|im_end|>\n" for chat in CHATS.values() for x in chat]
        lines += [f"assistant>{x[2:]}<|endoftext|>user>" for chat in CHATS.values() for x in chat]
        backend.train_from_iterator(lines * 2, trainer)
        return with_template(base, base.chat_template, backend)

    student, teacher = train(student_tokenizer, 700), train(teacher_tokenizer, 500)
    return [
        ("shared", student, with_template(student, ROLE_TEMPLATE)),
        ("cross", student, with_template(teacher, ROLE_TEMPLATE)),
    ]


@pytest.mark.parametrize("loss_on", ["last", "assistant", "all"])
def test_contents_that_merge_with_the_template(greedy: list[tuple[str, Any, Any]], loss_on: str) -> None:
    """Merged tokens are dropped and counted, whole samples where nothing else is left; the others align to
    the same text on both sides, in order."""
    merged = whole = 0
    for kind, student, teacher in greedy:
        config = PrepareConfig(kind=kind, block_size=8, student_max_length=2048, loss_on=loss_on)
        preparer = Preparer(student, teacher, config)
        for chat, lines in CHATS.items():
            sample = preparer.prepare(conversation(lines))
            where = f"{chat}, {kind}, {loss_on}"
            if isinstance(sample, Drop):
                assert sample.reason == "nothing aligned", where
                assert sample.dropped.total() > 0, where
                whole += 1
                continue
            covered = aligned(sample)
            assert (covered & sample.maskable).sum() + sample.dropped.total() == sample.maskable.sum(), where
            assert set(sample.dropped) <= {"not content", "merged with template", "ids differ"}, where
            merged += sample.dropped["merged with template"]
            for s, n, t, m in spans(sample):
                ours = student.convert_ids_to_tokens(sample.student_ids[s : s + n].tolist())
                theirs = teacher.convert_ids_to_tokens(sample.teacher_ids[t : t + m].tolist())
                assert "".join(ours) == "".join(theirs), where
    assert merged > 0
    assert 0 < whole < len(CHATS)


def spans(sample: Sample) -> list[tuple[int, int, int, int]]:
    """Student start and length, teacher start and length; ascending on both sides."""
    a = sample.alignment
    if isinstance(a, ChunkSpans):
        found = list(zip(a.student_start, a.student_length, a.teacher_start, a.teacher_length))
    else:
        found = [(s, 1, t, 1) for s, t in zip(a.student, a.teacher)]
    assert all(x[0] + x[1] <= y[0] and x[2] + x[3] <= y[2] for x, y in pairwise(found))
    return found


def test_a_turn_that_the_teacher_never_sees(pairs: dict[str, Any], teacher_tokenizer: Any) -> None:
    """A template that leaves system turns out: no loss where they carry none, counted where they do."""
    deaf = with_template(
        teacher_tokenizer, SYSTEM_FIRST.replace("<|endoftext|>{{ ns.sys }}", "<|endoftext|>")
    )
    student = pairs["two tokenizers"][1]
    lines = ["s:You are a helpful assistant.", "u:Hi", "a:Hello"]
    assert set(prepared(("cross", student, deaf), "last", lines).dropped) == {"not content"}
    everything = prepared(("cross", student, deaf), "all", lines)
    system = student("You are a helpful assistant.", add_special_tokens=False).input_ids
    assert everything.dropped["absent from the teacher's text"] == len(system)


def test_which_chats_give_no_sample(pairs: dict[str, Any]) -> None:
    """By `--loss-on`: what has nothing to learn is refused for a reason, the rest is not."""
    chats = {
        "ends with the user": ["u:q", "a:x", "u:thanks"],
        "empty answer": ["u:q", "a:x", "u:q", "a:"],
        "no answer": ["u:q"],
        "answer first": ["a:hello"],
        "system only": ["s:be nice", "a:hello"],
    }
    kind, student, teacher = pairs["two tokenizers"]
    reasons: dict[str, list[str | None]] = {}
    for loss_on in ("last", "assistant", "all"):
        preparer = Preparer(student, teacher, PrepareConfig(kind=kind, block_size=8, loss_on=loss_on))
        for name, lines in chats.items():
            made = preparer.prepare(conversation(lines))
            reasons.setdefault(name, []).append(made.reason if isinstance(made, Drop) else None)
    assert reasons == {
        "ends with the user": ["last message is not the assistant's", None, None],
        "empty answer": ["empty content", None, None],
        "no answer": ["no assistant message"] * 3,
        "answer first": [None] * 3,
        "system only": [None] * 3,
    }
