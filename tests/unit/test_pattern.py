import itertools
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.sequence import Follower, Loop, Pattern
from offload_engine.sequence import pattern as pattern_module


def of(text: str) -> Pattern:
    return Pattern.of(text.split())


def blocks(count: int, name: str = "block") -> list[str]:
    return [f"{name}{index}" for index in range(count)]


# ---- patterns drawn at random

few_names = st.sampled_from("abc")
counts = st.integers(2, 4)


def loops_of(items: st.SearchStrategy) -> st.SearchStrategy:
    bodies = st.lists(items, min_size=1, max_size=4).map(tuple)
    return st.builds(Loop, bodies, counts)


any_patterns = st.lists(st.recursive(few_names, loops_of, max_leaves=8), max_size=5).map(
    lambda items: Pattern(tuple(items))
)


@st.composite
def clean_patterns(draw) -> Pattern:
    """As `Pattern.of` writes them: every leaf another unit, no loop of just one other loop."""
    number = itertools.count()

    def items(depth: int) -> tuple:
        shape = draw(st.lists(st.sampled_from("nnL" if depth else "n"), min_size=1, max_size=4))
        if depth < 3 and shape == ["L"]:
            shape = ["n"]
        return tuple(
            f"n{next(number)}" if kind == "n" else Loop(items(depth - 1), draw(counts))
            for kind in shape
        )

    return Pattern(items(3))


@given(st.lists(few_names, max_size=80))
def test_a_pattern_expands_to_the_very_trace(trace):
    assert Pattern.of(trace).trace == trace


@given(any_patterns)
def test_the_trace_of_any_loops_is_kept_and_gets_no_longer_text(pattern):
    found = Pattern.of(pattern.trace)
    assert found.trace == pattern.trace
    assert len(found) == len(pattern) == len(pattern.trace)
    assert len(found.names) <= len(found)


@given(clean_patterns())
def test_a_clean_pattern_is_found_exactly(pattern):
    found = Pattern.of(pattern.trace)
    assert found == pattern and hash(found) == hash(pattern)


@given(any_patterns)
def test_every_use_has_a_leaf_and_every_leaf_a_name(pattern):
    for each in (pattern, Pattern.of(pattern.trace)):
        assert [each.names[leaf] for leaf in each.leaves] == each.trace
        assert sorted(set(each.leaves)) == list(range(len(each.names)))


@given(any_patterns)
def test_a_pattern_that_was_found_has_no_idle_loops(pattern):
    def check(items: tuple) -> None:
        for item in items:
            if isinstance(item, Loop):
                assert item.count >= 2
                assert len(item.body) > 1 or isinstance(item.body[0], str)
                check(item.body)

    check(Pattern.of(pattern.trace).items)


# ---- what a person would write


@pytest.mark.parametrize(
    ("trace", "text"),
    [
        ("", ""),
        ("a", "a"),
        ("a a a", "3*a"),
        ("te " + "net unet " * 28 + "vae", "te->28*(net->unet)->vae"),
        (("a b " * 2 + "c ") * 4, "4*(2*(a->b)->c)"),
        ("a b a " * 3, "3*(a->b->a)"),
        ("a b a c " * 5, "5*(a->b->a->c)"),
        ("unet " * 28 + "vae " * 4 + "unet " * 28 + "vae " * 4, "2*(28*unet->4*vae)"),
        (("a b " * 10 + "a c " * 10) * 3, "3*(10*(a->b)->10*(a->c))"),
        ("te te2 te te2 " + "h " * 13 + "l " * 27, "2*(te->te2)->13*h->27*l"),
    ],
)
def test_the_obvious_loops_are_found(trace, text):
    assert str(of(trace)) == text


@pytest.mark.parametrize(
    ("trace", "text"),
    [
        ("te " + "net unet " * 14 + "unet " * 14 + "vae", "te->14*(net->unet)->14*unet->vae"),
        ("te " + "unet " * 14 + "net unet " * 14 + "vae", "te->14*unet->14*(net->unet)->vae"),
        ("a x b c " + "a b c " * 27, "a->x->b->c->27*(a->b->c)"),
        ("a b c " * 27 + "a x b c", "27*(a->b->c)->a->x->b->c"),
        ("a b c " + "x a b c " * 27, "27*(a->b->c->x)->a->b->c"),
        ("x a b c " + "a b c " * 27, "x->28*(a->b->c)"),
        ("b c " + "a b a b c " * 3, "b->c->3*(2*(a->b)->c)"),
    ],
)
def test_a_round_that_differs_leaves_the_others_in_a_loop(trace, text):
    assert str(of(trace)) == text


