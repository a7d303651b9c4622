"""The memory estimate against what there is: parameters, what autograd keeps, what optimisers keep."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from shards.errors import UsageError
from student.attention import Coordinates, attention_mask
from student.config import AdapterConfig
from student.memory import CARDS, Plan, Shape, estimate, fit, kept_bytes, optimiser_bytes, trained
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel
from tools import cli

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 300,
}
OTHER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 8,
    "vocab_size": 111,
}
SMALL = Shape(
    hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128, vocab=151936, tied=True
)
"""Qwen3-0.6B."""


def network(sizes: dict[str, int], tied: bool = True) -> A2DQwen3LMHeadModel:
    torch.manual_seed(0)
    config = A2DQwen3Config(
        **sizes, tie_word_embeddings=tied, max_position_embeddings=256, attn_implementation="sdpa"
    )
    return A2DQwen3LMHeadModel(config)


@pytest.mark.parametrize("sizes", [SIZES, OTHER])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_the_models(sizes: dict[str, int], tied: bool) -> None:
    model = network(sizes, tied)
    assert Shape.of(model.config).parameters == sum(p.numel() for p in model.parameters())
    assert SMALL.parameters == 596_049_920


def kept(model: A2DQwen3LMHeadModel, bf16: bool, rows: int, width: int) -> float:
    """Bytes per token of all storages that autograd holds after a forward pass, parameters left out."""
    ids = torch.randint(0, model.config.vocab_size, (rows, width))
    position = torch.arange(width).repeat(rows, 1)
    at = Coordinates(torch.zeros_like(ids), torch.ones_like(ids), position // 8, position)
    mask = attention_mask("staircase", at, model)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()} | {mask.untyped_storage().data_ptr()}
    held: list[Tensor] = []  # keeps storages alive, so that none is counted under another's address
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held.append(x)
        if x.untyped_storage().data_ptr() not in ours:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False)
    return sum(storages.values()) / (rows * width)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("sizes", [SIZES, OTHER])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(sizes: dict[str, int], bf16: bool, checkpointing: bool) -> None:
    """To the byte, with SDPA on a CPU; under autocast, where layers are not run twice, the bfloat16 copies of
    the weights are kept too, which the estimate lists on their own."""
    model = network(sizes).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shape = Shape.of(model.config)
    rows, width = 2, 128
    plan = Plan(bf16=bf16, gradient_checkpointing=checkpointing, flex=False)
    copies = 2 * shape.in_layers / (rows * width) if bf16 and not checkpointing else 0
    assert kept(model, bf16, rows, width) == kept_bytes(shape, plan, width) + copies


def test_optimiser_state_is_what_adamw_keeps() -> None:
    """Two float32 moments a parameter, a step count a tensor; LoRA's adapters are what is trained."""
    model = network(SIZES)
    shape = Shape.of(model.config)
    optimiser = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    state = [x for s in optimiser.state.values() for x in s.values() if x.numel() > 1]
    assert sum(x.numel() * x.element_size() for x in state) == optimiser_bytes(shape, Plan())
    peft = pytest.importorskip("peft")
    targets = list(AdapterConfig().targets)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets))
    assert trained(shape, AdapterConfig(rank=3)) == adapted.get_nb_trainable_parameters()[0]


def test_eight_bit_state_is_what_bitsandbytes_keeps() -> None:
    """To a thousandth: a look-up table of 256 entries per tensor is not counted."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(512, 1024))
    optimiser = bnb.optim.AdamW8bit([weight])
    weight.grad = torch.randn_like(weight)
    optimiser.step()
    state = [x for x in optimiser.state[weight].values() if isinstance(x, Tensor) and x.numel() != 256]
    each = sum(x.numel() * x.element_size() for x in state) / weight.numel()
    narrow = Plan(optimizer="adamw_bnb_8bit", eight_bit_embedding=True)
    assert optimiser_bytes(SMALL, narrow) / SMALL.parameters == pytest.approx(each, rel=1e-3)


def test_larger_cards_get_faster_settings() -> None:
    """Qwen3-0.6B is trained whole on every card named; what is given up goes in one order."""
    plan = Plan(optimizer="adamw_bnb_8bit")
    chosen = {card: fit(SMALL, card, plan) for card in CARDS}
    for card, (picked, needs) in chosen.items():
        assert needs.fits(card)
        assert needs.peak == max(needs.moments.values())
        assert picked.batch_tokens == plan.batch_tokens
    lean = [(p.eight_bit_embedding, p.gradient_checkpointing, p.accumulation) for p, _ in chosen.values()]
    assert [x[:2] for x in lean] == sorted((x[:2] for x in lean), reverse=True)
    assert lean[-1][:2] == (False, False)
    assert chosen[8][1].peak < 8e9
    with pytest.raises(UsageError, match=r"--vram 4: the leanest settings need .* GB of 4.3; use --lora 16"):
        fit(SMALL, 4, plan)
    fit(SMALL, 4, replace(plan, adapter=AdapterConfig()))
    assert fit(SMALL, 2.5, replace(plan, adapter=AdapterConfig(four_bit=True)))[1].peak < 2.6e9


def test_what_settings_do_to_memory() -> None:
    base = Plan(optimizer="adamw_bnb_8bit")

    def peak(**changes: object) -> float:
        return estimate(SMALL, replace(base, **changes)).peak  # type: ignore[arg-type]

    assert peak(gradient_checkpointing=True) < peak()
    assert peak(accumulation=2) < peak()
    assert peak(optimizer="adamw_torch", gradient_checkpointing=True) > peak(gradient_checkpointing=True)
    assert peak(world=2) < peak()
    assert peak(bf16=False) > peak()
    assert peak(adapter=AdapterConfig()) < peak()


def tide(capsys: pytest.CaptureFixture[str], *arguments: object) -> SimpleNamespace:
    before, sys.argv = sys.argv, ["tide", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return SimpleNamespace(code=ended.value.code, out=out, err=err)


def test_plan_train_needs_a_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No weights in the folder; parts, moments, settings and every assumption are shown and can be set."""
    A2DQwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    plain = tide(capsys, "plan", "train", "--student", tmp_path, "--vram", 8)
    assert plain.code == 0, plain.err
    for word in ("gradients", "in use at the end of backward", "eight_bit_embedding True", "context_gb 0.6"):
        assert word in plain.out
    said = tide(capsys, "plan", "train", "--student", tmp_path, "--vram", 12, "--context-gb", 1.6, "--json")
    result = json.loads(said.out)
    assert result["parameters"] == 596_049_920
    assert result["assumptions"]["context_gb"] == 1.6
    assert result["peak_bytes"] == max(result["moments"].values())
    refused = tide(capsys, "plan", "train", "--student", tmp_path, "--vram", 2)
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "use --lora 16" in refused.err
