"""Faults: a small run is disturbed at a random moment, started again, and must end as if nothing had been.

    python benchmarks/faults.py --out runs/faults                                    # 200 runs, or an hour of them
    python benchmarks/faults.py --out runs/faults --runs 20 --kinds sigterm,full_disk --seed 7

Each run starts `align` in an empty directory, does one thing to it, and starts the same command again (more often where
that is to stop with a named error first). It is good if every start ends in time, with an exit code and a line that
docs/faults.md names; if the last one leaves the same bytes as an undisturbed run (export, sweeps, transcripts, and
metrics but for the times); and if training goes on from the newest checkpoint that was complete and intact.

Full disks are small file systems in memory where this process may mount one (root), else a limit on the size of every
file. Results go to OUT/faults.json, one entry per run with its seed: `--seed S --runs 1` repeats one.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 180.0  # s after which a start counts as hung; undisturbed it takes about ten
GRACE = 30.0  # s in which a run that was told to stop has to end
RESUMABLE = 75
JOB = {
    "lppo.iterations": "8",
    "lppo.epochs": "1",
    "lppo.max_new_tokens": "4",
    "checkpoint.every": "2",
    "checkpoint.keep": "3",
    "data.train": "toy:mixed",
    "data.mixture": "{'forbidden': 0.5, 'vqa': 0.5}",
    "reward.by_kind": "{'forbidden': 'reward_model', 'vqa': 'exact_match'}",
    "reward.model": "toy:reward_model",
    "reward.normalise": "true",
    "sweep.datasets": "{'forbidden': 'toy:forbidden'}",
    "sweep.utility": "{}",
    "sweep.scorers": "refusal_keywords,toy:reward_model",
    "sweep.exits": "1,23",
    "sweep.limit": "4",
    "sweep.max_new_tokens": "4",
    "export.form": "full",
    "log.tensorboard": "false",
}


@dataclasses.dataclass
class End:
    """How one start of the command ended; `code` is None where it had to be killed by us."""

    code: int | None
    seconds: float
    said: str

    @property
    def line(self) -> str:
        """The line that names what happened."""
        lines = [line for line in self.said.splitlines() if line.startswith("icet-jax:")]
        return lines[-1] if lines else ""


class Job:
    """The command, in a directory of its own; `mounts`: which may be a small file system."""

    def __init__(self, workdir: Path, cache: Path, processes: int = 1, mounts: bool = False):
        self.workdir, self.cache, self.processes, self.mounts = workdir, cache, processes, mounts

    def arguments(self) -> list[str]:
        flags = [f"--config.{name}={value}" for name, value in JOB.items()]
        return ["--config=configs/llava15_lppo.py:smoke", f"--workdir={self.workdir}", *flags]

    def start(self, file_limit: int | None = None) -> subprocess.Popen[str]:
        arguments = self.arguments()
        command = [sys.executable, "-m", "icet_jax.main", *arguments]
        if self.processes > 1:
            launch = ["launch/local_processes.py", f"--processes={self.processes}", "--devices=1", "--"]
            command = [sys.executable, *launch, *arguments]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit or 0, file_limit or 0))

        return subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, text=True,
            preexec_fn=None if file_limit is None else limit, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str], began: float, limit: float = LIMIT) -> End:
        """Waits for a start; one that does not end is killed with all its children."""
        try:
            _, said = process.communicate(timeout=limit)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, said = process.communicate()
            code = None
        return End(code, time.monotonic() - began, said)

    def run(self, file_limit: int | None = None) -> End:
        began = time.monotonic()
        return self.end(self.start(file_limit), began)

    def disturbed(self, seconds: float, act: Callable[[Any], None], limit: float) -> End:
        """A start to which something is done after `seconds`, unless it has ended by then."""
        began = time.monotonic()
        process = self.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        if process.poll() is None:
            act(process)
        return self.end(process, began, limit)

    def stopped(self, ready: Callable[[], bool], seconds: float) -> End:
        """A start that is killed so many seconds after `ready`."""
        began = time.monotonic()
        process = self.start()
        while process.poll() is None and time.monotonic() - began < LIMIT and not ready():
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        return self.end(process, began, GRACE)

    def checkpoints(self) -> list[Path]:
        """Complete ones, the newest last."""
        found = (self.workdir / "checkpoints").glob("[0-9]*")
        whole = (path for path in found if path.name.isdigit() and (path / "_CHECKPOINT_METADATA").exists())
        return sorted(whole, key=lambda path: int(path.name))

    def result(self) -> dict[str, bytes]:
        """What an undisturbed run and a resumed one must have in common."""
        kept = ("hf/*.safetensors", "hf/config.json", "sweeps/*.json", "transcripts/*.jsonl")
        files = {str(p.relative_to(self.workdir)): p.read_bytes() for glob in kept for p in self.workdir.glob(glob)}
        rows = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        timeless = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
        return files | {"metrics.jsonl": json.dumps(timeless, sort_keys=True).encode()}


class Failed(Exception):
    """A run did what it must not."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Failed(what)


