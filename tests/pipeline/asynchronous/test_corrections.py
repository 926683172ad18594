"""Each correction does what its formula says, costs what it states, and nothing where gradients are not late."""

import copy

import pytest
import torch
from problems import OPTIMIZERS, one, same, step, weights
from torch.nn import functional as F

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.in_place import writable
from lightning_lwpm.pipeline.asynchronous.registry import CORRECTIONS, DEFAULT, correction

LATE = Delay(0, 4, 4)
"""Three quarters of a step on average, one at most."""

NAMES = [*CORRECTIONS, DEFAULT, "prediction+stash"]

TAKES = {
    name: [o for o in OPTIMIZERS if name not in ("momentum", "anticipation") or o in ("momentum", "adamw")]
    for name in NAMES
}
PAIRS = [(name, optimizer) for name, optimizers in TAKES.items() for optimizer in optimizers]


@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_nothing_changes_where_no_gradient_is_late(name, optimizer):
    alone = "look_ahead" in name  # which does something at all stages if there are several
    layer, trainer, correct = one(name, Delay(0, 1, 4) if alone else Delay(3, 4, 4), optimizer)
    plain, other, _ = one("none", LATE, optimizer)
    for seed in range(5):
        with correct.forward(0), correct.backward(0):
            step(layer, trainer, correct, seed)
        step(plain, other, seed=seed)
        assert same(weights(layer), weights(plain))
    with correct.base():
        assert same(weights(layer), weights(plain))
    assert correct.kept() == []


def test_error_feedback_adds_the_difference_of_updates():
    layer, trainer, correct = one("error_feedback", LATE, "sgd")
    live = weights(layer)
    before = [torch.zeros_like(weight) for weight in live]
    for seed in range(4):
        step(layer, trainer, correct, seed)
        updates = [-0.1 * weight.grad for weight in layer.parameters()]
        live = [w + u + 0.75 * (u - b) for w, u, b in zip(live, updates, before, strict=True)]
        before = updates
        torch.testing.assert_close(weights(layer), live)
        with correct.base():
            torch.testing.assert_close(weights(layer), [w - 0.75 * u for w, u in zip(live, updates, strict=True)])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_base_weights_of_error_feedback_are_the_optimizers_own(optimizer):
    """Given the same gradients, the base weights are bit for bit those of a plain run."""
    layer, trainer, correct = one("error_feedback", LATE, optimizer)
    plain, other, _ = one("none", LATE, optimizer)
    for seed in range(4):
        step(layer, trainer, correct, seed)
        for mine, its in zip(plain.parameters(), layer.parameters(), strict=True):
            mine.grad = its.grad.clone()
        other.step()
        live = weights(layer)
        with correct.base():
            assert same(weights(layer), weights(plain))
        assert same(weights(layer), live)


@pytest.mark.parametrize(("delay", "rho"), [(Delay(0, 4, 4), 0.75), (Delay(2, 4, 4), 0.25), (Delay(0, 4, 1), 1.0)])
def test_strength_of_error_feedback(delay, rho):
    assert one("error_feedback", delay)[2].rho == rho
    assert one("error_feedback", delay, limit=2, strength=3)[2].rho == 3 * min(2, delay.mean)


@pytest.mark.parametrize(("optimizer", "rho"), [("sgd", 0.75), ("rmsprop", 0.75), ("momentum", 4), ("adamw", 4)])
def test_reach_of_look_ahead_goes_by_momentum(optimizer, rho):
    assert one("look_ahead", LATE, optimizer)[2].rho == pytest.approx(rho)
    assert one("look_ahead", Delay(3, 4, 4), optimizer)[2].rho == pytest.approx(rho if rho > 1 else 0)
    assert one("look_ahead", LATE, optimizer, reach=2.0)[2].rho == 2
    assert one("look_ahead", Delay(0, 1, 4), optimizer, reach=2.0)[2].rho == 0


