"""`python -m matrices.reference` prints REFERENCE.md, made from the models that check a matrix."""

from __future__ import annotations

from collections.abc import Sequence

from matrices.accelerate_profiles import PLACEHOLDERS
from matrices.catalogue.gpus import gpus
from matrices.catalogue.models import architectures
from matrices.expand import expand
from matrices.language.presets import PRESETS
from matrices.language.settings import BARE, DEFAULTS, LEAVES, MISLEADING, SCHEMAS, describe, flow
from matrices.libraries.library_arguments import TABLES
from matrices.load import load, shipped
from matrices.rules.arguments import EFFECTS
from matrices.rules.machine import Rule
from matrices.rules.verdicts import PREDICTION_RULES, RULES

INTRODUCTION = """\
# Reference of the matrix language

Made by `python -m matrices.reference`; a test keeps it current.

A matrix is a YAML file. Settings may stand in their section (`train: {steps: 40}`), under their
dotted name (`train.steps: 40`) or, where a bare name is listed, under that (`steps: 40`);
`model: x` is short for `model.name`, `data: x` for `data.source`. The same names work in `axes`,
`exclude`, `include` and `--set KEY=VALUE`. YAML is read as YAML 1.2: `1e-4` is a number, `no` is
text. Relative paths start at the file's directory, those of `--set` at the current one.

A local model or data file is written as a path (`./mine`, `/data/mine`, `~/mine`; data also by its
ending). What has the form of a hub id (`org/name`) is one: where a directory of that name is there
too, it is refused until it is written `./org/name`. Local files are hashed whole; a cell whose
model or data has another hash when it starts fails. What came from the hub is told apart by its
commit: it is in the record, in tables beside the revision (`main@0123456789ab`), and a result of
another commit than the local copy's is measured again.

`model: {config: path/to/config.json}` is an architecture without weights: it can be predicted and
not run, its content hash takes the place of the path in the cell's identity, and it is called after
its file (or directory, if the file is config.json) unless `model.name` says otherwise.

`profile: path/to/mine.yaml` is what `accelerate launch` is given in place of the shipped profile of
the cell's `parallelism`; start from what `tunebench profiles` prints. Its content, and that of a
DeepSpeed file that it names, takes the place of the path in the cell. In both,
{placeholders} are filled in from the cell; `$$` is a dollar sign.

`data.format: auto` reads the column that is named, by a `*_column` setting that the matrix writes.
Else it reads the first of these whose columns are there: chat (`messages`), prompt-completion
(`prompt`, `completion`), text (`text`), ShareGPT (`conversations` of `from` and `value`), Alpaca
(`instruction`, `output` and perhaps `input`). ShareGPT becomes messages (human is user, gpt is
assistant), in whatever column it stands; Alpaca becomes prompt and completion by the two prompts
of Stanford Alpaca, whose completion follows "### Response:" at once. A content of text parts is
their text; `tools` and `chat_template_kwargs` beside messages go to the chat template. The record
tells in `provenance.data` which columns were read, and as what.

Before a run, TRL prepares the rows as it will for training: all of them, or of more than
20,000 the first half of that number and as many at random, while values are checked in
every row. The first row that cannot be trained on is named, by its line in a JSONL file, else by
its place among the rows. Cells find what was prepared in the cache.

* `name` names the results directory; the file's name if not given.
* `question`: what the matrix is to answer; printed in reports.
* `preset`: a named starting point, weaker than everything the matrix says; may be an axis.
* `axes`: settings with a list of values each; every combination is made.
* `exclude`: a list of entries, each naming settings; a combination that has all values of an entry
  is dropped. Entries look at combinations before anything collapses (see below).
* `include`: a list of entries, each naming settings; combinations are added with these values, and
  with all values of the axes not named. `exclude` drops from these too; if it drops all of them,
  that is an error.
* `score_base`: `true` (the default) scores the untouched and the quantized base too.
* `timeout_seconds`: the longest a cell may take; no limit if not given.
* `phase_timeout_seconds`: the longest a cell may stay in one phase (loading, the memory steps,
  training, scoring) or at one step. If not given, 1800 for cells on several devices and 14400 for
  those on one, and no limit for scoring.

Weakest first: defaults, preset, constants, axes, `include`; `--set` replaces a constant or a whole
axis. In `--set` a list is an axis (`--set rank=[8,64]`); for a setting that is a list, a list of
lists is.

What means nothing for a combination is dropped and equal cells merge: `full` has no adapter and no
quantization, `lora` no quantization, `base` neither, nor data, training, a seed or several devices;
`alpha: null` is 2 x rank; `use_reentrant` without `gradient_checkpointing`, `packing_strategy`
without `packing`, `profile` without several processes, `autocast` with `compute_dtype: fp32`,
`compute_dtype` without `autocast` (but for `qlora`) and the lm-eval recipe without `tasks` go to
their defaults. `global_batch_size` becomes `gradient_accumulation_steps`: itself, divided by
`micro_batch_size` times the devices.

A method with its own learning rate goes into `include`:

```yaml
axes: {method: [lora, qlora], seed: [0, 1, 2]}
learning_rate: 2.0e-4
include:
  - {method: full, learning_rate: 2.0e-5}   # for all three seeds
```
"""

