"""`ensemblekit demo`: train a small network and try everything on its snapshots."""

import os
import subprocess
from pathlib import Path

import click

from ensemblekit.cli import options, show


@click.command("demo")
@click.argument("folder", default="demo", metavar="[DIR]", type=options.FOLDERS)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Of the training."
)
@click.option("--force", is_flag=True, help="Run it again in a folder that has been used.")
def command(folder: str, seed: int, force: bool) -> int:
    """Train a small network on handwritten digits and try everything on its snapshots.

    Everything lands in DIR [default: demo]: train.py, ensemblekit.toml, ckpts/, the average, the
    comparison and the ONNX file.
    Each command is printed, so that you can repeat it by hand.
    """
    from ensemblekit.commands.demo import environment, prepare, steps

    place = Path(folder)
    prepare(place, force=force)
    click.echo(f"$ cd {place}")
    for step in steps(seed):
        show.note(f"\n# {step.purpose}")
        click.echo(f"$ {step.typed}")
        finished = subprocess.run(step.argv, cwd=place, env=environment(), check=False)  # noqa: S603  # our own commands
        if finished.returncode:
            return finished.returncode
    show.note(
        f"\nEverything is in {place}{os.sep * (str(place) != '.')}; change train.py and run the commands "
        "above again, with --force where something is there already."
    )
    return 0
