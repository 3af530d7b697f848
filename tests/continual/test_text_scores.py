"""Scores of written texts, by hand and against other libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from continual_parts import causal_lm, texts, tokenizer  # noqa: E402

from hatcl.continual import causal_task, learn_sequence  # noqa: E402
from hatcl.continual.text_scores import TEXT_SCORES, bleu, rouge_l, same_answer, sari, similarity  # noqa: E402
from hatcl.data.benchmarks import BENCHMARKS, read_benchmark  # noqa: E402
from hatcl.data.texts import TextData, Turn  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = Path(os.environ.get("HATCL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
WORDS = st.lists(st.sampled_from("a b c d".split()), max_size=8).map(" ".join)


@given(source=WORDS, a=WORDS, b=WORDS)
def test_laws(source, a, b):
    for name, score in TEXT_SCORES.items():
        assert 0 <= score(source, a, b) <= 1, name
        # with SARI a word that the input repeats counts as deleted although it is kept once
        if name == "bleu_4" and len(a.split()) < 4:  # it has no n-gram of 4 words
            assert score(source, a, b) == 0
        elif a and (name != "sari" or len(set(source.split())) == len(source.split())):
            assert score(source, a, a) == pytest.approx(1), name


def test_sari_by_its_authors_example():
    """The example of the paper's code, as Hugging Face's `evaluate` documents it with the corrected recall."""
    references = [
        "About 95 species are currently known .", "About 95 species are now accepted .", "95 species are now accepted ."
    ]  # fmt: skip
    found = sari("About 95 species are currently accepted .", "About 95 you now get in .", references)
    assert 100 * found == pytest.approx(26.953601953601954, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(a=WORDS, b=WORDS)
def test_rouge_l_is_torchmetrics(a, b):
    rouge = pytest.importorskip("torchmetrics.functional.text.rouge")
    expected = float(rouge.rouge_score(a, b, rouge_keys="rougeL")["rougeL_fmeasure"]) if a and b else 0.0
    assert rouge_l(a, b) == pytest.approx(expected, abs=1e-6)  # theirs is float32


@settings(max_examples=40, deadline=None)
@given(a=WORDS, b=WORDS, orders=st.integers(1, 4))
def test_bleu_is_torchmetrics(a, b, orders):
    theirs = pytest.importorskip("torchmetrics.functional.text.bleu")
    expected = float(theirs.bleu_score([a], [[b]], n_gram=orders)) if a and b else 0.0
    assert bleu(a, b, orders) == pytest.approx(expected, abs=1e-6)  # theirs is float32


def test_bleu_of_the_reasons():
    """As TRACE scores ScienceQA: the answer's letter is another measure."""
    expected = "Answer: B\nBecause iron is. magnetic"
    assert bleu("Answer: A\nBecause iron is magnetic.", expected, 1) == 1
    assert bleu("Answer: B\niron is magnetic", expected, 1) == 0  # without a reason
    # two of three words, and one word short of four
    assert TEXT_SCORES["bleu_1"]("", "a b x", "a b c d") == pytest.approx(2 / 3 * 2.718281828459045 ** (1 - 4 / 3))


def test_by_hand():
    assert rouge_l("the cat sat", "The cat, it sat down") == pytest.approx(2 * 3 / 8)
    assert rouge_l("", "a") == rouge_l("über", "uber") == 0
    assert same_answer("Answer: B\nBecause so", "Answer: B\nBecause not") and not same_answer("Answer: A", "Answer: B")
    assert same_answer("B.", "Answer: B") and not same_answer("", "")
    assert similarity("x = <NUM_LIT:3>", "x = 3") == 1 and similarity("", "") == 1
    assert similarity("abcd", "abxd") == 0.75


def test_a_tasks_score_is_the_mean_of_its_measure(monkeypatch):
    data = texts(0, count=4)
    asked = []

    def score(source, given, expected):
        asked.append((source, expected))
        return 0.25

    monkeypatch.setitem(TEXT_SCORES, "rouge_l", score)
    task = causal_task("a", data, tokenizer(), max_output=2, measure="rouge_l")
    assert task.score(causal_lm().eval()) == 0.25
    assert sorted(asked) == sorted(data.test)
    with pytest.raises(ConfigError, match="measure: got 'rouge', expected one of match, .*did you mean 'rouge_l'"):
        causal_task("a", data, tokenizer(), measure="rouge")
    dialogue = TextData(data.train, [], data.test, [Turn("d", "1", "s")] * len(data.test))
    with pytest.raises(ConfigError, match="measure: got 'sari' for dialogues, whose joint goal accuracy needs 'match'"):
        causal_task("a", dialogue, tokenizer(), measure="sari")


def test_a_benchmark_end_to_end(tmp_path):
    """The five tasks at hand, in the published order, each scored by its measure."""
    folder = DATA / "text_longseq"
    if not folder.exists():
        pytest.skip("no text_longseq under HATCL_DATA")
    benchmark = BENCHMARKS["long_sequence"]
    mine = ["amazon", "agnews", "sst-2", "qqp", "rte"]
    found = read_benchmark("long_sequence", folder, order=1, only=mine)
    tasks = [
        causal_task(n, d.cut(8, 4, 4), tokenizer(), max_input=20, max_output=3, measure=benchmark.measure(n))
        for n, d in found.items()
    ]
    model = peft.get_peft_model(causal_lm(), peft.LoraConfig(r=2, target_modules=["c_attn"]))
    result = learn_sequence(model, tasks, "olora", {"epochs": 1, "batch_size": 8, "lr": 1e-2}, folder=tmp_path / "run")
    assert result.tasks == ["qqp", "rte", "amazon", "sst-2", "agnews"]
    assert {"average_accuracy", "backward_transfer", "forward_transfer"} <= set(result.measures)
