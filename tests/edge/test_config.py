"""What goes in as overrides, run config or YAML comes out as one frozen spec, or is refused."""

import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from numbers import Number
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsplit.cli import main
from fedsplit.config import (
    CommandLine,
    build,
    compose,
    from_dictconfig,
    from_run_config,
    from_yaml,
    to_yaml,
)
from fedsplit.config.hints import _ELSEWHERE
from fedsplit.config.overrides import NO_SETTINGS, RUN_CONFIG_KEYS
from fedsplit.config.schema import field_names
from fedsplit.errors import ConfigError, DataError
from fedsplit.spec import ClientWeightsSpec, DataSpec, ModelSpec, RunSpec, SplitSpec

ROOT = Path(__file__).parents[2]
OPTIONS = sorted((ROOT / "conf").glob("*/*.yaml"))
NEEDS = {
    "model/pretrained": ["model.pretrained=gpt2"],
    "data/text": ["data.path=corpus"],
    "data/jsonl": ["data.path=corpus.jsonl"],
    "data/hub": ["data.path=wikitext"],
    "data/parquet": ["data.path=corpus.parquet"],
    "data/csv": ["data.path=corpus.csv"],
    "data/saved": ["data.path=corpus"],
}


def option_id(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def test_conf_has_options():
    assert len(OPTIONS) > 15


@pytest.mark.slow
@pytest.mark.parametrize("file", OPTIONS, ids=option_id)
def test_every_option_composes_and_survives_yaml(file):
    spec = compose([f"{file.parent.name}={file.stem}", *NEEDS.get(option_id(file), [])])
    assert from_yaml(to_yaml(spec)) == spec


@pytest.mark.parametrize("file", OPTIONS, ids=option_id)
def test_every_option_says_first_what_it_is(file):
    lines = file.read_text().splitlines()
    assert next(line for line in lines if "@package" not in line).startswith("# ")


def test_the_default_is_the_spec_s_own_but_for_the_tiny_model():
    told = asdict(compose())
    model = told.pop("model")
    plain = asdict(RunSpec())
    plain.pop("model")
    assert told == plain
    assert (model["family"], model["config"]["n_layer"], model["config"]["n_embd"]) == (
        "gpt2",
        4,
        128,
    )


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        (["split=1/2/1"], {"split": SplitSpec(bottom=1, trunk=2, top=1)}),
        (["split='2/*/1'"], {"split": SplitSpec(bottom=2, trunk=0, top=1)}),
        (["model=pretrained", "model.pretrained=x"], {"model.pretrained": "x", "model.config": {}}),
        (["+client_weights.options.eta=0.1"], {"client_weights.options": {"eta": 0.1}}),
        (["client_weights.options.eta=0.1"], {"client_weights.options": {"eta": 0.1}}),
        (["data.path='a, b=c'"], {"data.path": "a, b=c"}),
        (["++train.lr=1e-4"], {"train.lr": 1e-4}),
        (["experiment=toy"], {"name": "toy", "train.rounds": 2, "data.sequence_length": 32}),
        (["experiment=toy", "train=sgd"], {"name": "toy", "train.optimizer": "sgd"}),
        (["experiment=toy", "train.rounds=7"], {"train.rounds": 7}),
        (["lora.targets=q_proj,v_proj"], {"lora.targets": "q_proj,v_proj"}),
        (["launch.trunk_device=cuda:0,cuda:1"], {"launch.trunk_device": "cuda:0,cuda:1"}),
        (["data.path=~/texts"], {"data.path": str(Path.home() / "texts")}),
        (["launch.run_dir=~"], {"launch.run_dir": str(Path.home())}),
        (["data.path='~/texts'"], {"data.path": "~/texts"}),
    ],
    ids=str,
)
def test_override(overrides, fields):
    spec = compose(overrides)
    assert {name: attrgetter(name)(spec) for name in fields} == fields


