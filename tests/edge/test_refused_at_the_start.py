"""What does not fit a run's model or its clients' data is refused before anything starts."""

from pathlib import Path

import pytest

from fedsplit.errors import ConfigError
from tests.edge.federation import federate, spec_for

REFUSED = {
    "sequence": (
        ["data.sequence_length=64"],
        r"data.sequence_length=64, but the model has 32 positions \(max_position_embeddings=32\)",
    ),
    "batch": (
        ["train.batch_size=4000"],
        r"client-\d has \d+ training examples, but train.batch_size=4000; set train.batch_size=\d",
    ),
    "vocabulary": (
        ["model.config.vocab_size=260"],
        r"the tokenizer has 300 tokens, .* but the model's embedding has 260 rows \(vocab_size\)",
    ),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_and_leaves_no_rounds(tmp_path: Path, words: list[str], message: str) -> None:
    run = spec_for(tmp_path, *words)
    with pytest.raises(ConfigError, match=message):
        federate(run)
    assert not list(tmp_path.rglob("metrics.jsonl"))
