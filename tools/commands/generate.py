"""`tide generate`: text from a student, for one prompt, for a file of prompts, or in a chat."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from shards.errors import UsageError
from tools.console import Output, Progress, doing
from tools.options import Config, Json, opt

if TYPE_CHECKING:
    from student.sampler_config import Completion, SamplerConfig

SAMPLING = "Sampling"
HIDDEN = "░"
"""How a token that is still masked is shown."""


def generate(
    ctx: typer.Context,
    model: Annotated[str, opt("Student: run or model folder, or hub id.", "DIR|ID")],
    prompt: Annotated[str | None, opt("What the user says.", "TEXT")] = None,
    prompts: Annotated[
        Path | None, opt('One prompt per line, or JSON lines with "prompt" or "messages".', "FILE")
    ] = None,
    out: Annotated[Path | None, opt("Write completions here, a JSON line each.", "FILE.jsonl")] = None,
    chat: Annotated[bool, opt("Talk: one turn after another; watch tokens being unmasked.")] = False,
    watch: Annotated[bool, opt("With --prompt: show tokens being unmasked (on a terminal).")] = False,
    system: Annotated[str | None, opt("System message.", "TEXT")] = None,
    raw: Annotated[bool, opt("Complete plain text, without the chat template.")] = False,
    think: Annotated[bool, opt("Leave the template's thinking block open, where it has one.")] = False,
    max_new_tokens: Annotated[int, opt("Tokens to write, at most.", "N", SAMPLING)] = 256,
    steps: Annotated[
        int | None, opt("Denoising passes for that many tokens (default: one each).", "N", SAMPLING)
    ] = None,
    threshold: Annotated[
        float | None, opt("Fill all tokens at least this probable (default: as --steps says).", "P", SAMPLING)
    ] = None,
    block_size: Annotated[int | None, opt("Tokens per block (default: as trained).", "N", SAMPLING)] = None,
    block_origin: Annotated[
        str, opt("Where blocks count from: sequence | prompt.", "NAME", SAMPLING)
    ] = "sequence",
    remasking: Annotated[
        str, opt("Which tokens stay: low-confidence | random.", "NAME", SAMPLING)
    ] = "low-confidence",
    temperature: Annotated[float, opt("Softmax temperature; 0 = greedy.", "T", SAMPLING)] = 0.0,
    top_p: Annotated[float, opt("Draw from the likeliest tokens with this mass.", "P", SAMPLING)] = 1.0,
    guidance: Annotated[float, opt("Classifier-free guidance scale.", "G", SAMPLING)] = 0.0,
    stop: Annotated[
        list[str] | None, opt("Text that ends a completion; may be repeated.", "TEXT", SAMPLING)
    ] = None,
    seed: Annotated[int, opt("Of what is random.", "S", SAMPLING)] = 0,
    batch: Annotated[int, opt("Prompts of a file that run together.", "N", SAMPLING)] = 8,
    dtype: Annotated[str | None, opt("float32 | bfloat16 (default: bfloat16 on CUDA).", "NAME")] = None,
    device: Annotated[str | None, opt("Torch device (default: cuda, else cpu).", "NAME")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Write text with a block-diffusion student."""
    if sum((prompt is not None, prompts is not None, chat)) != 1:
        raise UsageError("give one of --prompt TEXT, --prompts FILE and --chat")
    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    if watch and prompt is None:
        raise UsageError("--watch goes with --prompt; --chat shows tokens being unmasked anyway")
    if chat and (out is not None or json):
        raise UsageError("--chat is a conversation: it goes with neither --out nor --json")
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file, such as {out / 'completions.jsonl'}")
    if raw and (system or chat):
        raise UsageError("--raw completes plain text: it goes with neither --system nor --chat")
    if batch < 1:
        raise UsageError(f"--batch must be at least 1, got {batch}")
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "steps": steps,
        "threshold": threshold,
        "block_origin": block_origin,
        "remasking": remasking,
        "temperature": temperature,
        "top_p": top_p,
        "guidance": guidance,
        "stop": tuple(stop or ()),
        "seed": seed,
    }
    from student.sampler_config import SamplerConfig

    if block_size is not None:
        settings["block_size"] = block_size
    SamplerConfig(**settings)  # refused before a model is loaded
    asked: Sequence[str | list[dict[str, str]]] = [prompt or ""] if prompts is None else read_prompts(prompts)

    with doing("loading the student"):
        import torch

        from student import generate as students

        sampler, tokenizer = students.load_sampler(
            model, dtype=None if dtype is None else getattr(torch, dtype), device=device
        )
    how = SamplerConfig(**{"block_size": students.block_size_of(sampler), **settings})
    before = [] if system is None else [{"role": "system", "content": system}]

    def ids(said: str | list[dict[str, str]]) -> list[int]:
        if raw:
            if not isinstance(said, str):
                raise UsageError(f"--prompts {prompts}: --raw needs plain prompts, not messages")
            return students.raw_ids(tokenizer, said)
        turns = [{"role": "user", "content": said}] if isinstance(said, str) else said
        return students.chat_ids(tokenizer, [*before, *turns], think=think)

    output = Output(as_json=json)
    if chat:
        talk(sampler, ids, how)
        return
    began = time.perf_counter()
    inputs = [ids(said) for said in asked]
    sampler.check(inputs, how)
    if prompt is not None:
        if watch:
            done = [watched(sampler, inputs[0], how, Console(stderr=json))]
        else:
            done = [one(sampler, inputs[0], how)]
            output.say(done[0].text)
    else:
        done = list(many(sampler, inputs, how, batch))
    seconds = time.perf_counter() - began
    tokens = sum(len(c.ids) for c in done)
    records = [
        {"prompt": said, "text": c.text, "finish": c.finish, "tokens": len(c.ids), "passes": c.passes}
        for said, c in zip(asked, done, strict=True)
    ]
    if out is not None:
        from shards.atomic import write_atomic

        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, "".join(jsonlib.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
        output.say(f"{out}: {len(records)} completions")
    elif prompts is not None:
        for r in records:
            output.say(jsonlib.dumps(r, ensure_ascii=False))
    output.result(
        {
            "command": "generate",
            "model": model,
            "completions": records if out is None else len(records),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
        }
    )


def read_prompts(path: Path) -> list[str | list[dict[str, str]]]:
    """Prompts of a text file (a line each) or of JSON lines (`prompt`, or `messages` with role and content).

    Raises:
        UsageError: names the file and the line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--prompts {path}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}") from e
    found: list[str | list[dict[str, str]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json"):
            found.append(line)
            continue
        try:
            record = jsonlib.loads(line)
            said = record["prompt"] if "prompt" in record else record["messages"]
            if not isinstance(said, str):
                said = [{"role": str(m["role"]), "content": str(m["content"])} for m in said]
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(
                f'--prompts {path} line {number}: expected {{"prompt": TEXT}} or {{"messages": [...]}}'
            ) from e
        found.append(said)
    if not found:
        raise UsageError(f"--prompts {path}: no prompts in it")
    return found


def one(sampler: Any, ids: list[int], how: SamplerConfig) -> Completion:
    """The completion of one prompt, with progress."""
    with Progress() as progress:
        line = progress.line("generating", "tokens")
        line(0, how.max_new_tokens)
        run = sampler.watch(ids, how)
        for shot in run:
            line(sum(token != sampler.mask_token_id for token in shot.ids), how.max_new_tokens)
    return run.completion


def many(sampler: Any, inputs: Sequence[list[int]], how: SamplerConfig, batch: int) -> Iterator[Completion]:
    """Completions in order, `batch` together, with progress."""
    with Progress() as progress:
        line = progress.line("generating", "prompts")
        for start in range(0, len(inputs), batch):
            line(start, len(inputs))
            yield from sampler.generate(inputs[start : start + batch], replace(how, seed=how.seed + start))
        line(len(inputs), len(inputs))


def watched(sampler: Any, ids: list[int], how: SamplerConfig, console: Console) -> Completion:
    """Complete one prompt while its tokens are shown being unmasked."""
    with Live(console=console, auto_refresh=False) as live:
        run = sampler.watch(ids, how)
        for shot in run:
            live.update(Text(picture(sampler, shot.ids)), refresh=True)
        live.update(Text(run.completion.text), refresh=True)
    return run.completion


def picture(sampler: Any, ids: Sequence[int]) -> str:
    """Text of tokens, those still masked as `HIDDEN`."""
    parts: list[str] = []
    known: list[int] = []
    for token in [*ids, sampler.mask_token_id]:
        if token != sampler.mask_token_id:
            known.append(token)
            continue
        if known:
            parts.append(sampler.decode(known))
            known = []
        parts.append(HIDDEN)
    return "".join(parts[:-1])


def talk(sampler: Any, ids: Callable[[list[dict[str, str]]], list[int]], how: SamplerConfig) -> None:
    """A conversation, until the user ends it (an empty line, end of input, or Ctrl-C)."""
    console = Console()
    console.print("Empty line or Ctrl-D ends the chat.", style="dim")
    turns: list[dict[str, str]] = []
    while True:
        try:
            said = console.input("[bold]> [/bold]").strip()
        except EOFError:
            break
        if not said:
            break
        turns.append({"role": "user", "content": said})
        answer = watched(sampler, ids(turns), how, console)
        turns.append({"role": "assistant", "content": answer.text})
