"""The text of `tests/benchmarks/ACCURACY.md`; every figure in it comes from its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from published import Measurement

from harness.records.memory import LiveTensor
from harness.records.prediction import Prediction

Other = Mapping[tuple[str, int], Mapping[str, int]]
VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
LARGE = 100 * 10**6


@dataclass(frozen=True)
class Compared:
    """A row, its prediction under the measured versions, and under the current ones."""

    row: Measurement
    then: Prediction
    now: Prediction

    @classmethod
    def of(
        cls, rows: Sequence[Measurement], then: Sequence[Prediction], now: Sequence[Prediction]
    ) -> list[Compared]:
        return [cls(*each) for each in zip(rows, then, now, strict=True)]

    @property
    def name(self) -> list[str]:
        columns = self.row.columns
        method = columns["method"]
        if method == "qlora":
            method += " prepared" if "norms fp32" in columns["param_dtype"] else ""
        shape = f"{int(float(columns['micro_batch']))} × {int(float(columns['seq_len']))}"
        return [
            self.row.row_id.rpartition("-")[2],
            self.row.model_id.rpartition("/")[2],
            method,
            str(self.row.devices),
            shape,
        ]


ROW = ["Row", "Model", "Method", "GPUs", "Batch × length"]
LEFT = [":---", ":---", ":---", "---:", "---:"]


def document(source: Mapping[str, Any], found: Sequence[Compared], other: Other) -> str:
    """The whole page."""
    parts = [
        introduction(source, found),
        measured_stack(source, found),
        current_stack(found),
        other_tools(found, other),
        NOT_COVERED,
    ]
    return "\n\n".join(parts) + "\n"


def introduction(source: Mapping[str, Any], found: Sequence[Compared]) -> str:
    return f"""# How right the predictions are

{len(found)} published measurements, each set against what Tunebench predicts for the same
configuration. *Predicted* was computed by simulation on a machine without a GPU; *measured* are the
figures published by
[fms-acceleration]({source["source"]})
({source["license"]}):
{source["measured"]}.
Peak is `torch.cuda.max_memory_allocated()` during training on rank 0, steady `memory_allocated()`
at its end. All figures are bytes.

This page is written by `python tests/benchmarks/accuracy.py`, the measured rows are
[`tests/data/published_measurements.csv`](../data/published_measurements.csv), and
`tests/integration/test_simulate_published.py` holds the agreement."""


def measured_stack(source: Mapping[str, Any], found: Sequence[Compared]) -> str:
    heads = [*ROW, "Peak predicted", "Peak measured", "Difference", "%"]
    heads += ["Steady predicted", "Steady measured", "Difference", "%"]
    rows = []
    for each in found:
        memory, row = each.then.memory, each.row
        rows.append(
            each.name
            + difference(memory.peak_allocated_bytes, row.peak_allocated_bytes)
            + difference(memory.steady_allocated_bytes, row.steady_allocated_bytes)
        )
    return f"""## Under the versions that were measured

Executed: {versions(found[0].then)}. Only torch is newer than what was measured.

{table(heads, [*LEFT, *["---:"] * 8], rows)}

{worst(found)}

* **Blocks**: torch hands out a free block whole when no more than 1 MiB of it would be left over,
  so a tensor may hold up to 1 MiB more than its size, depending on what was freed before it came.
  Row 071 differs by twice what a cuBLAS workspace of 8.125 MiB leaves of a block of 9 MiB, 917,504
  bytes each: much for a steady state of less than a gigabyte. Mistral's tensors have sizes that
  leave nothing over, and its rows agree to the byte.
* **bitsandbytes** is executed as it was measured, and matters: under 0.50.2 every 4-bit layer keeps
  a code map of its own (1,024 bytes) that 0.43.3 shared.
