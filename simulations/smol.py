"""Trains, serves and chats with a real model, and compares each step with plain transformers.

    python -m simulations.smol DIR [--rounds 3] [--json FILE]

The model is SmolLM2-135M-Instruct (`simulations.smollm2`). Everything is done as a user does it, by
the commands of fedsplit:

* `split`: the logits of the split model, and the tokens that it generates;
* `train`: LoRA with four clients under `flwr run`, and the unsplit model with peft on as many
  tokens and steps (`baseline=central`, whose one client has the data of all and batches of all);
* `generate`, `chat`, `openai`: the model that the run left, with its trunk in another process.

Losses are held-out losses in nats per token. Texts are greedy, and must be those of `generate` of
transformers. DIR keeps the model and the runs; what is there is not made again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit import atomic
from fedsplit.config import compose
from fedsplit.console import ending_with_its_reader, quiet_libraries
from fedsplit.errors import FedsplitError, Internal
from fedsplit.model import split_model
from fedsplit.runs.folder import RunFolder
from simulations.bench.processes import command_server
from simulations.bench.report import Report
from simulations.single import run_one
from simulations.smollm2 import save_smollm2

_CLIENTS = 4
_NEW_TOKENS = 24
_PROMPT = "The capital of France is"
_QUESTION = "What is the boiling point of water?"
_START_S = 120.0
_COMMON = (
    "model=pretrained",
    f"clients={_CLIENTS}",
    "lora=on",
    "data.sequence_length=128",
    "train.lr=0.001",
    "train.warmup_steps=2",
    "train.evaluate_every=1",
)


def measure(folder: Path, rounds: int) -> Report:
    """Carry out all steps in a folder, and return their figures.

    Raises:
        Internal: A command failed, or a text is not that of transformers.
        FedsplitError: The model cannot be had, or a run failed.
    """
    report, model = Report(), folder / "model"
    if not (model / "config.json").exists():
        save_smollm2(model)
    _split(report, model)
    _train(report, folder, model, rounds)
    run = RunFolder(folder / "runs" / "smol")
    with command_server("serve", str(run.path), "--bind", "127.0.0.1:0") as trunk:
        _generate(report, run, trunk)
        _chat(report, run, trunk)
        _openai(report, run, trunk)
    return report


def _split(report: Report, model: Path) -> None:
    whole, tokenizer = _plain(model)
    ids_BT = tokenizer(_PROMPT, return_tensors="pt").input_ids
    expected = whole(ids_BT).logits, _greedy(whole, ids_BT)
    part = split_model(whole, "1/*/1").client
    part.generation_config = whole.generation_config
    report.figures["split_logits_equal"] = torch.equal(part(ids_BT).logits, expected[0])
    report.figures["split_tokens_equal"] = torch.equal(_greedy(part, ids_BT), expected[1])


def _train(report: Report, folder: Path, model: Path, rounds: int) -> None:
    runs = {
        "smol": ("launch=flwr", f"train.local_steps={_CLIENTS}", "train.batch_size=2"),
        # The one client takes the local steps of all of them.
        "central": ("baseline=central", "train.local_steps=1", f"train.batch_size={2 * _CLIENTS}"),
    }
    for name, words in runs.items():
        where = f"model.pretrained={model}", f"launch.run_dir={folder / 'runs'}", f"name={name}"
        run = RunFolder(folder / "runs" / name)
        began = time.perf_counter()
        if not run.is_finished:
            # Of a run that was interrupted; the next one would get another name.
            shutil.rmtree(run.path, ignore_errors=True)
            run_one(compose([*_COMMON, *where, *words, f"train.rounds={rounds}"]))
            report.figures[f"{name}_seconds"] = time.perf_counter() - began
        stats = run.rounds()
        report.figures[f"{name}_tokens"] = sum(each.tokens for each in stats)
        report.figures[f"{name}_first_loss"] = stats[0].eval_loss
        report.figures[f"{name}_loss"] = stats[-1].eval_loss
    split, unsplit = report.figures["smol_loss"], report.figures["central_loss"]
    report.figures["loss_of_unsplit"] = split / unsplit


def _generate(report: Report, run: RunFolder, trunk: str) -> None:
    whole, tokenizer = _plain(run.model)
    ids_BT = tokenizer(_PROMPT, return_tensors="pt").input_ids
    expected = _new_text(tokenizer, ids_BT, _greedy(whole, ids_BT))
    options = "--max-new-tokens", str(_NEW_TOKENS)
    found = _printed("generate", "--run", str(run.path), "--trunk", trunk, *options, _PROMPT)
    _require_equal("generate", found, expected)
    report.figures["generate_equal"] = True


def _chat(report: Report, run: RunFolder, trunk: str) -> None:
    options = "--max-new-tokens", str(_NEW_TOKENS)
    words = "chat", "--run", str(run.path), "--trunk", trunk, *options
    _require_equal("chat", _printed(*words, stdin=f"{_QUESTION}\n"), _answer(run))
    report.figures["chat_equal"] = True


def _openai(report: Report, run: RunFolder, trunk: str) -> None:
    words = "openai", "--run", str(run.path), "--trunk", trunk, "--bind", "127.0.0.1:0"
    body = {
        "model": run.path.name,
        "messages": [{"role": "user", "content": _QUESTION}],
        "max_tokens": _NEW_TOKENS,
        "temperature": 0,
    }
    with command_server(*words) as url:
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=_START_S)
    answer.raise_for_status()
    found: str = answer.json()["choices"][0]["message"]["content"]
    _require_equal("openai", found, _answer(run))
    report.figures["openai_equal"] = True


# --- plain transformers ---------------------------------------------------------------------------


def _plain(model: Path) -> tuple[Any, Any]:
    whole = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    return whole.eval(), AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def _greedy(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    out_BT: torch.Tensor = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
    )
    return out_BT


def _new_text(tokenizer: Any, ids_BT: torch.Tensor, out_BT: torch.Tensor) -> str:
    text: str = tokenizer.decode(out_BT[0, ids_BT.shape[1] :], skip_special_tokens=True)
    return text


def _answer(run: RunFolder) -> str:
    """The answer of the run's joined model to the question, by transformers alone."""
    whole, tokenizer = _plain(run.model)
    turns = [{"role": "user", "content": _QUESTION}]
    ids_BT = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return _new_text(tokenizer, ids_BT, _greedy(whole, ids_BT))


def _require_equal(command: str, found: str, expected: str) -> None:
    if found.strip() != expected.strip():
        raise Internal(f"{command} wrote {found!r}, and transformers {expected!r}")


# --- the commands ---------------------------------------------------------------------------------


def _printed(*words: str, stdin: str = "") -> str:
    """Return what a command of fedsplit prints."""
    command = [sys.executable, "-m", "fedsplit", *words]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Internal(f"fedsplit {words[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


@ending_with_its_reader()
def main() -> int:
    """Carry out all steps, and print their figures; return 0, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.smol", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--rounds", metavar="N", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        report = measure(arguments.folder, arguments.rounds)
    except FedsplitError as error:
        print(f"smol: {error}", file=sys.stderr)
        return 2
    print(report)
    if arguments.json:
        atomic.write_text(arguments.json, json.dumps(report.as_json(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
