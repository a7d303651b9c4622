"""Golden A_loss: every case and entry of the reference implementation's losses, value and gradient.

The reference computed whole padded batches; ours computes per position or chunk, so each test gathers the
masked positions (active chunks) and reduces with the objective's own mean; CE goes through the objective
itself. Gradients are taken with respect to the full logits, so positions that must not matter are checked to
get an exact zero.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from student.attention import Coordinates
from student.fused import fused_loss
from student.losses import chunks, divergence
from student.losses.ce import gold_log_probs, timestep_weight
from student.losses.sparse import classes
from student.objective import Objective, mean_over, parse_objective
from student.schedule import LambdaSchedule
from student.tensors import Batch, ChunkBatch, Counts, Dense, PositionBatch

GOLDEN = Path(os.environ.get("TIDE_GOLDEN", Path(__file__).parent / "golden"))  # as conftest's, at collection


def cases(kind: str) -> list[str]:
    return sorted(p.stem for p in (GOLDEN / "A_loss").glob(f"{kind}_*.json"))


def load(case: str) -> tuple[dict, dict[str, Tensor]]:
    manifest = json.loads((GOLDEN / "A_loss" / f"{case}.json").read_text())
    return manifest, load_file(GOLDEN / "A_loss" / f"{case}.safetensors")


def check(parity: Any, case: str, entry: dict, loss: Tensor, gradient: Tensor, golden: Tensor) -> None:
    """README tolerance: value 1e-5 (boundary 2e-2) of max(1, |loss|), gradient atol 1e-6 * max + rtol
    1e-4."""
    rtol = 2e-2 if "boundary" in case else 1e-5
    error = abs(loss.item() - entry["loss"]) / max(1.0, abs(entry["loss"]))
    assert error <= rtol, f"{entry} ours {loss.item()}"
    gradient = gradient[..., : golden.shape[-1]]
    atol = 1e-6 * golden.abs().max().item()
    if "equal" in case:  # student and teacher agree: the golden gradient is float32 rounding noise itself
        atol = 2e-8
    torch.testing.assert_close(gradient, golden, rtol=max(1e-4, rtol), atol=atol)
    if "equal" not in case:
        largest = golden.abs().max().clamp_min(1e-12)
        parity.note(case, loss=error, gradient=float((gradient - golden).abs().max() / largest))
    else:
        parity.note(case, loss=error)


def schedule_of(config: dict) -> tuple[LambdaSchedule, float]:
    schedule = LambdaSchedule(
        initial=config["lambda_init"],
        maximum=config["lambda_max"],
        decay=config["lambda_decay"],
        axes=config["axis_mode"],
    )
    return schedule, config["global_step"] / max(config["max_steps"], 1)


def t_weight(config: dict, t: Tensor) -> Tensor | None:
    return divergence.mid_range_weight(t) if config.get("timestep_weight") == "midrange" else None


def backward(loss: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


OURS = {
    "kl": "kl",
    "reverse_kl": "reverse-kl",
    "taid": "tidal",
    "alm": "calm",
    "reverse_alm": "reverse-calm",
    "alm_taid": "calm-tidal",
    "reverse_alm_taid": "reverse-calm-tidal",
}


def fused_gradient(objective: Objective, progress: float, batch: Batch, logits: Tensor, rows: int) -> Any:
    """Value and gradient of the fused form at logits [N, V], which are their own hidden states under a head
    that is the identity; `rows` rows at a time."""
    hidden = logits.detach().clone().requires_grad_()
    head = torch.nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
    head.weight = torch.nn.Parameter(torch.eye(logits.shape[-1]), requires_grad=False)
    out = fused_loss(objective, batch, progress, hidden, head, rows * 4 * logits.shape[-1])
    return out, *torch.autograd.grad(out.total, hidden)


def batch_of(
    gold: Tensor, view: Tensor, t: Tensor, maskable: Tensor, counts: Counts, **targets: Any
) -> Batch:
    none = torch.zeros(0, dtype=torch.long)
    at = Coordinates(none, none, none, none)
    return Batch(none, none, at, none, gold, view, t, maskable, counts, **targets)


def distilling(entry: dict, **settings: Any) -> tuple[Objective, float] | None:
    """The entry's loss alone, without CE, and the training progress it is taken at. None where the reference
    went past the last step to a lambda above 1, which an objective never does."""
    config = entry["config"]
    schedule, progress = schedule_of(config) if "taid" in entry["mode"] else (LambdaSchedule(), 0.0)
    if progress > 1 and schedule.axes != "timestep_only":
        there = schedule.train(progress)
        if there > 1:
            return None
        schedule = LambdaSchedule(initial=there, maximum=there, axes=schedule.axes)
    settings |= {
        "schedule": schedule,
        "timestep_weighting": "mid-range" if config.get("timestep_weight") == "midrange" else "uniform",
    }
    return parse_objective(OURS[entry["mode"]], ce_weight=0.0, **settings), progress


@pytest.mark.parametrize("rows", [3, 10_000])
@pytest.mark.parametrize("case", cases("logit"))
def test_fused_position_losses(case: str, rows: int, parity: Any) -> None:
    """As `test_position_losses`, through the objective and the fused head; entries with weights per position,
    which no batch carries, are left to the plain form."""
    manifest, x = load(case)
    masked = x["masked_mask"].bool()
    t = x["t"][:, None].expand(masked.shape)[masked]
    n = int(masked.sum())
    view = masked.nonzero()[:, 0]
    compared = 0
    for entry in manifest["entries"]:
        config = entry["config"]
        aim = distilling(entry, temperature=config["temperature"])
        if config.get("entropy_weights") or aim is None:
            continue
        compared += 1
        cut = config["shared_vocab_size"] or x["teacher_logits"].shape[-1]
        target = Dense(x["teacher_logits"][masked][:, :cut])
        at = PositionBatch(torch.arange(n), t, torch.zeros(n), target, cut)
        gold = torch.zeros(n, dtype=torch.long)
        batch = batch_of(gold, view, x["t"], masked.sum(1), Counts(distilled=n), positions=at)
        out, of_rows = fused_gradient(*aim, batch, x["student_logits"][masked], rows)
        gradient = torch.zeros_like(x["student_logits"])
        gradient[masked] = of_rows
        check(parity["A_loss, fused"], case, entry, out.total, gradient, x[entry["grad"]])
    assert compared


@pytest.mark.parametrize("case", cases("logit"))
def test_position_losses(case: str, parity: Any) -> None:
    """KL, reverse KL and TIDAL on dense targets, cut to the shared vocabulary, at masked positions."""
    manifest, x = load(case)
    masked = x["masked_mask"].bool()
    t = x["t"][:, None].expand(masked.shape)[masked]
    for entry in manifest["entries"]:
        config = entry["config"]
        cut, T = config["shared_vocab_size"], config["temperature"]
        logits = x["student_logits"].clone().requires_grad_()
        both = classes(logits[masked][:, :cut], Dense(x["teacher_logits"][masked][:, :cut]), T)
        weight = None
        if entry["mode"] == "taid":
            schedule, progress = schedule_of(config)
            values = divergence.tidal(*both, T, schedule.at(progress, t))
            weight = t_weight(config, t)
            if config["entropy_weights"]:
                extra = x["entropy_weights"][masked]
                weight = extra if weight is None else weight * extra
        else:
            values = {"kl": divergence.kl, "reverse_kl": divergence.reverse_kl}[entry["mode"]](*both, T)
        loss = mean_over(int(masked.sum()), values, weight)
        check(parity["A_loss"], case, entry, loss, backward(loss, logits), x[entry["grad"]])


def spans(x: dict[str, Tensor], active: Tensor) -> tuple[Tensor, Tensor]:
    """(flat student token, active chunk) of every token of every active chunk."""
    batch, token, column = x["alignment_matrix_student"].nonzero(as_tuple=True)
    number = active.flatten().cumsum(0).reshape(active.shape) - 1
    inside = active[batch, column]
    flat = batch * active.new_tensor(x["student_logits"].shape[1], dtype=torch.long) + token
    return flat[inside], number[batch, column][inside]


def calm_loss(mode: str, student: Tensor, teacher: Tensor, lambda_t: Tensor, T: float, clamp) -> Tensor:
    if mode == "alm":
        return chunks.calm(student, teacher, T, clamp=clamp)
    if mode == "reverse_alm":
        return chunks.reverse_calm(student, teacher, T, clamp=clamp)
    if mode == "alm_taid":
        return chunks.calm_tidal(student, teacher, T, lambda_t, clamp=clamp)
    return chunks.reverse_calm_tidal(student, teacher, T, lambda_t, clamp=clamp)


def unclamped(student: Tensor, teacher: Tensor, T: float) -> bool:
    """The reference's clamps change nothing: every p and 1 - p, also in float32, is well inside them."""
    p = torch.cat([student, teacher]).div(T).exp()
    return bool(((p > 1e-6) & (p < 1 - 1e-4)).all())


