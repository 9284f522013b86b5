"""Runs agents' tasks in sandboxes that die, and shows that nothing is lost. Called by ops/demo.

Each task is run turn by turn through the command line program, as an agent outside of its sandbox would. At one turn
per task, drawn by the seed, every process of the sandbox and the host daemon are killed with SIGKILL, either after the
turn was answered or in the middle of it, and the sandbox's directory is deleted. A new daemon restores the last
committed checkpoint; an unanswered turn is asked again under its own key, so that it happens exactly once. In the end
the task's own tests decide.

Standard library only: it runs on a fresh machine.
"""

import argparse
import base64
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPS = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("TIDEPOOL_CACHE") or Path.home() / ".cache/tidepool")
UNPACK = "tar -x --no-same-owner -C / -f -"
VERDICTS = ("clean", "files", "processes", "full")


class Failure(Exception):
    """What went wrong, for the user."""


# A daemon that answers late, never or with something else is a failure of the demo, not of this program.
ERRORS = (Failure, OSError, subprocess.SubprocessError, ValueError, KeyError)


def size(n):
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024


def leftovers():
    out = subprocess.run([str(OPS / "lib/leftovers")], stdout=subprocess.PIPE, text=True, check=False).stdout
    return set(out.splitlines())


class Host:
    """A host daemon with a state directory of its own, and the command line program that talks to it."""

    def __init__(self, binaries, state, log):
        self.binaries, self.state, self.log = Path(binaries), Path(state), log
        self.socket = self.state / "api.sock"
        # Memory-backed, as the daemon's default, but a directory that can be taken away as a whole.
        self.dumps = Path("/dev/shm") / self.state.name
        self.dumps.mkdir()
        self.daemon = None
        self.env = {**os.environ, "TIDEPOOL_SOCKET": str(self.socket), "NO_COLOR": "1"}
        self.env.setdefault("TIDEPOOL_CRIU", str(CACHE / "criu/criu"))

    def start(self):
        command = [str(self.binaries / "tidepool-host"), "--state-dir", str(self.state), "--socket", str(self.socket),
                   "--dump-dir", str(self.dumps)]
        self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=self.env,
                                       start_new_session=True)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self.daemon.poll() is not None:
                raise Failure(f"the host daemon ended at once with {self.daemon.returncode}; the end of its log:\n{self.tail()}")
            done = self.call("status", check=False)
            if done.returncode == 0 and json.loads(done.stdout)["store"]["ready"]:
                return
            time.sleep(0.05)
        raise Failure(f"the host daemon does not get ready within a minute; the end of its log:\n{self.tail()}")

    def tail(self):
        self.log.flush()
        lines = Path(self.log.name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-15:])

    def kill(self):
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.send_signal(signal.SIGKILL)
            self.daemon.wait()

    def stop(self):
        """In good order; it may leave sandboxes running."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def argv(self, *args):
        return [str(self.binaries / "tidepool"), "--json", *args]

    def call(self, *args, stdin=None, check=True, timeout=300):
        with open(stdin or os.devnull, "rb") as data:
            done = subprocess.run(self.argv(*args), stdin=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.env,
                                  timeout=timeout, check=False)
        if check and done.returncode != 0:
            shown = " ".join(args[:3])
            raise Failure(f"tidepool {shown} ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()}"
                          f"\n{done.stdout.decode(errors='replace')[-1500:]}")
        return done

    def ask(self, *args, **kwargs):
        """The JSON that a command prints."""
        out = self.call(*args, **kwargs).stdout.decode()
        try:
            return json.loads(out)
        except json.JSONDecodeError:
            return json.loads(out.strip().splitlines()[-1])


def pids_of(sandbox):
    """All processes whose cgroup is the sandbox's, in whatever cgroup version."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if sandbox in (entry / "cgroup").read_text():
                    found.append(int(entry.name))
            except OSError:
                pass  # it has ended
    return found


def kill_sandbox(sandbox):
    """SIGKILL to all of it; returns when nothing of it runs."""
    killed = set()
    until = time.monotonic() + 20
    while pids := [p for p in pids_of(sandbox) if not is_zombie(p)]:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except ProcessLookupError:
                pass
        for pid in pids:
            thaw(pid)
        if time.monotonic() > until:
            raise Failure(f"processes of the sandbox do not die: {pids}")
        time.sleep(0.02)
    return len(killed)