* **Steady under FSDP** holds the gradient shard on both sides: FSDP1 drops it when it next gathers
  the parameters, which after the last step it never does.
{vocabularies(source)}"""


def vocabularies(source: Mapping[str, Any]) -> str:
    lines = [
        f"* **Vocabulary of {name}**: {entry['size']:,}; {entry['how'].strip()}."
        for name, entry in source["vocabulary"].items()
    ]
    return "\n".join(lines)


def worst(found: Sequence[Compared]) -> str:
    """The largest errors, and how many rows have none."""
    parts = []
    for gpus, told in ((1, "one GPU"), (2, "two GPUs")):
        mine = [each for each in found if each.row.devices == gpus]
        peak = max(abs(error(each, "peak_allocated_bytes")) for each in mine)
        steady = max(abs(error(each, "steady_allocated_bytes")) for each in mine)
        parts.append(f"{told}: peak {percent(peak)}, steady {percent(steady)}")
    exact = sum(error(each, "peak_allocated_bytes") == 0 for each in found)
    return f"{exact} of {len(found)} peaks agree to the byte. Largest error, {'; '.join(parts)}."


def error(each: Compared, figure: str) -> float:
    """Relative: predicted over measured, less one."""
    measured = getattr(each.row, figure)
    return float((getattr(each.then.memory, figure) - measured) / measured)


def current_stack(found: Sequence[Compared]) -> str:
    heads = [*ROW, "Measured versions", "Current versions", "Change", "%", "Peak in, then", "now"]
    rows = []
    for each in found:
        then, now = each.then.memory, each.now.memory
        rows.append(
            each.name
            + difference(now.peak_allocated_bytes, then.peak_allocated_bytes, swap=True)
            + [phase(then.peak_phase), phase(now.peak_phase)]
        )
    return f"""## Under the current versions

The same cells, predicted under {versions(found[0].now)}. Both columns are predicted.

{table(heads, [*LEFT, *["---:"] * 4, ":---", ":---"], rows)}

{what_changed(found)}"""


def what_changed(found: Sequence[Compared]) -> str:
    """The largest tensors at both peaks of the single-GPU LoRA row with the smallest batch."""
    lora = [each for each in found if each.row.columns["method"] == "lora"]
    each = min((one for one in lora if one.row.devices == 1), key=lambda one: one.row.row_id)
    heads = ["Tensor at the peak", "Made by", "In", "Measured versions", "Current versions"]
    then, now = (grouped(p.memory.top_tensors) for p in (each.then, each.now))
    rows = [
        [*key, amount(then.get(key)), amount(now.get(key))]
        for key in sorted(then | now, key=lambda key: -max(then.get(key, 0), now.get(key, 0)))
        if max(then.get(key, 0), now.get(key, 0)) >= LARGE
    ]
    return f"""### What changed, tensor by tensor

{changes(found, each)}

