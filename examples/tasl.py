"""Three text tasks, one LoRA adapter: plain training forgets; TaSL finds the pairs that each needs and merges."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from hatcl.continual import ContinualTask, learn_sequence
from hatcl.skills.scores import SkillScores, localize, skill_overlap

config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
lora = LoraConfig(r=4, target_modules=r".*layer\..*(query|value|dense)")


def task(name: str, seed: int) -> ContinualTask:  # from which of two halves of the words is a text drawn?
    g = torch.Generator().manual_seed(seed)
    halves, y = torch.randperm(40, generator=g).view(2, 20), torch.arange(160) % 2
    x = halves[y.unsqueeze(1), torch.randint(20, (160, 6), generator=g)]
    head = torch.nn.functional.normalize(torch.randn(32, 2, generator=g), dim=0)  # its own and fixed

    def logits(model, rows):
        return 5 * model(input_ids=x[rows]).last_hidden_state.mean(1) @ head

    def score(model):
        return float((logits(model, slice(96, None)).argmax(1) == y[96:]).float().mean())

    def loss(model, rows):
        return torch.nn.functional.cross_entropy(logits(model, rows), y[rows])

    return ContinualTask(name, range(96), torch.tensor, loss, score)


for method in ("sequential", "tasl"):
    torch.manual_seed(0)
    model = get_peft_model(BertModel(config), lora)
    tasks = [task(f"t{i}", i) for i in range(3)]
    result = learn_sequence(model, tasks, method, {"epochs": 6, "lr": 2e-2}, folder=f"run_{method}")
    print(method, result.matrix.round(2).tolist(), result.measures)
first, last = (localize(SkillScores.load(f"run_tasl/tasks/{i}_t{i}/scores.safetensors")) for i in (0, 2))
print("share of the last task's skill that the first has too:", skill_overlap(first, last))
