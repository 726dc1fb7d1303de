"""TRL's SFTTrainer on a Qwen3-MoE, balanced by one callback.

Run it: pip install trl && python examples/trl_sft.py

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer  # pyright: ignore

from moe_plugin.callbacks.hugging_face import LoadMonitorTrainerCallback, LossFreeTrainerCallback

VOCABULARY, LENGTH, BATCH = 64, 32, 16


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{token}": token for token in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )


def walks(size: int, seed: int) -> Dataset:
    """Draw texts in which half of the words follow from the one before."""
    random = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1.0, VOCABULARY + 1)
    tokens_BS = torch.multinomial(weights, size * LENGTH, replacement=True, generator=random)
    tokens_BS = tokens_BS.view(size, LENGTH)
    for position in range(1, LENGTH):
        follows_B = torch.rand(size, generator=random) < 0.5
        next_B = (3 * tokens_BS[:, position - 1] + 1) % VOCABULARY
        tokens_BS[:, position] = torch.where(follows_B, next_B, tokens_BS[:, position])
    return Dataset.from_dict({"input_ids": tokens_BS.tolist()})


def new_model() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
        )
    )


def main(balanced: bool = True, steps: int = 200, seed: int = 0) -> dict[str, float]:
    """Train, and return the last loss, and MaxVio of the last 20 steps together."""
    set_seed(seed)
    # The one line. TRL adds the model's auxiliary loss by default; aux_loss="off" leaves the balance to the bias.
    callback = LossFreeTrainerCallback(aux_loss="off") if balanced else LoadMonitorTrainerCallback()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        data = walks(BATCH * steps, seed)
        trainer = SFTTrainer(
            new_model(), arguments, train_dataset=data, processing_class=tokenizer(), callbacks=[callback]
        )
        trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {"loss": last["loss"], "max_violation": last["load/max_violation_global"]}


if __name__ == "__main__":
    print("balanced:", main(balanced=True))
    print("control: ", main(balanced=False))
