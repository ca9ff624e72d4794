"""Every situation of the table is exact, labelled rightly, or refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmdit_probe.attention import exact
from tests.observe import situations
from tests.observe.situations import SITUATIONS, Labels, markdown


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    if SITUATIONS[name].lacks:
        pytest.skip(SITUATIONS[name].lacks)
    SITUATIONS[name].check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SITUATIONS)
def test_situation_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(situations, "DEVICE", "cuda")
    test_situation(name)


def test_the_table_is_long_and_can_be_rendered() -> None:
    assert len(SITUATIONS) >= 150
    outcomes = [SITUATIONS[name].check() for name in ("LoRA | flux", "LoRA | sd3", "attention_backend('flex') | flux")]
    header, rule, lora, flex = markdown(outcomes).splitlines()
    assert header.count("|") == rule.count("|") == lora.count("|") == flex.count("|")
    assert lora.startswith("| LoRA | flux, sd3 | exact | ") and "refused: layer 0" in flex and "'flex'" in flex


@pytest.mark.filterwarnings("ignore")
def test_half_a_batch_of_an_unknown_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_probe.observe.probe.drops_unconditional", lambda transformer: False)
    half = SITUATIONS["FasterCache of half the batch | cogvideox pipeline"]
    replace(half, note=None, refusal="ran 1 of the 2 samples of step 1, it is unknown which").check()


def test_a_situation_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: a log-sum-exp that is off, an output, a label, a note and a refusal that are not as stated."""
    plain = SITUATIONS["without guidance | sd3 pipeline"]
    right = exact.attend
    for wrong, message in (
        (lambda call: (right(call)[0], right(call)[1] + 1e-3), "error"),
        (lambda call: (right(call)[0] + 1e-6, right(call)[1]), "output"),
    ):
        monkeypatch.setattr(exact, "attend", wrong)
        with pytest.raises(AssertionError, match=message):
            plain.check()
    monkeypatch.setattr(exact, "attend", right)
    for changes, message in (
        ({"labels": Labels(steps=[1, 2])}, "steps"),
        ({"note": "cache"}, "notes: none"),
        ({"refusal": "no"}, "not refused"),
    ):
        with pytest.raises(AssertionError, match=message):
            replace(plain, **changes).check()
