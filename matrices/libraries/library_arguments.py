"""Every argument of TRL's SFTConfig, PEFT's LoraConfig and transformers' BitsAndBytesConfig, and
what tunebench does with it: a setting stands for it, it is passed through, or it is refused.

Rules, hints and REFERENCE.md are made from these tables; a test compares them with the installed
classes. An argument that a newer release adds is passed through, and the record says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ArgumentKind = Literal["setting", "passed", "refused"]
SFT_CONFIG = "train.sft_config"
LORA_CONFIG = "adapter.lora_config"


@dataclass(frozen=True)
class Argument:
    """`said` is what to write instead (a setting) or why not (refused). `needs` names what must be
    so for a passed argument to have an effect: a key of `matrices.rules.arguments.EFFECTS`."""

    kind: ArgumentKind
    said: str = ""
    needs: str = ""


def _settings(names: Mapping[str, str]) -> dict[str, Argument]:
    return {name: Argument("setting", said) for name, said in names.items()}


def _passed(*names: str, needs: str = "") -> dict[str, Argument]:
    return {name: Argument("passed", needs=needs) for name in names}


def _refused(reason: str, *names: str) -> dict[str, Argument]:
    return {name: Argument("refused", reason) for name in names}


SFT_ARGUMENTS: dict[str, Argument] = {
    **_settings(
        {
            "learning_rate": "train.learning_rate",
            "max_steps": "train.steps",
            "num_train_epochs": "train.steps (tunebench trains by steps)",
            "warmup_steps": "train.warmup_steps",
            "per_device_train_batch_size": "train.micro_batch_size",
            "auto_find_batch_size": "train.micro_batch_size (a cell has one batch size)",
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
            "model_init_kwargs": "the settings of model",
            "trust_remote_code": "model.trust_remote_code",
            "max_length": "data.max_length",
            "packing": "data.packing",
            "packing_strategy": "data.packing_strategy",
            "padding_free": "data.packing_strategy (bfd and bfd_split pack without padding)",
            "completion_only_loss": "data.completion_only_loss",
            "assistant_only_loss": "data.completion_only_loss",
            "dataset_text_field": "data.text_column",
            "fsdp": "parallelism: fsdp, or profile for more of it",
            "fsdp_config": "parallelism: fsdp, or profile for more of it",
            "deepspeed": "parallelism: zero1, zero2 or zero3, or profile for more of it",
            "parallelism_config": "parallelism, or profile for more of it",
        }
    ),
    **_passed(
        "lr_scheduler_kwargs",
        "label_smoothing_factor",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "neftune_noise_alpha",
        "full_determinism",
        "accelerator_config",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "train_sampling_strategy",
        "router_aux_loss_coef",
        "eos_token",
        "pad_token",
        "shuffle_dataset",
        "pad_to_multiple_of",
        "loss_type",
        "skip_memory_metrics",
    ),
    **_passed("adam_beta1", "adam_beta2", needs="adam or lion"),
    **_passed("adam_epsilon", needs="adam"),
    **_passed(
        "tf32",
        "torch_empty_cache_steps",
        "dataloader_pin_memory",
        "activation_offloading",
        needs="gpu",
    ),
    **_passed(
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
        needs="dataloader workers",
    ),
    **_passed(
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        needs="ddp",
    ),
    **_passed(
        "average_tokens_across_devices",
        "accelerator_config.dispatch_batches",
        "accelerator_config.even_batches",
        "accelerator_config.gradient_accumulation_kwargs",
        needs="several ranks",
    ),
    **_passed("accelerator_config.non_blocking", needs="gpu"),
    **_passed("accelerator_config.use_seedable_sampler"),
    **_passed("truncation_mode", needs="unpacked rows"),
    **_passed("use_liger_kernel", needs="liger"),
    **_passed("liger_kernel_config", needs="use_liger_kernel"),
    **_refused(
        "split_batches would divide train.micro_batch_size", "accelerator_config.split_batches"
    ),
    **_refused("tunebench makes the state", "accelerator_config.use_configured_state"),
    **_refused("tunebench decides where files go", "output_dir"),
    **_refused(
        "nothing is saved during training; the adapter is kept at its end",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ),
    **_refused(
        "a cell trains from its base model, never from a checkpoint",
        "resume_from_checkpoint",
        "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
    ),
    **_refused(
        "nothing is evaluated during training; lm-eval scores what comes out of it (evaluate)",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "eval_packing",
        "per_device_eval_batch_size",
        "prediction_loss_only",
        "include_for_metrics",
        "batch_eval_metrics",
        "bf16_full_eval",
        "fp16_full_eval",
        "label_names",
        "do_eval",
        "do_predict",
    ),
    **_refused(
        "nothing is logged during training; the record holds loss, rate and time of every step",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_on_each_node",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
    ),
    **_refused(
        "nothing is reported to a tracker; results are records on disk",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
    ),
    **_refused(
        "nothing is uploaded",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "hub_strategy",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
    ),
    **_refused(
        "tunebench has meters of its own, which this would disturb",
        "include_num_input_tokens_seen",
        "debug",
    ),
    **_refused("the launcher decides it", "use_cpu", "local_rank"),
    **_refused(
        "ranks have met before TRL reads its arguments: by nccl on GPUs, by gloo on CPUs",
        "ddp_backend",
        "ddp_timeout",
    ),
    **_refused("only example scripts read it", "do_train"),
    **_refused("none of the optimizers of train.optimizer reads it", "optim_args"),
    **_refused("only GaLore and APOLLO read it, which are not offered", "optim_target_modules"),
    **_refused("the preparation of the rows is not measured", "dataset_num_proc"),
    **_refused("tunebench prepares the rows with it", "dataset_kwargs"),
    **_refused(
        "a cache is of no use in training, and packed documents see each other", "use_cache"
    ),
    **_refused("TRL trains on the same columns either way", "remove_unused_columns"),
    **_refused("TRL's preparation leaves no such column", "length_column_name"),
    **_refused(
        "a cell's identity would not hold the file's content; put chat_template.jinja into a local "
        "model directory",
        "chat_template_path",
    ),
}

LORA_ARGUMENTS: dict[str, Argument] = {
    **_settings(
        {
            "r": "adapter.rank",
            "lora_alpha": "adapter.alpha",
            "lora_dropout": "adapter.dropout",
            "target_modules": "adapter.target_modules",
        }
    ),
    **_passed(
        "exclude_modules",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
        "use_dora",
        "lora_bias",
        "target_parameters",
        "ensure_weight_tying",
        "velora_config",
        "kasa_config",
        "use_bdlora",
    ),
    **_passed("layers_pattern", needs="layers_to_transform"),
    **_refused(
        "tunebench sets it",
        "task_type",
        "peft_type",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
    ),
    **_refused("PEFT sets it by the type of each layer", "fan_in_fan_out"),
    **_refused("the models that are trained here hold no Megatron layers", "megatron_config"),
    **_refused("the models that are trained here hold no Megatron layers", "megatron_core"),
    **_refused(
        "its initialisation needs the unquantized weights or a pass over the data before training, "
        "which tunebench does not make",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
    ),
    **_refused("only GPTQ layers have it", "use_qalora", "qalora_group_size"),
    **_refused("a deeper model would be another experiment", "layer_replication"),
    **_refused("a mapping cannot be given to PEFT for it", "runtime_config"),
    **_refused("it routes between several trained adapters", "arrow_config"),
    **_refused("its loss term is added by a trainer of PEFT's own", "monteclora_config"),
    **_refused(
        "it adapts only what follows an invocation text, which packed rows do not hold in place",
        "alora_invocation_tokens",
    ),
}

# There is no mapping to pass these through: quantization has a setting for each that matters.
_FOUR_BIT_ONLY = "only 4-bit storage is measured (method: qlora)"
BNB_ARGUMENTS: dict[str, Argument] = {
    **_settings(
        {
            "load_in_4bit": "method: qlora",
            "bnb_4bit_quant_type": "quantization.quant_type",
            "bnb_4bit_use_double_quant": "quantization.double_quant",
            "bnb_4bit_quant_storage": "quantization.quant_storage",
            "bnb_4bit_compute_dtype": "model.compute_dtype",
        }
    ),
    **_refused(
        _FOUR_BIT_ONLY,
        "load_in_8bit",
        "llm_int8_threshold",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
    ),
    **_refused(
        "transformers chooses the layers that stay unquantized by the architecture",
        "llm_int8_skip_modules",
    ),
}

TABLES: dict[str, tuple[str, Mapping[str, Argument]]] = {
    "SFTConfig": (SFT_CONFIG, SFT_ARGUMENTS),
    "LoraConfig": (LORA_CONFIG, LORA_ARGUMENTS),
    "BitsAndBytesConfig": ("", BNB_ARGUMENTS),
}
