"""The fused loss inside a real student: tied and untied heads, adapters, compilation, sharding, two ranks.

Each is compared with the same student, same batch, plain logits and autograd, unwrapped.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from gloo import run_ranks
from small_runs import BLOCK, MASK, SHARED, VOCAB, small_student
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from shards.codec import SparseCodec
from shards.noise import NoiseConfig
from shards.row import Row
from shards.synthetic import endless, synthetic_rows
from student.attention import attention_mask
from student.batch import collate, counts_of
from student.config import TrainConfig
from student.fused import FusedLoss
from student.loop import METRICS, TideTrainer
from student.model import load_student
from student.objective import parse_objective
from student.tensors import Batch, LossOut

OBJECTIVE = parse_objective("tidal+reverse-calm:0.5")
FEW = 4 * VOCAB * 7
"""Bytes of seven rows of logits: several chunks a batch."""


def make_rows(n: int = 8) -> list[Row]:
    return list(
        synthetic_rows(
            0, n, kind="shared", noise=NoiseConfig(views=1), codec=SparseCodec(cap=12), max_length=40
        )
    )


def make_batch(rows: list[Row], **kwargs: Any) -> Batch:
    return collate(
        rows,
        block_size=BLOCK,
        mask_token_id=MASK,
        row_tokens=64,
        shared_vocab_size=SHARED,
        temperatures=(1.0, 2.0),
        **kwargs,
    )


def run(model: Any, batch: Batch, *, network: Any = None, head: FusedLoss | None = None) -> LossOut:
    """The loss of a batch: with `head` made inside forward, without one the plain form."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": attention_mask("staircase", batch.at, network or model),
        "read": batch.read,
        "use_cache": False,
    }
    if head is None:
        return OBJECTIVE(model(**inputs).logits, batch, 0.4)
    return model(**inputs, loss_head=head.about(batch, 0.4))


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(plain: Any, ours: Any, batch: Batch, network: Any = None) -> None:
    """Loss, terms and every gradient of one step."""
    want, got = (
        run(plain, batch),
        run(ours, batch, network=network, head=FusedLoss(OBJECTIVE, logits_bytes=FEW)),
    )
    torch.testing.assert_close(got.total, want.total, rtol=1e-5, atol=0)
    for name, value in want.terms.items():
        torch.testing.assert_close(got.terms[name], value, rtol=1e-5, atol=1e-7)
    want.total.backward()
    got.total.backward()
    expected, found = gradients(plain), gradients(network or ours)
    assert len(expected) > 0
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        close(found[name], g, name)


def close(ours: Tensor, theirs: Tensor, name: str, rtol: float = 1e-5) -> None:
    atol = rtol * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embedding_and_head(tied: bool) -> None:
    """Tied: what the embedding gets as input and as head adds up in one gradient."""
    model = small_student(tied=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same_step(model, copy.deepcopy(model), make_batch(make_rows()))


def test_frozen_head_and_frozen_body() -> None:
    for part in ("lm_head", "model"):
        model = small_student(tied=False)
        getattr(model, part).requires_grad_(False)
        ours = copy.deepcopy(model)
        assert_same_step(model, ours, make_batch(make_rows()))
        assert all(p.grad is None for p in getattr(ours, part).parameters())


def test_gradient_checkpointing() -> None:
    model = small_student()
    ours = copy.deepcopy(model)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(model.train(), ours.train(), make_batch(make_rows()))


def test_micro_batches_add_up() -> None:
    """Four micro-batches, two of them without a row: gradients are those of the whole."""
    rows = make_rows()
    whole, parts = small_student(), small_student()
    run(whole, make_batch(rows)).total.backward()
    head, counts = FusedLoss(OBJECTIVE, logits_bytes=FEW), counts_of(rows, BLOCK)
    for some in (rows[:3], [], rows[3:], []):
        run(parts, make_batch(some, counts=counts), head=head).total.backward()
    for name, g in gradients(whole).items():
        close(gradients(parts)[name], g, name)


@pytest.mark.parametrize("where", ["body", "head", "saved head"])
def test_adapters(where: str) -> None:
    """LoRA on the body alone (the head's gradient is not even made), on the head, and a head trained whole
    beside it (`modules_to_save`)."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", *(["lm_head"] if where == "head" else [])]
    saved = ["lm_head"] if where == "saved head" else None
    config = peft.LoraConfig(
        r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(small_student(tied=False), config)
    ours = copy.deepcopy(model)
    batch = make_batch(make_rows())
    assert_same_step(model, ours, batch, network=ours)
    names = [name for name in gradients(ours) if "lm_head" in name]
    assert len(names) == {"body": 0, "head": 2, "saved head": 1}[where]


def test_an_adapted_head_under_autocast() -> None:
    """Products in bfloat16, sums in float32: gradients of the adapter as the plain form's, to bfloat16."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(small_student(tied=False), config)
    ours, batch = copy.deepcopy(model), make_batch(make_rows())
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, batch).total
        got = run(ours, batch, head=FusedLoss(OBJECTIVE, logits_bytes=FEW)).total
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    want.backward()
    got.backward()
    assert len(gradients(ours)) == 2
    for name, g in gradients(model).items():
        close(gradients(ours)[name], g, name, 3e-2)


