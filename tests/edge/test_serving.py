"""`fedsplit serve`, `generate` and `chat`: real servers, real sockets, the unsplit model's text."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from fedsplit.cli import main
from fedsplit.cli.serve import update_of
from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose, to_yaml
from fedsplit.errors import ConfigError, Draining, FedsplitError, Unauthenticated
from fedsplit.model import split_model
from fedsplit.model.lora import add_adapters, save_adapter
from fedsplit.runs.folder import RunFolder
from fedsplit.serve import Served, hosted, plan, reach, remote_model, trunks_of
from fedsplit.serve.chat import Conversation, Writer
from fedsplit.spec import (
    LoraSpec,
    PolicySpec,
    RunSpec,
    SplitSpec,
    StrategySpec,
    WireSpec,
)
from fedsplit.trunk.update import TrunkUpdate
from fedsplit.wire.messages import ServiceInfoRequest
from simulations.bench.certificate import self_signed
from tests.core.worlds import batch, small_run
from tests.edge.commands import COMMAND
from tests.edge.forked import Program
from tests.edge.tiny_models import make_model
from tests.house.source import ROOT

PROMPT = "Once upon a time"
SGD = ["train=sgd", "train.momentum=0", "train.clip_norm=0", "train.warmup_steps=0"]
BARRIER_S = 3.0
"""How long the run's trunk waits for a client that does not step."""
RUN = small_run(
    name="tale",
    policy=PolicySpec(deadline_s=BARRIER_S),
    strategy=StrategySpec(target="strategies.MUSplitFed"),
    train=replace(small_run().train, trunk_steps=2),
)
"""A run of a method with a trunk update of its own."""


# --- what there is to serve -------------------------------------------------------------------


def make_adapter(model: Path, folder: Path) -> None:
    parts = split_model(str(model), "1/2/1")
    for part in (parts.client, parts.trunk):
        add_adapters(part, LoraSpec(enabled=True, targets="q_proj,v_proj"))
        for name, parameter in part.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(parts.client, parts.trunk, folder)


@dataclass(frozen=True)
class Place:
    """A folder with models, an adapter and a run; the first lines of their two servers.

    The tests only read what is here. A test that trains or stops a server starts its own.
    """

    folder: Path
    ready: str
    run_ready: str

    @property
    def address(self) -> str:
        """The address of the models' server."""
        return address_in(self.ready)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    make_model(folder / "model")
    make_model(folder / "other", width=32)
    make_model(folder / "longer", blocks=5)
    make_model(folder / "twin", seed=1)
    make_adapter(folder / "model", folder / "adapter")
    make_model(folder / "run" / "model")
    (folder / "run" / "config.yaml").write_text(to_yaml(RUN))
    (folder / "begun").mkdir()
    (folder / "begun" / "config.yaml").write_text(to_yaml(RUN))
    (folder / "empty").write_text("")
    adapter = ["--adapter", f"medical={folder}/adapter"]
    with (
        Program("fedsplit", "serve", *models_of(folder), *adapter, *SGD) as server,
        Program("fedsplit", "serve", folder / "run") as run_server,
    ):
        yield Place(folder, server.stdout.readline(), run_server.stdout.readline())


def models_of(folder: Path) -> list[str]:
    """The words that serve one model as two trunks."""
    models = ["--model", f"base={folder}/model", "--model", f"trained={folder}/model"]
    return [*models, "--split", "1/2/1", "--bind", "127.0.0.1:0"]


def address_in(ready: str) -> str:
    """The address in a server's first line."""
    return re.search(r"at (127\.0\.0\.1:\d+);", ready)[1]


@pytest.fixture
def run_server(place, tmp_path) -> Iterator[tuple[Path, Program]]:
    """A copy of the run's folder and a server of it, which a test may train and stop."""
    folder = shutil.copytree(place.folder / "run", tmp_path / "run")
    with Program("fedsplit", "serve", folder) as server:
        assert server.stdout.readline().startswith("serving run ")
        yield folder, server


def whole(place: Place) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place.folder / "model").eval()


