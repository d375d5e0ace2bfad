"""Resume continues as if nothing had happened, also where a checkpoint names weights otherwise than the model."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, Trainer, set_seed

from hf_efcp.train import EfcpTrainer
from hf_efcp.train.resume import load_converted, refuse_lost_parameters


def equal_states(ours, theirs):
    theirs = theirs.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


@pytest.fixture
def resumed(arguments, tmp_path):
    """A function that trains eight steps, and again from the checkpoint of step four; both trainers."""

    def run(cls, make_model, data, **changes):
        trainers = []
        for checkpoint in (None, str(tmp_path / "run" / "checkpoint-4")):
            args = arguments(**{"save_strategy": "steps", "save_steps": 4, "optim": "efcp_mfac", **changes})
            trainers.append(cls(make_model(), args, train_dataset=data))
            trainers[-1].train(resume_from_checkpoint=checkpoint)
        return trainers

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["efcp_mfac", "mfac"])
def test_resume_is_bit_for_bit(optim, dtype, resumed, tiny_bert, texts):
    """Window of 3: the ring has wrapped by step 4. Trainer's own class, so this holds in unmodified scripts."""
    options = "window=3,damping=0.1" + (",value_dtype=bfloat16" if optim == "efcp_mfac" else "")
    whole, again = resumed(Trainer, lambda: tiny_bert().to(dtype), texts, optim=optim, optim_args=options)
    assert next(whole.model.parameters()).dtype == dtype
    assert equal_states(whole.model, again.model)
    assert [e["loss"] for e in whole.state.log_history[2:4]] == [e["loss"] for e in again.state.log_history[2:4]]
    one, other = (trainer.optimizer.optimizer.state_dict()["state"] for trainer in (whole, again))
    for number, state in one.items():
        for name, value in state.items():
            assert value.dtype == other[number][name].dtype
            assert torch.equal(value, other[number][name]), (number, name)


@pytest.mark.parametrize("optim", ["efcp_mfac", "adamw_torch"])
def test_a_vit_resumes_bit_for_bit(optim, resumed, tiny_vit, images):
    """transformers saves `vit.layers.*` as `vit.encoder.layer.*` and does not find it again."""
    whole, again = resumed(EfcpTrainer, tiny_vit, images, optim=optim)
    assert equal_states(whole.model, again.model)


@pytest.mark.parametrize("cls", [Trainer, EfcpTrainer])
def test_trainer_itself_loses_weights(cls, resumed, tiny_vit, images, caplog):
    """When this fails for `Trainer`, transformers has mended it, and `hf_efcp.train.resume` can go."""
    transformers.logging.enable_propagation()
    whole, again = resumed(cls, tiny_vit, images)
    transformers.logging.disable_propagation()
    is_ours = cls is EfcpTrainer
    assert equal_states(whole.model, again.model) == is_ours
    assert ("missing keys" not in caplog.text) == is_ours
    assert ("unexpected keys" not in caplog.text) == is_ours


def test_the_best_model_is_loaded_whole(tiny_vit, images, arguments):
    """The first evaluation is made the best; at the end its weights must be back, encoder included."""
    seen = []

    def accuracy(prediction):
        seen.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return {"accuracy": 1.0 / len(seen)}

    args = arguments(
        save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        metric_for_best_model="accuracy", optim="efcp_mfac",
    )  # fmt: skip
    trainer = EfcpTrainer(tiny_vit(), args, train_dataset=images, eval_dataset=images[:8], compute_metrics=accuracy)
    trainer.train()
    final, (first, last) = trainer.model.state_dict(), seen
    assert all(torch.equal(final[name], value) for name, value in first.items())
    assert not all(torch.equal(final[name], value) for name, value in last.items())


def test_a_checkpoint_of_a_smaller_model_is_refused(tiny_vit, images, arguments, tmp_path):
    args = arguments(save_strategy="steps", save_steps=4, optim="efcp_mfac")
    EfcpTrainer(tiny_vit(2), args, train_dataset=images).train()
    with pytest.raises(RuntimeError, match=r"no value for 16 of the 56 parameters of ViT.*vit\.layers\.2\."):
        EfcpTrainer(tiny_vit(3), args, train_dataset=images).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")
        )


def tiny_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def tiny_mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )


@pytest.mark.parametrize("max_shard_size", ["1GB", "5KB"])
@pytest.mark.parametrize("make", ["vit", tiny_gpt2, tiny_mixtral])
def test_every_weight_is_restored_in_place(make, max_shard_size, tiny_vit, tmp_path):
    """Renamed weights, tied ones that a file holds once, experts that are merged from several; in shards too."""
    make = tiny_vit if make == "vit" else make
    saved = make()
    saved.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    set_seed(5)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    result = load_converted(model, str(tmp_path))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert equal_states(saved, model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_lost_and_foreign_weights_are_named(tiny_vit, tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["stranger"] = weights.pop("vit.encoder.layer.1.output.dense.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = tiny_vit()
    result = load_converted(model, str(tmp_path))
    assert result.missing_keys == ["vit.layers.1.mlp.fc2.bias"]
    assert result.unexpected_keys == ["stranger"]
    with pytest.raises(RuntimeError, match=r"1 of the 40 .*fc2\.bias.*It holds stranger"):
        refuse_lost_parameters(model, result, "there")