@pytest.mark.parametrize("clamp", ["reference", "log"])
@pytest.mark.parametrize("case", cases("alm"))
def test_chunk_losses(case: str, clamp: chunks.Clamp, parity: Any) -> None:
    """The CALM family; the default log-space form wherever the reference's clamps do nothing."""
    manifest, x = load(case)
    active = x["chunk_mask"].bool()
    token, chunk = spans(x, active)
    n = int(active.sum())
    t = x["t"][:, None].expand(active.shape)[active]
    compared = 0
    for entry in manifest["entries"]:
        config = entry["config"]
        T = config["temperature"]
        logits = x["student_logits"].clone().requires_grad_()
        logp = gold_log_probs(logits.flatten(0, 1), x["student_input_ids"].flatten())
        student = chunks.chunk_log_probs(logp[token], chunk, n)
        teacher = x["teacher_chunk_lp"][active]
        torch.testing.assert_close(student, x["student_chunk_lp"][active], rtol=1e-5, atol=1e-5)
        if clamp == "log" and not unclamped(student, teacher, T):
            continue
        compared += 1
        lambda_t = torch.zeros_like(t)
        if "taid" in entry["mode"]:
            schedule, progress = schedule_of(config)
            assert schedule.train(progress) == pytest.approx(entry["lambda_train"])
            torch.testing.assert_close(
                schedule.at(progress, x["t"]), torch.tensor(entry["lambda_t"]), rtol=1e-5, atol=1e-7
            )
            lambda_t = schedule.at(progress, t)
        weight = t_weight(config, t)
        if config.get("chunk_weights"):
            weight = x[config["chunk_weights"]][active]
        loss = mean_over(n, calm_loss(entry["mode"], student, teacher, lambda_t, T, clamp), weight)
        part = parity["A_loss" if clamp == "reference" else "A_loss, log clamp"]
        check(part, case, entry, loss, backward(loss, logits), x[entry["grad"]])
    assert compared == len(manifest["entries"]) or clamp == "log"
    assert compared >= 0.9 * len(manifest["entries"]) or "normal" not in case