def text_of(model: PreTrainedModel, place: Place, tokens: int, prompt: str = PROMPT) -> str:
    """What the unsplit model says, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    ids_BT = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out_BT = model.generate(input_ids=ids_BT, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out_BT[0, ids_BT.shape[1] :], skip_special_tokens=True)


def asked(capfd, *arguments: object) -> tuple[str, str]:
    """What `fedsplit ARGUMENTS`, which succeeds, says on stdout and stderr."""
    status = main([str(argument) for argument in arguments])
    told = capfd.readouterr()
    assert status == 0, told.err
    return told.out, told.err


# --- generate ---------------------------------------------------------------------------------


def test_a_server_says_what_it_serves_and_what_to_try(place):
    expected = (
        rf"serving base, trained, medical \(cut 1/2/1\) at {place.address}; try: fedsplit generate "
        rf'--trunk {place.address} --model {place.folder}/model "Once upon a time"\n'
    )
    assert re.fullmatch(expected, place.ready)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "",
        "--kv client",
        "--draft none",
        "--draft prompt",
        "--draft {model}",
        "--sample --top-k 1",
        "--served-model-name base",
    ],
)
def test_text_is_that_of_the_unsplit_model(options, place, capfd):
    options = options.format(model=place.folder / "model").split()
    source = ["--trunk", place.address, "--model", place.folder / "model"]
    out, err = asked(capfd, "generate", *source, "--max-new-tokens", 24, *options, PROMPT)
    assert out == text_of(whole(place), place, 24) + "\n"
    rate = r"24 tokens in [\d.]+ s \([\d.]+ tokens/s\), \d+ bytes up and \d+ down a token\n"
    assert re.fullmatch(rate, err)


def test_beams_are_those_of_the_unsplit_model(place, capfd):
    source = ["--trunk", place.address, "--model", place.folder / "model"]
    out, _ = asked(capfd, "generate", *source, "--max-new-tokens", 12, "--beams", 3, PROMPT)
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    ids_BT = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out_BT = whole(place).generate(input_ids=ids_BT, max_new_tokens=12, num_beams=3)
    assert out == tokenizer.decode(out_BT[0, ids_BT.shape[1] :], skip_special_tokens=True) + "\n"


def test_sampling_goes_by_its_seed(place, capfd):
    source = ["--trunk", place.address, "--model", place.folder / "model"]

    def sample(seed: int) -> str:
        given = [*source, "--max-new-tokens", 16, "--temperature", 2.0, "--seed", seed]
        return asked(capfd, "generate", *given, PROMPT)[0]

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_served_beside_its_model(place, capfd):
    source = [
        "--trunk",
        place.address,
        "--model",
        place.folder / "model",
        "--served-model-name",
        "medical",
    ]
    given = [*source, "--adapter", place.folder / "adapter", "--max-new-tokens", 16]
    out, _ = asked(capfd, "generate", *given, PROMPT)
    adapted = PeftModel.from_pretrained(whole(place), str(place.folder / "adapter")).eval()
    assert out == text_of(adapted, place, 16) + "\n"
    assert out != text_of(whole(place), place, 16) + "\n"


def test_a_pipeline_takes_the_remote_model(place):
    model = remote_model(str(place.folder / "model"), place.address)
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = write(PROMPT, max_new_tokens=10, do_sample=False, return_full_text=False)
    assert found["generated_text"] == text_of(whole(place), place, 10)


def test_a_run_is_served_and_found_with_nothing_else_said(place, capfd):
    said = f'try: fedsplit generate --run {place.folder}/run "Once upon a time"'
    assert "serving run (cut 1/*/1) at" in place.run_ready and said in place.run_ready
    out, _ = asked(capfd, "generate", "--run", place.folder / "run", PROMPT)
    model = AutoModelForCausalLM.from_pretrained(place.folder / "run" / "model").eval()
    assert out == text_of(model, place, 128) + "\n"


# --- chat -------------------------------------------------------------------------------------


def test_a_conversation_goes_on_with_only_its_new_tokens(place, tmp_path, capfd, monkeypatch):
    source = ["--trunk", place.address, "--model", place.folder / "model"]
    (tmp_path / "said").write_text(f"{PROMPT}\nand then?\n")
    with (tmp_path / "said").open() as said:
        monkeypatch.setattr(sys, "stdin", said)
        out, err = asked(capfd, "chat", *source, "--max-new-tokens", 8)
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    model, held_T, expected = whole(place), [], ""
    for line in (f"{PROMPT}\n", "\nand then?\n"):
        held_T += tokenizer(line)["input_ids"]
        ids_BT = torch.tensor([held_T])
        out_T = model.generate(input_ids=ids_BT, max_new_tokens=8, do_sample=False)[0].tolist()
        expected += tokenizer.decode(out_T[len(held_T) :], skip_special_tokens=True) + "\n"
        held_T = out_T
    assert out == expected
    told = re.search(r"(\d+) tokens in .*, (\d+) bytes up", err)
    headers, hidden_bytes, sent = 150 * 18, 4 * 16, int(told[1]) * int(told[2])
    again = hidden_bytes * (len(held_T) - 8)  # what to send everything once more would add
    assert sent < hidden_bytes * len(held_T) + headers + again / 2


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}<assistant>"
LAST_TURN = "<{{ messages[-1].role }}>{{ messages[-1].content }}<assistant>"


@pytest.mark.parametrize("template, goes_on", [(TURNS, True), (LAST_TURN, False)])
def test_a_chat_template_decides_what_the_model_reads(template, goes_on, place):
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    tokenizer.chat_template = template
    said = io.StringIO()
    with reach(str(place.folder / "model"), place.address) as reached:
        options = dict(max_new_tokens=6, do_sample=False)
        conversation = Conversation(
            Writer(reached=reached, tokenizer=tokenizer, options=options, out=said)
        )
        sent = []
        for line in ("once upon a time there was", "and then?"):
            before = reached.link.bytes_up
            conversation.answer(line)
            sent.append(reached.link.bytes_up - before)
    model, held_T, expected = whole(place), [], ""
    for text in ("<user>once upon a time there was", "<user>and then?"):
        end = "<|endoftext|>" if goes_on else ""
        text = f"{end if held_T else ''}{text}{end}<assistant>"
        held_T = (held_T if goes_on else []) + tokenizer(text)["input_ids"]
        out_BT = model.generate(input_ids=torch.tensor([held_T]), **options)
        expected += tokenizer.decode(out_BT[0, len(held_T) :], skip_special_tokens=True) + "\n"
        held_T = out_BT[0].tolist()
    assert said.getvalue() == expected
    assert sent[1] < sent[0]


def test_a_template_that_rewrites_turns_keeps_the_tokens_that_they_begin_with(place):
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    tokenizer.chat_template = f"The keeper of the light is asked: {LAST_TURN}"
    texts = ["once upon a time there was", "and then?"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": each}], return_dict=True)
        for each in texts
    ]
    one_T, other_T = (each["input_ids"] for each in prompts)
    common = len(os.path.commonprefix([one_T, other_T]))
    said, sent = io.StringIO(), []
    with reach(str(place.folder / "model"), place.address) as reached:
        options = dict(max_new_tokens=6, do_sample=False)
        writer = Writer(reached=reached, tokenizer=tokenizer, options=options, out=said)
        turns, fresh = Conversation(writer), Conversation(writer)
        for conversation, text in ((turns, texts[0]), (turns, texts[1]), (fresh, texts[1])):
            before = reached.link.bytes_up
            conversation.answer(text)
            sent.append(reached.link.bytes_up - before)
    replies = [
        whole(place).generate(input_ids=torch.tensor([ids_T]), **options)[0, len(ids_T) :]
        for ids_T in (one_T, other_T, other_T)
    ]
    texts = [tokenizer.decode(reply_T, skip_special_tokens=True) for reply_T in replies]
    assert said.getvalue() == "".join(f"{text}\n" for text in texts)
    assert sent[2] - sent[1] >= common * 4 * 16, "hidden states that were sent before"


# --- training ---------------------------------------------------------------------------------


def test_a_trunk_is_trained_by_itself(place):
    run = compose(["split=1/2/1", *SGD])
    model, example = whole(place).train(), batch(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.train.lr)
    model(**example.inputs, labels=example.labels).loss.backward()
    optimizer.step()
    source = str(place.folder / "model")
    with Program("fedsplit", "serve", *models_of(place.folder), *SGD) as server:
        address = address_in(server.stdout.readline())
        with reach(source, address, served_model_name="trained", run=run) as reached:
            trainer = ClientTrainer(reached.model, reached.trunk, run)
            with reached.trunk.session():
                trainer.step([example])
            reached.model.eval()
            ids_BT = example.inputs["input_ids"]
            with reached.trunk.session(training=False), torch.no_grad():
                got_BTV = reached.model(ids_BT).logits
            torch.testing.assert_close(got_BTV, model.eval()(ids_BT).logits)
            assert reached.trunk.service_info().version == 1
        with reach(source, address, served_model_name="base") as reached:
            assert reached.trunk.service_info().version == 0


def test_a_run_is_trained_with_the_steps_of_its_method(run_server):
    finished = RunFolder.finished(run_server[0])
    with reach(str(finished.model), finished.address, run=RUN) as reached:
        with reached.trunk.session():
            ClientTrainer(reached.model, reached.trunk, RUN).step([batch(1)])
        with reached.trunk.session(training=False):
            assert reached.trunk.service_info().version == RUN.train.trunk_steps


def test_the_replicas_of_a_method_are_one_trunk_where_no_round_ends(caplog):
    assert update_of(compose(["strategy=splitfed_v1"])) is TrunkUpdate
    assert "this server has no rounds" in caplog.text


def test_a_method_that_says_nothing_of_the_trunk_is_refused():
    run = replace(RUN, strategy=StrategySpec(target="flwr.serverapp.strategy.FedAvg"))
    with pytest.raises(ConfigError, match="name a subclass of .*SplitStrategy"):
        update_of(run)


def test_who_trains_otherwise_is_refused(place):
    run = compose(["split=1/2/1", *SGD, "train.lr=7"])
    with reach(str(place.folder / "model"), place.address, run=run) as reached:
        with pytest.raises(FedsplitError, match="run configuration"):
            reached.trunk.open()


# --- who may ------------------------------------------------------------------------------------


def test_a_token_and_tls_let_in_only_who_has_both(place, tmp_path):
    files = self_signed(tmp_path, "here")
    wire = WireSpec(tls_cert=files.tls_cert, tls_key=files.tls_key)
    source, run = str(place.folder / "model"), RunSpec(split=SplitSpec.parse("1/2/1"))
    with hosted([Served(name="base", model=source)], run, wire, token="secret") as address:
        trust = {"tls_ca": files.tls_ca}
        ids_BT = torch.arange(3, 9)[None]
        options = dict(max_new_tokens=6, do_sample=False)
        with reach(source, address, token="secret", **trust) as reached:
            out_BT = reached.model.generate(ids_BT, **options)
        assert torch.equal(out_BT, whole(place).generate(ids_BT, **options))
        with reach(source, address, token="guess", **trust) as reached:
            with pytest.raises(Unauthenticated, match="not the one of this trunk server"):
                reached.model.generate(ids_BT, **options)


REFUSED = {
    "an unknown name": (
        "generate --trunk {at} --model model --served-model-name nope x",
        r"no trunk is served as 'nope' here; there is base, trained, medical",
    ),
    "another model": (
        "generate --trunk {at} --model other x",
        r"other is not the model of which 127.0.0.1:\d+ serves the trunk \(model and cut "
        r"\(fingerprint\): head_dim is 16 at the client and 8 at the trunk, hidden_size is 32 at",
    ),
    "a model of other blocks": (
        "generate --trunk {at} --model longer x",
        r"longer is not the model of which 127.0.0.1:\d+ serves the trunk",
    ),
    "a model of other weights": (
        "generate --trunk {at} --model twin x",
        r"the weights differ: the digest of a sample of each tensor is \w+ at the client and \w+",
    ),
    "an adapter at the server only": (
        "generate --trunk {at} --model model --served-model-name medical x",
        r"the trunk has an adapter \(\w+\) and the client has none; load it at the client too",
    ),
    "an adapter at the client only": (
        "generate --trunk {at} --model model --adapter adapter x",
        r"the client has an adapter \(\w+\) and the trunk has none; load it at the trunk too",
    ),
    "no model": ("generate --trunk {at} --model run x", r"run has no tokenizer to load"),
    "nobody at the address": (
        "generate --trunk 127.0.0.1:1 --model model x",
        r"no trunk answers at 127.0.0.1:1: .*; check that the trunk server is running",
    ),
    "a run that nobody serves": (
        "chat --run begun-and-done x",
        r"begun-and-done is not a run's folder: it has no config.yaml",
    ),
    "a run that is not over": ("serve begun", r"begun has no model yet; serve it when the run is"),
    "an empty prompt": ("generate --trunk {at} --model model ", r"the prompt is empty"),
    "beams with drafts": (
        "generate --trunk {at} --model model --beams 2 --draft prompt x",
        r"--beams and --draft do not go together; leave one of them out",
    ),
    "another width of numbers": (
        "generate --trunk {at} --model model --dtype bfloat16 x",
        r"smashed_BTD is torch.bfloat16, but this trunk computes in torch.float32; set model.dtype",
    ),
    "an impossible choice": (
        "generate --trunk {at} --model model --temperature -1 x",
        r"cannot generate like this: `temperature`",
    ),
    "a draft that is none": (
        "generate --trunk {at} --model model --draft nowhere x",
        r"--draft nowhere is neither `none`, `prompt` nor a model",
    ),
    "a width of a run": (
        "generate --run run --dtype bfloat16 x",
        r"--dtype: run says itself what it computes in",
    ),
    "an open address without TLS": (
        "serve --model model --bind 192.0.2.1:9500",
        r"--bind=192.0.2.1:9500 can be reached from other machines without encryption",
    ),
    "an open address without a token": (
        "serve --model model --bind 192.0.2.1:9500 --insecure",
        r"everybody there could use this trunk; give a token \(--token-file, or FEDSPLIT_TOKEN\)",
    ),
    "an empty token": (
        "serve --model model --bind 192.0.2.1:9500 --insecure --token-file empty",
        r"--token-file empty is empty; put the token or key there",
    ),
    "no file of a token": (
        "serve --model model --token-file none.txt",
        r"--token-file none.txt cannot be read: No such file or directory",
    ),
    "a token that gRPC cannot send": (
        "serve --model model --token-file model/model.safetensors",
        r"--token-file model/model.safetensors has characters outside ASCII; make a token with",
    ),
    "an address in use": (
        "serve --model model --bind {at}",
        r"--bind=127.0.0.1:\d+ cannot be listened on: Address already in use; choose another",
    ),
    "nothing": ("serve", r"nothing to serve; give --model DIR, or the folder of a finished run"),
    "a run and a model": ("serve run --model model", r"serve either run or something else"),
    "one name twice": (
        "serve --model model --model model",
        r"two trunks would be served as model; name them, NAME=DIR",
    ),
    "two adapters on one": (
        "serve --model model --adapter adapter --adapter adapter",
        r"--adapter adapter would be the second on model; name it, NAME=adapter",
    ),
    "two kinds of adapter": (
        "serve --model model --adapter adapter lora=on",
        r"lora.enabled=true would put fresh adapters where adapter goes",
    ),
    "another split": (
        "serve --model model --split 1/3/1",
        r"LlamaForCausalLM has 4 blocks of which the trunk needs at least 3",
    ),
    "no such device": ("serve --model model --device tpu9", r"device=tpu9 cannot be used"),
    "no such field": ("serve run train.nope=1", r"there is no field train.nope"),
    "a group of a run": ("serve run train=sgd", r"train was chosen when the run began; set one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_one_line(case, place, capfd, monkeypatch):
    command, told = REFUSED[case]
    monkeypatch.chdir(place.folder)
    monkeypatch.delenv("FEDSPLIT_TOKEN", raising=False)
    arguments = command.format(at=place.address).split(" ")
    if arguments[0] == "chat":
        arguments = arguments[:-1]
    assert main(arguments) == 1
    out, err = capfd.readouterr()
    assert out == ""
    # gRPC's own log is off in a process of its own; here it may be on.
    (line,) = [line for line in err.splitlines() if not re.match(r"[IWE]\d{4} ", line)]
    assert re.fullmatch(rf"error: .*{told}.*", line)


def test_an_option_that_is_none_is_refused(capfd):
    assert main(["serve", "--model", "model", "--nope", "train.lr=1"]) == 2
    assert "No such option '--nope'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ([], "one of the arguments --model --run is required"),
        (["--model", "m", "--run", "r"], "argument --run: not allowed with argument --model"),
    ],
)
def test_a_prompt_needs_a_model_or_a_run(source, error, capfd):
    assert main(["generate", *source, PROMPT]) == 2
    assert error in capfd.readouterr().err


# --- the end ------------------------------------------------------------------------------------


def test_a_server_that_is_told_to_stop_finishes_what_is_in_work(run_server):
    folder, server = run_server
    finished = RunFolder.finished(folder)
    source, address, run = str(finished.model), finished.address, finished.run
    example = batch(1)
    with (
        reach(source, address, run=run) as ann,
        reach(source, address, run=run) as bob,
        reach(source, address, run=run) as late,
    ):
        late.trunk.service_info()
        bob.trunk.open()  # and never steps
        ann.trunk.open()
        trainer = ClientTrainer(ann.model, ann.trunk, run)
        trainer.step([example])
        losses: list[float] = []

        def go_on() -> None:  # waits at the barrier for bob, as long as that lasts
            losses.append(ann.model(**example.inputs, labels=example.labels).loss.item())

        waiting = threading.Thread(target=go_on)
        waiting.start()
        time.sleep(BARRIER_S / 3)  # for it to be at the server
        server.send_signal(signal.SIGTERM)
        with pytest.raises(Draining, match="the trunk server is shutting down"):
            while True:
                late.link.exchange(ServiceInfoRequest())
        assert not losses
        waiting.join(timeout=20)
        assert losses
        assert server.end(timeout_s=20) == (0, "", "")
    assert not (folder / "trunk.address").exists()


@pytest.mark.slow
def test_ctrl_c_is_a_good_end_too(place):
    command = [*COMMAND, "serve", *models_of(place.folder)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as server:
        server.stdout.readline()
        server.send_signal(signal.SIGINT)
        assert (server.communicate(timeout=20), server.returncode) == (("", ""), 0)


def test_adapters_of_a_model_are_served_on_the_same_weights(tmp_path):
    make_model(tmp_path / "model")
    make_adapter(tmp_path / "model", tmp_path / "adapter")
    served = plan([f"{tmp_path}/model"], [f"{name}={tmp_path}/adapter" for name in "ab"])
    base, a, b = (dict(trunk.named_parameters()) for _, trunk in trunks_of(served, RUN))
    assert {name for name in a if a[name] is not b[name]} == {n for n in a if "lora_" in n}
    assert not {id(p) for p in base.values()} & {id(p) for p in a.values()}, "it trains in full"


def test_a_field_that_an_option_sets_is_refused(capfd):
    assert main(["serve", "--model", "m", "wire.insecure=false"]) == 1
    expected = "'wire.insecure=false' is not used by serve; set the option --insecure"
    assert expected in capfd.readouterr().err


@pytest.mark.parametrize(
    "models, adapters, names",
    [
        (["gpt2"], [], ["gpt2"]),
        (["org/Model-1.5"], [], ["Model-1-5"]),
        (["a=x", "b=y"], ["c=z"], ["a", "b", "c"]),
        (["./a=b/c"], [], ["c"]),
    ],
)
def test_what_is_served_has_names(models, adapters, names):
    assert [served.name for served in plan(models, adapters)] == names
