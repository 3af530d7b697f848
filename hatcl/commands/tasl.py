"""The `hatcl tasl` commands: learn text tasks one after another with LoRA, and look at what came of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from .. import continual
from ..config import HATConfig
from ..continual import folder as kept
from ..continual.options import EVALUATE, LearnOptions
from ..engine import folder as checkpoints
from ..errors import ConfigError
from ..files import complete, sha256_of, write_files
from ..finetuning.prompts import positions_of
from ..functional import RATES
from ..hat.convert import convert
from ..report.skills import draw_overlap, draw_skills
from ..report.tables import matrix_table
from ..skills.scores import SkillScores, localize
from .atlas_run import Bar, absolute, err, out
from .options import chosen, key_values, usable_device

COMMAND, HAT = "command.json", "hat"
FORMS = ("auto", "labels", "seq2seq", "causal")
SKILLS, OVERLAP = "skills.png", "overlap.png"
SHARE = 0.2  # of the units, for the picture of the overlap
DEFAULT = LearnOptions()

app = typer.Typer(
    name="tasl",
    no_args_is_help=True,
    help="Learn text tasks one after another with LoRA: TaSL, I-LoRA and what to compare them with; docs/tasl.md has "
    "the methods.",
)


@app.command("run")
def run_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The base model: a folder of transformers, or a name on its hub.")
    ],
    task: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE",
            help="A task, in the order of learning: its name and a .json or .json.gz file with train, test and dev "
            "lists of pairs of input and output; may be repeated.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--out", help="The run's folder. The same command goes on with what it finds there.")
    ],
    method: Annotated[str, typer.Option(help="How to learn them; see hatcl tasl methods.")] = "tasl",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the method, such as grain=matrix; with hat, of HATConfig. Repeatable.",
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="labels (the nearest label word, for encoders), seq2seq or causal (greedy generation); auto goes by "
            "the model."
        ),
    ] = "auto",
    word: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:LABEL=WORD", help="With labels: the word or phrase for a label of a task; may be repeated."
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Leave out the inputs' first line (the question) and a last 'Answer:'.")
    ] = False,
    train: Annotated[int | None, typer.Option(help="At most so many training examples of each task.")] = None,
    test: Annotated[int | None, typer.Option(help="At most so many test examples of each task.")] = None,
    rank: Annotated[int, typer.Option(help="LoRA's rank r.")] = 8,
    alpha: Annotated[int, typer.Option(help="LoRA's alpha; what is added is scaled by alpha / r.")] = 16,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A module to adapt, such as query; may be repeated. By default peft's for the model."),
    ] = None,
    dropout: Annotated[float, typer.Option(help="LoRA's dropout.")] = 0.0,
    max_input: Annotated[
        int, typer.Option(help="Tokens of an input, at most what the model takes; longer is cut.")
    ] = 256,
    max_output: Annotated[int, typer.Option(help="Tokens of an output, in generation.")] = 32,
    epochs: Annotated[int, typer.Option(help="Passes over each task.")] = DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = DEFAULT.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = DEFAULT.lr,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = DEFAULT.weight_decay,
    schedule: Annotated[str, typer.Option(help="constant, linear, or cosine, per task.")] = DEFAULT.schedule,
    warmup: Annotated[float, typer.Option(help="Share of a task's steps in which the rate rises.")] = DEFAULT.warmup,
    clip: Annotated[float, typer.Option(help="Clip the gradients' norm, 0 = off.")] = DEFAULT.clip,
    evaluate: Annotated[
        str, typer.Option(help="After each task score the tasks so far and the next one, or all.")
    ] = DEFAULT.evaluate,
    seed: Annotated[int, typer.Option(help="Of LoRA's start, the order of examples, and what the method draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto",
) -> None:
    """Learn tasks one after another with one LoRA adapter, and score all after each.

    After each task its adapter is written in peft's own format, with the scores of its units. Scored is accuracy, or
    joint goal accuracy for dialogue state tracking. The same command goes on after the last finished task.
    """
    chosen("--method", method, list(continual.list_continual_methods()))
    chosen("--form", form, FORMS)
    chosen("--schedule", schedule, RATES)
    chosen("--evaluate", evaluate, EVALUATE)
    where = usable_device(device)
    options = LearnOptions(
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, schedule=schedule, warmup=warmup,
        clip=clip, evaluate=evaluate, seed=seed,
    )  # fmt: skip
    settings = key_values("--set", set_)
    gates = HATConfig.from_dict(settings) if method == HAT else None
    chosen_method = continual.make_method(method, None if gates else settings)
    paths = _tasks(task)
    words = _words(word, list(paths))
    given = {n: v for n, v in context.params.items() if n not in ("output", "device")}
    folder = Path(model)
    command = {
        **given,
        "model": absolute(folder) if folder.exists() else model,
        "task": {n: {"file": absolute(p), "sha256": sha256_of(p)} for n, p in paths.items()},
    }
    _same_command(output, command)
    data = {n: continual.read_texts(p).cut(train, test) for n, p in paths.items()}
    if plain:
        data = {n: d.plain() for n, d in data.items()}
    adapted, tokenizer, form = _model(model, form, seed, rank, alpha, target, dropout)
    adapted.to(where)
    tasks = [_task(form, n, d, adapted, tokenizer, words.get(n), max_input, max_output) for n, d in data.items()]
    if gates is not None:
        adapted = convert(adapted, len(tasks), _example(tasks[0]), config=gates)
    stages = chosen_method.stages(len(tasks))
    total = sum(options.epochs * -(-len(t.train) // options.batch_size) for t in tasks)
    fresh = not (output / COMMAND).exists()
    checkpoints.write_json(output / COMMAND, command)
    try:
        with Bar(total, "steps") as bar:
            tell = _Telling(bar, stages, tasks, options)
            result = continual.learn_sequence(adapted, tasks, chosen_method, options, folder=output, on_progress=tell)
    except Exception:
        if fresh and not (output / checkpoints.CONFIG).exists():
            (output / COMMAND).unlink(missing_ok=True)
        raise
    except KeyboardInterrupt:
        err.print("\nstopped. The same command goes on after the last finished task")
        raise typer.Exit(130) from None
    _show(output, result)


@app.command("show")
def show_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    share: Annotated[float, typer.Option(help="Share of the units that count as a task's skill.")] = SHARE,
) -> None:
    """The scores and measures of a run, finished or not, and pictures of the skills where it has scores of units."""
    if (run / kept.RESULT).exists():
        content = checkpoints.read_json(run / kept.RESULT)
    else:
        at = complete(run / kept.CHECKPOINT) / kept.PROGRESS
        if not at.exists():
            raise ConfigError(f"{run}: holds no run of hatcl tasl (no {kept.RESULT}, no {kept.CHECKPOINT}/)")
        content = checkpoints.read_json(at)["result"]
    _show(run, continual.SequenceResult.from_dict(content), share)


@app.command("methods")
def methods_command() -> None:
    """The methods, with their options (for --set) and where they are from."""
    for name, kind in continual.list_continual_methods().items():
        method = kind()
        out.print(f"{name}", style="bold", end="")
        out.print(f"  {(kind.__doc__ or '').split('.')[0].split(';')[0].strip()} ({kind.paper})", soft_wrap=True)
        for field in dataclasses.fields(method.options):
            out.print(f"    {field.name} = {_literal(getattr(method.options, field.name))}", soft_wrap=True)


# --- reading ---


def _tasks(specs: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--task: got {spec!r}, expected NAME=FILE")
        if name in found:
            raise ConfigError(f"--task: two are named {name!r}")
        if not Path(path).is_file():
            raise ConfigError(f"--task: {name}: there is no file {path}")
        found[name] = Path(path)
    return found


def _words(specs: Sequence[str] | None, names: list[str]) -> dict[str, dict[str, str]]:
    """Per task, label -> word."""
    found: dict[str, dict[str, str]] = {}
    for spec in specs or ():
        head, equals, value = spec.partition("=")
        name, colon, label = head.partition(":")
        if not equals or not colon or not value:
            raise ConfigError(f"--word: got {spec!r}, expected NAME:LABEL=WORD")
        found.setdefault(chosen("--word", name, names), {})[label] = value
    return found


def _model(
    model: str, form: str, seed: int, rank: int, alpha: int, target: list[str] | None, dropout: float
) -> tuple[Any, Any, str]:
    """The base model with a new adapter, its tokenizer, and the form of its tasks."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise ConfigError(f"hatcl tasl needs {error.name}; run: pip install 'hatcl[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        if form == "auto":
            names = " ".join(config.architectures or ())
            form = "seq2seq" if config.is_encoder_decoder else "causal" if "CausalLM" in names else "labels"
            form = "causal" if "LMHead" in names and not config.is_encoder_decoder else form
        kinds = {
            "labels": transformers.AutoModel,
            "seq2seq": transformers.AutoModelForSeq2SeqLM,
            "causal": transformers.AutoModelForCausalLM,
        }
        base = kinds[form].from_pretrained(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{model}: transformers cannot load it as {form} ({str(error).splitlines()[0]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(seed)
    try:
        lora = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target or None)
        return peft.get_peft_model(base, lora), tokenizer, form
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ConfigError(
            f"--target, --rank: peft cannot adapt this model ({str(error).splitlines()[0]}); it has the linear modules "
            f"{', '.join(linear)}"
        ) from error


def _task(
    form: str,
    name: str,
    data: continual.TextData,
    model: Any,
    tokenizer: Any,
    words: Mapping[str, str] | None,
    max_input: int,
    max_output: int,
) -> continual.ContinualTask:
    most = None if form == "seq2seq" else positions_of(model)
    if most is not None:
        room = most - (max_output if form == "causal" else 0)
        if room < 1:
            raise ConfigError(f"--max-output: got {max_output}, but the model has {most} positions, input included")
        max_input = min(max_input, room)
    if form == "labels":
        labels = {y: (words or {}).get(y, y) for y in data.labels}
        unknown = [y for y in words or {} if y not in labels]
        if unknown:
            raise ConfigError(f"--word: {name} has no label {unknown[0]!r}; it has {', '.join(labels)}")
        return continual.label_word_task(name, data, model, tokenizer, labels=labels, max_length=max_input)
    if words:
        raise ConfigError("--word: only with --form labels")
    make = {"seq2seq": continual.seq2seq_task, "causal": continual.causal_task}[form]
    return make(name, data, tokenizer, max_input=max_input, max_output=max_output)


def _example(task: continual.ContinualTask) -> dict[str, Any]:
    """What the model's forward takes, for the trace."""
    batch = task.collate(list(task.train[:2]))
    return dict(batch[0] if isinstance(batch, tuple) else batch)


def _same_command(folder: Path, command: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the folder holds a run of another command."""
    path = folder / COMMAND
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {folder} is a file, expected a folder")
    if not path.exists():
        if (folder / checkpoints.CONFIG).exists():
            raise ConfigError(f"--out: {folder} holds something else than a run of hatcl tasl; name another folder")
        return
    stored = checkpoints.read_json(path)
    now = json.loads(json.dumps(command))
    for name in sorted({*stored, *now}):
        if stored.get(name) != now.get(name):
            flag = {"set_": "set"}.get(name, name).replace("_", "-")
            raise ConfigError(
                f"--out: the run in {folder} was started with --{flag} {stored.get(name)}, now came {now.get(name)}; "
                "give the same options to go on with it, or name another folder"
            )


# --- showing ---


class _Telling:
    """Steps into the bar; without a terminal, a line per score."""

    def __init__(
        self, bar: Bar, stages: list[list[int]], tasks: list[continual.ContinualTask], options: LearnOptions
    ) -> None:
        self.bar, self.tasks = bar, tasks
        steps = [sum(options.epochs * -(-len(tasks[i].train) // options.batch_size) for i in some) for some in stages]
        self.before = [sum(steps[:k]) for k in range(len(steps) + 1)]

    def __call__(self, at: continual.Progress) -> None:
        word = f"{at.task}: {'loss' if at.doing == 'learning' else 'score'} {at.value:.4f}"
        if at.doing == "learning":
            self.bar.progress.update(self.bar.bar, completed=self.before[at.stage] + at.step, description=word)
        elif at.doing == "scoring" and not out.is_terminal:
            when = "before learning" if at.stage < 0 else f"stage {at.stage}"
            out.print(f"{when}, {word}", soft_wrap=True)


def _show(folder: Path, result: continual.SequenceResult, share: float = SHARE) -> None:
    names = result.tasks
    out.print(matrix_table(result.rows, names))
    for j, name in enumerate(names):
        out.print(f"task {j}  {name}", style="dim", soft_wrap=True)
    if len(result.rows) == len(names):
        table = Table(box=box.SIMPLE_HEAD, title=f"{result.method}, in %", title_justify="left")
        for column in ("average", "FWT", "BWT", "zero-shot"):
            table.add_column(column, justify="right")
        shown = ("average_accuracy", "forward_transfer", "backward_transfer", "zero_shot_transfer")
        table.add_row(*(_percent(result.measures[n]) for n in shown))
        out.print(table)
    else:
        out.print(f"{len(result.rows)} of {len(names)} tasks are learned", style="yellow")
    scores = {}
    for i, name in enumerate(names):
        path = folder / kept.TASKS / kept.task_folder(i, name) / "scores.safetensors"
        if path.exists():
            scores[name] = SkillScores.load(path)
    if scores:
        skills = {n: localize(s, share) for n, s in scores.items()}
        try:
            write_files({folder / SKILLS: draw_skills(scores), folder / OVERLAP: draw_overlap(skills)})
            out.print(f"{folder / SKILLS}, {folder / OVERLAP}", style="dim", soft_wrap=True)
        except ConfigError as error:
            out.print(f"no picture: {error}", style="yellow", soft_wrap=True)
    out.print(str(folder), style="dim", soft_wrap=True)


def _percent(value: float) -> str:
    return "·" if value != value else f"{100 * value:.1f}"


def _literal(value: Any) -> str:
    return repr(dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value)