def sigkill(job: Job, rng: random.Random, typical: float) -> list[End]:
    """Killed at any moment."""
    end = job.disturbed(rng.uniform(0, typical), lambda p: p.send_signal(signal.SIGKILL), GRACE)
    expect(end.code in (0, -signal.SIGKILL), f"ended with {end.code}")
    return [end]


def sigterm(job: Job, rng: random.Random, typical: float) -> list[End]:
    """Told to stop at any moment; sometimes a second time, at once or a little later."""

    def tell(process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGTERM)
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 1))
            process.send_signal(signal.SIGTERM)

    end = job.disturbed(rng.uniform(0, typical), tell, GRACE)
    # Before the program listens, and with a second signal, the system ends it.
    expect(end.code in (0, RESUMABLE, -signal.SIGTERM), f"ended with {end.code}")
    expect(end.code != RESUMABLE or "SIGTERM" in end.line, f"unnamed end: {end.line}")
    return [end]


def full_disk(job: Job, rng: random.Random, typical: float) -> list[End]:
    """The disk is full from some moment on, until space is made."""
    share = rng.uniform(0.02, 1)
    if job.mounts:
        with small_disk(job.workdir, int(share * SIZE["bytes"])) as enlarge:
            first = job.run()
            check_full(first)
            enlarge()
            second = resumed(job)
            keep(job)
            return [first, second]
    first = job.run(file_limit=int(share * SIZE["largest"]))
    check_full(first)
    return [first]


def check_full(end: End) -> None:
    expect(end.code in (0, RESUMABLE), f"ended with {end.code}: {end.said[-500:]}")
    expect(end.code == 0 or re.search("cannot be (written|saved)", end.line), f"unnamed end: {end.line}")


SIZE = {"bytes": 0, "largest": 0}  # of an undisturbed run's directory


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={max(size, 65536)}", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield lambda: subprocess.run([*mount, "remount,size=1g", "tmpfs", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether small file systems are to be had here."""
    try:
        with small_disk(folder / "probe", 65536):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def keep(job: Job) -> None:
    """Copies what the small disk holds to where it will be looked for."""
    copy = job.workdir.with_name(job.workdir.name + ".copy")
    shutil.copytree(job.workdir, copy)
    job.workdir = copy


def damage(path: Path, rng: random.Random, within: int | None = None) -> None:
    """Changes a byte (of the first `within`), cuts a file short, or removes it."""
    data = bytearray(path.read_bytes())
    how = rng.choice(("flip", "cut", "remove"))
    if how == "flip" and data:
        place = rng.randrange(min(len(data), within or len(data)))
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif how == "cut" and data:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        path.unlink()


def corrupt_checkpoint(job: Job, rng: random.Random, typical: float) -> list[End]:
    """Killed while training; a file of the newest checkpoint is damaged."""
    ends = stopped_after_checkpoints(job, rng, rng.choice((1, 2, 3)))
    newest = job.checkpoints()[-1]
    before = [int(path.name) for path in job.checkpoints()[:-1]]
    damage(rng.choice(sorted(path for path in newest.rglob("*") if path.is_file())), rng)
    end = job.run()
    ends.append(end)
    if end.code == 2 and not before:
        expect("every checkpoint is damaged" in end.line, f"unnamed end: {end.line}")
        shutil.rmtree(job.workdir / "checkpoints")  # the mend that the line names
    else:
        expect(end.code == 0, f"ended with {end.code}: {end.said[-500:]}")
        found = went_on_from(end)
        intact = 0 if int(newest.name) == int(JOB["lppo.iterations"]) else int(newest.name)  # then nothing was to do
        expect(found in (intact, max(before, default=0)), f"went on from {found}, not {before or newest}")
    return ends


