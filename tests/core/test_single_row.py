"""A single row in bfloat16 as a product with a vector, against the linear layer of torch."""

import pytest
import torch
from torch import Tensor, nn

from fedsplit.model.single_row import SingleRowLinear, with_single_rows

WIDTH, OUT = 96, 160


def layers(dtype: torch.dtype, *, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype)
    changed = nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype)
    changed.load_state_dict(plain.state_dict())
    return plain, with_single_rows(changed)


def rows(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1,), ()])
def test_a_single_row_differs_by_one_rounding(shape: tuple[int, ...], bias: bool) -> None:
    plain, changed = layers(torch.bfloat16, bias=bias)
    x = rows(*shape, dtype=torch.bfloat16)
    found, expected = changed(x), plain.double()(x.double())
    assert found.shape == expected.shape
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 1), torch.bfloat16), ((1, 1), torch.float32), ((3, 4), torch.float32)]
)
def test_all_else_is_computed_as_before(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain, changed = layers(dtype, bias=True)
    x = rows(*shape, dtype=dtype)
    assert torch.equal(changed(x), plain(x))


def test_a_single_row_has_its_gradients() -> None:
    plain, changed = layers(torch.bfloat16, bias=True)
    for layer in (plain, changed):
        layer(rows(1, 1, dtype=torch.bfloat16)).sum().backward()
    for name, parameter in changed.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=0, atol=0)


def test_layers_of_other_classes_stay() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 3), Own(3, 4))
    names = list(model.state_dict())
    with_single_rows(model)
    assert [type(each) for each in model] == [SingleRowLinear, Own]
    assert list(model.state_dict()) == names
