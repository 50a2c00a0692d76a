"""A trunk server with quantized trunks, and clients whose own blocks are not quantized."""

import pytest
import torch

from fedsplit.cli.serve import Serve
from fedsplit.config import compose
from fedsplit.errors import ConfigError
from fedsplit.model import connect, split_model
from fedsplit.model.quantization import settings_of
from fedsplit.serve import hosted, plan, reach
from fedsplit.spec import WireSpec
from simulations.families import random_model
from tests.core.extras import needs_bitsandbytes

IDS_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def serve(**options):
    lists = dict.fromkeys(("words", "model", "adapter", "client_label"), [])
    return Serve(**{**lists, **options})


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_plain_client_generates_with_a_quantized_trunk(tiny_llama, tmp_path, kind):
    folder = str(tmp_path)
    random_model(tiny_llama(hidden_size=64)).save_pretrained(folder)
    run = serve(quantize=kind)._with_options(compose([]))
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with hosted(plan([folder], []), run, WireSpec(bind="127.0.0.1:0")) as address:
        with reach(folder, address) as reached:
            found = reached.model.generate(IDS_BT, **asked)
    client = split_model(folder, "1/*/1").client
    trunk = split_model(folder, "1/*/1", **settings_of(kind, torch.float32)).trunk
    connect(client, trunk.run, trunk.new_cache)
    assert torch.equal(found, client.generate(IDS_BT, **asked))


def test_a_served_trunk_is_frozen_unless_adapters_train():
    assert serve(quantize="nf4")._with_options(compose([])).train.mode == "frozen_trunk"
    with_adapters = serve(quantize="nf4")._with_options(compose(["lora=on"]))
    assert (with_adapters.train.mode, with_adapters.model.quantize) == ("joint", "nf4")
    with pytest.raises(ConfigError, match="set the option --quantize"):
        serve(words=["model.quantize=nf4"], model=["DIR"]).run()
