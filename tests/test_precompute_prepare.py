"""From text to aligned samples: token edges, alignment of random text, truncation, filling, loss spans,
held-out split."""

import dataclasses
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from precompute.prepare import (
    Drop,
    PrepareConfig,
    Preparer,
    sample_id_of,
    split_of,
)
from precompute.sample import ChunkSpans, Conversation, Message, PositionPairs, Sample
from precompute.tokens import EdgeTokenizer, byte_offsets, edges_from_offsets, infer_kind, shared_vocab_size
from shards.align import Region, align_chunks, outer_spans
from shards.errors import UsageError

EOS, TURN_END, NEWLINE = 292, 292, 198


def chat(*contents: str, group: str | None = None, index: int = 0) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], c) for i, c in enumerate(contents))
    return Conversation(messages, "test", index, group)


def with_normalizer(tokenizer: PreTrainedTokenizerFast, normalizer: object) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        eos_token=tokenizer.eos_token,
        mask_token=tokenizer.mask_token,
    )


def as_shared(
    tokenizer: PreTrainedTokenizerFast, template: str, mask: str = "<|tmask|>"
) -> PreTrainedTokenizerFast:
    """The student's tokenizer as a teacher's: another template, another mask token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=template,
        eos_token=tokenizer.eos_token,
        mask_token=mask,
    )


@pytest.fixture(scope="module")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer with byte fallback: several tokens may share one character."""
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "</s>", *fallback], show_progress=False, limit_alphabet=40
    )
    backend.train_from_iterator(["the cat sat on the mat and read the newest news there"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        chat_template="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )


def made(preparer: Preparer, conversation: Conversation) -> Sample:
    sample = preparer.prepare(conversation)
    assert isinstance(sample, Sample), sample
    return sample


TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
NFC_TEXT = st.text(st.sampled_from("ae oA\u0301\u0308\u0323é한\u1100\u1161\u11a8क़\u0f73<>n\n"), max_size=20)


@settings(deadline=None)  # the first call reads the whole Unicode table
@given(text=TEXT | NFC_TEXT)
def test_byte_level_tokens_cover_random_text(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    """Chunks of two tokenizers are disjoint, ordered, cover all bytes, and decode to the same text on both
    sides."""
    raw = text.encode()
    sides = [EdgeTokenizer(t).encode(text) for t in (student_tokenizer, teacher_tokenizer)]
    found = align_chunks(sides[0].edges, sides[1].edges, [Region(0, 0, len(raw))])
    for side, tokenizer, (a, b) in zip(sides, (student_tokenizer, teacher_tokenizer), ((0, 1), (2, 3))):
        assert side.edges[0] == 0
        assert side.edges[-1] == len(raw)
        spans = found.spans[:, [a, b]].tolist()
        assert all(x[1] == y[0] for x, y in pairwise(spans))
        assert not text or (spans[0][0], spans[-1][1]) == (0, len(side.ids))
        whole = b"".join(raw[side.edges[x] : side.edges[y]] for x, y in spans)
        assert whole == raw
        for x, y in spans:
            piece = raw[side.edges[x] : side.edges[y]]
            shown = tokenizer.decode(side.ids[x:y], clean_up_tokenization_spaces=False)
            assert shown == piece.decode("utf-8", "replace")


@settings(deadline=None)
@given(text=NFC_TEXT | TEXT)
def test_normalised_tokens_stay_on_original_bytes(
    student_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    """With an NFC normaliser every token's outer span normalises to a text that contains what the token
    decodes to, and unknown edges occur only where normalisation changed something."""
    tokenizer = with_normalizer(student_tokenizer, normalizers.NFC())
    normal = normalizers.NFC().normalize_str
    tokens = EdgeTokenizer(tokenizer).encode(text)
    raw = text.encode()
    assert tokens.edges[0] == 0
    assert tokens.edges[-1] == len(raw)
    known = tokens.edges[tokens.edges >= 0]
    assert (np.diff(known) >= 0).all()
    if normal(text) == text:
        assert len(known) == len(tokens.edges)
    cut = np.flatnonzero(tokens.edges >= 0)
    for a, b in pairwise(cut):
        try:
            piece = raw[tokens.edges[a] : tokens.edges[b]].decode()
        except UnicodeDecodeError:
            continue  # a part of a character
        shown = tokenizer.decode(tokens.ids[a:b], clean_up_tokenization_spaces=False)
        assert shown == normal(piece)


def test_edges_around_special_tokens_and_changed_characters(
    student_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Special tokens are cut out before normalisation: a combining mark after one composes with nothing."""
    tokenizer = EdgeTokenizer(with_normalizer(student_tokenizer, normalizers.NFC()))
    text = "e<|im_end|>\u0301e\u0301<|im_end|>"
    tokens = tokenizer.encode(text)
    at = byte_offsets(text)
    special = np.flatnonzero(tokens.ids == TURN_END)
    assert tokens.edges[special].tolist() == [1, at[-1] - 10]
    assert tokens.edges[special + 1].tolist() == [11, at[-1]]
    start, end = outer_spans(tokens.edges)
    inside = np.flatnonzero((start >= 13) & (end <= at[-1] - 10))
    assert (tokens.edges[inside[1:]] == -1).all(), "no edge inside the composed character"
    assert end[inside[0]] == at[-1] - 10


def test_edges_from_offsets() -> None:
    # "a€ b": the euro sign in three tokens, the space in none.
    assert edges_from_offsets("a€ b", [(0, 1), (1, 2), (1, 2), (1, 2), (3, 4)]).tolist() == [
        0,
        1,
        -1,
        -1,
        4,
        6,
    ]
    assert edges_from_offsets("ab ", [(0, 1), (1, 2)]).tolist() == [0, 1, 3]
    assert edges_from_offsets("", []).tolist() == [0]


def test_tokenizer_that_is_not_byte_level(
    metaspace_tokenizer: PreTrainedTokenizerFast, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Byte-fallback tokens of one character share it; chunks stay on whole characters there and cover the
    text."""
    text = "the cat 東 sat é there"
    tokens = EdgeTokenizer(metaspace_tokenizer).encode(text)
    assert (tokens.edges == -1).sum() >= 3
    student = EdgeTokenizer(student_tokenizer).encode(text)
    found = align_chunks(student.edges, tokens.edges, [Region(0, 0, len(text.encode()))])
    assert len(found.spans) >= 5
    assert found.spans[-1, [1, 3]].tolist() == [len(student.ids), len(tokens.ids)]
    for s0, s1, t0, t1 in found.spans:
        left = student_tokenizer.decode(student.ids[s0:s1], clean_up_tokenization_spaces=False)
        right = metaspace_tokenizer.decode(tokens.ids[t0:t1], clean_up_tokenization_spaces=False)
        assert left.strip() == right.strip()


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(UsageError, match="no fast backend"):
        EdgeTokenizer(object())


def shared(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Preparer:
    return Preparer(tokenizer, None, PrepareConfig(kind="shared", block_size=8, **options))


def test_filling_and_identity(student_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = made(shared(student_tokenizer), chat("hi there", "no é 😀"))
    assert len(sample.student_ids) % 8 == 0
    assert 0 < len(sample.student_ids) - sample.real_length < 8
    assert (sample.student_ids[sample.real_length :] == EOS).all()
    assert sample.student_ids[sample.real_length - 2 : sample.real_length].tolist() == [TURN_END, NEWLINE]
    assert sample.content_bytes == len("no é 😀".encode())
    assert sample.student_ids.dtype == np.int32
    assert np.array_equal(sample.teacher_ids, sample.student_ids)
    pairs = sample.alignment
    assert isinstance(pairs, PositionPairs)
    assert pairs.student.tolist() == pairs.teacher.tolist() == np.flatnonzero(sample.maskable).tolist()
    assert sample.maskable[sample.real_length :].all()
    assert not sample.dropped
    assert sample.text.endswith("no é 😀<|im_end|>\n")


def test_loss_on(student_tokenizer: PreTrainedTokenizerFast) -> None:
    """Which text each mode learns, end-of-turn included, filling under `last` and `all`."""
    conversation = chat("hi", "cat", "and", "the mat")
    shown = {}
    for mode in ("last", "assistant", "all"):
        sample = made(shared(student_tokenizer, loss_on=mode), conversation)
        real = sample.real_length
        shown[mode] = student_tokenizer.decode(
            sample.student_ids[:real][sample.maskable[:real]], clean_up_tokenization_spaces=False
        )
        assert sample.maskable[real:].tolist() == [mode != "assistant"] * (len(sample.student_ids) - real)
        assert sample.content_bytes == {"last": 7, "assistant": 10, "all": 15}[mode]
    assert shown["last"] == "the mat<|im_end|>\n"
    assert shown["assistant"] == "cat<|im_end|>\nthe mat<|im_end|>\n"
    assert shown["all"] == sample.text


def test_truncation(student_tokenizer: PreTrainedTokenizerFast) -> None:
    """A truncated sample is cut to whole blocks and gets no filling; content beyond the cut does not
    count."""
    conversation = chat("hi", "the cat sat on the mat " * 20)
    sample = made(shared(student_tokenizer, student_max_length=45), conversation)
    assert len(sample.student_ids) == sample.real_length == 40
    text = student_tokenizer.decode(sample.student_ids, clean_up_tokenization_spaces=False)
    assert sample.content_bytes == len(text.split("assistant\n")[1].encode())
    cut = made(shared(student_tokenizer, student_max_length=45, teacher_max_length=32), conversation)
    assert len(cut.teacher_ids) == 32
    assert cut.dropped == {"teacher truncated": 8}
    assert isinstance(cut.alignment, PositionPairs)
    assert cut.alignment.student.max() == 31


def test_cross_truncation_drops_chunks_beyond_either_cut(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    conversation = chat("hi there", "the cat sat on the mat there and ran " * 6)
    for options, reason in (
        ({"teacher_max_length": 30}, "teacher truncated"),
        ({"student_max_length": 44}, "student truncated"),
    ):
        config = PrepareConfig(kind="cross", block_size=4, **options)
        sample = made(Preparer(student_tokenizer, teacher_tokenizer, config), conversation)
        spans = sample.alignment
        assert isinstance(spans, ChunkSpans)
        assert (spans.student_start + spans.student_length <= sample.real_length).all()
        assert (spans.teacher_start + spans.teacher_length <= len(sample.teacher_ids)).all()
        assert len(sample.teacher_ids) <= options.get("teacher_max_length", 1024)
        assert reason == "student truncated" or sample.dropped[reason] > 0
        covered = sum(
            sample.maskable[a : a + n].sum() for a, n in zip(spans.student_start, spans.student_length)
        )
        assert covered + sample.dropped.total() == sample.maskable.sum()


def test_repeated_contents_align_to_themselves(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The reference gives every repeat the first one's place, and leaves the trained answer unaligned."""
    preparer = Preparer(student_tokenizer, teacher_tokenizer, PrepareConfig(kind="cross", block_size=4))
    for contents in (("OK", "OK", "OK", "OK"), ("Say the letter a", "a"), ("😀", "no 😀")):
        sample = made(preparer, chat(*contents))
        assert set(sample.dropped) == {"not content"}
        spans = sample.alignment
        assert isinstance(spans, ChunkSpans)
        answer = sample.maskable[spans.student_start]
        ids = sample.student_ids[spans.student_start[answer][0] :][: spans.student_length[answer].sum()]
        assert student_tokenizer.decode(ids) == contents[-1]
        ends = spans.teacher_start + spans.teacher_length
        assert ends[-1] == len(sample.teacher_ids), "the teacher reads nothing after the last aligned token"


MERGING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_two_templates_one_tokenizer(student_tokenizer: PreTrainedTokenizerFast) -> None:
    """A word that merges with the template's space loses its own tokens only, and both sides agree on the
    rest."""
    teacher = as_shared(student_tokenizer, MERGING)
    preparer = Preparer(student_tokenizer, teacher, PrepareConfig(kind="shared", block_size=4))
    sample = made(preparer, chat("cat", "the cat sat on the mat"))
    pairs = sample.alignment
    assert isinstance(pairs, PositionPairs)
    assert (sample.student_ids[pairs.student] == sample.teacher_ids[pairs.teacher]).all()
    assert (np.diff(pairs.student) == 1).all()
    kept = student_tokenizer.decode(sample.student_ids[pairs.student], clean_up_tokenization_spaces=False)
    assert kept == " cat sat on the mat"
    first = np.flatnonzero(sample.maskable)[0]
    filled = len(sample.student_ids) - sample.real_length
    assert sample.dropped == {"merged with template": pairs.student[0] - first, "not content": 2 + filled}
    assert len(sample.teacher_ids) % 4 == 0


def test_template_that_strips_on_one_side(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    template = teacher_tokenizer.chat_template.replace("m['content']", "m['content'].strip()")
    config = PrepareConfig(kind="cross", block_size=4, teacher_template=template)
    sample = made(Preparer(student_tokenizer, teacher_tokenizer, config), chat("q", "\n\tthe cat\n\n"))
    assert sample.dropped["absent from the teacher's text"] > 0
    spans = sample.alignment
    assert isinstance(spans, ChunkSpans)
    answer = sample.maskable[spans.student_start]
    at = np.concatenate([np.arange(a, a + n) for a, n in zip(spans.student_start, spans.student_length)])
    assert answer.any()
    assert "the cat" in student_tokenizer.decode(sample.student_ids[at])


def test_normalised_answers_are_not_dropped(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    """NFC on the student's side alone: the reference drops the message, ours aligns every byte of it."""
    student = with_normalizer(student_tokenizer, normalizers.NFC())
    preparer = Preparer(student, teacher_tokenizer, PrepareConfig(kind="cross", block_size=4))
    answer = "cafe\u0301 or cafe\u0301\u0323"
    sample = made(preparer, chat("q", answer))
    assert set(sample.dropped) <= {"not content"}
    assert sample.content_bytes == len(answer.encode())


DROPS = {
    "last message is not the assistant's": chat("q", "a", "q"),
    "no assistant message": chat("q"),
    "empty content": chat("q", " \n"),
    "prompt too long": chat("the cat sat on the mat " * 20, "a"),
    "not valid Unicode": chat("q", "a\ud800"),
    "mask token in the text": chat("what is <|mask|>?", "a"),
}


@pytest.mark.parametrize("reason", DROPS)
def test_drops(student_tokenizer: PreTrainedTokenizerFast, reason: str) -> None:
    dropped = shared(student_tokenizer, student_max_length=40).prepare(DROPS[reason])
    assert isinstance(dropped, Drop)
    assert dropped.reason == reason


def test_drops_of_templates(student_tokenizer: PreTrainedTokenizerFast) -> None:
    shouting = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    for template, reason in (
        ("{{ raise_exception('no') }}", "refused by the chat template"),
        (shouting, "content changed by the student's chat template"),
    ):
        found = shared(student_tokenizer, student_template=template).prepare(chat("q", "answer"))
        assert isinstance(found, Drop)
        assert found.reason == reason
        assert ("no" in found.detail) == ("refused" in reason)
    other = as_shared(student_tokenizer, shouting)
    found = Preparer(student_tokenizer, other, PrepareConfig(kind="shared")).prepare(chat("q", "answer"))
    assert isinstance(found, Drop)
    assert found.reason == "nothing aligned"
    assert found.dropped["absent from the teacher's text"] > 0, "counts against --max-dropped"


def test_plain_text(student_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = made(shared(student_tokenizer), Conversation((Message("text", "the cat sat"),), "t", 0))
    assert sample.maskable.all()
    assert sample.content_bytes == 11
    assert sample.text == "the cat sat"


def test_holdout_by_group(student_tokenizer: PreTrainedTokenizerFast) -> None:
    """One decision per group, a share near the asked one, other groups under another seed, and equal to
    split_of."""
    conversations = [chat("q", f"a{i}", group=f"g{i % 200}", index=i) for i in range(600)]
    splits = [split_of(c, holdout=0.3, seed=0) for c in conversations]
    assert splits[:200] == splits[200:400] == splits[400:]
    assert 40 <= splits[:200].count("heldout") <= 80
    assert splits != [split_of(c, holdout=0.3, seed=1) for c in conversations]
    alone = Counter(split_of(dataclasses.replace(c, group=None), holdout=0.3, seed=0) for c in conversations)
    assert 120 <= alone["heldout"] <= 240
    preparer = shared(student_tokenizer, holdout=0.3)
    assert [made(preparer, c).split for c in conversations[:10]] == splits[:10]
    assert made(shared(student_tokenizer), conversations[0]).split == "train"


def test_sample_id(student_tokenizer: PreTrainedTokenizerFast) -> None:
    """Names source, row and content, and nothing else."""
    base = chat("q", "a")
    ids = {
        sample_id_of(c)
        for c in (base, chat("q", "b"), chat("q", "a", index=1), dataclasses.replace(base, source="other"))
    }
    assert len(ids) == 4
    sample = made(shared(student_tokenizer, loss_on="all", seed=5), base)
    assert sample.sample_id == sample_id_of(base)
    assert len(sample.sample_id) == 32


def test_kinds(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Added tokens apart, one vocabulary makes the kind; the shared size ends at the first mask token."""
    same = as_shared(student_tokenizer, "x")
    assert infer_kind(student_tokenizer, same) == "shared"
    assert shared_vocab_size(student_tokenizer, same) == 293
    assert infer_kind(student_tokenizer, teacher_tokenizer) == "cross"
    assert shared_vocab_size(student_tokenizer, teacher_tokenizer) < 290
    with pytest.raises(UsageError, match="use kind cross"):
        Preparer(student_tokenizer, teacher_tokenizer, PrepareConfig(kind="shared"))
    with pytest.raises(UsageError, match="needs the teacher's tokenizer"):
        Preparer(student_tokenizer, None, PrepareConfig(kind="cross"))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "both"},
        {"loss_on": "first"},
        {"block_size": 0},
        {"student_max_length": 31},
        {"teacher_max_length": 8},
        {"holdout": 1.0},
    ],
)
def test_bad_options_name_the_value(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(options.values())))):
        PrepareConfig(**{"kind": "shared", **options})