def thaw(pid):
    """Lets a killed process die that a capture had frozen: version 1 of cgroups holds it even against SIGKILL."""
    try:
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "freezer":
                Path("/sys/fs/cgroup/freezer" + path, "freezer.state").write_text("THAWED")
    except OSError:
        pass  # it has ended


def netns_of(sandbox):
    """The named network namespaces that the sandbox's processes are in."""
    inodes = set()
    for pid in pids_of(sandbox):
        try:
            inodes.add(os.stat(f"/proc/{pid}/ns/net").st_ino)
        except OSError:
            pass
    directory = Path("/run/netns")
    return {p.name for p in directory.iterdir() if p.stat().st_ino in inodes} if directory.is_dir() else set()


def cgroups_of(sandbox):
    """The directories of the sandbox's cgroups, one for each hierarchy."""
    found = set()
    for pid in pids_of(sandbox):
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        except OSError:
            continue
        for path in {line.split(":", 2)[2] for line in lines if sandbox in line}:
            found |= {p for p in [Path("/sys/fs/cgroup" + path), *Path("/sys/fs/cgroup").glob("*" + path)] if p.is_dir()}
    return found


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (OSError, IndexError):
        return True


def unmount_below(directory):
    for _ in range(5):
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        points = [p for p in points if p == str(directory) or p.startswith(f"{directory}/")]
        if not points:
            return
        for point in sorted(points, reverse=True):
            subprocess.run(["umount", "-l", point], check=False, stderr=subprocess.DEVNULL)


def delete_directory(state, sandbox):
    """Deletes all that the host keeps on disk of a sandbox."""
    path = state / "fs/sandboxes" / sandbox
    if not path.is_dir():
        raise Failure(f"there is no directory of the sandbox at {path}")
    unmount_below(path)
    shutil.rmtree(path)


