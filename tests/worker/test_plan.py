"""Any plan within the limits travels as one buffer of one size and comes out equal, told apart from the plans before it.

How a token is drawn is no part of that: it does not travel.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_worker.plan import Kind, PlanCodec, Row, Sampling, StepPlan

MAX_SLOTS, MAX_SEQ_LEN, MAX_STEP_TOKENS, BLOCK_SIZE = 5, 70, 40, 16

ids = st.integers(0, 2**31 - 1)


@st.composite
def plans_in_order(draw: st.DrawFn) -> list[StepPlan]:
    """Plans whose rows name again, in part, the blocks of their slot's row before."""
    tables: dict[int, tuple[int, ...]] = dict.fromkeys(range(MAX_SLOTS), ())
    plans = []
    for _ in range(draw(st.integers(1, 5))):
        rows = []
        for slot in draw(st.lists(st.sampled_from(range(MAX_SLOTS)), unique=True)):
            known = draw(st.integers(0, len(tables[slot])))
            tables[slot] = tables[slot][:known] + tuple(draw(st.lists(ids, max_size=2)))
            tokens = tuple(draw(st.lists(ids, min_size=1, max_size=MAX_STEP_TOKENS // MAX_SLOTS)))
            start, samples = draw(st.integers(0, MAX_SEQ_LEN)), draw(st.booleans())
            rows.append(Row(slot, start, tokens, tables[slot], samples, draw(ids), known=known))
        plans.append(StepPlan(draw(st.sampled_from(Kind)), draw(st.integers(0, 2**62)), tuple(rows)))
    return plans


@settings(max_examples=60)
@given(plans_in_order())
def test_plans_come_out_of_their_buffers_equal(plans: list[StepPlan]) -> None:
    leader, follower = (PlanCodec(MAX_SLOTS, MAX_SEQ_LEN, MAX_STEP_TOKENS, BLOCK_SIZE) for _ in range(2))
    for plan in plans:
        buffer = leader.pack(plan)
        assert (buffer.dtype, buffer.shape) == (np.int32, (leader.size,))
        assert follower.unpack(buffer) == plan


def test_one_row_may_fill_the_whole_step() -> None:
    codec = PlanCodec(MAX_SLOTS, MAX_SEQ_LEN, MAX_STEP_TOKENS, BLOCK_SIZE)
    row = Row(4, 30, tuple(range(MAX_STEP_TOKENS)), (4, 3, 2, 1, 0), True, 1, Sampling())
    assert codec.unpack(codec.pack(StepPlan(Kind.STEP, 1, (row,)))).rows == (row,)


def test_the_size_of_the_buffer_follows_from_the_limits_alone() -> None:
    assert PlanCodec(2, 64, 10, 16).size == PlanCodec(2, 64, 10, 16).size < PlanCodec(3, 64, 10, 16).size
    assert PlanCodec(1, 64, 10, 16).size + 1 == PlanCodec(1, 64, 11, 16).size == PlanCodec(1, 65, 10, 16).size


def test_long_contexts_make_the_buffer_no_larger_than_what_one_step_can_add() -> None:
    size = PlanCodec(64, 32_768, 576, 16).size
    assert size * 4 < 16_000, "64 whole tables would be 524,288 bytes"


def test_more_new_blocks_than_the_buffer_holds_are_refused_with_the_numbers() -> None:
    codec = PlanCodec(2, 64, 16, 16)
    rows = tuple(Row(slot, 0, (1,), tuple(range(4)), True, 1, Sampling()) for slot in (0, 1))
    with pytest.raises(ValueError, match="step 7 adds 8 blocks to the tables; at most 7 travel in one step"):
        codec.pack(StepPlan(Kind.STEP, 7, rows))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number from 0 up; given -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 up; given nan"),
        ({"temperature": float("inf")}, "temperature must be a number from 0 up; given inf"),
        ({"top_p": 0.0}, "top_p must lie above 0 and at most at 1; given 0.0"),
        ({"top_p": 1.5}, "top_p must lie above 0 and at most at 1; given 1.5"),
        ({"top_p": float("nan")}, "top_p must lie above 0"),
        ({"top_k": -1}, "top_k must be 0 .* given -1"),
        ({"min_p": 1.5}, "min_p must lie between 0 and 1; given 1.5"),
        ({"seed": 2**63}, "seed must be a signed 64-bit number"),
    ],
)
def test_settings_that_no_draw_could_follow_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)  # type: ignore[arg-type]
