"""A Hugging Face model: tiny random BERT, two tasks with different numbers of classes. No hub, no download.

Needs transformers: pip install -e '.[hf]'
"""

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import hatcl

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
bert = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=3, **sizes))
batch = {"input_ids": torch.randint(0, 100, (32, 12)), "attention_mask": torch.ones(32, 12, dtype=torch.long)}
goals = [batch["input_ids"][:, 1] % 2, batch["input_ids"][:, 1] % 3]

model = hatcl.convert(bert, num_tasks=2, example_inputs=batch, num_classes=[2, 3])
print(hatcl.describe(model))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for t, y in enumerate(goals):
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=60) as learning:
        model.train()
        for _ in range(60):
            loss = F.cross_entropy(model(**batch).logits, y) + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    out = model(**batch).logits
    print(f"task {t}: {out.shape[1]} classes, {(out.argmax(1) == y).float().mean():.0%} of the training batch")
print(hatcl.certify(model, batch, strict=True))

# the config is saved along, so nothing else is needed to make the model again
again = hatcl.from_pretrained(hatcl.save_pretrained(model, "runs/bert"))
with hatcl.task(model.eval(), 0), hatcl.task(again, 0):
    print("loaded: same logits", torch.equal(model(**batch).logits, again(**batch).logits))
