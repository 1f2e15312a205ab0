"""An adapter's training on one stage: its parameters, their gradients, AdamW, clipping, and when it is stopped."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from lorafusion.core.workload import Job
from lorafusion.model.lora import named_adapter_parameters
from lorafusion.model.stage import Stage

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


class AdapterTraining:
    """One job's adapter on this stage.

    Gradients (of a sharded adapter this process's part of them) are always there and are zeroed in place, since other
    tensors may be views of them. All that happens in a step is decided on the device: a gradient that is not finite on
    any stage stops the adapter for good, its weights and moments stay as they were before, and nobody waits to learn of
    it.

    A float16 adapter is a copy of one in float32, which is what AdamW updates: in float16 a gradient's square is nearly
    always zero, and a step divides by its root.
    """

    def __init__(self, stage: Stage, job: Job) -> None:
        self.job = job
        self.parameters = named_adapter_parameters(stage, job)
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # Of a parameter that is sharded over replicas this process updates its own part, in the same memory.
        self._parts = [_own_part(parameter) for parameter in self.parameters.values()]
        self._is_copy = self._parts[0].dtype == torch.float16
        self._updated = [_in_float32(part) for part in self._parts] if self._is_copy else self._parts
        some = self._updated[0]
        self.norm_dtype = torch.promote_types(some.dtype, torch.float32)
        self.optimizer = torch.optim.AdamW(
            self._updated, lr=job.learning_rate, weight_decay=job.weight_decay, fused=True
        )
        # Now and not in the first step, while the clock runs: with Llama-3.1-8B three for each of 448 tensors.
        for parameter in self._updated:
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=some.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        # AdamW's own guard, that gradient scalers use: where it is 1 the fused kernel changes nothing.
        self.stopped = torch.zeros((), dtype=torch.float32, device=some.device)
        self.optimizer.found_inf = self.stopped
        self.optimizer.grad_scale = None
        self.steps = job.start

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [part.grad for part in self._parts]

    def squared_norm(self) -> torch.Tensor:
        """Of this stage's part of the gradient, a scalar of `norm_dtype`."""
        norms = torch._foreach_norm(self.gradients, dtype=self.norm_dtype)
        return torch.stack(norms).square().sum()

    def step(self, squared_norm: torch.Tensor) -> torch.Tensor:
        """Update the adapter by its gradient, whose squared norm over all stages is given; returns the norm."""
        norm = squared_norm.sqrt()
        if self._is_copy:
            torch._foreach_copy_([master.grad for master in self._updated], self.gradients)
        self.stopped.copy_(torch.maximum(self.stopped, (~norm.isfinite()).float()))
        if self.job.max_grad_norm is not None:
            self._clip(norm)
        self.optimizer.param_groups[0]["lr"] = self.job.learning_rate_at(self.steps)
        self.optimizer.step()
        if self._is_copy:
            with torch.no_grad():
                torch._foreach_copy_(self._parts, self._updated)
        self.zero_gradients()
        self.steps += 1
        return norm

    def _clip(self, norm: torch.Tensor) -> None:
        """Have the next update see the gradient with at most the job's norm."""
        factor = (self.job.max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        if factor.dtype == self._updated[0].dtype:
            torch._foreach_mul_([parameter.grad for parameter in self._updated], factor)
        else:
            # For a factor of another dtype torch launches a kernel a tensor, 448 for an adapter of Llama-3.1-8B. AdamW
            # divides by what gradient scalers multiplied with, within its kernel and in float32.
            self.optimizer.grad_scale = factor.reciprocal()

    def steps_made(self) -> int:
        """The steps that changed all weights: fewer than `steps` once the adapter is stopped. Waits for the device."""
        return int(torch.stack([state["step"] for state in self.optimizer.state.values()]).min())

    def zero_gradients(self) -> None:
        torch._foreach_zero_(self.gradients)

    def state(self) -> dict[str, torch.Tensor]:
        """All that its training depends on, by names that do not depend on the number of stages."""
        out = {"stopped": self.stopped}
        for (name, parameter), updated in zip(self.parameters.items(), self._updated, strict=True):
            state = self.optimizer.state[updated]
            out[f"{name}/weight"], out[f"{name}/gradient"] = parameter.detach(), parameter.grad
            if self._is_copy:
                out[f"{name}/float32"] = _whole(parameter, updated.detach())
            for moment in ("exp_avg", "exp_avg_sq"):
                out[f"{name}/{moment}"] = _whole(parameter, state[moment])
            out["optimizer_steps"] = state["step"]
        return out

    def load(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Take over what `state` returned, of this stage's parameters. A gradient that is not in it is zero."""
        self.steps = steps
        self.stopped.copy_(state["stopped"])
        for (name, parameter), updated in zip(self.parameters.items(), self._updated, strict=True):
            with torch.no_grad():
                parameter.copy_(_as(parameter, state[f"{name}/weight"]))
                if self._is_copy:
                    updated.copy_(_part(_as(parameter, state[f"{name}/float32"])))
                gradient = state.get(f"{name}/gradient")
                if gradient is None:
                    parameter.grad.zero_()
                else:
                    parameter.grad.copy_(_as(parameter, gradient))
            if f"{name}/exp_avg" in state:
                optimizer_state = self.optimizer.state[updated]
                optimizer_state["step"].copy_(state["optimizer_steps"])
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer_state[moment].copy_(_part(_as(parameter, state[f"{name}/{moment}"])))


def gradients_of(adapter: AdapterTraining) -> dict[str, torch.Tensor]:
    """A copy of an adapter's gradients on this stage, by name, on the CPU and in at least float32."""
    out = {}
    for name, parameter in adapter.parameters.items():
        whole = parameter.grad.full_tensor() if isinstance(parameter, DTensor) else parameter.grad
        out[name] = whole.detach().to("cpu", torch.promote_types(whole.dtype, torch.float32), copy=True).contiguous()
    return out


def _as(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor as a parameter is kept: sharded over replicas where that one is."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _part(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or this process's part of one that is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """What this process's part is a part of, sharded as its parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, parameter.placements, shape=shape, stride=stride)


def _own_part(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter, or this process's part of one that is sharded, with its gradient's."""
    if not isinstance(parameter, DTensor):
        return parameter
    part = torch.nn.Parameter(parameter.detach().to_local())
    part.grad = parameter.grad.to_local()
    return part


def _in_float32(part: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter in float32, with a gradient of its own."""
    copy = torch.nn.Parameter(part.detach().float())
    copy.grad = torch.zeros_like(copy)
    return copy
