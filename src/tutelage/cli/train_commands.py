"""The commands `tutelage train` and `tutelage teach`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.loading import loading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.config.teacher_config import TeachConfig
    from tutelage.models.devices import Hardware
    from tutelage.run_directory import RunDirectory

_REPLACED = re.compile(r"(name|teacher|objective\.(alpha|gate|mixing))(\.[\w.]+)?=")
"""Settings that the same student without a teacher gets others of."""

PlanOnly = Annotated[
    bool, typer.Option("--plan", help="train nothing; say what memory, time and disk it takes, by formula")
]
PlannedDevice = Annotated[
    str | None,
    typer.Option(help="plan for h100, a100, l40s, ... which need not be here; default: this machine"),
]
PlannedDevices = Annotated[
    int | None, typer.Option(min=1, help="plan for so many; default: parallel.processes")
]


def train(
    config: Annotated[Path, typer.Argument(help="run file (YAML); `tutelage init run` writes one")],
    more: Annotated[
        list[str] | None,
        typer.Argument(help="settings to change, and further run files", metavar="KEY=VALUE | CONFIG"),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc", min=1, help="processes on this machine, one per GPU; default: parallel.processes"
        ),
    ] = None,
    plan: PlanOnly = False,
    device: PlannedDevice = None,
    devices: PlannedDevices = None,
) -> None:
    """Train one model, with or without a teacher, and score it. After a stop the same command resumes.

    Several run files train together as a cohort: students that read the same batches and share a teacher,
    which then computes its targets once for all of them. Each gets the result it would have alone.

    Several GPUs: --nproc N, or processes that torchrun (`torchrun --nproc-per-node N -m tutelage train
    RUN.yaml`) or srun started, on one machine or many.

    Will it fit, and how long will it take? --plan; for devices that are not here: --device h100 --devices 8
    """
    from tutelage import agreement, processes
    from tutelage.config.load import load
    from tutelage.config.run_config import RunConfig
    from tutelage.errors import UserError

    if not plan and (device is not None or devices is not None):
        raise UserError(
            "--device and --devices say what to --plan for; to train, set runtime.device=... and --nproc"
        )
    if devices is not None and nproc not in (None, devices):
        raise UserError(
            f"--nproc {nproc} --devices {devices}: a plan has one process for each device; give one of them"
        )
    processes.adopt_slurm()
    texts = [str(config), *(more or [])]
    overrides = [text for text in texts[1:] if "=" in text]
    with agreement.together():
        _refuse_words(texts[1:])
        loaded = [load(RunConfig, Path(text), overrides) for text in texts if text not in overrides]
    if plan:
        for one in loaded:
            _print_plan(one, device, devices or nproc or one.parallel.processes)
        if len(loaded) > 1:
            _print_together(loaded, device, devices or nproc or loaded[0].parallel.processes)
        return
    several = nproc or (loaded[0].parallel.processes if processes.place().size == 1 else 1)
    if several > 1:
        _launch(several, ["tutelage", "train", *texts])
        return
    _train(loaded, [str(config), *overrides])


def _refuse_words(texts: Sequence[str]) -> None:
    """Refuse what is neither a setting to change nor a file.

    Raises:
        UserError: with the setting that was meant, if one is called nearly so.
    """
    from tutelage.config.run_config import RunConfig
    from tutelage.errors import UserError, suggestion

    known = RunConfig.model_fields
    for text in texts:
        if "=" not in text and Path(text).suffix not in {".yaml", ".yml"} and not Path(text).exists():
            named = text.split(".")[0] in known
            near, example = ("", f"{text}=...") if named else (suggestion(text, known), "tokens=1M")
            raise UserError(
                f"train {text}: {near}neither a run file nor a setting to change; write KEY=VALUE, for "
                f"example {example}, or the path of a file"
            )


def _train(configs: Sequence[RunConfig], command: list[str]) -> None:
    from tutelage.cli.bars import RichProgress, say

    with loading():  # seconds of torch, which a wrong setting above does not wait for
        from tutelage.run import run_cohort

    with RichProgress() as progress:
        directories = run_cohort(configs, progress)
    for config, directory in zip(configs, directories, strict=True):
        say("run", directory.path)
        say(
            "model",
            directory.model if directory.is_trained() else "not here: only its results are",
        )
        if directory.scores.exists():
            _say_scores(config, directory)
    lacking = [str(directory.path) for directory in directories if not directory.is_trained()]
    if lacking:  # copied from another machine, whose scores may be all that is wanted
        say("next", f"to have the weights here, delete {', '.join(lacking)} and run the same command")
    else:
        say("next", _next(configs[0], directories[0], command))


def _say_scores(config: RunConfig, directory: RunDirectory) -> None:
    """Print the bits per byte of a run, and those of its teacher on the same texts, if that is a run."""
    from tutelage.cli.bars import say
    from tutelage.config.teacher_config import RunTeacher
    from tutelage.evals.score_files import last_bits_per_byte, read_scores
    from tutelage.run_directory import RunDirectory, named

    teacher, theirs = named(config).teacher, {}
    if isinstance(teacher, RunTeacher):
        theirs = last_bits_per_byte(read_scores(RunDirectory(directory.path.parent / teacher.run).scores))
    found = [
        f"{key[0]} {value:.3f}" + (f" (teacher {theirs[key]:.3f})" if key in theirs else "")
        for key, value in last_bits_per_byte(read_scores(directory.scores)).items()
    ]
    if found:
        say("scores", f"bits per byte of test text: {', '.join(found)}")
    say("" if found else "scores", directory.scores)


def _next(config: RunConfig, directory: RunDirectory, command: list[str]) -> str:
    """What to do with a trained model: let it teach, or find out whether it was taught well."""
    if config.teacher is None and config.stage == "sft":
        both = _beside_its_beginning(config, directory)
        return f"beside the model it began with: `tutelage eval score {both}`"
    if config.teacher is None:
        settings = [f"teacher={{kind: run, run: {directory.id}}}"]
        if "output" in config.model_fields_set:  # students look for it in their own
            settings.append(f"output={config.output}")
        return f"teach a student with it: {shlex.join(settings)}"
    kept = [text for text in command if not _REPLACED.match(text)]
    mixing = ", mixing: convex" if config.objective.mixing == "keep_full_kd" else ""  # that always teaches
    alone = [
        *kept,
        f"name={config.name}-alone",
        "teacher=null",
        f"objective={{alpha: 0, gate: null{mixing}}}",
    ]
    return f"does its teacher help? Train it alone, and compare: `tutelage train {shlex.join(alone)}`"


def _beside_its_beginning(config: RunConfig, directory: RunDirectory) -> str:
    """The arguments that score a fine-tuned model beside its beginning, on the texts of its run file."""
    from tutelage.run_directory import named

    known = named(config)
    elsewhere = "output" in config.model_fields_set  # where names are not looked up
    begin = config.model.path or known.model.run
    if elsewhere and known.model.run is not None:
        begin = str(config.output / known.model.run)
    words = [str(directory.path if elsewhere else directory.id), str(begin)]
    if config.eval.domains:
        words += [f"--store={domain.name}={domain.store}" for domain in known.eval.domains]
        words += [f"--max-documents={config.eval.max_documents}", f"--max-tokens={config.eval.max_tokens}"]
    return shlex.join(words)


def _planned_for(config: RunConfig, device: str | None, devices: int) -> Hardware:
    from tutelage.models.devices import Hardware

    return Hardware.named(device, devices) if device else Hardware.of_run(config.runtime.device, devices)


def _print_together(configs: Sequence[RunConfig], device: str | None, devices: int) -> None:
    from tutelage.cli.bars import out, say
    from tutelage.run_plan import plan_together

    found = plan_together(configs, _planned_for(configs[0], device, devices))
    say("together", f"{len(configs)} runs, of which each has its own weights and moments in memory")
    for line in found.memory_lines(remedies=not found.fits):
        out.print(line, soft_wrap=True)


def _print_plan(config: RunConfig, device: str | None, devices: int) -> None:
    from tutelage.cli.bars import out, say
    from tutelage.cli.stages import period
    from tutelage.files import short, size_text
    from tutelage.run_plan import plan_run

    hardware = _planned_for(config, device, devices)
    found = plan_run(config, hardware)
    say("run", f"{config.name}: {found.steps:,} steps of {config.global_batch_tokens:,} tokens")
    for line in found.memory_lines(remedies=not found.fits):
        out.print(line, soft_wrap=True)
    student, teacher = found.flops
    words = f"{student:.3g} FLOPs per token" + (f" and {teacher:.3g} of the teacher" if teacher else "")
    say("speed", f"{short(found.tokens_per_second)} tokens/s on {devices} x {hardware.name} ({words})")
    say("", f"at {hardware.device.mfu:.0%} of {hardware.device.peak_flops / 1e12:g} TFLOP/s each")
    say("time", f"{period(found.seconds)}; without start-up, a cache of targets, scoring, waits for disks")
    say(
        "disk",
        f"{size_text(found.checkpoint_bytes)} of checkpoints, {size_text(found.model_bytes)} of model; "
        "without a cache of targets",
    )


def _launch(several: int, module: list[str]) -> None:
    """Run the command in several processes; exit as the one that failed, and say so if it could not."""
    from tutelage.errors import Stopped
    from tutelage.launch import describe, launch
    from tutelage.stopping import EXIT_CODE

    try:
        failed = launch(several, module)
    except Stopped:  # they have said so
        raise typer.Exit(EXIT_CODE) from None
    for rank, status in failed.items():
        if status < 0:
            typer.echo(f"error: rank {rank}: {describe(status)}", err=True)
        raise typer.Exit(status if status > 0 else 1)


def teach(
    config: Annotated[Path, typer.Argument(help="cache file (YAML); `tutelage init cache` writes one")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="settings to change, e.g. format.ids=24", metavar="KEY=VALUE"),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="write nothing; say what every format would take")
    ] = False,
) -> None:
    """Let a teacher read a token store once and keep its targets, so that every run can use them.

    After a stop or a kill the same command resumes. Several processes, also on machines that share the file
    system, may run it at the same time and divide the work.
    """
    from tutelage.config.load import load
    from tutelage.config.teacher_config import TeachConfig

    loaded = load(TeachConfig, config, overrides or [])
    if estimate:
        _print_estimate(loaded)
    else:
        _write(loaded)


def _write(config: TeachConfig) -> None:
    from tutelage.cli.bars import RichProgress, say
    from tutelage.cli.settings_pages import flow

    with loading():
        from tutelage.teachers.cache.cache_writer import write_cache
        from tutelage.teachers.cache.reader import open_cache

    with RichProgress() as progress:
        path = write_cache(config, progress)
    cache = open_cache(path)
    positions = cache.manifest.layout.positions
    per_token = f"{cache.bytes / positions:.2f} bytes per token"
    say("cache", path)
    say("size", f"{cache.bytes:,} bytes for {positions:,} tokens, {per_token}")
    say("next", f"put 'teacher: {flow({'kind': 'cache', 'path': str(path)})}' into a run file")


def _print_estimate(config: TeachConfig) -> None:
    from rich.table import Table

    from tutelage.cli.bars import out, say
    from tutelage.cli.stages import period
    from tutelage.files import size_text
    from tutelage.teachers.cache.cache_estimate import estimate_cache
    from tutelage.teachers.cache.formats import FORMATS

    found = estimate_cache(config)
    table = Table("", "format", box=None)
    for column in ("bytes/token", "total", "time"):
        table.add_column(column, justify="right")
    for row in found.formats:
        table.add_row(
            "->" if row.configured else "",
            row.label,
            f"{row.bytes_per_token:.2f}",
            size_text(row.total_bytes),
            period(row.seconds),
        )
    out.print(table)
    for kind in dict.fromkeys(row.format.kind for row in found.formats):
        out.print(f"{kind}: {FORMATS[kind].exactness}", style="dim")
    out.print()
    say("tokens", f"{found.tokens:,}")
    say("teacher", f"{found.teacher_flops:.3g} FLOPs in forward passes")
    say("free", f"{size_text(found.free_bytes)} on the disk of {found.path.parent}")
    say("measured", f"on {found.trial_tokens:,} tokens, one process on this machine; -> the file's format")
    say("next", f"without --estimate: writes {found.path}")
