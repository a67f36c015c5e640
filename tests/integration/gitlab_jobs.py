"""Every job of `.gitlab-ci.yml` on this machine, as a runner would: `python -m tests.integration.gitlab_jobs`.

One clean clone serves all jobs, swept before each of them; what the pipeline caches stays, artifacts go from job to job
by `needs`. Script lines run as they stand there. Where a line wants what only a runner or a registry has, a program of
that name stands in front of the real one and notes what it was asked (`STAND_INS`); the result says which lines those
were. Needs root, docker (`scripts/with-docker python -m ...`) and most of an hour on two cores; `--set SEEDS=20` and
the like make it shorter. The result goes to benchmarks/results/gitlab-jobs.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.gitlab_pipeline import Job, expanded, read

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks/results/gitlab-jobs.json"
TAIL_LINES = 15
EARLIER = "earlier"
KEPT = (".venv", ".cache", "wheelhouse/*.whl", "wheelhouse/.stamp")

NOTE = 'echo "$(basename "$0") $*" >>"$STAND_IN_NOTES"\n'
REAL = 'exec env PATH="${PATH#*:}" "$(basename "$0")" "$@"\n'
STAND_INS = {
    "apk": ("packages of Alpine: this machine has the programs already", NOTE),
    "ssh-agent": ("no remote host: the docker daemon of this machine is deployed to", NOTE),
    "ssh-add": ("no remote host: the docker daemon of this machine is deployed to", NOTE),
    "docker": (
        "no registry: nobody logs in, and nothing is pushed or pulled; `docker run python:3.11` is this machine",
        'case "$1" in login|push|pull) ' + NOTE.strip() + "; exit 0 ;; esac\n"
        'case " $* " in *" python:3.11 bash -c "*) '
        + NOTE.strip()
        + '; eval "last=\\${$#}"; exec bash -c "$last" ;; esac\n'
        + REAL,
    ),
    "docker-compose": (
        "no registry: nothing is pushed or pulled",
        'for word; do case "$word" in push|pull) ' + NOTE.strip() + "; exit 0 ;; esac; done\n" + REAL,
    ),
}


class Runner:
    """Runs jobs in one clone. ``told`` has a line for each of them."""

    def __init__(self, work: Path, source: str, changes: dict[str, str]) -> None:
        self.work, self.clone, self.told = work, work / "project", list[dict[str, Any]]()
        self._artifacts, self._notes, self._logs = work / "artifacts", work / "notes", work / "logs"
        self._changes = changes
        for folder in (self._artifacts, self._logs, work / "stand-ins"):
            folder.mkdir(parents=True, exist_ok=True)
        for name, (_, body) in STAND_INS.items():
            path = work / "stand-ins" / name
            path.write_text(f"#!/usr/bin/env bash\n{body}")
            path.chmod(0o755)
        if not self.clone.exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], check=True)
        self._git("fetch", "--quiet", str(ROOT), "HEAD")
        self.sha = self._git("rev-parse", "FETCH_HEAD")
        self._git("checkout", "--quiet", "--force", self.sha)
        self._predefined = {
            "CI": "true",
            "CI_PROJECT_DIR": str(self.clone),
            "CI_PROJECT_URL": "https://gitlab.example/group/ferryline",
            "CI_COMMIT_SHA": self.sha,
            "CI_COMMIT_SHORT_SHA": self.sha[:8],
            "CI_COMMIT_BRANCH": "main",
            "CI_DEFAULT_BRANCH": "main",
            "CI_PIPELINE_ID": "1",
            "CI_PIPELINE_SOURCE": source,
            "CI_NODE_INDEX": "1",
            "CI_NODE_TOTAL": "2",
            "CI_REGISTRY": "registry.example",
            "CI_REGISTRY_IMAGE": "registry.example/group/ferryline",
            "CI_REGISTRY_USER": "ci",
            "CI_REGISTRY_PASSWORD": "not-a-password",
            "DEPLOY_HOST": "unix:///var/run/docker.sock",
            "DEPLOY_KEY": str(work / "key"),
            "DEPLOY_VOLUMES": str(work / "volumes"),
            "DEPLOY_PROJECT": f"ferryline-deploy-{os.getpid()}",
            "DEPLOY_AUTH": "1",
            "FERRYLINE_PORT": "0",
        }
        self.pipeline = read((self.clone / ".gitlab-ci.yml").read_text())

    def run(self, only: set[str], keep_going: bool) -> None:
        """All jobs that this kind of pipeline has, manual ones included, or those of ``only``.

        ``keep_going``: also those that need one that failed, which GitLab would not start.
        """
        for job in self.pipeline.jobs:
            variables = self._variables(job)
            when = job.when(variables)
            if when == "never" or (only and job.name not in only):
                continue
            failed = [one["job"] for one in self.told if one["job"] in job.needs and one["status"] != "passed"]
            if failed and not keep_going:
                self.told.append({"job": job.name, "stage": job.stage, "status": "skipped", "because_of": failed})
                continue
            self.told.append(self._one(job, variables, when))
            sys.stdout.write(f"{job.name}: {self.told[-1]['status']}, {self.told[-1]['seconds']} s\n")
            sys.stdout.flush()

    def _one(self, job: Job, variables: dict[str, str], when: str) -> dict[str, Any]:
        self._sweep()
        if job.name == "deploy":
            self._earlier_deployment(variables)
        for needed in job.needs:
            if (self._artifacts / needed).exists():
                shutil.copytree(self._artifacts / needed, self.clone, dirs_exist_ok=True)
        self._notes.write_text("")
        lines = [*job.before_script, *job.script]
        log, began = self._logs / f"{job.name}.log", time.monotonic()
        # Line by line in one shell, which ends at the first that fails, as a runner does.
        script = "set -eo pipefail\n" + "\n".join(lines) + "\n"
        with log.open("wb") as output:
            command = ["nice", "bash", "-c", script]
            done = subprocess.run(command, cwd=self.clone, env=variables, stdout=output, stderr=output, check=False)
        told: dict[str, Any] = {
            "job": job.name,
            "stage": job.stage,
            "status": "passed" if done.returncode == 0 else f"failed with status {done.returncode}",
            "seconds": round(time.monotonic() - began),
            "lines": len(lines),
        }
        if when == "manual":
            told["when"] = when
        if notes := self._notes.read_text().splitlines():
            told["stood_in_for"] = sorted({note[:160] for note in notes})
        missing = [path for path in [*job.artifacts, *job.reports] if not (self.clone / path).exists()]
        if missing and done.returncode == 0:
            told["status"] = f"failed: it left no {', '.join(missing)}"
        if told["status"] != "passed":
            told["end_of_log"] = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        for path in job.artifacts:
            if (self.clone / path).exists():
                shutil.copytree(self.clone / path, self._artifacts / job.name / path)
        return told

    def _variables(self, job: Job) -> dict[str, str]:
        """Those of the file, then what the pipeline was started with; of ours only where packages come from."""
        kept = ("HOME", "LANG", "TMPDIR", "PIP_", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "http_proxy", "https_proxy")
        ours = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        ours["PATH"] = f"{self.work / 'stand-ins'}:{os.environ['PATH']}"
        ours |= {"STAND_IN_NOTES": str(self._notes), "DOCKER_BUILDKIT": "0"}
        variables = expanded({**self.pipeline.variables, **job.variables}, {**ours, **self._predefined})
        return variables | self._changes

    def _sweep(self) -> None:
        """As a runner fetches: the commit, and nothing that an earlier job left but what is cached."""
        self._git("checkout", "--quiet", "--force", self.sha)
        self._git("clean", "-ffdxq", *(word for kept in KEPT for word in ("-e", kept)))

    def _git(self, *args: str) -> str:
        command = ["git", "-C", str(self.clone), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def _earlier_deployment(self, variables: dict[str, str]) -> None:
        """What an earlier pipeline left: a cluster of another tag, to be rolled over and to go back to."""
        for service in ("coordinator", "broker"):
            image = f"{variables['FERRYLINE_IMAGES']}ferryline-{service}"
            subprocess.run(["docker", "tag", f"{image}:{self.sha[:8]}", f"{image}:{EARLIER}"], check=True)
        deploy = ["scripts/deploy", EARLIER]
        subprocess.run(deploy, cwd=self.clone, env=variables, check=True, capture_output=True)

    def wheels_for_images(self) -> None:
        """The stand-in base image has no pip: its builds install from wheelhouse/, which needs the environment."""
        venv = ["make", "--no-print-directory", "venv"]
        subprocess.run(
            venv, cwd=self.clone, env=self._variables(self.pipeline.jobs[0]), check=True, capture_output=True
        )
        subprocess.run(["scripts/wheelhouse"], cwd=self.clone, check=True, capture_output=True)

    def clean(self, keep: bool) -> None:
        """No container, network or image of a deployment stays, and no file unless they are to be kept."""
        project = self._predefined["DEPLOY_PROJECT"]
        environment = {**os.environ, "FERRYLINE_VOLUMES": str(self.work / "volumes"), "COMPOSE_PROFILES": "monitoring"}
        down = ["scripts/compose", "-p", project, "down", "--volumes", "--remove-orphans", "-t", "5"]
        subprocess.run(down, cwd=ROOT, env=environment, capture_output=True, check=False)
        for service in ("coordinator", "broker"):
            image = f"{self._predefined['CI_REGISTRY_IMAGE']}/ferryline-{service}"
            remove = ["docker", "rmi", "--force", f"{image}:{self.sha[:8]}", f"{image}:{EARLIER}"]
            subprocess.run(remove, capture_output=True, check=False)
        if not keep:
            shutil.rmtree(self.work, ignore_errors=True)


def run(
    *, source: str, changes: dict[str, str], only: set[str], keep_going: bool = False, work: Path | None = None
) -> dict[str, Any]:
    """The account of one pipeline. ``work``: a folder that stays, so that the next run need not install again."""
    runner = Runner(work or Path(tempfile.mkdtemp(prefix="ferryline-jobs-")), source, changes)
    try:
        runner.wheels_for_images()
        runner.run(only, keep_going)
    finally:
        runner.clean(keep=work is not None)
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": runner.sha[:8],
        "pipeline": source,
        "changed_variables": changes,
        "stand_ins": {name: why for name, (why, _) in STAND_INS.items()},
        "base_image": "scripts/stand-in-image: Debian packages, with wheels from wheelhouse/ as there is no pip in it",
        "jobs": runner.told,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default="push", choices=["push", "schedule"], help="what starts the pipeline")
    parser.add_argument("--only", default="", help="jobs, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the pipeline")
    parser.add_argument("--keep-going", action="store_true", help="run jobs although one that they need has failed")
    parser.add_argument("--work", type=Path, help="run in this folder and leave it there, for another run")
    parser.add_argument("--merge", action="store_true", help="put these jobs in place of the same ones of the result")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    changes = dict(change.split("=", 1) for change in options.set)
    only = set(filter(None, options.only.split(",")))
    account = run(source=options.source, changes=changes, only=only, keep_going=options.keep_going, work=options.work)
    for job in account["jobs"]:
        job["commit"] = account["commit"]
    if options.merge:
        earlier = {job["job"]: job for job in json.loads(options.result.read_text())["jobs"]}
        order = [job.name for job in read((ROOT / ".gitlab-ci.yml").read_text()).jobs]
        found = earlier | {job["job"]: job for job in account["jobs"]}
        account["jobs"] = sorted(found.values(), key=lambda job: order.index(job["job"]))
    options.result.write_text(json.dumps(account, indent=2) + "\n")
    return 0 if all(job["status"] == "passed" for job in account["jobs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
