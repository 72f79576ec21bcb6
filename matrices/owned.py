"""The arguments of TRL, PEFT and bitsandbytes that a setting stands for.

Two uses: whoever writes `lora_alpha` is told the setting's name, and the pass-through mappings
(`train.sft_config`, `adapter.lora_config`) may not quietly contradict a setting.
"""

from __future__ import annotations

# Argument of trl.SFTConfig -> setting.
SFT_SETTINGS = {
    "learning_rate": "train.learning_rate",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "warmup_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "auto_find_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "optim": "train.optimizer",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "train.use_reentrant",
    "activation_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing_kwargs": "train.use_reentrant",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "model.compute_dtype",
    "fp16": "model.compute_dtype",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "packing_strategy": "data.packing_strategy",
    "padding_free": "data.packing_strategy",
    "completion_only_loss": "data.completion_only_loss",
    "assistant_only_loss": "data.completion_only_loss",
    "dataset_text_field": "data.text_column",
}

# Arguments of trl.SFTConfig that no setting stands for, but on which the record depends: where
# files go, what is reported where, which device is used, that no step does more than train.
SFT_RESERVED = frozenset(
    {
        "output_dir",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "use_cpu",
        "dataset_kwargs",
        "disable_tqdm",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "save_strategy",
        "eval_strategy",
        "logging_strategy",
        "logging_steps",
        "resume_from_checkpoint",
    }
)

# Argument of peft.LoraConfig -> setting.
LORA_SETTINGS = {
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.target_modules",
}
LORA_RESERVED = frozenset({"task_type", "peft_type", "inference_mode", "base_model_name_or_path"})

# What users of the libraries write -> setting; for messages only.
LIBRARY_NAMES = {
    **{name: setting for name, setting in SFT_SETTINGS.items() if "." in setting},
    **LORA_SETTINGS,
    "lora_r": "adapter.rank",
    "lr": "train.learning_rate",
    "epochs": "train.steps",
    "bnb_4bit_quant_type": "quantization.quant_type",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "bnb_4bit_quant_storage": "quantization.quant_storage",
    "bnb_4bit_compute_dtype": "model.compute_dtype",
    "load_in_4bit": "method",
    "torch_dtype": "model.weight_dtype",
    "dtype": "model.weight_dtype",
    "model_name_or_path": "model.name",
    "dataset": "data.source",
    "dataset_name": "data.source",
    "max_seq_length": "data.max_length",
    "seeds": "seed",
    "num_processes": "devices",
    "num_machines": "nodes",
    "nnodes": "nodes",
    "config_file": "profile",
    "train_batch_size": "train.global_batch_size",
    "nproc_per_node": "devices",
    "world_size": "devices",
}
