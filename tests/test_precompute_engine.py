"""The packed engine against the naive computation, one padded pass per CompDemo half with a dense mask, for
every attention kind and every class of decoder layer, on drawn samples; and what the engine saves, counted.

The naive side builds its masks from the definitions in the papers and runs the library's own `forward`; it
shares neither layout, predicate nor last layer with the engine.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from precompute.budget import default_row_tokens, rows_at_once
from precompute.engine import Pace, Targets, make_part, plans_of, run_row
from precompute.inputs import Asking, make_jobs, questions, without_first
from precompute.sample import PositionPairs, Sample
from precompute.teachers import stack
from precompute.teachers.base import TeacherSpec, TransformersTeacher
from shards.codec import DenseCodec, SparseCodec
from shards.errors import ModelError, UsageError
from shards.noise import NoiseConfig
from student.attention import Coordinates, attention_mask
from student.forward import hidden_at
from student.layout import ATTENTIONS
from student.run_attention import RUNS

BLOCK, VOCAB, MASK = 4, 40, 39
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.5,  # large enough that attending to a wrong token shows
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "use_qk_norm": True, "num_mtp_layers": 0,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
CLASSES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
    "llada2": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**SHAPE, **EXPERTS)),
}
KINDS = [(a, s) for a in ATTENTIONS for s in (False, True) if not (s and a == "staircase-causal")]


def make_teacher(
    name: str = "qwen3", attention: str = "staircase", shifted: bool = False
) -> TransformersTeacher:
    torch.manual_seed(0)
    model = CLASSES[name]()
    with torch.no_grad():  # norms and biases too: at their initial values a forgotten one would not show
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
    model.set_attn_implementation(RUNS)
    spec = TeacherSpec(
        name="random", revision=None, architecture=name, attention=attention, mask_token_id=MASK,
        vocab_size=VOCAB, shifted=shifted, dtype="float32", weights_hash="",
    )  # fmt: skip
    return TransformersTeacher(model, spec)


def draw_sample(rng: np.random.Generator, name: str, *, whole_blocks: bool = True) -> Sample:
    length = int(rng.integers(1, 7)) * BLOCK - (0 if whole_blocks else int(rng.integers(0, BLOCK)))
    ids = rng.integers(0, MASK, length).astype(np.int32)
    maskable = np.arange(length) >= rng.integers(0, length)
    where = np.flatnonzero(maskable).astype(np.int32)
    return Sample(name, "train", ids, maskable, length, length, ids, PositionPairs(where, where))


def asking_of(teacher: TransformersTeacher, row_tokens: int = 10_000) -> Asking:
    spec = teacher.spec
    return Asking(
        mask_id=MASK, attention=spec.attention, block_size=BLOCK, shifted=spec.shifted,
        row_tokens=row_tokens, compdemo=True,
    )  # fmt: skip


def naive(teacher: TransformersTeacher, clean: np.ndarray, noisy: np.ndarray, asked: np.ndarray, pad: int):
    """[len(asked), V] logits of one half: everything padded to `pad`, one forward, one dense mask."""
    kind, n = teacher.spec.attention, len(clean)
    i = torch.arange(pad)
    b, real = i // BLOCK, i < n
    x0, xt = (torch.from_numpy(np.pad(x, (0, pad - n))).long() for x in (clean, noisy))
    where = torch.from_numpy(asked) - int(teacher.spec.shifted)
    before, same = b[:, None] > b[None], b[:, None] == b[None]
    if kind == "staircase":  # [xt, x0], BD3LM section 3
        mask = torch.cat([torch.cat([same, before], 1), torch.cat([same & False, same | before], 1)])
        ids, position, real = torch.cat([xt, x0]), i.repeat(2), real.repeat(2)
        where = where + pad * (where // BLOCK < torch.from_numpy(asked) // BLOCK)
    elif kind == "staircase-causal":  # [x0, xt], every block of xt truly reordered, as WeDLM trains
        hidden = xt != x0
        turn = torch.cat([torch.cat([k[~hidden[k]], k[hidden[k]]]) for k in i.split(BLOCK)])
        upto = i[:, None] >= i[None]
        mask = torch.cat([torch.cat([upto, same & False], 1), torch.cat([before, same & upto], 1)])
        ids, position, real = torch.cat([x0, xt[turn]]), torch.cat([i, turn]), torch.cat([real, real[turn]])
        where = pad + turn.argsort()[where]
    else:
        ids, position = xt, i
        mask = {"bidirectional": same | True, "block-causal": same | before, "causal": i[:, None] >= i[None]}[
            kind
        ]
    mask = mask & real[None] | torch.eye(len(ids), dtype=torch.bool)
    with torch.no_grad():
        out = teacher.model(input_ids=ids[None], position_ids=position[None], attention_mask=mask[None, None])
    return out.logits[0, where]


def naive_logp(teacher: TransformersTeacher, samples: list[Sample], plans: list) -> dict:
    """(sample, view, position) -> [V] log-probs."""
    model, found = teacher.model, {}
    model.set_attn_implementation("sdpa")
    pad = max(len(s.teacher_ids) for s in samples) + BLOCK
    for i, sample in enumerate(samples):
        for view, plan in enumerate(plans[i]):
            for q in questions(sample, view, plan, compdemo=True):
                noisy = np.where(
                    np.isin(np.arange(len(sample.teacher_ids)), q.hidden), MASK, sample.teacher_ids
                )
                logits = naive(teacher, sample.teacher_ids, noisy, q.asked, pad)
                logp = logits.log_softmax(-1).numpy()
                found |= {(i, view, int(s)): logp[k] for k, s in enumerate(q.slot)}
    model.set_attn_implementation(RUNS)
    return found


def check_equal(teacher: TransformersTeacher, seed: int, rows: int, row_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [draw_sample(rng, f"s{i}", whole_blocks=bool(seed % 2)) for i in range(3)]
    if teacher.spec.shifted:
        samples = [without_first(s) for s in samples]
    plans = [plans_of(s, NoiseConfig(seed=seed, views=int(rng.integers(1, 4)))) for s in samples[:1]]
    plans += [plans_of(s, NoiseConfig(seed=seed, views=len(plans[0]))) for s in samples[1:]]
    expected = naive_logp(teacher, samples, plans)
    targets = Targets(codec=DenseCodec(), vocab_size=VOCAB, head_rows=5)
    made, _ = make_part(
        teacher, samples, plans, asking=asking_of(teacher, row_tokens), targets=targets,
        pace=Pace(rows=rows, head_rows=5),
    )  # fmt: skip
    got = {}
    for n, row in enumerate(made):
        at = row.positions
        got |= {(n // len(plans[0]), row.view, int(p)): at.target.logp[k] for k, p in enumerate(at.positions)}
    assert got.keys() == expected.keys()
    for key, logp in expected.items():
        np.testing.assert_allclose(got[key], logp, atol=1e-5, rtol=1e-5, err_msg=str(key))


TEACHERS = {kind: make_teacher("qwen3", *kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 3), row_tokens=st.sampled_from([56, 90, 400]))
def test_equals_naive(kind: tuple[str, bool], seed: int, rows: int, row_tokens: int) -> None:
    """Several views, both halves, several samples in a row, samples split over rows; ragged last blocks."""
    check_equal(TEACHERS[kind], seed, rows, row_tokens)


@pytest.mark.parametrize("kind", [("staircase", False), ("bidirectional", False), ("causal", True)], ids=str)
@pytest.mark.parametrize("name", [n for n in CLASSES if n != "qwen3"])
def test_every_layer_class_equals_naive(name: str, kind: tuple[str, bool]) -> None:
    """The last layer at the asked places gives what the library's whole layer gives, in each class."""
    teacher = make_teacher(name, *kind)
    assert stack.known_layers(teacher.model)
    for seed in range(3):
        check_equal(teacher, seed, rows=1, row_tokens=400)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_every_implementation_gives_the_same(
    implementation: str, kind: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls over runs against the dense masks and FlexAttention's (uncompiled here, its block mask the same
    one as on CUDA), for whole layers, the last one at the reads, and two padded rows at once."""
    from transformers.integrations import flex_attention as library

    flex = torch.nn.attention.flex_attention.flex_attention
    monkeypatch.setattr(library.WrappedFlexAttention, "__call__", lambda self: flex)
    teacher = TEACHERS[kind]
    rng = np.random.default_rng(5)
    samples = [draw_sample(rng, f"s{i}") for i in range(3)]
    if kind[1]:
        samples = [without_first(s) for s in samples]
    jobs = [
        j
        for s in samples
        for j in make_jobs(s, plans_of(s, NoiseConfig(views=2)), asking_of(teacher), index=0)
    ]
    ours = run_row(teacher, [j.piece for j in jobs])
    two = torch.arange(24).reshape(2, 12)
    coordinates = Coordinates(
        torch.tensor([[0] * 12, [0] * 8 + [-1] * 4]), two // 3 % 2, two % 12 // BLOCK, two % 12
    )
    padded = (two, two % 12, coordinates, torch.tensor([1, 19, 4, 4, 11]))
    ours_padded = teacher.hidden(*padded)
    try:
        teacher.model.set_attn_implementation(implementation)
        theirs, theirs_padded = run_row(teacher, [j.piece for j in jobs]), teacher.hidden(*padded)
    finally:
        teacher.model.set_attn_implementation(RUNS)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs_padded, ours_padded, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # and by the library's own forward, as the student runs
        whole = hidden_at(teacher.model, *padded, kind[0])
    torch.testing.assert_close(whole, ours_padded, atol=1e-5, rtol=1e-5)


def test_a_wrong_kind_shows() -> None:
    """The control: asked another way, the same teacher says something else."""
    sample = draw_sample(np.random.default_rng(1), "s")
    plans = [plans_of(sample, NoiseConfig())]
    right, wrong = (
        naive_logp(TEACHERS[kind, False], [sample], plans) for kind in ("staircase", "bidirectional")
    )
    assert max(np.abs(right[key] - wrong[key]).max() for key in right) > 0.1


def test_runs_cost_what_their_pairs_cost() -> None:
    """No call makes more than the pairs that may attend, bar the filling of runs up to whole steps."""
    teacher = make_teacher()
    sample = replace(draw_sample(np.random.default_rng(3), "s"))
    (job,) = make_jobs(sample, plans_of(sample, NoiseConfig(views=2)), asking_of(teacher))
    p = job.piece
    at = Coordinates(*(torch.from_numpy(x)[None].long() for x in (p.stream * 0, p.stream, p.block, p.order)))
    mask = attention_mask("staircase", at, teacher.model)
    blocks = {(s, b): int(((p.stream == s) & (p.block == b)).sum()) for s, b in zip(p.stream, p.block)}
    clean = {b: n for (s, b), n in blocks.items() if s == 0}
    pairs = sum(8 * (n + sum(c for e, c in clean.items() if e < b)) for (_, b), n in blocks.items())
    assert sum(len(c.queries) * len(c.keys) // c.runs for c in mask.calls) == pairs
    assert all(c.mask is None for c in mask.calls)


@pytest.mark.parametrize("attention", ATTENTIONS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), views=st.integers(1, 4))
def test_tokens_run(attention: str, seed: int, views: int) -> None:
    """The number of tokens run, from the layout rule alone.

    The clean blocks before the last noisy one that is asked about, once, and the asked blocks of each half;
    or, where nothing is shared, each half's stream as far as it is looked at. The naive layout runs every
    half whole, with x0 beside it for the staircase.
    """
    teacher = TEACHERS[attention, False]
    rng = np.random.default_rng(seed)
    samples = [draw_sample(rng, f"s{i}") for i in range(3)]
    noise = NoiseConfig(seed=seed, views=views)
    plans = [plans_of(s, noise) for s in samples]
    expected = naive_tokens = 0
    for sample, by_view in zip(samples, plans):
        length, last = len(sample.teacher_ids), 0
        for plan in by_view:
            for half in (plan.masked & plan.half_a, plan.masked & ~plan.half_a):
                naive_tokens += length * (2 if "staircase" in attention else 1)
                if not half.any():
                    continue
                blocks = half.reshape(-1, BLOCK).any(1)
                end = int(np.flatnonzero(half)[-1])
                expected += {
                    "bidirectional": length, "block-causal": (end // BLOCK + 1) * BLOCK, "causal": end + 1,
                }.get(attention, int(blocks.sum()) * BLOCK)  # fmt: skip
                last = max(last, end // BLOCK)
        expected += last * BLOCK if "staircase" in attention else 0
    targets = Targets(codec=None, vocab_size=VOCAB, head_rows=64)
    tokens = sum(
        len(j.piece) for s, p in zip(samples, plans) for j in make_jobs(s, p, asking_of(teacher), index=0)
    )
    assert tokens == expected <= naive_tokens
    if any(p.masked.any() for by_view in plans for p in by_view):
        sparse = replace(targets, codec=SparseCodec(cap=4))
        assert make_part(teacher, samples, plans, asking=asking_of(teacher), targets=sparse)[1] == tokens


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_row_length_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All streams of the longest sample share its clean one, in rows that a device does not idle on; on an
    accelerator within its free memory, but never too short for a single stream."""
    streams = {"streams": 8, "block_size": 32, "device": CPU}
    assert default_row_tokens(500, attention="staircase", **streams) == 9 * 512
    assert default_row_tokens(500, attention="bidirectional", **streams) == 8 * 512
    assert default_row_tokens(64, attention="staircase", **streams) == 2048
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    free = 10 << 30
    streams["device"] = CUDA
    assert default_row_tokens(500, attention="staircase", token_bytes=1 << 20, **streams) == 8192
    assert rows_at_once(4096, device=CUDA, token_bytes=1 << 20) == 2
    assert rows_at_once(4096, device=CUDA, token_bytes=1 << 10) == 8
    free = 1 << 30
    assert default_row_tokens(500, attention="staircase", token_bytes=1 << 20, **streams) == 1024
    assert rows_at_once(4096, device=CUDA, token_bytes=1 << 20) == 1
    assert rows_at_once(4096, device=CPU, token_bytes=1 << 20) == 1


