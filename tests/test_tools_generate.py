"""`tide generate` as its users meet it: a prompt, files of prompts, a terminal that shows tokens being
unmasked, a conversation; and everything that can be wrong with what they give, one line each."""

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Tide, refused
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from student.generate import chat_ids, load_sampler, raw_ids
from student.sampler_config import SamplerConfig
from tools.commands.generate import HIDDEN, picture

SMALL = ("--block-size", 8, "--max-new-tokens", 12)
HOW = SamplerConfig(block_size=8, max_new_tokens=12)


@pytest.fixture(scope="module")
def sampler(model: Path) -> tuple[Any, Any]:
    return load_sampler(model)


def test_a_prompt(tide: Tide, model: Path, sampler: tuple[Any, Any]) -> None:
    """What is printed is what the sampler writes for the chat's ids; so with a system message, and raw."""
    student, tokenizer = sampler
    user = {"role": "user", "content": "Say it."}
    system = {"role": "system", "content": "Be brief."}
    for options, ids in (
        ((), chat_ids(tokenizer, [user])),
        (("--system", "Be brief."), chat_ids(tokenizer, [system, user])),
        (("--raw",), raw_ids(tokenizer, "Say it.")),
    ):
        (wanted,) = student.generate([ids], HOW)
        done = tide("generate", "--model", model, "--prompt", "Say it.", *SMALL, *options, "--json")
        assert done.code == 0, done.err
        summary = json.loads(done.out)  # nothing but the line on standard output
        assert summary["completions"][0]["text"] == wanted.text
        assert summary["completions"][0]["passes"] == wanted.passes
        assert summary["tokens"] == len(wanted.ids)
        assert wanted.text.strip() in done.err.replace("\n", "") or "\n" in wanted.text
    plain = tide("generate", "--model", model, "--prompt", "Say it.", *SMALL, "--raw")
    assert plain.out.rstrip("\n") == wanted.text.rstrip("\n")


def test_files_of_prompts(tide: Tide, model: Path, sampler: tuple[Any, Any], tmp_path: Path) -> None:
    """Text lines, and JSON lines with prompts and messages: more than a batch, each as if it were alone."""
    student, tokenizer = sampler
    said = ["One", "Two two", "Three three three"]
    text = tmp_path / "p.txt"
    text.write_text("\n".join([said[0], "", *said[1:]]) + "\n")
    messages = [{"role": "system", "content": "Brief."}, {"role": "user", "content": said[2]}]
    lines = tmp_path / "p.jsonl"
    lines.write_text(
        "\n".join(map(json.dumps, [{"prompt": said[0]}, {"prompt": said[1]}, {"messages": messages}]))
    )
    for path, last in ((text, [{"role": "user", "content": said[2]}]), (lines, messages)):
        asked = [*([{"role": "user", "content": s}] for s in said[:2]), last]
        wanted = [student.generate([chat_ids(tokenizer, m)], HOW)[0].text for m in asked]
        arguments = ("generate", "--model", model, "--prompts", path, *SMALL, "--batch", 2)
        out = tmp_path / "new" / f"{path.suffix}.jsonl"
        done = tide(*arguments, "--out", out, "--json")
        assert done.code == 0, done.err
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [f["text"] for f in found] == wanted
        assert found[0]["prompt"] == said[0]
        assert json.loads(done.out)["completions"] == 3
        assert [json.loads(line) for line in tide(*arguments).out.splitlines()] == found


def test_options_reach_the_sampler(tide: Tide, model: Path, sampler: tuple[Any, Any]) -> None:
    student, tokenizer = sampler
    ids = raw_ids(tokenizer, "Say it.")

    def text(*options: object) -> str:
        done = tide("generate", "--model", model, "--prompt", "Say it.", "--raw", *SMALL, "--json", *options)
        assert done.code == 0, done.err
        return json.loads(done.out)["completions"][0]["text"]

    def wanted(**changes: Any) -> str:
        settings = {name: getattr(HOW, name) for name in ("block_size", "max_new_tokens")}
        return student.generate([ids], SamplerConfig(**{**settings, **changes}))[0].text

    greedy = wanted()
    assert text("--temperature", 1, "--seed", 5) == wanted(temperature=1.0, seed=5) != greedy
    assert text("--temperature", 1, "--top-p", 0.2) == wanted(temperature=1.0, top_p=0.2)
    assert text("--steps", 3) == wanted(steps=3)
    assert text("--threshold", 0.01) == wanted(threshold=0.01)
    assert text("--block-origin", "prompt") == wanted(block_origin="prompt")
    assert text("--remasking", "random") == wanted(remasking="random")
    assert text("--guidance", 1.5) == wanted(guidance=1.5)
    assert text("--stop", "never", "--stop", greedy[3:5]) == greedy[: greedy.find(greedy[3:5])]


