"""`tide bench precompute` at toy sizes: the three layouts make equal rows, and its counts are those of what
ran. Times are not looked at."""

from typing import Any

import pytest
import torch

from tools.benches import layouts
from tools.benches.layout_figures import cost
from tools.benches.precompute import busy_share, measure, table

TOY = {
    "layers": 2, "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 600,
    "samples": 3, "length": 96, "views": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["sft", "stdlib", "moe"])
def run(request: pytest.FixtureRequest) -> dict[str, Any]:
    moe = {"experts": 16, "experts_active": 4, "expert_intermediate": 16} if request.param == "moe" else {}
    corpus = "sft" if moe else request.param
    sizes = layouts.Sizes(**TOY, **moe)
    teacher = layouts.make_teacher(sizes, device=torch.device("cpu"), dtype=torch.float32)
    return measure(sizes, corpus, teacher, dtype=torch.float32, repeats=1)


def test_sides_make_equal_rows(run: dict[str, Any]) -> None:
    for side in ("reference", "fair"):
        equal = run["equal"][side]
        assert all(v < 1e-5 for k, v in equal.items() if k.startswith("max_error")), equal
        assert equal["same_count"] > 0.99
        assert equal["same_ids"] > 0.99


def test_figures(run: dict[str, Any]) -> None:
    tokens = {n: s["tokens"] for n, s in run["sides"].items()}
    assert tokens["engine"] <= tokens["fair"] <= tokens["reference"]  # equal where nothing is shared
    assert run["ratio_fair_tokens"] == tokens["fair"] / tokens["engine"]
    assert run["sides"]["engine"]["head_positions"] < tokens["engine"]
    assert {"ratio_reference", "ratio_fair", "ratio_reference_cpu", "ratio_fair_cpu"} <= run.keys()
    assert len(table({"toy": run}).rows) == 3


def test_counted_tokens_and_flops_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the padded sides and the engine: torch's own counter of matrix products agrees with `cost`, but for
    what one CPU attention kernel does not report."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = layouts.Sizes(**TOY)
    teacher = layouts.make_teacher(sizes, device=torch.device("cpu"), dtype=torch.float32)
    work = layouts.make_work(sizes, layouts.sft_samples(sizes), teacher)
    query = sizes.heads * sizes.head_dim
    for packed, length, call in ((True, None, work.engine), (False, 96, lambda: work.padded(96))):
        with FlopCounterMode(display=False) as counter:
            call()
        counted = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
        expected = cost(work, length, packed=packed)
        products = sum(v for k, v in counted.items() if "attention" not in k)
        assert products == expected.flops - 4 * query * expected.pairs


def test_busy_share_is_of_a_run_of_the_whole_command() -> None:
    """`tide precompute`'s own loop over text, with and without worker processes."""
    sizes = layouts.Sizes(**{**TOY, "samples": 12})
    teacher = layouts.make_teacher(sizes, device=torch.device("cpu"), dtype=torch.float32)
    for workers in (0, 1):
        found = busy_share(sizes, teacher, workers)
        assert 0 < found["share"] < 1
        assert found["workers"] == workers
        assert found["model_s"] < found["loop_s"]
