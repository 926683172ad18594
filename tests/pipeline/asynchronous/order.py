"""What an engine does at each stage, action by action and without the version formula, to hold others to."""

from lightning_lwpm.pipeline.asynchronous.in_place import writable


def actions(stage: int, num_stages: int, num_microbatches: int, total: int) -> list[tuple[str, int]]:
    """Steady-state 1F1B of one stage over ``total`` micro-batches: F, B and S with the micro-batch or the step."""
    ahead = min(num_stages - 1 - stage, total)
    passes = [("F", i) for i in range(ahead)]
    for j in range(total):
        if ahead + j < total:
            passes.append(("F", ahead + j))
        passes.append(("B", j))
        if (j + 1) % num_microbatches == 0:
            passes.append(("S", j // num_microbatches))
    return passes


def versions(stage: int, num_stages: int, num_microbatches: int, total: int) -> dict[tuple[str, int], int]:
    """Steps before each pass, counted."""
    steps, seen = 0, {}
    for kind, number in actions(stage, num_stages, num_microbatches, total):
        if kind == "S":
            steps += 1
        else:
            seen[kind, number] = steps
    return seen


def train(stages, num_microbatches, batches, loss):
    """Run every stage's actions as soon as what they need is there; each micro-batch by itself."""
    p, m = len(stages), num_microbatches
    # copies, because a kernel may round differently where data lies at odd addresses
    micro = [(a.clone(), b.clone()) for x, y in batches for a, b in zip(x.chunk(m), y.chunk(m), strict=True)]
    left = [actions(k, p, m, len(micro)) for k in range(p)]
    seen = [versions(k, p, m, len(micro)) for k in range(p)]
    inputs = [{} for _ in range(p)]
    inputs[0] = {i: x for i, (x, _) in enumerate(micro)}
    gradients, flying = [{} for _ in range(p)], [{} for _ in range(p)]
    summed = [0] * p
    gradients[-1] = dict.fromkeys(range(len(micro)))
    while any(left):
        for k, stage in enumerate(stages):
            if not left[k]:
                continue
            kind, i = left[k][0]
            if (kind == "F" and i not in inputs[k]) or (kind == "B" and i not in gradients[k]):
                continue
            left[k].pop(0)
            if kind == "S":
                stage.correction.before_step()
                with writable(stage.correction.parameters):
                    stage.optimizer.step()
                stage.correction.after_step()
                stage.scheduler.step()
                stage.optimizer.zero_grad()
                summed[k] = 0
                continue
            crossed = seen[k]["B", i] - seen[k]["F", i]
            if kind == "F":
                x = inputs[k].pop(i).detach().requires_grad_()
                with stage.correction.forward(crossed, summed[k]):
                    y = stage.module(x)
                if k == p - 1:
                    y = loss(y, micro[i][1]) / m
                else:
                    inputs[k + 1][i] = y
                flying[k][i] = x, y
            else:
                x, y = flying[k].pop(i)
                with stage.correction.backward(crossed):
                    y.backward(gradients[k].pop(i))
                summed[k] += 1
                if k:
                    gradients[k - 1][i] = x.grad
