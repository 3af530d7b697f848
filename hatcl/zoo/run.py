"""Proofs of many models, each in its own processes, so that a crash in one cannot stop the others."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch

from ..engine.folder import read_json, write_json
from . import catalog, proof

Row = dict[str, Any]  # family, passed; then the figures of `proof.Proof`, or the failure


def prove_all(
    names: Iterable[str], results: Path, *, seconds: float = 600.0, memory_gb: float = 16.0, again: bool = False
) -> Iterator[tuple[str, Row]]:
    """Prove models one after another and write each row into `results` as soon as it is known.

    Args:
        results: a JSON file. Models that it already holds are yielded unchanged, so that an interrupted run resumes.
        seconds, memory_gb: the limits for one model; exceeding them counts as a failure of this model.
        again: also prove the models that `results` holds.
    """
    content = read_json(results) if results.exists() else {"models": {}}
    for name in names:
        row = content["models"].get(name)
        if row is None or again:
            row = prove_one(name, seconds=seconds, memory_gb=memory_gb)
            content["machine"] = {
                "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
            }  # fmt: skip
            content["models"] = dict(sorted({**content["models"], name: row}.items()))
            write_json(results, content)
        yield name, row


def prove_one(name: str, *, seconds: float = 600.0, memory_gb: float = 16.0) -> Row:
    """`proof.prove` for a model of the catalog, and `proof.reload` in a second process."""
    family = catalog.known(name).family
    with tempfile.TemporaryDirectory() as folder:
        figures, failure = isolated(_prove, name, folder, seconds=seconds, memory_gb=memory_gb)
        if failure is None:
            _, failure = isolated(_reload, name, folder, seconds=seconds, memory_gb=memory_gb)
    if failure is not None:
        return {"family": family, "passed": False, "failure": failure}
    return {"family": family, "passed": True, **(figures or {})}


def isolated(
    work: Callable[..., Any], *args: Any, seconds: float, memory_gb: float
) -> tuple[Any, None] | tuple[None, str]:
    """Run `work(*args)` in its own process. Returns its value, or the reason why there is none."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":  # the libraries are imported once
        context.set_forkserver_preload([__name__, "transformers.modeling_utils", "transformers.generation"])
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_inside, args=(theirs, memory_gb, work, args), daemon=True)
    process.start()
    theirs.close()
    try:
        if not mine.poll(seconds):
            return None, f"timeout: took more than {seconds:g} s"
        value, failure = mine.recv()
        return (value, None) if failure is None else (None, failure)
    except EOFError:
        process.join()
        return None, f"crash: the process ended with code {process.exitcode} (limit {memory_gb:g} GB)"
    finally:
        process.kill()
        process.join()
        mine.close()


def _inside(pipe: Connection, memory_gb: float, work: Callable[..., Any], args: tuple) -> None:
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(BrokenPipeError):  # the parent no longer waits
        try:
            pipe.send((work(*args), None))
        except BaseException as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))


def _prove(name: str, folder: str) -> Row:
    model = catalog.known(name)
    return dataclasses.asdict(proof.prove(*model.make(), Path(folder), model.recipe))


def _reload(name: str, folder: str) -> None:
    proof.reload(Path(folder), lambda: catalog.known(name).make()[0])
