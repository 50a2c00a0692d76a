"""`fedsplit shards`: the table, the picture and the JSON say what `shard` deals."""

import json
import re
import shlex
from pathlib import Path

import pytest
from matplotlib.image import imread

from fedsplit.cli import main
from fedsplit.data import Corpus, Document, hold_out, load_corpus, shard
from fedsplit.runs.shard_stats import RunPartitions
from fedsplit.spec import DataSpec, ShardingSpec


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    status = main(["shards", *map(str, arguments)])
    told = capsys.readouterr()
    assert (status, told.err) == (0, "")
    return told.out


@pytest.fixture
def reviews(tmp_path) -> Path:
    """Six examples of each of two labels, one of which is hard to print."""
    rows = [
        {"text": f"review {number} " * (1 + number), "label": label}
        for number in range(6)
        for label in ("_bad\n$x$", "good")
    ]
    file = tmp_path / "reviews.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_the_table_says_what_is_dealt(capsys):
    out = printed(capsys, "sharding=iid", "clients=3", "seed=1")
    training, _ = hold_out(load_corpus(DataSpec()), 0.1, seed=1)
    shards = shard(training, ShardingSpec(kind="iid"), 3, seed=1)
    lines = out.splitlines()
    assert lines[0].endswith("(pydoc_data.topics), sharding=iid, seed=1")
    assert lines[2].split() == "client documents bytes share groups largest groups".split()
    for number, part in enumerate(shards):
        share = f"{part.num_bytes / training.num_bytes:.1%}"
        told = [len(part.documents), f"{part.num_bytes:,}", share, len(part.groups)]
        assert lines[3 + number].split()[:5] == [f"client-{number}", *map(str, told)]
    assert lines[6].split()[2:4] == [f"{training.num_bytes:,}", "100.0%"]
    assert re.fullmatch(r"skew 0\.\d{3}: how unlike all together a client is, .*", lines[7])
    assert len(lines) == 8


def test_examples_are_counted_by_label(capsys, reviews, tmp_path):
    words = ["data=jsonl", f"data.path={reviews}", "task=sequence_classification", "clients=2"]
    words += ["sharding=pathological", "sharding.classes=1", "data.held_out=0.2"]
    out = printed(capsys, *words, "--out", tmp_path / "new" / "folder")
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert " examples " in rows["client"] and "largest labels" in rows["client"]
    largest = {rows[client].split("  ")[-1] for client in ("client-0", "client-1")}
    assert largest == {"good 100%", "_bad $x$ 100%"}
    assert "skew 0.500" in out
    told = json.loads((tmp_path / "new" / "folder" / "shards.json").read_text())
    assert (told["skew"], told["unit"]) == (0.5, "examples")
    assert told["all"]["labels"] == {"_bad\n$x$": 5, "good": 5}
    assert sorted(list(client["labels"].items()) for client in told["clients"]) == [
        [("_bad\n$x$", 5)],
        [("good", 5)],
    ]


def test_the_example_in_the_help_leaves_picture_and_json(capsys, tmp_path):
    assert main(["shards", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    words = shlex.split(shown.partition("example: fedsplit shards ")[2])
    assert words[-2] == "--out"
    folder = tmp_path / words[-1]
    out = printed(capsys, *words[:-1], folder)
    assert out.splitlines()[-2:] == [str(folder / "shards.png"), str(folder / "shards.json")]
    told = json.loads((folder / "shards.json").read_text())
    assert [client["client"] for client in told["clients"]] == [f"client-{n}" for n in range(8)]
    for client in (*told["clients"], told["all"]):
        assert sum(client["labels"].values()) == client["bytes"]
        assert list(client["labels"].values()) == sorted(client["labels"].values(), reverse=True)
    assert sum(client["bytes"] for client in told["clients"]) == told["all"]["bytes"]
    assert f"skew {told['skew']:.3f}" in out
    assert imread(folder / "shards.png").std() > 0.05  # neither blank nor broken


@pytest.mark.filterwarnings("ignore:The sum of partition sizes")
def test_what_a_partitioner_leaves_out_is_told(capsys):
    pytest.importorskip("flwr_datasets", reason="the extra `partitioners` is not installed")
    target = "sharding.target=flwr_datasets.partitioner.SizePartitioner"
    options = "sharding.options={partition_sizes: [5, 10]}"
    out = printed(capsys, "sharding=partitioner", target, options, "clients=2")
    assert re.search(r"^client-1 +10 ", out, re.M)
    told = re.search(
        r"^all +15 +([\d,]+)(?s:.*)^([\d,]+) bytes are left out by flwr_.*Size", out, re.M
    )
    training, _ = hold_out(load_corpus(DataSpec()), 0.1, seed=0)
    assert sum(int(number.replace(",", "")) for number in told.groups()) == training.num_bytes


REFUSED = {
    "no override": (["iid"], "'iid' cannot be read; write group=option or field=value"),
    "no such option": (["sharding=fair"], "sharding.*fair"),
    "several runs": (["sharding=iid,natural"], "lists several values"),
    "too many clients": (
        ["clients=200"],
        "68 groups of .* allow at most 68 clients, 200 asked for",
    ),
    "no data": (["data=text", "data.path=/nowhere"], "data.path=/nowhere does not exist"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_line_and_status_1(capsys, tmp_path, words, message):
    assert main(["shards", *words, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert re.fullmatch(f"error: .*({message}).*\n", told.err)
    assert told.out == "" and not (tmp_path / "out").exists()


# --- partitions ---------------------------------------------------------------------------------


def labelled(**counts: int) -> Corpus:
    documents = [
        Document(text=label * 9, group=f"{label}{n}", label=label)
        for label, count in counts.items()
        for n in range(count)
    ]
    return Corpus(name="sample", documents=tuple(documents))


SKEWS = {
    "alike": ([labelled(a=2, b=6), labelled(a=1, b=3)], 0.0),
    "apart": ([labelled(a=4), labelled(b=4)], 0.5),
    "ten apart": ([labelled(**{label: 3}) for label in "abcdefghij"], 0.9),
    "in between": ([labelled(a=3, b=1), labelled(a=1, b=3)], 0.25),
    "one client": ([labelled(a=3, b=1)], 0.0),
}


@pytest.mark.parametrize(("shards", "skew"), SKEWS.values(), ids=SKEWS)
def test_skew_is_the_mean_distance_to_the_whole(shards, skew):
    assert RunPartitions.of(shards).skew == pytest.approx(skew)


def test_many_clients_and_labels_can_be_drawn(tmp_path):
    names = [f"$label_{number}$" for number in range(40)]
    shards = [labelled(**{name: 1 + number % 3 for name in names}) for number in range(40)]
    RunPartitions.of(shards).plot(tmp_path / "shards.png", "a title " * 40)
    height, width, _ = imread(tmp_path / "shards.png").shape
    assert width > 2 * height
