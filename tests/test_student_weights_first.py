"""Products with the weights on the left against the library's own, and where they are used.

A sampler's tests compare tokens; these compare numbers, and look at the products that reach the backend.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from student.weights_first import FEWEST, MOST, weights_first


class Products(TorchDispatchMode):
    """Notes the shapes of the left factors of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.left.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 7, bias=False)).to(dtype)


@pytest.mark.parametrize("shape", [(FEWEST,), (1, 31), (2, 16), (1, 2, 8), (MOST,), (1,), (2, MOST), (0,)])
def test_same_numbers_in_the_same_shape_and_layout(shape):
    model, x = layers(), torch.randn(*shape, 24)
    wanted = layers(torch.float64)(x.double())
    with torch.no_grad(), weights_first(model):
        got = model(x)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-6)
    assert got.is_contiguous()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a rule for MKL")
@pytest.mark.parametrize(
    ("rows", "dtype", "first"),
    [
        (FEWEST - 1, torch.float32, False),
        (FEWEST, torch.float32, True),
        (MOST, torch.float32, True),
        (MOST + 1, torch.float32, False),
        (16, torch.bfloat16, False),
    ],
)
def test_weights_are_the_left_factor_where_that_is_quicker(rows, dtype, first):
    model = layers(dtype)
    with torch.no_grad(), Products() as seen, weights_first(model):
        model(torch.randn(rows, 24, dtype=dtype))
    assert ((7, 40) in seen.left) == first
    with torch.no_grad(), Products() as seen:
        model(torch.randn(rows, 24, dtype=dtype))
    assert (7, 40) not in seen.left