def test_compiled() -> None:
    """It runs, is right, and a second batch of the same shape compiles nothing anew."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = small_student()
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, backend=counter)
    batch = make_batch(make_rows())
    assert_same_step(model, compiled, batch, network=ours)
    head = FusedLoss(OBJECTIVE, logits_bytes=FEW)
    run(compiled, batch, network=ours, head=head)
    before = counter.frame_count
    assert before > 0
    for _ in range(3):
        run(compiled, make_batch(make_rows()), network=ours, head=head)
    assert counter.frame_count == before


# two processes


def sharded(out: str, tied: bool, mixed: bool) -> None:
    """FSDP2, layers and root sharded; embedding, norm and head belong to the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.distributed.init_process_group("gloo")
    model = small_student(tied=tied)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = make_rows()
    batch = make_batch(rows[rank::world], counts=counts_of(rows, BLOCK))
    head = FusedLoss(OBJECTIVE, logits_bytes=FEW)
    for _ in range(2):  # a second step finds its parameters sharded again
        model.zero_grad()
        loss = run(model, batch, head=head)
        (loss.total * world).backward()
    total = loss.total.detach().clone()
    torch.distributed.all_reduce(total)
    found = {name: g.full_tensor() for name, g in gradients(model).items()}
    if rank == 0:
        torch.save({"total": total, "gradients": found}, out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("tied", "mixed"), [(True, False), (False, False), (True, True)])
def test_sharded_weights(tied: bool, mixed: bool, tmp_path: Path) -> None:
    """Loss and gradients of two ranks with sharded weights against one process with whole ones."""
    run_ranks(sharded, str(tmp_path / "out"), tied, mixed)
    got = torch.load(tmp_path / "out")
    model = small_student(tied=tied)
    want = run(model, make_batch(make_rows()))
    want.total.backward()
    rtol = 1e-1 if mixed else 1e-5
    torch.testing.assert_close(got["total"], want.total.detach(), rtol=1e-2 if mixed else 1e-5, atol=0)
    assert got["gradients"].keys() == gradients(model).keys()
    for name, g in gradients(model).items():
        close(got["gradients"][name], g, name, rtol)


def train(folder: str, out: str, accumulation: int) -> None:
    """The whole trainer, on as many ranks as there are; rank 0 leaves the weights."""
    torch.manual_seed(0)
    model, tokenizer = load_student(folder, attention="sdpa")
    config = TrainConfig(
        steps=4, batch_tokens=300, row_tokens=64, learning_rate=3e-3, log_every=1, accumulation=accumulation
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    trainer = TideTrainer(
        model,
        tokenizer,
        OBJECTIVE,
        config,
        endless(make_rows(24)),
        Path(out),
        block_size=BLOCK,
        mask_token_id=MASK,
        shared_vocab_size=SHARED,
        temperatures=(1.0, 2.0),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({name: p.detach() for name, p in model.named_parameters()}, Path(out) / "weights")


def test_two_processes_train_as_one(student_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """DDP over gloo: the same global batches dealt to two ranks, two micro-batches each, end in the weights
    of one process with one batch; the steps are far larger than the difference."""
    folder, one, two = str(tmp_path / "start"), tmp_path / "one", tmp_path / "two"
    small_student().save_pretrained(folder)
    student_tokenizer.save_pretrained(folder)
    run_ranks(train, folder, str(two), 2)
    run_ranks(train, folder, str(one), 1, world=1)
    want, got = torch.load(one / "weights"), torch.load(two / "weights")
    start, _ = load_student(folder)
    assert want.keys() == got.keys()
    moved = max(float((p.detach() - want[name]).abs().max()) for name, p in start.named_parameters())
    assert moved > 1e-3
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    np.testing.assert_allclose(logged(two), logged(one), rtol=1e-6)


def logged(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / METRICS).read_text().splitlines()]