def test_two_passes_over_the_same_blocks_are_one_loop():
    found = Pattern.of(["te", *blocks(57) * 2 * 28, "vae"])
    assert found.items == ("te", Loop(tuple(blocks(57)), 56), "vae")
    assert found.leaves == [0, *list(range(1, 58)) * 56, 58]


def test_the_number_of_steps_does_not_change_the_leaves():
    few, many = (Pattern.of(["te", *blocks(9) * steps, "vae"]) for steps in (4, 50))
    assert few.names == many.names


# ---- another number of steps

T5 = blocks(24, "t5")


@pytest.mark.parametrize(
    ("call", "before", "now"),
    [
        (lambda n: ["te", "te2", *["unet"] * n, "vae"], 30, 50),  # SDXL
        (lambda n: ["te", "te2", "te", "te2", *["unet"] * n, "vae"], 30, 8),
        (lambda n: ["te", *T5, *blocks(57) * n, "vae"], 28, 50),  # Flux
        (lambda n: ["te", *T5, *blocks(57) * n, "vae"], 28, 1),
        (lambda n: ["te", *["net", "unet"] * n, "vae"], 28, 3),  # ControlNet
        (lambda n: ["te", *[*["net"] * 2, *blocks(9)] * n, "vae"], 28, 20),
        (lambda n: [*T5, *T5, *blocks(30) * 2 * n, "vae"], 50, 20),  # two passes a step
        (lambda n: [*blocks(30, "cond"), *blocks(30, "uncond")] * n, 50, 20),
        (lambda n: ["vae", "te", *["unet"] * (n * 3 // 5), "vae"], 50, 20),  # img2img
        (lambda n: ["te", *["unet"] * (n + 1), "vae"], 50, 28),  # PNDM
        (lambda n: ["te", *["unet"] * (2 * n - 1), "vae"], 50, 28),  # Heun
        (lambda n: ["te", *["net", "unet"] * (n // 2), *["unet"] * (n // 2), "vae"], 28, 50),
        (lambda n: ["te", *["unet"] * (n // 2), *["net", "unet"] * (n // 2), "vae"], 28, 50),
        (lambda n: [*["high"] * (n // 4), *["low"] * (n * 3 // 4), "vae"], 40, 8),  # Wan 2.2
        (lambda n: [*["high"] * (n // 2), *["low"] * (n * 3 // 2), "vae"], 40, 8),
        (lambda n: [*blocks(6), *["extra", *blocks(6)] * (n - 1), "vae"], 28, 10),
        (lambda n: ["b0", "extra", *blocks(6)[1:], *blocks(6) * (n - 1), "vae"], 28, 10),
        (lambda n: ["te", *["unet"] * n, "vae"] * 3, 28, 50),  # three calls by hand
        (lambda n: ["te", *["a", "b", "a", "b", "c"] * (n // 2), "vae"], 8, 20),
    ],
)
def test_a_call_with_other_steps_is_predicted(call, before, now):
    recorded = Pattern.of(call(before))
    predicted = recorded.with_steps(before, now)
    assert predicted.trace == call(now)
    assert predicted.names == recorded.names
    assert predicted.with_steps(now, now) is predicted


def test_where_two_rounds_are_special_all_rounds_together_come_out_right():
    """A last round without the extra unit looks like the first: 26*(a->b->extra)->2*(a->b)."""
    found = of("a b " + "extra a b " * 26 + "a b")
    assert found.with_steps(28, 10).trace.count("a") == 10


def test_loops_that_do_not_count_steps_are_left_alone():
    found = of("te te2 te te2 te te2 " + "unet " * 28 + "vae " * 9)
    assert str(found.with_steps(28, 50)) == "3*(te->te2)->50*unet->9*vae"


def test_loops_inside_a_scaled_loop_are_left_alone():
    found = of(("unet " * 4 + "vae ") * 4)
    assert str(found.with_steps(4, 6)) == "6*(4*unet->vae)"


def test_a_call_of_one_step_shows_nothing_to_scale():
    found = of("te te te unet vae")
    assert found.with_steps(1, 28) is found


def test_a_loop_scaled_to_one_round_is_written_as_its_body():
    assert of("te net unet net unet vae").with_steps(2, 1) == of("te net unet vae")


def test_a_pattern_without_loops_has_the_same_prediction():
    assert of("te unet vae").with_steps(28, 50) == of("te unet vae")


@given(clean_patterns(), st.integers(1, 12), st.integers(1, 12))
def test_any_prediction_keeps_the_leaves_and_their_order(pattern, before, now):
    predicted = pattern.with_steps(before, now)
    assert predicted.names == pattern.names
    assert list(dict.fromkeys(predicted.leaves)) == list(dict.fromkeys(pattern.leaves))


@given(st.integers(2, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 5))
def test_rounds_go_with_the_steps_whatever_stands_around(before, now, passes, size):
    def call(steps: int) -> list[str]:
        return ["te", *blocks(size) * passes * steps, "vae"]

    assert Pattern.of(call(before)).with_steps(before, now).trace == call(now)


# ---- the work that finding takes


@pytest.fixture
def searches(monkeypatch):
    """The comparisons of two stretches that were made, each logarithmic in what it finds."""
    made: list[int] = []
    common = pattern_module._common

    def counted(text: str, first: int, second: int) -> int:
        made.append(common(text, first, second))
        return made[-1]

    monkeypatch.setattr(pattern_module, "_common", counted)
    return made


def test_more_rounds_take_no_more_comparisons(searches):
    made = []
    for rounds in (10, 100, 1750):
        searches.clear()
        trace = ["te", *blocks(57) * rounds, "vae"]
        assert Pattern.of(trace).trace == trace
        made.append(len(searches))
    assert made[0] == made[1] == made[2] < 50


def test_passes_that_differ_by_one_unit_take_a_few_comparisons_each(searches):
    for rounds in (10, 100, 1000):
        searches.clear()
        trace = ["te", *[*blocks(57), "x", *blocks(57), "y"] * rounds, "vae"]
        assert len(Pattern.of(trace).names) == 2 + 2 * 58
        assert len(searches) <= 8 * rounds + 50


def test_comparisons_in_a_trace_without_order_grow_with_its_length(searches):
    rng = random.Random(0)
    names = blocks(50)
    for length in (2_500, 5_000, 10_000, 20_000):
        searches.clear()
        trace = rng.choices(names, k=length)
        assert Pattern.of(trace).trace == trace
        assert len(searches) <= 20 * length


def test_a_fibonacci_word_has_loops_at_every_depth_and_is_read_all_the_same(searches):
    shorter, word = "a", "ab"
    while len(word) < 20_000:
        shorter, word = word, word + shorter
    assert Pattern.of(word).trace == list(word)
    assert len(searches) <= 6 * len(word)


# ---- following


def follow(trace: str, call: str) -> tuple[list[int | None], int]:
    follower = Follower(trace.split())
    return [follower.enter(name) for name in call.split()], follower.deviations


def test_a_call_that_goes_as_predicted_never_deviates():
    places, deviations = follow("te a b a b vae", "te a b a b vae")
    assert places == [0, 1, 2, 3, 4, 5] and deviations == 0


@pytest.mark.parametrize(
    ("call", "places", "deviations"),
    [
        ("te a b a b vae", [0, 1, 2, 3, 4, 7], 1),  # fewer steps
        ("te a b a b a b a b vae", [0, 1, 2, 3, 4, 5, 6, 5, 6, 7], 1),  # more steps
        ("te b a b a b vae", [0, 2, 3, 4, 5, 6, 7], 1),  # a component skipped
        ("te a b a b vae a b vae", [0, 1, 2, 3, 4, 7, 5, 6, 7], 2),  # an extra decode
        ("te a a b a b vae", [0, 1, 1, 2, 3, 4, 7], 1),  # a entered twice: one use
        ("te a x b a b a b vae", [0, 1, None, 2, 3, 4, 5, 6, 7], 1),  # an unknown unit
        ("te a a a a vae", [0, 1, 1, 1, 1, 7], 1),  # b is conditional
        ("vae te a b", [7, 0, 1, 2], 2),
    ],
)
def test_the_place_is_found_again(call, places, deviations):
    assert follow("te a b a b a b vae", call) == (places, deviations)


def test_a_block_that_is_repeated_within_a_round_stays_where_it_is():
    trace = "te " + "a b c " * 3 + "vae"
    call = "te a b c a b b b c a b c vae"
    assert follow(trace, call) == ([0, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9, 10], 0)


def test_of_two_places_as_near_the_one_ahead_is_taken():
    follower = Follower(["b", "x", "y", "z", "b"])
    follower.at = 1
    assert follower.enter("b") == 4


def test_the_use_that_runs_is_the_same_however_often_it_is_entered():
    """As it is recorded: a vae that encodes and then quantises has one use, not two."""
    follower = Follower(["a", "b", "a"])
    assert [follower.enter(name) for name in "aabbaa"] == [0, 0, 1, 1, 2, 2]
    assert follower.deviations == 0


def test_an_unknown_unit_does_not_move_the_place():
    follower = Follower(["a"])
    assert follower.enter("x") is None and follower.at == -1
    assert follower.enter("a") == follower.at == 0


@given(st.lists(few_names, max_size=30), st.lists(st.sampled_from("abcx"), max_size=30))
def test_the_place_is_the_nearest_use_of_what_was_entered(trace, call):
    follower = Follower(trace)
    for name in call:
        at, to = follower.at, follower.at + 1
        if at >= 0 and trace[at] == name:
            assert follower.enter(name) == at
            continue
        places = [index for index, other in enumerate(trace) if other == name]
        nearest = min(places, key=lambda place: (abs(place - to), -place), default=None)
        assert follower.enter(name) == nearest
        assert nearest is None or follower.at == nearest


@given(clean_patterns(), st.data())
def test_after_any_deviation_only_the_end_of_a_round_can_surprise(pattern, data):
    """Where every leaf is another unit, the follower is at the right leaf from the first entry
    on, and deviates only after the last leaf of a loop: within a round it is in step."""
    trace, leaves = pattern.trace, pattern.leaves
    follower = Follower(trace)
    for name in data.draw(st.lists(st.sampled_from([*pattern.names, "unknown"]), max_size=10)):
        follower.enter(name)
    start = data.draw(st.integers(0, len(trace) - 1))
    ends = _last_leaves(pattern)
    for index in range(start, len(trace)):
        before = follower.deviations
        place = follower.enter(trace[index])
        assert place is not None and leaves[place] == leaves[index]
        if index > start and follower.deviations > before:
            assert leaves[index - 1] in ends


@given(st.integers(1, 6), st.integers(2, 9), st.data())
def test_after_any_deviation_the_end_of_the_loop_is_met_in_step(size, rounds, data):
    """One loop: a round that the follower has no room for costs one deviation, leaving early
    one; and from the first use after the loop on, the place is the true one."""
    trace = ["te", *blocks(size) * rounds, "vae", "end"]
    follower = Follower(trace)
    for name in data.draw(st.lists(st.sampled_from(trace), max_size=10)):
        follower.enter(name)
    start = data.draw(st.integers(0, len(trace) - 1))
    follower.deviations = 0
    for index in range(start, len(trace)):
        place = follower.enter(trace[index])
        assert place is not None
        if index in (0, len(trace) - 2, len(trace) - 1):
            assert place == index
        else:
            assert (place - index) % size == 0
    rounds_begun = sum(name == "block0" for name in trace[start + 1 :])
    assert follower.deviations <= 1 + rounds_begun + 1


def _last_leaves(pattern: Pattern) -> set[int]:
    """The leaves that end a loop's body."""
    ends: set[int] = set()

    def walk(items: tuple, leaf: int) -> int:
        for item in items:
            leaf = walk(item.body, leaf) if isinstance(item, Loop) else leaf + 1
            if isinstance(item, Loop):
                ends.add(leaf - 1)
        return leaf

    walk(pattern.items, 0)
    return ends


def test_the_package_loads_without_torch():
    code = "import sys, offload_engine.sequence.pattern; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
