from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import recipe_parts
import torch
import yaml
from command_parts import call
from safetensors.torch import load_file, save_file
from vector_parts import MOST

import hatcl
from hatcl.commands.merge import IN_PYTHON, _bytes
from hatcl.vectors.checkpoint import CARD
from hatcl.vectors.mergekit import follow_recipe
from hatcl.vectors.merging.registry import list_merges, merge_info
from hatcl.vectors.task_vector import TaskVector
from hatcl.vectors.tensors import named_tensors


@pytest.fixture
def checkpoints(tmp_path):
    """base.safetensors, its fine-tunes 0 and 1, and a task vector of another base."""
    torch.manual_seed(0)
    for name in ("base", "0", "1"):
        save_file({"a": torch.randn(5, 5), "b": torch.randn(5), "n": torch.tensor(3)}, tmp_path / f"{name}.safetensors")
    vector = hatcl.TaskVector.between(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    vector.save(tmp_path / "vector.safetensors")
    return tmp_path


def test_merge_adds_checkpoints(checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    code, out, _ = call(
        capsys, "merge", "base.safetensors", "0.safetensors:0.4", "1.safetensors:-1", "--output", "out",
        "--shard-size", "100B",
    )  # fmt: skip
    assert code == 0 and "out: base.safetensors and 2 parts" in out
    base, one, two = (load_file(f"{n}.safetensors") for n in ("base", "0", "1"))
    want = hatcl.vectors.task_vector.composed(
        base, [(0.4, hatcl.TaskVector.between(base, one)), (-1, hatcl.TaskVector.between(base, two))]
    )
    got = hatcl.vectors.tensors.named_tensors("out")
    assert len(list(Path("out").glob("model-*.safetensors"))) == 2
    assert {n for n in want if torch.equal(want[n], got[n])} == {"a", "b", "n"} == set(got)
    code, out, _ = call(capsys, "merge", "base.safetensors", "1.safetensors", "--output", "one.safetensors")
    assert code == 0 and "one.safetensors: base.safetensors and 1 part\n" in out
    assert all(torch.equal(t, two[n]) for n, t in load_file("one.safetensors").items())  # bit for bit


def test_merge_writes_vectors_and_merges(checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    Path("0.safetensors").rename("x:0.5")  # a name that looks like a coefficient
    code, _, _ = call(capsys, "merge", "base.safetensors", "x:0.5", "--output", "v", "--vector")
    assert code == 0 and torch.equal(
        hatcl.TaskVector.load("v").apply_to("base.safetensors")["a"], load_file("x:0.5")["a"]
    )
    parts = ["x:0.5:2", "1.safetensors"]
    code, _, err = call(
        capsys, "merge", "base.safetensors", *parts, "--method", "ties", "--set", "density=0.5", "--output", "m",
    )  # fmt: skip
    assert code == 0, err
    code, _, _ = call(capsys, "merge", "base.safetensors", "vector.safetensors", "--no-check", "--output", "n")
    assert code == 0 and Path("n/model.safetensors").exists()


@pytest.mark.parametrize(
    "args, text",
    [
        (["no.safetensors"], "no.safetensors: no such file; expected safetensors"),
        (
            ["0.safetensors:half"],
            "0.safetensors:half: no such file, and 'half' is not a coefficient; expected PATH or PATH:COEF",
        ),
        (["0.safetensors:nan"], "coefficient of 0.safetensors: got nan, expected a finite number"),
        (["0.safetensors", "--shard-size", "many"], "--shard-size: got 'many', expected a size such as 100MB or 2GB"),
        (["0.safetensors", "--shard-size", "1.1.1MB"], "--shard-size: got '1.1.1MB'"),
        (["0.safetensors", "--shard-size", "0MB"], "--shard-size: got '0MB'"),
        (["0.safetensors", "--set", "x"], "--set: got 'x', expected key=value"),
        (["0.safetensors", "--set", "x=1"], "options: got x without a method that takes them"),
        (["0.safetensors", "--method", "tise"], "method: got 'tise'"),
        (["vector.safetensors"], "differs from this vector's base; apply it to its own base"),
        (["0.safetensors", "--output", "base.safetensors"], "base.safetensors would replace"),
    ],
)
def test_merge_refuses_with_one_clean_message(checkpoints, monkeypatch, capsys, args, text):
    monkeypatch.chdir(checkpoints)
    code, _, err = call(
        capsys, "merge", "base.safetensors", *args, *([] if "--output" in args else ["--output", "out"])
    )
    assert code == 2 and err.startswith("error: ") and text in err and "Traceback" not in err
    assert not list(Path("out").glob("*.safetensors"))


def test_merge_stopped_by_ctrl_c_goes_on(checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    args = ("merge", "base.safetensors", "0.safetensors:0.5", "--output", "out", "--shard-size", "1B")
    real, left = hatcl.vectors.files._write_file, [2]

    def stopping(*write):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*write)

    monkeypatch.setattr(hatcl.vectors.files, "_write_file", stopping)
    code, _, err = call(capsys, *args)
    assert code == 130 and "stopped. Resume with: the same command" in err
    left[0] = 1  # one of three shards is left
    code, _, _ = call(capsys, *args)
    assert code == 0 and len(list(Path("out").glob("*.safetensors"))) == 3


def test_sizes():
    sizes = {"100MB": 100_000_000, "2 GB": 2_000_000_000, "1.5KB": 1500, "1MiB": 1 << 20, "7b": 7}
    assert {text: _bytes("--shard-size", text) for text in sizes} == sizes


def recipe(folder: Path, content: object, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"base": "base.safetensors", "parts": ["0.safetensors:0.4", "1.safetensors:-1"]},
        {"base": "base.safetensors", "parts": {"0.safetensors": 0.4, "1.safetensors": -1}},
        {"base": "base.safetensors", "parts": ["0.safetensors", "1.safetensors"], "coefficients": [0.4, -1]},
    ],
)
@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json"])
def test_a_recipe_gives_what_its_words_give(checkpoints, tmp_path, monkeypatch, capsys, content, name):
    path = recipe(checkpoints, content, name)
    monkeypatch.chdir(tmp_path.parent)  # its paths are as seen from the recipe
    code, out, err = call(capsys, "merge", path, "--output", tmp_path / "a.safetensors", "--json")
    assert code == 0, err
    assert [part["coefficient"] for part in json.loads(out)["parts"]] == [0.4, -1.0]
    monkeypatch.chdir(checkpoints)
    parts = ["0.safetensors:0.4", "1.safetensors:-1"]
    assert call(capsys, "merge", "base.safetensors", *parts, "--output", tmp_path / "b.safetensors")[0] == 0
    ours, theirs = (load_file(tmp_path / f"{n}.safetensors") for n in "ab")
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_a_recipe_with_a_method(checkpoints, capsys):
    content = {"base": "base.safetensors", "parts": ["0.safetensors", "1.safetensors"], "method": "ties"}
    path = recipe(checkpoints, {**content, "options": {"density": 0.5}})
    code, out, err = call(capsys, "merge", path, "--output", checkpoints / "m", "--json")
    assert code == 0 and json.loads(out)["options"] == {"density": 0.5}, err
    code, _, err = call(capsys, "merge", path, "--method", "dare", "--output", checkpoints / "n")
    assert code == 2 and "--method: got dare, but" in err and "leave one of them out" in err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"base": "base.safetensors"}, "the recipe lacks parts; it needs base and parts"),
        ({"base": "b", "parts": ["0"], "coeficients": [1]}, "no option 'coeficients'; did you mean 'coefficients'?"),
        ({"base": "b", "parts": ["0"], "coefficients": [1, 2]}, "expected parts as a list of paths and as many"),
        ({"base": "b", "parts": {"0": 1}, "coefficients": [1]}, "parts has coefficients already"),
        ({"base": "b", "parts": {"0": "half"}}, "the coefficient 'half' is not a number"),
        ({"base": "b", "parts": ["0"], "options": [1]}, "options is [1], expected a mapping"),
        ({"base": "b", "parts": ["0"], "only": [1]}, "only is [1], expected a pattern of names, or a list of them"),
        ({"base": "b", "parts": ["0"], "dtype": 16}, "dtype is 16, expected a text"),
        ([1], "holds list, expected a mapping"),
    ],
)
def test_a_recipe_that_cannot_be_followed(checkpoints, capsys, content, text):
    code, _, err = call(capsys, "merge", recipe(checkpoints, content), "--output", checkpoints / "out")
    assert code == 2 and text in err and not (checkpoints / "out").exists()


