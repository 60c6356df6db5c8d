#!/usr/bin/env python3
"""Ranks that load their parts at the same time: all together against one alone, in one run.

    ranks.py --bench BENCH_LOAD [--ranks 2,4] [--devices cpu|N,N...] [--runs 5] [--cast DTYPE] [--cold auto|drop|advise]
             [--shared auto|no|LIBRARY] [--limit SECONDS] [--seconds N] [--no-verify] [--json FILE] PATH...
    ranks.py --table FILE.json...

A rank is a process of bench_load (--turns), with the ready-made rules; rank i is on the i-th of --devices, or they share
them. A round: in each case all ranks begin at one moment and load their parts; then rank 0 loads its part alone. Cases:
parts by rows and columns ('tp'), and the same with o_proj and down_proj cut by rows, too ('rows'), each asked for exactly and
automatically, and by ranks that share the reading ('tp shared'). With --cold, the files are dropped from the page cache before
all ranks load together ('cold tp'), and before rank 0 loads all of the files as one rank would ('cold once').

Ranks share the reading over NCCL (RCCL), so on GPUs alone, and one for each rank. They are processes of their own: where NCCL
is not there, refuses, fails or hangs, that is said, what it was about is null, and the others go on.

Seconds of all together are from the first beginning to the last end, medians of --runs; `needed_gb_per_s` is of the bytes
that all their parts have in the files, `gb_per_s` of those that were asked for. What comes of it: `times_one`, the rate of all
by that of one alone; `mix_by_rows`, the rate of 'tp' by that of 'rows', each in the fastest way; `auto_by_faster`, seconds of the
automatic way by those of the faster of it and the exact one; `shared_by_own`, the rate of shared reading by the faster one's;
`disk_by_files`, what all processes had read from storage by the files' bytes; `cold_by_once`, seconds by those of 'cold once'.
At the end each rank compares its results with the files. Exit code 0; 1 when bytes are wrong or a rank fails
(results of what went well are there); 2 for bad arguments.
"""
import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import peers  # noqa: E402

GOALS = {"times_one": "at least 1.8 on a GPU each", "mix_by_rows": "at least 0.85", "auto_by_faster": "at most 1.1",
         "shared_by_own": "more than 1 where sharing is faster", "disk_by_files": "at most 1.05", "cold_by_once": "at most 1.1"}


class Failed(Exception):
    pass


class Rank:
    """A process that loads when it is told. What it says comes into its team's queue, and at its end None."""

    def __init__(self, command, what, said):
        self.what, self.complaints = what, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.besides = []  # what others than bench_load say on its standard output: NCCL does
        environment = {name: value for name, value in os.environ.items() if name != "FST_TEST_DEVICE"}
        environment.setdefault("NCCL_DEBUG", "WARN")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True,
                                        errors="replace", env=environment)
        self.thread = threading.Thread(target=self.listen, args=[said], daemon=True)
        self.thread.start()

    def listen(self, said):
        for line in self.process.stdout:
            said.put((self, line))
        said.put((self, None))

    def ask(self, case, at=0.0):
        try:
            self.process.stdin.write(f"{case}\t{at:.6f}\n")
            self.process.stdin.flush()
        except OSError:  # it is gone: that is heard
            pass

    def end(self):
        try:
            self.process.stdin.close()
        except OSError:
            pass

    def ended(self):
        """How."""
        try:
            status = f"ended with status {self.process.wait(timeout=10)}"
        except subprocess.TimeoutExpired:
            status = "closed its output"
        self.complaints.seek(0)
        lines = self.besides[-8:] + self.complaints.read()[-2000:].splitlines()
        why = "; ".join(line.strip() for line in lines if line.strip())
        return f"{self.what} {status}" + (f": {why}" if why else "")

    def kill(self):
        self.process.kill()
        try:  # a driver may hold it
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            return
        self.thread.join(timeout=20)
        self.end()
        if not self.thread.is_alive():
            self.process.stdout.close()
        self.complaints.close()


