"""The sampler against a plain one without a cache, token for token, and what it promises besides.

The plain one is the specification: at every pass it runs the whole sequence up to the end of the block at
work under the block-causal mask, nothing kept from pass to pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shards.errors import UsageError
from student.kv_cache import SlotCache
from student.model import load_student
from student.sampler import BlockSampler, SamplerConfig

BLOCK = 8
MASK, EOS = 294, 292


def plain(
    model, prompt: Sequence[int], config: SamplerConfig, *, eos: frozenset[int] = frozenset({EOS})
) -> list[int]:
    """Greedy, fixed steps or threshold, one sequence."""
    size = config.block_size
    pad = -len(prompt) % size if config.block_origin == "prompt" else 0
    tokens = list(prompt)
    while len(tokens) - len(prompt) < config.max_new_tokens and not eos & set(tokens[len(prompt) :]):
        end = ((len(tokens) + pad) // size + 1) * size - pad
        todo = list(range(len(tokens), end))
        tokens += [MASK] * len(todo)
        block = (torch.arange(end) + pad) // size
        mask = (block[None, :] <= block[:, None])[None, None]
        share = (config.steps or config.max_new_tokens) / config.max_new_tokens
        passes = max(1, -(-len(todo) * share // 1))
        quota = [len(todo) // passes + (s < len(todo) % passes) for s in range(int(passes))]
        step = 0
        while todo:
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), attention_mask=mask).logits[0].float()
                if config.guidance:
                    hidden = [MASK] * len(prompt) + tokens[len(prompt) :]
                    free = model(torch.tensor([hidden]), attention_mask=mask).logits[0].float()
                    logits = free + (config.guidance + 1) * (logits - free)
            logits[:, MASK] = -torch.inf
            score = {i: (float(logits[i].softmax(-1).max()), int(logits[i].argmax())) for i in todo}
            ranked = sorted(todo, key=lambda i: -score[i][0])
            if config.threshold is None:
                keep = ranked[: int(quota[step])]
            else:
                keep = [i for i in ranked if score[i][0] >= config.threshold] or ranked[:1]
            for i in keep:
                tokens[i] = score[i][1]
                todo.remove(i)
            step += 1
    new = tokens[len(prompt) :][: config.max_new_tokens]
    return new[: next((k for k, token in enumerate(new) if token in eos), len(new))]


@pytest.fixture(scope="module")
def student(model: Path):
    network, tokenizer = load_student(model)
    # Random weights say the same everywhere: larger ones make predictions depend on the context.
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(3.0) if p.dim() > 1 else None
    return network.eval(), tokenizer


@pytest.fixture
def sampler(student) -> Callable[..., BlockSampler]:
    network, tokenizer = student

    def make(**options) -> BlockSampler:
        given = {"mask_token_id": MASK, "eos_token_ids": [EOS], "decode": tokenizer.decode}
        return BlockSampler(network, **{**given, **options})

    return make


def prompts(*lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(7)
    return [torch.randint(0, 280, (n,), generator=rng).tolist() for n in lengths]


@pytest.mark.parametrize("origin", ["sequence", "prompt"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"steps": 16}, {"steps": 5}, {"threshold": 0.2}, {"guidance": 0.7}],
    ids=["one a pass", "two a pass", "uneven", "threshold", "guidance"],
)
@pytest.mark.parametrize("static", [False, True])
def test_equals_the_plain_sampler_token_for_token(student, sampler, origin, settings, static):
    """Prompts shorter than a block, ending inside one, and at its end; together and in static shapes."""
    config = SamplerConfig(max_new_tokens=20, block_size=BLOCK, block_origin=origin, **settings)
    if settings.get("steps") == 16:
        config = replace(config, max_new_tokens=32)
    given = prompts(3, 16, 21, 8)
    wanted = [plain(student[0], p, config) for p in given]
    got = sampler(static=static).generate(given, config)
    assert [c.ids for c in got] == wanted
    assert any(len(set(w)) > 3 for w in wanted), "a sequence of one token tests nothing"
    alone = sampler(static=static).generate(given[2:3], config)
    assert alone[0].ids == wanted[2]


def test_each_sequence_ends_at_its_own_eos(student, sampler):
    """The most frequent token of a plain run is declared to be EOS: rows end at different places."""
    config = SamplerConfig(max_new_tokens=40, block_size=BLOCK)
    given = prompts(5, 12, 19, 30)
    free = [plain(student[0], p, config, eos=frozenset()) for p in given]
    eos = free[0][len(free[0]) // 2]
    wanted = [plain(student[0], p, config, eos=frozenset({eos})) for p in given]
    got = sampler(eos_token_ids=[eos]).generate(given, config)
    assert [c.ids for c in got] == wanted
    assert got[0].finish == "eos"
    assert len(got[0].ids) < 40


def test_stop_strings_end_and_cut_the_text(student, sampler):
    config = SamplerConfig(max_new_tokens=40, block_size=BLOCK)
    (whole,) = sampler(eos_token_ids=[]).generate(prompts(12), config)
    stop = whole.text[6:9]
    (cut,) = sampler(eos_token_ids=[]).generate(prompts(12), replace(config, stop=("never there", stop)))
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert cut.passes < whole.passes


def test_sampling_follows_seed_temperature_and_top_p(student, sampler):
    config = SamplerConfig(max_new_tokens=24, block_size=BLOCK, temperature=1.0, seed=3)
    given = prompts(5, 12)
    first, again = (sampler().generate(given, config) for _ in range(2))
    assert [c.ids for c in first] == [c.ids for c in again]
    assert first[0].ids != sampler().generate(given, replace(config, seed=9))[0].ids
    # Row i draws from seed + i: the second row alone, with the next seed, is the same text.
    assert sampler().generate(given[1:], replace(config, seed=4))[0].ids == first[1].ids
    greedy = sampler().generate(given, replace(config, temperature=0.0))
    narrow = sampler().generate(given, replace(config, top_p=1e-9))
    assert [c.ids for c in narrow] == [c.ids for c in greedy]


def test_random_remasking_fills_in_another_order(student, sampler):
    config = SamplerConfig(max_new_tokens=24, block_size=BLOCK)
    near = list(sampler().watch(prompts(12)[0], config))
    far = list(sampler().watch(prompts(12)[0], replace(config, remasking="random")))
    assert len(near) == len(far)
    assert [s.ids for s in near] != [s.ids for s in far]


def test_a_stream_shows_every_pass_and_ends_with_the_completion(student, sampler):
    config = SamplerConfig(max_new_tokens=24, block_size=BLOCK)
    (prompt,) = prompts(12)
    seen = list(sampler(eos_token_ids=[]).watch(prompt, config))
    (done,) = sampler(eos_token_ids=[]).generate([prompt], config)
    assert seen[-1].done
    assert seen[-1].ids == done.ids
    hidden = [s.ids.count(MASK) for s in seen if len(s.ids) == 4]  # the prompt's own block has 4 places left
    assert hidden == [3, 2, 1, 0]
    assert MASK not in done.ids


def test_the_prefix_is_never_copied_and_memory_does_not_grow(student, sampler, monkeypatch):
    """One cache of fixed size; every pass shows views of the same storage."""
    made: list[SlotCache] = []
    seen: set[int] = set()
    update = SlotCache.update

    def watch(self, keys, values, layer_idx, *args, **kwargs):
        out = update(self, keys, values, layer_idx, *args, **kwargs)
        seen.add(out[0].untyped_storage().data_ptr())
        if self not in made:
            made.append(self)
        return out

    monkeypatch.setattr(SlotCache, "update", watch)
    sampler().generate(prompts(12), SamplerConfig(max_new_tokens=64, block_size=BLOCK))
    assert len(made) == 1
    assert len(seen) == student[0].config.num_hidden_layers
    assert made[0].bytes == 2 * 2 * 1 * 80 * 16 * 4  # layers, keys and values, heads, slots, head size, bytes


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt 1 is empty"),
        (list(range(100)), {"max_new_tokens": 64}, "prompt 1 has 100 tokens and may get 64 more"),
        ([1], {"steps": 65, "max_new_tokens": 64}, "steps must lie in 1..64"),
        ([1], {"threshold": 1.5}, "threshold must lie in"),
        ([1], {"threshold": 0.5, "steps": 3}, "exclude one another"),
        ([1], {"top_p": 0.0}, "top-p must lie in"),
        ([1], {"temperature": -1.0}, "temperature must be 0 or more"),
        ([1], {"block_origin": "end"}, "block-origin must be one of sequence, prompt"),
        ([1], {"remasking": "none"}, "remasking must be one of"),
    ],
)
def test_bad_input_is_named(sampler, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        sampler().generate([prompt], SamplerConfig(**{"block_size": BLOCK, **options}))