REFUSED = {
    "policy.kind=eager": "policy.kind='eager' is not one of: sync, async, quorum",
    "policy=eager": "policy.kind='eager' is not one of: sync, async, quorum",
    "sharding=random": "sharding.kind='random' is not one of: iid, natural, dirichlet",
    "wire.up=zip": "wire.up='zip' is not one of: none, bf16, fp16",
    "model=gpt2": "model=gpt2 is not one of: gpt2_124m, llama_1b, llama_7b, pretrained, tiny_bert, "
    "tiny_gpt2, tiny_llama, tiny_vit; or set one of its fields: model.pretrained",
    "model=null": "model=None is not one of: gpt2_124m, ",
    "model=[tiny_gpt2]": r"model=\['tiny_gpt2'\] is not one of",
    "model=pretrained": "model.pretrained and model.family are both empty; set one of them",
    "lora=false": "lora=False is not one of: off, on; or set one of its fields: lora.enabled",
    "experiment=paper": "experiment=paper is not one of: classification, convergence, default",
    "data=text": "data.path is empty, but data=text needs one",
    "train.lr=fast": "train.lr='fast' must be a number",
    "train.lr=null": "train.lr=None must be a number",
    "train.lr=-1": "train.lr=-1.0 must be greater than 0",
    "train.rounds=2.5": "train.rounds=2.5 must be a whole number",
    "train.rounds=true": "train.rounds=True must be a whole number",
    "train.rounds=0": "train.rounds=0 is too small; it must be at least 1",
    "lora.enabled=perhaps": "lora.enabled='perhaps' must be true or false",
    "data.path=[a]": r"data.path=\['a'\] must be text",
    "rounds=3": "there is no field rounds; did you mean train.rounds",
    "train.optimiser=sgd": "no field train.optimiser; did you mean train.optimizer",
    "+train.optimiser=sgd": "no field train.optimiser; did you mean train.optimizer",
    "+zzz=1": "there is no field zzz; a run's groups are model, .* --help lists all fields",
    "++zzz=1": "there is no field zzz; a run's groups are model",
    "train.learning_rate=1": r"no field train.learning_rate; did you mean train.lr\?",
    "learning-rate=1": r"no field learning-rate; did you mean train.lr\?",
    "num_train_epochs=1": "did you mean train.rounds and train.local_epochs",
    "train.per_device_train_batch_size=1": r"did you mean train.batch_size\?",
    "+fraction_fit=1": r"did you mean policy.quorum\?",
    "modle=tiny_gpt2": r"there is no field modle; did you mean .*model",
    "stratgy=mine": r"did you mean .*strategy",
    "train.lr.x=1": "train.lr",
    "~policy": "~policy: a run has all its fields; set policy=... instead",
    "~train.lr": "~train.lr: a run has all its fields",
    "train.lr=1,2": "train.lr=1,2 lists several values; that takes -m, and commas",
    "split=1/0/1": "split='1/0/1' leaves the trunk no block",
    "split=a/b": "split='a/b' is not of the form bottom/trunk/top",
    "split=1/2/1,2/1/1": "cannot be swept; sweep over split.bottom and split.top instead",
    "policy": "'policy' cannot be read; write group=option or field=value",
    "=3": "'=3' names no field; write group=option or field=value",
    "train.lr={": "'train.lr={' cannot be read; put the value in quotes",
    "data.path=/texte/\u00fc": "put the value in quotes: 'data.path=\"/texte/\u00fc\"'",
    "data.path=a=b": "put the value in quotes: 'data.path=\"a=b\"'",
    "data.path=it's": "put the value in quotes: 'data.path=\"it'\"'\"'s\"'",
    "data.split=train[:10%]": r"put the value in quotes: 'data.split=\"train\[:10%\]\"'",
    "data.path=a,b": "A text with commas takes quotes: 'data.path=\"a,b\"'",
    "~model": "~model: a run has all its fields",
    "train.lr=${nope}": "Interpolation key 'nope' not found",
    "policy@elsewhere=sync": "policy@elsewhere",
    "hydra/launcher=rq_far": "hydra/launcher=rq_far: no plugin .* pip install hydra-rq-launcher",
}