def test_a_picture_shows_what_is_hidden(sampler: tuple[Any, Any]) -> None:
    student, tokenizer = sampler
    a, b = raw_ids(tokenizer, "ab")
    mask = student.mask_token_id
    assert picture(student, [a, mask, mask, b]) == f"a{HIDDEN}{HIDDEN}b"
    assert picture(student, [mask, a, b]) == f"{HIDDEN}ab"
    assert picture(student, []) == ""


def test_a_conversation_remembers(
    tide: Tide, model: Path, sampler: tuple[Any, Any], monkeypatch: Any
) -> None:
    """Two turns from standard input: the second answer follows from the whole conversation."""
    student, tokenizer = sampler
    turns: list[dict[str, str]] = []
    for said in ("Hello", "And?"):
        turns.append({"role": "user", "content": said})
        (answer,) = student.generate([chat_ids(tokenizer, turns)], HOW)
        turns.append({"role": "assistant", "content": answer.text})
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd?\n\nnot read\n"))
    done = tide("generate", "--model", model, "--chat", *SMALL)
    assert done.code == 0, done.err
    flat = re.sub(r"\s", "", done.out)
    first, second = (re.sub(r"\s", "", turns[i]["content"]) for i in (1, 3))
    assert first in flat
    assert second in flat[flat.index(first) + len(first) :]


def on_terminal(*arguments: object, typed: str = "", wait_for: str = "") -> tuple[int, str]:
    """Run `tide` on a terminal of its own; type when `wait_for` has appeared."""
    keyboard, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.cli", *map(str, arguments)],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen, end = b"", time.monotonic() + 120
    try:
        while time.monotonic() < end:
            if typed and wait_for.encode() in seen:
                os.write(keyboard, typed.encode())
                typed = ""
            if select.select([keyboard], [], [], 0.2)[0]:
                try:
                    new = os.read(keyboard, 65536)
                except OSError:  # Linux's way to say that the other end is closed
                    break
                if not new:
                    break
                seen += new
        return process.wait(timeout=10), seen.decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def test_a_terminal_shows_tokens_being_unmasked(model: Path, sampler: tuple[Any, Any]) -> None:
    """Hidden tokens appear first, the text replaces them, and the last picture is the completion."""
    student, tokenizer = sampler
    (wanted,) = student.generate([raw_ids(tokenizer, "x")], HOW)
    code, seen = on_terminal("generate", "--model", model, "--prompt", "x", "--raw", "--watch", *SMALL)
    assert code == 0, seen
    assert HIDDEN * 4 in seen
    assert seen.rindex(wanted.text.strip()[:4]) > seen.index(HIDDEN)


def test_a_chat_on_a_terminal(model: Path) -> None:
    """A turn typed, its answer unmasked, and the end by an empty line."""
    code, seen = on_terminal("generate", "--model", model, "--chat", *SMALL, typed="Hello\n\n", wait_for="> ")
    assert code == 0, seen
    assert HIDDEN in seen
    assert "Traceback" not in seen


# What goes wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("one of --prompt TEXT, --prompts FILE and --chat",)),
        (("--prompt", "x", "--chat"), ("one of",)),
        (("--prompt", "x", "--raw", "--system", "s"), ("--raw",)),
        (("--prompt", "x", "--dtype", "float16"), ("'float16'",)),
        (("--prompts", "x", "--batch", 0), ("--batch", "0")),
        (("--prompts", "x", "--watch"), ("--watch",)),
        (("--chat", "--json"), ("--chat",)),
        (("--prompt", "x", "--block-size", 0), ("block-size", "0")),
        (("--prompt", "x", "--max-new-tokens", 0), ("max-new-tokens", "0")),
        (("--prompt", "x", "--steps", 99, "--max-new-tokens", 4), ("1..4", "99")),
        (("--prompt", "x", "--threshold", 0), ("threshold", "0")),
        (("--prompt", "x", "--threshold", 0.5, "--steps", 2), ("exclude one another",)),
        (("--prompt", "x", "--temperature", -1), ("temperature", "-1")),
        (("--prompt", "x", "--top-p", 2), ("top-p", "2")),
        (("--prompt", "x", "--guidance", "nan"), ("guidance", "nan")),
        (("--prompt", "x", "--block-origin", "end"), ("sequence, prompt", "'end'")),
        (("--prompt", "x", "--remasking", "none"), ("low-confidence, random", "'none'")),
        (("--prompt", "x", "--device", "abacus"), ("'abacus'", "cpu")),
        (("--prompt", "x", "--out", "."), ("is a folder",)),
    ],
)
def test_bad_options(tide: Tide, options: tuple[object, ...], words: tuple[str, ...]) -> None:
    """All before a model is looked for."""
    refused(tide("generate", "--model", "nowhere", *options), 2, *words)


