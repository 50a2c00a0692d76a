"""What does not fit a run's model or its clients' data is refused before anything starts."""

from pathlib import Path

import pytest

from fedsplit.errors import ConfigError, DataError
from simulations.single import claim, run_one
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
    "accumulation": (
        ["train.accumulation=1000"],
        r"has (\d+) training examples, but train.accumulation=1000 batches of .*=2 are 2000; lower",
    ),
    "blocks": (
        ["model.config.n_layer=1000000"],
        r"model.config.n_layer=1000000 is too large; a new model has at most 4096 blocks",
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


def test_more_clients_than_documents_are_refused_before_they_are_made(tmp_path: Path) -> None:
    run = spec_for(tmp_path, "clients=100000000")
    with pytest.raises(DataError, match=r"allow at most \d+ clients, 100000000 asked for; lower"):
        claim(run)
    assert not Path(run.launch.run_dir).exists()


def test_data_that_cannot_be_read_is_reported_before_the_run_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="none"):
        run_one(spec_for(tmp_path, f"data.path={tmp_path / 'none'}"))
    assert capsys.readouterr().out == ""
