"""Few shots: which examples, and what they teach."""

from __future__ import annotations

import atlas_parts as parts
import pytest
import torch

import hatcl
from hatcl.atlas import accuracy, few_shot, sample_shots


def learn(grain="block", shots=8, **options):
    """The turned view from the two other views' vectors; its own is left out."""
    base, vectors = parts.world()
    composer = hatcl.compose(base, [vectors[0], vectors[2]], grain)
    x, y = parts.view("turned", "train")
    ids = sample_shots(y, shots)
    fitted = few_shot(
        composer, parts.batches(x[ids], y[ids], 40), parts.batches(*parts.view("turned", "val")),
        options={"epochs": 4, **options},
    )  # fmt: skip
    return fitted, composer


def test_other_tasks_vectors_help_a_new_task():
    fitted, composer = learn("partition:4")
    test = parts.batches(*parts.view("turned", "test"))
    # seen: .365 to .44 on validation, .38 to .45 on test
    assert fitted.score > fitted.pretrained["score"] + 0.02
    assert accuracy(composer, test) > accuracy(parts.world()[0], test)


def test_a_partition_of_one_equals_blocks_bit_for_bit():
    assert torch.equal(learn("block")[0].coefficients, learn("partition:1")[0].coefficients)


def test_epochs_have_at_least_so_many_steps():
    _, _, composer = parts.tiny()
    for steps, want in ((1, 4), (4, 4), (5, 8), (10, 12)):
        seen = []

        few_shot(composer, parts.tiny_batches(4), options={"epochs": 1}, steps=steps, on_progress=seen.append)
        assert sum(at.doing == "learning" for at in seen) == want


def test_without_validation_the_last_epoch_is_kept():
    _, _, composer = parts.tiny()
    fitted = few_shot(composer, parts.tiny_batches(4), options={"epochs": 2})
    assert fitted.epoch == 2 and not fitted.pretrained


def test_batches_without_a_length_are_passed_over_once_per_epoch():
    class Stream:
        def __iter__(self):
            return iter(parts.tiny_batches(3))

    _, _, composer = parts.tiny()
    assert len(few_shot(composer, Stream(), options={"epochs": 2}).history) == 2


def test_lora_vectors_alone_are_learned_over(tmp_path):
    """Parameter-efficient composition over adapters: their exact products B A, and nothing else."""
    peft = pytest.importorskip("peft")
    base, _ = parts.world()
    config = peft.LoraConfig(r=2, target_modules=["qkv"], lora_alpha=4)
    vectors = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(parts.world()[0], config)
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        vectors.append(hatcl.TaskVector.between(base, adapted))
    composer = hatcl.compose(base, vectors)
    assert [b.name for b in composer.blocks] == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    fitted = few_shot(composer, [parts.view("turned", "val")], options={"epochs": 1}, steps=2)
    assert fitted.coefficients.shape == (2, 2) and bool(fitted.coefficients.all())


def test_a_language_model_answers_at_every_token():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    base, other = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    composer = hatcl.compose(base, [hatcl.TaskVector.between(base, other)])
    ids, labels = torch.randint(0, 20, (4, 6)), torch.randint(0, 2, (4,))
    text = r"the model gives logits \[4, 6, 20\] for labels .*, expected \[B, C\] and \[B\]: one answer per example"
    for batches in ([({"input_ids": ids}, labels)], [{"input_ids": ids, "labels": ids}]):
        for validation in (batches, None):
            with pytest.raises(hatcl.errors.ConfigError, match=text):
                few_shot(composer, batches, validation, options={"epochs": 1})
    head = lambda logits: logits[:, -1]  # noqa: E731
    fitted = few_shot(composer, [({"input_ids": ids}, labels)], head=head, options={"epochs": 1})
    assert fitted.epoch == 1
