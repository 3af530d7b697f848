"""transformers' Trainer: a small ViT learns three pairs of digits and forgets none.

Needs transformers, accelerate and scikit-learn: pip install -e '.[hf,data]'
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Subset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import hatcl
from hatcl.integrations.trainer import HATTrainer

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
examples = [{"pixel_values": x, "labels": int(y) % 2} for x, y in zip(images, digits.target, strict=True)]

sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=2, **sizes))
model = hatcl.convert(vit, num_tasks=3, example_inputs=images[:2])

with tempfile.TemporaryDirectory() as folder:
    for task in range(3):
        chosen = [i for i, y in enumerate(digits.target) if y in (2 * task, 2 * task + 1)]
        args = TrainingArguments(
            f"{folder}/{task}", per_device_train_batch_size=32, num_train_epochs=15, learning_rate=3e-3,
            save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True, disable_tqdm=True, report_to=[],
        )  # fmt: skip
        learned, held_out = Subset(examples, chosen[::2]), Subset(examples, chosen[1::2])
        trainer = HATTrainer(model=model, task=task, args=args, train_dataset=learned, eval_dataset=held_out)
        trainer.train()  # and train(resume_from_checkpoint=True) after an interruption
        said = trainer.predict(held_out)
        print(f"task {task}: {(said.predictions.argmax(-1) == said.label_ids).mean():.1%} of the images held out")
print(hatcl.certify(model, images[:8], strict=True))
