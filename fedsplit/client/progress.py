"""How far a call of `ClientTrainer.fit` has come: its position in the batches, and its counts."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProgress:
    """The groups of batches that a fit has used, and what became of them.

    `groups` is their number, and `next_call` the number of the next forward. `nats` is the loss of
    the steps that were taken, summed over their `num_tokens`. `in_a_row` counts the skipped steps
    since the last step that was taken. The others are those of `FitStats`.
    """

    groups: int = 0
    next_call: int = 0
    nats: float = 0.0
    num_tokens: int = 0
    steps: int = 0
    repeated: int = 0
    refused: int = 0
    skipped: int = 0
    overflows: int = 0
    in_a_row: int = 0

    def begin(self, next_call: int) -> "FitProgress":
        """Return the progress at the beginning of the next group, whose first call is this one."""
        return replace(self, next_call=next_call)

    def taken(self, loss: float, num_tokens: int, repeats: int) -> "FitProgress":
        """Return the progress after a step that was taken."""
        return replace(
            self,
            groups=self.groups + 1,
            nats=self.nats + loss * num_tokens,
            num_tokens=self.num_tokens + num_tokens,
            steps=self.steps + 1,
            repeated=self.repeated + repeats,
            in_a_row=0,
        )

    def given_up(self) -> "FitProgress":
        """Return the progress after a step that was stale at every attempt."""
        return replace(self, groups=self.groups + 1, refused=self.refused + 1)

    def left_out(self, *, is_overflow: bool) -> "FitProgress":
        """Return the progress after a step with NaN, Inf or a far too large gradient."""
        return replace(
            self,
            groups=self.groups + 1,
            skipped=self.skipped + 1,
            overflows=self.overflows + is_overflow,
            in_a_row=0 if is_overflow else self.in_a_row + 1,
        )
