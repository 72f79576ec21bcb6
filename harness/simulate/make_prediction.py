"""Make the prediction of a simulated cell: memory, speed, verdicts per GPU, assumptions, margin."""

from __future__ import annotations

from harness.meters.memory.ledger import category
from harness.meters.steps import TOP_TENSORS
from harness.records.memory import LiveTensor
from harness.records.prediction import (
    PredictedMemory,
    PredictedOutOfMemory,
    Prediction,
    PredictionEngine,
    PredictionStatus,
    RankMemory,
    Verdict,
)
from harness.simulate.libraries import attention
from harness.simulate.memory import replay
from harness.simulate.memory.allocator import Allocator
from harness.simulate.run import Simulation
from harness.simulate.step_time.roofline import FLOOR_LEAVES_OUT, predicted_speed
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell

# Relative errors against published measurements (tests/benchmarks/ACCURACY.md), rounded up: of
# dense models, of mixtures of experts (routing is assumed to be balanced), and of fake CPU tensors
# in place of a GPU's.
MARGIN_DENSE, MARGIN_ROUTED, MARGIN_CPU_FOR_GPU = 0.002, 0.01, 0.05


def refused(
    cell: Cell, status: PredictionStatus, reason: str, stack: dict[str, str] | None = None
) -> Prediction:
    return Prediction(
        cell_id=cell.cell_id,
        cell=cell,
        stack=stack or {},
        status=status,
        reason=" ".join(reason.split()),
    )


def prediction(
    cell: Cell, found: Simulation, engine: PredictionEngine, gpu: Gpu | None, stack: dict[str, str]
) -> Prediction:
    """The prediction without verdicts. Without a GPU there is no caching allocator, so
    `peak_reserved_bytes` is None."""
    made = Prediction(cell_id=cell.cell_id, cell=cell, stack=stack, status="predicted")
    made.engine = engine
    made.device = gpu.name if gpu is not None else None
    made.memory = _memory(found, gpu is not None)
    made.speed = predicted_speed(found.works, gpu)
    made.trainable_parameters = found.trainable_parameters
    made.total_parameters = found.total_parameters
    made.quantized_share = found.quantized_share
    made.simulation_seconds = found.seconds
    made.assumptions = _assumptions(cell, found, gpu)
    made.modelled = list(found.modelled)
    made.margin = _margin(found, engine, gpu)
    peak, steady = made.memory.peak_allocated_bytes, made.memory.steady_allocated_bytes
    if peak is not None and steady is not None:
        made.per_rank = [
            RankMemory(
                rank=rank,
                peak_allocated_bytes=peak,
                steady_allocated_bytes=steady,
                peak_reserved_bytes=made.memory.peak_reserved_bytes or 0,
                host_bytes=found.host_bytes,
            )
            for rank in range(cell.devices)
        ]
    return made


def _memory(found: Simulation, pooled: bool) -> PredictedMemory:
    walked = found.pooled if pooled else replay.walk(found.events, None, found.steady_at)
    sizes = replay.sizes_at_peak(found.events, walked)
    by_category: dict[str, int] = {}
    for storage, size in sizes.items():
        name = category(storage)
        by_category[name] = by_category.get(name, 0) + size
    return PredictedMemory(
        peak_allocated_bytes=walked.peak,
        steady_allocated_bytes=walked.steady,
        peak_reserved_bytes=walked.reserved,
        peak_phase=walked.peak_phase,
        by_category=by_category,
        by_phase=walked.peaks,
        resident=found.resident,
        top_tensors=[
            LiveTensor(
                bytes=size,
                category=category(storage),
                op=storage.op,
                shape=list(storage.shape),
                dtype=storage.dtype,
                module=storage.module,
                phase=storage.phase,
            )
            for storage, size in list(sizes.items())[:TOP_TENSORS]
        ],
        outside_pool_bytes=found.paged_bytes,
    )


def verdict(found: Simulation, gpu: Gpu) -> Verdict:
    """Whether the same allocations fit on `gpu`: replayed on an allocator with its capacity, unless
    an allocator without one stays below it."""
    walked = found.pooled
    if walked.reserved is None or walked.reserved > gpu.capacity_bytes:
        walked = replay.walk(found.events, Allocator(gpu.capacity_bytes))
    made = Verdict(
        gpu=gpu.name,
        capacity_bytes=gpu.capacity_bytes,
        context_bytes=gpu.context_bytes,
        outcome="fits-after-retries" if walked.retries else "fits",
        retries=walked.retries,
        peak_reserved_bytes=walked.reserved,
    )
    if walked.failed is not None:
        event = walked.failed.event
        made.outcome = "oom"
        made.oom = PredictedOutOfMemory(
            phase=event.phase,
            op=event.storage.op,
            module=event.storage.module,
            requested_bytes=event.delta,
            allocated_bytes=walked.failed.allocated,
            reserved_bytes=walked.failed.reserved,
        )
    return made


def _margin(found: Simulation, engine: PredictionEngine, gpu: Gpu | None) -> float:
    if engine == "fake-cpu" and gpu is not None:
        return MARGIN_CPU_FOR_GPU
    return MARGIN_ROUTED if "balanced-routing" in found.assumed else MARGIN_DENSE


def _assumptions(cell: Cell, found: Simulation, gpu: Gpu | None) -> list[str]:
    said = ["every sequence is full length: no padding"]
    if gpu is not None:
        context = f"{gpu.context_bytes / 2**20:.0f} MiB"
        said += [
            f"the CUDA context and libraries take {context} beside torch's pool (not in the peak)",
            f"cuBLAS workspaces of {found.workspace_bytes} bytes for each of two threads",
            "scratch inside kernels is counted for attention only",
            FLOOR_LEAVES_OUT,
        ]
        if cell.model.attn_implementation == "flash_attention_2":
            said.append(f"attention allocates as flash-attn {attention.FLASH_VERSION} does")
        if cell.model.attn_implementation == "sdpa":
            said.append("sdpa's kernel is chosen by torch's rules for this GPU, without cuDNN's")
        if cell.quantization is not None:
            said.append("4-bit products dequantize the whole weight, as for more than 1536 tokens")
    if cell.devices > 1:
        said.append("communication buffers of NCCL are not counted")
    if "balanced-routing" in found.assumed:
        said.append("every expert gets an equal share of the tokens")
    if "all-true" in found.assumed:
        said.append("every index that was asked for by value is there")
    return said + list(found.notes)
