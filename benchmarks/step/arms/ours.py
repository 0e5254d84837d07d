"""stopfast's own step with everything on that its device can do, and with each switch off in turn."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.engine.refusals import NotHere
from benchmarks.step.workload import STEPS_PER_EPOCH, Workload
from stopfast.build import build_objective, build_step, fastest
from stopfast.config import Config
from stopfast.kernels.ops import EAGER, ops_on, resolve_ops
from stopfast.masking import Masks

Change = Callable[[Config, torch.device], Config]


class ReplayedMasks:
    """Stands where the sampler stands: the masks of a workload, sent to the device in their turn."""

    def __init__(self, workload: Workload) -> None:
        rows, columns = workload.config.data.transforms.size
        patch = workload.config.model.patch_size
        self.grid = rows // patch, columns // patch
        self._workload = workload

    def __call__(
        self,
        batch_size: int,
        iteration: int,
        *,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Masks:
        """Return the masks of step ``iteration + 1``; they are those of a whole batch.

        Raises:
            ValueError: a part of a batch.
        """
        if start or stop not in (None, batch_size) or batch_size != self._workload.images:
            raise ValueError(f"expected all {self._workload.images} images, got {start}:{stop}")
        masks = self._workload.masks_of(iteration + 1)
        context, target = (
            [mask.to(device, non_blocking=True) for mask in group]
            for group in (masks.context, masks.target)
        )
        return Masks(context, target)


class Stopfast:
    """A training step of stopfast by its settings; noise is drawn by stopfast itself."""

    def __init__(self, workload: Workload, config: Config) -> None:
        self.workload = workload
        objective = build_objective(config, STEPS_PER_EPOCH)
        objective.masks = ReplayedMasks(workload)  # type: ignore[assignment]
        self._modules = objective.modules()
        for name, module in self._modules.items():
            module.load_state_dict(workload.weights[name], strict=True)
        self._step = build_step(config, objective, workload.device)

    def step(self, number: int, noise: list[Tensor] | None = None) -> Tensor:
        """Take one optimiser step; the given noise is what is drawn, so it is not used."""
        return self._step(self.workload.pixels, number).loss

    def weights(self) -> dict[str, Tensor]:
        """Weights by part and published key."""
        return {
            f"{part}.{name}": value
            for part, module in self._modules.items()
            for name, value in module.state_dict().items()
        }

    def moments(self) -> dict[str, Tensor]:
        """AdamW's first moments of what has one."""
        state = self._step.optimizer.state
        return {
            f"{part}.{name}": state[parameter]["exp_avg"]
            for part, module in self._modules.items()
            for name, parameter in module.named_parameters()
            if "exp_avg" in state.get(parameter, {})
        }

    def counts(self) -> dict[str, int]:
        """How the steps so far were taken; see ``TrainStep.counts``."""
        return self._step.counts()

    def choices(self) -> dict[str, str]:
        """The switches."""
        step = self._step.settings
        names = ("attention", "compile", "skip_unused", "bucket", "ahead", "copies")
        names += ("target_stream", "graphs")
        return {name: str(getattr(step, name)) for name in names}

    def close(self) -> None:
        """Nothing is held."""


def switched(**settings: object) -> Change:
    """Return what changes settings of the step."""
    return lambda config, _: replace(config, step=replace(config.step, **settings))


def on_gpu(change: Change) -> Change:
    """Return a change that is none on a CPU, where nothing comes of the setting."""
    return lambda config, device: change(config, device) if device.type == "cuda" else config


def with_torch_update(config: Config, device: torch.device) -> Config:
    """Torch's fused AdamW and an average of its own pass; copies and graphs need the other update."""
    config = switched(copies=False, graphs=False)(config, device)
    return replace(config, optim=replace(config.optim, optimizer="torch"))


def with_own_update(config: Config, _: torch.device) -> Config:
    """The update in one pass over flat buffers."""
    return replace(config, optim=replace(config.optim, optimizer="adamw_ema"))


def with_copies(config: Config, device: torch.device) -> Config:
    """bf16 copies of the weights, in bf16."""
    if config.step.precision != "bf16":
        return config
    return switched(copies=True)(with_own_update(config, device), device)


def without_operation(name: str) -> Change:
    """Return what puts the eager definition in the place of a fused operation."""

    def change(config: Config, device: torch.device) -> Config:
        ops = ops_on(resolve_ops(config.step.ops, config.step.attention), device)
        eager = getattr(EAGER, name)
        if getattr(ops, name) is eager:
            return config
        others = ops._replace(name=f"{ops.name} without {name}", **{name: eager})
        # Settings name operations; `resolve_ops`, which reads the setting, takes operations as well.
        return switched(ops=others, attention="auto")(config, device)

    return change


WITHOUT: dict[str, Change] = {
    "graphs": switched(graphs=False),
    "buckets and graphs": switched(bucket=1, graphs=False),
    "copies": switched(copies=False),
    "skipping unused work": switched(skip_unused=False),
    "target stream": switched(target_stream=False),
    "drawing ahead": on_gpu(switched(ahead=False)),
    "compiled blocks": switched(compile=False),
    "own attention": on_gpu(switched(attention="sdpa")),
    "own update, copies and graphs": on_gpu(with_torch_update),
    **{
        f"fused {name}": without_operation(name)
        for name in ("predictor_tokens", "layer_norm", "linear_gelu", "target_smooth_l1")
    },
}
"""What each ablation turns off."""
WITH: dict[str, Change] = {
    "buckets": switched(bucket=8),
    "compiled blocks": switched(compile=True),
    "own update": with_own_update,
    "copies": with_copies,
    "fused operations": on_gpu(switched(ops="fused")),
}
"""What can be turned on where the device's own choice leaves it off, as on a CPU."""


def stopfast(workload: Workload, change: Change | None = None) -> Stopfast:
    """Build stopfast's arm, or one with something changed.

    Raises:
        NotHere: the change changes nothing on this device.
    """
    device = workload.device
    config = switched(precision=workload.precision)(workload.config, device)
    config = fastest(config, device)
    if change is not None:
        changed = change(config, device)
        if changed == config:
            raise NotHere(f"the same as stopfast on this device ({device.type})")
        config = changed
    return Stopfast(workload, config)
