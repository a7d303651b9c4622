"""The attention predicate against the reference's masks (golden B_masks, and those of the student's recorded
forwards).

Coordinates are the plain layout's: both streams whole, side by side, in either order. Equality is exact.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from student.attention import Coordinates, dense_mask, may_attend


def side_by_side(length: int, block: int, order: str) -> Coordinates:
    """[2 * length] coordinates of one sample: noisy stream 1 and clean stream 0, concatenated."""
    position = torch.arange(length).repeat(2)
    first, second = (1, 0) if order == "xt_x0" else (0, 1)
    stream = torch.tensor([first] * length + [second] * length)
    return Coordinates(torch.zeros_like(position), stream, position // block, position)


def rule(at: Coordinates) -> torch.Tensor:
    return may_attend(
        "staircase", Coordinates(*(x[:, None] for x in at)), Coordinates(*(x[None] for x in at))
    )


def test_every_recorded_mask(golden: Path) -> None:
    masks = load_file(golden / "B_masks" / "bd3lm_masks.safetensors")
    assert masks
    for name, expected in masks.items():
        found = re.fullmatch(r"mask\.n(\d+)\.b(\d+)\.(xt_x0|x0_xt)", name)
        assert found, name
        ours = rule(side_by_side(int(found[1]), int(found[2]), found[3]))
        assert torch.equal(ours, expected.bool()), name


def test_masks_of_recorded_student_forwards(trace: Any) -> None:
    allowed = torch.from_numpy(trace.tensors["student_in.attention_allowed"]).bool()
    assert torch.equal(rule(side_by_side(len(allowed) // 2, trace.meta["block_size"], "xt_x0")), allowed)


def test_padding_attends_to_padding_alone() -> None:
    """No row of a packed mask is empty (a softmax over nothing is NaN), and no sample sees another or a
    pad."""
    sample = torch.tensor([[0, 0, 1, -1, -1]])
    zero = torch.zeros_like(sample)
    mask = dense_mask("staircase", Coordinates(sample, zero, zero, torch.arange(5)[None]))[0, 0]
    assert torch.equal(mask, sample[0][:, None] == sample[0][None])
