"""The page's plots: every value inside its axes, and nothing that a name could break."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_benchmark.measure import Arrival, Chat
from mixtral_benchmark.plots import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, chart, cumulative, streaming, thinned

values = st.floats(1e-6, 1e9)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=60), st.booleans(), st.booleans())
def test_every_point_lies_within_its_axes(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> None:
    drawn = ET.fromstring(chart("title", "x", "y", [Series("one", points)], log_x=log_x, log_y=log_y))
    lines = [element.attrib["points"] for element in drawn.iter() if element.tag.endswith("polyline")]
    placed = [tuple(map(float, pair.split(","))) for pair in lines[0].split()]
    assert len(placed) == len(points)
    assert all(LEFT - 1 <= x <= WIDTH - RIGHT + 1 and TOP - 1 <= y <= HEIGHT for x, y in placed)


def test_axes_begin_at_0_unless_they_are_logarithmic() -> None:
    straight = chart("title", "x", "y", [Series("one", [(50.0, 80.0), (60.0, 90.0)])])
    assert re.findall(r'text-anchor="middle">([\d.]+)<', straight)[:5] == ["0", "25", "50", "75", "100"]


def test_names_are_shown_as_they_are() -> None:
    drawn = chart("<b>&", 'a"b', "<y>", [Series("<one>", [(1.0, 1.0)], ["<here>"])])
    texts = [element.text for element in ET.fromstring(drawn).iter()]
    assert {"<b>&", 'a"b', "<y>", "<here>"} <= set(texts)


@pytest.mark.parametrize("series", [[], [Series("empty", [])]])
def test_plot_of_nothing_says_so(series: list[Series]) -> None:
    assert "nothing was measured" in chart("title", "x", "y", series)


def test_cumulative_share_ends_at_all() -> None:
    assert cumulative([3.0, 1.0, 2.0, 2.0]) == [(1.0, 0.25), (2.0, 0.5), (2.0, 0.75), (3.0, 1.0)]


@given(st.lists(st.tuples(values, values), max_size=3000))
def test_thinned_curve_keeps_both_ends(points: list[tuple[float, float]]) -> None:
    few = thinned(points)
    assert len(few) <= 402
    assert (few[:1], few[-1:]) == (points[:1], points[-1:])


def test_streaming_chats_are_counted_from_first_token_to_end() -> None:
    chats = [Chat(0, 0.0, 0.0, [Arrival(1.0, 1)], ended_s=4.0), Chat(1, 0.0, 0.0, [Arrival(2.0, 1)], ended_s=3.0)]
    assert [level for at_s, level in streaming(chats, 0.0) if at_s == 2.0] == [1, 2]
    assert streaming(chats, 0.0)[-1] == (4.0, 0)
