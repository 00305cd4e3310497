"""Every launch script, job and recipe in examples/ starts what exists: its command is caught before the launcher."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from megatron_flashi2v.config.layout import model_ranks
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_train
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for kind in ("gpu", "ascend") for path in (EXAMPLES / kind).glob("*.sh")
                 if path.name != "environment.sh")  # fmt: skip
JOBS = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
# Writes down what it was started with, one argument in a line, and what the environment is.
CATCHER = '#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@" >"$CAUGHT"\nenv >"$CAUGHT.env"\n'
MSRUN_FLAGS = {"worker_num", "local_worker_num", "join", "log_dir", "master_addr", "master_port", "node_rank"}


@dataclass(frozen=True)
class Started:
    """What a script would start, on each node, and on how many processes of how many nodes."""

    launcher: str
    nodes: int
    world_size: int
    flags: list[str]


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(EXAMPLES)) for path in paths]


def understood(command: list[str]) -> tuple[int, int, list[str]]:
    """Nodes, processes and our flags of a launcher's command line; msrun does not count nodes, so 0."""
    launcher, *rest = command
    if launcher == "flashi2v":
        assert rest.pop(0) == "torchrun"
        seen = get_args_parser().parse_args(rest)  # leaves with an error at a flag that torchrun does not know
        script, flags = seen.training_script, seen.training_script_args
        assert script == "train"
        script = "examples/pretrain_flashi2v.py"  # the same
        nodes = int(seen.nnodes)
        world = nodes * int(seen.nproc_per_node)
        assert nodes == 1 or not seen.rdzv_endpoint.startswith("localhost")
    else:
        split = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        script, flags, before = rest[split], rest[split + 1 :], rest[:split]
        nodes, world = 0, 0
        if launcher == "msrun":
            own = dict(zip((word.removeprefix("--") for word in before[::2]), before[1::2], strict=True))
            assert own.keys() <= MSRUN_FLAGS and own["join"] == "True"
            world = int(own["worker_num"])
            assert int(own["node_rank"]) * int(own["local_worker_num"]) < world
        else:
            assert (launcher, before) == ("srun", ["--kill-on-bad-exit=1", "python"])
    assert script == "examples/pretrain_flashi2v.py" and (ROOT / script).exists()
    return nodes, world, flags


def start(script: Path, tmp_path: Path, **environment: str) -> Started:
    """Run a script whose launchers are caught."""
    for name in ("flashi2v", "msrun", "srun"):
        (tmp_path / name).write_text(CATCHER)
        (tmp_path / name).chmod(0o755)
    caught = tmp_path / "caught"
    clean = {name: value for name, value in os.environ.items()
             if name not in ("NNODES", "NODE_RANK", "HEAD", "GPUS", "NPUS", "SLURM_SUBMIT_DIR")}  # fmt: skip
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CAUGHT": str(caught),
             "ASCEND_HOME_PATH": "/usr/local/Ascend", **environment},
    )
    assert done.returncode == 0, done.stderr
    command = caught.read_text().splitlines()
    nodes, world, flags = understood(command)
    if command[0] == "srun":
        asked = dict(re.findall(r"^#SBATCH --(\S+)=(\S+)$", script.read_text(), re.MULTILINE))
        assert asked["ntasks-per-node"] == asked["gpus-per-node"]
        nodes = int(environment.get("SLURM_NODES", asked["nodes"]))
        world = nodes * int(asked["ntasks-per-node"])
    return Started(command[0], nodes, world, flags)


def check(flags: list[str], world_size: int) -> TrainConfig:
    config = parse(TrainConfig, absolute(flags), prog="flashi2v train", description="")
    check_train(config, resolve_model(config.model), world_size)
    return config


def absolute(flags: list[str]) -> list[str]:
    """Recipes are named from the repository's root, where every script goes."""
    return [flag.replace("examples/recipes/", f"{EXAMPLES}/recipes/") for flag in flags]


def test_something_is_tested() -> None:
    names = {script.name for script in SCRIPTS}
    assert {"pretrain_1.3b.sh", "pretrain_14b.sh", "pretrain_14b_slurm.sh", "pretrain_14b_msrun.sh"} <= names
    assert len(SCRIPTS) == 10 and len(JOBS) == 1 and len(RECIPES) >= 8


