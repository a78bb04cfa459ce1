"""Parameters of every method, mutated: through the command line's own parsing, and where accepted through a model.

Every one ends in an answer or in a line that says what is wrong.
"""

from __future__ import annotations

import dataclasses

import fuzzing
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruneval import methods
from pruneval.harness import budgets, cli, run
from pruneval.harness.errors import UserError
from pruneval.harness.session import pruned
from pruneval.harness.subjects import PARAMS, subject
from pruneval.methods import MethodError

NUMBERS = ("-1", "0", "1", "2", "3", "7", "1000000", "0.5", "1e-300", "1e308", "1e309", "nan", "inf", "-0.0", "9" * 60)
LISTS = ("1,2,3", "3,2,1", "0.5,0.5", "1,,2", "1:0.5,2:0.1", "[1, 2]", "0.1 0.2", ",", "999999")
WORDS = ("true", "no", "last", "mean", "original", "compact", "cls", "all", "none", ".", "/", "nowhere.json")


CHOICES = (
    "original", "compact", "keep", "outliers", "drop", "code", "paper", "last", "mean_text", "image", "prompt", "post",
    "pre", "one", "two", "about", "exact", "none", "auto", "mean", "max", "2", "2,3", "1,3",
)  # fmt: skip
TAME = {
    "int": st.integers(0, 6).map(str),
    "float": st.floats(0.001, 1.0).map(str) | st.floats(0, 100).map(str),
    "bool": st.sampled_from(("true", "no")),
}
"""Values that a parameter of a type may well have; texts have a choice or a list of layers."""
WILD = st.sampled_from([*NUMBERS, *LISTS, *WORDS]) | fuzzing.odd_text | st.floats().map(str)


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """A command with one or two parameters, half of the time with values of the right type."""
    name = draw(st.sampled_from(methods.names()))
    types = {item.name: str(item.type) for item in dataclasses.fields(methods.method_class(name))}
    known = st.sampled_from(list(types)) if types else st.just("keep")
    keys = draw(st.lists(known, min_size=1, max_size=2, unique=True))
    if draw(st.integers(0, 9)) == 7:
        keys.append(draw(fuzzing.odd_text))
    pairs = [f"{one}={what}" for one, what in PARAMS.get(name, ()) if one not in keys]
    wild = draw(st.booleans())
    for key in keys:
        tame = TAME.get(types.get(key, ""), st.sampled_from(CHOICES))
        pairs.append(f"{key}={draw(WILD if wild else tame)}")
    return ["eval", "--method", name, *(part for pair in pairs for part in ("--set", pair))]


@fuzzing.examples(60, 400)
@given(commands())
def test_mutated_parameters_end_in_an_answer_or_a_line(command):
    tiny = subject("llava")
    model = tiny.model("sdpa")
    with fuzzing.ending():
        try:
            args = cli.parser("eval").parse_args(command)
            chosen = budgets.choose(args.method, args.preset, budgets.parameters(args.set), None, "")
            method = run.build_method(args.method, chosen)
            assert methods.build(method.card.name, method.params).params == method.params, "must be replayable"
            with torch.inference_mode(), pruned(model, method, adapter=tiny.adapter(model)) as session:
                session.sample_keys = ["0"]
                out = model.generate(**tiny.samples[0], max_new_tokens=2, do_sample=False)
            budget = session.trace.budget(0)
            assert out.shape[1] == tiny.samples[0]["input_ids"].shape[1] + 2
            assert 0 <= budget.final <= budget.visual and 0 <= budget.avg_in <= budget.visual
        except (UserError, MethodError) as error:
            fuzzing.one_line(error)
