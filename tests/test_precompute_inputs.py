"""Questions and jobs: every masked token with a teacher counterpart is asked exactly once, with the right
things hidden."""

from collections import Counter

import numpy as np
import pytest

from precompute.inputs import Asking, make_jobs, questions
from precompute.sample import ChunkSpans, PositionPairs, Sample
from shards.errors import UsageError
from shards.noise import NoiseConfig, Plan, make_plan

MASK = 99
I32 = np.int32


def a_sample(alignment: PositionPairs | ChunkSpans, student_length: int, teacher_length: int) -> Sample:
    maskable = np.arange(student_length) >= 3
    return Sample(
        sample_id="s",
        split="train",
        student_ids=np.arange(student_length, dtype=I32),
        maskable=maskable,
        real_length=student_length,
        content_bytes=student_length,
        teacher_ids=np.arange(100, 100 + teacher_length, dtype=I32),
        alignment=alignment,
    )


@pytest.fixture
def shared() -> Sample:
    """Student 16 tokens, teacher 20: student i is teacher i + 4, but the last two students have no
    counterpart."""
    student = np.arange(3, 14, dtype=I32)
    return a_sample(PositionPairs(student, student + I32(4)), 16, 20)


@pytest.fixture
def cross() -> Sample:
    """Chunks of the student [2:4) (touches the prompt), [4:5), [5:8), [8:10), [12:16); teacher token 9 is
    in none."""
    return a_sample(
        ChunkSpans(
            student_start=np.array([2, 4, 5, 8, 12], dtype=I32),
            student_length=np.array([2, 1, 3, 2, 4], dtype=I32),
            teacher_start=np.array([2, 3, 6, 7, 10], dtype=I32),
            teacher_length=np.array([1, 3, 1, 2, 2], dtype=I32),
        ),
        16,
        12,
    )


def plans(sample: Sample, *, compdemo: bool, views: int = 4) -> list[Plan]:
    cross = isinstance(sample.alignment, ChunkSpans)
    config = NoiseConfig(views=views, unit="chunk" if cross else "token", compdemo=compdemo, seed=3)
    spans = (
        {"chunk_start": sample.alignment.student_start, "chunk_length": sample.alignment.student_length}
        if isinstance(sample.alignment, ChunkSpans)
        else {}
    )
    return [make_plan(config, sample.sample_id, v, sample.maskable, **spans) for v in range(views)]


def asking(**changes: object) -> Asking:
    settings = {"mask_id": MASK, "attention": "staircase", "block_size": 4, "shifted": False,
                "row_tokens": 10_000, "compdemo": True}  # fmt: skip
    return Asking(**{**settings, **changes})  # type: ignore[arg-type]


def test_shared_halves_are_complementary(shared: Sample) -> None:
    """Pass 1 hides exactly half B, pass 2 exactly half A; together they ask every masked pair once."""
    pairs = shared.alignment
    for v, plan in enumerate(plans(shared, compdemo=True)):
        first, second = questions(shared, v, plan, compdemo=True)
        masked = pairs.student[plan.masked[pairs.student]]
        np.testing.assert_array_equal(np.sort(np.concatenate([first.slot, second.slot])), masked)
        assert not plan.half_a[first.slot].any()
        assert plan.half_a[second.slot].all()
        for q in (first, second):
            np.testing.assert_array_equal(q.asked, q.slot + 4)
            np.testing.assert_array_equal(q.hidden, q.asked)


def test_without_compdemo_everything_masked_is_hidden_at_once(shared: Sample) -> None:
    plan = plans(shared, compdemo=False)[3]
    (q,) = questions(shared, 3, plan, compdemo=False)
    np.testing.assert_array_equal(q.slot, np.flatnonzero(plan.masked[:14]))