@pytest.mark.parametrize("rows", [3, 10_000])
@pytest.mark.parametrize("case", cases("alm"))
def test_fused_chunk_losses(case: str, rows: int, parity: Any) -> None:
    """As `test_chunk_losses` with the reference's clamp, through the objective and the fused head; every
    position is read, those of no active chunk too. Entries with weights per chunk are left to the plain
    form."""
    manifest, x = load(case)
    active = x["chunk_mask"].bool()
    token, chunk = spans(x, active)
    logits = x["student_logits"].flatten(0, 1)
    samples, length = x["student_logits"].shape[:2]
    view = torch.arange(samples).repeat_interleave(length)
    at = ChunkBatch(token, chunk, x["teacher_chunk_lp"][active], x["t"][:, None].expand(active.shape)[active])
    counts = Counts(chunks=len(at.logp))
    gold = x["student_input_ids"].flatten()
    batch = batch_of(gold, view, x["t"], torch.full((samples,), length), counts, chunks=at)
    compared = 0
    for entry in manifest["entries"]:
        aim = distilling(entry, chunk_temperature=entry["config"]["temperature"], clamp="reference")
        if entry["config"].get("chunk_weights") or aim is None:
            continue
        compared += 1
        out, of_rows = fused_gradient(*aim, batch, logits, rows)
        gradient = of_rows.reshape(x["student_logits"].shape)
        check(parity["A_loss, fused"], case, entry, out.total, gradient, x[entry["grad"]])
    assert compared