@pytest.mark.parametrize("script", SHELL := sorted(EXAMPLES.rglob("*.sh")), ids=ids(SHELL))
def test_shell_syntax(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=ids(SCRIPTS))
def test_one_node_and_the_stated_number(script: Path, tmp_path: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK) and f"bash {script.relative_to(ROOT)} [" in text or "#SBATCH" in text
    stated = re.search(r"NNODES=(\d+)|#SBATCH --nodes=(\d+)", text)
    assert stated is not None, "the script does not say for how many nodes it is"
    many = next(filter(None, stated.groups()))
    environments: list[tuple[int, dict[str, str]]] = [
        (1, {"SLURM_NODES": "1"}),
        (int(many), {"NNODES": many, "HEAD": "10.0.0.1", "NODE_RANK": str(int(many) - 1)}),
    ]
    for nodes, environment in environments:
        started = start(script, tmp_path, **environment)
        assert started.world_size == 8 * nodes
        config = check(started.flags, started.world_size)
        platform = script.parent.name
        assert config.runtime.device == {"gpu": "cuda", "ascend": "npu"}[platform]
        assert script.stem.split("_")[1] == config.model.model
        assert config.parallel.use_distributed_optimizer and config.batch.bf16
        if platform == "gpu":
            assert config.parallel.hccl_buffer_sizes is None


@pytest.mark.parametrize("script", SCRIPTS, ids=ids(SCRIPTS))
def test_users_flags_come_last(script: Path) -> None:
    """So that they win over the script's."""
    assert script.read_text().rstrip().endswith('"$@"')


WITHOUT_CANN = pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="this machine has its own CANN")


def test_several_nodes_need_an_address_and_a_rank(tmp_path: Path) -> None:
    for script, missing, given in ((EXAMPLES / "gpu" / "pretrain_14b.sh", "HEAD", {}),
                                   (EXAMPLES / "ascend" / "pretrain_14b_msrun.sh", "NODE_RANK", {"HEAD": "a"})):
        with pytest.raises(AssertionError, match=f"{missing}: "):
            start(script, tmp_path, NNODES="2", **given)


@WITHOUT_CANN
def test_ascend_needs_cann(tmp_path: Path) -> None:
    both = r"set_env\.sh of CANN.*/usr/local/Ascend/cann .*/usr/local/Ascend/ascend-toolkit"
    with pytest.raises(AssertionError, match=both):
        start(EXAMPLES / "ascend" / "pretrain_1.3b.sh", tmp_path, ASCEND_HOME_PATH="", HOME=str(tmp_path))


@WITHOUT_CANN
@pytest.mark.parametrize("places, found", [
    (["cann"], "cann"), (["ascend-toolkit"], "ascend-toolkit"), (["ascend-toolkit", "cann"], "cann"),
])
def test_ascend_finds_cann(places: list[str], found: str, tmp_path: Path) -> None:
    for place in places:
        folder = tmp_path / "Ascend" / place
        folder.mkdir(parents=True)
        # CANN's own prepends to what may not be set, and ends with whatever its last test says
        (folder / "set_env.sh").write_text(f"export ASCEND_HOME_PATH={folder}${{NOBODY_SETS_THIS}}\n[ -d /nowhere ]\n")
    start(EXAMPLES / "ascend" / "pretrain_1.3b.sh", tmp_path, ASCEND_HOME_PATH="", HOME=str(tmp_path))
    assert f"ASCEND_HOME_PATH={tmp_path}/Ascend/{found}\n" in (tmp_path / "caught.env").read_text()
    script = tmp_path / "script.sh"
    script.write_text(f"set -eu\nunset ASCEND_HOME_PATH\n. {EXAMPLES}/ascend/environment.sh\nfalse\necho 'goes on'\n")
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")  # a script that stops at errors still does


def test_platforms_share_recipes(tmp_path: Path) -> None:
    recipes: dict[str, set[str]] = {"gpu": set(), "ascend": set()}
    for script in SCRIPTS:
        flags = start(script, tmp_path).flags
        recipes[script.parent.name].add(flags[flags.index("--config") + 1])
    assert recipes["gpu"] == recipes["ascend"]


@pytest.mark.parametrize("platform", ["gpu", "ascend"])
def test_every_variable_has_its_reason(platform: str) -> None:
    for line in (EXAMPLES / platform / "environment.sh").read_text().splitlines():
        assert not line.startswith("export") or re.search(r"\s# \w.{15}", line), line


