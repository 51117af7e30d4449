"""deploy/: manifests fit their published schemas; each step of the image works without Docker."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator
from pages import BLOCKS, ROOT, TEXTS, lines

import nanollama
from nanollama_extras.testing import TestServer

DEPLOY = ROOT / "deploy"
SCHEMAS = Path(__file__).parent / "data" / "schemas"
MANIFESTS = {
    "compose.yaml": "compose",
    "compose.gpu.yaml": "compose",
    "kserve.yaml": "kserve",
    "rayservice.yaml": "rayservice",
}


def read_yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def flaws(manifest: Any, schema_name: str) -> list[str]:
    """The places of a manifest that do not fit its schema."""
    schema = json.loads((SCHEMAS / f"{schema_name}.json").read_text(encoding="utf-8"))
    is_new = "2020-12" in schema["$schema"]
    validator = (Draft202012Validator if is_new else Draft7Validator)(schema)
    return [error.json_path for error in validator.iter_errors(manifest)]


# ---- manifests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "schema"), MANIFESTS.items())
def test_a_manifest_fits_its_published_schema(name: str, schema: str) -> None:
    assert flaws(read_yaml(name), schema) == []


def test_every_manifest_is_checked() -> None:
    assert {path.name for path in DEPLOY.glob("*.yaml")} == set(MANIFESTS)


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """The containers anywhere in a manifest."""
    if isinstance(value, list):
        for item in value:
            yield from containers(item)
    elif isinstance(value, dict):
        yield from value.get("containers", [])
        for item in value.values():
            yield from containers(item)


def test_the_schemas_refuse_wrong_names_and_types() -> None:
    compose, kserve, ray = map(read_yaml, ("compose.yaml", "kserve.yaml", "rayservice.yaml"))
    compose["services"]["nanollama"]["prots"] = []
    assert flaws(compose, "compose") == ["$.services.nanollama"]
    predictor = kserve["spec"]["predictor"]
    predictor["maxReplicas"] = "three"
    predictor["containers"][0]["readinessProbe"]["httpget"] = {}
    assert flaws(kserve, "kserve") == [
        "$.spec.predictor.containers[0].readinessProbe",
        "$.spec.predictor.maxReplicas",
    ]
    (group,) = ray["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    group["minReplica"] = group.pop("minReplicas")
    group["template"]["spec"]["containers"][0]["image"] = {"name": "nanollama"}
    place = "$.spec.rayClusterConfig.workerGroupSpecs[0]"
    assert sorted(flaws(ray, "rayservice")) == [
        *[place] * 2,  # one name too many, one too few
        f"{place}.template.spec.containers[0].image",
    ]


def test_the_inference_service_is_one() -> None:
    manifest = read_yaml("kserve.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert [c["name"] for c in containers(manifest)] == ["kserve-container"]


def ray_application() -> dict[str, Any]:
    """The only application of the RayService."""
    (application,) = serve_config()["applications"]
    return dict(application)


def serve_config() -> Any:
    return yaml.safe_load(read_yaml("rayservice.yaml")["spec"]["serveConfigV2"])


def test_the_ray_service_serves_an_application_that_exists() -> None:
    application = ray_application()
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert application["route_prefix"] == "/"
    options = application["args"].items()
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in options]
    args = nanollama.build_parser().parse_args(["--serve", "--ray", *argv])
    (group,) = read_yaml("rayservice.yaml")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert args.replicas == (group["minReplicas"], group["maxReplicas"])
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["cpu"] == str(args.num_cpus)


@pytest.mark.ray
def test_ray_understands_the_configuration_of_the_ray_service() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    config = schema.ServeDeploySchema.model_validate(serve_config())
    assert config.http_options.port == int(one("EXPOSE"))
    assert [a.import_path for a in config.applications] == [ray_application()["import_path"]]


@pytest.mark.ray
def test_serve_build_writes_a_configuration_that_serve_deploy_takes(tmp_path: Path) -> None:
    """Of a module such as docs/scale.md shows."""
    schema = pytest.importorskip("ray.serve.schema")
    (module,) = [b.text for b in BLOCKS if b.page == "scale" and b.language == "python3"]
    (tmp_path / "chat.py").write_text(module)
    command = [sys.executable, "-m", "ray.serve.scripts", "build", "chat:deployment"]
    command += ["--app-dir", str(tmp_path), "-o", str(tmp_path / "chat.yaml")]
    subprocess.run(command, check=True, cwd=ROOT)
    built = yaml.safe_load((tmp_path / "chat.yaml").read_text())
    (application,) = schema.ServeDeploySchema.model_validate(built).applications
    assert application.import_path == "chat:deployment"
    assert [deployment.name for deployment in application.deployments] == ["Engine", "Front"]


def test_the_servers_of_the_manifests_are_commands_that_nanollama_understands() -> None:
    commands = [read_yaml("compose.yaml")["services"]["nanollama"]["command"]]
    commands += [container["args"] for container in containers(read_yaml("kserve.yaml"))]
    for command in commands:
        args = nanollama.build_parser().parse_args(command)
        assert args.serve
        assert args.host == "0.0.0.0"


def test_ports_volumes_and_probes_are_those_of_the_image() -> None:
    service = read_yaml("compose.yaml")["services"]["nanollama"]
    (port,), volume = service["ports"], cache_folder()
    assert port.endswith(f":8000:{one('EXPOSE')}")
    assert service["volumes"] == [f"models:{volume}"]
    for container in containers(read_yaml("rayservice.yaml")):
        assert container.get("volumeMounts", [{"mountPath": volume}])[0]["mountPath"] == volume
        assert container["image"].endswith("/nanollama:ray")
    for container in containers(read_yaml("kserve.yaml")):
        assert [p["containerPort"] for p in container["ports"]] == [int(one("EXPOSE"))]
        assert [m["mountPath"] for m in container["volumeMounts"]] == [volume]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/health", "port": 8000}


# ---- the image -----------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with its text."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line]


def all_of(name: str) -> list[str]:
    return [text for word, text in instructions() if word == name]


def one(name: str) -> str:
    (text,) = all_of(name)
    return text


def exec_form(name: str) -> list[str]:
    """The words of an ENTRYPOINT, a CMD or a HEALTHCHECK."""
    words: list[str] = json.loads(one(name)[one(name).index("[") :])
    return words


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for text in all_of("ENV") for word in shlex.split(text))


def cache_folder() -> str:
    return environment()["NANOLLAMA_CACHE"]


def test_the_dockerfile_has_the_instructions_that_it_should() -> None:
    words = [word for word, _ in instructions()]
    known = "FROM ARG ENV RUN WORKDIR COPY USER VOLUME EXPOSE HEALTHCHECK ENTRYPOINT CMD".split()
    assert words[0] == "FROM"
    assert set(words) == set(known)
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert one("USER") not in ("root", "0")
    assert one("VOLUME") == cache_folder()
    assert environment()["HF_HOME"].startswith(cache_folder())
    owned = f"install -d -o {one('USER')} -g {one('USER')} {cache_folder()}"
    assert any(owned in run for run in all_of("RUN"))


@pytest.mark.parametrize("run", all_of("RUN"))
def test_the_shell_understands_each_run(run: str) -> None:
    subprocess.run(["sh", "-n", "-c", run], check=True)


def test_the_image_installs_as_readme_says() -> None:
    runs = "\n".join(all_of("RUN"))
    torch, own = next(c for c in lines("sh") if c.startswith("pip install torch")).split(" && ")
    assert torch in runs
    assert own == "pip install ."
    assert 'pip install ".${EXTRAS:+[$EXTRAS]}"' in runs


def copied() -> list[str]:
    return [name for text in all_of("COPY") for name in text.split()[:-1]]


def test_all_that_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert sorted(f"!{name}" for name in copied()) == sorted(ignored[1:-1])
    assert all((ROOT / name).exists() for name in copied())


def test_the_command_of_the_image_is_understood() -> None:
    assert exec_form("ENTRYPOINT") == ["nanollama"]
    args = nanollama.build_parser().parse_args(exec_form("CMD"))
    assert (args.host, args.models, args.port) == ("0.0.0.0", ["smollm2"], None)
    assert int(one("EXPOSE")) == nanollama.ServerConfig().port


def test_the_build_arguments_of_docs_and_manifests_are_the_files() -> None:
    assert [text.partition("=")[0] for text in all_of("ARG")] == ["DEVICE", "EXTRAS"]
    build = read_yaml("compose.gpu.yaml")["services"]["nanollama"]["build"]
    assert build == {"args": {"DEVICE": "gpu"}}
    texts = [(DEPLOY / "Dockerfile").read_text(encoding="utf-8"), *TEXTS.values()]
    assert {word for text in texts for word in re.findall(r"--build-arg (\w+)=", text)} <= {
        "DEVICE",
        "EXTRAS",
    }


@pytest.mark.skipif(not shutil.which("wget"), reason="wget is not installed")
def test_the_health_check_knows_a_server_that_is_ready() -> None:
    command = exec_form("HEALTHCHECK")
    with TestServer() as server:
        url = server.base_url.removesuffix("/v1")
        ready = [word.replace("http://127.0.0.1:8000", url) for word in command]
        assert subprocess.run(ready).returncode == 0
        absent = [word.replace("/health", "/absent") for word in ready]
        assert subprocess.run(absent, capture_output=True).returncode != 0


def test_a_wheel_of_the_copied_files_works_in_a_fresh_environment(tmp_path: Path) -> None:
    """As in the image, but the dependencies are those of this environment."""
    source, fresh = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    for name in copied():
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    pip = [sys.executable, "-m", "pip", "-q", "--python", fresh / "bin" / "python"]
    folder = sysconfig.get_paths(vars={"base": str(fresh), "platbase": str(fresh)})["purelib"]
    Path(folder, "outer.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    install = ["install", "--no-deps", "--no-build-isolation", "--ignore-installed", source]
    subprocess.run([*pip, *install], check=True)
    installed = [Path(folder) / "nanollama_extras" / name for name in ("kernels/native.c", "api")]
    assert all(path.exists() for path in installed)
    ran = subprocess.run(
        [fresh / "bin" / exec_form("ENTRYPOINT")[0], *"--model tiny-random --prompt x".split()],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "NANOLLAMA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "decode:" in ran.stderr
