"""Pretraining from nothing: it learns, however it attends, and equal seeds give equal weights."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from student.layout import Attention
from student.pretrain import PretrainConfig, TrainingText, pretrain

MASK = 15


def tiny() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            attn_implementation="sdpa",
        )
    )


def counting(n: int = 12) -> list[TrainingText]:
    """Sequences that count upwards modulo 14 from any start: each token follows from any other."""
    return [
        TrainingText(np.arange(i, i + n, dtype=np.int32) % 14, np.arange(n) >= 4)
        for i in range(14)
    ]  # fmt: skip


def config(**changes: object) -> PretrainConfig:
    settings = {
        "ar_steps": 60,
        "diffusion_steps": 60,
        "batch_size": 14,
        "block_size": 4,
        "learning_rate": 1e-2,
        "diffusion_learning_rate": 1e-2,
        "warmup": 5,
    }
    return PretrainConfig(**(settings | changes))


@pytest.mark.parametrize("attention", ["staircase", "bidirectional"])
def test_learns(attention: Attention) -> None:
    losses = pretrain(tiny(), counting(), config(attention=attention), mask_token_id=MASK)
    assert len(losses) == 120
    assert losses[0] > 2.5  # ln 16 = 2.77: it starts from chance
    assert np.mean(losses[50:60]) < 0.5
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[60:65])


def test_equal_seeds_give_equal_weights() -> None:
    runs = []
    for seed in (0, 0, 1):
        model = tiny()
        pretrain(model, counting(), config(ar_steps=3, diffusion_steps=3, seed=seed), mask_token_id=MASK)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_progress_tells_every_step() -> None:
    seen: list[tuple[int, int, str]] = []
    pretrain(
        tiny(),
        counting(),
        config(ar_steps=2, diffusion_steps=1),
        mask_token_id=MASK,
        progress=lambda *x: seen.append(x),
    )
    assert seen == [
        (1, 3, "autoregressive warm-up"),
        (2, 3, "autoregressive warm-up"),
        (3, 3, "masked diffusion"),
    ]
