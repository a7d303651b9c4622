"""`tide bench train` at toy sizes: its keys, and that the sides do the same work. Times are not looked at.

The padded sides are written apart from the packed step and from `Objective`, so that both stand for the
reference's: here they are compared with them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from student.objective import parse_objective
from student.tensors import Dense
from tools.benches import train as bench_train
from tools.benches import train_sides
from tools.benches.loss_memory import compare_losses
from tools.benches.train_rows import Setting, Shape, make_model, make_rows, write_rows

STUDENT = Shape(vocab=4000, hidden=32, mlp=48, layers=2, heads=2, kv_heads=1, head_dim=16)
TEACHER = Shape(vocab=4000, hidden=64, mlp=96, layers=3, heads=4, kv_heads=2, head_dim=16, tied=False)
SETTING = Setting(rows=5, batch=2, length=128)


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return bench_train.measure(SETTING, STUDENT, TEACHER, repeats=1)


@pytest.fixture
def sides(tmp_path: Path) -> train_sides.Sides:
    rows = make_rows(SETTING, STUDENT.vocab)
    dataset = write_rows(rows, SETTING, STUDENT.vocab, tmp_path / "data")
    student, teacher = (make_model(shape, "cpu") for shape in (STUDENT, TEACHER))
    return train_sides.Sides(student, teacher, rows, dataset, SETTING)


def test_ce_is_the_padded_forms(run: dict[str, Any]) -> None:
    assert run["equal"]["relative"] < 1e-5
    assert run["equal"]["ce_ours"] > 0


def test_figures(run: dict[str, Any]) -> None:
    assert {f"ratio_{n}{c}" for n in ("online", "sft", "sft_fair") for c in ("", "_cpu")} <= run.keys()
    sides = run["sides"]
    tokens = {name: side["tokens_per_step"] for name, side in sides.items()}
    assert tokens["ours"] < tokens["fair"] <= tokens["sft"] == tokens["online"] == 2 * 128 * 5 / 3
    assert [sides[name]["steps"] for name in ("online", "sft", "fair", "ours")] == [1, 3, 3, 3]
    assert 0 < sides["ours"]["data_wait"] < 1
    assert run["sizes"]["teacher_parameters"] > run["sizes"]["student_parameters"]


def test_without_a_teacher() -> None:
    made = bench_train.measure(SETTING, STUDENT, None, repeats=1)
    assert "online" not in made["sides"]
    assert "ratio_online" not in made


def test_default_teachers_are_13_times_the_student() -> None:
    for pair in bench_train.PAIRS.values():
        shapes = [Shape(**dict(zip(bench_train.FIELDS, values))) for values in pair]
        with torch.device("meta"):
            small, large = (sum(p.numel() for p in make_model(s, "meta").parameters()) for s in shapes)
        assert 13 <= large / small < 14


def test_all_rows_are_trained_on_once_a_pass(sides: train_sides.Sides) -> None:
    """What `ours` reads from disk are the rows that the padded sides have in memory."""
    read = [name.removesuffix("/0") for batch in sides.packed() for name in batch.rows]
    assert sorted(read) == sorted(row.sample_id for row in sides.rows)


def test_padded_gradients_are_ours(sides: train_sides.Sides) -> None:
    """CE alone, every weight."""
    sides.fused.objective = parse_objective("ce")
    rows = sides.rows[:2]
    weights = list(sides.student.parameters())
    padded = torch.autograd.grad(sides.padded_loss(rows, SETTING.length), weights)
    ours = torch.autograd.grad(sides.packed_loss(sides.collate(rows)).total, weights)
    for a, b in zip(ours, padded):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_online_loss_is_the_objective_on_dense_targets(
    sides: train_sides.Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's two passes, combined as CompDemo says, make the targets of our plain objective."""
    rows = sides.rows[2:4]
    said: list[torch.Tensor] = []
    dense = train_sides.dense_tidal

    def keep(student: torch.Tensor, teacher: torch.Tensor, *args: Any) -> torch.Tensor:
        said.append(teacher)
        return dense(student, teacher, *args)

    monkeypatch.setattr(train_sides, "dense_tidal", keep)
    online = sides.online_loss(rows)
    batch = sides.collate(rows)
    assert batch.positions is not None
    batch = replace(batch, positions=replace(batch.positions, target=Dense(said[0])))
    total = sides.packed_loss(batch).total
    torch.testing.assert_close(total, online, rtol=1e-5, atol=0)


def test_losses_agree_and_the_fused_one_needs_less() -> None:
    made = compare_losses("cpu", positions=256, hidden=32, vocab=20000)
    losses = made["loss_memory"]["loss"]
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-5)
    assert made["loss_memory_ratio"] > 1.5


def test_command(tide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toys = tuple(tuple(getattr(s, f) for f in bench_train.FIELDS) for s in (STUDENT, TEACHER))
    monkeypatch.setitem(bench_train.PAIRS, "tiny", toys)
    made = tide("bench", "train", "--rows", "3", "--batch", "3", "--repeats", "1", "--json")
    assert made.code == 0
    assert '"ratio_online"' in made.out
    refused = tide("bench", "train", "--size", "huge")
    assert refused.code == 2
    assert "huge" in refused.err
