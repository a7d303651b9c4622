"""The recorded end-to-end traces, teacher side: our noise plans, packed pieces and reductions against the
reference's.

From the recorded batch and uniforms, never from recorded masks: plan, what each pass hides, logits at what is
read, chunk log-probs. All samples of a trace share one packed row, which the reference ran padded and pass by
pass.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from precompute.engine import run_row
from precompute.inputs import Asking, make_jobs, questions
from precompute.reduce import reduce_gold, sum_chunks
from precompute.sample import ChunkSpans, PositionPairs, Sample
from precompute.teachers import dense, llada2
from precompute.teachers.base import TeacherSpec, TransformersTeacher
from precompute.teachers.load import read_config
from shards.noise import NoiseConfig, Plan, plan_from_uniforms

TRACES = Path(os.environ.get("TIDE_GOLDEN", Path(__file__).parent / "golden")) / "D_trace"
CASES = sorted(p.stem for p in TRACES.glob("*.json"))
I32 = np.int32


@cache
def teacher(pipeline: str, mask_id: int) -> TransformersTeacher:
    name = "teacher_moe" if pipeline == "A" else "teacher_dense"
    folder, published = TRACES / "models" / name, read_config(TRACES / "models" / name)
    how: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "attn_implementation": "sdpa"}
    if pipeline == "A":
        model = llada2.load_llada2(folder, llada2.glm_config(published), **how)
    else:
        model = dense.load_dense(folder, published, **how)
    spec = TeacherSpec(
        name=name,
        revision=None,
        architecture=published["model_type"],
        attention="bidirectional" if pipeline == "A" else "staircase",
        mask_token_id=mask_id,
        vocab_size=published["vocab_size"],
        shifted=False,
        dtype="float32",
        weights_hash="",
    )
    return TransformersTeacher(model, spec)


@dataclass
class Trace:
    """A recorded case as our samples and plans."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    samples: list[Sample]
    plans: list[Plan]
    columns: list[np.ndarray]
    """Pipeline A: the chunk columns of each sample that have tokens on both sides."""

    def row(self, name: str, i: int) -> np.ndarray:
        return self.tensors[name][i].numpy()


