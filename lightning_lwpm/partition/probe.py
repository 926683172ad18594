"""One instrumented run of the user's step on one device: which layers it calls in which order, and what they cost.

Everything that the run changes (buffers, random states, Python attributes of modules) is put back.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.describe import Probe, describe
from lightning_lwpm.partition.hooks import watching_hooks
from lightning_lwpm.partition.record import Call, Counter, Recorder
from lightning_lwpm.partition.undo import undone
from lightning_lwpm.staging.compiled import AsWritten
from lightning_lwpm.staging.reentrant import never_reentrant
from lightning_lwpm.staging.sites import quoted, raised_at, step_runner
from lightning_lwpm.staging.ways import next_moment

__all__ = ["Probe", "probe"]


@step_runner
def probe(root: nn.Module, step: Callable[[], Any], outside: Sequence[nn.Module] = ()) -> Probe:
    """Run ``step`` once and describe it.

    Args:
        root: The model whose layers the step calls, with all its weights on one device.
        step: Runs the user's step on one micro-batch.
        outside: Modules that are no part of the model to partition (metrics): they stay whole on every rank.

    Raises:
        ConfigurationError: if the step calls no layer that has parameters.
    """
    every = [*root.named_parameters(), *root.named_buffers()]
    apart = {id(module) for top in outside for module in top.modules()}
    excluded = {id(t) for top in outside for t in [*top.parameters(), *top.buffers()]}
    named = {id(t): n for n, t in every if id(t) not in excluded}
    holders = [
        (n, m) for n, m in root.named_modules() if n and id(m) not in apart and next(m.parameters(), None) is not None
    ]
    versions = {n: (id(b), b._version) for n, b in root.named_buffers()}
    # batch normalisation counts no changes of its statistics; with weights it is a layer, to which they belong
    bare = {
        f"{n}."
        for n, m in root.named_modules()
        if m._buffers and not any(p is not None for p in m._parameters.values())
    }
    values = {n: b.detach().clone() for n, b in root.named_buffers() if n[: n.rfind(".") + 1] in bare}
    recorder = Recorder(named, [tensor for _, tensor in every])
    counter = Counter(recorder)
    calls = recorder.calls
    stack: list[Call] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in names:  # a copy has the hooks too
            raise ConfigurationError(
                f"the step copies {type(module).__name__}, a layer of the model, and calls the copy, which is in no "
                "stage. Make copies in `__init__` or `setup`, as parts of the model, or train without this strategy."
            )
        recorder.clock += 1
        if stack:
            stack[-1].has_inner = True
        recorder.touch((args, kwargs))
        call = Call(names[module], recorder.clock, functions=recorder.functions, operations=len(recorder.operations))
        call.moment = next_moment()
        calls.append(call)
        stack.append(call)

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call = stack.pop()
        recorder.produce(out)
        recorder.clock += 1
        call.end = recorder.clock
        if not call.has_inner:  # a layer: what happened inside is its own affair
            del recorder.operations[call.operations :]
            recorder.note(call.name, args, kwargs, out)

    names = {module: name for name, module in holders}
    handles = []
    watching = watching_hooks(root, lambda: recorder.all_functions, (before, after))
    with undone(root, outside) as stored, watching as hooked:
        for _, module in holders:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            saving = saved_tensors_hooks(_saving(recorder), _same)
            watched = recorder.watching_checkpoints(), recorder.watching_functions()
            with AsWritten(), never_reentrant(), counter, recorder, watched[0], watched[1], saving:
                step()
        except RuntimeError as error:
            if "saved tensor hooks" in str(error) or "Cannot access storage of" in str(error):
                raise ConfigurationError(
                    f"{quoted(raised_at(error))}: functions of `torch.func` (`grad`, `jacrev`, `vmap`, ...) do not "
                    "work in a step that is partitioned, nor in its layers. Use `torch.autograd.grad(..., "
                    "create_graph=True)` or `torch.autograd.functional`, or run on one device."
                ) from error
            raise
        finally:
            for handle in handles:
                handle.remove()
            recorder.undo_writes()
        changed = {n for n, b in root.named_buffers() if n in versions and (id(b), b._version) != versions[n]}
        changed |= recorder.written.keys() & versions.keys()
        now = dict(root.named_buffers())
        changed |= {n for n, b in values.items() if n in now and not torch.equal(b, now[n])}
        prepared = {names[m] for m in hooked if m in names and m._forward_pre_hooks}
        attributes = tuple((n, key) for n, key in stored() if n and id(root.get_submodule(n)) not in apart)
    if not calls:
        raise ConfigurationError(
            "the step called no layer that has parameters, so there is nothing to partition: call the model's modules "
            "(not only functions of their parameters) in the step, or use `devices=1`"
        )
    seen = describe(root, recorder, counter, changed, prepared)
    kept = {n for n, t in every if id(t) in excluded}
    return replace(
        seen,
        parameters={n: where for n, where in seen.parameters.items() if n not in kept},
        buffers={n: where for n, where in seen.buffers.items() if n not in kept},
        attributes=attributes,
        hooked=tuple(n for n, m in root.named_modules() if m in hooked),
    )


def _saving(recorder: Recorder) -> Callable[[Tensor], Tensor]:
    """Notes what autograd saves. Graphs keep it, and the recorder keeps graphs: a circle that nobody collects."""
    known = weakref.ref(recorder)

    def save(tensor: Tensor) -> Tensor:
        found = known()
        return found.save(tensor) if found is not None else tensor

    return save


def _same(tensor: Tensor) -> Tensor:
    return tensor