def test_a_recipe_says_all_that_the_words_may(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    content = {"base": "base", "parts": {"a": 0.4, "b": 1.0}, "only": ["*.mlp.*", "lm_head.*"], "skip": "*.up_proj.*"}
    content |= {"dtype": "bfloat16", "tokenizer": "b", "embeddings": "common"}
    path = recipe(models, content, "all.yaml")
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "merge", path, "--output", tmp_path / "a")
    assert code == 0, err
    monkeypatch.chdir(models)
    words = ["--only", "*.mlp.*", "--only", "lm_head.*", "--skip", "*.up_proj.*", "--dtype", "bfloat16"]
    words += ["--tokenizer", "b", "--embeddings", "common"]
    assert call(capsys, "merge", "base", "a:0.4", "b", *words, "--output", tmp_path / "b")[0] == 0
    ours, theirs = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir() if f.name != CARD} for n in "ab")
    assert ours == theirs
    # the same said twice is no matter, something else is
    assert call(capsys, "merge", path, "--dtype", "bfloat16", "--output", tmp_path / "a")[0] == 0
    code, _, err = call(capsys, "merge", path, "--dtype", "float16", "--output", tmp_path / "no")
    assert code == 2 and "--dtype: got float16, but" in err and "has the dtype bfloat16; leave one of them out" in err
    code, _, err = call(capsys, "merge", path, "--only", "*.mlp.*", "--output", tmp_path / "no")
    assert code == 2 and "--only: got ['*.mlp.*'], but" in err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", [m for m in list_merges() if set(merge_info(m).needs) & set(IN_PYTHON)])
