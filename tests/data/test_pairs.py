"""Records as pairs of an input and an output, in every way in which people write them down."""

from __future__ import annotations

import copy
import pickle

import pytest
from data_parts import write_table

from hatcl.data.pairs import Chat, Sentences, pairs_of, strata_of, text_form
from hatcl.data.records import PAIRED, Records
from hatcl.data.texts import read_texts
from hatcl.errors import ConfigError

FIRST, SECOND, LAST = ("user", "Say A"), ("assistant", "A"), ("user", "And B?")


def of(*rows):
    records = Records("a.jsonl", {"": list(rows)})
    return pairs_of(records, "")


@pytest.mark.parametrize("columns", PAIRED)
def test_pairs_of_sentences(columns):
    ((said, label),) = of({columns[0]: "It rains.", columns[1]: "It is wet.", "label": 1, "idx": 7})
    assert isinstance(said, Sentences) and said.parts == ("It rains.", "It is wet.") and label == "1"


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"text": "a", "label": "b"}, ("a", "b")),
        ({"sentence": "a", "label": 2, "idx": 3}, ("a", "2")),
        ({"input": "a", "output": "b"}, ("a", "b")),
        ({"prompt": "a", "answer": "b"}, ("a", "b")),
        ({"prompt": "a", "completion": "b"}, ("a", "b")),
        ({"question": "a", "answer": "b"}, ("a", "b")),
        ({"instruction": "do", "input": "a", "output": "b"}, ("do\na", "b")),
        ({"instruction": "do", "input": "", "output": "b"}, ("do", "b")),
        ({"instruction": "do", "output": "b"}, ("do", "b")),
        ({"instruction": "", "input": "a", "output": "b"}, ("a", "b")),
        ({"Text": "a", "Label": "b"}, ("a", "b")),
    ],
)
def test_records_as_people_have_them(row, pair):
    assert of(row) == [pair]


@pytest.mark.parametrize(
    "said",
    [
        {"messages": [{"role": r, "content": c} for r, c in (FIRST, SECOND, LAST, ("assistant", "B"))]},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[r], "value": c}
                for r, c in (FIRST, SECOND, LAST, ("assistant", "B"))
            ]
        },
    ],
)
def test_each_answer_of_a_conversation_is_an_output(said):
    one, two = of(said)
    assert (one, two) == (("user: Say A", "A"), ("user: Say A\nassistant: A\nuser: And B?", "B"))
    assert one[0].turns == (FIRST,) and two[0].turns == (FIRST, SECOND, LAST)
    for again in (copy.deepcopy(two[0]), pickle.loads(pickle.dumps(two[0]))):
        assert isinstance(again, Chat) and again.turns == two[0].turns and again == two[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "has the roles user; expected an assistant's answer"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "has the roles assistant; expected an assistant's answer",
        ),
        ({"messages": "hello"}, "'hello' is not a message; expected an object with role and content"),
        ({"messages": [{"role": "user"}]}, "is not a message; expected an object with role and content, both texts"),
        ({"input": ["a"], "output": "b"}, "in the column 'input' is a list, expected a text or a number"),
        ({"text": "a"}, "has the columns text, which are not texts with outputs; expected text and label"),
        ({"label": "a", "input": "b"}, "has the columns label, input, which are not texts"),
    ],
)
def test_records_that_are_no_pairs(row, words):
    with pytest.raises(ConfigError, match=words):
        of(row)


def test_what_is_no_text_has_no_form():
    assert text_form(Records("a", {"": [{"path": "a.png", "label": 1}]})) is None
    labelled, written = ({"text": "a", "label": "b"}, {"input": "a", "output": "b"})
    assert [strata_of(Records("a", {"": [row]})) for row in (labelled, written)] == ["label", None]


def test_conversations_are_cut_as_a_whole(tmp_path):
    """Two answers of one conversation are never in different parts."""
    rows = [
        {"messages": [{"role": r, "content": f"{c} {i}"} for r, c in (FIRST, SECOND, LAST, SECOND)]} for i in range(20)
    ]
    data = read_texts(write_table(tmp_path / "a.jsonl", rows))
    assert data.plain() == data and isinstance(data.plain().train[0][0], Chat)
    parts = [{x.turns[0] for x, _ in part} for part in (data.train, data.validation, data.test)]
    assert [len(data.train), len(data.validation), len(data.test)] == [32, 4, 4]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 20
