"""A fine-tuning script as a TRL user writes it: nothing of the harness but the texts.

`python bare_trl.py MODEL STEPS METHODS` trains for each method with its options, a JSON object, in
a process of its own, and prints one JSON object for each: losses and step seconds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from harness.data.python_reference import training_passages


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.since = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now


class Trainer(SFTTrainer):
    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def train(path: str, method: str, steps: int, options: dict[str, Any]) -> None:
    keywords: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    if method == "qlora":
        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **keywords)
    if method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapter = LoraConfig(
        r=options["rank"],
        lora_alpha=2 * options["rank"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    texts = [passage.text for passage in training_passages()][: options["max_samples"]]
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=options["learning_rate"],
                lr_scheduler_type="linear",
                warmup_steps=options["warmup_steps"],
                optim="adamw_torch",
                weight_decay=0.0,
                max_grad_norm=1.0,
                bf16=True,
                gradient_checkpointing=False,
                max_length=options["max_length"],
                packing=True,
                packing_strategy="wrapped",
                use_cpu=True,
                seed=0,
                data_seed=0,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=None if method == "full" else adapter,
            callbacks=[recorder],
        )
        trainer.losses = []
        trainer.train()
    told = {"method": method, "losses": trainer.losses, "seconds": recorder.seconds}
    print(json.dumps(told), flush=True)


def main(path: str, steps: int, methods: dict[str, dict[str, Any]]) -> None:
    """The imports take longer than the training: each method is a fork."""
    for method, options in methods.items():
        pid = os.fork()
        if pid == 0:
            train(path, method, steps, options)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"{method} failed")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
