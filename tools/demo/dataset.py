"""The demo's dataset page: `tide inspect --html` of the dataset with CompDemo, beside the one without."""

from __future__ import annotations

from pathlib import Path

from shards.reader import LogitDataset
from student.schedule import LambdaSchedule
from tools.console import Progress
from tools.inspecting.page import write_page
from tools.inspecting.sample import ROWS, sample
from tools.inspecting.summary import summarise
from tools.inspecting.text import texts_of
from tools.options import megabytes


def write_data_page(path: Path, out: Path, progress: Progress) -> Path:
    """The page of a finished demo in the folder `out`."""
    data = out / "data" / "shared-compdemo"
    dataset = LogitDataset(data)
    sampled = sample(dataset, ROWS, megabytes(progress, "reading rows"))
    return write_page(
        path,
        dataset,
        sampled,
        summarise(dataset, sampled),
        texts=texts_of(dataset.manifest, str(data), str(out / "models" / "student-start")),
        schedule=LambdaSchedule(),
        rows=ROWS,
        beside=LogitDataset(out / "data" / "shared-plain"),
        progress=progress,
    )
