"""`tide walk` on datasets that `tide precompute` made: what it shows is what is stored and trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Tide, refused
from small_precompute import write_folders
from transformers import PreTrainedTokenizerFast

from shards.reader import LogitDataset
from student.attention import attention_mask
from student.batch import collate
from student.model import load_student
from student.objective import parse_objective


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    golden: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    return write_folders(tmp_path_factory.mktemp("walk"), golden, student_tokenizer, teacher_tokenizer)


def make(tide: Tide, work: Path, teacher: str) -> Path:
    out = work / f"data-{teacher}"
    if not out.exists():
        options = {"teacher": work / teacher, "student": work / "student", "corpus": work / "corpus.jsonl"}
        options |= {"out": out, "views": 2, "block-size": 8, "student-max-length": 64, "max-dropped": 1}
        result = tide("precompute", *(x for k, v in options.items() for x in (f"--{k}", v)))
        assert result.code == 0, result.err
    return out


def walked(result: Any) -> dict[str, dict[str, Any]]:
    """Facts by step."""
    assert result.code == 0, result.err
    return {s["title"]: s["facts"] | {"missing": s["missing"]} for s in json.loads(result.out)["steps"]}


@pytest.mark.parametrize("teacher", ["teacher_dense", "teacher_other", "teacher_moe"])
def test_every_step(tide: Tide, work: Path, teacher: str) -> None:
    """All steps of all pipelines, found through the options that the dataset's folder keeps. The teacher is
    asked again: its answers are those stored, and the loss is that of a batch of this one row."""
    data = make(tide, work, teacher)
    dataset = LogitDataset(data)
    cross = dataset.manifest.kind == "cross"
    row = next(r for at in dataset.batches("train", 1) for r in dataset.read(*at) if r.masked.sum() > 4)
    result = tide("walk", "--data", data, "--sample", row.sample_id[:12], "--view", 1, "--json")
    steps = walked(result)
    assert list(steps)[:6] == [
        "message",
        "tokenise",
        "align",
        "noise plan",
        "teacher's questions",
        "frozen teacher",
    ]
    assert steps["tokenise"]["sample id"] == row.sample_id
    assert steps["noise plan"]["timestep t"] == pytest.approx(row.t)
    assert f"{int(row.masked.sum())} of {int(row.maskable.sum())}" in steps["noise plan"]["masked M"]
    answers = steps["frozen teacher"]
    assert answers["weights"] == "those of the dataset"
    assert float(answers["worst difference to the stored"].split()[0]) < 1e-5
    if not cross:
        assert "equal to the stored" in answers["kept entries [K]"]

    model, _ = load_student(work / "student", attention="sdpa")
    m = dataset.manifest
    batch = collate(
        [row],
        block_size=m.block_size,
        mask_token_id=m.student.mask_token_id,
        row_tokens=512,
        shared_vocab_size=m.shared_vocab_size,
        temperatures=() if cross else m.codec.temperatures,  # type: ignore[union-attr]
    )
    objective = parse_objective("reverse-calm" if cross else "tidal")
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=attention_mask("staircase", batch.at, model),
            read=batch.read,
            use_cache=False,
        ).logits
    assert steps["loss"]["total"] == pytest.approx(float(objective(logits, batch, 0.5).total), rel=1e-5)
    assert steps["loss"]["the plain form, whole logits"] == pytest.approx(steps["loss"]["total"], rel=1e-5)


def test_without_what_it_was_made_of(tide: Tide, work: Path, tmp_path: Path) -> None:
    """A pulled dataset says nothing of folders: what can be shown is, the rest names its option."""
    data = make(tide, work, "teacher_dense")
    copy = tmp_path / "pulled"
    assert tide("pull", data, copy).code == 0
    steps = walked(tide("walk", "--data", copy, "--json"))
    assert "--corpus, --student, --teacher" in steps["frozen teacher"]["missing"]
    assert "--student" in steps["loss"]["missing"]
    assert "philox" in steps["noise plan"]["source"]
    given = walked(tide("walk", "--data", copy, "--student", work / "student", "--objective", "kl", "--json"))
    assert given["loss"]["kl"]


def test_other_text_than_that_of_the_dataset(tide: Tide, work: Path, tmp_path: Path) -> None:
    data = make(tide, work, "teacher_dense")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"instruction": "Say.", "output": "So."}) + "\n")
    refused(tide("walk", "--data", data, "--corpus", other), 2, other, "no row whose sample id is")


def test_mistakes(tide: Tide, work: Path) -> None:
    data = make(tide, work, "teacher_moe")
    refused(tide("walk", "--data", work), 1, work, "not a logit dataset")
    refused(tide("walk", "--data", data, "--sample", "nope"), 2, "nope")
    refused(tide("walk", "--data", data, "--view", 2), 2, "views", "2")
    refused(tide("walk", "--data", data, "--progress", 2), 2, "--progress", "2")
    refused(tide("walk", "--data", data, "--objective", "kl"), 2, "kl", "cross")
