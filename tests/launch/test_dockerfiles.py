import re

import pytest
from fake_commands import LAUNCH, ROOT

FILES = {"tpu": LAUNCH / "docker" / "tpu.Dockerfile", "cuda": LAUNCH / "docker" / "cuda.Dockerfile"}


def instructions(path):
    """(instruction, its words as one string), continued lines joined, comments left out."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word.upper(), " ".join(rest.split())) for word, rest in lines]


@pytest.fixture(params=FILES, ids=list(FILES))
def made(request):
    return request.param, instructions(FILES[request.param])


def test_the_base_image_is_pinned_to_a_patch_version(made):
    assert [word for word, _ in made[1]].index("FROM") == 0
    for word, rest in made[1]:
        if word == "FROM":
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", rest), rest


def test_python_is_new_enough_for_the_package(made):
    wanted = re.search(r'python_requires=">=(\d+)\.(\d+)"', (ROOT / "setup.py").read_text())
    has = re.search(r"python:(\d+)\.(\d+)", made[1][0][1])
    assert wanted and has and tuple(map(int, has.groups())) >= tuple(map(int, wanted.groups()))


def test_the_package_is_installed_with_its_extra(made):
    extra, steps = made
    assert ("RUN", f'pip install --no-cache-dir ".[{extra}]"') in steps
    assert f'"{extra}": [' in (ROOT / "setup.py").read_text()


def test_the_image_runs_the_program_as_an_ordinary_user(made):
    steps = dict(made[1])
    assert steps["USER"] not in ("root", "0") and f"--uid 1000 {steps['USER']}" in str(made[1])
    order = [word for word, _ in made[1]]
    assert order.index("USER") > max(i for i, word in enumerate(order) if word == "RUN")
    assert steps["ENTRYPOINT"] == '["python", "-m", "smart_grpo_jax.main"]'


def test_every_copied_path_exists_and_is_in_the_build_context(made):
    extra, steps = made
    ignore = FILES[extra].with_name(f"{extra}.Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    for word, rest in steps:
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignore, source


def test_no_secret_goes_into_the_image(made):
    assert not re.search(r"(?i)token|secret|password|credential|api_key", str(made[1]))
    assert not [rest for word, rest in made[1] if word in ("ADD", "ARG")]
