"""docs/stack.md: each cell of its table is what a test says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE, HAT = "tests/integrations/", "tests/hat/"
COLUMNS = ("two tasks", "resume", "accumulation", "bf16", "2 processes", "averaged weights", "best checkpoint")
TWO = "test_two_tasks"  # whose parameters are the plain run, accumulation and bf16
# by the beginning of a row's name: per column the tests of it
BACKED = {
    "your own loop": {
        "two tasks": [
            (HERE + "test_own_loop.py", TWO),
            (HERE + "test_timm_recipe.py", "test_two_tasks_by_timms_recipe"),
        ],
        "resume": [(HERE + "test_own_loop.py", "test_an_interrupted_task_is_resumed_with_the_same_bits")],
        "accumulation": [(HERE + "test_own_loop.py", TWO)],
        "bf16": [(HERE + "test_own_loop.py", TWO)],
        "2 processes": [(HAT + "test_distributed.py", "test_replicas")],
        "averaged weights": [(HERE + "test_own_loop.py", "test_averaged_weights")],
        "best checkpoint": [(HERE + "test_own_loop.py", "test_the_best_state_is_put_back_and_sealed")],
    },
    "transformers: `HATTrainer`": {
        "two tasks": [(HERE + "test_trainer.py", "test_two_tasks_and_one_that_is_resumed_in_a_fresh_model")],
        "resume": [(HERE + "test_trainer.py", "test_two_tasks_and_one_that_is_resumed_in_a_fresh_model")],
        "accumulation": [(HERE + "test_trainer.py", "test_what_a_trainer_offers")],
        "bf16": [(HERE + "test_trainer.py", "test_what_a_trainer_offers")],
        "2 processes": [(HAT + "test_distributed.py", "test_trainers")],
        "best checkpoint": [(HERE + "test_trainer.py", "test_the_best_checkpoint_is_loaded_and_sealed")],
    },
    "transformers: `HATCallback`": {
        "two tasks": [(HERE + "test_trainer.py", "test_the_callback_learns_and_resumes")],
        "resume": [(HERE + "test_trainer.py", "test_the_callback_learns_and_resumes")],
        "accumulation": [(HERE + "test_trainer.py", "test_the_callback_in_what_a_trainer_offers")],
        "bf16": [(HERE + "test_trainer.py", "test_the_callback_in_what_a_trainer_offers")],
        "2 processes": [(HAT + "test_distributed.py", "test_trainers")],  # HATTrainer learns by this callback
        "best checkpoint": [(HERE + "test_trainer.py", "test_the_callback_seals_the_best_checkpoint")],
    },
    "Lightning": {
        "two tasks": [(HERE + "test_lightning.py", TWO)],
        "resume": [
            (
                HERE + "test_lightning.py",
                "test_the_last_checkpoint_holds_the_sealed_task_and_an_earlier_one_is_resumed",
            )
        ],
        "accumulation": [(HERE + "test_lightning.py", TWO)],
        "bf16": [(HERE + "test_lightning.py", TWO)],
        "2 processes": [(HAT + "test_distributed.py", "test_trainers")],
        "averaged weights": [
            (HERE + "test_lightning.py", "test_averages_that_would_be_written_over_sealed_tasks_are_refused"),
            (HERE + "test_lightning.py", "test_an_averaged_copy_of_ones_own"),
        ],
        "best checkpoint": [(HERE + "test_lightning.py", "test_the_best_checkpoint_is_loaded_and_sealed")],
    },
    "accelerate": {
        "two tasks": [(HERE + "test_accelerate.py", TWO)],
        "resume": [(HERE + "test_accelerate.py", "test_a_state_that_was_saved_is_resumed")],
        "accumulation": [(HERE + "test_accelerate.py", TWO)],
        "bf16": [(HERE + "test_accelerate.py", TWO)],
        "2 processes": [(HAT + "test_distributed.py", "test_trainers")],
    },
    "Avalanche": {
        "two tasks": [(HERE + "test_avalanche.py", "test_each_experience_is_learned_sealed_and_kept")],
        "resume": [(HERE + "test_avalanche.py", "test_a_run_is_resumed_between_experiences")],
        "2 processes": [
            (HERE + "test_avalanche.py", "test_two_processes"),
            (HERE + "test_avalanche.py", "test_what_is_refused"),
        ],
        "best checkpoint": [(HERE + "test_avalanche.py", "test_the_best_epoch_of_early_stopping_is_sealed")],
    },
    "DeepSpeed": {
        "two tasks": [
            (HERE + "test_trainer.py", "test_what_is_refused"),
            (HERE + "test_own_loop.py", "test_copies_in_threads_are_refused"),
        ],
    },
}


def rows() -> dict[str, dict[str, str]]:
    lines = [line for line in (ROOT / "docs" / "stack.md").read_text().splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(table[0][1:]) == COLUMNS
    return {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in table[1:]}


@pytest.mark.parametrize("name", BACKED)
def test_each_cell_has_its_test(name):
    (found,) = [cells for row, cells in rows().items() if row.startswith(name)]
    assert {column for column, cell in found.items() if cell != "-"} == set(BACKED[name])
    assert all(cell.startswith(("exact", "refused", "-")) for cell in found.values())
    for path, test in (pair for tests in BACKED[name].values() for pair in tests):
        tree = ast.parse((ROOT / path).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}: no {test}"


def test_no_row_is_without():
    assert len(rows()) == len(BACKED)