def test_bad_files_of_prompts(tide: Tide, model: Path, tmp_path: Path) -> None:
    def given(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    for path, words in (
        (tmp_path / "none.txt", ("No such file",)),
        (tmp_path, ("directory",)),
        (given("empty.txt", b"\n \n"), ("no prompts",)),
        (given("latin.txt", b"caf\xe9"), ("not UTF-8",)),
        (given("bad.jsonl", b'{"prompt": "a"}\n{"prompt": '), ("line 2", '{"prompt": TEXT}')),
        (given("other.jsonl", b'{"text": "a"}'), ("line 1",)),
        (given("list.jsonl", b'["a"]'), ("line 1",)),
        (given("roles.jsonl", b'{"messages": [{"role": "user"}]}'), ("line 1",)),
    ):
        refused(tide("generate", "--model", model, "--prompts", path), 2, path, *words)
    messages = given("m.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}')
    refused(tide("generate", "--model", model, "--prompts", messages, "--raw"), 2, messages, "--raw")


def test_a_prompt_longer_than_the_positions(tide: Tide, model: Path, tmp_path: Path) -> None:
    """128 positions. In a file it is found before anything is generated, and numbered over the whole file."""
    refused(
        tide("generate", "--model", model, "--prompt", "word " * 200, *SMALL), 2, "prompt 1", "128 positions"
    )
    path = tmp_path / "p.txt"
    path.write_text("a\n" * 10 + "word " * 200 + "\n")
    done = tide("generate", "--model", model, "--prompts", path, *SMALL, "--batch", 2)
    refused(done, 2, "prompt 11", "128 positions")
    assert done.out == ""


def test_an_empty_prompt(tide: Tide, model: Path) -> None:
    refused(tide("generate", "--model", model, "--prompt", "", "--raw", *SMALL), 2, "prompt 1 is empty")


def test_what_is_no_student(tide: Tide, model: Path, tmp_path: Path) -> None:
    """Nothing there, an autoregressive model, another family, no mask token, one beyond the vocabulary, no
    chat template."""
    run = ("--prompt", "x", *SMALL)
    refused(tide("generate", "--model", tmp_path / "none", *run), 1, tmp_path / "none")

    ar = tmp_path / "ar"
    fields = AutoConfig.from_pretrained(model).to_dict()
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim")  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**{k: fields[k] for k in keep})).save_pretrained(ar)
    AutoTokenizer.from_pretrained(model).save_pretrained(ar)
    refused(tide("generate", "--model", ar, *run), 1, ar, "'qwen3'", "tide train")

    def changed(name: str, file: str, **fields: object) -> Path:
        folder = shutil.copytree(model, tmp_path / name)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({k: v for k, v in (content | fields).items() if v is not None}))
        return folder

    other = changed("other", "config.json", model_type="llama")
    refused(tide("generate", "--model", other, *run), 1, other, "llama")
    unmasked = changed("unmasked", "tokenizer_config.json", mask_token=None)
    refused(tide("generate", "--model", unmasked, *run), 1, unmasked, "no mask token")

    beyond = shutil.copytree(model, tmp_path / "beyond")
    tokenizer = AutoTokenizer.from_pretrained(beyond)
    tokenizer.add_tokens([f"<{i}>" for i in range(4)])
    tokenizer.add_special_tokens({"mask_token": "<new mask>"})
    tokenizer.save_pretrained(beyond)
    vocabulary = load_file(beyond / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert tokenizer.mask_token_id >= vocabulary
    done = tide("generate", "--model", beyond, *run)
    refused(done, 1, beyond, "mask token")

    silent = shutil.copytree(model, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    refused(tide("generate", "--model", silent, *run), 2, "no chat template", "--raw")
    assert tide("generate", "--model", silent, *run, "--raw").code == 0
