"""`tide bench generate`: our sampler against two plain ones and an autoregressive model (paper, Table 3).

Weights are random: cost does not depend on them. The plain samplers are (i) the reference's way, which
computes the prefix's keys again for every block and copies the whole cache at every denoising step, and (ii)
one without a cache, which runs the whole sequence at every step. All three must write the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from shards.errors import UsageError
from tools.console import Output, Progress
from tools.options import Json, numbers, opt
from tools.tables import Column, Table

if TYPE_CHECKING:
    from student.sampler_config import SamplerConfig

FIELDS = ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "mlp")
SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(zip(FIELDS, (2048, 128, 4, 4, 2, 32, 256))),
    "0.6b": dict(zip(FIELDS, (151936, 1024, 28, 16, 8, 128, 3072))),
    "8b": dict(zip(FIELDS, (151936, 4096, 36, 32, 8, 128, 12288))),
}
"""Qwen3 structures: a toy, Qwen3-0.6B, and the 8B of WeDLM-8B."""
DTYPES = ("float32", "bfloat16")
Write = Callable[[], list[int]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What every contender writes."""

    prompt: list[int]
    config: SamplerConfig


def bench_generate(
    size: Annotated[str, opt(f"Shape of the student: {', '.join(SHAPES)}.", "NAME")] = "0.6b",
    prompt_tokens: Annotated[int, opt("Prompt length in tokens.", "N")] = 128,
    new_tokens: Annotated[int, opt("Tokens to write.", "N")] = 256,
    steps: Annotated[int | None, opt("Denoising steps (default: one per token).", "N")] = None,
    against: Annotated[str, opt("Plain samplers to compare with.", "NAME,...")] = "copying,cachefree",
    thresholds: Annotated[str, opt("Confidence thresholds to report beside.", "P,P,...")] = "0.5,0.9",
    teacher: Annotated[str | None, opt("Time a teacher's shape as well.", "NAME")] = None,
    dtype: Annotated[str | None, opt(f"{' or '.join(DTYPES)} (default: bfloat16 on CUDA).", "NAME")] = None,
    repeats: Annotated[int, opt("Timed runs of each side.", "N")] = 1,
    out: Annotated[Path | None, opt("Write the record here.", "FILE.json")] = None,
    json: Json = False,
) -> None:
    """Parameters, peak memory, latency and tokens per second of sampling one sequence."""
    import torch

    from student.sampler_config import SamplerConfig
    from tools.benches import common

    cuda = torch.cuda.is_available()
    dtype = dtype or ("bfloat16" if cuda else "float32")
    for flag, value, known in (
        ("size", size, (*SHAPES,)),
        ("teacher", teacher or size, (*SHAPES,)),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise UsageError(f"--{flag} must be one of {', '.join(known)}, got {value!r}")
    others = against.split(",")
    if unknown := [name for name in others if name not in PLAIN]:
        raise UsageError(f"--against must name some of {', '.join(PLAIN)}, got {unknown[0]!r}")
    quick = [] if not thresholds else [(f"threshold {p:g}", p) for p in numbers(thresholds, "thresholds")]
    config = SamplerConfig(max_new_tokens=new_tokens, steps=steps)
    generator = torch.Generator().manual_seed(0)
    vocab = SHAPES[size]["vocab"]
    setting = Setting(torch.randint(0, vocab - 2, (prompt_tokens,), generator=generator).tolist(), config)
    warmup = 1 if cuda else 0
    written: dict[str, list[int]] = {}
    sides: dict[str, dict[str, Any]] = {}
    with Progress() as progress:
        line = progress.line("sampling", "runs")

        def run(model: Any, contenders: Mapping[str, Write]) -> dict[str, common.Timing]:
            """Time contenders in turns and note what they wrote, and how much memory that took."""

            def keep(name: str, write: Write) -> Callable[[], None]:
                return lambda: written.__setitem__(name, write())

            calls = {name: keep(name, write) for name, write in contenders.items()}
            peaks = {name: common.peak_memory(call) for name, call in calls.items()} if cuda else {}
            timings = common.compare(calls, repeats=repeats, warmup=warmup, progress=line)
            for name, timing in timings.items():
                sides[name] = figures(model, timing.to_json(), new_tokens, peaks.get(name))
            return timings

        line(0, None, "making the student")
        model = build(size, dtype)
        samplers = {"ours": ours, **{name: PLAIN[name] for name in others}}
        timings = run(model, {name: partial(write, model, setting) for name, write in samplers.items()})
        for name, p in quick:
            by_threshold = Setting(setting.prompt, SamplerConfig(max_new_tokens=new_tokens, threshold=p))
            run(model, {name: partial(ours, model, by_threshold)})
            sides[name]["agreement"] = agreement(written[name], written["ours"])
        del model
        causal = build(size, dtype, causal=True)
        run(causal, {"autoregressive": partial(autoregressive, causal, setting)})
        del causal
        if teacher is not None:
            large = build(teacher, dtype)
            run(large, {f"teacher {teacher}": partial(ours, large, setting)})
    record = common.report(
        "generate",
        sizes={
            "size": size,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "steps": steps or new_tokens,
            "dtype": dtype,
        },
        sides=sides,
        ratios={f"ratio_{name}": common.ratio(timings, name, "ours") for name in others},
        equal=all(written[name] == written["ours"] for name in others),
        agreement={name: agreement(written[name], written["ours"]) for name in others},
    )
    if out is not None:
        common.save(record, out)
    output = Output(as_json=json)
    output.report(table(record))
    same = "equal" if record["equal"] else "NOT equal"
    faster = ", ".join(f"{record[f'ratio_{name}']:.2f}x over {name}" for name in others)
    output.say(f"{faster}; tokens {same}")
    output.result(record)


def build(size: str, dtype: str, *, causal: bool = False) -> Any:
    """A model of random weights on the best device there is: a student, or an autoregressive Qwen3."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from student.model import A2DQwen3Config, A2DQwen3LMHeadModel

    s = SHAPES[size]
    config = (Qwen3Config if causal else A2DQwen3Config)(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["mlp"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=s["head_dim"],
        max_position_embeddings=4096,
        tie_word_embeddings=size != "8b",
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = (Qwen3ForCausalLM if causal else A2DQwen3LMHeadModel)._from_config(
            config, dtype=getattr(torch, dtype)
        )
    return model.eval()


def ours(model: Any, setting: Setting) -> list[int]:
    from student.sampler import BlockSampler

    sampler = BlockSampler(model, mask_token_id=mask_id(model), eos_token_ids=(), decode=lambda ids: "")
    return sampler.generate([setting.prompt], setting.config)[0].ids


def copying(model: Any, setting: Setting) -> list[int]:
    """(i): the prefix anew for every block, the whole cache copied at every step."""
    import torch
    from transformers import DynamicCache

    def step(cache: Any, ids: Any, start: int) -> Any:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        hidden = model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask={"full_attention": None},
            past_key_values=copy.deepcopy(cache),
            use_cache=True,
        ).last_hidden_state
        return model.lm_head(hidden)[0]

    def open_block(ids: Any, start: int) -> Callable[[Any], Any]:
        cache = DynamicCache(config=model.config)
        if start:
            mask = block_causal(start, setting.config.block_size, ids.device)
            model.model(
                input_ids=ids[:, :start],
                attention_mask={"full_attention": mask},
                past_key_values=cache,
                use_cache=True,
            )
        return lambda ids: step(cache, ids[:, start:], start)

    return plain(model, setting, open_block)


def cachefree(model: Any, setting: Setting) -> list[int]:
    """(ii): the whole sequence at every step; logits for the block at work alone."""

    def open_block(ids: Any, start: int) -> Callable[[Any], Any]:
        mask = block_causal(ids.shape[1], setting.config.block_size, ids.device)

        def step(ids: Any) -> Any:
            out = model.model(input_ids=ids, attention_mask={"full_attention": mask}, use_cache=False)
            return model.lm_head(out.last_hidden_state[:, start:])[0]

        return step

    return plain(model, setting, open_block)


PLAIN = {"copying": copying, "cachefree": cachefree}


def plain(model: Any, setting: Setting, open_block: Callable[[Any, int], Callable[[Any], Any]]) -> list[int]:
    """Greedy, low-confidence remasking, fixed steps. `open_block` gives a step: ids to logits [T, V]."""
    import torch

    config, mask = setting.config, mask_id(model)
    ids = torch.tensor([setting.prompt], device=model.device)
    with torch.inference_mode():
        while ids.shape[1] - len(setting.prompt) < config.max_new_tokens:
            start = ids.shape[1] // config.block_size * config.block_size
            todo = start + config.block_size - ids.shape[1]
            ids = torch.cat([ids, ids.new_full((1, todo), mask)], dim=1)
            step = open_block(ids, start)
            for count in quotas(todo, config):
                logits = step(ids).float()
                logits[:, mask] = -torch.inf
                best, drawn = logits.softmax(-1).max(-1)
                best = best.masked_fill(ids[0, start:] != mask, -1)
                keep = best.topk(count).indices
                ids[0, start + keep] = drawn[keep]
    new = ids[0, len(setting.prompt) :].tolist()
    return new[: config.max_new_tokens]


def quotas(todo: int, config: SamplerConfig) -> Iterator[int]:
    """Tokens to fill at each step of a block with `todo` masked ones."""
    share = (config.steps or config.max_new_tokens) / config.max_new_tokens
    steps = max(1, round(todo * share))
    return (todo // steps + (s < todo % steps) for s in range(steps))


def autoregressive(model: Any, setting: Setting) -> list[int]:
    """Greedy decoding of a causal model with its own cache, one token a pass."""
    import torch

    ids = torch.tensor([setting.prompt], device=model.device)
    new = setting.config.max_new_tokens
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return out[0, ids.shape[1] :].tolist()


def block_causal(length: int, block_size: int, device: Any) -> Any:
    import torch

    block = torch.arange(length, device=device) // block_size
    return (block[None, :] <= block[:, None])[None, None]


def mask_id(model: Any) -> int:
    return model.config.vocab_size - 1


def agreement(a: Sequence[int], b: Sequence[int]) -> float:
    """Share of places with the same token."""
    return sum(x == y for x, y in zip(a, b)) / max(len(b), 1)


def figures(model: Any, timing: dict[str, Any], new_tokens: int, peak: int | None) -> dict[str, Any]:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weights,
        "peak_bytes": None if peak is None else weights + peak,
        "latency_s": timing["median_s"],
        "tokens_per_s": new_tokens / timing["median_s"],
        **timing,
    }


def table(record: dict[str, Any]) -> Table:
    sizes = record["sizes"]
    columns = (
        Column(label="", align="left"),
        Column(label="parameters, M", digits=0),
        Column(label="memory, GB", digits=2),
        Column(label="latency, s", digits=2),
        Column(label="tokens/s", digits=1),
        Column(label="same tokens", digits=3),
    )
    rows = tuple(
        (
            name,
            side["parameters"] / 1e6,
            (side["peak_bytes"] or side["weight_bytes"]) / 1e9,
            side["latency_s"],
            side["tokens_per_s"],
            side.get("agreement", record["agreement"].get(name)),
        )
        for name, side in record["sides"].items()
    )
    return Table(
        title=f"Sampling {sizes['new_tokens']} tokens after {sizes['prompt_tokens']}, {sizes['dtype']}",
        columns=columns,
        rows=rows,
        note="Memory is the allocator's peak on CUDA, the weights alone elsewhere.",
    )
