"""The recorded end-to-end traces, stage by stage up to the teacher: our noise plans, what each pass hides,
packed pieces and reductions, against the reference's.

From the recorded alignment and raw uniforms, never from recorded masks. All samples of a trace share one
packed row, which the reference ran padded, pass by pass and in either concatenation order.
"""

from typing import Any

import numpy as np
import torch

from precompute.engine import run_row
from precompute.inputs import Asking, make_jobs, questions
from precompute.reduce import reduce_gold, sum_chunks


def test_plans_are_the_recorded_masks(trace: Any) -> None:
    for i, sample in enumerate(trace.recorded):
        plan, n = trace.plan(i, sample), len(sample.student_ids)
        assert plan.t == trace.row("t", i)
        recorded = {"masked_mask": plan.masked, "M_A": plan.half_a, "M_B": plan.masked & ~plan.half_a}
        if trace.cross:
            recorded |= {
                "chunk_has_masked": plan.chunk_masked,
                "active_chunk_mask": plan.chunk_active,
                "chunk_A": plan.chunk_half_a,
                "chunk_B": plan.chunk_masked & ~plan.chunk_half_a,
            }
        for name in recorded.keys() & trace.tensors.keys():
            theirs = trace.row(name, i).astype(bool)
            at = trace.columns(i) if "chunk" in name else slice(n)
            np.testing.assert_array_equal(recorded[name], theirs[at], err_msg=name)
            assert theirs.sum() == theirs[at].sum(), f"{name}: nothing where the batch is padding"


def test_each_pass_hides_what_it_hid(trace: Any) -> None:
    """Mask tokens of our questions against those of the recorded teacher inputs, pass by pass."""
    mask_id = trace.meta["config"]["teacher_mask_token_id"]
    for i, sample in enumerate(trace.recorded):
        passes = questions(sample, 0, trace.plan(i, sample), compdemo=trace.noise.compdemo)
        for number, question in enumerate(passes, start=1):
            name = f"teacher_in.{number}.input_ids"
            if name not in trace.tensors:  # nothing masked: the reference ran one pass
                assert not len(question.hidden)
                continue
            ids = trace.row(name, i)
            if not trace.cross:
                half = len(ids) // 2
                ids = ids[half:] if trace.meta["concat_order"] == "x0_xt" else ids[:half]
            np.testing.assert_array_equal(np.flatnonzero(ids == mask_id), question.hidden)


def test_packed_answers_are_the_recorded_logits(trace: Any, golden_teacher: Any) -> None:
    teacher, samples = golden_teacher(trace), trace.recorded
    assert teacher.spec.mask_token_id == trace.meta["config"]["teacher_mask_token_id"]
    asking = Asking(
        mask_id=teacher.spec.mask_token_id,
        attention=teacher.spec.attention,
        block_size=trace.meta["block_size"],
        shifted=False,
        row_tokens=10_000,
        compdemo=trace.noise.compdemo,
    )
    plans = [trace.plan(i, s) for i, s in enumerate(samples)]
    jobs = [j for i, s in enumerate(samples) for j in make_jobs(s, [plans[i]], asking, index=i)]
    if not trace.tensors["masked_mask"].any():
        assert jobs == []
        return
    hidden = run_row(teacher, [j.piece for j in jobs])
    sample = np.repeat([j.sample for j in jobs], [len(j.gold) for j in jobs])
    position = np.concatenate([j.piece.position[j.piece.read] for j in jobs])
    recorded = torch.from_numpy(trace.tensors["teacher_logits"][sample, position])
    torch.testing.assert_close(teacher.head(hidden), recorded, atol=1e-5, rtol=1e-5)  # sums in another order
    if trace.cross:
        gold = np.concatenate([j.gold for j in jobs])
        logp = reduce_gold(hidden, torch.from_numpy(gold).long(), teacher.head, head_rows=16)
        slot = np.concatenate([j.slot for j in jobs])
        for i, plan in enumerate(plans):
            ours = sum_chunks(logp[sample == i], slot[sample == i], plan.chunk_active)
            theirs = trace.row("teacher_chunk_lp", i)[trace.columns(i)][plan.chunk_active]
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
