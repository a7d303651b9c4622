"""Alignment on token edges: chunks against a brute-force definition, pairs, truncation, and why tokens are
lost."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards.align import Alignment, Fate, Region, align_chunks, align_positions, outer_spans


def edges(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def fates(alignment: Alignment) -> Counter[str]:
    return Counter(Fate(int(f)).name for f in alignment.fate)


WHOLE = [Region(0, 0, 6)]


def test_chunks_are_the_finest_common_cutting() -> None:
    found = align_chunks(edges(0, 1, 3, 4, 6), edges(0, 2, 3, 6), WHOLE)
    # Common edges 0, 3, 6.
    assert found.spans.tolist() == [[0, 2, 0, 2], [2, 4, 2, 3]]
    assert fates(found) == {"ALIGNED": 4}


@given(data=st.data(), length=st.integers(1, 40))
def test_chunks_equal_the_definition(data: st.DataObject, length: int) -> None:
    """Every pair of neighbouring common edges, and nothing else, over random cuttings of two shifted
    texts."""
    cuts = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())
    s_cuts, t_cuts = ({0, *data.draw(cuts), length} for _ in range(2))
    s_shift, t_shift = 5, 9  # template tokens before the content, one on each side
    s = edges(0, *(c + s_shift for c in sorted(s_cuts)))
    t = edges(0, *(c + t_shift for c in sorted(t_cuts)))
    found = align_chunks(s, t, [Region(s_shift, t_shift, length)])
    common = sorted(s_cuts & t_cuts)
    assert [s[a] - s_shift for a in found.spans[:, 0]] == common[:-1]
    assert [s[b] - s_shift for b in found.spans[:, 1]] == common[1:]
    assert (s[found.spans[:, :2]] - s_shift == t[found.spans[:, 2:]] - t_shift).all()
    assert fates(found) == {"ALIGNED": len(s_cuts) - 1, "NOT_CONTENT": 1}


def test_unknown_edges_join_chunks_and_are_never_common() -> None:
    found = align_chunks(edges(0, 2, -1, 6), edges(0, 2, 4, 6), WHOLE)
    assert found.spans.tolist() == [[0, 1, 0, 1], [1, 3, 1, 3]]
    start, end = outer_spans(edges(0, 2, -1, -1, 6))
    assert start.tolist() == [0, 2, 2, 2]
    assert end.tolist() == [2, 6, 6, 6]


def test_token_without_bytes_stays_with_what_precedes_it() -> None:
    """An invented prefix token must not make an empty chunk, nor belong to two."""
    found = align_chunks(edges(0, 0, 3, 3, 6), edges(0, 3, 6), WHOLE)
    assert found.spans.tolist() == [[1, 3, 0, 1], [3, 4, 1, 2]]


def test_nothing_in_common_and_nothing_at_all() -> None:
    assert len(align_chunks(edges(0, 6), edges(0, 2, 8), [Region(0, 2, 6)]).spans) == 1
    assert len(align_chunks(edges(0, 7), edges(0, 2, 8), [Region(1, 2, 6)]).spans) == 0
    assert align_chunks(edges(0, 3), edges(0, 3), []).spans.shape == (0, 4)
    assert align_chunks(edges(0), edges(0), [Region(0, 0, 0)]).spans.shape == (0, 4)


def test_repeated_contents_keep_their_own_counterparts() -> None:
    """Regions say which occurrence is meant, so equal contents cannot be confused."""
    regions = [Region(2, 1, 2), Region(6, 5, 2)]
    found = align_chunks(edges(0, 2, 4, 6, 8), edges(0, 1, 3, 5, 7), regions)
    assert found.spans.tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]


def test_merged_with_template() -> None:
    """The teacher's first token reaches from the template into the content: what it covers is lost, the rest
    is not."""
    found = align_chunks(edges(0, 2, 3, 5, 8), edges(0, 5, 8), [Region(2, 2, 6)])
    assert found.spans.tolist() == [[3, 4, 1, 2]]
    assert fates(found) == {"NOT_CONTENT": 1, "MERGED": 2, "ALIGNED": 1}


def test_content_the_teacher_does_not_show() -> None:
    found = align_chunks(edges(0, 2, 4, 6), edges(0, 4), [Region(2, 0, 4)], contents=[(0, 6)])
    assert fates(found) == {"ABSENT": 1, "ALIGNED": 2}
    assert found.spans.tolist() == [[1, 3, 0, 1]]


def test_truncated_chunks_are_dropped_whole_on_both_sides() -> None:
    """The reference keeps the columns of chunks that lost their teacher tokens: log p = 0, so p = 1, and
    active."""
    s, t = edges(0, 1, 3, 4, 6), edges(0, 2, 3, 6)
    teacher_cut = align_chunks(s, t, WHOLE, teacher_tokens=2)
    assert teacher_cut.spans.tolist() == [[0, 2, 0, 2]]
    assert fates(teacher_cut) == {"ALIGNED": 2, "TEACHER_TRUNCATED": 2}
    student_cut = align_chunks(s, t, WHOLE, student_tokens=3)  # inside the second chunk
    assert student_cut.spans.tolist() == [[0, 2, 0, 2]]
    assert fates(student_cut) == {"ALIGNED": 2, "STUDENT_TRUNCATED": 2}


def test_pairs_have_equal_ids() -> None:
    s, t = edges(0, 2, 3, 6), edges(0, 2, 3, 4, 6)
    found = align_positions(s, t, WHOLE, np.array([7, 8, 9]), np.array([7, 5, 1, 2]))
    assert found.spans.tolist() == [[0, 1, 0, 1]]
    assert fates(found) == {"ALIGNED": 1, "IDS_DIFFER": 2}


def test_pairs_over_changed_characters() -> None:
    """Edges inside characters that normalisation changed are unknown, yet the same tokens stand there on both
    sides."""
    found = align_positions(edges(0, -1, 6), edges(0, -1, 6), WHOLE, np.array([4, 5]), np.array([4, 5]))
    assert found.spans.tolist() == [[0, 1, 0, 1], [1, 2, 1, 2]]
    other = align_positions(edges(0, -1, 6), edges(0, -1, 6), WHOLE, np.array([4, 5]), np.array([5, 4]))
    assert len(other.spans) == 0
    assert fates(other) == {"IDS_DIFFER": 2}