def test_activation_bytes_cover_what_a_layer_makes() -> None:
    """The estimate against the largest sum of tensors alive at once in a layer's forward, which it must not
    miss by more than a third either way."""
    for name in ("qwen3", "llama"):
        config = CLASSES[name]().config
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 192, 2
        teacher = TransformersTeacher(
            type(CLASSES[name]())(config), replace(TEACHERS["staircase", False].spec)
        )
        tokens = 2000
        ids = torch.arange(tokens)[None] % MASK
        at = Coordinates(ids * 0, ids * 0, torch.arange(tokens)[None] // 500, ids)
        teacher.model.set_attn_implementation(RUNS)
        with torch.profiler.profile(profile_memory=True) as profile:
            teacher.hidden(ids, ids, at, torch.arange(tokens // 3))
        alive = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        assert 0.66 < teacher.token_bytes * tokens / peak < 1.5, (name, peak / tokens, teacher.token_bytes)


class Cramped(TransformersTeacher):
    """Runs out of memory above so many tokens of a forward, or rows of logits."""

    def __init__(self, teacher: TransformersTeacher, tokens: int, logits: int) -> None:
        super().__init__(teacher.model, teacher.spec)
        self.tokens, self.logits = tokens, logits
        self.refused = 0

    def hidden(self, ids, position, at, read):
        self.limit(ids.numel(), self.tokens)
        return super().hidden(ids, position, at, read)

    def head(self, hidden):
        self.limit(len(hidden), self.logits)
        return super().head(hidden)

    def limit(self, size: int, most: int) -> None:
        if size > most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def part(teacher: TransformersTeacher, pace: Pace, row_tokens: int = 90):
    rng = np.random.default_rng(8)
    samples = [draw_sample(rng, f"s{i}") for i in range(9)]
    plans = [plans_of(s, NoiseConfig(views=2)) for s in samples]
    targets = Targets(codec=SparseCodec(cap=8), vocab_size=VOCAB, head_rows=64)
    return make_part(
        teacher, samples, plans, asking=asking_of(teacher, row_tokens), targets=targets, pace=pace
    )


def test_out_of_memory_runs_fewer_rows_at_once() -> None:
    """Rows in flight and rows of logits are halved until they fit; every row is made all the same, and
    equal."""
    roomy, tokens = part(TEACHERS["staircase", False], Pace(rows=4, head_rows=64))
    cramped, pace = Cramped(TEACHERS["staircase", False], tokens=190, logits=7), Pace(rows=8, head_rows=64)
    rows, same = part(cramped, pace)
    assert cramped.refused >= 3
    assert (pace.rows, pace.head_rows) == (2, 4)
    assert (len(rows), same) == (len(roomy), tokens)
    for a, b in zip(rows, roomy):
        np.testing.assert_array_equal(a.positions.positions, b.positions.positions)
        np.testing.assert_array_equal(a.positions.target.ids, b.positions.target.ids)
        np.testing.assert_allclose(a.positions.target.logp, b.positions.target.logp, atol=1e-5)
        np.testing.assert_allclose(a.positions.target.tails, b.positions.target.tails, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "logits", "what"),
    [(20, 64, r"a row of \d+ tokens does not fit .* --row-tokens"), (999, 0, "a row of logits")],
)
def test_one_row_that_does_not_fit_is_an_error(tokens: int, logits: int, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        part(Cramped(TEACHERS["staircase", False], tokens, logits), Pace(rows=4, head_rows=8))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        Pace(rows=2, head_rows=2).fit(
            "rows", lambda: (_ for _ in ()).throw(RuntimeError("size mismatch")), ""
        )


def test_what_cannot_be_asked_is_refused_before_any_pass() -> None:
    """A token id beyond the teacher's vocabulary, and a sample longer than a row, by name."""
    teacher = Cramped(TEACHERS["staircase", False], tokens=0, logits=0)  # a pass would be an error of its own
    sample = draw_sample(np.random.default_rng(0), "s0")
    plans = [plans_of(sample, NoiseConfig())]
    targets = Targets(codec=SparseCodec(cap=8), vocab_size=VOCAB, head_rows=64)
    strange = replace(sample, teacher_ids=np.where(np.arange(len(sample.teacher_ids)) == 1, VOCAB, 0))
    with pytest.raises(ModelError, match="sample s0 has token id 40, but random knows ids below 40"):
        make_part(teacher, [strange], plans, asking=asking_of(teacher), targets=targets)
    with pytest.raises(
        UsageError, match=r"sample s0 needs \d+ teacher tokens .* --row-tokens allows 3: raise"
    ):
        make_part(teacher, [sample], plans, asking=asking_of(teacher, 3), targets=targets)
