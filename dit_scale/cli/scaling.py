"""`dit-scale scaling`: train the design space in short runs and draw how quality follows compute."""

import argparse
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command, output_path
from dit_scale.cli.tables import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from dit_scale.models.zoo import Conditioning
    from dit_scale.scaling.config import StudyConfig
    from dit_scale.scaling.results import Fit, RunResult


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "scaling",
        _run,
        "train the design space in short runs; tables, figures and fits of quality against compute",
        description="""\
Train one short run per model and conditioning design, score its samples if the study says how, and
write results.json and figures into the folder of the study. The same command continues a study;
finished runs are only read. A failed run is named and does not stop the others.

  dit-scale scaling scaling_digits
  dit-scale scaling scaling_paper --dry-run
  dit-scale scaling --paper --out runs/paper        (the paper's own table, without training)

To train runs elsewhere, for example on a cluster, use the commands that --dry-run prints, then read the
results with --read. Exit codes: 0 done, 1 a run failed, 2 a mistake that the last line explains, 75
stopped on request.""",
    )
    parser.add_argument("config", nargs="?", help="a study: a recipe scaling_... or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the study")
    parser.add_argument("--dry-run", action="store_true", help="print runs, costs and commands, then exit")
    parser.add_argument("--read", action="store_true", help="train nothing; report on what is there")
    parser.add_argument("--paper", action="store_true", help="report on the paper's published runs instead")
    parser.add_argument("--out", type=output_path, help="folder of the paper's figures (default: no figures)")


def _run(args: argparse.Namespace) -> int:
    from dit_scale.config import load
    from dit_scale.errors import ConfigError
    from dit_scale.scaling.config import StudyConfig

    if args.paper == (args.config is not None):
        raise ConfigError("expected either a study (`dit-scale scaling STUDY`) or --paper")
    if args.out and not args.paper:
        raise ConfigError("--out is for --paper; a study has its own folder: pass folder=FOLDER")
    if args.paper:
        return _paper(args.out)
    study = load(StudyConfig, args.config, args.overrides)
    if args.dry_run:
        return _dry_run(study)
    return _report_study(study) if args.read else _conduct(study)


def _paper(out: str | None) -> int:
    from pathlib import Path

    from dit_scale.scaling.results import paper_results

    _report(
        paper_results(), "adaln_zero", "The paper's design space at 400K steps", Path(out) if out else None
    )
    return 0


def _dry_run(study: "StudyConfig") -> int:
    from dit_scale.scaling.config import runs_of
    from dit_scale.scaling.results import read_results
    from dit_scale.scaling.study import check_folder, training_command, write_config

    check_folder(study)
    print_table(_table(read_results(study), "Runs of the study"))
    print(f"total {sum(run.training_flops for run in runs_of(study)):.3g} training FLOPs; commands:")
    for run in runs_of(study):
        print("dit-scale", *training_command(study, write_config(study, run)))
    return 0


def _conduct(study: "StudyConfig") -> int:
    from dit_scale.scaling.study import Conductor
    from dit_scale.signals import StopRequest

    conductor = Conductor(study, StopRequest(), lambda text: print(text, flush=True))
    code = conductor.conduct()
    _report_study(study)
    if conductor.failed:
        print(f"{len(conductor.failed)} runs failed: {', '.join(conductor.failed)}; run the command again")
    return code


def _report_study(study: "StudyConfig") -> int:
    from pathlib import Path

    from dit_scale.scaling.results import read_results
    from dit_scale.scaling.study import check_folder

    check_folder(study)
    _report(read_results(study), study.conditionings[0], "Results of the study", Path(study.folder))
    return 0


def _report(
    results: "Sequence[RunResult]", design: "Conditioning", title: str, folder: "Path | None"
) -> None:
    from dit_scale.scaling import canvas
    from dit_scale.scaling.figures import draw_all
    from dit_scale.scaling.results import fit, metrics_of, write_results

    print_table(_table(results, title))
    metrics = metrics_of(results)
    fits = [fit(results, metric, design) for metric in metrics]
    for one in fits:
        print(_sentence(one))
    if folder is None:
        return
    write_results(folder / "results.json", results, fits)
    print(f"results in {folder / 'results.json'}")
    if canvas.is_available():
        files = draw_all(results, metrics, design, folder / "figures")
        print(f"{len(files)} figures in {folder / 'figures'}")
    else:
        print(canvas.INSTALL)


def _table(results: "Sequence[RunResult]", title: str) -> "Table":
    from rich import box
    from rich.table import Table

    from dit_scale.scaling.figures import LABELS
    from dit_scale.scaling.results import metrics_of

    metrics = metrics_of(results)
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("model", "conditioning"):
        table.add_column(column)
    for column in ("parameters", "GMACs", "images", "training FLOPs", *(LABELS[name] for name in metrics)):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in results:
        values = [f"{one.metrics[name]:.4g}" if name in one.metrics else "" for name in metrics]
        table.add_row(
            one.model,
            one.conditioning,
            f"{one.parameters:,}",
            f"{one.gmacs:.4g}",
            f"{one.images:,}",
            f"{one.training_flops:.3g}",
            *values,
            "" if one.finished else "unfinished" if one.images else "not started",
        )
    return table


def _sentence(fit: "Fit") -> str:
    from dit_scale.scaling.figures import LABELS

    parts = []
    if fit.law is not None:
        error = fit.law.exponent_standard_error
        spread = "" if error is None else f" +- {error:.4f} (standard error)"
        parts.append(
            f"{fit.law.scale:.4g} * (training FLOPs)^b with b = {fit.law.exponent:.4f}{spread}, "
            f"{fit.law.points} runs"
        )
    if fit.correlation is not None:
        parts.append(f"correlation with log GMACs {fit.correlation:.2f}")
    if fit.parameters_correlation is not None:
        parts.append(f"with log parameters {fit.parameters_correlation:.2f}")
    return f"{LABELS[fit.metric]} ({fit.conditioning}): " + ("; ".join(parts) or "too few runs for a fit")
