from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from command_parts import call

PASSED = {
    "family": "resnet", "passed": True, "parameters": 469688, "units": 1672, "known": 0.98765, "unknown": {},
    "notes": [], "use": [0.5, 0.5], "forward_seconds": 0.01, "trace_seconds": 0.1, "seconds": 12.3,
    "shares": {"shared_both": 0.75, "shared_one": 0.0, "own_copy": 0.25, "always_on": 0.0},
}  # fmt: skip
FAILED = {"family": "vit", "passed": False, "failure": "ProofFailed: task 0 changed while task 1 was learned"}


@pytest.fixture
def proving(tmp_path, monkeypatch):
    """`hatcl zoo` in an empty folder without its processes: `proving.rows` are what they give, `proving.asked` for
    whom."""
    import types

    from hatcl.zoo import page, run

    state = types.SimpleNamespace(rows={}, asked=[], limits=[], known=tmp_path / "known.json", folder=tmp_path / "here")

    def prove_one(name, **limits):
        state.asked.append(name)
        state.limits.append(limits)
        return state.rows.get(name, PASSED)

    def checkout():  # the package lies in the working folder
        (state.folder / "docs").mkdir()
        state.known = state.folder / "known.json"
        monkeypatch.setattr(page, "KNOWN", state.known)

    state.checkout = checkout
    state.folder.mkdir()
    monkeypatch.chdir(state.folder)
    monkeypatch.setattr(run, "prove_one", prove_one)
    monkeypatch.setattr(page, "KNOWN", state.known)
    return state


def test_zoo_lists_what_is_known(proving, capsys):
    rows = {"resnet18": 1.0, "resnet34": 0.9449, "hf/bert": 0.99}
    known = {n: {"family": n.rstrip("0123456789"), "parameters": 3, "known": share} for n, share in rows.items()}
    proving.known.write_text(json.dumps(known))
    code, out, _ = call(capsys, "zoo")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and "3 models proved, 2 families" in lines
    assert "resnet 94.5 % resnet18, resnet34" in lines and "hf/bert 99.0 % hf/bert" in lines
    assert lines.index("hf/bert 99.0 % hf/bert") < lines.index("resnet 94.5 % resnet18, resnet34")
    assert proving.asked == []


def test_zoo_proves_prints_writes_and_goes_on(tmp_path, capsys):
    results = tmp_path / "zoo.json"
    code, out, err = call(capsys, "zoo", "test_resnet", "--results", results)
    assert code == 0, err
    row = json.loads(results.read_text())["models"]["test_resnet"]
    assert row["passed"] and row["known"] == 1
    shown = " ".join(out.split())
    said = f"test_resnet: exact, {row['units']:,} units, 100.0 % known, {row['seconds']:.0f} s"
    assert said in shown and f"1 of 1 passed; figures in {results}" in shown
    written = results.stat().st_mtime_ns
    code, out, _ = call(capsys, "zoo", "test_resnet", "--results", results)  # nothing is run: the same figures
    assert code == 0 and said in " ".join(out.split()) and results.stat().st_mtime_ns == written


def test_zoo_says_which_model_fails_and_why(proving, capsys):
    proving.rows = {"test_vit": FAILED}
    code, out, _ = call(
        capsys, "zoo", "test_resnet", "test_vit*", "--results", "zoo.json", "--seconds", "7", "--memory", "2"
    )
    shown = " ".join(out.split())
    assert code == 1 and "test_vit: ProofFailed: task 0 changed while task 1 was learned" in shown
    assert "test_resnet: exact, 1,672 units, 98.8 % known, 12 s" in shown
    assert "5 of 6 passed; figures in zoo.json" in shown
    assert proving.asked == ["test_resnet", "test_vit", "test_vit2", "test_vit3", "test_vit4", "test_vit_relpos"]
    assert proving.limits == [{"seconds": 7.0, "memory_gb": 2.0}] * 6
    assert json.loads(Path("zoo.json").read_text())["models"]["test_vit"] == FAILED
    assert call(capsys, "zoo", "test_vit", "--results", "zoo.json")[0] == 1  # it stays a failure
    assert len(proving.asked) == 6
    proving.rows = {}
    assert call(capsys, "zoo", "test_vit", "--results", "zoo.json", "--again")[0] == 0
    assert proving.asked[6:] == ["test_vit"]


