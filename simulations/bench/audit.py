"""What a curious server reads of the default run, and what noise costs when training goes on.

`positive_*`: the attacks without a defence; `negative`: text found in rows of another text, and
`chance` what a constant guess finds. `strict_*` and `noise_labels` are the attacks under the noise
of `privacy=strict`, and on gradients with noise of half a radius.

`strict_loss_cost` and `strict_vs_no_trunk` are differences of held-out bits per byte. The model of
the default run goes on with public text, and then with private text: split without noise, split
with the noise (strict on the private text), and the clients' own blocks without any trunk. Each is
trained as it is measured.

`shield_overhead` is the time of a step with the shield over one without, and `shield_overhead_768`
the same with the width and depth of GPT-2. `seal_share` is the time that all clients take to seal
their weights and to open the mean, as a share of a round of the default run.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from transformers import PretrainedConfig

from fedsplit.audit.report import audit
from fedsplit.client.ledger import Ledger
from fedsplit.client.privacy import NoiseKey, Shield
from fedsplit.client.public_text import gradient_radius, public_rows, random_tokens
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.seal import Seal, added
from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose
from fedsplit.data import Batch, Corpus, hold_out, load_corpus, load_tokenizer
from fedsplit.link import LocalLink
from fedsplit.model import connect
from fedsplit.model.describe import config_of, parts_of, shared
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.sealed_result import joined
from fedsplit.spec import ModelSpec, PolicySpec, RunSpec
from fedsplit.trunk.service import TrunkService
from simulations.bench.report import Report, in_turns
from simulations.single import carry_out, claim

_NOISE = (0.2, 0.4)
_SMALL = ("model.config.n_layer=4", "model.config.n_embd=16", "model.config.n_head=2")
_RUN = {
    "full": (),
    "toy": ("experiment=toy", *_SMALL, "data.vocabulary=300", "train.rounds=1"),
}
_TUNING = ("train.lr=1e-3", "train.schedule=constant", "train.warmup_steps=0", "sharding=iid")
_STEPS = {"full": (120, 40), "toy": (2, 1)}
"""Steps on public and on private text."""
_TURNS = {"full": 20, "toy": 1}
_WIDE: dict[str, dict[str, int]] = {
    "full": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "toy": {},
}
_METHODS = {
    "split": (("privacy=off",), ("privacy=off",)),
    "noise": (("privacy=noise", "privacy.gradient_z=0"), ("privacy=strict",)),
    "no trunk": (("baseline=no_trunk",), ("baseline=fedavg",)),
}
"""The settings of each way to go on, on public and on private text."""


def measure(size: str) -> Report:
    """Fill a report with what the audit of a default run finds, and with the cost of noise."""
    report = Report()
    with TemporaryDirectory(prefix="fedsplit-audit-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        words = ("launch=inline", f"launch.run_dir={place / 'runs'}", *_RUN[size])
        run = _trained(compose(words))
        _attack(report, run, quick=size == "toy")
        _train_on(report, run, place, size)
        _time_shields(report, run, place, size)
        _time_seals(report, run)
    return report


def _trained(run: RunSpec) -> RunFolder:
    run, folder = claim(run)
    carry_out(run, folder)
    return folder


# --- attacks --------------------------------------------------------------------------------------


def _attack(report: Report, folder: RunFolder, *, quick: bool) -> None:
    found = audit(folder, noise=_NOISE, quick=quick)
    for cell in found.cells:
        report.row("cell", defence=cell.defence, attack=cell.attack, value=cell.value)
    strict = next(name for name in found.losses if name.startswith("strict"))
    of_strict = {c.attack: c.value for c in found.cells if c.defence == strict}
    report.figures |= {
        "positive_text": found.value("off", "text"),
        "positive_labels": found.value("off", "labels"),
        "words": found.value("off", "words"),
        "negative": found.negative,
        "chance": found.chance,
        "strict_text": max(v for name, v in of_strict.items() if name.startswith("text")),
        # 0 where there is nothing to attack.
        "strict_labels": of_strict.get("labels", 0.0),
        "strict_words": of_strict.get("words", 0.0),
        "noise_labels": found.value("gradient noise 0.5", "labels"),
        "attacks": float(len({cell.attack for cell in found.cells})),
        "defences": float(len(found.losses) - 1),
        "audit_s": found.seconds,
    }


# --- training that goes on ------------------------------------------------------------------------


def _train_on(report: Report, begun: RunFolder, place: Path, size: str) -> None:
    public, private = hold_out(load_corpus(begun.run.data), begun.run.data.held_out, begun.run.seed)
    texts = [_written(place / name, c) for name, c in (("public", public), ("private", private))]
    ends = {}
    for name, settings in _METHODS.items():
        model = begun.model
        for number, (text, words) in enumerate(zip(texts, settings, strict=True)):
            model, bits = _gone_on(begun.run, model, text, words, _STEPS[size][number], place)
            report.row("bits per byte", way=name, text=text.stem, value=bits)
        ends[name] = bits
    report.figures["strict_loss_cost"] = ends["noise"] - ends["split"]
    report.figures["strict_vs_no_trunk"] = ends["noise"] - ends["no trunk"]


def _gone_on(
    like: RunSpec, model: Path, text: Path, words: tuple[str, ...], steps: int, place: Path
) -> tuple[Path, float]:
    """Train a model on a text, and return its folder and the held-out bits per byte."""
    settings = (
        *("launch=inline", f"launch.run_dir={place / 'on'}", "clients=2", "data=text", *words),
        *(f"data.path={text}", f"data.sequence_length={like.data.sequence_length}"),
        *(f"train.rounds=1 train.local_steps={steps}".split()),
        *(f"train.batch_size={like.train.batch_size}", *_TUNING),
    )
    run = replace(compose(settings), model=ModelSpec(pretrained=str(model), family="", config={}))
    folder = _trained(run)
    result = folder.model
    if run.client_weights.sealed:
        (key,) = folder.path.glob("privacy/*/seal.key")
        result = place / "joined" / folder.path.name
        joined(folder, Seal.of(key)).save_pretrained(result)
    return result, folder.rounds()[-1].bits_per_byte


def _written(file: Path, corpus: Corpus) -> Path:
    file = file.with_suffix(".txt")
    file.write_text("\n".join(document.text for document in corpus.documents), encoding="utf-8")
    return file


# --- the time that protection takes ---------------------------------------------------------------


def _time_shields(report: Report, folder: RunFolder, place: Path, size: str) -> None:
    run = replace(folder.run, clients=1, policy=PolicySpec())
    config = config_of(run, load_tokenizer(str(folder.model)), ())
    wide = deepcopy(config)
    wide.update(_WIDE[size])
    for name, each in (("shield_overhead", config), ("shield_overhead_768", wide)):
        with (
            _stepping(run, each, None) as plain,
            _stepping(run, each, place / f"{name}.db") as shielded,
        ):
            found = in_turns(_TURNS[size], {"plain": plain, "shielded": shielded})
        report.figures[name] = report.ratio(name, found["shielded"], found["plain"])


def _time_seals(report: Report, folder: RunFolder) -> None:
    run = folder.run
    model = parts_of(run, config_of(run, load_tokenizer(str(folder.model)), ())).client
    weights, seal = shared(model, run), Seal(bytes(32))
    begin = perf_counter()
    sealed = [
        seal.sealed(weights, 1, run.clients, client=number, clients=run.clients)
        for number in range(run.clients)
    ]
    seconds = perf_counter() - begin
    total = added(sealed)
    begin = perf_counter()
    seal.opened(total)
    seconds += run.clients * (perf_counter() - begin)
    share = seconds / median(stats.seconds for stats in folder.rounds())
    report.row("seal_share", seconds=seconds, clients=run.clients, share=share)
    report.figures["seal_share"] = share


@contextmanager
def _stepping(
    run: RunSpec, config: PretrainedConfig, ledger: Path | None
) -> Iterator[Callable[[], float]]:
    """Yield a function that takes a step, with the shield if there is a ledger, and times it."""
    parts = parts_of(run, config)
    with ExitStack() as stack:
        service = stack.enter_context(TrunkService(parts.trunk, run))
        link = LocalLink(service, service.admit("client-0"))
        trunk = RemoteTrunk(link, parts.client, run, client="client-0")
        shield = None
        if ledger:
            ids_BT = random_tokens(config, run.data.sequence_length)
            unit = gradient_radius(parts.client, ids_BT, is_classifier=False)
            shield = Shield(
                trunk,
                public_rows(parts.client, ids_BT),
                NoiseKey.new(),
                z=0.5,
                gradient=0.5,
                grad_radius=unit,
                ledger=stack.enter_context(closing(Ledger(ledger))),
            )
        connect(parts.client, shield or trunk, trunk.new_cache)
        trainer = ClientTrainer(parts.client, trunk, run, shield=shield)
        stack.enter_context(trunk.session())
        ids_BT = random_tokens(config, run.data.sequence_length)[: run.train.batch_size]
        batch = Batch(
            inputs={"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
            labels=ids_BT,
            num_tokens=ids_BT[:, 1:].numel(),
            num_bytes=ids_BT.numel(),
        )

        def step() -> float:
            began = perf_counter()
            trainer.step([batch])
            return perf_counter() - began

        yield step