def test_a_name_of_another_library_leads_to_fields_of_a_run():
    fields = {*field_names(), "split"}
    assert {name for names in _ELSEWHERE.values() for name in names.split(" and ")} <= fields
    assert not _ELSEWHERE.keys() & {name.rpartition(".")[2] for name in fields}


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_override_is_refused_in_one_line(override):
    with pytest.raises(ConfigError, match=REFUSED[override]) as caught:
        compose([override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["/texte/\u00fc", "a=b", "a(b", "a[b", "it's", "train[:10%]", "a,b", "a#b", '"a']
)
def test_an_override_is_read_as_its_hint_writes_it(value):
    with pytest.raises(ConfigError) as caught:
        compose([f"data.path={value}"])
    (word,) = shlex.split(str(caught.value).partition("quotes: ")[2])
    assert compose([word]).data.path == value


def test_a_key_of_a_free_field_can_be_removed():
    assert "n_head" not in compose(["~model.config.n_head"]).model.config
    with pytest.raises(ConfigError, match="model.config.n_heads"):
        compose(["~model.config.n_heads"])


def test_run_config_keys_are_those_of_pyproject_and_hold_no_values():
    text = (ROOT / "pyproject.toml").read_text()
    keys = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    assert keys.keys() == {*RUN_CONFIG_KEYS, *NO_SETTINGS, "overrides", "config", "run-dir"}
    assert set(keys.values()) == {""}
    assert from_run_config(keys) == compose()


def test_run_config_and_overrides_give_the_same_fingerprint():
    by_keys = from_run_config(
        {
            "model": "tiny_llama",
            "split": "1/2/1",
            "rounds": 3,
            "lr": 1e-05,
            "lora": "on",
            "data-path": "",
            "overrides": "lora.rank=4 train.schedule=constant client_weights.options={eta:0.1}",
        }
    )
    by_overrides = compose(
        [
            "model=tiny_llama",
            "split=1/2/1",
            "train.rounds=3",
            "train.lr=0.00001",
            "lora=on",
            "lora.rank=4",
            "train.schedule=constant",
            "client_weights.options.eta=0.1",
        ]
    )
    by_driver = from_run_config({"config": to_yaml(by_overrides), "run-dir": "/somewhere"})
    assert by_keys == by_overrides
    assert by_driver.fingerprint == by_keys.fingerprint
    assert by_driver.launch.run_dir == "/somewhere"


def test_config_wins_over_keys():
    config = to_yaml(RunSpec(seed=5))
    assert from_run_config({"config": config, "seed": 7, "overrides": "seed=8"}) == RunSpec(seed=5)


@pytest.mark.parametrize(
    ("run_config", "message"),
    [
        ({"policy": "eager"}, "policy.kind='eager' is not one of: sync, async, quorum"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"clients": 2.5}, "clients=2.5 must be a whole number"),
        ({"train.lr": 1.0}, "unknown keys train.lr; allowed: name, seed, .*overrides, config"),
        ({"overrides": "name='a"}, "overrides cannot be read .*; mind its quotes"),
        ({"overrides": "rounds=3"}, "there is no field rounds; did you mean train.rounds"),
        ({"config": "train: {round: 3}"}, "no field train.round; did you mean train.rounds"),
        ({"config": "train: {rounds: x}"}, "train.rounds='x' must be a whole number"),
        ({"config": "wire: {up: zip}"}, "wire.up='zip' is not one of: none, bf16, fp16"),
        ({"config": "train: 3"}, "TrainSpec"),
        ({"config": "[1]"}, r"config is \[1\], but a run is a mapping of fields"),
        ({"config": "{"}, "config is not YAML of plain values"),
        ({"config": "name: ${oc.env:HOME}"}, "a resolved run has no interpolations"),
        ({"config": "name: !!python/object/apply:os.getcwd []"}, "not YAML of plain values"),
        ({"config": "name: !<tag:yaml.org,2002:python/name:os.getcwd>"}, "not YAML of plain"),
    ],
    ids=str,
)
def test_a_wrong_run_config_is_refused(run_config, message):
    with pytest.raises(ConfigError, match=message):
        from_run_config(run_config)


@settings(max_examples=40)
@given(
    path=st.text().filter(lambda text: "${" not in text),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    config=st.dictionaries(
        st.text(min_size=1).filter(lambda text: "${" not in text),
        st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.none()),
        max_size=3,
    ),
)
def test_yaml_gives_an_equal_run_back(path, lr, config):
    spec = RunSpec(
        data=DataSpec(path=path),
        model=ModelSpec(config=config),
        client_weights=ClientWeightsSpec(options={"nested": {"list": [1, "two", None]}}),
    )
    again = from_yaml(to_yaml(spec))
    assert again == spec
    assert again.fingerprint == spec.fingerprint


@pytest.mark.parametrize(
    "path", ["/a b/c", "it's", 'say "x"', "a=b,c", "C:\\x\\", "\\'", "[a]", "{a: 1}", "null", "1"]
)
def test_text_in_a_run_config_is_taken_as_it_is(path):
    assert from_run_config({"data": "text", "data-path": path}).data.path == path


def test_a_composed_config_with_a_stranger_in_it_is_refused():
    with pytest.raises(ConfigError, match="there is no field surprise"):
        from_dictconfig(OmegaConf.create({"surprise": 1}))


def test_a_field_of_the_family_s_own_config_needs_no_plus():
    config = compose(["model.config.n_layer=6", "model.config.rotary=true"]).model.config
    assert (config["n_layer"], config["rotary"], config["n_embd"]) == (6, True, 128)


def test_threads_compose_at_the_same_time():
    def seed(number: int) -> int:
        return compose([f"seed={number}"]).seed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(seed, range(16))) == list(range(16))


