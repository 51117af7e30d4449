"""The classes that Ray carries to other processes: the deployments, and the way of a call to the
replica that its front has chosen.

Ray pickles these classes whole and not by name, so their methods import what they use: `nanollama`
may be the main program here, and is a module there.

Seam       cluster.serve deploys them; `ray.serve.request_router.RequestRouter`. They open
           cluster.replica and cluster.serve; `LIVE` of cluster.placement gets the replicas.
Remove     delete the folder.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.request_router import RequestRouter

from nanollama_extras.cluster import placement


class NamedReplicaRouter(RequestRouter):  # type: ignore[misc]
    """Routes a call to the replica that it names; to the least busy one where that is gone."""

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        self.note_replicas()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self.note_replicas()

    def note_replicas(self) -> None:
        """Tell the front which replicas there are."""
        placement.LIVE[self.app_name] = tuple(str(key.unique_id) for key in self.curr_replicas)

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """The replicas to try."""
        call = pending_request.args[0] if pending_request and pending_request.args else None
        name = getattr(call, "replica", "")
        named = [one for one in candidate_replicas if one.replica_id.unique_id == name]
        return [named or candidate_replicas]


class Engine:
    """The deployment of the replicas."""

    async def __init__(self, values: dict[str, Any]) -> None:  # type: ignore[misc]
        from nanollama_extras.cluster.replica import Replica

        name = serve.get_replica_context().replica_id.unique_id
        self.replica = await Replica(values, str(name)).opened()

    def check_health(self) -> None:
        self.replica.check_health()

    async def answer(self, call: Any) -> AsyncIterator[Any]:
        """The parts of the answer to a call."""
        async for part in self.replica.answer(call):
            yield part

    async def peek(self, path: str) -> tuple[int, bytes]:
        """The status and the body of GET `path`."""
        return await self.replica.peek(path)


@serve.ingress()
class Front:
    """The deployment of a front behind Ray's proxies."""

    def __init__(self, values: dict[str, Any], engines: Any) -> None:
        from nanollama_extras.cluster.serve import front_app

        self.built = front_app(values, engines)

    def __serve_build_asgi_app__(self) -> Any:
        return self.built