@pytest.mark.parametrize("case", [c for c in cases("alm") if "saturated" in c or "boundary" in c])
def test_no_gradient_is_dead(case: str) -> None:
    """Chunks to which the reference recorded a gradient of exactly 0, because p is clamped: in log space
    every one of them has a finite gradient with respect to its log-prob, and a nonzero one unless the loss is
    flat there: a reversed loss is proportional to p, which float32 does not have below exp(-80).

    With respect to the logits it may vanish all the same, where the softmax itself is exactly one-hot.
    """
    manifest, x = load(case)
    active = x["chunk_mask"].bool()
    token, chunk = spans(x, active)
    n = int(active.sum())
    t = x["t"][:, None].expand(active.shape)[active]
    teacher = x["teacher_chunk_lp"][active]
    dead = 0
    for entry in manifest["entries"]:
        T = entry["config"]["temperature"]
        recorded = x[entry["grad"]].flatten(0, 1)[token].abs().amax(-1)
        silent = torch.zeros(n).scatter_reduce(0, chunk, recorded, "amax") == 0
        logits = x["student_logits"].clone().requires_grad_()
        logp = gold_log_probs(logits.flatten(0, 1), x["student_input_ids"].flatten())
        student = chunks.chunk_log_probs(logp[token], chunk, n)
        lambda_t = torch.zeros_like(t)
        if "taid" in entry["mode"]:
            schedule, progress = schedule_of(entry["config"])
            lambda_t = schedule.at(progress, t)
        loss = calm_loss(entry["mode"], student, teacher, lambda_t, T, "log").sum()
        of_chunks, of_logits = torch.autograd.grad(loss, (student, logits))
        assert of_logits.isfinite().all()
        assert of_chunks.isfinite().all()
        flat = student.detach() / T < -80 if "reverse" in entry["mode"] else torch.zeros_like(silent)
        assert (of_chunks[silent & ~flat] != 0).all(), entry["mode"]
        dead += int((silent & ~flat).sum())
    assert dead >= len(manifest["entries"]), "the case no longer reaches the clamps"


@pytest.mark.parametrize("case", cases("ce"))
def test_cross_entropy(case: str, parity: Any) -> None:
    """Both noise schedules' weights, and the three normalisations over maskable (not masked) tokens."""
    manifest, x = load(case)
    maskable = (x["labels"] != -100).sum(1)
    for schedule in {e["scheduler"] for e in manifest["entries"]}:
        torch.testing.assert_close(
            timestep_weight(x["t"], schedule), x[f"weight.{schedule}"], rtol=1e-6, atol=0
        )
    counts = Counts(views=len(maskable), maskable=int(maskable.sum()))
    for entry in manifest["entries"]:
        masked = x[entry["masked_mask"]].bool()
        batch = batch_of(x["input_ids"][masked], masked.nonzero()[:, 0], x["t"], maskable, counts)
        objective = Objective(
            ce_weighting=entry["loss_weight_type"],
            ce_schedule=entry["scheduler"],
            ce_normalisation=entry["loss_norm_type"],
        )
        logits = x["student_logits"].clone().requires_grad_()
        loss = objective(logits[masked], batch, 0.0).total
        check(parity["A_loss"], case, entry, loss, backward(loss, logits), x[entry["grad"]])
        for rows in (3, 10_000):
            out, of_rows = fused_gradient(objective, 0.0, batch, logits[masked], rows)
            gradient = torch.zeros_like(logits)
            gradient[masked] = of_rows
            check(parity["A_loss, fused"], case, entry, out.total, gradient, x[entry["grad"]])


def test_every_case_is_covered() -> None:
    folder: Path = GOLDEN / "A_loss"
    names = {p.stem for p in folder.glob("*.json")}
    assert names
    assert names == {*cases("logit"), *cases("alm"), *cases("ce")}