ARGUMENTS = """\
Every argument of the libraries' configuration classes. "setting": write what is named here instead.
"passed through": give it under `train.sft_config` or `adapter.lora_config`; its value is compared
with what the library's object holds, and the record keeps both beside the library's default
(`verified.passed_through`). "refused": the cell is `invalid`, for the reason given.

Names and types are checked against the installed release when a matrix is planned. An argument that
a newer release adds and this table does not hold is passed through, and the record says that it is
not classified. Cells that differ only by an argument at the library's default are one cell.
BitsAndBytesConfig has no mapping to pass through.
"""

ARCHITECTURES = """\
What a prediction knows without a network. `model:` takes the name or one of the hub ids, in any
case; a run needs the hub id. Parameters are the published total, tied weights counted once.
"""

GPUS = """\
What a prediction knows of a GPU. Names take vendor words and the driver's spelling too (`NVIDIA
GeForce RTX 4090`). Memory is what the driver reports, the context is an assumption, the rate is
dense with fp32 accumulation. A file of your own adds a GPU or replaces single values:

```yaml
rtx-4090: {price_usd_per_hour: 0.45, price_date: 2026-11-01}
my-card:
  memory_bytes: 25769803776
  context_bytes: 402653184
  bandwidth_bytes_per_second: 9.0e11
  bf16_flops_per_second: 9.0e13
  compute_capability: [8, 9]
  multiprocessors: 80
```
"""


def reference() -> str:
    """The whole page, as Markdown."""
    parts = [
        INTRODUCTION.replace("{placeholders}", _placeholders()),
        _settings(),
        _presets(),
        _arguments(),
        _rules("Cells that are refused", RULES),
        _rules("Cells that are not predicted", PREDICTION_RULES),
        _architectures(),
        _gpus(),
        _matrices(),
    ]
    return "\n".join(parts)


def _placeholders() -> str:
    return ", ".join(f"`${name}` ({meaning})" for name, meaning in PLACEHOLDERS.items())


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def _settings() -> str:
    bare = {dotted: name for name, dotted in BARE.items()}
    rows = [
        (
            f"`{dotted}`",
            f"`{bare[dotted]}`" if dotted in bare else "–",
            describe(SCHEMAS[dotted]),
            f"`{flow(DEFAULTS[dotted])}`",
            model.model_fields[leaf].description or "",
        )
        for dotted, (model, leaf) in LEAVES.items()
    ]
    refused = "; ".join(f"`{name}` is ambiguous, write {said}" for name, said in MISLEADING.items())
    header = ("Setting", "Bare name", "Accepts", "Default", "Meaning")
    return f"## Settings\n\n{table(header, rows)}\n{refused}.\n"


def _presets() -> str:
    keys = dict.fromkeys(key for preset in PRESETS.values() for key in preset)
    rows = [
        (f"`{key}`", *(f"`{flow(p[key])}`" if key in p else "–" for p in PRESETS.values()))
        for key in keys
    ]
    return f"## Presets\n\n{table(('Setting', *(f'`{name}`' for name in PRESETS)), rows)}"


def _arguments() -> str:
    parts = ["## Arguments of the libraries\n", ARGUMENTS]
    for class_name, (_, arguments) in TABLES.items():
        rows = []
        for name, argument in sorted(arguments.items()):
            needs = f"only with {EFFECTS[argument.needs][1]}" if argument.needs else ""
            kind = "passed through" if argument.kind == "passed" else argument.kind
            rows.append((f"`{name}`", kind, argument.said or needs))
        parts.append(f"### {class_name}\n\n{table(('Argument', 'Kind', 'Meaning here'), rows)}")
    return "\n".join(parts)


def _rules(title: str, rules: Sequence[Rule]) -> str:
    rows = [
        (f"`{rule.__name__.replace('_', '-')}`", " ".join((rule.__doc__ or "").split()))
        for rule in rules
    ]
    return f"## {title}\n\n{table(('Rule', 'Refuses'), rows)}"


def _architectures() -> str:
    rows = [
        (
            ", ".join(f"`{name}`" for name in (found.name, *found.aliases)),
            f"{found.parameters:,}",
            ", ".join(found.hub_ids) or found.note,
            found.source,
        )
        for found in architectures().values()
    ]
    header = ("Name", "Parameters", "Hub ids", "Source")
    return f"## Architectures\n\n{ARCHITECTURES}\n{table(header, rows)}"


def _gpus() -> str:
    rows = []
    for found in gpus().values():
        price = "–"
        if found.price_usd_per_hour is not None:
            price = f"{found.price_usd_per_hour:.2f} ({found.price_date})"
        rows.append(
            (
                f"`{found.name}`",
                f"{found.memory_bytes / 2**30:.2f}",
                f"{found.context_bytes / 2**20:.0f}",
                f"{found.bandwidth_bytes_per_second / 1e9:.0f}",
                f"{found.bf16_flops_per_second / 1e12:.1f}",
                ".".join(map(str, found.compute_capability)),
                price,
                found.source,
            )
        )
    header = (
        "Name",
        "Memory, GiB",
        "Context, MiB",
        "Bandwidth, GB/s",
        "bf16, TFLOP/s",
        "Capability",
        "USD per hour",
        "Source",
    )
    return f"## GPUs\n\n{GPUS}\n{table(header, rows)}"


def _matrices() -> str:
    rows = []
    for name in shipped():
        matrix = load(name)
        cells = len(expand(matrix).cells)
        rows.append((f"`{name}`", matrix.question, str(cells)))
    return f"## Shipped matrices\n\n{table(('Name', 'Question', 'Cells'), rows)}"


if __name__ == "__main__":
    print(reference(), end="")
