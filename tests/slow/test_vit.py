"""The vision transformer of examples/train_vit.py, trained for a short while."""

from __future__ import annotations

import pytest

import interp
from interp.edits import Temperature
from interp.vision import patch_damage


def test_it_reads_digits_and_one_attacked_patch_moves_it() -> None:
    pytest.importorskip("sklearn")
    from train_vit import accuracy, digits, trained

    module = trained(0, epochs=8)
    assert accuracy(module) > 0.6  # .1 is chance
    model = interp.load(module)
    pictures, labels, held = digits()
    pictures, labels = pictures[held][:40], labels[held][:40]
    found = patch_damage(model, pictures, labels, [None, Temperature(2.0)], level=2.0, steps=8)
    changed = found.frame.set_index(["kind", "edit"])["changed"]
    # the attack is on the very answer, and noise is not; one that was found elsewhere does less
    assert changed["adversarial", 0] > changed["noise", 0]
    assert changed["adversarial", 0] == changed["transferred", 0]
    assert len(found.heads) == 3 * 2 * 16 and bool((found.heads["before"] > 0).all())
