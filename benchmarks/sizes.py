"""Time and memory of everything but training steps: converting, sealing, certifying, forgetting, saving a model.

    python benchmarks/sizes.py                                   # ViT-B/16, one image, in float32
    python benchmarks/sizes.py --case llama --layers 16 --width 2048   # a Llama-like model in bfloat16
    python benchmarks/sizes.py --case tasks                      # 100 tasks on one small network

Each row runs in its own process. Time is CPU time of one thread, in units of one forward of the plain model in the same
process (median of four). Memory is the peak of the process above its memory before, in copies of the plain model's
weights. For `convert` the source is not included (with `inplace=True` the source itself is converted).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import save
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl
from hatcl.calls import call
from hatcl.hat.gates import gates_of

ROWS = ("convert", "convert unverified", "convert inplace", "seal", "certify", "forget", "save")


def vit(options: argparse.Namespace) -> tuple[nn.Module, Any]:
    import timm

    return timm.create_model(options.model, num_classes=10).eval(), torch.randn(options.batch, 3, 224, 224)


def llama(options: argparse.Namespace) -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=4 * options.width,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
        num_key_value_heads=max(options.width // 256, 1), max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).eval()
    return model, {"input_ids": torch.randint(0, options.vocabulary, (options.batch, 16))}


CASES: dict[str, Callable[[argparse.Namespace], tuple[nn.Module, Any]]] = {"vit": vit, "llama": llama}


def resident() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


class Peak:
    """The highest anonymous memory of this process while it is entered, above what it was."""

    def __enter__(self) -> Peak:
        self.start = self.top = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.top = max(self.top, resident())

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self.top = max(self.top, resident())


def clocked(work: Callable[[], Any]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def learned(model: nn.Module, x: Any) -> nn.Module:
    """A model with task 0 sealed on half of the units, without any training."""
    gates = gates_of(model)[0]
    on = torch.rand(gates.num_units, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        gates.embeddings[0].copy_(gates.embedding_of(on))
    hatcl.seal(model, 0)
    return model


def child(row: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = CASES[options.case](options)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        forward = statistics.median(clocked(lambda: call(model, x)) for _ in range(4))
    if row.startswith("convert"):
        more = {"convert unverified": {"verify": False}, "convert inplace": {"inplace": True}}.get(row, {})
        work = lambda: hatcl.convert(model, 3, x, **more)  # noqa: E731
    else:
        model = hatcl.convert(model, 3, x, verify=False).eval()
        if row != "seal":
            learned(model, x)
        scratch = tempfile.TemporaryDirectory()
        work = {
            "seal": lambda: learned(model, x),
            "certify": lambda: hatcl.certify(model, x, strict=True),
            "forget": lambda: hatcl.forget_task(model, 0),
            "save": lambda: hatcl.save_pretrained(model, scratch.name),
        }[row]
    with Peak() as peak:
        seconds = clocked(work)
    print(
        json.dumps(
            {
                "seconds": seconds, "forward_seconds": forward, "forwards": seconds / forward,
                "copies": (peak.top - peak.start) / size, "parameters": size,
                "peak_gigabytes": peak.top / 1e9,
            }
        )
    )  # fmt: skip


def tasks(options: argparse.Namespace) -> dict[str, Any]:
    """A small network with room for 100 tasks: the CPU time of the optimizer's guarded step under each, and the bytes
    that a task adds to the state dict."""
    torch.manual_seed(0)
    count, x = 100, torch.randn(64, 128)
    y = torch.randint(0, 10, (64,))
    net = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    model = hatcl.convert(net, count, x, config={"masks": "array:10"})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    steps: list[float] = []
    for t in range(count):
        with hatcl.learn(model, t, optimizer, steps=20) as learning:
            taken = []
            for _ in range(20):
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + learning.penalty()).backward()
                taken.append(clocked(optimizer.step))
        steps.append(statistics.median(taken))
    return {"step": steps, **bytes_of(model)}


def bytes_of(model: nn.Module) -> dict[str, Any]:
    gates = gates_of(model)[0]
    state: dict[str, Tensor] = model.state_dict()
    of_gates: dict[str, float] = {}
    for name, t in gates.state_dict().items():
        kind = name.partition(".")[0]
        of_gates[kind] = of_gates.get(kind, 0.0) + t.numel() * t.element_size() / gates.num_tasks
    copies = sum(t.numel() * t.element_size() for n, t in state.items() if "hat_tasks." in n) / gates.num_tasks
    return {"units": gates.num_units, "bytes_per_task": {"copies": copies, **of_gates}}


def measured(row: str, options: argparse.Namespace) -> dict[str, Any]:
    given = [f"--{n}={v}" for n, v in vars(options).items() if n not in ("rows", "lora", "name", "child")]
    command = [sys.executable, __file__, *given, "--child", row, *(["--lora"] if options.lora else [])]
    # every large tensor in pages of its own, so that what is freed is given back at once
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "2097152",
        "MALLOC_TRIM_THRESHOLD_": "2097152",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path.cwd())
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "tasks"], default="vit")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm name, for --case vit")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--lora", action="store_true", help="gates over LoRA pairs, for --case llama")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=ROWS)
    parser.add_argument("--name", help="write benchmarks/results/sizes_<name>.json")
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, options)
    result: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k not in ("child", "name")}}
    if options.case == "tasks":
        result |= tasks(options)
        print(json.dumps(result, indent=1))
    for row in options.rows if options.case != "tasks" else ():
        result[row] = measured(row, options)
        print(row, json.dumps(result[row]), flush=True)
    if options.name:
        save(f"sizes_{options.name}", result)


if __name__ == "__main__":
    main()
