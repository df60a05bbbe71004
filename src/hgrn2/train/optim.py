"""Parameter roles to optimizers, and optimizer state by parameter name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.errors import UserError
from hgrn2.nn.parameters import ROLES
from hgrn2.ops.backends import triton_runs
from hgrn2.train.config import TrainConfig
from hgrn2.train.device_adamw import DeviceAdamW
from hgrn2.train.sharded_tensors import is_sharded, shard_like

DECAYED_ROLES = frozenset({"matrix", "embedding", "head"})
_STATE_KEYS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}


class NamedOptimizer:
    """AdamW, or Muon together with AdamW, as one optimizer whose state is stored by parameter name.

    Args:
        model: the model, whose parameters that require gradients are optimized.
        roles: role of every parameter name: matrix, embedding, head, vector or lower_bounds. Weight decay
            applies to the first three; Muon updates the matrices.
        config: training settings, of which optimizer, learning rates, betas, eps and weight_decay are used.
        waiting: names of parameters that are frozen at first, whose learning rate `set_lr_fraction` sets separately.
        waits_for_step: whether each step's loss is read before the next begins.

    Raises:
        UserError: the optimizer is Muon, which this version of torch lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: Mapping[str, str],
        config: TrainConfig,
        waiting: Collection[str] = (),
        *,
        waits_for_step: bool = False,
    ) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        unknown = {name: roles.get(name) for name in self._named if roles.get(name) not in ROLES}
        assert not unknown, f"parameters without a known role: {unknown}"

        adamw_names = [name for name in self._named if config.optimizer == "adamw" or roles[name] != "matrix"]
        muon_names = [name for name in self._named if name not in set(adamw_names)]
        self._waiting = frozenset(waiting)
        self._setting, self._muon_names = config.optimizer, frozenset(muon_names)
        self._optimizers: list[torch.optim.Optimizer] = []
        if adamw_names:
            self._optimizers.append(self._adamw(adamw_names, roles, config))
        if muon_names:
            self._optimizers.append(self._muon(muon_names, config))
        self._peaks = [group["lr"] for group in self._groups()]
        self._device_adamw = None if waits_for_step else self._make_device_adamw(roles, config)

    def _make_device_adamw(self, roles: Mapping[str, str], config: TrainConfig) -> DeviceAdamW | None:
        """Return the update that needs no waiting; None where it cannot be used."""
        if config.freeze or config.optimizer != "adamw" or not triton_runs():
            return None
        if any(not p.is_cuda or p.dtype != torch.float32 or is_sharded(p) for p in self._named.values()):
            return None
        # gradients of several batches are added up in float32
        is_low = config.precision == "bfloat16" and config.grad_accumulation == 1
        low = [p for name, p in self._named.items() if roles[name] == "matrix"] if is_low else []
        (optimizer,) = self._optimizers
        assert isinstance(optimizer, torch.optim.AdamW)
        return DeviceAdamW(optimizer, low)

    def working_precision(self) -> AbstractContextManager[None]:
        """Give the model the values it computes with inside: bfloat16 matrices, where that saves conversions."""
        return nullcontext() if self._device_adamw is None else self._device_adamw.active()

    def full_precision(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put float32 weights in place of their bfloat16 copies.

        Args:
            tensors: tensors of the model, by name.
        """
        found = dict(tensors)
        if self._device_adamw is not None:
            found |= {name: self._device_adamw.weight(p) for name, p in self._named.items() if name in found}
        return found

    def _adamw(self, names: list[str], roles: Mapping[str, str], config: TrainConfig) -> torch.optim.Optimizer:
        decayed = [name for name in names if roles[name] in DECAYED_ROLES]
        plain = [name for name in names if roles[name] not in DECAYED_ROLES]
        groups = [
            {**group, "weight_decay": weight_decay}
            for some, weight_decay in ((decayed, config.weight_decay), (plain, 0.0))
            for group in self._apart(some)
        ]
        fused = all(self._named[name].device.type in ("cpu", "cuda") for name in names)
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused
        )

    def _muon(self, names: list[str], config: TrainConfig) -> torch.optim.Optimizer:
        muon = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise UserError(
                f"optimizer muon: torch {torch.__version__} does not have it; install 2.9 or later, or use adamw"
            )
        # updates of the size of AdamW's, so that one learning rate and one weight decay serve both
        return muon(
            self._apart(names),
            lr=config.muon_learning_rate or config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )

    def _apart(self, names: list[str]) -> list[dict[str, Any]]:
        """Groups of parameters; those that are frozen at first have a separate group."""
        now = [name for name in names if name not in self._waiting]
        later = [name for name in names if name in self._waiting]
        return [
            {"params": [self._named[name] for name in some], "waiting": waits}
            for some, waits in ((now, False), (later, True))
            if some
        ]

    def _groups(self) -> list[dict[str, Any]]:
        # not stored: loading a state creates new ones
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def parameters(self) -> list[Tensor]:
        """Every optimized parameter, in the model's order."""
        return list(self._named.values())

    def set_lr_fraction(self, fraction: float, waiting_fraction: float = 1.0) -> float:
        """Set every learning rate to this fraction of its peak; returns the first (AdamW's).

        Args:
            fraction: of every peak.
            waiting_fraction: what the learning rate of waiting parameters is of the others'.
        """
        for group, peak in zip(self._groups(), self._peaks, strict=True):
            group["lr"] = peak * fraction * (waiting_fraction if group["waiting"] else 1.0)
        return self._peaks[0] * fraction

    def step(self) -> None:
        """Update the parameters from their gradients."""
        for optimizer in self._optimizers:
            optimizer.step()

    @property
    def on_device(self) -> DeviceAdamW | None:
        """The update that needs no waiting for the device; None where `step` is the only one."""
        return self._device_adamw

    def gradient_norm(self) -> Tensor:
        """Compute the norm of the whole gradient, a scalar."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._named.values() if p.grad is not None])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """State as "parameter name/key" to tensor, such as "lm_head.weight/exp_avg"; empty before a step."""
        return {
            f"{name}/{key}": value
            for name, p in self._named.items()
            for optimizer in self._optimizers
            for key, value in optimizer.state.get(p, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what state_tensors gave; moves to the parameters' devices.

        Raises:
            UserError: the state belongs to another model or another optimizer.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            if name not in self._named:
                raise UserError(f"optimizer state: {name!r} is not in this model; resume with the run's own config")
            by_name.setdefault(name, {})[key] = shard_like(value, self._named[name])
        for name, state in by_name.items():
            if state.keys() != _STATE_KEYS["muon" if name in self._muon_names else "adamw"]:
                raise UserError(
                    f"optimizer state: {name!r} has {', '.join(sorted(state))}, which optimizer "
                    f"{self._setting} does not use; resume with the original optimizer, or start a new run"
                )
        for optimizer in self._optimizers:
            packed = optimizer.state_dict()
            owned = [p for group in optimizer.param_groups for p in group["params"]]
            position = {id(p): i for i, p in enumerate(owned)}
            packed["state"] = {
                position[id(self._named[name])]: state
                for name, state in by_name.items()
                if id(self._named[name]) in position
            }
            # torch's own loader knows which tensors follow the parameter's device and which stay on the CPU
            optimizer.load_state_dict(packed)