def test_zoo_takes_patterns_families_and_sizes(proving, capsys):
    def asked(*args):
        proving.asked.clear()
        code, _, err = call(capsys, "zoo", *args, "--again")
        assert code == 0, err
        return list(proving.asked)

    assert asked("test_*", "--family", "resnet") == ["test_resnet"]
    assert asked("test_resnet", "test_res*") == ["test_resnet"]  # each once
    assert asked("hf/gpt2*") == ["hf/gpt2", "hf/gpt2_classifier"]
    assert asked("--family", "hf/bert") == ["hf/bert"]
    sizes = {n: sum(p.numel() for p in timm.create_model(n).parameters()) for n in timm.list_models("test_resnet*")}
    assert asked("test_resnet", "resnet18", "--max-params", sizes["test_resnet"]) == ["test_resnet"]
    code, _, err = call(capsys, "zoo", "test_resnet", "resnet18", "--max-params", sizes["test_resnet"] - 1)
    assert code == 2 and "--max-params 469,687 parameters: all matching models are larger" in err
    assert asked("test_resnet", "resnet18") == ["test_resnet", "resnet18"]
    assert Path("benchmarks/results/zoo.json").exists()  # where the figures go by default


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["nothing*"], "no model matches 'nothing*'; see hatcl list and try a wider pattern"),
        (["test_resnet", "nothing*"], "no model matches 'nothing*'; see hatcl list"),
        (["test_*", "--family", "resnt"], "no model matches 'test_*' in family 'resnt'; see hatcl list"),
        (["--family", "resnt"], "no model matches '*' in family 'resnt'"),
        (["--publish"], "--publish writes docs/zoo.md; run it in a checkout of hatcl"),
        (["test_resnet", "--publish"], "--publish writes docs/zoo.md; run it in a checkout of hatcl"),
    ],
)
def test_zoo_says_what_it_cannot_do(proving, capsys, args, text):
    code, _, err = call(capsys, "zoo", *args)
    assert code == 2 and err.startswith("error: ") and text in err and "Traceback" not in err
    assert not proving.known.exists() and proving.asked == (
        ["test_resnet"] if args[-1] == "--publish" and args[1:] else []
    )


def test_a_name_with_hat_in_front_is_timms(proving, capsys):
    assert call(capsys, "zoo", "hat_test_resnet")[0] == 0 and proving.asked == ["test_resnet"]


def test_zoo_publishes_in_a_checkout(proving, capsys):
    proving.checkout()
    proving.rows = {"test_vit": FAILED}
    code, _, _ = call(capsys, "zoo", "test_resnet", "test_vit", "--publish")
    assert code == 1  # published all the same
    page = Path("docs/zoo.md").read_text()
    assert "| timm | 1 of 2 | 1 of 2 |" in page and "| test_vit | ProofFailed: task 0 changed" in page
    assert json.loads(proving.known.read_text()) == {
        "test_resnet": {"family": "resnet", "parameters": 469688, "known": 0.9877}
    }
    Path("docs/zoo.md").unlink()
    code, _, _ = call(capsys, "zoo", "--publish")  # from the results alone
    assert code == 0 and Path("docs/zoo.md").read_text() == page and proving.asked == ["test_resnet", "test_vit"]
    code, out, _ = call(capsys, "zoo")
    assert code == 0 and "1 models proved, 1 families" in " ".join(out.split())


def test_zoo_publish_without_results_is_one_clean_message(proving, capsys):
    proving.checkout()
    code, _, err = call(capsys, "zoo", "--publish")
    assert code == 2 and err.startswith("error: --publish: there is no benchmarks/results/zoo.json yet; prove some")
    assert not Path("docs/zoo.md").exists() and not proving.known.exists()
