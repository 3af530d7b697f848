"""A task as a smaller model: time and size at a half, a third and a quarter of the units, beside the plain model.

    python benchmarks/extract.py [--models resnet50 vit_small_patch16_224 bert] [--rounds 7] [--batch 8]

Random weights, evenly spaced units (of each layer every second, third, fourth), CPU, one thread per OMP_NUM_THREADS.
The smaller models and the plain one run in turn, round by round; the median of the rounds counts. `quantised`: linear
layers in 8 bits (torch.ao, dynamic). `onnxruntime`: the exported program; `agrees` compares it with the module.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from common import save
from torch import nn

import hatcl
from hatcl.calls import call, values_of
from hatcl.hat import digests
from hatcl.hat.gates import gates_of

PARTS = (2, 3, 4)


def make(name: str, batch: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == "bert":
        import transformers

        config = transformers.BertConfig(attn_implementation="sdpa", num_labels=2)
        return transformers.BertForSequenceClassification(config), {"input_ids": torch.randint(1, 30000, (batch, 128))}
    return timm.create_model(name, num_classes=10), torch.randn(batch, 3, 224, 224)


def seal_evenly(model: nn.Module) -> None:
    """Task t gets every PARTS[t]-th unit of each layer, from the t-th on, as if it had learned to."""
    gates = gates_of(model)[0]
    for t, part in enumerate(PARTS):
        on = torch.zeros(gates.num_units, dtype=torch.bool)
        for _, start, stop in gates.layers:
            on[start:stop:part] = True
        with torch.no_grad():
            gates.embeddings[t].copy_(torch.where(on, 6.0, -6.0))
        gates.seal(t)
        digests.record(model, t)


def seconds(run: Callable[[], object]) -> float:
    """Of processor time, which a busy machine hardly changes; with one thread it is the time that a run takes."""
    began = time.process_time()
    run()
    return time.process_time() - began


def file_size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def in_eight_bits(found: hatcl.Extracted, inputs: Any) -> Callable[[], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(found.model), {nn.Linear}, torch.qint8)
    return lambda: call(quantised, inputs)


def in_onnxruntime(found: hatcl.Extracted, inputs: Any) -> tuple[Callable[[], Any], int]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = found.save(folder, "onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path.read_bytes(), options)
        feed = inputs if isinstance(inputs, dict) else {session.get_inputs()[0].name: inputs}
        arrays = {n: x.numpy() for n, x in feed.items()}
        return lambda: session.run(None, arrays)[0], Path(path).stat().st_size


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    plain, inputs = make(name, batch)
    few = {n: x[:2] for n, x in inputs.items()} if isinstance(inputs, dict) else inputs[:2]
    model = hatcl.convert(plain.eval(), len(PARTS), few, verify=False)
    seal_evenly(model)
    runs: dict[str, Callable[[], object]] = {"plain": lambda: call(plain, inputs)}
    rows: dict[str, dict[str, Any]] = {"plain": {"bytes": file_size(plain.state_dict())}}
    for t, part in enumerate(PARTS):
        began = time.perf_counter()
        found = hatcl.extract_task(model, t, few)
        report = found.report
        row = rows[f"1/{part}"] = {
            "seconds_to_extract": time.perf_counter() - began, "elements": report.kept / report.total,
            "multiply_adds": report.multiply_adds / report.multiply_adds_before, "difference": report.difference,
            "units": report.units, "on": report.on, "full": report.full, "bytes": file_size(found.model.state_dict()),
        }  # fmt: skip
        runs[f"1/{part}"] = lambda small=found.model: call(small, inputs)
        if part == 3:
            runs["1/3 quantised"] = in_eight_bits(found, inputs)
            runs["1/3 onnxruntime"], row["onnx_bytes"] = in_onnxruntime(found, inputs)
            want = next(iter(values_of(call(found.model, inputs)).values()))
            for kind in ("quantised", "onnxruntime"):
                got = runs[f"1/3 {kind}"]()
                got = torch.from_numpy(got) if kind == "onnxruntime" else next(iter(values_of(got).values()))
                rows[f"1/3 {kind}"] = {"difference": float((got - want).abs().max() / want.abs().max())}
    took: dict[str, list[float]] = {n: [] for n in runs}
    for _ in range(rounds):
        for n, run in runs.items():
            took[n].append(seconds(run))
    for n, times in took.items():
        rows[n]["seconds"] = statistics.median(times)
        rows[n]["time"] = statistics.median(t / p for t, p in zip(times, took["plain"], strict=True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_small_patch16_224", "bert"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    with torch.no_grad():
        result = {name: measure(name, args.batch, args.rounds) for name in args.models}
    for name, rows in result.items():
        for part, row in rows.items():
            print(f"{name:24} {part:16} time {row['time']:.3f} elements {row.get('elements', 1):.3f}")
    save("extract", {"batch": args.batch, "rounds": args.rounds, "models": result})


if __name__ == "__main__":
    main()
