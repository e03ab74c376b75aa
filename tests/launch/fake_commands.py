"""Commands that write down how they were called, in the place of gcloud, kubectl, srun …"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
FAKE = """#!{python} -I
import json, os, sys
asked = [{name!r}, *sys.argv[1:]]
text = sys.stdin.read() if {name!r} == "kubectl" and "-" in asked else ""
with open({log!r}, "a") as file:
    file.write(json.dumps(asked + [text] * bool(text)) + "\\n")
for words, answer, code in json.load(open({answers!r})):
    if all(word in asked for word in words):
        print(answer)
        sys.exit(code)
"""


class Machine:
    """A PATH on which some commands are fakes; `answers` are (words that were asked, output, exit code)."""

    def __init__(self, folder, *names):
        self.home, self.log = folder / "home", folder / "calls.jsonl"
        self.answers = folder / "answers.json"
        self.bin = folder / "bin"
        for path in (self.home, self.bin):
            path.mkdir()
        self.answer()
        for name in names:
            fake = self.bin / name
            fake.write_text(
                FAKE.format(python=sys.executable, name=name, log=str(self.log), answers=str(self.answers))
            )
            fake.chmod(0o755)

    def answer(self, *answers):
        self.answers.write_text(json.dumps(answers))

    def run(self, script, *words, **settings):
        """The finished process of `bash launch/<script> words`, in an environment of these settings alone."""
        return subprocess.run(
            ["bash", str(LAUNCH / script), *words],
            env=self.env(**settings), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def env(self, **settings):
        path = os.pathsep.join([str(self.bin), "/usr/bin", "/bin"])
        return {"PATH": path, "HOME": str(self.home), **settings}

    def calls(self):
        """The calls so far, each a list of words."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


def refused(done):
    """The one line of a refusal."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and len(done.stderr) <= 200, done.stderr
    return done.stderr.strip()
