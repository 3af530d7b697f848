"""The package as a user meets it: set-up files, version, silence and speed of the import."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hatcl

ROOT = Path(__file__).parents[1]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_versions_agree():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert hatcl.__version__ == setup["metadata"]["version"] == cited["version"]


def test_ci_runs_the_readmes_test_command():
    (command,) = re.findall(r'^step "(pip install .*)"$', (ROOT / ".ci" / "run").read_text(), flags=re.M)
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / "CONTRIBUTING.md").read_text()


def test_import_is_silent_and_leaves_the_extras_alone():
    code = (
        "import sys, hatcl\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "extras = {'transformers', 'peft', 'lightning', 'avalanche', 'matplotlib', 'sklearn', 'typer', 'datasets'}\n"
        "print(sorted(loaded & extras))"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("line", [["--help"], ["train", "--help"], ["finetune", "--help"]])
def test_help_leaves_the_extras_alone(line):
    code = (
        "import sys\n"
        "from hatcl.commands import main\n"
        f"try:\n    main({line})\nexcept SystemExit:\n    pass\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "extras = 'transformers peft lightning avalanche matplotlib sklearn accelerate open_clip datasets pandas'\n"
        "print(sorted(loaded & set(extras.split())))"
    )
    done = python(code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout[-300:] + done.stderr


def test_import_adds_little_to_timms():
    """So it is as fast: 1.08 times `import timm` by the processor's time, and `hatcl --help` 1.16 times."""
    code = (
        "import sys, timm\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import hatcl\n"
        "added = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "print(sorted(added - {'hatcl', 'einops'}))"
    )
    assert python(code).stdout == "[]\n"


def test_import_works_without_the_extras():
    code = (
        "import sys\n"
        "for name in ('transformers', 'peft', 'lightning', 'avalanche', 'matplotlib', 'sklearn', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        "import hatcl, hatcl.commands\n"
        "hatcl.commands.app()\n"
    )
    assert python(code).returncode == 0, python(code).stderr


@pytest.mark.parametrize("command", [[sys.executable, "-m", "hatcl"], [str(Path(sys.executable).with_name("hatcl"))]])
def test_the_command_is_there(command):
    if not Path(command[0]).exists():
        pytest.skip("hatcl is not installed beside this Python; run: pip install -e .")
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, hatcl.__version__), done.stderr
