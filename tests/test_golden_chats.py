"""The reference's chat alignments (`C_align/chats.json`, real tokenizers) against ours.

Equal wherever the reference is sound. It differs by design where the reference

- takes the first occurrence of a text for a later message ("OK" four times, "a" in "assistant");
- does not find a text whose last character is several tokens, or that a tokenizer normalises;
- zips two ranges position by position although a token at the edge merged with the template.

Each test states the reference's value, ours, and that one of these is why. With `content_search="first"` the
first two are the reference's as well.
"""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from precompute.first_search import Reading, first_ranges, first_tokens
from precompute.prepare import Drop, PrepareConfig, Preparer
from precompute.sample import ChunkSpans, Conversation, Message, PositionPairs, Sample
from precompute.templates import Rendered, render
from precompute.tokens import Tokens, byte_offsets
from shards.align import outer_spans

pytestmark = pytest.mark.slow  # fetches and loads four real tokenizers

Loader = Callable[..., PreTrainedTokenizerFast]
NOTHING = np.zeros(0, dtype=np.int32)
TEACHERS = ("llama3", "gpt4o", "deepseek_v3")


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "C_align" / "chats.json").read_text())


@pytest.fixture(scope="module")
def specials(recorded: dict[str, Any]) -> list[str]:
    return recorded["role_tokens"]


@pytest.fixture(scope="module")
def student(real_tokenizer: Loader, recorded: dict[str, Any]) -> PreTrainedTokenizerFast:
    return real_tokenizer("qwen3", recorded["templates"]["B_chatml"])


@pytest.fixture(scope="module")
def teachers(
    real_tokenizer: Loader, recorded: dict[str, Any], specials: list[str]
) -> dict[str, PreTrainedTokenizerFast]:
    return {t: real_tokenizer(t, recorded["templates"]["A_role"], *specials) for t in TEACHERS}


def settings(**changes: Any) -> PrepareConfig:
    """Samples as long as the reference's: no filling."""
    return PrepareConfig(
        **{"block_size": 1, "student_max_length": 4096, "teacher_max_length": 4096, **changes}
    )


def conversation(case: dict[str, Any]) -> Conversation:
    return Conversation(tuple(Message(**m) for m in case["messages"]), case["id"], 0)


def read(preparer: Preparer, messages: Any) -> tuple[Rendered, Tokens, Rendered, Tokens]:
    """Text and tokens of the student's and the teacher's side."""
    shown, asked = (render(side.tokenizer, messages) for side in (preparer.student, preparer.teacher))
    return shown, preparer.student.encode(shown.text), asked, preparer.teacher.encode(asked.text)


def occurs_before(shown: Rendered, message: int, content: str) -> bool:
    """Whether a search from the start of the text finds the content before its own place."""
    span = shown.spans[message]
    assert span is not None
    return shown.text.find(content.strip()) < span.start


def test_position_pairs(real_tokenizer: Loader, recorded: Any, specials: list[str], student: Any) -> None:
    """`align_chat_tokens`: one tokenizer, two templates, role strings special or plain."""
    role = recorded["templates"]["A_role"]
    preparers = {
        (special, loss_on): Preparer(student, teacher, settings(kind="shared", loss_on=loss_on))
        for special, teacher in (
            (True, real_tokenizer("qwen3", role, *specials)),
            (False, real_tokenizer("qwen3", role)),
        )
        for loss_on in ("all", "assistant")
    }
    equal = shifted = first_occurrence = 0
    for case in recorded["cases"]:
        for entry in case["align_chat_tokens"]:
            where = f"{case['id']}, special {entry['role_tokens_special']}, roles {entry['roles']}"
            loss_on = "all" if entry["roles"] is None else "assistant"
            preparer = preparers[entry["role_tokens_special"], loss_on]
            talk = conversation(case)
            shown, tokens, asked, seen = read(preparer, talk.messages)
            assert (shown.text, asked.text) == (entry["text_b"], entry["text_a"]), where
            assert tokens.ids.tolist() == entry["ids_b"], where
            assert seen.ids.tolist() == entry["ids_a"], where
            sample = preparer.prepare(talk)
            theirs = set(zip(entry["align_b"], entry["align_a"]))
            sound = {(s, t) for s, t in theirs if tokens.ids[s] == seen.ids[t]}
            ours: set[tuple[int, int]] = set()
            if isinstance(sample, Sample):
                assert isinstance(sample.alignment, PositionPairs)
                ours = set(zip(sample.alignment.student.tolist(), sample.alignment.teacher.tolist()))
            assert all(tokens.ids[s] == seen.ids[t] for s, t in ours), where
            repeats = any(
                occurs_before(view, i, m.content)
                for i, m in enumerate(talk.messages)
                for view in (shown, asked)
            )
            if theirs != sound:
                # A merged token at the edge shifts all that follow: unequal ids. Ours has those, in place.
                assert not entry["ids_equal"], where
                lost = sample.dropped["merged with template"]
                assert len(ours) + lost >= len(theirs) - 1, where
                shifted += 1
            elif repeats:
                # A later message got the place of an earlier text, which is not trained or counted twice.
                assert len(ours) >= len(theirs), where
                first_occurrence += ours != theirs
            else:
                assert ours == theirs, where
                equal += 1
    assert equal >= 18
    assert shifted >= 5
    assert first_occurrence >= 2