def test_methods_that_need_data_are_for_python(checkpoints, monkeypatch, capsys, method):
    monkeypatch.chdir(checkpoints)
    code, _, err = call(capsys, "merge", "base.safetensors", "0.safetensors", "--method", method, "--output", "out")
    assert code == 2 and f"--method: {method} needs model and batches in Python only: hatcl.merge(vectors, " in err
    assert "hatcl atlas add" in err and not Path("out").exists()


@pytest.mark.parametrize("option", ["scales=[0.1, 0.2]", "evaluate=accuracy", "model=base"])
def test_options_that_are_functions_are_for_python(checkpoints, monkeypatch, capsys, option):
    monkeypatch.chdir(checkpoints)
    words = ["--method", "arithmetic", "--set", option, "--output", "out"]
    code, _, err = call(capsys, "merge", "base.safetensors", "0.safetensors", *words)
    name = option.partition("=")[0]
    assert code == 2 and f"--set: arithmetic takes {name} in Python only" in err and "hatcl atlas sweep" in err


def test_every_option_that_no_text_can_be_is_known():
    texts = {"float", "int", "bool", "str", "PerVector", "Sequence[float]"}
    for method in list_merges():
        for p in inspect.signature(merge_info(method).function).parameters.values():
            if p.kind is p.KEYWORD_ONLY and not set(str(p.annotation).split(" | ")) <= texts | {"None"}:
                assert p.name in (*IN_PYTHON, "pretrained"), (method, p.name)  # which the command gives: BASE


def test_merge_without_parts(checkpoints, capsys):
    code, _, err = call(capsys, "merge", checkpoints / "base.safetensors", "--output", checkpoints / "out")
    assert code == 2 and "merge: no parts; give at least one PART, or a recipe" in err


