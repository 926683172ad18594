"""Tables survive their file, and torch's own tables can be read and compared."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.schedule import POLICIES, build, place
from lightning_lwpm.pipeline.simulate import kept_by_ranks, simulate
from lightning_lwpm.pipeline.tablefile import load_csv, save_csv

SIZES = [(p, v, m) for p in (1, 2, 3, 4, 6) for v in (2, 3) for m in (1, 2, 3, 4, 6, 8)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_table_survives_its_file(name, tmp_path):
    table = build(name, 2, 3, 4)
    save_csv(table, tmp_path / "table.csv")
    assert load_csv(tmp_path / "table.csv") == table
    with open(tmp_path / "table.csv") as file:
        assert len(file.readlines()) == 4


def test_a_bad_cell_is_quoted_with_its_line(tmp_path):
    (tmp_path / "bad.csv").write_text("0F0,,0B0\n1F0,1Q0\n")
    with pytest.raises(ConfigurationError, match="line 2: '1Q0' is of no kind of F, B, I, W"):
        load_csv(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("0F0,0SEND_F0\n")
    with pytest.raises(ConfigurationError, match="line 1: '0SEND_F0' is no action"):
        load_csv(tmp_path / "bad.csv")


@pytest.fixture
def torch_table(tmp_path):
    """Make a schedule of torch's, which needs stages and a process group; idle steps stay in the file it writes."""

    def make(cls, p, v, m):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=p)
        try:
            numbers = [0, 2 * p - 1] if cls is schedules.ScheduleZBVZeroBubble else range(0, p * v, p)
            device = torch.device("cpu")
            stages = [PipelineStage(torch.nn.Identity(), number, p * v, device) for number in numbers]
            schedule = cls(stages if v > 1 else stages[0], m, loss_fn=torch.nn.functional.mse_loss)
            order = schedule._get_pipeline_order() if v == 1 else schedule.pipeline_order
        finally:
            dist.destroy_process_group()
        rows = [[a for a in order[rank] if a is None or a.is_compute_op] for rank in range(p)]
        save_csv(rows, tmp_path / "torch.csv")
        return load_csv(tmp_path / "torch.csv")

    return make


def torch_places(p, v):
    """Torch has the first stage on rank 0 also where stages go round and round."""
    return [s % p for s in range(p * v)]


@pytest.mark.parametrize("p", [1, 2, 4])
def test_gpipe_is_that_of_torch(torch_table, p):
    assert torch_table(schedules.ScheduleGPipe, p, 1, 5) == build("gpipe", p, 5, p, torch_places(p, 1))


def test_interleaved_is_that_of_torch(torch_table):
    for p, v, m in SIZES:
        if m % max(1, m // p) == 0:
            theirs = torch_table(schedules.ScheduleInterleaved1F1B, p, v, m)
            assert theirs == build("interleaved_1f1b", p * v, m, p, torch_places(p, v)), (p, v, m)


def test_zb1p_takes_and_keeps_what_that_of_torch_does(torch_table):
    for p, v, m in SIZES:
        if m % max(1, m // p) == 0:
            placement, ones = torch_places(p, v), [1] * p * v
            theirs = torch_table(schedules.ScheduleInterleavedZeroBubble, p, v, m)
            ours = build("zb1p", p * v, m, p, placement)
            assert simulate(ours, placement).makespan == simulate(theirs, placement).makespan, (p, v, m)
            assert max(kept_by_ranks(ours, ones)) == max(kept_by_ranks(theirs, ones)), (p, v, m)


def test_zbv_keeps_what_that_of_torch_does_and_takes_a_unit_more_at_most(torch_table):
    # Torch makes the table for 2p-1 micro-batches or more and leaves some out: with fewer, now this one, now that one
    # is longer.
    for p, m in [(p, m) for p in (1, 2, 3, 4, 5) for m in (1, 2, 3, 5, 7, 9, 10)]:
        placement = place(2 * p, p, "v")  # both ends of a V are on rank 0 in both
        theirs, ours = torch_table(schedules.ScheduleZBVZeroBubble, p, 2, m), build("zbv", 2 * p, m, p)
        ones = [1] * 2 * p
        longer = simulate(ours, placement).makespan - simulate(theirs, placement).makespan
        assert longer <= (1 if m < 2 * p - 1 else 0), (p, m)
        assert max(kept_by_ranks(ours, ones)) <= max(kept_by_ranks(theirs, ones)), (p, m)
