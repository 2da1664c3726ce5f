"""Any plan within the limits travels as one buffer of one size and comes out equal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_worker.plan import Kind, PlanCodec, Row, Sampling, StepPlan

MAX_SLOTS, MAX_SEQ_LEN, MAX_STEP_TOKENS, BLOCK_SIZE = 5, 70, 40, 16

ids = st.integers(0, 2**31 - 1)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
rows = st.builds(
    Row,
    slot=st.integers(0, MAX_SLOTS - 1),
    start=st.integers(0, MAX_SEQ_LEN),
    tokens=st.lists(ids, min_size=1, max_size=MAX_STEP_TOKENS // MAX_SLOTS).map(tuple),
    blocks=st.lists(ids, max_size=5).map(tuple),
    samples=st.booleans(),
    offset=ids,
    sampling=samplings,
)
plans = st.builds(
    StepPlan,
    kind=st.sampled_from(Kind),
    step=st.integers(0, 2**62),
    rows=st.lists(rows, max_size=MAX_SLOTS).map(tuple),
)


@given(plans)
def test_a_plan_comes_out_of_its_buffer_equal(plan: StepPlan) -> None:
    codec = PlanCodec(MAX_SLOTS, MAX_SEQ_LEN, MAX_STEP_TOKENS, BLOCK_SIZE)
    buffer = codec.pack(plan)
    assert (buffer.dtype, buffer.shape) == (np.int32, (codec.size,))
    assert codec.unpack(buffer) == plan


def test_one_row_may_fill_the_whole_step() -> None:
    codec = PlanCodec(MAX_SLOTS, MAX_SEQ_LEN, MAX_STEP_TOKENS, BLOCK_SIZE)
    row = Row(4, 30, tuple(range(MAX_STEP_TOKENS)), (4, 3, 2, 1, 0), True, 1, Sampling())
    assert codec.unpack(codec.pack(StepPlan(Kind.STEP, 1, (row,)))).rows == (row,)


def test_the_size_of_the_buffer_follows_from_the_limits_alone() -> None:
    assert PlanCodec(2, 64, 10, 16).size == PlanCodec(2, 64, 10, 16).size < PlanCodec(3, 64, 10, 16).size
    assert PlanCodec(1, 64, 10, 16).size + 1 == PlanCodec(1, 64, 11, 16).size == PlanCodec(1, 65, 10, 16).size


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
        ({"seed": 2**63}, "seed must be a signed 64-bit number"),
    ],
)
def test_settings_that_no_draw_could_follow_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)  # type: ignore[arg-type]
