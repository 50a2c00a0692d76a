"""Adapters that were saved, by us or by peft, back on the parts of a model."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedsplit.errors import CheckpointError
from fedsplit.model import SplitModel, split_model
from fedsplit.model.lora import load_adapter, save_adapter, share_frozen, trainable

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
IDS_BT = torch.arange(1, 13).reshape(2, 6)


def whole_of(config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def peft_adapter(whole: PreTrainedModel, folder: Path, **options: object) -> Path:
    """An adapter that peft made, with values that change what comes out."""
    tuned = get_peft_model(whole, LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    tuned.unload()
    return folder


def adapted(whole: PreTrainedModel, folder: Path) -> SplitModel:
    parts = split_model(whole, "1/2/1")
    for part in (parts.client, parts.trunk):
        load_adapter(part, str(folder))
    return parts


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], "all-linear", r".*layers\.[12]\..*v_proj"]
)
def test_an_adapter_of_peft_is_the_same_on_the_parts(targets, tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    plain = whole(IDS_BT).logits
    folder = peft_adapter(whole, tmp_path, target_modules=targets)
    parts = adapted(whole, folder)
    logits = parts.client(IDS_BT).logits
    expected = PeftModel.from_pretrained(whole, str(folder)).eval()(IDS_BT).logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, plain)
    assert trainable(parts.trunk)
    assert all("lora_" in n for p in (parts.client, parts.trunk) for n in trainable(p))


def test_an_adapter_of_a_family_with_transposed_layers(tiny_gpt2, tmp_path):
    whole = whole_of(tiny_gpt2())
    parts = adapted(
        whole, peft_adapter(whole, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    expected = PeftModel.from_pretrained(whole, str(tmp_path)).eval()(IDS_BT).logits
    assert torch.equal(parts.client(IDS_BT).logits, expected)


def test_adapters_on_one_model_share_its_weights_and_train_apart(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    targets = {"a": ["q_proj", "v_proj"], "b": ["q_proj", "down_proj"]}  # not the same layers
    folders = [peft_adapter(whole, tmp_path / k, target_modules=t) for k, t in targets.items()]
    trunks = [adapted(whole, folder).trunk for folder in folders]
    x_BTD = torch.randn(2, 6, whole.config.hidden_size)
    before = [trunk.run(x_BTD) for trunk in trunks]
    apart = {p.data_ptr() for trunk in trunks for p in trunk.parameters()}
    share_frozen(trunks[1], trunks[0])
    shared = {p.data_ptr() for trunk in trunks for p in trunk.parameters()}
    assert all(
        torch.equal(trunk.run(x_BTD), out) for trunk, out in zip(trunks, before, strict=True)
    )
    own = sum(len(trainable(trunk)) for trunk in trunks)
    assert len(apart) - own == 2 * (len(shared) - own)
    trunks[1].run(x_BTD).sum().backward()
    torch.optim.SGD(trainable(trunks[1]).values(), lr=1.0).step()
    assert not torch.equal(trunks[1].run(x_BTD), before[1])
    assert torch.equal(trunks[0].run(x_BTD), before[0])


def test_what_trains_or_differs_is_not_shared(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    full, other = (split_model(copy.deepcopy(whole), "1/2/1").trunk for _ in range(2))
    folder = peft_adapter(whole, tmp_path, target_modules=["q_proj"])
    load_adapter(other, str(folder))
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.endswith("up_proj.weight")).add_(1.0)
    third = adapted(whole, folder).trunk
    share_frozen(other, full)
    share_frozen(third, other)
    of = [{n: p.data_ptr() for n, p in part.named_parameters()} for part in (full, other, third)]
    assert not {*of[0].values()} & {*of[1].values()}
    differ = {name for name in of[2] if of[2][name] != of[1][name]}
    assert {name for name in differ if "lora_" not in name} == {
        next(n for n in of[1] if n.endswith("up_proj.weight"))
    }


def test_saved_again_it_is_the_same(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    parts = adapted(whole, peft_adapter(whole, tmp_path / "a", target_modules=["q_proj"]))
    save_adapter(parts.client, parts.trunk, tmp_path / "b")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def _without_a_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if ".2." not in k}, file)


def _with_a_strange_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    strange = {"base_model.model.model.layers.1.strange.weight": torch.zeros(1)}
    save_file(load_file(file) | strange, file)


def _of_another_rank(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 2}))


def _of_another_kind(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3", "feedforward_modules": []}')


def _for_other_layers(folder: Path) -> None:
    file = folder / "adapter_config.json"
    told = json.loads(file.read_text()) | {"target_modules": ["c_attn"]}
    file.write_text(json.dumps(told))


DAMAGED = {
    "a tensor less": (_without_a_tensor, r"tensor 'model.layers.2.*' is missing"),
    "a tensor more": (_with_a_strange_tensor, r"strange.weight' does not exist in this model"),
    "another rank": (_of_another_rank, r"has shape \(4, 16\), but this model takes \(2, 16\)"),
    "another kind": (_of_another_kind, "an adapter of type IA3; parts take LORA only"),
    "other layers": (_for_other_layers, r"not an adapter of LlamaForCausalLM \(Target modules"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"there is no adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused(case, tiny_llama, tmp_path):
    damage, told = DAMAGED[case]
    whole = whole_of(tiny_llama())
    damage(peft_adapter(whole, tmp_path, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=told):
        load_adapter(split_model(whole, "1/2/1").trunk, str(tmp_path))
