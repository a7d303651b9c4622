"""What `precompute.cost` and `student.flops` count, against what torch counts while the engine, the padded
layout and a training step really run; pairs of tiles against FlexAttention's own block masks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flops import flops_of
from small_runs import BLOCK, CODEC, MASK, SHARED, small_student, synthetic

from precompute.cost import Network, packed_cost, padded_cost, teacher_memory
from precompute.engine import Pace, Targets, ask_all
from precompute.inputs import Asking
from precompute.prepare import PrepareConfig
from precompute.trial import Lengths, invented, lay_out_all
from shards.codec import SparseCodec
from shards.noise import NoiseConfig
from student.attention import Coordinates, block_mask, dense_mask, one_row
from student.batch import collate
from student.flops import Work, step_flops
from student.forward import mask_argument
from student.fused import FusedLoss
from student.layout import ATTENTIONS, PAD, Attention, Piece, Stream, group, lay_out, pack
from student.memory import Shape
from student.objective import parse_objective
from student.pairs import TILE, computed_pairs
from student.run_attention import RUNS
from tools.benches.layouts import Sizes, choose, make_teacher, make_work

TOY: dict[str, Any] = {
    "layers": 3, "hidden": 48, "intermediate": 80, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 600,
    "samples": 3, "length": 96, "views": 2,
}  # fmt: skip
MOE = {"experts": 16, "experts_active": 4, "expert_intermediate": 16}
LENGTHS = Lengths(prompt=20, response=40, teacher_share=1.2)


def teacher_of(kind: str) -> tuple[Any, Attention]:
    sizes = Sizes(**TOY, **(MOE if kind == "moe" else {}))
    teacher = make_teacher(sizes, device=torch.device("cpu"), dtype=torch.float32)
    choose(teacher, "engine")
    return teacher, teacher.spec.attention


@pytest.mark.parametrize("teacher_kind", ["dense", "moe"])
@pytest.mark.parametrize("kind", ["shared", "cross"])
@pytest.mark.parametrize("compdemo", [True, False])
def test_the_engines_flops_are_those_that_run(teacher_kind: str, kind: Any, compdemo: bool) -> None:
    """To the last one: layers, attention over runs of tokens, head; last layer at the reads alone."""
    teacher, attention = teacher_of(teacher_kind)
    how = PrepareConfig(kind=kind, block_size=8, student_max_length=96, teacher_max_length=96)
    noise = NoiseConfig(views=2, compdemo=compdemo, unit="chunk" if kind == "cross" else "token")
    asking = Asking(
        mask_id=599, attention=attention, block_size=8, shifted=False, row_tokens=500, compdemo=compdemo
    )
    ready = lay_out_all(invented(LENGTHS, 4, how, vocab_size=590), noise, asking)
    targets = Targets(codec=None if kind == "cross" else SparseCodec(), vocab_size=590, head_rows=64)

    def run() -> None:
        ask_all(teacher, ready.samples, ready.jobs, asking=asking, targets=targets, pace=Pace(1, 64))

    rows = group((len(j.piece) for j in ready.jobs), asking.row_tokens)
    forwards = [[ready.jobs[i].piece for i in row] for row in rows]
    assert len(forwards) > 1
    cost = packed_cost(Network.of(teacher.model.config), forwards, attention, "runs")
    assert cost.flops == flops_of(run)
    assert cost.tokens == ready.teacher_tokens


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_padded_layouts_flops_are_those_that_run(kind: str) -> None:
    """Every pair, the head at every position, experts in a loop."""
    sizes = Sizes(**TOY, **(MOE if kind == "moe" else {}))
    teacher, attention = teacher_of(kind)
    how = PrepareConfig(kind="shared", block_size=32, student_max_length=96)
    work = make_work(sizes, invented(LENGTHS, 3, how, vocab_size=590), teacher)
    passes = 3 * 2 * 2  # samples, views, halves
    cost = padded_cost(Network.of(teacher.model.config), [96] * passes, attention)
    assert cost.flops == flops_of(lambda: work.padded(96))


def packed_pieces(attention: Attention, block_size: int, seed: int) -> list[Piece]:
    rng, pieces = np.random.default_rng(seed), []
    for n in rng.integers(50, 300, 5):
        ids = rng.integers(0, 9, n)
        streams = []
        for share in (0.1, 0.6):
            hidden = np.append(False, rng.random(n - 1) < share)
            streams.append(Stream(np.where(hidden, 99, ids), np.flatnonzero(hidden)))
        pieces.append(lay_out(ids, streams, attention=attention, block_size=block_size))
    return pieces


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("block_size", [5, 32])
def test_tiles_are_those_of_flex_attention(attention: Attention, block_size: int) -> None:
    """Of whole rows, and of the reads alone; all hold every allowed pair and no more than all."""
    row = pack(packed_pieces(attention, block_size, 0), 800)
    fill = ((0, 0), (0, -row.ids.shape[1] % TILE))
    at = Coordinates(
        torch.from_numpy(np.pad(row.sample, fill, constant_values=PAD)),
        *(torch.from_numpy(np.pad(x, fill)) for x in (row.stream, row.block, row.order)),
    )
    width = row.ids.shape[1]
    read = torch.from_numpy(row.read // width * at.sample.shape[1] + row.read % width)

    def tiles(queries: Coordinates, keys: Coordinates) -> int:
        made = block_mask(attention, queries, keys)
        return int(made.kv_num_blocks.sum() + made.full_kv_num_blocks.sum()) * TILE * TILE

    keys = one_row(at)
    assert computed_pairs("tiles", attention, at) == tiles(at, at)
    asked = Coordinates(*(x[:, read] for x in keys))
    assert computed_pairs("tiles", attention, at, read) == tiles(asked, keys)
    allowed, every = int(dense_mask(attention, at).sum()), computed_pairs("dense", attention, at)
    assert allowed <= computed_pairs("runs", attention, at) <= every
    assert allowed <= computed_pairs("tiles", attention, at) <= every
    with pytest.raises(ValueError, match="how must be one of"):
        computed_pairs("flex", attention, at)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_training_steps_flops_are_those_that_run(tied: bool, checkpointing: bool) -> None:
    """To the last one: forward, backward and the fused head; with checkpointing, layers twice."""
    model = small_student(tied=tied).train()
    model.set_attn_implementation(RUNS)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(
        synthetic("shared", 6),
        block_size=BLOCK,
        mask_token_id=MASK,
        row_tokens=200,
        shared_vocab_size=SHARED,
        temperatures=CODEC.temperatures,
    )
    loss = FusedLoss(parse_objective("tidal"))

    def run() -> None:
        model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            read=batch.read,
            loss_head=loss.about(batch, 0.5),
            use_cache=False,
            **mask_argument("staircase", batch.at, model),
        ).total.backward()

    shape, work = Shape.of(model.config), Work.of(batch, "runs")
    predicted = step_flops(shape, work, gradient_checkpointing=checkpointing)
    assert predicted.total == flops_of(run)
    assert predicted.forward < predicted.backward
    assert work.masked == len(batch.gold)


def test_memory_grows_with_what_is_in_it() -> None:
    """Weights are bytes times parameters; the layers' moment follows the tokens, the head's its rows."""
    config = teacher_of("dense")[0].model.config
    given: dict[str, Any] = {
        "parameters": 1000,
        "dtype": torch.bfloat16,
        "forward_tokens": 4096,
        "reads": 900,
    }
    small = teacher_memory(config, **given, head_rows=64)
    assert small.parts["weights"] == 2000
    assert small.peak == max(small.moments.values())
    more = teacher_memory(config, **{**given, "forward_tokens": 8192}, head_rows=64)
    assert more.parts["activations"] == 2 * small.parts["activations"]
    assert more.moments["head"] == small.moments["head"]
    assert teacher_memory(config, **given, head_rows=128).moments["head"] > small.moments["head"]


def test_experts_that_a_token_does_not_meet_cost_nothing() -> None:
    """Twice the experts, as many active ones: a router of twice the width is all that is added."""
    teacher, _ = teacher_of("moe")
    one = Network.of(teacher.model.config)
    config = teacher.model.config
    config.n_routed_experts *= 2
    two = Network.of(config)
    assert two.active - one.active == (len(one.mlps) - 1) * one.hidden * MOE["experts"]
    assert replace(one, mlps=two.mlps) == two
