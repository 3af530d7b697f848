"""I-LoRA: two tasks, one LoRA adapter that learns and one that follows slowly. Tiny random BERT, no download.

Needs transformers and peft: pip install -e '.[hf]'
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from hatcl.skills import ILoRA, ILoRAConfig

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
bert = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=2, **sizes))
model = get_peft_model(bert, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
words = [torch.randint(0, 100, (64, 8)) for _ in range(2)]
tasks = [{"input_ids": w, "labels": w[:, 5 * t] // 50} for t, w in enumerate(words)]  # is the word at a place above 50?


@torch.no_grad()
def accuracies():
    return [f"{(model.eval()(**task).logits.argmax(1) == task['labels']).float().mean():.0%}" for task in tasks]


ilora = ILoRA(model, ILoRAConfig(ema_alpha=0.95, current_task_id="first"), replay=1.0)
for task in tasks:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with ilora.watch(optimizer):  # the stable adapter follows after each step
        for _ in range(60):
            loss = model.train()(**task).loss + ilora.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ilora.remember({"input_ids": ids, "labels": y} for ids, y in zip(*task.values(), strict=True))
    print("saved in", ilora.save("runs/ilora"), "plastic:", accuracies())
    with ilora.stable_active():
        print("stable:", accuracies())
    ilora.next_task("second")