def test_look_ahead_is_quasi_hyperbolic_momentum():
    layer, trainer, correct = one("look_ahead", LATE, "momentum", reach=4.0)
    trainer.param_groups[0]["weight_decay"] = 0
    live = weights(layer)
    velocity = [torch.zeros_like(weight) for weight in live]
    nu = 1 - 4 * 0.1 / 0.9
    for seed in range(4):
        step(layer, trainer, correct, seed)
        gradients = [weight.grad for weight in layer.parameters()]
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        live = [w - 0.1 * (nu * v + (1 - nu) * 10 * g) for w, v, g in zip(live, velocity, gradients, strict=True)]
        torch.testing.assert_close(weights(layer), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("crossed", [0, 1, 2])
def test_prediction_is_the_last_update_once_more_for_each_step(crossed):
    layer, trainer, correct = one("prediction", Delay(0, 4, 2))
    step(layer, trainer, correct)
    before = weights(layer)
    step(layer, trainer, correct)
    now = weights(layer)
    with correct.forward(crossed):
        expected = [w + crossed * (w - b) for w, b in zip(now, before, strict=True)]
        torch.testing.assert_close(weights(layer), expected)
    assert same(weights(layer), now)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_momentum_foretells_the_last_update(optimizer):
    """Without weight decay the update of momentum is the last one, so that it is error feedback without its copy."""
    layer, trainer, correct = one("momentum", LATE, optimizer)
    other_layer, other_trainer, other = one("error_feedback", LATE, optimizer)
    for group in (*trainer.param_groups, *other_trainer.param_groups):
        group["weight_decay"] = 0
    for seed in range(6):
        step(layer, trainer, correct, seed)
        step(other_layer, other_trainer, other, seed)
        torch.testing.assert_close(weights(layer), weights(other_layer), rtol=1e-4, atol=1e-5)
        live = weights(layer)
        with correct.base(), other.base():
            torch.testing.assert_close(weights(layer), weights(other_layer), rtol=1e-4, atol=1e-5)
        assert same(weights(layer), live)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_momentum_says_which_optimizers_it_takes(optimizer):
    with pytest.raises(ConfigurationError, match="error_feedback"):
        one("momentum", LATE, optimizer)


def test_discount_divides_the_learning_rate_for_a_while():
    layer, trainer, correct = one("discount", Delay(0, 4, 2), "sgd", steps=4)
    for seed in range(6):
        before = weights(layer)
        step(layer, trainer, correct, seed)
        rate = 0.1 / 1.5 ** max(0, 1 - seed / 4)
        expected = [w - rate * p.grad for w, p in zip(before, layer.parameters(), strict=True)]
        torch.testing.assert_close(weights(layer), expected)
        assert trainer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("crossed", [1, 2])
def test_stash_gives_the_gradient_at_the_weights_of_the_forward_pass(crossed):
    layer, trainer, correct = one("stash", Delay(0, 4, 2))
    step(layer, trainer, correct)
    x = torch.randn(3, 5, requires_grad=True)
    expected = torch.autograd.grad(F.gelu(layer(x)).sum(), x)[0]
    y = F.gelu(layer(x)).sum()
    for _ in range(crossed):
        with writable(correct.parameters):
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
            correct.before_step()
            trainer.step()
            correct.after_step()
    now = weights(layer)
    with correct.backward(crossed):
        y.backward()
    assert torch.equal(x.grad, expected)
    assert same(weights(layer), now)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("delay", [LATE, Delay(0, 4, 1), Delay(3, 4, 1)])
def test_memory_is_what_is_stated(name, delay):
    layer, trainer, correct = one(name, delay)
    for seed in range(5):
        step(layer, trainer, correct, seed)
    kept = sum(tensor.nbytes for tensor in correct.kept())
    stated = correct.copies if delay.ahead or "look_ahead" in name else 0
    assert kept == stated * sum(weight.nbytes for weight in layer.parameters())


@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_a_run_continues_from_saved_state(name, optimizer):
    layer, trainer, correct = one(name, LATE, optimizer)
    for seed in range(3):
        step(layer, trainer, correct, seed)
    state = correct.state_dict()
    with correct.base():
        saved, training = weights(layer), copy.deepcopy(trainer.state_dict())

    again, other, continued = one(name, LATE, optimizer)
    with torch.no_grad():
        for parameter, weight in zip(again.parameters(), saved, strict=True):
            parameter.copy_(weight)
    other.load_state_dict(training)
    continued.load_state_dict(state)
    torch.testing.assert_close(weights(again), weights(layer), rtol=1e-6, atol=1e-7)
    for seed in range(3, 6):
        step(layer, trainer, correct, seed)
        step(again, other, continued, seed)
    torch.testing.assert_close(weights(again), weights(layer), rtol=1e-5, atol=1e-6)
    if name != "momentum":
        assert same(weights(again), weights(layer))


@pytest.mark.parametrize("name", ["error_feedback", DEFAULT, "momentum"])
def test_nothing_runs_ahead_while_training_is_exact(name):
    layer, trainer, correct = one(name, LATE)
    step(layer, trainer, correct)
    correct.late = False
    step(layer, trainer, correct)
    exact = weights(layer)
    with correct.base():
        assert same(weights(layer), exact)
    correct.late = True
    step(layer, trainer, correct)
    ahead = weights(layer)
    with correct.base():
        assert not same(weights(layer), ahead)


def test_an_unknown_name():
    with pytest.raises(ConfigurationError, match=r"'nesterov'.*'error_feedback'"):
        correction("nesterov")


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9),
        lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, nesterov=True, maximize=True),
        lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, dampening=0.3),
        lambda weights: torch.optim.Adam(weights, 0.01, maximize=True),
        lambda weights: torch.optim.AdamW(weights, 0.01, weight_decay=0),
    ],
)
def test_anticipation_is_the_next_step_once_its_gradient_is_known(make):
    layer, _, _ = one("none", LATE)
    trainer = make(layer.parameters())
    correct = CORRECTIONS["anticipation"](trainer, layer.parameters(), LATE)
    for seed in range(3):
        step(layer, trainer, correct, seed)
        with correct.forward(1, LATE.num_microbatches):
            foretold = weights(layer)
        now = weights(layer)
        with correct.forward(0, LATE.num_microbatches):
            assert same(weights(layer), now)
        trainer.step()  # with the same gradient once more
        torch.testing.assert_close(weights(layer), foretold)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_anticipation_without_a_gradient_repeats_the_last_update(optimizer):
    layer, trainer, correct = one("anticipation", LATE, optimizer)
    for group in trainer.param_groups:
        group["weight_decay"] = 0
    for seed in range(3):
        before = weights(layer)
        step(layer, trainer, correct, seed)
    expected = [2 * w - b for w, b in zip(weights(layer), before, strict=True)]
    trainer.zero_grad()
    with correct.forward(1):
        torch.testing.assert_close(weights(layer), expected)


def test_corrections_in_one():
    """As error feedback with smaller steps is error feedback whose optimizer has the smaller learning rate."""
    late = Delay(0, 4, 2)
    layer, trainer, correct = one("error_feedback+discount", late, "sgd")
    other_layer, other_trainer, other = one("error_feedback", late, "sgd")
    for group in other_trainer.param_groups:
        group["lr"] /= 1.5
    correct.parts[1].steps = float("inf")
    for seed in range(4):
        step(layer, trainer, correct, seed)
        step(other_layer, other_trainer, other, seed)
        torch.testing.assert_close(weights(layer), weights(other_layer))
    assert (correct.name, correct.copies) == ("error_feedback+discount", 1)
