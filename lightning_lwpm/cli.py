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

_TIMELINE = """\
Draw schedules as they are planned, without a model, and tell how long they take. Times are in any unit, of one device
and one micro-batch; stages of a device share them.

    lwpm timeline --schedule 1f1b interleaved_1f1b zbv --stages 4 --microbatches 8 -o schedules.svg
    lwpm timeline --schedule auto --stages 8 --microbatches 32 --backward 2.2 --latency 0.1 -o auto.json
"""

_MERGE = """\
Make of a sharded checkpoint the file that one device would have written. The model's code is not needed.

    lwpm merge checkpoints/last.ckpt merged.ckpt
"""

_SPLIT = """\
Make of one file a sharded checkpoint, of one share. The model's code is not needed.

    lwpm split merged.ckpt checkpoints/last.ckpt
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
    _add_timeline(commands)
    _add_state(commands)
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


def _add_timeline(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    timeline = commands.add_parser(
        "timeline",
        help="draw schedules without a model",
        description=_TIMELINE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    timeline.add_argument("--schedule", nargs="+", help="names of schedules (default: all)")
    timeline.add_argument("--stages", type=int, default=4, help="stages, or devices with several of them (default: 4)")
    timeline.add_argument("--microbatches", type=int, default=8, help="number of micro-batches (default: 8)")
    timeline.add_argument(
        "--virtual-stages", type=int, help="stages a device, in schedules that take several (default: as few as needed)"
    )
    timeline.add_argument("--forward", type=float, default=1.0, help="time of a forward pass (default: 1)")
    timeline.add_argument("--backward", type=float, default=2.0, help="time of a whole backward pass (default: 2)")
    timeline.add_argument("--weight", type=float, help="its part for gradients of weights (default: half of it)")
    timeline.add_argument("--latency", type=float, default=0.0, help="time of a tensor on its way (default: 0)")
    timeline.add_argument("-o", "--output", help="write a picture (.svg, .png) or a trace for Perfetto (.json)")
    timeline.add_argument("--csv", help="write the tables, a line a rank; one file a schedule")
    timeline.set_defaults(run=_timeline)


def _timeline(args: argparse.Namespace) -> None:
    from lightning_lwpm.commands.timeline import timeline

    timeline(args)


def _add_state(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    for name, about, description, source, target in (
        ("merge", "make one file of a sharded checkpoint", _MERGE, "the folder", "the file to write"),
        ("split", "make a sharded checkpoint of one file", _SPLIT, "the file", "the folder to write"),
    ):
        parser = commands.add_parser(
            name, help=about, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("source", help=source)
        parser.add_argument("target", help=target)
        parser.add_argument(
            "--trusted", action="store_true", help="unpickle whatever is in it: only for files that you trust"
        )
        parser.set_defaults(run=_state)


def _state(args: argparse.Namespace) -> None:
    from lightning_lwpm.commands.state import merge, split

    (merge if args.command == "merge" else split)(args)


if __name__ == "__main__":
    sys.exit(main())
