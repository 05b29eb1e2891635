"""The plan's text says all that the plan holds, and a slip in it is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from moecule.errors import PlanError
from moecule.plan import REST, Drop, Keep, Plan, Skip

# made beforehand: run-time checks draw at random, which strategies may not
keeps = st.sampled_from([Keep(), *(Keep(b, g) for b in range(1, 9) for g in (1, 32, 64, 128))])
fates = keeps | st.just(Drop())
ratios = st.lists(st.floats(0, 1), max_size=7).map(tuple)
# a Hub id, a path, or what YAML would take for a number or a truth value if it were not quoted
names = st.sampled_from(["org/model", "0123456789012345", "12e4567890123456", "no", "", "a: b # c"])
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names
options = st.dictionaries(st.sampled_from(["damp", "bits", "clip"]), values, max_size=3)
# the plan is built of these in the test
fields = st.fixed_dictionaries(
    {
        "model": names,
        "digest": names,
        "layers": st.dictionaries(
            st.integers(0, 99), st.lists(fates, min_size=1, max_size=20), min_size=1, max_size=3
        ),
        "rest": st.fixed_dictionaries(dict.fromkeys(REST, keeps)),
        "encode": options,
        "skip": st.none()
        | st.tuples(st.dictionaries(st.integers(0, 99), ratios, max_size=3), st.floats(0, 1)),
        "top_k": st.none() | st.integers(1, 99),
        "made_by": options,
    }
)


def build(drawn: dict[str, Any]) -> Plan:
    """The plan of these fields."""
    layers = {i: tuple(fates) for i, fates in drawn["layers"].items()}
    skip = None if drawn["skip"] is None else Skip(*drawn["skip"])
    return Plan(**{**drawn, "layers": layers, "skip": skip})


PLAN = Plan(
    model="org/model",
    digest="0123456789abcdef",
    layers={
        0: (Keep(3, 64), Drop(), Keep(3, 64), Keep(3, 64), Keep()),
        3: (Keep(1, 64), Keep(2, 32), Keep(1, 64), Drop(), Drop()),
    },
    rest=dict.fromkeys(REST, Keep()) | {"attention": Keep(4, 64)},
    encode={"method": "gptq", "damp": 0.01},
    skip=Skip({0: (0.25,)}, 0.02),
    made_by={"recipe": "mc"},
)
TEXT = """\
model: org/model
digest: 0123456789abcdef
made_by:
  recipe: mc
encode:
  method: gptq
  damp: 0.01
rest:
  attention: keep 4bit g64
  shared: keep
  dense: keep
  router: keep
skip:
  protect: 0.02
  thresholds:
    0: '0.25'
layers:
  0:
    drop: '1'
    keep: '4'
    keep 3bit g64: 0 2-3
  3:
    drop: 3-4
    keep 1bit g64: 0 2
    keep 2bit g32: '1'
"""


@given(fields)
def test_a_plan_reads_back_as_it_was_written(drawn):
    plan = build(drawn)
    assert Plan.loads(plan.dumps()) == plan


@given(fields)
def test_the_text_of_equal_plans_is_equal(drawn):
    plan = build(drawn)
    backwards = replace(plan, layers=dict(reversed(plan.layers.items())))
    assert backwards.dumps() == plan.dumps() == Plan.loads(plan.dumps()).dumps()
    assert backwards.code_digest == plan.code_digest


@given(fields, fates, st.randoms(use_true_random=False))
def test_another_fate_is_another_digest(drawn, other, lot):
    plan = build(drawn)
    layer = lot.choice(sorted(plan.layers))
    changed = list(plan.layers[layer])
    e = lot.randrange(len(changed))
    assume(changed[e] != other)
    changed[e] = other
    layers = {**plan.layers, layer: tuple(changed)}
    assert replace(plan, layers=layers).code_digest != plan.code_digest


def test_the_text_is_the_one_that_people_have_edited_so_far():
    assert PLAN.dumps() == TEXT
    assert Plan.loads(TEXT) == PLAN


def test_a_dropped_expert_counts_as_no_bits():
    assert PLAN.nominal_bits == (3 + 0 + 3 + 3 + 16 + 1 + 2 + 1 + 0 + 0) / 10


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    drop: '1'\n", "", "layer 0.*experts 1 have no fate"),
        ("drop: 3-4", "drop: 4", "layer 3.*experts 3 have no fate"),
        ("0 2-3", "0-3", "layer 0.*expert 1 has two fates"),
        ("keep 2bit g32: '1'", "keep 2bit g32: 1 1", "layer 3.*expert 1 has two fates"),
        ("drop: '1'", "drop: one", "layer 0.*'one'"),
        ("drop: '1'", "drop: -1", "layer 0.*'-1'"),
        ("drop: '1'", "lose: '1'", "layer 0.*'lose'"),
        ("keep 3bit g64: 0", "keep 9bit g64: 0", "layer 0.*'keep 9bit g64'"),
        ("keep 3bit g64: 0", "keep 0bit g64: 0", "layer 0.*'keep 0bit g64'"),
        ("keep 3bit g64: 0", "keep 3bit g0: 0", "layer 0.*'keep 3bit g0'"),
        ("keep 3bit g64: 0", "keep 3 bits: 0", "layer 0.*'keep 3 bits'"),
        ("  3:\n", "  three:\n", "'three'"),
        ("  3:\n", "  -3:\n", "-3"),
        ("attention: keep 4bit g64", "attention: keep 4bit", "rest, attention.*'keep 4bit'"),
        ("attention: keep 4bit g64", "attention: drop", "rest, only experts"),
        ("  router: keep\n", "", "rest.*router"),
        ("  router: keep\n", "  router: keep\n  head: keep\n", "rest.*head"),
        ("0: '0.25'", "0: a quarter", "skip"),
        ("protect: 0.02", "protect: little", "skip"),
        ("  protect: 0.02\n", "", "skip"),
        ("digest: 0123456789abcdef\n", "", "digest"),
        ("digest:", "comment: none\ndigest:", "comment"),
        ("  0:\n    drop", "  0: [\n    drop", "not YAML"),
        ("made_by:\n  recipe: mc", "made_by: mc", "made_by"),
        ("encode:\n  method: gptq\n  damp: 0.01", "encode: gptq", "encode"),
        ("  3:\n", "  0:\n", "0' stands twice"),
    ],
)
def test_a_slip_in_the_text_is_named(old, new, said):
    assert TEXT.count(old) == 1
    with pytest.raises(PlanError, match=said) as raised:
        Plan.loads(TEXT.replace(old, new))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "- a list", "just words", "layers: {}", "\0", "a: b: c"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError, match=r"^plan: "):
        Plan.loads(text)


@pytest.mark.parametrize("layers", [{}, None, [], {0: {}}, {0: None}, {0: {"keep": ""}}])
def test_a_plan_without_fates_is_refused(layers):
    doc = yaml.safe_load(TEXT) | {"layers": layers}
    with pytest.raises(PlanError, match=r"layer|fate"):
        Plan.loads(yaml.safe_dump(doc))
