"""`--serve --ray`, and an application for `serve run` and `serve deploy`: replicas of one server on
Ray Serve, behind a front.

    nanollama --serve --model MODEL --ray --replicas 1:4
    serve run nanollama_extras.cluster:app model=MODEL replicas=1:4

The front of the command line is in its own process; that of an application is a deployment behind
Ray's proxies. Both are cluster.front with a cluster.placement. A replica is cluster.replica; it
gets settings and builds its engine itself. cluster.shipped has the classes that Ray carries.

Seam       cluster.options calls `run`; Ray imports `app` from the package.
Remove     delete the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError

from nanollama import (
    SHUTDOWN_S,
    TINY_RANDOM,
    Json,
    ModelStore,
    NanollamaError,
    Settings,
    UsageError,
    build_parser,
    create_app,
    given_flags,
    local_path,
    log,
    run_serve,
)
from nanollama import ServerConfig as Config
from nanollama_extras.cluster.front import FrontModels
from nanollama_extras.cluster.options import LOCAL
from nanollama_extras.cluster.placement import LIVE
from nanollama_extras.cluster.replica import settings_of
from nanollama_extras.cluster.shipped import Engine, Front

if TYPE_CHECKING:
    from starlette.types import ASGIApp

APP = "nanollama"  # name of the application on Ray
SHIPPED = "nanollama_extras.cluster.shipped"
SLOTS = 16  # sequences of a replica that run at once, where --parallel does not say
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # of Ray Serve's own logs
SCALING: Json = {"look_back_period_s": 15.0, "upscale_delay_s": 10.0}  # Ray's own are 30 s
# settings that may be paths
FILES = ("tokenizer", "adapter", "draft", "modelfile", "script", "mcp")


def values_of(args: argparse.Namespace) -> Json:
    """A parsed command line as plain values, with absolute paths: replicas run elsewhere."""

    def absolute(value: Any) -> Any:
        is_path = value and local_path(str(value)) and Path(str(value)).name != str(value)
        return type(value)(os.path.abspath(os.path.expanduser(value))) if is_path else value

    values = {name: value for name, value in vars(args).items() if name != "enter"}
    values["models"] = [absolute(model) for model in args.models]
    paths = ("prompt_cache", "packed_cache", "mmproj")  # whether they exist or not
    for name in filter(values.get, paths):
        values[name] = os.path.abspath(os.path.expanduser(values[name]))
    return {**values, **{name: absolute(values.get(name)) for name in FILES}}


def engine_deployment(values: Json) -> Any:
    """The deployment of the replicas, bound to their settings."""
    least, most = values["replicas"] or (1, 1)
    slots = values["parallel"] or SLOTS
    num_cpus = cores_of(values)
    resources: Json = {"num_cpus": num_cpus, "num_gpus": values["num_gpus"] or 0}
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    resources["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(path)}}
    policy = AutoscalingPolicy(policy_function=f"{SHIPPED}.wanted_replicas")
    scaling = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=slots,
        policy=policy,
        **SCALING,
    )
    router = RequestRouterConfig(request_router_class=f"{SHIPPED}.NamedReplicaRouter")
    made = serve.deployment(Engine).options(
        name="Engine",
        ray_actor_options=resources,
        autoscaling_config=scaling,
        request_router_config=router,
        logging_config=QUIET,
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=SHUTDOWN_S + 5,
    )
    own = {"threads": values["threads"] or num_cpus, "api_keys": None}  # Ray shows arguments
    return made.bind({**values, **own})


def front_of(title: str, config: Config, app: str, **connection: Any) -> FrontModels:
    """The models of a front, whose replicas belong to an application on Ray."""
    return FrontModels({}, config, live=lambda: LIVE.get(app, ()), title=title, **connection)


# ---- the command line ----------------------------------------------------------------------------


def run(settings: Settings) -> int:
    """--serve --ray. Raises NanollamaError."""
    return run_serve(settings, open_front)


def open_front(settings: Settings, config: Config) -> FrontModels:
    """A front in this process, which deploys its replicas while it listens."""
    args = settings.args
    is_local = args.ray == LOCAL
    if is_local and not args.script:
        for model in args.models or [settings.model]:
            if model != TINY_RANDOM:
                ModelStore().resolve(model, args.revision)  # once, before many replicas want it
    connect_ray(None if is_local else args.ray)
    least, most = args.replicas or (1, 1)
    named = ", ".join(args.models) or settings.model
    title = f"loading {named}: {least if least == most else f'{least} to {most}'} on Ray"
    values = values_of(args)
    check_room(values)

    def connect() -> Any:
        return deploy(engine_deployment(values))

    return front_of(title, config, APP, connect=connect, disconnect=partial(disconnect, is_local))


def connect_ray(address: str | None) -> None:
    """Start Ray on this machine, or connect to a cluster. Raises NanollamaError."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    options: Json = {"logging_level": logging.ERROR, "namespace": "serve"}
    if address is None:
        options |= {"include_dashboard": False, "address": "local"}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        place = address or "on this machine"
        raise NanollamaError(f"--ray: Ray {place} cannot be reached: {ray_reason(error)}") from None


