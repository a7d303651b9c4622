"""The recorded end-to-end traces, student side: rows -> packed batch -> student -> objective, against the
reference's losses and embedding gradients.

What the teacher said is taken from the trace and stored whole (dense targets, float32 chunk log-probs), so
our offline step must equal the reference's online one. The reference ran [xt, x0] padded; here rows are
packed and cut.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shards.row import ChunkTargets, DenseTarget, PositionTargets, Row
from student.attention import attention_mask
from student.batch import collate
from student.model import A2DQwen3LMHeadModel
from student.objective import parse_objective
from student.schedule import LambdaSchedule

TRACES = Path(os.environ.get("TIDE_GOLDEN", Path(__file__).parent / "golden")) / "D_trace"
CASES = [(p.stem, mode) for p in sorted(TRACES.glob("*.json")) for mode in range(4)]
OURS = {
    "kl": "kl",
    "reverse_kl": "reverse-kl",
    "taid": "tidal",
    "alm": "calm",
    "reverse_alm": "reverse-calm",
    "alm_taid": "calm-tidal",
    "reverse_alm_taid": "reverse-calm-tidal",
}
I32 = np.int32


@cache
def student() -> A2DQwen3LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(TRACES / "models" / "student", dtype=torch.float32)


def spans(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of every chunk column of an alignment matrix [l, n_c]."""
    length = matrix.sum(axis=0)
    return matrix.argmax(axis=0), length


def rows_of(trace: dict[str, np.ndarray], meta: dict[str, Any]) -> list[Row]:
    shared, block = meta["config"]["shared_vocab_size"], meta["block_size"]
    rows = []
    for i, ids in enumerate(trace["batch.input_ids"]):
        maskable, masked = trace["maskable_mask"][i].astype(bool), trace["masked_mask"][i].astype(bool)
        length = (int(np.flatnonzero(maskable)[-1]) // block + 1) * block if maskable.any() else len(ids)
        positions = chunks = None
        if meta["pipeline"] == "B":
            at = np.flatnonzero(masked)
            column = at
            if meta["aligned"]:
                pairs = trace["kl_mask"][i].astype(bool)
                at, column = trace["batch.align_student"][i][pairs], trace["batch.align_teacher"][i][pairs]
            logits = torch.from_numpy(trace["teacher_logits"][i][column, :shared])
            logp = logits.log_softmax(-1).numpy()
            gold = np.where(
                ids[at] < shared, np.take_along_axis(logp, ids[at, None] % shared, 1)[:, 0], np.nan
            )
            none = np.zeros(len(at), dtype=bool)
            positions = PositionTargets(at.astype(I32), none, gold.astype(np.float32), DenseTarget(logp))
        else:
            start, size = spans(trace["batch.alignment_matrix_student"][i])
            teacher_size = spans(trace["batch.alignment_matrix_teacher"][i])[1]
            active = trace["active_chunk_mask"][i].astype(bool)
            chunks = ChunkTargets(
                start=start.astype(I32),
                length=size.astype(I32),
                teacher_length=teacher_size.astype(I32),
                masked=trace["chunk_has_masked"][i].astype(bool),
                active=active,
                half_a=np.zeros(len(start), dtype=bool),
                logp=trace["teacher_chunk_lp"][i][active],
            )
        rows.append(
            Row(
                sample_id=str(i),
                view=0,
                split="train",
                t=float(trace["t"][i]),
                input_ids=ids[:length].astype(I32),
                real_length=length,
                content_bytes=1,
                maskable=maskable[:length],
                masked=masked[:length],
                positions=positions,
                chunks=chunks,
            )
        )
    return rows


@pytest.mark.parametrize(("case", "mode"), CASES)
def test_loss_and_gradient(case: str, mode: int) -> None:
    meta = json.loads((TRACES / f"{case}.json").read_text())
    if mode >= len(meta["entries"]):
        pytest.skip("fewer modes in this trace")
    trace = {k: v.numpy() for k, v in load_file(TRACES / f"{case}.safetensors").items()}
    entry, config = meta["entries"][mode], meta["config"]
    names = [OURS[part.removesuffix("_aligned")] for part in entry["mode"].split("+")]
    objective = parse_objective(
        "+".join(names),
        temperature=config["kl_temperature"],
        chunk_temperature=config["alm_temperature"],
        schedule=LambdaSchedule(
            initial=config["taid_lambda_init"],
            maximum=config["taid_lambda_max"],
            decay=config["taid_lambda_decay"],
            axes=config["taid_axis_mode"],
        ),
        timestep_weighting={"midrange": "mid-range"}.get(config["taid_timestep_weight"], "uniform"),
        ce_weighting=config["loss_weight_type"],
        ce_normalisation=config["loss_norm_type"],
        clamp="reference",
    )
    rows = rows_of(trace, meta)
    batch = collate(
        rows,
        block_size=meta["block_size"],
        mask_token_id=meta["student_mask_token_id"],
        row_tokens=48,  # several packed rows, more than one sample in some
        shared_vocab_size=config["shared_vocab_size"] if meta["pipeline"] == "B" else None,
    )
    model = student()
    model.zero_grad()
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=attention_mask("staircase", batch.at, model.config._attn_implementation),
        read=batch.read,
    ).logits
    loss = objective(logits, batch, meta["global_step"] / max(1, meta["max_steps"]))
    loss.total.backward()
    assert loss.terms["ce"].item() == pytest.approx(entry["ce_loss"], rel=1e-5)
    assert loss.total.item() == pytest.approx(entry["loss"], rel=1e-5)
    expected = torch.from_numpy(trace[f"grad.embed.{mode}"])
    grad = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
