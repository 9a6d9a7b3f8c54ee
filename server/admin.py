"""Routes that change what is served: load a model, swap its checkpoint, unload it. They take an admin key."""

from __future__ import annotations

import logging
from typing import Any

from anyio import to_thread
from fastapi import Depends, FastAPI, Request

from models.errors import CheckpointError
from server.caller import CALLER
from server.errors import AdminOnly, InvalidRequest
from server.memory import OutOfMemory
from server.openapi import MODELS, takes
from server.schemas import ModelRequest, parse
from server.served import Served

log = logging.getLogger(__name__)
NOT_LOADED = "The checkpoint was not loaded; the server's log says why."


def only_admins() -> None:
    """Raises AdminOnly, also where there are no keys at all."""
    if not CALLER.get().admin:
        raise AdminOnly("This takes a key that the server's key file marks with admin = true.")


def add_admin(app: FastAPI, served: Served) -> None:
    keyed: dict[str, Any] = {"tags": [MODELS], "dependencies": [Depends(only_admins)]}

    @app.post("/v1/admin/models", openapi_extra=takes(ModelRequest, "/v1/admin/models"), **keyed)
    async def load(request: Request) -> dict[str, Any]:
        """Load a checkpoint under a name. A name that is in use goes to the new one; the old one ends its answers and is freed."""
        asked = parse(ModelRequest, await request.body())
        swapped = asked.name in served.engines
        try:
            engine = await to_thread.run_sync(served.put, asked.name, asked.checkpoint)
        except OutOfMemory as error:
            raise InvalidRequest(str(error), param="checkpoint", code="out_of_memory") from error
        except (CheckpointError, ValueError, OSError) as error:  # their texts name the server's paths
            log.warning("%s was not loaded: %s", asked.name, error)
            raise InvalidRequest(NOT_LOADED, param="checkpoint", code="checkpoint_not_loaded") from error
        return {
            "id": asked.name, "object": "model", "swapped": swapped, "fingerprint": engine.fingerprint, "levels": [*engine.menu],
        }  # fmt: skip

    @app.delete("/v1/admin/models/{name:path}", **keyed)
    async def unload(name: str) -> dict[str, Any]:
        """Unload a model: what it has accepted is answered, then it is freed. The last one stays."""
        await to_thread.run_sync(served.remove, name)  # it waits for a model that loads
        return {"id": name, "object": "model", "deleted": True}