class Team:
    """All ranks, a process each, that began. Once one of them fails or is silent for too long, all are ended."""

    def __init__(self, options, count, what="", more=(), limit=None):
        self.said, self.ranks, self.failure, self.limit = queue.Queue(), [], None, limit or options.limit
        try:
            for i in range(count):
                command = [options.bench, "--turns", "--tp", f"{i}/{count}", "--rows", "--read", "exact", "--read", "auto",
                           "--device", options.devices[i % len(options.devices)], *more]
                for cast in options.cast:
                    command += ["--cast", cast]
                if options.no_verify:
                    command.append("--no-verify")
                self.ranks.append(Rank(command + options.paths, f"rank {i} of {count}{what}", self.said))
            self.greetings = self.hear(self.ranks)
        except OSError as error:
            self.kill()
            raise Failed(f"{options.bench}: {error.strerror}") from error
        except BaseException:
            self.kill()
            raise

    def next(self, waited_for):
        """(rank, line); None: that was all."""
        try:
            return self.said.get(timeout=self.limit)
        except queue.Empty:
            raise Failed(f"{waited_for[0].what} said nothing for {self.limit:g} s, and was ended") from None

    def hear(self, ranks):
        """An answer of each, whoever is first."""
        answers = {}
        while len(answers) < len(ranks):
            rank, line = self.next([rank for rank in ranks if rank not in answers])
            if line is None:
                raise Failed(rank.ended())
            if line.startswith("{"):
                answers[rank] = json.loads(line)
            else:
                rank.besides.append(line)
        return [answers[rank] for rank in ranks]

    def together(self, ranks, case):
        """All begin at one moment: (seconds, how late, answers)."""
        at = time.monotonic() + 0.02 + 0.002 * len(ranks)
        for rank in ranks:
            rank.ask(case, at)
        answers = self.hear(ranks)
        begun = [a["started"] for a in answers]
        return max(a["started"] + a["seconds"] for a in answers) - min(begun), max(begun) - at, answers

    def attempt(self, work, *arguments):
        """What goes wrong is this team's end, not that of the measurement."""
        if self.failure:
            return
        try:
            work(*arguments)
        except (Failed, ValueError) as error:
            self.failure = str(error)
            self.kill()

    def finish(self, compares):
        """They compare their results and go."""
        waited_for, right = list(self.ranks), set()
        for rank in self.ranks:
            rank.end()
        while waited_for:
            rank, line = self.next(waited_for)
            if line is None:
                waited_for.remove(rank)
                if rank.process.wait(timeout=10):
                    raise Failed(rank.ended())
            elif "are right" in line:
                right.add(rank)
        for rank in self.ranks:
            if compares and rank not in right:
                raise Failed(f"{rank.what} compared nothing")

    def kill(self):
        for rank in self.ranks:
            rank.kill()
        self.ranks = []


class Case:
    def __init__(self, count, name, wanted, team):
        self.count, self.name, self.wanted, self.team = count, name, wanted, team  # wanted: what bench_load calls it
        self.seconds, self.alone, self.late, self.answers = [], [], 0.0, None
        self.shared = " shared" in name  # by one rank alone: nobody shares

    def take(self, counts=True, ranks=None, alone=True):
        ranks = self.team.ranks if ranks is None else ranks
        seconds, late, answers = self.team.together(ranks, self.wanted)
        one = self.team.together(ranks[:1], self.wanted)[0] if alone and not self.shared else None
        if counts:
            self.seconds.append(seconds)
            self.alone += [] if one is None else [one]
            self.late = max(self.late, late)
            self.answers = answers

    def total(self, key):
        values = [a[key] for a in self.answers]
        return None if None in values else sum(values)

    def rate(self, key="bytes_needed"):
        return self.total(key) / statistics.median(self.seconds) / 1e9 if self.seconds else None

    def times_one(self):
        """By rounds: what disturbs one load disturbs its neighbour, too."""
        if not self.alone:
            return None
        share = self.total("bytes_needed") / self.answers[0]["bytes_needed"]
        return statistics.median(share * one / all_ for one, all_ in zip(self.alone, self.seconds))

    def run(self):
        first, seconds = self.answers[0], statistics.median(self.seconds)
        out = {"case": self.name, "ranks": self.count, "seconds": round(seconds, 6), "gb_per_s": peers.digits(self.rate("bytes_read")),
               "needed_gb_per_s": peers.digits(self.rate())}
        if self.alone:
            alone = statistics.median(self.alone)
            out.update(alone_seconds=round(alone, 6),
                       alone_needed_gb_per_s=peers.digits(first["bytes_needed"] / alone / 1e9),
                       times_one=peers.digits(self.times_one()))
        out.update({key: self.total(key) for key in ("bytes_needed", "bytes_read", "bytes_out", "asked_bytes", "disk_bytes",
                                                     "pinned_bytes", "cpu_seconds")})
        out.update({key: first[key] for key in ("threads", "slots", "slot_bytes", "limit", "reader")})
        out.update(numa_nodes=[a["numa_node"] for a in self.answers], begun_late=round(self.late, 6),
                   measured=len(self.seconds), all_seconds=[round(s, 6) for s in self.seconds],
                   all_alone_seconds=[round(s, 6) for s in self.alone])
        return out


