"""What a record says was found on the loaded objects."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from harness.records.part import Part

# Of a model's weights: with less in 4 bit it is said that most of it is not.
MOSTLY_IN_4BIT = 0.5


class PassedThrough(Part):
    """An argument of sft_config or lora_config as the library's object held it, and the library's
    default. `classified` is false where tunebench's tables do not know the argument."""

    asked: Any = None
    held: Any = None
    default: Any = None
    classified: bool = True


class VerifiedAdapter(Part):
    """LoRA as it was found on the loaded model, one number for many modules: counts by value."""

    ranks: dict[str, int] = Field(default_factory=dict, description="adapted modules by rank")
    scalings: dict[str, int] = Field(
        default_factory=dict, description="adapted modules by scaling: alpha / rank, or / its root"
    )
    layers: list[int] = Field(default_factory=list, description="numbers of the adapted layers")
    parameters: list[str] = Field(
        default_factory=list, description="adapted without a layer of their own (fused experts)"
    )
    dora: int = Field(0, description="adapted modules with a magnitude of their own")
    init: str | None = Field(None, description="init_lora_weights")
    modules_to_save: list[str] = Field(
        default_factory=list, description="of which a copy is trained"
    )
    trained_tokens: dict[str, int] = Field(
        default_factory=dict, description="rows trained, by the embedding's name"
    )
    trained_biases: int = Field(0, description="bias vectors of the base that are trained")


class Verified(Part):
    """What was found on the loaded modules and objects, not what was asked for."""

    optimizer: str | None = Field(None, description="class that ran")
    quantized_modules: int | None = None
    quant_types: list[str] = Field(default_factory=list)
    quantized_share: float | None = Field(
        None, description="of the base model's weights, those in 4 bit, by number"
    )
    adapter: VerifiedAdapter | None = None
    causal: bool | None = Field(None, description="no later token changes an earlier logit")
    adapter_starts_at_base: bool | None = Field(
        None, description="before training the logits with the adapter are the base's"
    )
    documents_isolated: bool | None = Field(
        None,
        description="whether documents packed into one row see nothing of each other; none: rows "
        "hold one document each",
    )
    adapter_modules: list[str] = Field(default_factory=list)
    adapter_module_count: int | None = None
    attn_implementation: str | None = None
    distributed_type: str | None = Field(None, description="accelerate's, as found when it trained")
    world_size: int | None = Field(None, description="ranks found when it trained")
    weight_dtypes: dict[str, int] = Field(
        default_factory=dict, description="parameters by dtype before training"
    )
    loss_normalization: str | None = Field(
        None, description="what the loss is, where it is not the mean over predicted tokens"
    )
    loss_terms: list[str] = Field(
        default_factory=list, description="what the loss holds beside the cross entropy"
    )
    substitutions: list[str] = Field(
        default_factory=list, description="what ran instead of what was asked, and why"
    )
    passed_through: dict[str, PassedThrough] = Field(
        default_factory=dict, description="arguments of sft_config and lora_config, by their names"
    )
