"""Compares what the ranks of a pipeline have computed with what one device has."""

from typing import Any

import torch


def compare(expected: dict[str, Any], results: list[dict[str, Any]], tolerance: float = 0.0) -> None:
    """Assert that all is equal: to the last bit, or up to a relative tolerance.

    Args:
        expected: From ``train_single``.
        results: From ``train_pipelined``, of each rank.
        tolerance: Of gradients and weights; losses of the first step are always equal in every bit.
    """
    last = next(result for result in results if result["last"])
    for step, gradients in enumerate(expected["gradients"]):
        _same_losses(expected["losses"][step], last["losses"][step], tolerance if step else 0.0, f"step {step}, losses")
        found: dict[str, list[torch.Tensor]] = {}
        for result in results:
            for name, gradient in result["gradients"][step].items():
                found.setdefault(name, []).append(gradient)
        only = set(found) ^ set(gradients)
        assert not only, f"step {step}: {only} have a gradient on one side only"
        for name, copies in found.items():
            for copy in copies:
                _same(copy, gradients[name], tolerance, f"step {step}, gradient of {name}")
    held = set().union(*(result["weights"] for result in results))
    assert held == set(expected["weights"])
    for result in results:
        for name, weight in result["weights"].items():
            _same(weight, expected["weights"][name], tolerance, f"weight {name} on stage {result['stage']}")
        for name, buffer in result["buffers"].items():
            if name in result["own_buffers"]:
                _same(buffer, expected["buffers"][name], tolerance, f"buffer {name} on stage {result['stage']}")
        moved = {n for n, w in result["weights"].items() if not torch.equal(w, expected["start"][n])}
        should = {n for n in result["weights"] if not torch.equal(expected["weights"][n], expected["start"][n])}
        assert moved == should


def _same_losses(expected: list[float], found: list[float], tolerance: float, what: str) -> None:
    if tolerance:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    else:
        assert found == expected, f"{what}: {found} instead of {expected}"


def _same(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    if tolerance:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance, msg=lambda m: f"{what}: {m}")
        return
    if not torch.equal(found, expected):
        difference = (found - expected).abs().max().item()
        raise AssertionError(f"{what}: differs by up to {difference:.3g} (largest value {expected.abs().max():.3g})")