def ratio(one, other):
    return None if one is None or other is None else peers.digits(one / other)


def nccl(options, amd):
    """The library's path or name; Failed."""
    name = "librccl.so.1" if amd else "libnccl.so.2"
    if options.shared != "auto" or os.environ.get("FST_NCCL"):
        return os.environ["FST_NCCL"] if options.shared == "auto" else options.shared
    places = [name]
    try:
        found = importlib.util.find_spec("nvidia.nccl")  # that of PyTorch
        places += [os.path.join(place, "lib", name) for place in found.submodule_search_locations] if found else []
    except ModuleNotFoundError:
        pass
    for place in places:
        try:
            ctypes.CDLL(place)
            return place
        except OSError:
            pass
    raise Failed(f"there is no {name}")


class Group:
    """Ranks of one number of them: such that read for themselves, and such that share the reading."""

    def __init__(self, options, count):
        self.options, self.count, self.ceilings = options, count, {}
        self.cases, self.cold, self.once = [], [], None
        self.own = self.sharing = None
        self.shared = {"nccl": None, "library": None, "why_not": None}
        self.doubts, self.dropped = [], None

    def __enter__(self):
        self.own = Team(self.options, self.count)
        self.greetings = self.own.greetings
        self.add_cases(self.own, ("exact", "auto"))
        if self.options.cold:
            self.once = Case(1, "cold once", "warm as is", self.own)
        try:
            self.check_sharing()
            self.share()
            self.shared["nccl"] = self.sharing.greetings[0]["nccl"]
            self.add_cases(self.sharing, ("shared",))
        except Failed as error:
            self.shared["why_not"] = str(error)
            if self.options.shared not in ("auto", "no"):
                self.doubts.append(str(error))
        return self

    def __exit__(self, *_):
        for team in (self.own, self.sharing):
            if team:
                team.kill()

    def add_cases(self, team, ways):
        for name in team.greetings[0]["cases"]:
            words = name.split()
            if words[0] != "warm" or words[1] not in ("tp", "rows") or words[2] not in ways:
                continue
            self.cases.append(Case(self.count, name.removeprefix("warm "), name, team))
            if self.options.cold and words[1] == "tp" and len(words) == 3:
                self.cold.append(Case(self.count, name.replace("warm", "cold"), name, team))

    def check_sharing(self):
        o = self.options
        if o.shared == "no":
            raise Failed("--shared no")
        if o.devices == ["cpu"]:
            raise Failed("NCCL's communicators are for GPUs")
        if self.count == 1 or self.count > len(o.devices):
            raise Failed(f"NCCL wants several ranks, and a GPU for each: there are {self.count} on {len(o.devices)}")
        self.shared["library"] = nccl(o, "hip" in self.greetings[0]["device"])

    def share(self):
        """Begins those that share."""
        o = self.options
        with tempfile.TemporaryDirectory(prefix="fst-ranks-") as folder:
            # The library's time limit comes first: it says more.
            more = ["--nccl", os.path.join(folder, "id"), "--nccl-library", self.shared["library"], "--timeout", f"{o.limit:.0f}"]
            self.sharing = Team(o, self.count, ", shared", more, o.limit + 20)

    def take(self, case, *arguments):
        """One case of those that share may fail: the others are measured by processes that begin anew, once."""
        if case is self.dropped:
            return
        case.team.attempt(case.take, *arguments)
        if not case.shared or not case.team.failure or self.dropped:
            return
        self.dropped = case
        self.doubts.append(f"{case.name}: {case.team.failure}")
        try:
            self.share()
        except Failed as error:
            self.doubts.append(str(error))
            return
        for other in self.cases + self.cold:
            other.team = self.sharing if other.shared else other.team

    def ceiling(self, name, key):
        rank = self.own.ranks[0]
        rank.ask(name)
        self.ceilings.setdefault(key, []).append(self.own.hear([rank])[0]["gb_per_s"])

    def rounds(self, measure, seconds):
        """One in any case, more while there is time."""
        begun, longest = time.monotonic(), 0.0
        for turn in range(self.options.runs):
            before = time.monotonic()
            if turn and before - begun + longest > seconds:
                return
            measure()
            longest = max(longest, time.monotonic() - before)

    def measure(self):
        for case in self.cases:  # makes rings
            self.take(case, False)
        self.rounds(self.measure_warm, self.options.seconds / (2 if self.options.cold else 1))
        if self.options.cold:
            self.rounds(self.measure_cold, self.options.seconds / 2)

    def measure_warm(self):
        for case in self.cases:
            self.take(case)
        self.own.attempt(self.ceiling, "h2d", "h2d_gb_per_s")
        self.own.attempt(self.ceiling, "page cache", "page_cache_gb_per_s")

    def finish(self):
        for team in (self.own, self.sharing):
            if team:
                team.attempt(team.finish, not self.options.no_verify)
        for team in (self.own, self.sharing):
            if team and team.failure and not any(team.failure in doubt for doubt in self.doubts):
                self.doubts.append(team.failure)
        if self.sharing and self.doubts:
            self.shared["why_not"] = "; ".join(doubt for doubt in self.doubts if doubt != self.own.failure) or None

    def measure_cold(self):
        files = [f for path in self.options.paths for f in peers.checkpoint_files(path)]
        for case in self.cold + [self.once]:
            if case.team.failure:
                continue
            self.options.cold_by = peers.drop_caches(files, self.options.cold)
            self.take(case, True, case.team.ranks[:case.count], False)

    def counts(self, case):
        """Of those that share, what nobody could compare does not."""
        return bool(case.seconds) and not (case.shared and (case is self.dropped or case.team.failure))

    def best(self, kind, cast, ways):
        wanted = [f"{kind} {way}{cast}" for way in ways]
        return max((case.rate() for case in self.cases if case.name in wanted and self.counts(case)), default=None)

    def results(self):
        named = {case.name: case for case in self.cases}
        casts = [""] + [" to " + cast for cast in self.options.cast]
        out = {"ranks": self.count, "shared": self.shared,
               "times_one": {c.name: ratio(c.times_one(), 1) for c in self.cases if not c.shared}}
        every = ("exact", "auto", "shared")
        out["mix_by_rows"] = {"tp" + cast: ratio(self.best("tp", cast, every), self.best("rows", cast, every)) for cast in casts}
        out["auto_by_faster"] = {}
        for cast in casts:
            by_exact = ratio(named["tp exact" + cast].rate(), named["tp auto" + cast].rate())
            out["auto_by_faster"]["tp" + cast] = by_exact and max(1.0, by_exact)
        out["shared_by_own"] = {kind + cast: ratio(self.best(kind, cast, ("shared",)), self.best(kind, cast, ("exact", "auto")))
                                for kind in ("tp", "rows") for cast in casts}
        if self.once:
            whole = self.greetings[0]["bytes"]
            once = statistics.median(self.once.seconds) if self.once.seconds else None
            cold = {case.name: case for case in self.cold if self.counts(case)}
            names = [f"cold tp {way}" for way in every]
            out["disk_by_files"] = {n: ratio(cold[n].total("disk_bytes") if n in cold else None, whole) for n in names}
            out["cold_by_once"] = {n: ratio(statistics.median(cold[n].seconds) if n in cold else None, once) for n in names}
        return out

    def runs(self):
        return [case.run() for case in self.cases + self.cold + ([self.once] if self.once else []) if case.seconds]