def corrupt_shard(job: Job, rng: random.Random, typical: float) -> list[End]:
    """The model's weights are cut short, removed, or their header is damaged, while the run is stopped."""
    ends = stopped_after_checkpoints(job, rng, 1)
    shard = rng.choice(sorted(job.workdir.glob("toy/**/model*.safetensors")))
    whole, damaged = shard.read_bytes(), rng.random()
    size = 8 + int.from_bytes(whole[:8], "little")
    damage(shard, rng, within=8 if damaged < 0.3 else size)
    end = job.run()
    ends.append(end)
    expect(end.code in (0, 2) and "Traceback" not in end.said, f"ended with {end.code}: {end.said[-500:]}")
    expect(end.code == 0 or end.line, "no line names the end")
    shard.write_bytes(whole)
    return ends


def corrupt_record(job: Job, rng: random.Random, typical: float) -> list[End]:
    """Stopped in a sweep or in training; what it has written down of answers or scores is damaged."""
    ends = stopped_after_checkpoints(job, rng, rng.choice((0, 1)))
    records = sorted([*job.workdir.glob("transcripts/*.jsonl"), *job.workdir.glob("scores/*/*.jsonl")])
    damaged = rng.choice(records)
    damage(damaged, rng)
    end = job.run()
    ends.append(end)
    expect(end.code in (0, 2) and "Traceback" not in end.said, f"ended with {end.code}: {end.said[-500:]}")
    if end.code == 2:
        expect(damaged.name in end.line, f"the line does not name the file: {end.line}")
        damaged.unlink(missing_ok=True)  # the mend that the line names
        sweep = job.workdir / "sweeps" / f"{damaged.stem}.json"
        sweep.unlink(missing_ok=True)
    return ends


def killed_peer(job: Job, rng: random.Random, typical: float) -> list[End]:
    """One of two processes is killed at any moment; the other ends too."""

    def kill(process: subprocess.Popen[str]) -> None:
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(int(rng.choice(listed)), signal.SIGKILL)

    end = job.disturbed(rng.uniform(0.5, typical), kill, 2 * GRACE)
    expect(end.code in (0, 128 + signal.SIGKILL), f"ended with {end.code}: {end.said[-500:]}")
    expect(end.code == 0 or "was killed" in end.said, f"unnamed end: {end.said[-300:]}")
    return [end]


KINDS = {
    function.__name__: function
    for function in (sigkill, sigterm, full_disk, corrupt_checkpoint, corrupt_shard, corrupt_record, killed_peer)
}


def stopped_after_checkpoints(job: Job, rng: random.Random, count: int) -> list[End]:
    """A start that is stopped soon after its `count`-th checkpoint is complete (0: after its first answers)."""

    def ready() -> bool:
        answers = any(path.stat().st_size for path in job.workdir.glob("transcripts/*.jsonl"))
        return answers and len(job.checkpoints()) >= count

    return [job.stopped(ready, rng.uniform(0, 0.3))]


def went_on_from(end: End) -> int:
    """The iteration that training went on from; 0 where it began anew."""
    found = re.search(r"goes on after iteration (\d+)", end.said)
    return int(found[1]) if found else 0


def resumed(job: Job) -> End:
    """The next start, which goes on from the newest complete checkpoint: none is lost."""
    newest = max((int(path.name) for path in job.checkpoints()), default=0)
    end = job.run()
    expect(end.code == 0, f"the next start ended with {end.code}: {end.said[-800:]}")
    if newest < int(JOB["lppo.iterations"]):
        expect(went_on_from(end) == newest, f"went on from {went_on_from(end)}, but {newest} was complete")
    return end