def test_position_pairs_as_the_reference_searches(
    real_tokenizer: Loader, recorded: Any, specials: list[str], student: Any
) -> None:
    """`align_chat_tokens` again, `content_search="first"`: equal on the tokens that carry loss, repeats
    included, wherever the zip of positions is sound. What the reference puts on other tokens is no target."""
    role = recorded["templates"]["A_role"]
    compared = misplaced = 0
    for special in (True, False):
        teacher = real_tokenizer("qwen3", role, *(specials if special else ()))
        for case in recorded["cases"]:
            for entry in case["align_chat_tokens"]:
                if entry["role_tokens_special"] != special:
                    continue
                loss_on = "all" if entry["roles"] is None else "assistant"
                ours = {}
                for search in ("exact", "first"):
                    config = settings(kind="shared", loss_on=loss_on, content_search=search)
                    made = Preparer(student, teacher, config).prepare(conversation(case))
                    pairs = made.alignment if isinstance(made, Sample) else PositionPairs(NOTHING, NOTHING)
                    assert isinstance(pairs, PositionPairs)
                    ours[search] = set(zip(pairs.student.tolist(), pairs.teacher.tolist()))
                theirs = set(zip(entry["align_b"], entry["align_a"]))
                if any(entry["ids_b"][s] != entry["ids_a"][t] for s, t in theirs):
                    continue  # shifted by a merged token
                learned = Preparer(student, None, settings(kind="shared", loss_on=loss_on))
                alone = learned.prepare(conversation(case))
                assert isinstance(alone, Sample)
                theirs = {(s, t) for s, t in theirs if alone.maskable[s]}
                assert ours["first"] == theirs, (case["id"], special, loss_on)
                compared += 1
                misplaced += ours["exact"] != theirs
    assert compared >= 25
    assert misplaced >= 4


def hulls(sample: Sample, shown: Rendered, tokens: Tokens) -> list[list[int] | None]:
    """[teacher start, teacher end, student start, student end] from the first to the last chunk of every
    message."""
    spans = sample.alignment
    assert isinstance(spans, ChunkSpans)
    begin = outer_spans(tokens.edges)[0][spans.student_start]
    byte = byte_offsets(shown.text)
    found: list[list[int] | None] = []
    for span in shown.spans:
        assert span is not None
        at = np.flatnonzero((begin >= byte[span.start]) & (begin < byte[span.end]))
        if not len(at):
            found.append(None)
            continue
        a, b = at[0], at[-1]
        ends = (spans.teacher_start + spans.teacher_length, spans.student_start + spans.student_length)
        found.append(
            [int(x) for x in (spans.teacher_start[a], ends[0][b], spans.student_start[a], ends[1][b])]
        )
    return found


