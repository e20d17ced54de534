"""`dit-scale export`: write weights for other programs."""

import argparse
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command, output_path
from dit_scale.cli.weights_arguments import SOURCE_HELP, add_weights_arguments

if TYPE_CHECKING:
    from dit_scale.inference.sources import WeightsSource

FORMS = ("safetensors", "pt", "diffusers")
CHANGED_IN_DIFFUSERS = """\
note: this model was trained with model.timestep_embedding=paper, but diffusers computes other timestep
frequencies. The folder therefore is another function than the run: latents of the demo's model differ by 6 %,
pixels by 2 of 255 on average. Train with model.timestep_embedding=diffusers to export exactly."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "export",
        _run,
        "write weights as safetensors, in the published .pt layout, or as a diffusers pipeline",
        description="""Write fp32 weights, bit for bit those of the source, in one of three forms.

  dit-scale export runs/dit_xl2_256 --out xl2.safetensors
  dit-scale export runs/dit_xl2_256 --to pt --out xl2.pt
  dit-scale export runs/dit_xl2_256 --to diffusers --out xl2_pipeline

  safetensors  a file that also describes the model and names its VAE
  pt           the published layout, a state dict that does not describe the model
  diffusers    a folder for DiTPipeline.from_pretrained, with a copy of the VAE

diffusers computes other timestep frequencies than the paper's code. Only a model trained with
model.timestep_embedding=diffusers is the same function there; for any other, latents differ by 6 % and
pixels by 2 of 255 on average, measured on the demo's model (docs/formats.md).""",
    )
    parser.add_argument("source", help=SOURCE_HELP)
    parser.add_argument("--to", choices=FORMS, default=FORMS[0], help="form (default safetensors)")
    parser.add_argument("--out", type=output_path, required=True, help="file or folder to write")
    add_weights_arguments(parser.add_argument_group("weights"))


def _run(args: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    from dit_scale.cli.weights_arguments import open_weights
    from dit_scale.inference.export import export, export_pipeline, export_pt, with_class_names
    from dit_scale.storage.outputs import check_new_folder, check_output

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    if args.to == "diffusers":
        check_new_folder(args.out)
    else:
        check_output(args.out, f".{args.to}")
    source = with_class_names(open_weights(args), say)
    if args.to == "diffusers":
        export_pipeline(source, Path(args.out), args.vae)
        if source.model.timestep_embedding == "paper":
            say(CHANGED_IN_DIFFUSERS)
    elif args.to == "pt":
        export_pt(source, Path(args.out))
        say(f"note: {args.out} does not describe its model; read it with {_options(source)}")
    else:
        export(source, Path(args.out))
    print(f"{source.description} -> {args.out}")
    return 0


def _options(source: "WeightsSource") -> str:
    """Return the options of `sample` that describe the model."""
    model = source.model
    options = f"--model {model.name} --image-size {model.image_size} --num-classes {model.num_classes}"
    if model.timestep_embedding != "paper":
        options += f" --timestep-embedding {model.timestep_embedding}"
    return f"{options} --vae {source.vae or 'FOLDER_OR_HUB_NAME'}"