@pytest.mark.parametrize("known", [{"command": "train", "options": {}}, {"fingerprint": "", "map": {}}])
def test_a_run_or_a_model_with_tasks_is_not_replaced(checkpoints, tmp_path, capsys, known):
    output = tmp_path / "taken"
    output.mkdir()
    (output / "config.json").write_text(json.dumps(known))
    args = ("merge", checkpoints / "base.safetensors", checkpoints / "base.safetensors", "--output", output)
    code, _, err = call(capsys, *args)
    assert code == 2 and ("is there" in err or "holds a run" in err) and "name another folder" in err
    assert [path.name for path in output.iterdir()] == ["config.json"]
    (output / "config.json").write_text("{}")  # neither: the twin, which is written
    assert call(capsys, *args)[0] == 0 and len(list(output.iterdir())) > 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    recipe_parts.write_models(folder)
    return folder


def test_a_recipe_of_mergekit(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    content = recipe_parts.cases()["ties"]
    path = recipe(tmp_path, content)
    code, out, err = call(capsys, "merge", path, "--output", tmp_path / "out", "--shard-size", "12KB", "--json")
    assert code == 0 and json.loads(out)["recipe"] == content, err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    got, want = named_tensors(tmp_path / "out"), named_tensors(follow_recipe(content, tmp_path / "same"))
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert path.read_text().strip() in (tmp_path / "out" / "README.md").read_text()
    code, out, _ = call(capsys, "merge", path, "--output", tmp_path / "again")
    assert code == 0 and "again: " in out
    for words in (["--method", "ties"], ["--set", "density=1"], ["--dtype", "float16"], ["--only", "*"], ["--buffers"]):
        code, _, err = call(capsys, "merge", path, "--output", tmp_path / "no", *words)
        assert (
            code == 2 and f"{words[0]}: {path} is a recipe of mergekit, which holds all options; write it there" in err
        )
    code, _, err = call(capsys, "merge", recipe(tmp_path, {**content, "modelss": []}), "--output", tmp_path / "no")
    assert code == 2 and "recipe: no key 'modelss'; did you mean 'models'" in err


@pytest.mark.parametrize("words", [[], ["--method", "ties", "--set", "density=0.5"], ["--dtype", "bfloat16"]])
def test_transformers_loads_what_the_command_wrote(models, tmp_path, monkeypatch, capsys, words):
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(models)
    code, _, err = call(
        capsys, "merge", "base", "a:0.4", "b", "--output", tmp_path / "out", "--tokenizer", "b", "--shard-size", "12KB",
        *words,
    )  # fmt: skip
    assert code == 0, err
    net, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert net.dtype == (torch.bfloat16 if "--dtype" in words else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<new>") == 30  # which only b has
    ids = tokenizer("abcd", return_tensors="pt").input_ids
    assert net.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    AutoModel.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hatcl merge base a:0.4 b:1.0" in card
    assert all((told in card) == ("ties" in words) for told in ("--method ties", "--set density=0.5"))
    assert ("--dtype bfloat16" in card) == ("--dtype" in words)


@pytest.mark.parametrize("method", [m for m in list_merges() if not set(merge_info(m).needs) & set(IN_PYTHON)])
def test_transformers_loads_and_generates_from_every_merge(models, tmp_path, monkeypatch, capsys, method):
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(models)
    parts = ["a", "b", "c"][: MOST.get(method)]
    code, _, err = call(capsys, "merge", "base", *parts, "--method", method, "--output", tmp_path / "out")
    assert code == 0, err
    net, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("abcd", return_tensors="pt").input_ids
    assert net.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    AutoModel.from_pretrained(tmp_path / "out")
    start = named_tensors("base")
    assert any(not torch.equal(p, start[n]) for n, p in net.named_parameters() if n in start)


def test_the_command_gives_the_bits_of_arithmetic(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    assert call(capsys, "merge", "base", "a:0.6", "b:0.4", "c:-1.3", "--output", tmp_path / "out")[0] == 0
    got = named_tensors(tmp_path / "out")
    kinds = {n: k.dtype for n, k in got.kinds.items()}
    a, b, c = (TaskVector.between("base", p) for p in "abc")
    want = (a * 0.6 + b * 0.4 + c * -1.3).apply_to("base")
    assert kinds and set(kinds.values()) == {torch.float32}
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_a_tokenizer_that_is_not_there(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    code, _, err = call(capsys, "merge", "base", "a", "--output", tmp_path / "out", "--tokenizer", "c")
    assert code == 2 and "tokenizer: got 'c', expected base or one of the parts" in err
    code, _, err = call(capsys, "merge", "base", "a", "--output", tmp_path / "out", "--dtype", "int4")
    assert code == 2 and "dtype: got 'int4', expected one of bfloat16" in err and not (tmp_path / "out").exists()


def test_only_some_tensors(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    words = ["--only", "*.mlp.*", "--skip", "*.up_proj.*"]
    code, _, err = call(capsys, "merge", "base", "a", "--output", tmp_path / "out", *words)
    assert code == 0, err
    TaskVector.between("base", "b").save(tmp_path / "v")
    assert call(capsys, "merge", "base", tmp_path / "v", "--output", tmp_path / "w", *words)[0] == 0
    for out, part in ((tmp_path / "out", "a"), (tmp_path / "w", "b")):
        got, base, whole = named_tensors(out), named_tensors("base"), named_tensors(part)
        for n in base:
            chosen = ".mlp." in n and "up_proj" not in n
            assert torch.equal(got[n], whole[n] if chosen else base[n])
    code, _, err = call(capsys, "merge", "base", "a", "--output", tmp_path / "no", "--only", "*.mpl.*")
    assert code == 2 and "only: '*.mpl.*' matches none of" in err


def test_a_pattern_to_skip_that_one_of_several_parts_has(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    more = {**named_tensors("a"), "model.rotary.inv_freq": torch.ones(4)}
    save_file({n: t.clone() for n, t in more.items()}, tmp_path / "more.safetensors")
    parts = [f"{tmp_path / 'more.safetensors'}:0.5", "b:0.5"]
    code, _, err = call(capsys, "merge", "base", *parts, "--output", tmp_path / "no")
    assert code == 2 and "inv_freq" in err
    code, _, err = call(capsys, "merge", "base", *parts, "--skip", "*.inv_freq", "--output", tmp_path / "out")
    assert code == 0, err
    assert call(capsys, "merge", "base", "a:0.5", "b:0.5", "--output", tmp_path / "plain")[0] == 0
    got, want = named_tensors(tmp_path / "out"), named_tensors(tmp_path / "plain")
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_a_vocabulary_that_grew(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    grown = dict(named_tensors("a"))
    table = next(n for n in grown if "embed_tokens" in n)
    for name in [n for n in (table, "lm_head.weight") if n in grown]:
        grown[name] = torch.cat([grown[name], torch.zeros(2, grown[name].shape[1])])
    save_file({n: t.clone() for n, t in grown.items()}, tmp_path / "grown.safetensors")
    code, _, err = call(capsys, "merge", "base", tmp_path / "grown.safetensors", "--output", tmp_path / "no")
    assert code == 2 and "embeddings" in err
    words = ["--embeddings", "common", "--output", tmp_path / "out"]
    code, _, err = call(capsys, "merge", "base", tmp_path / "grown.safetensors", *words)
    assert code == 0, err
    got, want = named_tensors(tmp_path / "out"), named_tensors("a")
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_the_card_repeats_the_merge(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    words = ["merge", "base", "a:0.123456789", "b", "--tokenizer", "b", "--no-check"]
    assert call(capsys, *words, "--output", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hatcl merge base a:0.123456789 b:1.0 --tokenizer b --no-check\n" in card
    path = models / "own.yaml"  # its paths are as seen from where it lies
    path.write_text("base: base\nparts: [a, b]\nmethod: ties\noptions: {density: 0.5}\n")
    for given, told in (([], ""), (["--set", "density=0.3", "--dtype", "bfloat16"], None)):
        assert call(capsys, "merge", path, "--output", tmp_path / "own", *given)[0] == 0
        card = (tmp_path / "own" / "README.md").read_text()
        want = f"\n# hatcl merge {path} --dtype bfloat16 --set density=0.3\n" if told is None else told
        assert path.read_text() + want + "```" in card
    code, _, err = call(capsys, "merge", path, "c", "--output", tmp_path / "no")
    assert code == 2 and "own.yaml is a recipe, which names its parts; also got c; write it in the recipe" in err
