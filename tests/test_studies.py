"""The study: what its smoke run writes, that a kill loses and repeats nothing, what is chosen and how sure a
difference is."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from precompute.builtin import _functions
from shards.errors import UsageError
from shards.reader import LogitDataset
from student.evaluate import EvalResult, paired_bootstrap
from student.loader import DatasetRows
from studies.config import Study, laid_over, read_study, scaled
from studies.intervals import interval
from studies.plan import DEFAULTS, Plan
from studies.report import read_results, write_doc, write_html
from studies.rows import ABSENT, TeacherInTheLoop, treated
from studies.tasks import RESULT, Task, missing, run_tasks

ROOT = Path(__file__).parents[1]
CPU = ROOT / "studies" / "cpu.yaml"


def studies(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "studies", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke run: every kind of task but the codecs'."""
    out = tmp_path_factory.mktemp("study")
    done = studies("run", CPU, "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_smoke_answers_every_question_and_repeats_nothing(smoke: Path) -> None:
    """Every arm has every seed's test likelihood; the same command then finds nothing to do; the split keeps
    groups apart."""
    results = read_results(smoke)
    assert set(results) == set("abcd")
    for result in results.values():
        assert not result["open"]
        for arm in result["arms"]:
            nll = np.asarray(arm["centinats"])
            assert nll.shape == (2, len(arm["bytes"]))
            assert (nll > 0).all()
            assert arm["student_flops"] > 0
            assert (arm["teacher_flops"] > 0) == (arm["objective"] not in ("ce", "ce-uniform"))
    assert {a["name"]: a["above_half"] is not None for a in results["d"]["arms"]} == {
        "ce": False,
        "reverse-calm, T 2": True,
    }
    gradients = {g["objective"]: g for g in results["a"]["why"][0]["start"]["gradients"]}
    assert set(gradients) == {"ce", "ce-uniform", "kl@2", "tidal@2@1"}
    assert gradients["ce"]["with_ce"] == pytest.approx([1.0] * 5)

    study = read_study(CPU, smoke=True)
    plan = Plan(study, smoke)
    assert [plan.open(q) for q in study.questions] == [[]] * 4
    groups = []
    for split in ("train", "validation", "test"):
        lines = (plan.corpus().folder(smoke) / f"{split}.jsonl").read_text().splitlines()
        groups.append({json.loads(line)["group"] for line in lines})
        assert lines
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]


def test_report_is_made_of_the_result_files_alone(smoke: Path, tmp_path: Path) -> None:
    """From a copy of the files, away from the run: tables between the marks of a page, whose other text
    stays, and the page with plots. Once more gives the same."""
    for file in (smoke / "results").glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    page = tmp_path / "study.md"
    marks = "\n".join(f"<!-- study: {q} -->\nold\n<!-- end -->\nkept {q}" for q in "abcd")
    page.write_text(f"# Head\n{marks}\n")
    results = read_results(tmp_path)
    write_doc(page, results)
    text = page.read_text()
    assert "\nold\n" not in text
    assert all(f"kept {q}" in text for q in "abcd")
    assert "| kl, teacher in the loop |" in text
    assert "Gradient norm over CE's" in text
    assert "](study/a.svg)" in text
    plots = {f.name: f.read_bytes() for f in (tmp_path / "study").glob("*.svg")}
    assert set(plots) == {"a.svg", "d.svg"}, "(b) and (c) have a single arm here"
    assert b"<svg" in plots["a.svg"]
    write_doc(page, results)
    assert page.read_text() == text
    assert {f.name: f.read_bytes() for f in (tmp_path / "study").glob("*.svg")} == plots
    html = write_html(tmp_path / "study.html", results).read_text()
    assert "difference to the baseline" in html
    page.write_text("# no marks\n")
    with pytest.raises(UsageError, match="no place for question a"):
        write_doc(page, results)


def test_teacher_in_the_loop_keeps_the_order_and_renews_the_noise(smoke: Path) -> None:
    """The same samples in the same order as the dataset's stream, with other timesteps in every epoch and a
    target at every masked position."""
    plan = Plan(read_study(CPU, smoke=True), smoke)
    data = plan.data("plain", 0)
    dataset = LogitDataset(data.folder(smoke) / "data")
    loop = TeacherInTheLoop(data, smoke, seed=0)
    stored, fresh = DatasetRows(dataset, 0)(None), loop(DatasetRows(dataset, 0))(None)
    both = [(next(a)[0], next(b)[0]) for a, b in [(iter(stored), iter(fresh))] for _ in range(64)]
    assert [a.sample_id for a, _ in both] == [b.sample_id for _, b in both]
    seen: dict[str, set[float]] = {}
    for _, row in both:
        seen.setdefault(row.sample_id, set()).add(row.t)
        assert row.positions is not None
        np.testing.assert_array_equal(row.positions.positions, np.flatnonzero(row.masked))
        assert np.isfinite(row.positions.gold_logp).all()
    assert all(len(t) >= 2 for t in seen.values())  # 64 rows of 24 samples at most
    assert loop.flops > 0