Row {each.name[0]}, tensors above {LARGE // 10**6} MB:

{table(heads, [":---", ":---", ":---", "---:", "---:"], rows)}"""


def changes(found: Sequence[Compared], lora: Compared) -> str:
    """What moved between the two stacks, told with the figures of the rows above."""
    full = min(
        (each for each in found if each.now.memory.by_category.get("logits_and_loss")),
        key=lambda each: (each.row.devices, each.row.row_id),
    )
    prepared = next(each for each in found if "norms fp32" in each.row.columns["param_dtype"])
    weights = [p.memory.by_category["weights"] for p in (prepared.then, prepared.now)]
    return f"""\
**The loss.** Under transformers 4.48 a LoRA or QLoRA step peaks where the loss is computed: the
logits are there four times, in bf16 as the head makes them and in fp32 converted, shifted and after
log-softmax, 14 bytes for each token and vocabulary entry ({gigabytes(logits(lora.then))} in row
{lora.name[0]}). TRL 1.16 computes head and loss tile by tile, at most 4096 tokens by 32,768
vocabulary entries, so no tensor of all logits exists any more; what it holds in their place does
not grow with the batch ({gigabytes(logits(full.now))} in row {full.name[0]}). Where the logits were
larger than that the peak falls and moves on to the backward pass of the last layer, with its
recomputed activations; where they were smaller (the short batches of santacoder) it rises.
**Unchanged** is full fine-tuning of Mistral: its peak is the optimizer step, 10 bytes a parameter.
**k-bit preparation** makes embeddings and head fp32; TRL 0.13 cast them back, TRL 1.16 does not
({gigabytes(weights[0])} of unquantized weights then, {gigabytes(weights[1])} now, row
{prepared.name[0]}). **QLoRA adapters** and their optimizer states are bf16 now and were fp32."""


def logits(prediction: Prediction) -> int:
    return prediction.memory.by_category.get("logits_and_loss", 0)


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB"


def grouped(tensors: Iterable[LiveTensor]) -> dict[tuple[str, str, str], int]:
    """Bytes by what a reader can tell apart: shape and dtype, operation, module."""
    found: dict[tuple[str, str, str], int] = {}
    for tensor in tensors:
        shape = " × ".join(map(str, tensor.shape))
        key = (f"{tensor.dtype} {shape}", f"`{tensor.op}`", tensor.module or tensor.category)
        found[key] = found.get(key, 0) + tensor.bytes
    return found


def other_tools(found: Sequence[Compared], other: Other) -> str:
    names = list(next(iter(other.values())))
    heads = [*ROW, "Peak measured", "Tunebench", *names]
    rows = [
        [
            *each.name,
            f"{each.row.peak_allocated_bytes / 1e9:.1f}",
            f"{(each.then.memory.peak_allocated_bytes or 0) / 1e9:.1f}",
            *[f"{other[each.row.model_id, each.row.devices][name] / 1e9:.1f}" for name in names],
        ]
        for each in found
    ]
    return f"""## The same cells through other estimators

GB, 10^9 bytes. *accelerate* is what `accelerate estimate-memory` calls the peak of training with
Adam; *ZeRO-2* and *ZeRO-3* are DeepSpeed's `estimate_zero*_model_states_mem_needs` for as many
GPUs, without offload; all are given the same architecture with the same vocabulary. *Tunebench* is
predicted under the measured versions.

{table(heads, [*LEFT, *["---:"] * (2 + len(names))], rows)}

{WHY_THEY_DIFFER}"""


def difference(predicted: int | None, measured: int | None, swap: bool = False) -> list[str]:
    """Both figures, their difference and it in per cent of the second; `swap` shows that first."""
    if predicted is None or measured is None:
        return ["–"] * 4
    gap = predicted - measured
    pair = (measured, predicted) if swap else (predicted, measured)
    return [f"{pair[0]:,}", f"{pair[1]:,}", signed(gap), percent(gap / measured, True)]


def signed(number: int) -> str:
    return f"{number:+,}".replace("-", "−") if number else "0"


def percent(share: float, sign: bool = False) -> str:
    decimals = 1 if abs(share) >= 0.01 else 4
    text = f"{100 * share:{'+' if sign and share else ''}.{decimals}f}"
    return text.replace("-", "−") + ("" if sign else " %")


def phase(name: str | None) -> str:
    return (name or "–").replace("_", " ")


def amount(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def versions(prediction: Prediction) -> str:
    stack = prediction.stack
    return ", ".join(f"{name} {stack[name]}" for name in VERSIONS if name in stack)


def table(heads: Sequence[str], rules: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, rules, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


WHY_THEY_DIFFER = """\
* **accelerate** multiplies the bytes of the parameters: four times the model in fp32 (weights,
  gradients, two Adam states), and for mixed precision the largest of weights, gradients and states,
  not their sum. It knows no activations and no logits, no frozen weights, no adapters, no 4-bit
  storage, no batch and no number of GPUs, so it says the same for every row of a model. The model
  it builds is the one without the output head.
* **DeepSpeed** counts model states under its own mixed precision: 2 bytes of 16-bit weights and 18
  of gradients, fp32 weights and fp32 Adam states for each parameter, the 18 (and with ZeRO-3 all
  but the largest module) divided by the number of GPUs. The runs here hold everything in bf16 (8
  bytes a parameter) or freeze the base, which the formula cannot express; what a step needs beside
  the states is left out, as its name says.
* **Tunebench** executes the step. What it costs is seconds instead of milliseconds, and that the
  answer holds for the versions that were executed."""
NOT_COVERED = """## What is not covered

* Other GPUs than the A100: Hopper's cuBLAS workspaces are larger and modelled, not compared.
* FSDP2, DDP and ZeRO against measurements: there is no published run to compare with. FSDP1 on two
  GPUs is compared above.
* Mixture-of-experts models: the router's choice depends on data; a balanced one is assumed.
* Reserved memory and out-of-memory verdicts: the published runs record allocated bytes only. The
  model of the caching allocator splits and rounds as torch does, but fragmentation depends on the
  order of frees that kernels on other streams may delay.
* The CUDA context, NCCL's buffers and what kernels allocate outside torch: assumed, not simulated.
* Padded batches, evaluation during training, `torch.compile`, and kernels that bring no fake
  implementation (Liger, Unsloth).
* Host memory beyond the offloaded states."""