def number(value, form):
    return "–" if value is None else format(value, form)


def table(out):
    lines = [f"{out['machine']}; {', '.join(out['devices'])}; {out['date']}; {out['commit']}; load average {out['load_average'][0]:.1f}; "
             f"{out['bytes'] / 1e9:.2f} GB.", "",
             "| ranks | case | seconds | needed GB/s | asked GB/s | one alone, GB/s | times one |", "|---:|---|---:|---:|---:|---:|---:|"]
    for run in out["runs"]:
        one = ("–", "–") if "times_one" not in run else (f"{run['alone_needed_gb_per_s']:.2f}", f"{run['times_one']:.2f}")
        lines.append(f"| {run['ranks']} | {run['case']} | {run['seconds']:.4f} | {run['needed_gb_per_s']:.2f} | "
                     f"{run['gb_per_s']:.2f} | {one[0]} | {one[1]} |")
    lines.append("")
    for result in out["results"]:
        for key, goal in GOALS.items():
            if result.get(key):
                lines.append(f"- {result['ranks']} ranks, {key} ({goal}): " +
                             ", ".join(f"{name} {number(value, '.3f')}" for name, value in result[key].items()))
        why = result.get("shared", {}).get("why_not")
        if why:
            lines.append(f"- {result['ranks']} ranks, shared reading was not measured, or not all of it: {why}")
    lines.append("- ceilings: " + ", ".join(f"{key.removesuffix('_gb_per_s').replace('_', ' ')} {value:.2f} GB/s"
                                            for key, value in out["ceilings"].items()))
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--bench", metavar="BENCH_LOAD")
    parser.add_argument("--ranks", default="2", help="how many; several numbers by commas are measured one after the other")
    parser.add_argument("--devices", default="cpu", help="cpu, or numbers of GPUs by commas")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cast", action="append", default=[], metavar="DTYPE")
    parser.add_argument("--cold", choices=("auto", "drop", "advise"))
    parser.add_argument("--shared", default="auto", metavar="auto|no|LIBRARY",
                        help="shared reading: with the NCCL that is found (or $FST_NCCL), not at all, or with this one")
    parser.add_argument("--seconds", type=float, default=3600, help="for all rounds of one number of ranks: fewer, but one")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one load or comparison; then processes are ended")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", action="store_true", help="of files that --json wrote")
    o = parser.parse_args()
    if o.table:
        return o
    if not o.bench:
        parser.error("--bench is needed")
    counts, o.devices = o.ranks.split(","), o.devices.split(",")
    if not all(c.isdigit() and 0 < int(c) <= 64 for c in counts):
        parser.error("--ranks: numbers from 1 to 64")
    if o.devices != ["cpu"] and not all(d.isdigit() for d in o.devices):
        parser.error("--devices: cpu, or numbers")
    if o.runs < 1 or not 1 <= o.limit <= 3600 or o.seconds < 0:
        parser.error("--runs: at least 1; --limit: 1 to 3600; --seconds: at least 0")
    for path in o.paths:
        if not peers.checkpoint_files(path):
            parser.error(f"{path} is no .safetensors file, nor a directory with any")
    o.counts, o.cast = [int(c) for c in counts], [c.upper() for c in o.cast]
    o.cold_by = None
    return o


