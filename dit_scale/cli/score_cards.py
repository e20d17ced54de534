"""Score cards on the terminal: one as a table, or several side by side."""

from pathlib import Path
from typing import Any

from dit_scale.cli.tables import print_table


def print_card(tree: dict[str, Any], out: Path) -> None:
    """Print a score card; `out` is its file."""
    from rich import box
    from rich.table import Table

    subject, reference = tree["samples"], tree["reference"]
    count = "?" if reference["images"] is None else f"{reference['images']:,}"
    print(f"{subject['images']:,} images of {subject['image_size']} px: {subject['source']}")
    print(f"against {count} images: {reference['source']}")
    for key, value in _protocol_lines(subject["protocol"]):
        print(f"  {key:<10}{value}")
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("metric", "network"):
        table.add_column(name)
    for name in (
        "value",
        "error",
        "samples",
        "reference",
        *(f"paper, {row['row']}" for row in tree["paper"]),
    ):
        table.add_column(name, justify="right")
    table.add_column("note")
    for result in tree["results"]:
        error, real = result["standard_error"], result["reference_images"]
        table.add_row(
            result["metric"],
            result["network"],
            figure(result["value"]),
            "" if error is None else figure(error),
            f"{result['samples']:,}",
            "" if real is None else f"{real:,}",
            *(f"{row[result['metric']]:g}" if result["metric"] in row else "" for row in tree["paper"]),
            result["note"],
        )
    print_table(table)
    for caution in tree["cautions"]:
        print(f"note: {caution}")
    print(f"score card: {out}")


def figure(value: float) -> str:
    """Format a figure with the digits that are worth reading."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"


def _protocol_lines(protocol: dict[str, Any] | None) -> list[tuple[str, str]]:
    if protocol is None:
        return [("protocol", "unknown")]
    weights, sampling, labels = protocol["weights"], protocol["sampling"], protocol["labels"]
    interval = sampling.get("guidance_interval")
    return [
        ("weights", f"{weights['description']}, sha256 {weights['sha256'][:12]}"),
        ("sampler", f"{sampling['method']}, {sampling['steps']} steps, spacing {sampling.get('spacing')}"),
        (
            "guidance",
            f"{sampling['guidance']} on {sampling['guidance_channels']} channels"
            + (f", timesteps {interval[0]} to {interval[1]}" if interval else ""),
        ),
        ("labels", f"{labels['drawn']}, {labels['classes'] or 'all classes'}; seed {sampling['seed']}"),
        ("decoder", f"{protocol['vae']['name']}, sha256 {protocol['vae']['weights_sha256'][:12]}"),
        ("rounding", f"{protocol['rounding']}; transformer in {protocol['precision']}"),
    ]


def print_comparison(sources: list[str]) -> None:
    """Print what differs between the protocols of score cards, then their figures, side by side."""
    from rich import box
    from rich.table import Table

    from dit_scale.errors import ConfigError
    from dit_scale.evaluate.scorecard import differences, figures, read_card

    if len(sources) < 2:
        raise ConfigError("--compare needs two score cards or more: files, or folders with a metrics.json")
    cards = [read_card(source) for source in sources]
    names = [chr(ord("A") + number) for number in range(len(cards))]
    for name, source in zip(names, sources, strict=True):
        print(f"{name} = {source}")
    if differing := differences(cards):
        table = Table("protocol", *names, box=box.SIMPLE_HEAD)
        for key, values in differing.items():
            table.add_row(key, *values)
        print_table(table)
    else:
        print("the protocols are equal")
    table = Table("metric", "network", *names, box=box.SIMPLE_HEAD)
    for (metric, network), results in figures(cards).items():
        table.add_row(metric, network, *("-" if r is None else _with_error(r) for r in results))
    print_table(table)


def _with_error(result: Any) -> str:
    error = result["standard_error"]
    shown = figure(result["value"]) + ("" if error is None else f" +- {figure(error)}")
    return f"{shown} (n {result['samples']:,})"