class Demo:
    def __init__(self, args):
        self.args = args
        self.random = random.Random(args.seed)
        self.out = sys.stderr if args.json else sys.stdout
        self.state = Path(tempfile.mkdtemp(prefix="tpdemo-", dir=CACHE))
        self.host = Host(args.bin, self.state, open(self.state / "host.log", "wb"))
        self.sandboxes = {}
        # All names by which something left behind would be known as this demo's.
        self.marks = {str(self.state), str(self.host.dumps)}
        self.cgroups = set()
        self.kills = self.verified = self.passed = 0
        self.restores, self.turns = [], []

    def say(self, text=""):
        print(text, file=self.out, flush=True)

    def exec_argv(self, name, key, turn, workdir):
        flags = ["--key", key] + (["-i"] if turn.get("stdin") else ["-w", workdir])
        return ["exec", *flags, name, "--", "bash", "-c", turn["cmd"]]

    def die_and_restore(self, name, pending=None):
        """Kills all there is, deletes the directory, restores. `pending`: the running client of an unanswered turn."""
        sandbox = self.sandboxes[name]
        # The daemon first: it could otherwise notice the sandbox's death and act on it.
        self.host.kill()
        count = kill_sandbox(sandbox)
        if count == 0:
            raise Failure(f"no process of sandbox {sandbox} was found to kill")
        if pending is not None:
            pending.wait(timeout=30)
        delete_directory(self.state, sandbox)
        self.kills += 1
        began = time.monotonic()
        self.host.start()
        info = self.host.ask("restore", name)
        self.marks |= netns_of(sandbox)
        took = time.monotonic() - began
        self.restores.append(info["duration_ms"])
        return count, info, took

    def run_turn(self, name, n, turn, workdir, death):
        """One turn. `death`: None, or how: `after` it was answered, or `during` it after this many seconds."""
        key = f"demo-{self.args.seed}-{name}-{n}"
        argv = self.exec_argv(name, key, turn, workdir)
        stdin = turn.get("stdin")
        if death and death[0] == "during":
            with open(stdin or os.devnull, "rb") as data:
                client = subprocess.Popen(self.host.argv(*argv), stdin=data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                          env=self.host.env)
            time.sleep(death[1])
            self.tell(death, *self.die_and_restore(name, pending=client))
        done = self.host.call(*argv, stdin=stdin, check=False)
        try:
            answer = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {}
        if done.returncode != 0 or "turn" not in answer:
            said = b"".join(base64.b64decode(answer.get(f"{s}_base64", "")) for s in ("stdout", "stderr")) or done.stdout
            raise Failure(f"turn {n} of {name} ended with {done.returncode}: {turn['cmd']}\n"
                          f"{(said + done.stderr).decode(errors='replace')[-2000:]}")
        info = answer["turn"]
        self.row(info, turn["cmd"], answer["replayed"])
        if death and death[0] == "after":
            story = self.die_and_restore(name)
            self.tell(death, *story)
            # A clean turn's state is the checkpoint of an earlier one; the sandbox knows the turn all the same.
            if story[1]["sandbox"]["turn"] != info["turn"]:
                raise Failure(f"turn {info['turn']} was answered, but {story[1]['sandbox']['turn']} is the last one known after the restore")

    def row(self, turn, command, replayed):
        stats = turn["stats"]
        self.say(f"  {turn['turn']:>4}  {turn['verdict']:<9}  {size(stats['captured_bytes']):>10}  {size(stats['sent_bytes']):>10}"
                 f"  {stats['frozen_us'] / 1000:>7.0f} ms  {stats['exposed_us'] / 1000:>7.0f} ms  {'(journaled) ' if replayed else ''}{' '.join(command.split())[:60]}")

    def tell(self, death, count, info, took):
        when = "after the turn was answered" if death[0] == "after" else "in the middle of the turn"
        checked = "verified" if info["verified"] else "NOT VERIFIED"
        self.say(f"        killed {count} processes and the daemon {when}; restored the checkpoint of turn {info['turn']}: {info['processes_restored']} processes, "
                 f"{size(info['fetched_bytes'])} fetched, {info['duration_ms']} ms ({took:.1f} s with the daemon's start): {checked}")
        if info["verified"]:
            self.verified += 1

    def run_task(self, directory):
        task = json.loads((directory / "task.json").read_text())
        name = task["name"]
        turns = [dict(t, stdin=str(directory / t["stdin"])) if t.get("stdin") else t for t in task["turns"]]
        # Death comes after the set-up, while there is still something to do.
        fatal = self.random.randrange(1, len(turns))
        how = self.random.choice(("after", "during"))
        death = (how, self.random.uniform(0.0, 0.12))
        self.say(f"\n{name} ({task['kind']}; {task['source']}): dies {how} turn {fatal + 1} of {len(turns)}")
        self.say(f"  {'turn':>4}  {'verdict':<9}  {'captured':>10}  {'sent':>10}  {'frozen':>10}  {'exposed':>10}  command")
        created = self.host.ask("sandbox", "create", name, task["base"])
        self.sandboxes[name] = created["id"]
        self.marks |= {created["id"]} | netns_of(created["id"])
        self.cgroups |= cgroups_of(created["id"])
        for n, turn in enumerate(turns):
            self.run_turn(name, n, turn, task["workdir"], death if n == fatal else None)
        self.run_turn(name, len(turns), {"cmd": UNPACK, "stdin": str(directory / task["tests"])}, task["workdir"], None)
        self.run_turn(name, len(turns) + 1, {"cmd": task["test_cmd"]}, task["workdir"], None)
        self.passed += 1
        self.say(f"        {name}: its own tests pass")
        self.turns += self.host.ask("turn", "list", name)
        self.host.call("sandbox", "rm", name)
        del self.sandboxes[name]

    def run(self):
        self.say(f"seed {self.args.seed}")
        self.host.start()
        began = time.monotonic()
        image = self.host.ask("image", "import", "tasks", self.args.base, timeout=900)
        self.say(f"image tasks: {image['files']} files, {size(image['bytes'])}, {size(image['sent_bytes'])} sent, {time.monotonic() - began:.1f} s")
        tasks = sorted(p for p in Path(self.args.tasks).iterdir() if (p / "task.json").exists())
        if self.args.task:
            unknown = set(self.args.task) - {p.name for p in tasks}
            if unknown:
                raise Failure(f"there is no task {', '.join(sorted(unknown))}: there are {', '.join(p.name for p in tasks)}")
            tasks = [p for p in tasks if p.name in self.args.task]
        failed = []
        for directory in tasks:
            try:
                self.run_task(directory)
            except ERRORS as error:
                failed.append(directory.name)
                self.say(f"  FAILED: {type(error).__name__}: {error}\n  the end of the daemon's log:\n{self.host.tail()}")
                if self.host.daemon is None or self.host.daemon.poll() is not None:
                    self.host.start()
                if directory.name in self.sandboxes:
                    self.host.call("sandbox", "rm", directory.name, check=False)
        return self.summary(len(tasks)), failed

    def summary(self, tasks):
        counts = {v: sum(t["verdict"] == v for t in self.turns) for v in VERDICTS}
        full = sum(t["stats"]["full_bytes"] for t in self.turns)
        sent = sum(t["stats"]["sent_bytes"] + t["record_bytes"] for t in self.turns)
        exposed = sorted(t["stats"]["exposed_us"] / 1000 for t in self.turns)
        result = {
            "tasks": tasks, "passed": self.passed, "kills": self.kills, "restores_verified": self.verified,
            "turns": len(self.turns), **counts, "full_every_turn_bytes": full, "sent_bytes": sent,
            "restore_ms_median": round(statistics.median(self.restores)) if self.restores else 0,
        }
        self.say(f"\n{self.passed} of {tasks} tasks pass their own tests; {self.kills} kills, {self.verified} restores verified")
        if self.turns:
            self.say(f"{len(self.turns)} turns: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS))
            saving = f", {full / sent:.0f} times less" if sent else ""
            self.say(f"checkpointing everything every turn: {size(full)}; sent: {size(sent)}{saving}")
            self.say(f"exposed delay of a turn: median {statistics.median(exposed):.0f} ms, longest {exposed[-1]:.0f} ms; "
                     f"restore: median {result['restore_ms_median']} ms")
        return result

    def close(self, before):
        """Takes away all that the demo made, however it ended. Returns what is left all the same."""
        if self.sandboxes:
            try:
                # Only the daemon knows all that belongs to a sandbox; it may be dead, if this comes in the middle of a restore.
                if self.host.call("status", check=False).returncode != 0:
                    self.host.kill()
                    self.host.start()
                for name in list(self.sandboxes):
                    self.host.call("sandbox", "rm", name, timeout=60)
                    del self.sandboxes[name]
            except ERRORS as error:
                print(f"error: a sandbox could not be removed: {error}", file=sys.stderr)
        self.host.stop()
        for sandbox in self.sandboxes.values():
            try:
                kill_sandbox(sandbox)
            except Failure as error:
                print(f"error: {error}", file=sys.stderr)
        for group in sorted(self.cgroups):
            # The parent is this host's own; it goes when it is empty.
            for path in (group, group.parent):
                try:
                    path.rmdir()
                except OSError:
                    pass  # gone already, or still in use by another sandbox
        self.host.log.close()
        unmount_below(self.state)
        shutil.rmtree(self.host.dumps, ignore_errors=True)
        if self.args.keep:
            self.say(f"kept: {self.state}")
        else:
            shutil.rmtree(self.state, ignore_errors=True)
        for _ in range(20):
            # Other hosts may run on this machine at the same time: only what is this demo's counts.
            left = {line for line in leftovers() - before if any(mark in line for mark in self.marks)}
            if not left:
                break
            time.sleep(0.25)
        return sorted(left)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True, help="where tidepool and tidepool-host are")
    parser.add_argument("--base", required=True, help="the root filesystem of the tasks")
    parser.add_argument("--tasks", required=True, help="what ops/tasks/prepare printed")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--task", action="append")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    before = leftovers()
    demo = Demo(args)
    result, failed, code = None, [], 1
    try:
        result, failed = demo.run()
        code = 0 if not failed and result["passed"] == result["tasks"] and result["restores_verified"] == result["kills"] else 1
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    finally:
        left = demo.close(before)
    if left:
        print("error: the demo left this behind:\n  " + "\n  ".join(left), file=sys.stderr)
        code = code or 1
    if args.json and result is not None:
        print(json.dumps(result, separators=(",", ":")))
    sys.exit(code)


if __name__ == "__main__":
    main()
