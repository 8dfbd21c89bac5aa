import json

import peft
import pytest
import torch
from engine_support import engine_of, naive_logps, random_adapter, random_model, with_peft

from alchemist.trainer.families import ModelShape
from alchemist.trainer.lora import MODULES, LoraAdapter, LoraConfig, key

PAIR = ([3, 1, 4, 1, 5], [9, 2, 6])


def test_fresh_adapter_is_pefts_initialisation():
    model = random_model("qwen3")
    shape = ModelShape.from_config(model.config)
    config = LoraConfig(rank=4, alpha=8)
    adapter = LoraAdapter.init(shape, config, seed=7)
    theirs = {
        name.replace(".default", ""): p
        for name, p in peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(MODULES))
        ).named_parameters()
        if ".lora_" in name
    }
    assert {n: t.shape for n, t in adapter.weights.items()} == {
        n: t.shape for n, t in theirs.items()
    }
    for name, tensor in adapter.weights.items():
        assert tensor.dtype == torch.float32
        if ".lora_A." in name:
            # kaiming_uniform(a=√5) is uniform within 1/sqrt(inputs).
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound
            assert theirs[name].abs().max() <= bound
        else:
            assert not tensor.any()
    assert adapter.is_zero
    again = LoraAdapter.init(shape, config, seed=7)
    assert all(torch.equal(adapter.weights[n], again.weights[n]) for n in adapter.weights)
    other = LoraAdapter.init(shape, config, seed=8).weights[key(0, "q_proj", "A")]
    assert not torch.equal(adapter.weights[key(0, "q_proj", "A")], other)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, alpha=5.0),
        LoraConfig(rank=4, alpha=2.0, use_rslora=True, target_modules=("v_proj", "down_proj")),
    ],
)
def test_peft_loads_our_directory_and_gives_our_logprobs(config, tmp_path):
    model = random_model("qwen2", torch.float64)
    engine = engine_of(model)
    adapter = random_adapter(engine.shape, torch.float32, 5, config)
    adapter.save_peft(tmp_path, base_model="somewhere")
    served = adapter.as_served(torch.float64)
    (ours,) = engine.score([PAIR], served)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path, autocast_adapter_dtype=False)
    with torch.no_grad():
        expected = naive_logps(theirs.double().eval(), *PAIR)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    (base,) = engine.score([PAIR], None)
    assert (ours - base).abs().max() > 1e-3
    back = LoraAdapter.load_peft(tmp_path, engine.shape)
    assert back.config == config
    assert all(torch.equal(back.weights[n], t) for n, t in adapter.weights.items())


def test_we_load_pefts_directory(tmp_path):
    model = random_model("llama", torch.float64)
    engine = engine_of(model)
    adapter = random_adapter(engine.shape, torch.float64, 5)
    adapted = with_peft(model, adapter)
    adapted.save_pretrained(tmp_path)
    back = LoraAdapter.load_peft(tmp_path, engine.shape)
    assert set(back.config.target_modules) == set(MODULES)
    torch.testing.assert_close(
        engine.score([PAIR], back)[0], engine.score([PAIR], adapter)[0], rtol=0, atol=1e-12
    )


def test_foreign_directories_are_refused(tmp_path):
    shape = ModelShape.from_config(random_model("llama").config)
    LoraAdapter.init(shape, LoraConfig(rank=2)).save_peft(tmp_path)
    wide = ModelShape.from_config(random_model("llama", hidden_size=32).config)
    with pytest.raises(ValueError, match="does not fit the model"):
        LoraAdapter.load_peft(tmp_path, wide)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        LoraAdapter.load_peft(tmp_path, shape)


def test_config_is_checked():
    with pytest.raises(ValueError, match="rank"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="lm_head"):
        LoraConfig(target_modules=("lm_head",))
    with pytest.raises(ValueError, match="target_modules"):
        LoraConfig(target_modules=LoraConfig.from_names("q_proj,nonsense"))
    assert LoraConfig.from_names("all-linear") == MODULES
    assert LoraConfig.from_names(["v_proj", "q_proj"]) == ("q_proj", "v_proj")


def test_served_copy_is_rounded_and_masters_are_not():
    shape = ModelShape.from_config(random_model("llama").config)
    masters = LoraAdapter.init(shape, LoraConfig(rank=2))
    served = masters.as_served(torch.bfloat16)
    name = key(0, "q_proj", "A")
    assert served.weights[name].dtype == torch.bfloat16
    assert masters.weights[name].dtype == torch.float32
    assert not torch.equal(served.weights[name].float(), masters.weights[name])
    alike = masters.as_served(torch.float32).weights[name]
    masters.weights[name] += 1
    assert torch.equal(alike + 1, masters.weights[name])
