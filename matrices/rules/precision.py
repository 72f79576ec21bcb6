"""The rules about dtypes: fp16 autocast and flash attention; see `matrices.rules.verdicts`."""

from __future__ import annotations

from matrices.cell import Cell
from matrices.rules.machine import Machine


def fp16_needs_gpu(cell: Cell, machine: Machine) -> str | None:
    """Training under fp16 autocast on a machine without a GPU."""
    # accelerate/accelerator.py, Accelerator.__init__: fp16 sets native_amp only off the CPU.
    if machine.has_gpu or not _fp16_autocast(cell):
        return None
    return (
        "accelerate turns fp16 mixed precision on for accelerators only: on a CPU it would train "
        "without autocast and say nothing; use compute_dtype bf16 or fp32"
    )


def _fp16_autocast(cell: Cell) -> bool:
    return cell.train is not None and cell.train.autocast and cell.model.compute_dtype == "fp16"


def fp16_gradient_scaling(cell: Cell, machine: Machine) -> str | None:
    """Training under fp16 autocast where gradients come out in fp16 or bf16: full fine-tuning
    of weights that are not fp32, and qlora."""
    # Gradients have the dtype of the trained parameters. PEFT keeps lora's in fp32
    # (autocast_adapter_dtype); TRL casts qlora's to bf16 (trl/trainer/sft_trainer.py). DeepSpeed
    # scales by itself, the gradients of its fp32 copies.
    if not machine.has_gpu or not _fp16_autocast(cell) or cell.strategy.zero_stage:
        return None
    if cell.method == "qlora":
        return (
            "TRL keeps the adapters of a quantized model in bf16, and the gradient scaler of fp16 "
            "mixed precision has no CUDA kernel for bf16 gradients (torch: "
            "_amp_foreach_non_finite_check_and_unscale_cuda); use compute_dtype bf16 or fp32"
        )
    if cell.strategy.fsdp_version:
        # accelerate puts what is trained to fp32: fsdp_utils.py, fsdp2_prepare_model;
        # accelerator.py, prepare_model.
        return None
    if cell.method == "full" and cell.model.weight_dtype == "fp16":
        return (
            "torch's GradScaler refuses it (Attempting to unscale FP16 gradients): fp16 mixed "
            "precision needs weight_dtype fp32"
        )
    if cell.method == "full" and cell.model.weight_dtype == "bf16":
        return (
            "the gradient scaler of fp16 mixed precision has no CUDA kernel for bf16 gradients "
            "(torch: _amp_foreach_non_finite_check_and_unscale_cuda); use weight_dtype fp32 or "
            "compute_dtype bf16"
        )
    return None


def flash_attention_needs_gpu(cell: Cell, machine: Machine) -> str | None:
    """flash_attention_2 without a GPU, or on one older than Ampere."""
    # transformers/modeling_flash_attention_utils.py, FLASH_ATTENTION_COMPATIBILITY_MATRIX and
    # FLASH_ATTN_KERNEL_DEVICES; the capability is flash-attn's own check at the first call.
    if cell.model.attn_implementation != "flash_attention_2":
        return None
    if not machine.has_gpu:
        return (
            "transformers refuses flash_attention_2 without a GPU; use attn_implementation sdpa "
            "or eager"
        )
    if machine.compute_capability is not None and machine.compute_capability < 8.0:
        return (
            "flash-attn only supports Ampere GPUs or newer (compute capability 8.0, this one has "
            f"{machine.compute_capability}); use attn_implementation sdpa"
        )
    return None


def flash_attention_needs_package(cell: Cell, machine: Machine) -> str | None:
    """flash_attention_2 with neither the package flash-attn nor kernels installed."""
    # transformers/modeling_utils.py, _check_and_adjust_attn_implementation: `kernels`, if there,
    # downloads the same attention from the hub.
    if cell.model.attn_implementation != "flash_attention_2":
        return None
    if machine.packages.keys() & {"flash-attn", "kernels"}:
        return None
    return (
        "transformers needs the package flash-attn (or kernels) for flash_attention_2 and "
        "neither is installed; install one or use attn_implementation sdpa"
    )


def flash_attention_needs_half(cell: Cell, machine: Machine) -> str | None:
    """flash_attention_2 where queries stay fp32: fp32 weights without autocast."""
    # transformers/integrations/flash_attention.py, get_target_dtype: fp32 queries are cast to the
    # autocast dtype, else to that of the weights. Nothing is scored under autocast.
    model = cell.model
    if model.attn_implementation != "flash_attention_2" or model.weight_dtype != "fp32":
        return None
    if cell.train is not None and cell.train.autocast and model.compute_dtype != "fp32":
        return None
    return (
        "flash-attn only supports fp16 and bf16, and with weight_dtype fp32 nothing casts its "
        "inputs; use weight_dtype bf16 or attn_implementation sdpa"
    )
