"""The planner: what it promises, as stories. Its quality is in test_plan_quality.py."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.instances import GIB, Instance, flux
from offload_engine.errors import OffloadError
from offload_engine.plan import Plan, PlanError, Step, Use, build_plan

from .test_plan_referee import replay


def plan_of(instance: Instance, **options) -> Plan:
    return build_plan(**instance.arguments, **options)


def test_planning_loads_no_torch():
    code = "import sys, offload_engine.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_next_component_comes_while_this_one_runs():
    nbytes = {"encoder": 4, "denoiser": 6}
    uses = [Use(("encoder",), 10.0), Use(("denoiser",), 5.0)]
    plan = build_plan(nbytes, uses, budget_nbytes=10, bandwidth=1.0)
    assert plan.steps == (
        Step((), ("encoder", "denoiser")),
        Step(("encoder",), ()),
    )
    assert (plan.seconds, plan.stall_seconds, plan.bound_seconds) == (19.0, 4.0, pytest.approx(19))
    assert (plan.fetched_nbytes, plan.peak_nbytes) == (10, 10)


def test_the_first_blocks_come_during_the_encoder_if_the_whole_does_not_fit():
    nbytes = {"encoder": 6, "block.0": 3, "block.1": 3, "block.2": 3}
    uses = [Use(("encoder",), 9.0)] + [Use((f"block.{i}",), 3.0) for i in range(3)]
    plan = build_plan(nbytes, uses, budget_nbytes=9, bandwidth=1.0)
    assert plan.steps[0].fetch == ("encoder", "block.0")
    assert plan.seconds == 6 + 9 + 3 + 3 + 3


def test_a_loop_too_big_for_the_budget_keeps_what_it_can():
    nbytes = {f"block.{i}": 10 for i in range(10)}
    uses = [Use((name,), 1.0) for name in nbytes] * 20
    plan = build_plan(nbytes, uses, budget_nbytes=70, bandwidth=10.0)
    assert plan.seconds == pytest.approx(plan.bound_seconds)
    assert plan.fetched_nbytes < 20 * 100 * 0.6  # all of it 20 times would be 2,000


def test_what_is_already_there_is_not_fetched():
    nbytes = {"a": 5, "b": 5}
    uses = [Use(("a",), 1.0), Use(("b",), 1.0)]
    plan = build_plan(nbytes, uses, budget_nbytes=10, bandwidth=1.0, resident={"b"})
    assert [step.fetch for step in plan.steps] == [("a",), ()]
    assert plan.resident == ("b",)


def test_residents_over_the_budget_are_released_first():
    nbytes = {"a": 8, "b": 8, "old": 50}
    uses = [Use(("a",), 1.0), Use(("b",), 1.0)]
    instance = Instance(nbytes, uses, 10, 1.0, ("old", "b"))
    plan = plan_of(instance)
    assert set(plan.steps[0].release) == {"old", "b"}
    assert replay(plan, instance).peak <= 10


def test_a_workspace_takes_room_only_while_its_use_runs():
    nbytes = {"denoiser": 6, "decoder": 1}
    uses = [Use(("denoiser",), 3.0), Use(("decoder",), 1.0, 9)]
    plan = build_plan(nbytes, uses, budget_nbytes=10, bandwidth=1.0)
    assert plan.steps == (Step((), ("denoiser", "decoder")), Step(("denoiser",), ()))
    assert plan.peak_nbytes == 10


def test_every_segment_leaves_after_its_last_use():
    nbytes = {"a": 1, "b": 1}
    uses = [Use(("a",), 1.0), Use(("b",), 1.0)]
    plan = build_plan(nbytes, uses, budget_nbytes=9, bandwidth=1.0)
    assert plan.steps[1].release == ("a",)
    instance = flux(budget=14 * GIB, bandwidth=12e9, step_seconds=0.6, steps=2)
    plan, last = plan_of(instance), {}
    for position, use in enumerate(instance.uses):
        last.update(dict.fromkeys(use.segments, position))
    for name, position in last.items():
        assert position + 1 == len(plan.steps) or name in plan.steps[position + 1].release


def test_no_uses_make_an_empty_plan():
    for cyclic in (False, True):
        plan = build_plan({"a": 1}, [], budget_nbytes=1, bandwidth=1.0, cyclic=cyclic)
        assert plan.steps == () and plan.seconds == plan.bound_seconds == 0
        assert plan.timeline == () and "0 uses" in plan.explain()


def test_a_use_may_name_no_segment_or_one_twice():
    uses = [Use((), 2.0, 5), Use(("a", "a"), 1.0)]
    plan = build_plan({"a": 4}, uses, budget_nbytes=9, bandwidth=4.0)
    assert plan.seconds == 3.0 and plan.steps[0].fetch == ("a",)


def test_a_cycle_that_fits_moves_nothing():
    instance = flux(budget=40 * GIB, bandwidth=23.9e9, step_seconds=0.6, steps=4)
    plan = plan_of(instance, cyclic=True)
    assert plan.fetched_nbytes == 0 and plan.stall_seconds == 0
    assert all(step == Step((), ()) for step in plan.steps)
    assert set(plan.resident) == set(instance.nbytes)


def test_a_cycle_fetches_for_the_next_request_before_it_begins():
    nbytes = {"encoder": 6, "denoiser": 8}
    uses = [Use(("encoder",), 4.0), Use(("denoiser",), 8.0, 2)]
    instance = Instance(nbytes, uses, 12, 2.0)
    plan = plan_of(instance, cyclic=True)
    assert plan.seconds == replay(plan, instance, cyclic=True).seconds == 12 + 7
    roomy = instance._replace(budget=14)
    plan = plan_of(roomy, cyclic=True)
    assert plan.seconds == replay(plan, roomy, cyclic=True).seconds < 19


def test_a_steady_cycle_counts_what_is_in_flight_when_it_begins():
    nbytes = {"a": 10, "b": 10, "c": 10}
    uses = [Use(("a",), 5.0), Use(("b",), 5.0), Use(("c",), 5.0)]
    instance = Instance(nbytes, uses, 20, 1.0)
    plan = plan_of(instance, cyclic=True)
    assert plan.seconds == pytest.approx(replay(plan, instance, cyclic=True, cycles=40).seconds)


def test_the_same_question_has_the_same_answer():
    instance = flux(budget=12 * GIB, bandwidth=25e9, step_seconds=0.24, steps=2)
    assert plan_of(instance) == plan_of(instance)


def test_a_plan_over_budget_says_how_much_it_needs():
    with pytest.raises(PlanError, match="needs 160 bytes") as error:
        build_plan({"a": 80, "b": 80}, [Use(("a", "b"), 1.0)], budget_nbytes=100, bandwidth=1.0)
    assert error.value.needed_nbytes == 160
    assert error.value.budget_nbytes == 100


def test_a_plan_over_budget_names_the_neediest_use():
    uses = [Use(("a",), 1.0), Use(("a",), 1.0, 50), Use(("b",), 1.0, 70)]
    for cyclic in (False, True):
        with pytest.raises(PlanError, match=r"use 2 \(b\)") as error:
            build_plan({"a": 60, "b": 60}, uses, budget_nbytes=99, bandwidth=1.0, cyclic=cyclic)
        assert (error.value.use_index, error.value.segments) == (2, ("b",))
        assert isinstance(error.value, ValueError)


def test_a_budget_that_just_suffices_suffices():
    nbytes = {"a": 0.1, "b": 0.2, "c": 0.7}
    uses = [Use(("a", "b", "c"), 1.0, 0.3), Use(("c", "b", "a"), 1.0, 0.3)]
    for budget in (0.1 + 0.2 + 0.7 + 0.3, 0.3 + 0.7 + 0.2 + 0.1):
        assert build_plan(nbytes, uses, budget_nbytes=budget, bandwidth=1.0).stall_seconds == 1.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"nbytes": {"a": 0}}, r"positive number of bytes, got \{'a': 0\}"),
        ({"nbytes": {"a": -1, "b": 2}}, r"got \{'a': -1\}"),
        ({"nbytes": {"a": math.nan}}, "positive number of bytes"),
        ({"nbytes": {"a": "12"}}, "positive number of bytes"),
        ({"uses": [Use(("a", "x"), 1.0)]}, r"unknown segments \(by use\): \{'x': 0\}"),
        ({"uses": [Use("a", 1.0)]}, r"give \('a',\)"),
        ({"uses": [Use(("a",), -1.0)]}, r"seconds of a use is zero or more.*\{0: -1.0\}"),
        ({"uses": [Use(("a",), math.inf)]}, "seconds of a use"),
        ({"uses": [Use(("a",), 1.0, -5)]}, r"workspace_nbytes of a use.*\{0: -5\}"),
        ({"uses": ["ab"]}, "give Use"),
        ({"bandwidth": 0}, "bandwidth=0"),
        ({"bandwidth": -2.5}, "bandwidth=-2.5"),
        ({"bandwidth": math.nan}, "bandwidth=nan"),
        ({"budget_nbytes": math.nan}, "budget_nbytes=nan"),
        ({"budget_nbytes": "8GiB"}, "budget_nbytes='8GiB'"),
        ({"resident": ["b", "zoo"]}, r"unknown residents \['b', 'zoo'\]"),
        ({"resident": "a"}, "resident is the text 'a'"),
    ],
)
def test_bad_input_is_named(change, match):
    good = {
        "nbytes": {"a": 1},
        "uses": [Use(("a",), 1.0)],
        "budget_nbytes": 9,
        "bandwidth": 1.0,
        "resident": (),
    }
    assert build_plan(**good)
    with pytest.raises(OffloadError, match=match):
        build_plan(**{**good, **change})


def test_the_timeline_adds_up():
    instance = flux(budget=12 * GIB, bandwidth=12e9, step_seconds=0.6, steps=2)
    for cyclic in (False, True):
        plan = plan_of(instance, cyclic=cyclic)
        spans = {"copy": [], "use": [], "stall": []}
        for span in plan.timeline:
            spans[span.kind].append(span)
        lasted = {k: sum(s.stop_seconds - s.start_seconds for s in v) for k, v in spans.items()}
        assert lasted["stall"] == pytest.approx(plan.stall_seconds)
        assert lasted["use"] + lasted["stall"] == pytest.approx(plan.seconds)
        assert lasted["copy"] == pytest.approx(plan.fetched_nbytes / plan.bandwidth)
        assert [span.position for span in spans["use"]] == list(range(len(plan.uses)))
        starts = [span.start_seconds for span in plan.timeline]
        assert starts == sorted(starts)


def test_held_bytes_peak_where_the_plan_says():
    plan = plan_of(flux(budget=16 * GIB, bandwidth=23.9e9, step_seconds=0.6, steps=2))
    workspaces = [use.workspace_nbytes for use in plan.uses]
    peak = max(
        held + workspace for held, workspace in zip(plan.held_nbytes, workspaces, strict=True)
    )
    assert plan.peak_nbytes == peak <= plan.budget_nbytes


def test_an_explanation_says_what_stays_what_streams_and_why_it_waits():
    instance = flux(budget=16 * GIB, bandwidth=23.9e9, step_seconds=0.6, steps=3)
    text = plan_of(instance).explain()
    for part in (
        "Plan for 174 uses in 16.0 GiB, link 23.9 GB/s",
        "bound",
        "transformer.transformer_blocks.#",
        "transformer.single_transformer_blocks.#",
        "the link is busy since the start",
        "use 1 (text_encoder_2) waits",
    ):
        assert part in text, text
    assert "Steady cycle of 174 uses" in plan_of(instance, cyclic=True).explain()


def test_numbered_components_have_rows_of_their_own_and_numbered_blocks_share_one():
    names = ["text_encoder_2", "text_encoder_3", "unet.down.0", "unet.down.11", "vae in stage 1"]
    uses = [Use((name,), 1.0) for name in names]
    plan = build_plan(dict.fromkeys(names, 4), uses, budget_nbytes=20, bandwidth=1.0)
    rows = plan.explain().splitlines()[5:9]
    stems = [row.split("  ")[0] for row in rows]
    assert stems == ["text_encoder_2", "text_encoder_3", "unet.down.#", "vae in stage 1"]


def test_an_explanation_tells_lack_of_room_from_lack_of_link():
    uses = [Use(("a",), 9.0), Use(("b",), 1.0)]
    text = build_plan({"a": 6, "b": 6}, uses, budget_nbytes=6, bandwidth=1.0).explain()
    assert "use 1 (b) waits 6.000 s for b: no room earlier" in text
    uses = [Use(("a",), 1.0), Use(("a",), 1.0), Use(("b", "c"), 1.0)]
    nbytes = {"a": 4, "b": 4, "c": 4}
    plan = build_plan(nbytes, uses, budget_nbytes=12, bandwidth=1.0, resident=("a",))
    assert "the link is busy since the start" in plan.explain()


def test_a_picture_shows_memory_and_both_lanes(tmp_path):
    pytest.importorskip("matplotlib")
    plan = plan_of(flux(budget=12 * GIB, bandwidth=52e9, step_seconds=0.24, steps=1))
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_a_picture_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plan = build_plan({"a": 1}, [Use(("a",), 1.0)], budget_nbytes=1, bandwidth=1.0)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plan.plot(tmp_path / "plan.png")


def test_the_worked_example_in_the_documentation_is_what_happens(capsys):
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    code = re.search(r"```python\n(from offload_engine.plan.*?)```", text, re.DOTALL)[1]
    printed = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    exec(compile(code, "planning.md", "exec"), {})
    assert capsys.readouterr().out == printed