def spans(matrix: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each chunk column of an alignment matrix [l, n_c]."""
    return matrix.argmax(0)[columns].astype(I32), matrix.sum(0)[columns].astype(I32)


@pytest.fixture(scope="module", params=CASES)
def trace(request: pytest.FixtureRequest) -> Trace:
    case = request.param
    meta = json.loads((TRACES / f"{case}.json").read_text())
    t = load_file(TRACES / f"{case}.safetensors")
    out = Trace(meta, t, [], [], [])
    compdemo = meta["use_complementary_demo"]
    config = NoiseConfig(
        unit="chunk" if meta["pipeline"] == "A" else "token",
        compdemo=compdemo,
        demo_ratio=meta["config"]["demo_ratio"],
    )
    for i in range(meta["dims"]["b"]):
        maskable = out.row("maskable_mask", i).astype(bool)
        length = len(maskable)
        chunks: dict[str, np.ndarray] = {}
        alignment: PositionPairs | ChunkSpans
        columns = np.zeros(0, dtype=int)
        if meta["pipeline"] == "A":
            matrices = [out.row(f"batch.alignment_matrix_{side}", i) for side in ("student", "teacher")]
            # a truncated teacher leaves chunks without a teacher token: they are no chunks of ours
            columns = np.flatnonzero(matrices[0].any(0) & matrices[1].any(0))
            student, teacher_side = (spans(m, columns) for m in matrices)
            alignment = ChunkSpans(*student, *teacher_side)
            chunks = {"chunk_start": student[0], "chunk_length": student[1]}
            teacher_ids = out.row("batch.teacher_input_ids", i)[
                : int(out.row("batch.teacher_attention_mask", i).sum())
            ]
        elif meta["aligned"]:
            n = int(t["batch.n_aligned"][i])
            alignment = PositionPairs(
                *(out.row(f"batch.align_{s}", i)[:n].astype(I32) for s in ("student", "teacher"))
            )
            teacher_ids = out.row("batch.teacher_input_ids", i)[
                : int(out.row("batch.teacher_attention_mask", i).sum())
            ]
        else:
            everything = np.arange(length, dtype=I32)
            alignment = PositionPairs(everything, everything)
            teacher_ids = out.row("batch.input_ids", i)
        # no second draw is recorded where nothing was masked or nothing is split
        demo = "u_demo" in t
        u_demo = out.row("u_demo", i) if demo else np.zeros(t["batch.input_ids"].numel(), dtype=np.float32)
        out.plans.append(
            plan_from_uniforms(
                t["t"][i].numpy(), out.row("u_mask", i),
                u_demo[columns] if meta["pipeline"] == "A" else u_demo[:length], maskable,
                config=config, **chunks,
            )
        )  # fmt: skip
        out.columns.append(columns)
        out.samples.append(
            Sample(
                sample_id=f"{case}/{i}",
                split="train",
                student_ids=out.row("batch.input_ids", i).astype(I32),
                maskable=maskable,
                real_length=length,
                content_bytes=0,
                teacher_ids=teacher_ids.astype(I32),
                alignment=alignment,
            )
        )
    return out


def test_plans_are_the_recorded_masks(trace: Trace) -> None:
    for i, (plan, columns) in enumerate(zip(trace.plans, trace.columns)):
        np.testing.assert_array_equal(plan.masked, trace.row("masked_mask", i).astype(bool))
        recorded = {"M_A": plan.half_a, "M_B": plan.masked & ~plan.half_a}
        if trace.meta["pipeline"] == "A":
            recorded = {
                "chunk_has_masked": plan.chunk_masked,
                "active_chunk_mask": plan.chunk_active,
                "chunk_A": plan.chunk_half_a,
                "chunk_B": plan.chunk_masked & ~plan.chunk_half_a,
            }
        for name, ours in recorded.items():
            if name in trace.tensors:
                theirs = trace.row(name, i).astype(bool)
                np.testing.assert_array_equal(ours, theirs[columns] if len(columns) else theirs, err_msg=name)


def test_each_pass_hides_what_it_hid(trace: Trace) -> None:
    """Mask tokens of our questions against those of the recorded teacher inputs, pass by pass."""
    mask_id = trace.meta["config"]["teacher_mask_token_id"]
    for i, (sample, plan) in enumerate(zip(trace.samples, trace.plans)):
        passes = questions(sample, 0, plan, compdemo=trace.meta["use_complementary_demo"])
        for number, question in enumerate(passes, start=1):
            name = f"teacher_in.{number}.input_ids"
            if name not in trace.tensors:  # nothing masked: the reference ran one pass
                assert not len(question.hidden)
                continue
            ids = trace.row(name, i)
            if trace.meta["pipeline"] == "B":
                half = len(ids) // 2
                ids = ids[half:] if trace.meta["concat_order"] == "x0_xt" else ids[:half]
            np.testing.assert_array_equal(np.flatnonzero(ids == mask_id), question.hidden)


def test_packed_answers_are_the_recorded_logits(trace: Trace) -> None:
    meta = trace.meta
    model = teacher(meta["pipeline"], meta["config"]["teacher_mask_token_id"])
    asking = Asking(
        mask_id=model.spec.mask_token_id,
        attention=model.spec.attention,
        block_size=meta["block_size"],
        shifted=False,
        row_tokens=10_000,
        compdemo=meta["use_complementary_demo"],
    )
    jobs = [
        j
        for i, (s, p) in enumerate(zip(trace.samples, trace.plans))
        for j in make_jobs(s, [p], asking, index=i)
    ]
    if not trace.tensors["masked_mask"].any():
        assert jobs == []
        return
    hidden = run_row(model, [j.piece for j in jobs])
    logits = model.head(hidden)
    sample = np.repeat([j.sample for j in jobs], [len(j.gold) for j in jobs])
    position = np.concatenate([j.piece.position[j.piece.read] for j in jobs])
    recorded = trace.tensors["teacher_logits"][sample, position]
    torch.testing.assert_close(logits, recorded, atol=1e-5, rtol=1e-5)  # sums in another order
    if meta["pipeline"] == "A":
        gold = np.concatenate([j.gold for j in jobs])
        logp = reduce_gold(hidden, torch.from_numpy(gold).long(), model.head, head_rows=16)
        slot = np.concatenate([j.slot for j in jobs])
        for i, (plan, columns) in enumerate(zip(trace.plans, trace.columns)):
            ours = sum_chunks(logp[sample == i], slot[sample == i], plan.chunk_active)
            theirs = trace.row("teacher_chunk_lp", i)[columns][plan.chunk_active]
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
