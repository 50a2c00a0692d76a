"""The head of requests at a time: one pass for the rows that wait, and a result for each call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fedsplit.openai.shared_head import shared_head
from tests.core.worlds import wait_until


class Head(nn.Linear):
    """A head whose first pass waits for `go_on`, and one of whose passes may fail."""

    def __init__(self, failing: int) -> None:
        super().__init__(3, 5)
        self.passes: list[int] = []
        self.failing = failing
        self.go_on = threading.Event()

    def get_output_embeddings(self) -> nn.Module:
        return self

    def forward(self, rows_RD: torch.Tensor) -> torch.Tensor:
        self.passes.append(len(rows_RD))
        assert self.go_on.wait(60)
        if len(self.passes) == self.failing:
            raise MemoryError("for so many rows")
        return super().forward(rows_RD)


def outcomes(head: Head, given: list[torch.Tensor]) -> list["torch.Tensor | MemoryError"]:
    """What calls in several threads return; all others come while the first one runs."""

    def call(hidden_BTD: torch.Tensor) -> "torch.Tensor | MemoryError":
        try:
            return head(hidden_BTD)
        except MemoryError as exc:
            return exc

    with shared_head(head), torch.no_grad(), ThreadPoolExecutor(len(given)) as pool:
        first = pool.submit(call, given[0])
        wait_until(lambda: head.passes)
        others = [pool.submit(call, each) for each in given[1:]]
        wait_until(lambda: len(head.forward._waiting) == len(given))
        head.go_on.set()
        return [each.result() for each in (first, *others)]


GIVEN = [torch.randn(b, t, 3) for b, t in ((1, 1), (2, 1), (1, 1), (1, 4))]


def test_calls_that_wait_share_a_pass_and_get_their_rows() -> None:
    head = Head(failing=0)
    found = outcomes(head, GIVEN)
    assert head.passes == [1, 2 + 1 + 4]
    for hidden_BTD, out_BTV in zip(GIVEN, found, strict=True):
        torch.testing.assert_close(out_BTV, nn.Linear.forward(head, hidden_BTD))
    assert "forward" not in vars(head)


def test_a_head_of_which_a_library_has_changed_the_forward_keeps_it() -> None:
    head = Head(failing=0)
    head.go_on.set()
    changed = head.forward = lambda rows_RD: nn.Linear.forward(head, rows_RD) + 1
    with shared_head(head):
        torch.testing.assert_close(head(GIVEN[0]), changed(GIVEN[0]))
    assert head.forward is changed


def test_a_model_whose_head_is_not_named_is_left_alone() -> None:
    model = Head(failing=0)
    model.get_output_embeddings = lambda: None
    with shared_head(model):
        assert "forward" not in vars(model)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_pass_that_fails_fails_one_call(failing: int) -> None:
    head = Head(failing)
    found = outcomes(head, GIVEN)
    failed = [isinstance(each, MemoryError) for each in found]
    assert sum(failed) == 1 and failed[0] == (failing == 1)
    for hidden_BTD, out_BTV in zip(GIVEN, found, strict=True):
        if not isinstance(out_BTV, MemoryError):
            torch.testing.assert_close(out_BTV, nn.Linear.forward(head, hidden_BTD))