@pytest.mark.parametrize("name", TEACHERS)
def test_content_ranges(recorded: Any, student: Any, teachers: dict[str, Any], name: str) -> None:
    """`find_content_ranges`: where each message's content stands on both sides."""
    preparer = Preparer(student, teachers[name], settings(kind="cross", loss_on="all"))
    reasons = dict.fromkeys(("first occurrence", "last character", "normalised", "merged"), 0)
    equal = 0
    for case in recorded["cases"]:
        entry = next(e for e in case["find_content_ranges"] if e["teacher"] == name)
        talk = conversation(case)
        shown, tokens, asked, seen = read(preparer, talk.messages)
        assert student.decode(tokens.ids) == entry["student_decoded"]
        assert teachers[name].decode(seen.ids) == entry["teacher_decoded"]
        sample = preparer.prepare(talk)
        assert isinstance(sample, Sample)
        for i, (message, ours) in enumerate(zip(talk.messages, hulls(sample, shown, tokens))):
            reference = entry["per_message"][i]
            theirs = None if reference is None else [*reference["teacher"], *reference["student"]]
            if ours == theirs:
                equal += 1
                continue
            where = f"{case['id']}, {name}, message {i}: ours {ours}, the reference's {theirs}"
            content = message.content
            if unicodedata.normalize("NFC", content) != content:
                assert theirs is not None, where
                assert theirs[2:] == [-1, -1], where  # not found, so not distilled at all
                reasons["normalised"] += 1
            elif occurs_before(shown, i, content) or occurs_before(asked, i, content):
                assert theirs is not None, where
                assert ours is not None, where
                assert theirs[2] < ours[2], where
                reasons["first occurrence"] += 1
            elif len(content[-1].encode()) > 1:
                assert theirs is not None, where
                assert ours is not None, where
                assert theirs[1] < ours[1], where  # ends inside the last character
                reasons["last character"] += 1
            else:
                assert content != content.strip(), where
                assert sample.dropped["merged with template"] > 0, where
                assert theirs is not None, where
                assert ours is not None, where
                assert (theirs[1], theirs[3]) == (ours[1], ours[3]), where  # all but the merged token
                reasons["merged"] += 1
            assert ours is not None, where
            assert ours[1] <= len(seen.ids), where
    assert equal >= 13
    assert all(reasons.values()), reasons


@pytest.mark.parametrize("name", TEACHERS)
def test_content_ranges_as_the_reference_searches(
    recorded: Any, student: Any, teachers: dict[str, Any], name: str
) -> None:
    """`find_content_ranges` again, as `content_search="first"` has it: equal in every chat, misplaced and cut
    contents included; what a tokenizer normalises is not found, other text on the two sides is left out."""
    preparer = Preparer(student, teachers[name], settings(kind="cross"))
    for case in recorded["cases"]:
        entry = next(e for e in case["find_content_ranges"] if e["teacher"] == name)
        talk = conversation(case)
        shown, tokens, asked, seen = read(preparer, talk.messages)
        sides = {
            "student": Reading(preparer.student, shown.text, tokens),
            "teacher": Reading(preparer.teacher, asked.text, seen),
        }
        contents = [m.content for m in talk.messages]
        for content, theirs in zip(contents, entry["per_message"]):
            for side, reading in sides.items():
                expected = theirs and tuple(theirs[side])
                assert (first_tokens(reading, content) or (-1, -1)) == (expected or (-1, -1)), case["id"]
        both = [r for r in first_ranges(contents, sides["student"], sides["teacher"]) if r is not None]
        assert [[*r[2:], *r[:2]] for r in both] == entry["ranges"], case["id"]


def test_rows_of_the_cross_tokenizer_pipeline(recorded: Any, student: Any, teachers: dict[str, Any]) -> None:
    """`distill_map`: student ids, labels and teacher ids, whole and cut to 24; what it discards, we drop."""
    discarded = compared = 0
    for case in recorded["cases"]:
        for entry in case["distill_map"]:
            limit, expected = entry["max_length"], entry["out"]
            config = settings(kind="cross", student_max_length=limit or 4096)
            made = Preparer(student, teachers[entry["teacher"]], config).prepare(conversation(case))
            if expected["_discard"]:
                assert isinstance(made, Drop)
                assert made.reason == "prompt too long"
                discarded += 1
                continue
            assert isinstance(made, Sample)
            assert made.student_ids.tolist() == expected["input_ids"]
            assert made.maskable.tolist() == [x != -100 for x in expected["labels"]]
            # Ours ends the teacher's text after the last aligned token, which the reference does later.
            read = len(made.teacher_ids)
            assert made.teacher_ids.tolist() == expected["teacher_input_ids"][:read]
            compared += 1
    assert compared >= 15
    assert discarded >= 3
