"""A task as a smaller model: time and size at a half, a third and a quarter of the units, compared with the plain
model.

    python benchmarks/extract.py [--models resnet50 vit_small_patch16_224 bert] [--rounds 7] [--batch 8]
    python benchmarks/extract.py --zoo ['hf/*' 'test_*'] [--max-params 30e6]

The networks have random weights and evenly spaced units (every second, third or fourth of each layer), and run on a CPU
with OMP_NUM_THREADS threads. The smaller models and the plain one take turns, round by round; the result is the median
of the rounds. `quantised`: linear layers in 8 bits (torch.ao, dynamic). `onnxruntime`: the exported program.
`difference` compares each of them with the module.

`--zoo`: the smallest model of each family of the zoo (or the named models), each unit on with probability 1/2, and
noise on the parameters. No model learns here (`hatcl zoo` does that). Results that are already there are kept.
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
from common import read, save
from torch import nn

import hatcl
from hatcl.calls import call, values_of
from hatcl.hat import digests
from hatcl.hat.gates import gates_of
from hatcl.zoo import catalog
from hatcl.zoo.page import known_models

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


def smallest_of_families(max_params: float) -> list[str]:
    best: dict[str, tuple[int, str]] = {}
    for name, row in known_models().items():
        if row["parameters"] <= max_params:
            best[row["family"]] = min(best.get(row["family"], (1 << 60, "")), (row["parameters"], name))
    return [name for _, name in sorted(best.values())]


def cut_one(name: str) -> dict[str, Any]:
    plain, inputs = catalog.known(name).make()
    model = hatcl.convert(plain.eval(), 1, inputs, verify=False)
    gates, draw = gates_of(model)[0], torch.Generator().manual_seed(0)
    for p in (p for n, p in model.named_parameters() if "hat_gates" not in n):
        p.add_(torch.randn(p.shape, generator=draw) * 0.02)
    gates.embeddings[0].copy_(torch.where(torch.rand(gates.num_units, generator=draw) < 0.5, 6.0, -6.0))
    gates.seal(0)
    digests.record(model, 0)
    began = time.process_time()
    report = hatcl.extract_task(model, 0, inputs).report
    return {
        "elements": report.kept / report.total, "difference": report.difference, "units": report.units, "on": report.on,
        "multiply_adds": report.multiply_adds / max(report.multiply_adds_before, 1), "full": report.full,
        "seconds": time.process_time() - began,
    }  # fmt: skip


def over_the_zoo(patterns: list[str], max_params: float) -> None:
    names = [n for p in patterns for n in catalog.find(p)] if patterns else smallest_of_families(max_params)
    rows = read("extract_zoo").get("models", {})
    for name in (n for n in names if n not in rows):
        try:
            rows[name] = cut_one(name)
            print(f"{name:40} {rows[name]['elements']:.3f} {rows[name]['difference']:.0e} {len(rows[name]['full'])}")
        except Exception as error:
            rows[name] = {"failure": f"{type(error).__name__}: {error}"}
            print(f"{name:40} {rows[name]['failure'][:200]}")
        save("extract_zoo", {"models": rows})
    passed = [r for r in rows.values() if "failure" not in r]
    print(f"{len(passed)} of {len(rows)}; median elements {statistics.median(r['elements'] for r in passed):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_small_patch16_224", "bert"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--zoo", nargs="*")
    parser.add_argument("--max-params", type=float, default=30e6)
    args = parser.parse_args()
    if args.zoo is not None:
        with torch.no_grad():
            over_the_zoo(args.zoo, args.max_params)
        return
    with torch.no_grad():
        result = {name: measure(name, args.batch, args.rounds) for name in args.models}
    for name, rows in result.items():
        for part, row in rows.items():
            print(f"{name:24} {part:16} time {row['time']:.3f} elements {row.get('elements', 1):.3f}")
    save("extract", {"batch": args.batch, "rounds": args.rounds, "models": result})


if __name__ == "__main__":
    main()