def test_cross_hides_whole_chunks_and_asks_the_active_ones(cross: Sample) -> None:
    """A masked chunk that touches the prompt is hidden from the teacher too, but never asked about."""
    everything = Plan(
        np.float32(0.9),
        cross.maskable,
        cross.maskable,
        chunk_masked=np.array([True, True, False, True, True]),
        chunk_active=np.array([False, True, False, True, True]),
        chunk_half_a=np.array([True, False, False, True, False]),
    )
    first, second = questions(cross, 0, everything, compdemo=True)
    assert first.hidden.tolist() == first.asked.tolist() == [3, 4, 5, 10, 11]
    assert first.slot.tolist() == [1, 1, 1, 4, 4]
    assert second.hidden.tolist() == [2, 7, 8]
    assert second.asked.tolist() == [7, 8]
    assert second.slot.tolist() == [3, 3]


@pytest.mark.parametrize("compdemo", [True, False])
@pytest.mark.parametrize("attention", ["staircase", "bidirectional", "block-causal"])
@pytest.mark.parametrize("name", ["shared", "cross"])
def test_reads_are_the_asked_tokens(
    name: str, attention: str, compdemo: bool, request: pytest.FixtureRequest
) -> None:
    """Every read sits on a mask token at a position whose true id is the gold id; the clean stream shows
    no mask."""
    sample = request.getfixturevalue(name)
    (job,) = make_jobs(
        sample, plans(sample, compdemo=compdemo), asking(attention=attention, compdemo=compdemo)
    )
    read = job.piece.read
    assert len(read) == len(job.view) == len(job.slot) == len(job.gold) > 0
    assert (job.piece.ids[read] == MASK).all()
    np.testing.assert_array_equal(sample.teacher_ids[job.piece.position[read]], job.gold)
    assert (job.piece.ids[job.piece.stream == 0] != MASK).all()


def test_the_other_half_is_shown(shared: Sample) -> None:
    """In a stream, hidden tokens are those asked in it: half A is visible while B is predicted, and the
    reverse."""
    all_plans = plans(shared, compdemo=True)
    (job,) = make_jobs(shared, all_plans, asking(attention="bidirectional"))
    piece = job.piece
    for stream in np.unique(piece.stream):
        of_stream = piece.stream == stream
        hidden = piece.position[of_stream & (piece.ids == MASK)]
        here = of_stream[piece.read]
        np.testing.assert_array_equal(hidden, piece.position[piece.read[here]])
        plan = all_plans[job.view[here][0]]
        masked = np.flatnonzero(plan.masked[:14]) + 4
        shown = np.setdiff1d(masked, hidden)
        assert (plan.half_a[shown - 4] != plan.half_a[hidden - 4][0]).all()


def test_pieces_split_where_the_row_is_short(shared: Sample) -> None:
    """A short row splits the views over several pieces that ask the same things; each repeats the clean
    stream."""
    all_plans = plans(shared, compdemo=True)
    (whole,) = make_jobs(shared, all_plans, asking())
    parts = make_jobs(shared, all_plans, asking(row_tokens=len(whole.piece) - 1), index=7)
    assert len(parts) > 1
    assert max(len(p.piece) for p in parts) < len(whole.piece)
    assert {p.sample for p in parts} == {7}
    keys = Counter((v, s, g) for p in parts for v, s, g in zip(p.view, p.slot, p.gold))
    assert keys == Counter(zip(whole.view, whole.slot, whole.gold))


def test_a_question_longer_than_the_row_is_refused(shared: Sample) -> None:
    with pytest.raises(UsageError, match=r"sample s needs \d+ teacher tokens .* --row-tokens allows 5"):
        make_jobs(shared, plans(shared, compdemo=True), asking(row_tokens=5))


def test_nothing_masked_asks_nothing(shared: Sample) -> None:
    none = np.zeros(16, dtype=bool)
    plan = Plan(np.float32(0.001), none, none, none[:0], none[:0], none[:0])
    assert make_jobs(shared, [plan], asking()) == []