class Refusing:
    def __init__(self) -> None:
        raise DataError("the corpus is empty")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("nowhere.at.all", {}, "'nowhere.at.all' cannot be imported .*give an import path"),
        ("fractions.Fractured", {}, "cannot be imported .*no attribute 'Fractured'"),
        ("", {}, "'' cannot be imported"),
        ("math.pi", {}, "'math.pi' is 3.14.*; name a subclass of numbers.Number"),
        ("os.getcwd", {}, "'os.getcwd' is <built-in function getcwd>; name a subclass of numbers"),
        ("pathlib.Path", {}, "'pathlib.Path' is <class 'pathlib.Path'>; name a subclass of numb"),
        ("fractions.Fraction", {"top": 1}, r"fractions.Fraction refuses the options \['top'\]"),
    ],
    ids=str,
)
def test_build_refuses(target, options, message):
    with pytest.raises(ConfigError, match=message):
        build(target, Number, **options)


def test_build_lets_our_own_errors_through():
    with pytest.raises(DataError, match="the corpus is empty"):
        build(f"{__name__}.Refusing", Refusing)


# --- the command line -------------------------------------------------------------------------


def command_line(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from fedsplit.config import CommandLine
            from fedsplit.console import ending_with_an_error_line
            from fedsplit.errors import DataError

            def task(spec):
                if spec.clients > 100:
                    raise DataError(f"no data for {spec.clients} clients")
                print(spec.seed, spec.split, spec.sharding.kind, spec.fingerprint)

            if __name__ == "__main__":
                with ending_with_an_error_line(debug=False):
                    CommandLine.read(sys.argv[1:]).launch(task)
            """
        )
    )
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_command_line_runs_what_compose_gives_and_leaves_nothing_behind(tmp_path):
    done = command_line(tmp_path, "seed=3", "split=1/2/1")
    fingerprint = compose(["seed=3", "split=1/2/1"]).fingerprint
    assert (done.stdout, done.stderr) == (f"3 1/2/1 natural {fingerprint}\n", "")
    assert [file.name for file in tmp_path.iterdir()] == ["script.py"]


def test_command_line_sweeps(tmp_path):
    done = command_line(tmp_path, "-m", "sharding=natural,iid", "seed=range(1,3)")
    rows = [line.split()[:3] for line in done.stdout.splitlines()]
    assert rows == [[s, "1/*/1", kind] for kind in ("natural", "iid") for s in ("1", "2")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["runs", "script.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wire.up=zip"], "wire.up='zip' is not one of: none, bf16, fp16"),
        (["-m", "wire.up=none,zip"], "wire.up='zip' is not one of: none, bf16, fp16"),
        (["-m", "train.lr=0.1,0"], "train.lr=0.0 must be greater than 0"),
        (["-m", "model=glob(*)"], "model=glob(*) lists several values; that takes -m, and commas"),
        (["train.lr=1,2"], "train.lr=1,2 lists several values; that takes -m, and commas"),
        (["clients=101"], "no data for 101 clients"),
    ],
    ids=str,
)
def test_command_line_refuses_before_anything_starts(tmp_path, arguments, message):
    done = command_line(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_folder_of_the_user_adds_options(tmp_path):
    options = tmp_path / "my conf"
    (options / "experiment").mkdir(parents=True)
    (options / "experiment" / "mine.yaml").write_text("# @package _global_\nclients: 7\n")
    line = CommandLine.read(["--config-dir", str(options), "experiment=mine"])
    assert line.runs[0].clients == 7
    with pytest.raises(ConfigError, match="experiment=nobodys is not one of: .*mine"):
        CommandLine.read([f"--config-dir={options}", "experiment=nobodys"])
    with pytest.raises(ConfigError, match="--config-dir .*none is not a folder"):
        CommandLine.read(["--config-dir", str(tmp_path / "none")])
    done = command_line(tmp_path, "-cd", str(options), "-m", "experiment=mine", "seed=1,2")
    assert (done.returncode, done.stderr) == (0, "")
    assert [text[0] for text in done.stdout.splitlines()] == ["1", "2"]


def test_paths_of_a_command_line_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    words = ["data=text", "data.path=texts", "model=pretrained", "wire.tls_ca=ca.pem"]
    local = CommandLine.read([*words, "model.pretrained=here", "resume=runs/x"]).runs[0]
    assert local.data.path == str(tmp_path / "texts")
    assert local.model.pretrained == str(tmp_path / "here")
    assert (local.wire.tls_ca, local.resume) == (f"{tmp_path}/ca.pem", f"{tmp_path}/runs/x")
    beside = CommandLine.read(["data=text", "data.path=here/../texts"]).runs[0]
    assert beside.fingerprint == CommandLine.read(words[:2]).runs[0].fingerprint
    names = ["data=hub", "data.path=org/texts:en", "model=pretrained", "model.pretrained=gpt2"]
    hub = CommandLine.read([*names, "resume=auto"]).runs[0]
    assert (hub.data.path, hub.model.pretrained, hub.resume) == ("org/texts:en", "gpt2", "auto")


def test_help_lists_every_group_and_option_and_three_examples(tmp_path):
    text = command_line(tmp_path, "--help").stdout
    groups = text.partition("Groups (")[2].partition("Examples:")[0]
    for group in sorted({file.parent.name for file in OPTIONS}):
        (entry,) = re.findall(rf"^  {group} +\S.*\n(?:   .*\n)*", groups, re.MULTILINE)
        for file in OPTIONS:
            assert file.parent.name != group or file.stem in entry
    assert text.count("python -m simulations.run ") == 1 + 3


def test_help_describes_every_field_with_its_value_within_the_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = CommandLine.read(["--help", "train=sgd", "experiment=toy"]).help
    fields = text.partition("\nFields ")[2]
    assert re.findall(r"^  ([\w.]+)=", fields, re.MULTILINE) == list(field_names())
    assert "\n  train.lr=0.1                  The learning rate" in text
    assert "  launch.run_dir=runs " in text
    assert f"{'':32}(a whole number of sequences, at least 1)\n" in text
    assert "\n  client_weights.strategy=flwr.serverapp.strategy.FedAvg\n" in text
    assert text.isascii() and max(map(len, text.splitlines())) <= 80


def test_help_of_serve_describes_the_fields_that_it_takes(capsys):
    assert main(["serve", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "generation.chunk_tokens=256: The most tokens of prompts that a pass processes." in words
    assert "train.lr=0.003: The learning rate after the warm-up." in words
    # Options take the place of these.
    assert "wire.bind=" not in words and "wire.down=none: The codec" in words


# --- names of the last release ----------------------------------------------------------------


def test_an_old_name_is_read_with_a_warning_that_gives_the_new_one(caplog):
    assert compose(["train.pass_wait_s=0.5"]).train.max_queue_delay_s == 0.5
    assert compose(["halves=personal"]) == compose(["client_weights=personal"])
    assert compose(["halves.personal=top", "wire.halves=int8"]) == compose(
        ["client_weights.personal=top", "wire.client_weights=int8"]
    )
    old = to_yaml(RunSpec()).replace("max_queue_delay_s: 0.01", "gather_s: 0.25")
    assert from_yaml(old).generation.max_queue_delay_s == 0.25
    told = [record.getMessage() for record in caplog.records]
    assert any("train.pass_wait_s is called train.max_queue_delay_s now" in line for line in told)
    assert any("generation.gather_s is called" in line for line in told)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "halves: {personal: top}\nclient_weights: {personal: top}",
            "halves is the old name of cl",
        ),
        ("wire: {client_weights: int8, halves: none}", "halves is the old name of client_weights"),
        ("halves: 5", "ClientWeightsSpec"),
        ("1: {a: 2}", "1"),
    ],
)
def test_old_names_do_not_hide_what_is_wrong(text, error):
    with pytest.raises(ConfigError, match=error):
        from_yaml(text)


@pytest.mark.parametrize("value, refused", [("false", False), ("true", True)])
def test_a_field_that_is_gone_may_only_say_what_it_said_by_default(value, refused):
    old = to_yaml(RunSpec()).replace("wire:\n", f"wire:\n  feedback: {value}\n")
    if not refused:
        assert from_yaml(old) == RunSpec()
        return
    with pytest.raises(ConfigError, match="wire.feedback is gone .error feedback was removed"):
        from_yaml(old)


OWN = """
from fedsplit.config import compose, resolve
from fedsplit.errors import ConfigError

assert resolve("strategies.SplitFedV2") is resolve("mine.Mine").__base__
assert compose(["model=tiny_gpt2"]).model.family == "gpt2"
try:
    resolve("mine.Nobody")
except ConfigError as exc:
    print(exc)
"""


def test_a_users_folders_neither_shadow_ours_nor_are_missed(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import strategies\n\n\nclass Mine(strategies.SplitFedV2): ..."
    )
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "tiny_gpt2.yaml").write_text("family: llama")
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("raise ImportError('not these')")
    command = [sys.executable, "-c", OWN]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"mine is {tmp_path}/mine.py" in done.stdout
    assert "current directory, on PYTHONPATH or installed" in done.stdout
