"""The rules about a cell on several devices; see `matrices.rules.verdicts`.

Sources as read in torch 2.13, accelerate 1.15, DeepSpeed 0.19, transformers 5.23, TRL 1.16, PEFT
0.21 and bitsandbytes 0.50.
"""

from __future__ import annotations

from matrices.accelerate_profiles import mixed_precision
from matrices.cell import Cell
from matrices.rules.machine import Machine
from matrices.rules.profiles import (
    own_profile_is_not_predicted,
    profile_matches_parallelism,
    profile_matches_precision,
)

# Their steps are torch's own, also on a DTensor.
TORCH_OPTIMIZERS = frozenset({"adamw_torch", "adamw_torch_fused", "sgd"})


def single_is_one_device(cell: Cell, machine: Machine) -> str | None:
    """More than one device with parallelism single."""
    if cell.strategy.several_devices or cell.devices == 1:
        return None
    return (
        f"parallelism single is one device and devices is {cell.devices}; set parallelism to ddp, "
        "fsdp or zero3, or devices to 1"
    )


def devices_divide_into_nodes(cell: Cell, machine: Machine) -> str | None:
    """Devices that the machines of the cell cannot share out evenly."""
    # accelerate/utils/launch.py: nproc_per_node = num_processes // num_machines, the rest is lost.
    if cell.devices % cell.nodes == 0:
        return None
    return (
        f"accelerate starts as many processes on each machine: {cell.devices} devices do not "
        f"divide into {cell.nodes} nodes"
    )