def once(kind: str, seed: int, job: Job, expected: dict[str, bytes], typical: float) -> dict[str, Any]:
    """One disturbed run; what happened, and `failure`, None if it was good."""
    rng, entry, began = random.Random(seed), {"kind": kind, "seed": seed}, time.monotonic()
    ends: list[End] = []
    failure = None
    try:
        ends = KINDS[kind](job, rng, typical)
        if ends[-1].code != 0:
            ends.append(resumed(job))
        found = job.result()
        wrong = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        expect(not wrong, f"differs from the undisturbed run: {', '.join(wrong)}")
    except (Failed, OSError, ValueError) as error:
        failure = f"{type(error).__name__}: {error}"
    lines = [end.line for end in ends if end.line]
    codes = [end.code for end in ends]
    return entry | {"codes": codes, "lines": lines, "seconds": round(time.monotonic() - began, 1), "failure": failure}


def reference(folder: Path, cache: Path, processes: int) -> tuple[dict[str, bytes], float]:
    """Result and seconds of an undisturbed run, with its programs compiled before."""
    for name in ("cold", "warm"):
        job = Job(folder / f"{name}_{processes}", cache, processes)
        end = job.run()
        if end.code != 0:
            raise SystemExit(f"the undisturbed run ended with {end.code}: {end.said[-2000:]}")
    files = [path.stat().st_size for path in job.workdir.rglob("*") if path.is_file()]
    SIZE.update(bytes=sum(files), largest=max(files))
    return job.result(), end.seconds


def campaign(
    out: Path, kinds: Sequence[str], runs: int, minutes: float, seed: int, at_once: int
) -> list[dict[str, Any]]:
    """Up to `runs` runs, kinds in turn, until the minutes are over; writes OUT/faults.json as it goes."""
    cache = out / "compiled"
    references = {
        count: reference(out, cache, count) for count in {2 if kind == "killed_peer" else 1 for kind in kinds}
    }
    entries: list[dict[str, Any]] = []
    writing, mounts, began = Lock(), can_mount(out), time.monotonic()

    def run(number: int) -> None:
        if time.monotonic() - began > 60 * minutes:
            return
        kind = kinds[number % len(kinds)]
        processes = 2 if kind == "killed_peer" else 1
        workdir = out / f"run_{seed + number}"
        job = Job(workdir, cache, processes, mounts=mounts)
        expected, typical = references[processes]
        entry = once(kind, seed + number, job, expected, typical)
        for folder in {workdir, job.workdir}:
            if entry["failure"] is None:
                shutil.rmtree(folder, ignore_errors=True)
        with writing:
            entries.append(entry)
            print(json.dumps(entry), flush=True)
            content = {"typical_seconds": {str(k): v[1] for k, v in references.items()}, "runs": entries}
            (out / "faults.json").write_text(json.dumps(content, indent=1) + "\n")

    with ThreadPoolExecutor(at_once) as threads:
        list(threads.map(run, range(runs)))
    print(table(entries, time.monotonic() - began))
    return entries


def table(entries: Sequence[dict[str, Any]], seconds: float) -> str:
    """How many runs of each kind there were, and how they ended."""
    lines = ["| fault | runs | went on | named end first | failed | longest, s |", "|---|---|---|---|---|---|"]
    for kind in sorted({entry["kind"] for entry in entries}):
        own = [entry for entry in entries if entry["kind"] == kind]
        failed = sum(entry["failure"] is not None for entry in own)
        named = sum(entry["failure"] is None and bool({2, RESUMABLE} & set(entry["codes"])) for entry in own)
        longest = max(entry["seconds"] for entry in own)
        lines.append(f"| {kind} | {len(own)} | {len(own) - failed - named} | {named} | {failed} | {longest:.0f} |")
    failures = sum(entry["failure"] is not None for entry in entries)
    return "\n".join([*lines, f"{len(entries)} runs in {seconds / 60:.0f} minutes, {failures} failed"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    entries = campaign(out, options.kinds.split(","), options.runs, options.minutes, options.seed, options.at_once)
    return int(any(entry["failure"] is not None for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