def warm(paths):
    for path in paths:
        for name in peers.checkpoint_files(path):
            with open(name, "rb", buffering=0) as file:
                while file.read(16 << 20):
                    pass


def measure(o):
    out = {"machine": None, "devices": [], "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
           "commit": None, "load_average": [round(load, 2) for load in os.getloadavg()], "bytes": None, "cold_by": None,
           "ceilings": {}, "doubts": [], "results": [], "runs": []}
    rates = {}
    for count in o.counts:
        warm(o.paths)
        try:
            with Group(o, count) as group:
                hello = group.greetings[0]
                out.update({key: hello[key] for key in ("machine", "commit", "files", "bytes")})
                out["devices"] = list(dict.fromkeys(out["devices"] + [g["device"] for g in group.greetings]))
                group.measure()
                if o.json:  # whoever ends this program now has something
                    so_far = {"cold_by": o.cold_by, "doubts": out["doubts"] + group.doubts + ["not all results were compared"],
                              "results": out["results"] + [group.results()], "runs": out["runs"] + group.runs()}
                    peers.write_json({**out, **so_far}, o.json)
                group.finish()
        except Failed as error:  # none of them began
            out["doubts"].append(str(error))
            continue
        out["doubts"] += group.doubts
        for key, values in group.ceilings.items():
            rates.setdefault(key, []).extend(values)
        out["results"].append(group.results())
        out["runs"] += group.runs()
    out["cold_by"] = o.cold_by
    out["ceilings"] = {key: peers.digits(statistics.median(values)) for key, values in rates.items()}
    return out


def main():
    o = arguments()
    if o.table:
        for path in o.paths:
            with open(path, encoding="utf-8") as file:
                print(table(json.load(file)))
        return 0
    out = measure(o)
    if o.json:
        peers.write_json(out, o.json)
    if out["results"]:
        print(table(out))
    for doubt in out["doubts"]:
        print(f"ranks: {doubt}", file=sys.stderr)
    return 1 if out["doubts"] else 0


if __name__ == "__main__":
    sys.exit(main())
