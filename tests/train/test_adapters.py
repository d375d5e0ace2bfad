"""Adapters and other trainers: PEFT, TRL, sequence to sequence, timm; each a short run whose loss falls."""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    set_seed,
)

from hf_efcp import create_optimizer
from hf_efcp.train import EfcpTrainer
from hf_efcp.train.callbacks import own_optimizer

# What peft, trl and timm say about the torch and transformers that they stand on is not ours.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SHARED = Path(__file__).parents[3] / "shared" / "data"
OPTIMIZERS = {
    "efcp_mfac": "block_size=256",
    "sketchy_shampoo": "one_sided=true",
}  # what the README advises for adapters


def falls(trainer, share=0.9):
    """Whether the mean loss of the last third of the log is below `share` of the first third's."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    third = len(losses) // 3
    return statistics.fmean(losses[-third:]) < share * statistics.fmean(losses[:third])


@pytest.fixture(scope="module")
def sentences():
    """Whether a marked word stands in a text: sixty-four texts of a vocabulary of fifty."""
    ids = torch.randint(6, 50, (64, 10), generator=torch.Generator().manual_seed(3))
    ids[::2, 3] = 5
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(5 in row)} for row in ids]


def adapted(**config):
    """A BERT of which adapters and the head are trained."""
    peft = pytest.importorskip("peft")
    set_seed(0)
    bert = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules="all-linear", **config)
    return peft.get_peft_model(BertForSequenceClassification(bert), lora)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_adapters_train_and_leave_the_model_as_it_was(optim, use_dora, sentences, arguments, tmp_path):
    model = adapted(use_dora=use_dora)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    args = arguments(
        optim=optim, optim_args=OPTIMIZERS[optim], max_steps=60, learning_rate=1e-2, per_device_train_batch_size=16
    )
    trainer = EfcpTrainer(model, args, train_dataset=sentences)
    trainer.train()
    assert falls(trainer)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = own_optimizer(trainer.optimizer)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == trained
    trainer.create_model_card()
    assert "library_name: peft" in (tmp_path / "run" / "README.md").read_text()


def test_options_for_adapters_keep_their_state_small():
    """Blocks no longer than a matrix, and a sketch of the short axis alone."""
    bytes_per_parameter = {}
    for optim, text in OPTIMIZERS.items():
        options = dict(pair.split("=") for pair in text.split(","))
        for kind, given in (("usual", {}), ("advised", options)):
            model = adapted()
            optimizer = create_optimizer(optim, model, lr=1e-3, **given)
            optimizer.materialize_state()
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            bytes_per_parameter[optim, kind] = optimizer.state_bytes() / trained
    for optim in OPTIMIZERS:
        assert bytes_per_parameter[optim, "advised"] < 0.6 * bytes_per_parameter[optim, "usual"]


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_readme_counts_what_adapters_keep():
    """The figures of its table, on a model of MiniLM's shape."""
    peft = pytest.importorskip("peft")
    shape = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=6
    )
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear")
    with torch.device("meta"):
        model = peft.get_peft_model(BertForSequenceClassification(shape), lora)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{count:,} parameters | bytes per parameter |" in README
    for name, options in (
        ("efcp_mfac", {}), ("efcp_mfac", {"block_size": 1024}), ("sketchy_shampoo", {}),
        ("sketchy_shampoo", {"one_sided": True}),
    ):  # fmt: skip
        optimizer = create_optimizer(name, model, lr=1e-3, **options)
        optimizer.materialize_state()
        given = "".join(f" with `{option}={str(value).lower()}`" for option, value in options.items())
        row = re.search(rf"^\| `{name}`{given}[^|`]*\| ([0-9.]+) \|$", README, re.MULTILINE)
        assert float(row[1]) == pytest.approx(optimizer.state_bytes() / count, abs=0.011)


LORA_SCRIPT = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
model = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=16))
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True, target_modules="all-linear"))
ids = torch.randint(5, 50, (16, 8))
data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": 0} for row in ids]
trainer = Trainer(model, args, train_dataset=data)
trainer.train()
trainer.save_model()
print("trained", type(trainer.optimizer.optimizer).__name__)
"""


def test_an_unmodified_script_with_adapters_takes_the_optimizer(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "lora.py").write_text(LORA_SCRIPT)
    words = [
        "-m", "hf_efcp.run", "lora.py", "--optim", "sketchy_shampoo", "--optim_args", "one_sided=true", "--use_cpu",
        "--output_dir", "out", "--max_steps", "2", "--report_to", "none",
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).parents[1] / "cpu_torchvision"), *sys.path])
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert "trained SketchyShampoo" in done.stdout, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def questions():
    """Real questions with what kind of answer they ask for."""
    datasets = pytest.importorskip("datasets")
    files = sorted((SHARED / "trec").glob("*train*.parquet"))
    if not files:
        pytest.skip("needs shared/data/trec")
    rows = datasets.Dataset.from_parquet(str(files[0])).select(range(256))
    names = ("abbreviation", "entity", "description", "person", "place", "number")
    return [
        {"prompt": f"question : {row['text']} kind :", "completion": f" {names[row['coarse_label']]}"} for row in rows
    ]


def words_tokenizer(texts):
    """A tokenizer of whole words, made of the texts themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_instructions_are_tuned_with_trl(questions, tmp_path, arguments):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = words_tokenizer([row["prompt"] + row["completion"] for row in questions])
    set_seed(0)
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    args = arguments(
        trl.SFTConfig, optim="efcp_mfac", optim_args="window=8,block_size=256", max_steps=40, learning_rate=5e-3,
        max_length=48, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(llama), args, train_dataset=datasets.Dataset.from_list(questions), processing_class=tokenizer
    )
    trainer.train()
    assert falls(trainer)
    assert own_optimizer(trainer.optimizer).skipped_steps == 0
    assert any("optim_state_bytes" in entry for entry in trainer.state.log_history)


def test_sequence_to_sequence(arguments):
    """A T5 learns to repeat what it reads; generation is Trainer's."""
    set_seed(0)
    config = T5Config(
        vocab_size=20, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    ids = torch.randint(2, 6, (32, 4), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    args = arguments(
        Seq2SeqTrainingArguments, optim="efcp_mfac", optim_args="window=8", max_steps=60, learning_rate=1e-2,
        predict_with_generate=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(T5ForConditionalGeneration(config), args, train_dataset=data, eval_dataset=data[:4])
    trainer.train()
    assert falls(trainer)
    assert len(trainer.predict(data[:4], max_length=5).predictions) == 4


@pytest.mark.parametrize("optim", ["efcp_mfac", "sketchy_shampoo"])
def test_timm_models(optim, arguments):
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    set_seed(0)
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=10,
        model_args={"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2},
    )  # fmt: skip
    digits = load_digits()
    images = torch.tensor(digits.images[:128], dtype=torch.float32)[:, None].repeat(1, 3, 4, 4) / 16
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target, strict=False)]
    args = arguments(optim=optim, max_steps=60, learning_rate=3e-3, per_device_train_batch_size=16)
    trainer = Trainer(TimmWrapperForImageClassification(config), args, train_dataset=data)
    trainer.train()
    assert falls(trainer)
