"""Tasks of writing: labels, scoring by greedy generation, joint goal accuracy, end to end on T5 and a causal model."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from continual_parts import texts, tokenizer, vocabulary  # noqa: E402

from hatcl.continual import TextData, Turn, causal_task, learn_sequence, read_texts, seq2seq_task  # noqa: E402
from hatcl.continual.generation import check_some_label  # noqa: E402
from hatcl.continual.text_scores import matches  # noqa: E402
from hatcl.data.pairs import Chat  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = Path(os.environ.get("HATCL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
FORMS = {"seq2seq": seq2seq_task, "causal": causal_task}


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=vocabulary(), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary(), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "seq2seq": (t5, ["q", "v", "o", "wi", "wo", "lm_head"]),
    "causal": (gpt2, ["c_attn", "c_proj", "c_fc", "lm_head"]),
}


def adapted(form):
    model, targets = MODELS[form]
    base = model()
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=targets))


def ids(*names):
    return tokenizer().convert_tokens_to_ids(list(names))


def test_labels_of_an_encoder_decoder():
    batch = seq2seq_task("t", texts(0), tokenizer(), max_input=2).collate([("w1 w2 w3", "red green"), ("w4", "red")])
    assert batch["input_ids"].tolist() == [ids("w2", "w3"), ids("w4", "<pad>")]  # the beginning is lost
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [ids("red", "green", "</s>"), [*ids("red", "</s>"), -100]]


def test_labels_of_a_causal_model():
    task = causal_task("t", texts(0), tokenizer(), max_input=2, max_output=2)
    batch = task.collate([("w1 w2 w3", "red green blue"), ("w4", "red")])
    assert batch["input_ids"].tolist() == [ids("w2", "w3", "red", "</s>"), ids("w4", "red", "</s>", "<pad>")]
    assert batch["labels"].tolist() == [[-100, -100, *ids("red", "</s>")], [-100, *ids("red", "</s>"), -100]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 1, 0]]


@pytest.mark.parametrize("form", sorted(FORMS))
def test_end_to_end_with_joint_goal_accuracy(form, tmp_path):
    """Two dialogues' slots, by heart: the loss falls and the score finds what was learned."""
    rows = [(f"w{i} ask :", ["red", "green", "blue", "warm"][i % 4]) for i in range(8)]
    turns = [Turn("d", str(i // 2), "s") for i in range(8)]
    data = TextData(rows, [], rows, turns)
    tasks = [FORMS[form]("a", data, tokenizer(), max_output=4)]
    other = TextData([(f"w{i + 9} ask :", "cold") for i in range(8)], [], [("w9 ask :", "cold")])
    tasks.append(FORMS[form]("b", other, tokenizer(), max_output=4))
    options = {"epochs": 60, "batch_size": 8, "lr": 3e-2}
    result = learn_sequence(
        adapted(form), tasks, "tasl", options, method_options={"orthogonality": 0.0}, folder=tmp_path
    )
    assert result.losses[0][1] < 0.5 * result.losses[0][0]
    assert result.baseline[0] == 0.0 and result.rows[0][0] > 0
    assert {row[0] for row in result.rows} <= {k / 4 for k in range(5)}  # of four turns


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_score_is_that_of_what_is_generated(form, monkeypatch):
    """Joint goal accuracy: a turn counts if all of its slots match; without turns, the share of outputs."""
    rows = [(f"w{i}", "red") for i in range(5)]
    turns = [Turn("d", str(k), "s") for k in (0, 0, 1, 1, 2)]
    right = {"w0": "RED", "w1": " red ", "w2": "red", "w3": "green", "w4": "red"}
    for given, expected in ((turns, 2 / 3), ([], 4 / 5)):
        task = FORMS[form]("t", TextData(rows, rows, rows, given), tokenizer(), score_batch=2)
        writer = task.collate.__self__
        monkeypatch.setattr(type(writer), "written", lambda self, model, some: [right[x] for x in some])
        assert task.score(None) == expected
        assert task.validate(None) == 4 / 5


@pytest.mark.parametrize("form", sorted(FORMS))
@torch.no_grad()
def test_padding_changes_nothing_of_what_is_generated(form):
    model = MODELS[form][0]().eval()
    task = FORMS[form]("t", texts(0), tokenizer(), max_output=5)
    writer = task.collate.__self__
    inputs = ["w1 w2 w3 w4 w5", "w6", "w7 w8"]
    assert writer.written(model, inputs) == [writer.written(model, [x])[0] for x in inputs]


def test_the_hidden_states_of_a_causal_model_for_ilora(tmp_path):
    data = [dataclasses.replace(texts(s), validation=[]) for s in (0, 1)]
    tasks = [causal_task(f"t{i}", d.cut(train=8, test=4), tokenizer(), max_output=2) for i, d in enumerate(data)]
    result = learn_sequence(adapted("causal"), tasks, "ilora", {"batch_size": 4, "lr": 1e-2}, folder=tmp_path)
    assert len(result.rows) == 2


def test_bad_input():
    for form, make in FORMS.items():
        with pytest.raises(ConfigError, match="the output of 'w1' is empty: all its labels would be masked"):
            make("t", TextData([("w1", " ")], [], [("w1", "red")]), tokenizer())
        with pytest.raises(ConfigError, match="max_output: got 0"):
            make("t", texts(0), tokenizer(), max_output=0)
        task = make("t", texts(0), tokenizer())
        assert task.collate([("w1", "red")])["labels"].shape[0] == 1, form
    labels = torch.tensor([[1, -100], [-100, -100]])
    with pytest.raises(ConfigError, match="all labels of 1 of 2 examples are masked, the first is .*w2"):
        check_some_label(labels, "t", [("w1", "red"), ("w2", "red")])
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ConfigError, match="no token for padding; set tokenizer.pad_token"):
        seq2seq_task("t", texts(0), bare)


def test_labels_that_a_tokenizer_makes_empty():
    """Without an end of the sequence, an output that gives no token leaves nothing to learn."""
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, pad_token="<pad>")
    task = seq2seq_task("t", TextData([("w1", "\u200b")], [], [("w1", "red")]), bare)
    assert task.collate([("w1", "red")])["labels"].tolist() == [ids("red")]
    with pytest.raises(ConfigError, match="are masked"):
        task.collate([("w1", "")])


def test_matches():
    assert matches(" New  York", "new york") and not matches("new", "new york")


def test_real_dialogues_on_a_t5_of_random_weights(tmp_path):
    """The files as prepared for TaSL, through the whole loop (a few of them; a random T5 learns no value)."""
    path = DATA / "text_dst" / "sgd_media_2.json.gz"
    if not path.exists():
        pytest.skip("no text_dst/sgd_media_2.json.gz under HATCL_DATA")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    names = ["sgd_media_2", "sgd_trains_1"]
    data = {n: read_texts(path.with_name(f"{n}.json.gz")).cut(train=48, test=6) for n in names}
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    rows = [text for d in data.values() for pair in d.train for text in pair]
    inner.train_from_iterator(rows, trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"]))
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    targets = ["q", "v", "o", "wi", "wo", "lm_head"]
    model = peft.get_peft_model(
        transformers.T5ForConditionalGeneration(config), peft.LoraConfig(r=4, target_modules=targets)
    )
    tasks = [seq2seq_task(n, d, words, max_input=64, max_output=6) for n, d in data.items()]
    result = learn_sequence(model, tasks, "tasl", {"epochs": 3, "batch_size": 8, "lr": 3e-2}, folder=tmp_path)
    assert all(last < first for first, last in result.losses)
    assert all(0 <= v <= 1 for v in result.rows[-1])


# --- chats ---

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ 'ask ' if m.role == 'user' else 'warm ' }}{{ m.content }}{{ ' </s> ' if m.role == 'assistant' else ' : ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'warm ' }}{% endif %}"
)


@pytest.fixture
def chatty():
    words = copy.deepcopy(tokenizer())
    words.chat_template = TEMPLATE
    return words


def test_a_chat_is_written_by_the_template_and_only_answers_are_learned(chatty):
    turns = [("user", "w1 w2"), ("assistant", "red"), ("user", "w3")]
    pairs = [(Chat(turns[:1]), "red"), (Chat(turns), "green blue")]
    task = causal_task("t", TextData(pairs, [], pairs), chatty)
    batch = task.collate(pairs)
    whole = chatty.apply_chat_template(
        [{"role": r, "content": c} for r, c in (*turns, ("assistant", "green blue"))], tokenize=False
    )
    assert batch["input_ids"][1].tolist() == chatty(whole, add_special_tokens=False)["input_ids"]
    learned = [chatty.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["red </s>", "green blue </s>"]
    # a conversation without the template would be other tokens
    plain = causal_task("t", TextData(pairs, [], pairs), tokenizer())
    with pytest.raises(ConfigError, match="task t has chat messages, but the tokenizer has no chat template; use a ch"):
        plain.collate(pairs)
    with pytest.raises(ConfigError, match=r"does not accept the roles system, user \(no system here\)"):
        task.collate([(Chat([("system", "w1"), ("user", "w2")]), "red")])


def test_a_model_learns_to_answer_in_its_template(chatty):
    pairs = [(Chat([("user", f"w{i}")]), ["red", "green"][i % 2]) for i in range(6)]
    task, model = causal_task("t", TextData(pairs, [], pairs), chatty, max_output=3), adapted("causal")
    result = learn_sequence(
        model, [task], "sequential", {"epochs": 60, "batch_size": 6, "lr": 1e-2, "schedule": "constant"}
    )
    assert result.matrix[0, 0] == 1  # by heart, and it stops after the answer
