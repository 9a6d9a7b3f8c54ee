"""Where the search evaluates its policies: in this process, or on the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.checkpoint import open_transformers
from pruning.static.blocks import linears
from pruning.static.database import Database, Policy, PolicyLoader
from pruning.static.fitness import Divergence, Reference

Projector = Mapping[str, Tensor]


class Evaluator(Protocol):
    def __call__(self, policies: Sequence[Policy], indices: Sequence[int]) -> list[float]:
        """Mean divergence of each policy over the samples with these indices."""

    def set_projector(self, projector: Projector) -> None:
        """Evaluate with this projector from now on."""

    def close(self) -> None:
        """Let go of what it holds elsewhere."""


class LocalEvaluator:
    """One policy after the other in the one model there is."""

    def __init__(self, divergence: Divergence, loader: PolicyLoader) -> None:
        self._divergence, self._loader = divergence, loader

    @torch.no_grad()
    def __call__(self, policies: Sequence[Policy], indices: Sequence[int]) -> list[float]:
        found = []
        for policy in policies:
            self._loader.load(policy)
            found.append(float(self._divergence(indices).mean()))
        return found

    def set_projector(self, projector: Projector) -> None:
        self._divergence.model.model.multi_modal_projector.load_state_dict(projector)

    def close(self) -> None:
        return None


def connect(address: str) -> Any:
    """Join a Ray cluster: `auto`, an address, or `local` for one of this machine's own. Raises ValueError where there is none."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("--ray needs Ray; install it with `pip install -e '.[ray]'`") from error
    try:
        ray.init(address=None if address == "local" else address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"--ray {address}: {error}") from error
    return ray


class RayEvaluator:
    """A policy at a time to whichever of the cluster's workers is free: one for each GPU, or for each CPU where there is none.

    Every worker opens the checkpoint, in `dtype`, and the database by their paths: these must be on a file system that the nodes
    share.
    """

    def __init__(
        self, address: str, checkpoint: Path, references: Sequence[Reference], database: Database, dtype: torch.dtype
    ) -> None:
        ray = connect(address)
        from ray.util import ActorPool

        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = gpus or int(ray.cluster_resources()["CPU"])
        remote = ray.remote(num_gpus=1)(RayWorker) if gpus else ray.remote(num_cpus=1)(RayWorker)
        self._ray = ray
        shared, device = ray.put(list(references)), "cuda" if gpus else "cpu"
        self._workers: list[Any] = [remote.remote(checkpoint, shared, database, device, dtype) for _ in range(count)]
        self._pool: Any = ActorPool(self._workers)

    def __call__(self, policies: Sequence[Policy], indices: Sequence[int]) -> list[float]:
        return list(self._pool.map(lambda worker, policy: worker.evaluate.remote(policy, list(indices)), policies))

    def set_projector(self, projector: Projector) -> None:
        shared = self._ray.put({name: value.cpu() for name, value in projector.items()})
        self._ray.get([worker.set_projector.remote(shared) for worker in self._workers])

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)


class RayWorker:
    """A worker's own model."""

    def __init__(
        self, checkpoint: Path, references: Sequence[Reference], database: Database, device: str, dtype: torch.dtype
    ) -> None:
        if device == "cpu":
            torch.set_num_threads(1)
        model = open_transformers(checkpoint, device, str(dtype).removeprefix("torch.")).model
        here = [Reference(r.sample, r.image_features.to(device), r.hidden.to(device)) for r in references]
        self._evaluator = LocalEvaluator(Divergence(model, here), PolicyLoader(linears(model), database))

    def evaluate(self, policy: Policy, indices: Sequence[int]) -> float:
        return self._evaluator([policy], indices)[0]

    def set_projector(self, projector: Projector) -> None:
        self._evaluator.set_projector(projector)
