"""Block tables of all slots, as kernels read them: kept from step to step, for a row names what is new alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixtral_worker.plan import Row


class Tables:
    def __init__(self) -> None:
        self.of_slots = np.zeros((0, 0), np.int32)  # [slots, width]

    def remember(self, rows: Sequence[Row]) -> None:
        """Take in where these rows' blocks lie. Called for every step, also those that others compute."""
        slots, width = max(row.slot for row in rows) + 1, max(len(row.blocks) for row in rows)
        if slots > len(self.of_slots) or width > self.of_slots.shape[1]:
            wider = np.zeros((max(slots, len(self.of_slots)), max(2 * width, self.of_slots.shape[1])), np.int32)
            wider[: self.of_slots.shape[0], : self.of_slots.shape[1]] = self.of_slots
            self.of_slots = wider
        for row in rows:
            if row.known < len(row.blocks):
                self.of_slots[row.slot, row.known : len(row.blocks)] = row.blocks[row.known :]
