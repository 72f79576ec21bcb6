"""What to write in a matrix instead of the names that users of the libraries know."""

from __future__ import annotations

from collections.abc import Sequence

from matrices.libraries.library_arguments import (
    BNB_ARGUMENTS,
    LORA_CONFIG,
    SFT_ARGUMENTS,
    SFT_CONFIG,
    TABLES,
)

# What users of the libraries, of older releases and of other trainers write -> what to write here.
OTHER_NAMES: dict[str, str] = {
    "warmup_ratio": "tunebench calls it train.warmup_steps (a number of steps)",
    "group_by_length": f"pass it through: {SFT_CONFIG}: "
    "{train_sampling_strategy: group_by_length}",
    "evaluation_strategy": f"not offered: {SFT_ARGUMENTS['eval_strategy'].said}",
    "val_set_size": f"not offered: {SFT_ARGUMENTS['eval_strategy'].said}",
    "wandb_project": f"not offered: {SFT_ARGUMENTS['report_to'].said}",
    "overwrite_output_dir": f"not offered: {SFT_ARGUMENTS['output_dir'].said}",
    "no_cuda": f"not offered: {SFT_ARGUMENTS['use_cpu'].said}",
    "dataloader_workers": f"pass it through: {SFT_CONFIG}: {{dataloader_num_workers: 2}}",
    "device_map": "tunebench calls it parallelism: device-map (one model over several devices)",
    "quantization_config": "tunebench calls it quantization, with method: qlora",
    "quantization_bit": f"not offered: {BNB_ARGUMENTS['load_in_8bit'].said}",
    "load_in_bits": f"not offered: {BNB_ARGUMENTS['load_in_8bit'].said}",
    "peft_config": f"tunebench calls it adapter; pass further arguments through: {LORA_CONFIG}",
    "training_args": f"tunebench calls it train; pass further arguments through: {SFT_CONFIG}",
    "deepspeed_config": f"tunebench calls it {SFT_ARGUMENTS['deepspeed'].said}",
    "accelerate_config": "tunebench calls it profile",
} | {
    name: f"tunebench calls it {setting}"
    for names, setting in (
        ("lr", "train.learning_rate"),
        ("epochs num_epochs", "train.steps (tunebench trains by steps)"),
        ("num_steps total_steps num_training_steps", "train.steps"),
        ("per_gpu_train_batch_size train_micro_batch_size_per_gpu", "train.micro_batch_size"),
        ("train_batch_size", "train.global_batch_size"),
        ("lr_scheduler scheduler", "train.lr_scheduler_type"),
        ("use_gradient_checkpointing", "train.gradient_checkpointing"),
        ("lora_r lora_rank", "adapter.rank"),
        ("lora_target lora_target_modules", "adapter.target_modules"),
        ("use_bnb_nested_quant", "quantization.double_quant"),
        ("torch_dtype dtype", "model.weight_dtype"),
        ("mixed_precision", "model.compute_dtype"),
        ("model_name_or_path base_model pretrained", "model.name"),
        ("model_revision", "model.revision"),
        ("use_flash_attention_2 flash_attention flash_attn", "model.attn_implementation"),
        ("dataset dataset_name datasets train_file", "data.source"),
        ("dataset_config", "data.config"),
        ("max_seq_length max_seq_len sequence_len cutoff_len model_max_length", "data.max_length"),
        ("sample_packing", "data.packing"),
        ("train_on_inputs", "data.completion_only_loss"),
        ("max_train_samples", "data.max_samples"),
        ("eval_batch_size", "evaluate.batch_size"),
        ("use_peft finetuning_type", "method"),
        ("num_processes nproc_per_node world_size num_gpus n_gpu", "devices"),
        ("num_machines nnodes num_nodes", "nodes"),
        ("config_file", "profile"),
        ("random_seed", "seed"),
        ("eval evaluation lm_eval", "evaluate"),
        ("training trainer", "train"),
        ("lora peft", "adapter"),
        ("bnb bnb_config bitsandbytes", "quantization"),
    )
    for name in names.split()
}

# Every name that `hint` has an answer to.
LIBRARY_NAMES = tuple(OTHER_NAMES) + tuple(
    name for _, arguments in TABLES.values() for name in arguments if "." not in name
)


def hint(name: str, values: Sequence[str] = ()) -> str | None:
    """What to write instead of a name that one of the libraries has; none if none has it. `values`
    are those that were written for it: several are an axis."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    for mapping, arguments in TABLES.values():
        argument = arguments.get(name)
        if argument is None:
            continue
        if argument.kind == "passed":
            each = [f"{{{name}: {value}}}" for value in values or ("...",)]
            text = each[0] if len(each) == 1 else f"[{', '.join(each)}]"
            return f"pass it through: {mapping}: {text}"
        if argument.kind == "setting":
            return f"tunebench calls it {argument.said}"
        return f"not offered: {argument.said}"
    return None