def enough_devices(cell: Cell, machine: Machine) -> str | None:
    """More devices than a machine has: GPUs, or without any the processors that may be used."""
    each = -(-cell.devices // cell.nodes)
    if cell.method == "base" or machine.devices is None or each <= machine.devices:
        return None
    kind = "GPU" if machine.has_gpu else "usable processor"
    return (
        f"{each} devices on one machine, and this one has {machine.devices} {kind}"
        f"{'s' if machine.devices != 1 else ''}"
    )


def enough_machines(cell: Cell, machine: Machine) -> str | None:
    """More than one machine, run by `tunebench run` on this one alone."""
    if machine.nodes is None or cell.nodes <= machine.nodes:
        return None
    return (
        f"nodes is {cell.nodes}, and this is one machine; run it with --on slurm, or "
        "on each machine by the recorded command"
    )


def zero_needs_deepspeed(cell: Cell, machine: Machine) -> str | None:
    """ZeRO without the package deepspeed."""
    package = cell.strategy.package
    if package is None or package in machine.packages:
        return None
    return (
        f"{cell.parallelism} needs DeepSpeed, which is not installed (it comes with tunebench on "
        "Linux, and runs nowhere else): pip install deepspeed"
    )


def global_batch_divides(cell: Cell, machine: Machine) -> str | None:
    """A global_batch_size that no number of accumulation steps makes."""
    # Expansion leaves it in the cell only where it does not divide.
    if cell.train is None or cell.train.global_batch_size is None:
        return None
    wanted, micro = cell.train.global_batch_size, cell.train.micro_batch_size
    together = micro * cell.ranks
    lower = wanted // together * together
    nearest = [str(size) for size in (lower, lower + together) if size]
    return (
        f"a global_batch_size of {wanted} is not a whole number of micro batches: {micro} samples "
        f"on {cell.ranks} devices make {together}; use {' or '.join(nearest)}"
    )


def fsdp1_needs_two_devices(cell: Cell, machine: Machine) -> str | None:
    """FSDP1 on one device."""
    # torch/distributed/fsdp/_init_utils.py, _init_core_state. DDP, FSDP2 and ZeRO in one process
    # are what they are on several (accelerate starts them so), and are not refused.
    if cell.strategy.fsdp_version != 1 or cell.devices > 1:
        return None
    return "torch switches FSDP1 to NO_SHARD on one device; use more devices, or parallelism single"


def fsdp1_needs_gpus(cell: Cell, machine: Machine) -> str | None:
    """FSDP1 without a GPU."""
    # torch/distributed/fsdp/_init_utils.py, _get_compute_device and _get_device_from_device_id:
    # accelerate gives it the device cpu:0, and it finds the parameters on cpu.
    if cell.strategy.fsdp_version != 1 or machine.has_gpu:
        return None
    return (
        "torch's FSDP1 does not take the device that accelerate names on a machine without GPUs; "
        "use fsdp, which is FSDP2"
    )


def device_map_needs_two_gpus(cell: Cell, machine: Machine) -> str | None:
    """device-map without two GPUs on one machine."""
    if cell.strategy.device_map is None:
        return None
    if not machine.has_gpu:
        return "a device map spreads layers over GPUs, and this machine has none"
    if cell.devices < 2 or cell.nodes > 1:
        return (
            "a device map spreads layers over the GPUs of one process: set devices to 2 or more "
            "and nodes to 1, or parallelism to single"
        )
    return None


def device_map_is_not_predicted(cell: Cell, machine: Machine) -> str | None:
    """device-map: one device of a kind is simulated, and here each holds other layers."""
    if cell.strategy.device_map is None:
        return None
    return (
        "a device map puts other layers on each device; only devices that are alike are simulated: "
        "run it, or predict fsdp or zero3"
    )


def sharding_needs_quant_storage(cell: Cell, machine: Machine) -> str | None:
    """qlora with a quant_storage that the parallelism cannot keep whole: FSDP divides
    floating-point storage only, and mixed precision casts it to its own dtype."""
    # accelerate/utils/fsdp_utils.py, fsdp2_prepare_model (uint8 is left out);
    # torch/distributed/fsdp/_flat_param.py, _validate_tensors_to_flatten (one dtype for all);
    # deepspeed/runtime/engine.py, _cast_module_mixed_precision (every floating parameter is cast,
    # packed ones too). PEFT's guide asks for the same under ZeRO-3, which divides uint8 as well:
    # two ranks hold half of it each, and its losses are those of bf16 storage.
    if cell.quantization is None or cell.train is None:
        return None
    storage, use = cell.quantization.quant_storage, quant_storage(cell)
    fsdp = cell.strategy.fsdp_version
    if fsdp == 2 and storage == "uint8":
        return (
            "accelerate leaves 4-bit weights stored as uint8 out of FSDP's sharding, whole on each "
            f"device; use quant_storage {use}"
        )
    if fsdp == 1 and storage != use:
        return (
            "FSDP1 lays 4-bit weights into one flat tensor with the others, so both need one "
            f"dtype; use quant_storage {use}"
        )
    casts = fsdp == 2 or cell.strategy.zero_stage
    if casts and mixed_precision(cell) != "no" and storage not in ("uint8", use):
        return (
            f"{'FSDP2' if fsdp else 'DeepSpeed'} casts every floating-point weight to "
            f"{use} here, which destroys 4-bit weights packed as {storage}; use quant_storage {use}"
        )
    return None


def quant_storage(cell: Cell) -> str:
    """The quant_storage that 4-bit weights survive in, and are divided in, wherever one does."""
    precision = mixed_precision(cell)
    # FSDP1's policy takes the storage's dtype: transformers/distributed/fsdp.py,
    # update_fsdp_plugin_peft.
    of_weights = cell.strategy.fsdp_version == 1 or precision == "no"
    return cell.model.weight_dtype if of_weights else precision


def deepspeed_casts_weights(cell: Cell, machine: Machine) -> str | None:
    """ZeRO in bf16 or fp16 with weights of another dtype, and ZeRO-3 without mixed precision with
    weights that are not fp32."""
    # deepspeed/runtime/engine.py, _configure_distributed_model.
    precision = mixed_precision(cell)
    if not cell.strategy.zero_stage or precision == cell.model.weight_dtype:
        return None
    if precision != "no":
        return (
            f"DeepSpeed's {precision} is no autocast: it casts all weights to {precision} and "
            f"trains fp32 copies; use weight_dtype {precision}, which is the same, or autocast "
            "false"
        )
    # deepspeed/runtime/zero/partition_parameters.py, InsertPostInitMethodToModuleSubClasses.
    # transformers loads what is quantized without it.
    divided = cell.strategy.shards_parameters and cell.quantization is None
    if not divided or cell.model.weight_dtype == "fp32":
        return None
    return (
        f"{cell.parallelism} without mixed precision reads all weights as fp32, whatever they are "
        "asked to be; use weight_dtype fp32, which is the same, or compute_dtype bf16 with autocast"
    )


def polynomial_needs_defaults(cell: Cell, machine: Machine) -> str | None:
    """A polynomial schedule under ZeRO."""
    # transformers/optimization.py, get_polynomial_decay_schedule_with_warmup: optimizer.defaults.
    if cell.train is None or cell.train.lr_scheduler_type != "polynomial":
        return None
    if not cell.strategy.zero_stage:
        return None
    return (
        "transformers' polynomial schedule asks the optimizer for its defaults, and DeepSpeed's "
        "ZeRO optimizer has none; use lr_scheduler_type linear or cosine"
    )


def kbit_preparation_is_kept(cell: Cell, machine: Machine) -> str | None:
    """qlora's k-bit preparation (norms and head in fp32) under FSDP1, which cannot lay them beside
    4-bit weights of another dtype."""
    if cell.quantization is None or not cell.quantization.kbit_preparation or cell.train is None:
        return None
    # torch/distributed/fsdp/_flat_param.py: Must flatten tensors with uniform dtype.
    if cell.strategy.fsdp_version == 1 and cell.quantization.quant_storage != "fp32":
        return (
            "FSDP1 cannot flatten norms in fp32 (kbit_preparation) together with 4-bit weights "
            f"stored as {cell.quantization.quant_storage}; use kbit_preparation false"
        )
    return None


def fsdp2_needs_torch_optimizer(cell: Cell, machine: Machine) -> str | None:
    """FSDP2 with an optimizer of bitsandbytes, or adafactor."""
    # torch.distributed.tensor: bitsandbytes.optimizer_update_32bit has no sharding strategy; its
    # 8-bit maps and adafactor's rows and columns (transformers/optimization.py) are plain tensors,
    # which cannot be mixed with DTensors.
    if cell.train is None or cell.strategy.fsdp_version != 2:
        return None
    if cell.train.optimizer in TORCH_OPTIMIZERS:
        return None
    return (
        f"{cell.train.optimizer} cannot update FSDP2's DTensors (torch: no sharding strategy, or "
        "mixed torch.Tensor and DTensor); use adamw_torch, or parallelism fsdp1 or zero3"
    )


def adafactor_needs_matrices(cell: Cell, machine: Machine) -> str | None:
    """adafactor under FSDP1 and ZeRO, which hand it flat vectors."""
    # transformers/optimization.py, Adafactor._get_options: factored = len(param_shape) >= 2.
    if cell.train is None or cell.train.optimizer != "adafactor":
        return None
    if cell.strategy.fsdp_version != 1 and not cell.strategy.zero_stage:
        return None
    return (
        f"{cell.parallelism} hands the optimizer flat vectors, whose second moments adafactor does "
        "not factor: it would be another optimizer; use adamw_torch, or parallelism ddp"
    )


def offload_replaces_optimizer(cell: Cell, machine: Machine) -> str | None:
    """zero3-offload on GPUs with an optimizer that accelerate exchanges for another one."""
    # accelerate/utils/deepspeed.py, map_pytorch_optim_to_deepspeed: DeepSpeedCPUAdam for whatever
    # is no Lion of 32 bits, without decoupled decay unless it was AdamW of 32 bits.
    if cell.train is None or not cell.strategy.offloads or not machine.has_gpu:
        return None
    if cell.train.optimizer in ("adamw_torch", "adamw_torch_fused", "lion_32bit"):
        return None
    return (
        f"accelerate exchanges {cell.train.optimizer} for DeepSpeed's CPU Adam or Lion when the "
        "optimizer is offloaded; use adamw_torch or lion_32bit"
    )


def ddp_marks_parameters_once(cell: Cell, machine: Machine) -> str | None:
    """DDP of adapters with reentrant checkpointing, while transformers has it look for unused
    parameters."""
    # transformers/trainer.py, _build_accelerator_args: find_unused_parameters for PEFT models,
    # unless ddp_find_unused_parameters says otherwise.
    if cell.train is None or cell.adapter is None or not cell.train.gradient_checkpointing:
        return None
    if not cell.strategy.replicates or not cell.train.use_reentrant:
        return None
    if cell.train.sft_config.get("ddp_find_unused_parameters") is False:
        return None
    return (
        "DDP refuses reentrant checkpointing of a PEFT model (torch: Expected to mark a "
        "variable ready only once), as transformers has it look for unused parameters; use "
        "use_reentrant false, or sft_config: {ddp_find_unused_parameters: false}"
    )


def reentrant(cell: Cell) -> bool:
    """torch's reentrant checkpointing, as it will be: TRL makes it true for adapters under ZeRO-3.

    A cell that says false is not refused there; its record says what ran.
    """
    # trl/trainer/sft_trainer.py: PEFT + DeepSpeed ZeRO-3 requires reentrant checkpointing.
    if cell.train is None or not cell.train.gradient_checkpointing:
        return False
    forced = cell.adapter is not None and cell.strategy.zero_stage == 3
    return forced or cell.train.use_reentrant


# Of every run and prediction; of runs alone; of predictions alone.
PARALLEL_RULES = (
    single_is_one_device,
    devices_divide_into_nodes,
    global_batch_divides,
    fsdp1_needs_two_devices,
    profile_matches_parallelism,
    profile_matches_precision,
    sharding_needs_quant_storage,
    deepspeed_casts_weights,
    polynomial_needs_defaults,
    kbit_preparation_is_kept,
    fsdp2_needs_torch_optimizer,
    adafactor_needs_matrices,
    offload_replaces_optimizer,
    ddp_marks_parameters_once,
)
PARALLEL_RUN_RULES = (
    enough_devices,
    enough_machines,
    zero_needs_deepspeed,
    fsdp1_needs_gpus,
    device_map_needs_two_gpus,
)
PARALLEL_PREDICTION_RULES = (device_map_is_not_predicted, own_profile_is_not_predicted)
