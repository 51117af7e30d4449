"""What Ray carries to other processes: the deployments, a router that tells the front which
replicas there are, and the rule by which Ray starts and ends them.

Ray pickles these whole and not by name, so they import what they use when they run: `nanollama`
may be the main program here, and is a module there.

Seam       cluster.serve deploys them; `ray.serve.request_router.RequestRouter`. They open
           cluster.replica and cluster.serve; `LIVE` of cluster.placement gets the replicas.
Remove     delete the folder.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.request_router import RequestRouter
from ray.util import get_node_ip_address

from nanollama_extras.cluster import placement


class NamedReplicaRouter(RequestRouter):  # type: ignore[misc]
    """Routes `address` to the replica that it names; to another one where that is gone."""

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
        name = pending_request.args[0] if pending_request and pending_request.args else ""
        named = [one for one in candidate_replicas if one.replica_id.unique_id == name]
        return [named or candidate_replicas]


def wanted_replicas(context: Any) -> tuple[float, dict[str, Any]]:
    """How many replicas the calls need that run on them: Ray sees no calls itself."""
    calls = context.aggregated_metrics.get("calls", {})
    return sum(calls.values()) / context.config.target_ongoing_requests, {}


class Engine:
    """The deployment of the replicas."""

    async def __init__(self, values: dict[str, Any]) -> None:  # type: ignore[misc]
        from nanollama_extras.cluster.replica import Replica

        name = serve.get_replica_context().replica_id.unique_id
        self.replica = await Replica(values, str(name)).opened(get_node_ip_address())

    def check_health(self) -> None:
        self.replica.check_health()

    def record_autoscaling_stats(self) -> dict[str, int]:
        """What `wanted_replicas` reads."""
        return {"calls": self.replica.num_calls}

    async def address(self, name: str) -> Any:
        """Where this replica takes calls. name: of the replica that the router shall ask."""
        return self.replica.address

    async def __del__(self) -> None:  # Ray awaits it when the replica shall end
        if hasattr(self, "replica"):
            await self.replica.close()


@serve.ingress()
class Front:
    """The deployment of a front behind Ray's proxies."""

    def __init__(self, values: dict[str, Any], engines: Any) -> None:
        from nanollama_extras.cluster.serve import front_app

        self.built = front_app(values, engines)

    def __serve_build_asgi_app__(self) -> Any:
        return self.built
