"""Tables as CSV files, a line a rank and a cell an action, as ``torch.distributed.pipelining`` writes and reads them.

::

    0F0,0F1,,0B0,,0B1
    ,1F0,1B0,1F1,1B1

Idle steps are empty cells there; they are left out when a table is read, for it says in which order a rank acts and not
when. Ranks are lines: note that here the last stage is on the first line, where torch has the first stage.
"""

import csv
from os import PathLike

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.action import UNITS, Action, Table


def save_csv(table: Table, path: str | PathLike[str]) -> None:
    """Write a table; a rank without a stage gives an empty line."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)


def load_csv(path: str | PathLike[str]) -> Table:
    """Read a table of computations, such as ``save_csv`` or torch has written it.

    Raises:
        ConfigurationError: If a cell is no action of kind F, B, I or W, naming the file, the line and the cell.
    """
    table: Table = []
    with open(path, newline="") as file:
        for line, cells in enumerate(csv.reader(file), 1):
            table.append([])
            for cell in cells:
                if not cell.strip():
                    continue
                try:
                    action = Action.parse(cell)
                except ConfigurationError as error:
                    raise ConfigurationError(f"{path}, line {line}: {error}") from None
                if action.kind not in UNITS:
                    raise ConfigurationError(f"{path}, line {line}: {cell!r} is of no kind of {', '.join(UNITS)}")
                table[-1].append(action)
    return table
