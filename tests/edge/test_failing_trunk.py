"""A trunk whose optimizer step fails: its health status, its server's exit, the other trunks."""

import re
import resource
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsplit.config import compose
from fedsplit.errors import FedsplitError
from fedsplit.model import initial_parts
from fedsplit.serve import reach
from fedsplit.transport.frames import SERVICE
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.router import TrunkRouter
from fedsplit.trunk.service import TrunkService
from tests.core.worlds import fail, small_run
from tests.edge.forked import Program
from tests.edge.health import NOT_SERVING, SERVING, health_of


def test_health_reports_each_trunk_by_its_name(tiny_llama):
    run, names = small_run(), ("", SERVICE, "one", "two")
    services = {
        name: TrunkService(initial_parts(tiny_llama(), run.split, 0).trunk, run)
        for name in ("one", "two")
    }
    with ExitStack() as opened:
        router = opened.enter_context(TrunkRouter(services))
        server = GrpcServer(router, wire=run.wire, limits=router.limits, max_clients=2)
        opened.callback(server.stop)
        address = server.start()
        assert health_of(address, *names) == [SERVING] * 4
        fail(services["one"])
        assert health_of(address, *names) == [SERVING, SERVING, NOT_SERVING, SERVING]
        fail(services["two"])
        assert health_of(address, *names) == [NOT_SERVING] * 4


@pytest.mark.slow
def test_a_server_whose_only_trunk_runs_out_of_memory_in_a_step_ends_with_an_error(tmp_path):
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=5)
    heads = dict(num_attention_heads=8, num_key_value_heads=8, vocab_size=64)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "model")
    settings = ["split=1/3/1", "train.optimizer=adamw", "data.sequence_length=8", "wire.budget_s=5"]
    command = ["serve", "--model", f"base={tmp_path}/model"]
    bound = ["--bind", "127.0.0.1:0", "--split", "1/3/1"]
    with Program("fedsplit", *command, *bound, *settings[1:]) as server:
        address = re.search(r"at (127\.0\.0\.1:\d+);", server.stdout.readline())[1]
        with reach(str(tmp_path / "model"), address, run=compose(settings)) as reached:
            _step_without_memory(reached, server.pid)
        code, _, told = server.end(timeout_s=30.0)
    assert code == 1
    assert "the trunk failed at version 0 and serves nothing more" in told
    assert "Traceback" in told and "memory" in told
    assert "\nerror: all trunks of this server have failed;" in told


def _step_without_memory(reached, pid: int) -> None:
    """Take a step whose moments the server has no memory for, which ends it."""
    ids_BT = torch.arange(8)[None]
    reached.trunk.open()
    reached.model.train()
    reached.model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    used = int(re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])
    limit = (used + 16 * 1024) * 1024
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    with pytest.raises(FedsplitError):
        reached.trunk.step(step=0, num_tokens=7, client_sq_norm=0.0)
        reached.model(input_ids=ids_BT, labels=ids_BT)
