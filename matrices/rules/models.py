"""The rules that read a model's config.json; see `matrices.rules.verdicts`."""

from __future__ import annotations

from collections.abc import Mapping

from matrices.catalogue.models import (
    PACKAGED_MODELS,
    architecture,
    config_of,
    key_of,
    positions_key,
    read_config,
)
from matrices.cell import Cell, Data
from matrices.errors import UserError
from matrices.rules.machine import Machine

# model_type of the causal models that look positions up in a table (transformers,
# models/*/modeling_*.py: an nn.Embedding or a buffer with one row per position).
POSITION_TABLES = frozenset(
    {
        *("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt"),
        *("opt", "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "mbart", "mvp"),
        *("pegasus", "plbart", "prophetnet", "roformer", "trocr"),
    }
)


def hub_settings_need_hub(cell: Cell, machine: Machine) -> str | None:
    """revision, config or split of a model or data that does not come from the hub."""
    # harness/models/model.py, harness/data/dataset.py: what is packaged or local is read as it is.
    given = []
    model = cell.model
    if model.fingerprint or model.config or model.name in PACKAGED_MODELS:
        given += ["model.revision"] if model.revision is not None else []
    data = cell.data
    if data is not None and (data.fingerprint or data.source == Data().source):
        named = {"revision": data.revision, "config": data.config}
        given += [f"data.{name}" for name, value in named.items() if value is not None]
        given += ["data.split"] if data.split != Data().split else []
    if not given:
        return None
    verb = "has" if len(given) == 1 else "have"
    return (
        f"{' and '.join(given)} {verb} no effect, as what is read is not on the hub; leave it out, "
        "or name a hub id"
    )


def model_needs_weights(cell: Cell, machine: Machine) -> str | None:
    """A model known by its config.json alone, which can be predicted and not run."""
    model = cell.model
    if model.config is not None:
        return (
            "model.config describes a model without weights, which is only predicted; give "
            "model.name a hub id or a local directory to run it"
        )
    if model.config_overrides:
        return "config_overrides change the model for predictions only; leave them out to run it"
    known = None if model.fingerprint else architecture(model.name)
    if known is None or known.packaged or model.name.lower() in map(str.lower, known.hub_ids):
        return None
    if not known.hub_ids:
        return f"{model.name} is an architecture without weights, which is only predicted"
    return (
        f"{model.name} names an architecture without weights; name it {known.hub_ids[0]} to run it"
    )


def config_must_be_complete(cell: Cell, machine: Machine) -> str | None:
    """A config.json that is not one, lacks a value its model type cannot do without, or does not
    have what config_overrides replace."""
    try:
        _config(cell)
    except UserError as error:
        return str(error)
    return None


def _config(cell: Cell) -> Mapping[str, object]:
    """The model's config with its overrides; empty where only the hub has it."""
    path = config_of(cell.model)
    return read_config(path, cell.model.config_overrides) if path else {}


def sequence_needs_positions(cell: Cell, machine: Machine) -> str | None:
    """max_length beyond the positions the model has."""
    # Learned positions (gpt2, opt, gpt_bigcode) are a table that ends there; rotary ones can be
    # computed further, but the model was never trained there.
    try:
        said = _beyond(_config(cell), _longest(cell))
    except UserError:
        return None
    if said is None:
        return None
    key, problem = said
    return (
        f"{problem}; shorten the sequences, or extend the model with config_overrides: {{{key}: "
        f"{_longest(cell)}}}"
    )


def positions_end_in_table(cell: Cell, machine: Machine) -> str | None:
    """max_length beyond the table of positions that gpt2, opt and their like look up."""
    try:
        return positions_problem(_config(cell), _longest(cell))
    except UserError:
        return None


def positions_problem(config: Mapping[str, object], max_length: int) -> str | None:
    """Why a run cannot go to max_length under this config.json: positions that end in a table."""
    if config.get("model_type") not in POSITION_TABLES:
        return None
    said = _beyond(config, max_length)
    return said and f"{said[1]}, a table that ends there; shorten the sequences"


def _longest(cell: Cell) -> int:
    return 0 if cell.data is None else cell.data.max_length


def _beyond(config: Mapping[str, object], max_length: int) -> tuple[str, str] | None:
    """The key that says how many positions there are, and the problem; none where it fits."""
    key = positions_key(config)
    if key is None or max_length <= int(str(config[key])):
        return None
    return key, (f"max_length is {max_length} and the model has {config[key]} positions")


def shards_must_not_be_empty(cell: Cell, machine: Machine) -> str | None:
    """More devices than a layer's vectors have entries, so that some ranks would hold nothing."""
    if not cell.strategy.shards_parameters:
        return None
    try:
        config = _config(cell)
    except UserError:
        return None
    key = key_of(config, "hidden_size")
    if key is None or cell.devices <= int(str(config[key])):
        return None
    return (
        f"{cell.devices} devices cannot share a layer whose {key} is {config[key]}: some would "
        "hold nothing; use fewer devices"
    )
