"""The command ``lwpm``."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from lightning_lwpm.errors import LWPMError

__all__ = ["main"]

_PLAN = """\
Show how a model would be partitioned, without training it: each distinct layer is timed on this machine, and plans are
made for several numbers of devices.

    lwpm plan --config-dir conf --config-name train model=resnet --devices 2 4 8
    lwpm plan --model examples.models.gpt:CharGPT --data examples.data.topics:TopicsDataModule --checkpoint last.ckpt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What was written behind ``lwpm``; by default what this process was started with.

    Returns:
        The exit status: 0, or 1 after an error that the user can mend, told in one line.
    """
    parser = argparse.ArgumentParser(prog="lwpm", description="Layer-wise model parallelism for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except LWPMError as error:
        Console(stderr=True).print(f"lwpm {args.command}: {error}", style="red", markup=False, highlight=False)
        return 1
    return 0


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="show how a model would be partitioned",
        description=_PLAN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = plan.add_argument_group("a Hydra project")
    source.add_argument("--config-dir", help="folder of the configuration, such as conf")
    source.add_argument("--config-name", default="train", help="name of the configuration (default: train)")
    source.add_argument("overrides", nargs="*", help="as on the command line of the project, such as model=resnet")
    source = plan.add_argument_group("or a class")
    source.add_argument("--model", help="the LightningModule, such as package.module:Class")
    source.add_argument("--data", help="its LightningDataModule; not needed where the module has loaders of its own")
    source.add_argument("--checkpoint", help="a checkpoint with the module's hyperparameters")
    plan.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16], help="numbers of devices")
    plan.add_argument("--microbatches", default=None, help="number of micro-batches (default: the best)")
    plan.add_argument("--schedule", default=None, help="name of the schedule (default: the faster one)")
    plan.add_argument("--device-memory", default=None, help="what a device holds, such as '12 GiB'")
    plan.add_argument("--accelerator", default="auto", help="where layers are timed: cpu, gpu, ... (default: auto)")
    plan.add_argument("--precision", default=None, help="as of the Trainer (default: the configuration's, or 32-true)")
    plan.add_argument("--save", help="write the plan for the last number of devices: partition='plan.yaml'")
    plan.add_argument("--draw", help="draw it, as PNG or SVG")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from lightning_lwpm.commands.plan import plan  # imports Lightning: seconds

    plan(args)


if __name__ == "__main__":
    sys.exit(main())
