import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.errors import SequenceError
from offload_engine.sequence import Cursor, Sequence, declared, learn, parse


def test_text_and_list_read_the_same():
    assert parse("a->b+c->d") == parse(["a", "b+c", "d"]) == parse(" a -> b + c -> d ")
    assert str(parse("a->b+c->d")) == "a->b+c->d"


@pytest.mark.parametrize(
    ("text", "position"), [("a->", 3), ("->a", 0), ("a->b-c", 3), ("a->b+", 5), ("", 0)]
)
def test_an_error_points_at_the_place(text, position):
    with pytest.raises(SequenceError, match="seq cannot be read") as error:
        parse(text)
    assert error.value.position == position
    assert " " * position + "^" in str(error.value)


@pytest.mark.parametrize("bad", [[], 3, ["a", 3], {"a": 1}])
def test_what_is_no_sequence_at_all_is_refused_with_a_hint(bad):
    with pytest.raises(SequenceError, match=r"unet->vae"):
        parse(bad)


def test_unknown_names_are_all_named_with_near_matches():
    with pytest.raises(SequenceError, match="did you mean 'unet'") as error:
        parse("unett->foo->vae").check_names(["unet", "vae"])
    assert error.value.names == ("unett", "foo")


def test_a_declared_sequence_is_read_as_diffusers_does():
    known = ["text_encoder", "unet", "movq"]
    text = "text_encoder->image_encoder-unet->unet->movq->movq"
    assert declared(text, known) == parse("text_encoder->unet->movq")


@pytest.mark.parametrize(
    ("trace", "sequence"),
    [
        ("te unet vae", "te->unet->vae"),
        ("te te2 te te2 transformer vae", "te+te2->transformer->vae"),
        ("te " + "a b " * 20 + "vae", "te->a+b->vae"),
        ("te " + "unet vae " * 20, "te->unet+vae"),
        ("te vae unet vae", "te->vae->unet->vae"),
        ("te " + "net unet vae " * 5 + "vae", "te->net+unet+vae->vae"),
        ("a b a b a x", "a+b->x"),
        ("", ""),
    ],
)
def test_a_trace_is_learned_as_stages(trace, sequence):
    learned = learn(trace.split())
    assert learned == (parse(sequence) if sequence else Sequence(()))


ENCODERS = "te te2 te3 te te2 te3 unet vae"


@pytest.mark.parametrize(
    ("unet_nbytes", "sequence"),
    [(30, "te+te2+te3->unet->vae"), (29, "te->te2->te3->te->te2->te3->unet->vae")],
)
def test_encoders_that_run_twice_stay_together_only_in_room_that_is_needed_anyway(
    unet_nbytes, sequence
):
    nbytes = {"te": 10, "te2": 10, "te3": 10, "unet": unet_nbytes, "vae": 1}
    learned = learn(ENCODERS.split(), nbytes)
    assert str(learned) == sequence
    for cursor in (Cursor(learned, nbytes), Cursor(parse("te->te2->te3->unet->vae"), nbytes)):
        most = max(sum(nbytes[n] for n in cursor.enter(name)) for name in ENCODERS.split())
        assert most <= 30


def fetches(cursor: Cursor, trace: str) -> tuple[list[str], set[str]]:
    """What an engine that obeys ``cursor`` fetches, and what is resident at the end."""
    resident: set[str] = set()
    fetched = []
    for name in trace.split():
        resident &= cursor.enter(name)
        if name not in resident:
            fetched.append(name)
            resident.add(name)
    return fetched, resident


def test_an_unforeseen_pair_costs_two_extra_fetches_once():
    trace = "te " + "a b " * 20 + "vae"
    fetched, resident = fetches(Cursor(parse("te->a->b->vae")), trace)
    assert fetched == ["te", "a", "b", "a", "b", "vae"]
    assert resident == {"vae"}
    fetched, resident = fetches(Cursor(learn(trace.split())), trace)
    assert fetched == ["te", "a", "b", "vae"]
    assert resident == {"vae"}


def test_img2img_keeps_one_at_a_time_whatever_was_declared():
    cursor = Cursor(parse("te->image_encoder->unet->vae"))
    for name in ("te", "vae", "unet", "vae"):
        assert cursor.enter(name) == {name}


def test_solo_keeps_one_at_a_time_even_in_a_loop():
    cursor = Cursor(parse("a+b"), solo=True)
    assert [cursor.enter(name) for name in "abab"] == [{n} for n in "abab"]


def test_a_round_is_told_from_the_next():
    cursor = Cursor(parse("te->unet->vae"))
    for name in ("te", "unet", "vae"):
        assert not cursor.wraps(name)
        cursor.enter(name)
    assert cursor.wraps("te") and not cursor.wraps("unet")
    loop = Cursor(parse("a+b"))
    loop.enter("b")
    assert not loop.wraps("a")


names = st.sampled_from("abcde")


@given(st.lists(names, max_size=60), st.lists(names, max_size=60))
def test_any_call_under_any_sequence_keeps_what_runs_and_a_known_loop_is_free(before, trace):
    """Whatever was learned and however the call deviates, the running component is kept; and a
    switch that was seen before in an unbroken loop costs nothing."""
    cursor = Cursor(learn(before))
    for name in trace:
        assert name in cursor.enter(name)
    switches = [b for a, b in zip(["", *trace], trace, strict=False) if a != b]
    assert cursor.trace == switches


@given(st.integers(2, 30), st.integers(2, 30))
def test_the_number_of_steps_does_not_change_what_is_learned(few, many):
    def trace(steps: int) -> list[str]:
        return ["te", *(["a", "b"] * steps), "vae"]

    assert learn(trace(few)) == learn(trace(many))


def test_sequence_and_plan_load_without_torch():
    code = "import sys, offload_engine.sequence; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