@pytest.fixture
def small(tmp_path: Path) -> tuple[Study, Path]:
    """A study whose corpus is a small file."""
    rows = [{"prompt": f"p {i}", "completion": f"c {i}", "group": f"g{i % 20}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    study = read_study(CPU)
    study = replace(study, corpus=replace(study.corpus, source=str(tmp_path / "rows.jsonl")))
    return study, tmp_path / "out"


def test_what_a_kill_left_half_done_is_made_again_and_the_rest_is_not(small: tuple[Study, Path]) -> None:
    """A task folder without its result is emptied and made again; one with it is left as it is."""
    study, out = small
    task = Plan(study, out).corpus()
    assert [len(wave) for wave in missing([task], out)] == [1]
    run_tasks([task], out, jobs=1, on_event=lambda e: None)
    folder = task.folder(out)
    whole = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_text("changed")
    run_tasks([task], out, jobs=1, on_event=lambda e: None)
    assert (folder / "train.jsonl").read_text() == "changed"
    (folder / RESULT).unlink()
    (folder / "half.tmp").touch()
    run_tasks([task], out, jobs=1, on_event=lambda e: None)
    assert (folder / "train.jsonl").read_bytes() == whole
    assert not (folder / "half.tmp").exists()


def test_a_task_is_named_by_all_that_decides_it(small: tuple[Study, Path]) -> None:
    """Another seed, setting or corpus makes another task of it and of all that needs it; a name does not."""
    study, out = small
    arm = study.questions["a"].arm("kl")

    def key(study: Study, seed: int = 0, **settings: float) -> str:
        return Plan(study, out).train(arm, DEFAULTS | {"learning_rate": 1e-3} | settings, seed).key

    other = replace(study, corpus=replace(study.corpus, seed=1))
    keys = {key(study), key(study, 1), key(study, weight=4.0), key(other)}
    assert len(keys) == 4
    assert key(study) == key(replace(study, seeds=9))
    assert Task("corpus", "a", {"x": 1}).key == Task("corpus", "b", {"x": 1}).key


def test_choices_follow_validation_one_field_after_the_other(small: tuple[Study, Path]) -> None:
    """Results written by hand: the learning rate is chosen first, then the weight at that rate, then the
    temperature; arms that follow another take its choices; tests are never looked at."""
    study, out = small
    grid = {"learning_rate": (1.5e-3, 3e-3, 6e-3, 1.2e-2), "weight": (1.0, 4.0), "temperature": (1.0, 2.0)}
    plan = Plan(replace(study, tune=grid), out)
    arm = study.questions["a"].arm("kl")

    def pretend(task: Task) -> None:
        s = task.spec
        bits = abs(np.log2(s["learning_rate"] / 6e-3)) + abs(s["weight"] - 4) + s["temperature"]
        task.folder(out).mkdir(parents=True, exist_ok=True)
        (task.folder(out) / RESULT).write_text(json.dumps({"validation": bits}))

    asked = []
    while (choice := plan.choice("a", arm)).wanted:
        asked.append(len(choice.wanted))
        for task in choice.wanted:
            pretend(task)
    assert asked == [8, 2, 2]  # two seeds: four rates; then one more weight, one more temperature
    assert choice.settings == {"learning_rate": 6e-3, "weight": 4.0, "temperature": 1.0}
    follower = study.questions["b"].arm("kl, 1 view")
    assert plan.choice("b", follower).settings == choice.settings
    fixed = study.questions["c"].arm("dense, T 2")
    assert plan.choice("c", fixed).settings == choice.settings | {"temperature": 2}


def test_intervals_pair_seeds_and_samples() -> None:
    """What a sample or a seed does to both arms cancels; what it does to their difference does not. With one
    seed the interval is that of `student.evaluate.paired_bootstrap`."""
    rng = np.random.default_rng(0)
    common = 10_000 + 2_000 * rng.random((5, 1)) + 4_000 * rng.random((1, 200))
    content = rng.integers(50, 400, 200)
    same = interval(common + 100, np.full(200, 200), common)
    assert same.low == pytest.approx(same.value)
    assert same.high == pytest.approx(same.value)
    assert same.agree == "5/5"
    noise = rng.normal(0, 100, (5, 200))
    samples_only = interval(common + 100 + noise[:1], content, common)
    uneven = common + 100 + noise[:1] + np.array([[-300], [-100], [0], [100], [300]])
    both = interval(uneven, content, common)
    assert both.high - both.low > 3 * (samples_only.high - samples_only.low)
    assert both.agree == "3/5"
    module = np.repeat(np.arange(20), 10)  # what ten samples share is one draw, not ten
    shared = common + 100 + rng.normal(0, 100, (1, 20))[:, module]
    alone, grouped = interval(shared, content, common), interval(shared, content, common, groups=module)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    assert grouped.value == alone.value
    offsets = np.array([[-300.0], [-100], [0], [100], [300]])
    seeds_only = interval(common + offsets, np.full(200, 200), common)
    error = np.std(offsets, ddof=1) / 5**0.5 / 100 / 200 / math.log(2)
    assert seeds_only.high - seeds_only.low == pytest.approx(2 * 1.96 * error, rel=0.1)

    def result(nll: np.ndarray) -> EvalResult:
        return EvalResult((0.5,), 0, tuple(map(str, range(200))), nll[0][:, None] / 100, content)

    a, b = (common + noise)[:1], common[:1] + 40
    value, low, high = paired_bootstrap(result(a), result(b), n=4000)
    ours = interval(a, content, b)
    assert ours.value == pytest.approx(value)
    assert ours.low == pytest.approx(low, abs=0.1 * (high - low))
    assert ours.high == pytest.approx(high, abs=0.1 * (high - low))


def test_treated_tails() -> None:
    """Dropped: the head alone, renormalised. Uniform: the head as it is, the rest of the mass in equal
    shares."""
    p = np.array([[0.5, 0.1, 0.3, 0.06, 0.04]])
    logp = np.log(p).astype(np.float32)
    dropped = treated(logp, 2, uniform=False)
    np.testing.assert_allclose(np.exp(dropped), [[0.625, 0, 0.375, 0, 0]], atol=1e-6)
    assert (dropped[0, [1, 3, 4]] == ABSENT).all()
    uniform = treated(logp, 2, uniform=True)
    np.testing.assert_allclose(np.exp(uniform), [[0.5, 0.2 / 3, 0.3, 0.2 / 3, 0.2 / 3]], rtol=1e-5)
    np.testing.assert_array_equal(treated(logp, 5, uniform=True), logp)


def test_functions_of_tests_need_no_docstring_and_belong_to_their_module(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(
        "def test_a(self):\n    x = 1\n    return x\n\n"
        "def test_b(self): pass\n\n"
        'def test_c():\n    """Says."""\n    @deco\n    def g(): ...\n\n'
        "def test_d():\n    @deco\n    def h():\n        return 2\n"
    )
    found = {f.stub: f for f in _functions(file, Path("test/test_json/test_x.py"))}
    assert list(found) == ["def test_a(self):", 'def test_c():\n    """Says."""', "def test_d():", "def h():"]
    assert found["def test_a(self):"].body == "x = 1\nreturn x"
    assert found["def test_d():"].body.startswith("@deco")
    assert {f.group for f in found.values()} == {"json"}
    assert [f.stub for f in _functions(file, Path("json/x.py"))] == ['def test_c():\n    """Says."""']


def test_configurations_are_checked(tmp_path: Path) -> None:
    """Files of the repository are read, whole, as a smoke and scaled; faults are named."""
    for file in sorted((ROOT / "studies").glob("*.yaml")):
        study = read_study(file, seeds=3)
        assert study.seeds == 3
        assert scaled(study, 0.1).train.steps == round(0.1 * study.train.steps)
        assert all(asdict(scaled(study, 0.01).train)[n] >= 2 for n in ("steps", "batch_tokens"))
    assert laid_over({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "d": None}) == {"a": {"b": 5, "c": 2}}
    text = CPU.read_text()
    for was, now, message in (
        ("tuning_seeds: 2", "tuning_seed: 2", "unknown field 'tuning_seed'"),
        ("like: a/kl, online: true", "like: a/no, online: true", "no arm 'no'"),
        ("data: plain-8,", "data: plain-9,", "no data 'plain-9'"),
        ("baseline: ce\n", "baseline: none\n", "no arm 'none'"),
        ("tune: [learning_rate]}", "tune: [rate]}", "rate is none of"),
    ):
        assert was in text
        file = tmp_path / "bad.yaml"
        file.write_text(text.replace(was, now, 1))
        with pytest.raises(UsageError, match=message):
            read_study(file)
    assert "no such question" in studies("status", CPU, "--only", "z").stderr
