"""`hatcl zoo`: prove one by one which models convert."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..engine.folder import write_json
from ..errors import ConfigError
from ..files import read_json, write_files
from ..report.tables import known_table, zoo_line
from ..zoo import catalog, page
from ..zoo.run import prove_all
from ._command import Answer, command
from ._console import Bar, out, say

RESULTS = Path("benchmarks/results/zoo.json")


@command("zoo")
def zoo(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help="Models to prove: timm names, torchvision/NAME or hf/NAME, with wildcards."),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Only models of this family: timm's module, such as resnet.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All models of the catalog.")] = False,
    max_params: Annotated[float, typer.Option(help="Leave out larger models, such as 2e6.")] = math.inf,
    results: Annotated[
        Path, typer.Option(help="The file for the figures; models that it holds are not run again.")
    ] = RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Also run the models that --results holds.")] = False,
    seconds: Annotated[float, typer.Option(help="Limit for one model, in seconds.")] = 900.0,
    memory: Annotated[float, typer.Option(help="Limit for one model, in GB.")] = 16.0,
    publish: Annotated[
        bool, typer.Option("--publish", help="In a checkout: write docs/zoo.md and the list that ships with hatcl.")
    ] = False,
) -> Any:
    """List the models that are known to convert, or prove some.

    Each is converted, learns two tasks, is attacked, saved and loaded, in processes of its own.
    """
    if not patterns and family is None and not every:
        if publish:
            _publish(results)
        else:
            out.print(known_table(page.known_models()))
        return page.known_models()
    found = {pattern: catalog.find(pattern, family) for pattern in patterns or ["*"]}
    for pattern, matches in found.items():
        if not matches:
            where = f" in family {family!r}" if family else ""
            raise ConfigError(f"no model matches {pattern!r}{where}; see hatcl list and try a wider pattern")
    names = list(dict.fromkeys(name for matches in found.values() for name in matches))
    if max_params < math.inf:
        names = [name for name in names if catalog.parameters(name) <= max_params]
        if not names:
            raise ConfigError(f"--max-params {max_params:,.0f} parameters: all matching models are larger")
    rows: dict[str, Any] = {}
    with Bar(len(names), "models", "") as bar:
        run = prove_all(names, results, seconds=seconds, memory_gb=memory, again=again)
        for name in names:
            bar.says(name)
            _, rows[name] = next(run)
            say(zoo_line(name, rows[name]))
            bar.advance()
    failed = sum(not row["passed"] for row in rows.values())
    say(f"{len(names) - failed} of {len(names)} passed; figures in {results}")
    if publish:
        _publish(results)
    return Answer(rows) if failed else rows


def _publish(results: Path) -> None:
    if not page.KNOWN.resolve().is_relative_to(Path.cwd().resolve()):
        raise ConfigError("--publish writes docs/zoo.md; run it in a checkout of hatcl")
    if not results.exists():
        raise ConfigError(f"--publish: there is no {results} yet; prove some models first, such as hatcl zoo 'test_*'")
    models = read_json(results)["models"]
    write_files({Path("docs/zoo.md"): page.to_page(models).encode()})
    write_json(page.KNOWN, page.to_known(models))
