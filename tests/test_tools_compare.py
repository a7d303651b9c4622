"""`tide compare` from end to end: figures equal `tide eval`'s, pairs, the page, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import Tide, refused

from student.evaluate import EvalResult, bootstrap, paired_bootstrap
from student.model import load_student


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"instruction": f"Say {i}.", "output": f"{i} and {i + 1} follow."} for i in range(12)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def data(tide: Tide, model: Path, corpus: Path, tmp_path: Path) -> Path:
    """A real dataset, about half of it held out."""
    made = tide(
        "precompute", "--teacher", model, "--student", model, "--corpus", corpus, "--out", tmp_path / "data",
        "--block-size", 8, "--student-max-length", 64, "--views", 1, "--holdout", 0.5, "--no-compdemo",
        "--kind", "shared",
    )  # fmt: skip
    assert made.code == 0, made.err
    return tmp_path / "data"


@pytest.fixture
def students(model: Path, tmp_path: Path) -> list[Path]:
    """The same network with weights moved by little and by much; the second says what it was trained with."""
    folders = []
    for name, noise in (("near", 0.02), ("far", 0.3)):
        folder = shutil.copytree(model, tmp_path / name)
        network, _ = load_student(folder)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in network.parameters():
                p.add_(noise * torch.randn_like(p))
        network.save_pretrained(folder)
        folders.append(folder)
    terms = [{"name": "tidal", "weight": 1.0}, {"name": "kl", "weight": 4.0}]
    (folders[1] / "train_config.json").write_text(json.dumps({"objective": {"terms": terms}}))
    return folders


def test_folders_and_files_on_the_same_samples(
    tide: Tide, model: Path, data: Path, students: list[Path], tmp_path: Path
) -> None:
    """One student from an earlier result, two evaluated here; figures and intervals are recomputed from the
    single evaluations, against the first and against another baseline."""
    near, far = students
    results = {}
    for folder in (model, near, far):
        out = tmp_path / "results" / f"{folder.name}.json"
        done = tide(
            "eval", "--model", folder, "--data", data, "--out", out, "--grid", "0.25,0.75", "--seed", 3
        )
        assert done.code == 0, done.err
        results[folder] = EvalResult.from_json(json.loads(out.read_text()))
    earlier = tmp_path / "results" / f"{model.name}.json"
    page, out = tmp_path / "new" / "page.html", tmp_path / "c.json"
    done = tide("compare", earlier, near, far, "--data", data, "--html", page, "--out", out, "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["grid"] == [0.25, 0.75]  # the file's, since nothing else was asked for
    assert summary["seed"] == 3
    assert [s["name"] for s in summary["students"]] == [model.name, "near", "far"]
    assert [s["objective"] for s in summary["students"]] == [None, None, "tidal+kl:4"]
    for found, folder in zip(summary["students"], results):
        own = results[folder]
        bits = bootstrap(own, seed=3)
        assert [found["bits_per_byte"], *found["interval"]] == pytest.approx(bits)
        if folder is not model:
            difference = paired_bootstrap(own, results[model], seed=3)
            assert [found["difference"], *found["difference_interval"]] == pytest.approx(difference)
    assert summary["students"][0]["difference"] is None
    assert json.loads(out.read_text())["students"] == summary["students"]
    assert out.with_suffix(".yaml").exists()
    assert "against" in done.err
    html = page.read_text()
    for text in (f"Difference to {model.name}", "near", "tidal+kl:4", f"{summary['samples']} samples"):
        assert text in html

    again = tide("compare", earlier, near, "--baseline", near, "--data", data, "--json")
    first, second = json.loads(again.out)["students"]
    assert second["difference"] is None
    assert first["difference"] == pytest.approx(-summary["students"][1]["difference"])


def test_what_cannot_be_compared(tide: Tide, data: Path, students: list[Path], tmp_path: Path) -> None:
    near, far = students
    refused(tide("compare", near), 2, "at least two", near)
    refused(tide("compare", near, near, "--data", data), 2, "twice")
    refused(tide("compare", near, far), 2, near, "--data")
    refused(tide("compare", near, far, "--data", data, "--baseline", "x"), 2, "'x'")
    refused(tide("compare", near, far, "--data", data, "--limit", 0), 2, "--limit")
    refused(tide("compare", near, far, "--data", data, "--grid", "a"), 2, "--grid", "'a'")
    refused(tide("compare", near, far, "--data", data, "--html", tmp_path), 2, "--html", "is a folder")
    refused(tide("compare", near, tmp_path / "none", "--data", data), 1, tmp_path / "none")
    refused(tide("compare", near, far, "--data", tmp_path / "no data"), 1, tmp_path / "no data")

    def result(name: str, **changes: object) -> Path:
        own = {
            "grid": [0.5],
            "seed": 0,
            "sample_ids": ["a", "b"],
            "nll_nats": [[1.0], [2.0]],
            "bytes": [3, 4],
        }
        (tmp_path / name).write_text(json.dumps(own | changes))
        return tmp_path / name

    one = result("one.json")
    for other, words in (
        (result("two.json", sample_ids=["a", "c"]), ("samples", "2 and 2")),
        (result("three.json", sample_ids=["a"], nll_nats=[[1.0]], bytes=[3]), ("samples", "1 and 2")),
        (result("four.json", grid=[0.25]), ("timesteps", "0.25")),
        (result("five.json", seed=1), ("seed",)),
    ):
        refused(tide("compare", one, other), 2, one, other, "cannot be compared", *words)
    broken = tmp_path / "broken.json"
    for text, word in (("{", "Expecting"), ("[]", "not a result"), ("{}", "not an evaluation result")):
        broken.write_text(text)
        refused(tide("compare", one, broken), 2, word, "tide eval")