def check_room(values: Json) -> None:
    """Refuse more replicas than this machine has cores for; another cluster may still grow. Raises
    UsageError."""
    least, cores = (values["replicas"] or (1, 1))[0], int(ray.cluster_resources().get("CPU", 0))
    problem = (
        f"{least} replicas of {cores_of(values)} cores need more than the {cores} that Ray has"
    )
    if least * cores_of(values) <= cores:
        return
    if values["ray"] == LOCAL:
        raise UsageError(f"{problem}; lower --replicas or --num-cpus")
    log.warning(f"{problem}; waiting for more")


def cores_of(values: Json) -> int:
    """The cores of a replica."""
    return int(values["num_cpus"] or values["threads"] or 1)


def deploy(application: Any) -> Any:
    """Deploy replicas and wait until the least number of them runs -> their handle. Raises
    NanollamaError with the reason of a replica that cannot start."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    try:
        return ready(serve.run(application, name=APP, route_prefix=None))
    except RuntimeError as error:
        states = [app.deployments for app in serve.status().applications.values()]
        reports = [one.message for state in states for one in state.values()]
        reason = ray_reason(RuntimeError("\n".join([*reports, str(error)])))
        raise NanollamaError(f"the replicas cannot start: {reason}") from None


def ready(handle: Any) -> Any:
    """A handle, once it knows replicas. The front of an application may start before they do."""
    while not LIVE.get(handle.app_name):
        with contextlib.suppress(DeploymentUnavailableError):
            handle.broadcast("address", "").results(timeout_s=60, return_exceptions=True)
        time.sleep(0.02)
    return handle


def disconnect(is_local: bool) -> None:
    """Delete the application, or end a Ray of this process's own. Gives up after a while: Ray may
    have been ended first."""

    def end() -> None:
        with contextlib.suppress(Exception):
            if not is_local:
                serve.delete(APP)
            ray.shutdown()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(SHUTDOWN_S)


def ray_reason(error: BaseException) -> str:
    """The line of Ray's report that says why: of this program, of an exception, or the first."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = re.findall(r"Error: nanollama: (.+)", text)
    other = re.findall(r"^(\w+Error: (?!Traceback|.*\bray::).+)", text, re.MULTILINE)
    return str([*own, *other, *lines, type(error).__name__][0])[:400]


# ---- an application for Ray's own commands -------------------------------------------------------


def argv_of(args: Mapping[str, Any]) -> Iterator[str]:
    """The command line of an application's arguments: model=M ctx=4096 any-model=true."""
    yield "--serve"
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if str(one).lower() == "true":
                yield flag
            elif one is not None and str(one).lower() != "false":
                yield f"{flag}={one}"


def app(args: dict[str, Any]) -> Any:
    """The application of `serve run` and of a config file. args: options of `nanollama --serve`."""
    argv = [*argv_of(args), "--ray"]
    try:
        values = values_of(build_parser().parse_args(argv))
    except SystemExit:
        raise UsageError(f"these options cannot be used: {' '.join(argv)}") from None
    return (
        serve.deployment(Front)
        .options(name="Front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
        .bind(values, engine_deployment(values))
    )


def front_app(values: Json, engines: Any) -> ASGIApp:
    """The application of a front behind Ray's proxies."""
    args = settings_of(values).args
    log.setLevel(logging.INFO)
    keys = args.api_keys or os.environ.get("NANOLLAMA_API_KEY", "").split(",")
    own = {"api_keys": tuple(key.strip() for key in keys if key.strip()), "host": "0.0.0.0"}
    config = Config(**given_flags(args, Config) | own)
    connect = partial(ready, engines)
    title, name = "replicas", engines.app_name
    return create_app(front_of(title, config, name, connect=connect, waits=True))
