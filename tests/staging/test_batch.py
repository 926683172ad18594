"""Batches are split as one would by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.remote import Meta, Remote


@given(st.integers(1, 40), st.integers(1, 12))
def test_parts_are_the_batch_in_order_and_almost_equal(samples: int, wanted: int) -> None:
    x = torch.arange(samples)
    batch = Batch.of({"x": x}, wanted)
    parts = [batch.microbatch(i)["x"] for i in range(len(batch))]
    assert torch.equal(torch.cat(parts), x)
    assert len(batch) == min(wanted, samples)
    assert max(batch.sizes) - min(batch.sizes) <= 1
    assert sum(batch.weights) == pytest.approx(1)
    assert [len(part) / samples for part in parts] == pytest.approx(batch.weights)


def test_lists_with_an_item_a_sample_are_split_and_the_rest_is_not() -> None:
    value = {"x": torch.zeros(4, 2), "names": ["a", "b", "c", "d"], "scale": 3, "table": torch.zeros(5), "ids": [1, 2]}
    first, second = (Batch.of(value, 2).microbatch(i) for i in (0, 1))
    assert (first["names"], second["names"]) == (["a", "b"], ["c", "d"])
    assert (first["scale"], first["ids"], first["table"].shape) == (3, [1, 2], (5,))


def test_a_pair_in_a_batch_of_two_is_a_pair() -> None:
    """(inputs, labels) is as long as the batch has samples, but it holds whole tensors."""
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    for i in (0, 1):
        part = Batch.of((x, y), 2).microbatch(i)
        assert [p.shape for p in part] == [(1, 3), (1,)]


def test_one_micro_batch_is_the_batch_itself() -> None:
    value = [torch.zeros(3), "text"]
    assert Batch.of(value, 1).microbatch(0)[0] is value[0]


@pytest.mark.parametrize("value", [None, {"a": 1}, torch.tensor(3.0)])
def test_a_batch_without_samples_is_one_micro_batch(value: Any) -> None:
    batch = Batch.of(value, 4)
    assert len(batch) == 1
    assert batch.weights == [1.0]
    batch.microbatch(0)


def test_large_floats_stay_where_they_are_read() -> None:
    batch = Batch.of({"tokens": torch.zeros(4, 9, dtype=torch.long), "image": torch.zeros(4, 3, 64, 64)}, 2)
    lean = Batch(batch.spec, batch.lean(set()), 2)
    assert [type(leaf) for leaf in lean.leaves] == [torch.Tensor, Meta]
    assert lean.structure() == batch.structure()
    assert lean.signature(1) == batch.signature(1)
    part = lean.microbatch(1, torch.device("cpu"), None)
    assert type(part["image"]) is Remote
    assert part["image"].shape == (2, 3, 64, 64)
    assert part["tokens"].shape == (2, 9)


def test_signatures_tell_sizes_structures_do_not() -> None:
    batch = Batch.of(torch.zeros(5, 3), 2)
    other = Batch.of(torch.zeros(4, 3), 2)
    assert batch.structure() == other.structure()
    assert batch.signature(0) != batch.signature(1)
    assert batch.signature(1) == other.signature(0)


def shapes(value: Any) -> Any:
    """The same with shapes in the place of tensors."""
    if isinstance(value, dict):
        return {key: shapes(item) for key, item in value.items()}
    return tuple(value.shape) if isinstance(value, torch.Tensor) else [shapes(item) for item in value]


def boxes(*numbers: int) -> list[torch.Tensor]:
    return [torch.zeros(number, 4) for number in numbers]


def test_items_of_lists_keep_their_size_even_if_it_is_that_of_the_batch() -> None:
    """One image of four had four boxes: the list went whole to every micro-batch, its boxes in parts."""
    value = {"image": torch.zeros(4, 3, 8, 8), "boxes": boxes(1, 4, 2, 5), "names": list("abcd")}
    batch = Batch.of(value, 2)
    first, second = (batch.microbatch(i) for i in (0, 1))
    assert (shapes(first["boxes"]), first["names"]) == ([(1, 4), (4, 4)], ["a", "b"])
    assert (shapes(second["boxes"]), second["names"]) == ([(2, 4), (5, 4)], ["c", "d"])
    assert batch.signature(0) != batch.signature(1)


def test_lists_of_images_are_split_by_images_not_by_channels() -> None:
    images = [torch.zeros(3, 8 + i, 8) for i in range(4)]
    targets = [{"boxes": box, "labels": torch.zeros(len(box))} for box in boxes(1, 3, 2, 4)]
    batch = Batch.of((images, targets), 2)
    assert (batch.samples, len(batch)) == (4, 2)
    images, targets = batch.microbatch(1)
    assert shapes(images) == [(3, 10, 8), (3, 11, 8)]
    assert shapes(targets) == [{"boxes": (2, 4), "labels": (2,)}, {"boxes": (4, 4), "labels": (4,)}]
    assert Batch.of((images[:1], targets[:1]), 2).samples == 1
    assert Batch.of((boxes(3, 3, 3, 3), torch.zeros(4)), 2).samples == 4


@pytest.mark.parametrize(
    "value",
    [
        ([torch.zeros(2, 5), torch.zeros(2, 5)], torch.zeros(2)),  # two views of two samples, or two samples of two
        {"labelled": boxes(8, 8), "unlabelled": boxes(16, 16)},
        {"image": torch.zeros(2, 3, 8, 8), "boxes": boxes(2, 2)},
    ],
)
def test_what_may_be_read_in_two_ways_stays_whole(value: Any) -> None:
    batch = Batch.of(value, 2)
    assert len(batch) == 1
    assert shapes(batch.microbatch(0)) == shapes(value)


def test_views_in_lists_are_split() -> None:
    views, labels = Batch.of((boxes(6, 6), torch.zeros(6)), 2).microbatch(0)
    assert (shapes(views), labels.shape) == ([(3, 4), (3, 4)], (3,))
