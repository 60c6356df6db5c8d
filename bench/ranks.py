#!/usr/bin/env python3
"""Ranks that load their parts at the same time: all together against one alone, in one run.

    ranks.py --bench BENCH_LOAD [--ranks 2,4] [--devices cpu|N,N...] [--runs 5] [--cast DTYPE] [--cold auto|drop|advise]
             [--no-verify] [--json FILE] PATH...
    ranks.py --table FILE.json...

A rank is a process of bench_load (--turns), with the ready-made rules; rank i is on the i-th of --devices, or they share
them. A round: in each case all ranks begin at one moment and load their parts; then rank 0 loads its part alone. Cases:
parts by rows and columns ('tp'), and the same with o_proj and down_proj cut by rows, too ('rows'), each asked for exactly and
automatically. With --cold, the files are dropped from the page cache before all ranks load together ('cold tp'), and before
rank 0 loads all of the files as one rank would ('cold once').

Seconds of all together are from the first beginning to the last end, medians of --runs; `needed_gb_per_s` is of the bytes
that all their parts have in the files, `gb_per_s` of those that were asked for. What comes of it: `times_one`, the rate of all
by that of one alone; `mix_by_rows`, the rate of 'tp' by that of 'rows', each in the better way; `auto_by_faster`, seconds of the
automatic way by those of the faster one; `disk_by_files`, what all processes had read from storage by the files' bytes.
At the end each rank compares its results with the files. Exit code 0; 1 when bytes are wrong or a rank fails; 2 for bad
arguments.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import peers  # noqa: E402

GOALS = {"times_one": "at least 1.8 on a GPU each", "mix_by_rows": "at least 0.85", "auto_by_faster": "at most 1.1",
         "disk_by_files": "at most 1.05", "cold_by_once": "at most 1.1"}


class Failed(Exception):
    pass


class Rank:
    """A process that loads when it is told."""

    def __init__(self, options, rank, ranks, device):
        self.what = f"rank {rank} of {ranks}"
        command = [options.bench, "--turns", "--tp", f"{rank}/{ranks}", "--rows", "--read", "exact", "--read", "auto",
                   "--device", device]
        for cast in options.cast:
            command += ["--cast", cast]
        if options.no_verify:
            command.append("--no-verify")
        environment = {name: value for name, value in os.environ.items() if name != "FST_TEST_DEVICE"}
        self.process = subprocess.Popen(command + options.paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment)

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.what} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, case, at=0.0):
        try:
            self.process.stdin.write(f"{case}\t{at:.6f}\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Failed(f"{self.what}: {error.strerror}") from error

    def end(self, compares):
        """It compares its results and goes. What is wrong with it."""
        self.process.stdin.close()
        said = self.process.stdout.read()
        if self.process.wait():
            return f"{self.what} ended with status {self.process.returncode}"
        return f"{self.what} compared nothing" if compares and "are right" not in said else None

    def kill(self):
        self.process.kill()
        self.process.wait()


def together(ranks, case):
    """All begin at one moment: (seconds, answers)."""
    at = time.monotonic() + 0.02 + 0.002 * len(ranks)
    for rank in ranks:
        rank.ask(case, at)
    answers = [rank.read() for rank in ranks]
    begun = [a["started"] for a in answers]
    return max(a["started"] + a["seconds"] for a in answers) - min(begun), max(begun) - at, answers


class Case:
    def __init__(self, count, name, wanted):
        self.count, self.name, self.wanted = count, name, wanted  # wanted: what bench_load calls it
        self.seconds, self.alone, self.late, self.answers = [], [], 0.0, None

    def take(self, ranks, counts=True):
        seconds, late, answers = together(ranks, self.wanted)
        alone = together(ranks[:1], self.wanted)[0]
        if counts:
            self.seconds.append(seconds)
            self.alone.append(alone)
            self.late = max(self.late, late)
            self.answers = answers

    def total(self, key):
        values = [a[key] for a in self.answers]
        return None if None in values else sum(values)

    def rate(self, key="bytes_needed"):
        return self.total(key) / statistics.median(self.seconds) / 1e9

    def times_one(self):
        """By rounds: what disturbs one load disturbs its neighbour, too."""
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


class Group:
    """Ranks of one number of them."""

    def __init__(self, options, count):
        self.options, self.count, self.ceilings = options, count, {}
        self.ranks, self.cases, self.cold, self.once = [], [], [], None

    def __enter__(self):
        devices = self.options.devices
        for i in range(self.count):
            self.ranks.append(Rank(self.options, i, self.count, devices[i % len(devices)]))
        self.greetings = [rank.read() for rank in self.ranks]
        for name in self.greetings[0]["cases"]:
            if name.startswith(("warm tp", "warm rows")):
                self.cases.append(Case(self.count, name.removeprefix("warm "), name))
            if self.options.cold and name in ("warm tp exact", "warm tp auto"):
                self.cold.append(Case(self.count, name.replace("warm", "cold"), name))
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()

    def ceiling(self, name, key):
        self.ranks[0].ask(name)
        self.ceilings.setdefault(key, []).append(self.ranks[0].read()["gb_per_s"])

    def measure(self):
        for turn in range(-1, self.options.runs):  # the first one makes rings
            for case in self.cases:
                case.take(self.ranks, turn >= 0)
            if turn >= 0:
                self.ceiling("h2d", "h2d_gb_per_s")
                self.ceiling("page cache", "page_cache_gb_per_s")
        for turn in range(self.options.runs if self.options.cold else 0):
            self.measure_cold()

    def measure_cold(self):
        files = [f for path in self.options.paths for f in peers.checkpoint_files(path)]
        self.once = self.once or Case(1, "cold once", "warm as is")
        for case in self.cold + [self.once]:
            self.options.cold_by = peers.drop_caches(files, self.options.cold)
            seconds, late, case.answers = together(self.ranks if case is not self.once else self.ranks[:1], case.wanted)
            case.seconds.append(seconds)
            case.late = max(case.late, late)

    def results(self):
        named = {case.name: case for case in self.cases}
        out = {"ranks": self.count, "times_one": {c.name: peers.digits(c.times_one()) for c in self.cases}}
        casts = [""] + [" to " + cast for cast in self.options.cast]
        best = {(kind, cast): max(named[f"{kind} {way}{cast}"].rate() for way in ("exact", "auto"))
                for kind in ("tp", "rows") for cast in casts}
        out["mix_by_rows"] = {"tp" + cast: peers.digits(best["tp", cast] / best["rows", cast]) for cast in casts}
        out["auto_by_faster"] = {
            "tp" + cast: peers.digits(max(1.0, named["tp exact" + cast].rate() / named["tp auto" + cast].rate())) for cast in casts}
        if self.once:
            whole, once = self.greetings[0]["bytes"], statistics.median(self.once.seconds)
            out["disk_by_files"] = {c.name: peers.digits(c.total("disk_bytes") / whole) for c in self.cold
                                    if c.total("disk_bytes") is not None}
            out["cold_by_once"] = {c.name: peers.digits(statistics.median(c.seconds) / once) for c in self.cold}
        return out

    def runs(self):
        return [case.run() for case in self.cases + self.cold + ([self.once] if self.once else [])]


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
                             ", ".join(f"{name} {value:.3f}" for name, value in result[key].items()))
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
    if o.runs < 1:
        parser.error("--runs: at least 1")
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
        with Group(o, count) as group:
            hello = group.greetings[0]
            out.update({key: hello[key] for key in ("machine", "commit", "files", "bytes")})
            out["devices"] = list(dict.fromkeys(out["devices"] + [g["device"] for g in group.greetings]))
            group.measure()
            out["doubts"] += [doubt for doubt in (rank.end(not o.no_verify) for rank in group.ranks) if doubt]
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
    try:
        out = measure(o)
    except Failed as error:
        print(f"ranks: {error}", file=sys.stderr)
        return 1
    if o.json:
        peers.write_json(out, o.json)
    print(table(out))
    for doubt in out["doubts"]:
        print(f"ranks: {doubt}", file=sys.stderr)
    return 1 if out["doubts"] else 0


if __name__ == "__main__":
    sys.exit(main())