@pytest.mark.parametrize("job", JOBS, ids=ids(JOBS))
def test_kubernetes_job(job: Path) -> None:
    service, task = yaml.safe_load_all(job.read_text())
    spec, name = task["spec"], task["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    nodes, world, flags = understood(container["command"])
    assert nodes == spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    assert world == nodes * container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["selector"] == {"job-name": name}
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:29500" in container["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    config = check(flags, world)
    mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    for path in (config.checkpoint.save, Path(config.data.data_path[0])):
        assert path is not None and any(path.is_relative_to(mount) for mount in mounts)
    set_by_script = dict(re.findall(r'^export (\w+)="?(?:\$\{\w+:-)?([^\s}"]+)',
                                    (EXAMPLES / "gpu" / "environment.sh").read_text(), re.MULTILINE))
    assert {variable["name"]: variable["value"] for variable in container["env"]} == set_by_script


@pytest.mark.parametrize("recipe", RECIPES, ids=ids(RECIPES))
def test_recipe(recipe: Path) -> None:
    config = parse(TrainConfig, ["--config", str(recipe)], prog="flashi2v train", description="")
    assert config.model.model == recipe.stem
    check_train(config, resolve_model(config.model), model_ranks(config.parallel))


@pytest.mark.parametrize("dockerfile", DOCKERFILES := sorted(EXAMPLES.rglob("Dockerfile")), ids=ids(DOCKERFILES))
def test_container_recipe(dockerfile: Path) -> None:
    text = dockerfile.read_text().replace("\\\n", "")
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert {"setup.py", "megatron_flashi2v", "kernels", "examples"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    assert f"-f {dockerfile.relative_to(ROOT)} " in text  # its first line says how it is built
    known = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "#", "ENV"}
    assert {line.split()[0] for line in text.splitlines() if line.strip()} <= known


def test_ascends_container_has_no_cuda() -> None:
    """torch is installed first, apart, so that x86 can take it from an index without CUDA; nothing may replace it."""
    text = (EXAMPLES / "ascend" / "Dockerfile").read_text().replace("\\\n", " ")
    first, *later = re.findall(r"^RUN (.*pip install.*)$", text, re.MULTILINE)
    assert re.search(r"\$\{TORCH_INDEX:\+--index-url \$\{TORCH_INDEX\}\} torch==\$\{TORCH\}\s", first)
    assert "-c constraints.txt -e . torch==${TORCH}" in later[0]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(EXAMPLES.glob("*/README.md")),
         *sorted((ROOT / "megatron_flashi2v").glob("*/README.md"))]


@pytest.mark.parametrize("page", PAGES,
                         ids=[str(page.relative_to(ROOT)) for page in PAGES])  # fmt: skip
def test_commands_of_the_pages(page: Path) -> None:
    """Command lines with a recipe have flags that exist; linked files, and those named in examples/, are there."""
    for name in set(re.findall(r"examples/[\w./-]+\w", page.read_text())):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text()):
        assert (page.parent / link.partition("#")[0]).exists(), link
    commands_of(page)


def commands_of(page: Path) -> list[TrainConfig]:
    """What the page's indented, or quoted, command lines with a recipe mean."""
    text = page.read_text().replace("\\\n", " ")
    found = []
    for line in re.findall(r"^(?: {4,}|.*`)(.*--config examples/recipes/.*)$", text, re.MULTILINE):
        command = line.partition("`")[0].partition("  #")[0].replace("...", "")
        flags = shlex.split(command[command.index("--config") :])
        found.append(parse(TrainConfig, absolute(flags), prog="flashi2v train", description=""))
    return found


def test_runs_that_are_compared_resume_nothing() -> None:
    """The recipe's --load would go on with the quickstart's run, and train nothing; no folder serves two commands."""
    commands = commands_of(EXAMPLES / "ascend" / "README.md")
    assert {config.runtime.device for config in commands} == {"npu", "cpu"}
    recipe = parse(TrainConfig, ["--config", str(EXAMPLES / "recipes" / "tiny.yaml")], prog="", description="")
    folders = [recipe.checkpoint.save, *(config.checkpoint.save for config in commands)]
    assert [config.checkpoint.load for config in commands] == folders[1:]
    assert len(set(folders)) == len(folders)
    for config in commands:
        check_train(config, resolve_model(config.model), 1)
