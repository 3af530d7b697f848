"""`tests/` mirrors `hatcl/`: `hatcl/room/file.py` has `tests/room/test_file.py`, or a line here that says which test
covers it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "hatcl"
# module -> the test that covers it, and a word by which it does
ELSEWHERE = {
    "__init__.py": ("test_package.py", "hatcl.__version__"),
    "__main__.py": ("test_package.py", '"-m", "hatcl"'),
    "atlas/loading.py": ("atlas/test_experiment.py", "loading"),
    "commands/__init__.py": ("commands/test_commands.py", "COMMANDS"),
    "commands/_benchmark.py": ("commands/test_train_texts.py", "--benchmark"),
    "commands/_command.py": ("commands/test_commands.py", "_command"),
    "commands/_console.py": ("commands/test_commands.py", "SystemExit"),
    "commands/_options.py": ("commands/test_commands.py", "_options"),
    "commands/_pages.py": ("commands/test_show.py", "report.html"),
    "commands/_routing.py": ("commands/test_predict.py", "_routing"),
    "commands/_sequence.py": ("commands/test_train.py", "--method"),
    "commands/_shown.py": ("commands/test_show.py", "show"),
    "commands/atlas/_learning.py": ("commands/test_atlas.py", "--lr"),
    "commands/atlas/adapt.py": ("commands/test_atlas.py", "adapt"),
    "commands/atlas/add.py": ("commands/test_atlas.py", '"add"'),
    "commands/atlas/cosine.py": ("commands/test_atlas.py", "cosine"),
    "commands/atlas/few_shot.py": ("commands/test_atlas.py", "few-shot"),
    "commands/atlas/negate.py": ("commands/test_atlas.py", "negate"),
    "commands/atlas/sweep.py": ("commands/test_atlas.py", "sweep"),
    "continual/methods/joint.py": ("continual/test_sequence.py", '"joint"'),
    "continual/methods/sequential.py": ("continual/test_sequence.py", '"sequential"'),
    "continual/options.py": ("continual/test_sequence.py", "LearnOptions"),
    "continual/result.py": ("continual/test_images.py", "average_accuracy"),
    "continual/tasks.py": ("continual/test_sequence.py", "ContinualTask"),
    "engine/processes.py": ("continual/test_processes.py", "process"),
    "finetuning/state.py": ("finetuning/test_run.py", "resume"),
    "hat/extraction/cut.py": ("hat/extraction/test_extract.py", "extract_task"),
    "hat/extraction/plain.py": ("hat/extraction/test_extract.py", "extract_task"),
    "hat/extraction/trace.py": ("hat/extraction/test_extract.py", "extract_task"),
    "hat/growth/apply.py": ("hat/growth/test_grow.py", "hatcl.grow"),
    "hat/growth/optimizer.py": ("hat/growth/test_grow.py", "optimizer="),
    "hat/growth/plan.py": ("hat/growth/test_grow.py", "hatcl.grow"),
    "hat/saving/headers.py": ("hat/saving/test_pretrained.py", "header"),
    "hat/routing/known.py": ("hat/routing/test_router.py", "known"),
    "integrations/course.py": ("integrations/test_lightning.py", "LearnTask"),
    "integrations/peft_osf.py": ("continual/methods/test_osf.py", "keep_orthogonal"),
    "map/lora.py": ("hat/test_convert_peft.py", "lora"),
}


def only_passes_on(path: Path) -> bool:
    """An `__init__.py` that defines nothing of its own."""
    defined = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return path.name == "__init__.py" and not any(
        isinstance(node, defined) for node in ast.parse(path.read_text()).body
    )


def mirrored(path: Path) -> bool:
    inside = path.relative_to(PACKAGE)
    return (TESTS / inside.parent / f"test_{inside.stem.removeprefix('_')}.py").exists()


MODULES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]


def test_every_module_has_its_test():
    alone = {m for m in MODULES if not mirrored(PACKAGE / m) and not only_passes_on(PACKAGE / m)} | {"__init__.py"}
    assert alone == ELSEWHERE.keys(), "write tests/ROOM/test_FILE.py, or a line that says which test covers it"


@pytest.mark.parametrize("module", ELSEWHERE)
def test_the_other_test_is_there(module):
    there, word = ELSEWHERE[module]
    assert word in (TESTS / there).read_text(), f"{there} does not cover {module} by {word}"
