"""What was verified, in `show`'s words and under a table."""

from __future__ import annotations

import synthetic_results as made

from harness.records.prediction import Prediction
from harness.records.record import Record
from harness.records.verified import Verified, VerifiedAdapter
from launch.display.predictions import four_bit_notes
from reports.records.verified_text import adapter_text, behaviour_text, verified_caption


def _record(share: float, isolated: bool | None) -> Record:
    found = made.record(made.trained("qlora", 0))
    found.verified = Verified(quantized_share=share, documents_isolated=isolated)
    return found


def test_plain_lora_is_said_shortly_and_everything_else_is_named() -> None:
    plain = VerifiedAdapter(ranks={"8": 4}, scalings={"2": 4}, layers=[0, 1, 2], init="True")
    assert adapter_text(plain) == "rank 8; scaling 2; layers 0-2"
    other = VerifiedAdapter(
        ranks={"4": 2, "8": 1},
        scalings={"2": 3},
        layers=[0, 2],
        init="pissa",
        dora=3,
        modules_to_save=["lm_head"],
        trained_tokens={"model.embed_tokens": 2},
        trained_biases=6,
    )
    assert adapter_text(other) == (
        "rank 4 on 2, 8 on 1; scaling 2; layers 0, 2; init pissa; with a magnitude (DoRA) 3; "
        "trained copies of lm_head; trained tokens 2 rows of model.embed_tokens; trained biases 6"
    )


def test_behaviour() -> None:
    assert behaviour_text(Verified()) == ""
    leaks = Verified(causal=True, documents_isolated=False)
    assert behaviour_text(leaks) == "causal; documents in a row see each other"


def test_under_a_table_little_in_4_bit_and_leaking_documents_are_said() -> None:
    assert verified_caption([_record(0.9, True), _record(0.9, None)]) == ""
    mixed = verified_caption([_record(0.12, True), _record(0.9, False)])
    assert mixed.startswith("In 4 bit under qlora: 12% to 90% of the weights")
    assert mixed.endswith("see each other in some runs.")


def test_a_prediction_says_when_most_is_not_in_4_bit() -> None:
    cell = made.trained("qlora", 0)
    told = {"cell_id": cell.cell_id, "cell": cell, "stack": {}, "status": "predicted"}
    mostly = Prediction.model_validate(told | {"quantized_share": 0.8})
    hardly = Prediction.model_validate(told | {"quantized_share": 0.03})
    assert four_bit_notes([mostly]) == []
    [note] = four_bit_notes([mostly, hardly, hardly])
    assert note.startswith(f"note: qlora holds 3% of the weights of {cell.model.name} in 4 bit")
